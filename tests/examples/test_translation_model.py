"""Presets, loss and loading of the translation example's models."""

from __future__ import annotations

import copy
import math
import re
import warnings

import model as models
import pytest
import torch
from common import cross_entropy
from torch import nn
from torch.nn import functional as F

ENTRY = re.compile(r"\.layers\.\d+\..*(q_proj|k_proj|v_proj|out_proj|fc1|fc2)\.weight$")


def on_meta(preset: str, vocab_size: int) -> nn.Module:
    with torch.device("meta"):
        return models.build_model(models.build_config(preset, vocab_size=vocab_size))


def tokens(rows: int, length: int, vocab_size: int) -> torch.Tensor:
    """[rows, length] ordinary tokens, every row ending in </s>."""
    ids = torch.randint(models.UNK + 1, vocab_size, (rows, length))
    ids[:, -1] = models.EOS
    return ids


@pytest.mark.parametrize(
    ("preset", "vocab_size", "prunable"),
    [("tiny", 6_000, 917_504), ("small", 6_000, 5_505_024), ("base", 6_000, 44_040_192), ("big", 33_712, 176_160_768)],
)
def test_prunable_weights(preset: str, vocab_size: int, prunable: int) -> None:
    weights = dict(on_meta(preset, vocab_size).named_parameters())
    assert sum(weight.numel() for name, weight in weights.items() if ENTRY.search(name)) == prunable
    assert models.PRESETS[preset].prunable == prunable
    # What is left are the embedding, biases and norms; every matrix but the embedding is prunable.
    matrices = [name for name, weight in weights.items() if weight.dim() >= 2 and not ENTRY.search(name)]
    assert matrices == ["model.shared.weight"]


def test_big_has_the_embedding_of_the_paper() -> None:
    embedding = on_meta("big", 33_712).get_input_embeddings().weight.numel()
    assert embedding == 33_712 * 1024 and round(embedding / 1e6, 1) == 34.5


def test_one_embedding_is_shared() -> None:
    model = models.build_model(models.build_config("tiny", vocab_size=100))
    shared = model.get_input_embeddings().weight
    assert model.lm_head.weight is shared
    assert model.model.encoder.embed_tokens.weight is shared and model.model.decoder.embed_tokens.weight is shared


def test_pre_norm_sinusoidal_and_dropouts() -> None:
    config = models.build_config("tiny", vocab_size=100, dropout=0.3)
    assert (config.dropout, config.attention_dropout, config.activation_dropout) == (0.3, 0.3, 0.3)
    assert config.encoder_layerdrop == config.decoder_layerdrop == 0
    model = models.build_model(config)
    assert isinstance(model.model.encoder.layer_norm, nn.LayerNorm)  # the final norm that pre-norm needs
    assert not [name for name, _ in model.named_parameters() if "position" in name]
    again = models.build_config("tiny", vocab_size=100)
    assert (again.dropout, again.attention_dropout, again.activation_dropout) == (0.1, 0.1, 0.1)


def test_labels_are_shifted_behind_the_start_token() -> None:
    torch.manual_seed(0)
    model = models.build_model(models.build_config("tiny", vocab_size=50)).eval()
    sources, labels = tokens(3, 6, 50), tokens(3, 5, 50)
    labels[0, 4:] = models.IGNORE
    inputs = torch.cat([torch.full((3, 1), models.EOS), labels[:, :-1]], 1)
    expected = model(input_ids=sources, decoder_input_ids=inputs).logits
    torch.testing.assert_close(model(input_ids=sources, labels=labels).logits, expected)


def test_attention_chosen_for_a_cpu_is_the_same_function() -> None:
    torch.manual_seed(0)
    config = models.build_config("tiny", vocab_size=50, dropout=0.0)
    fused = models.build_model(config)
    plain = copy.deepcopy(fused)
    models.choose_attention(plain, torch.device("meta"))
    assert plain.config._attn_implementation == fused.config._attn_implementation == "sdpa"
    models.choose_attention(plain, torch.device("cpu"))
    assert (plain.config._attn_implementation, fused.config._attn_implementation) == ("eager", "sdpa")

    sources, labels = tokens(3, 9, 50), tokens(3, 7, 50)
    mask = torch.ones_like(sources)
    mask[0, 4:] = mask[2, 1:] = 0  # padding
    for model in (fused, plain):
        model(input_ids=sources, attention_mask=mask, labels=labels).loss.backward()
    for (name, a), (_, b) in zip(fused.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("preset", ["tiny", "small"])
def test_initial_loss_is_near_that_of_guessing(preset: str) -> None:
    torch.manual_seed(0)
    vocab_size = 6_000
    model = models.build_model(models.build_config(preset, vocab_size=vocab_size)).eval()
    sources, labels = tokens(8, 12, vocab_size), tokens(8, 12, vocab_size)
    with torch.no_grad():
        logits = model(input_ids=sources, labels=labels).logits
    value = models.loss(logits, labels, smoothing=0.0, denominator=labels.numel()).item()
    assert abs(value - math.log(vocab_size)) < 0.25


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("chunk", [1, 70, 2**22])
def test_loss_and_gradient_equal_cross_entropy(smoothing: float, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "_CHUNK_ON_CPU", chunk)
    torch.manual_seed(0)
    labels = torch.randint(0, 17, (4, 7))
    labels[0, 3:] = labels[3] = models.IGNORE
    logits = (3 * torch.randn(4, 7, 17)).requires_grad_()
    reference = logits.detach().clone().requires_grad_()

    count = int((labels != models.IGNORE).sum())
    value = models.loss(logits, labels, smoothing=smoothing, denominator=count)
    expected = F.cross_entropy(reference.flatten(0, 1), labels.flatten(), label_smoothing=smoothing)
    torch.testing.assert_close(value, expected)
    (5 * value).backward()
    (5 * expected).backward()
    torch.testing.assert_close(logits.grad, reference.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loss_of_half_precision_logits_is_computed_in_fp32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    labels = torch.randint(0, 5_000, (2, 9))
    logits = torch.randn(2, 9, 5_000).to(dtype).requires_grad_()
    reference = logits.detach().float().requires_grad_()
    value = models.loss(logits, labels, smoothing=0.1, denominator=18)
    expected = F.cross_entropy(reference.flatten(0, 1), labels.flatten(), label_smoothing=0.1)
    torch.testing.assert_close(value, expected)
    scale = 2.0**16  # as a loss scaler's: without it fp16 rounds most of these gradients to zero
    (scale * value).backward()
    (scale * expected).backward()
    assert logits.grad is not None and reference.grad is not None and logits.grad.dtype == dtype
    torch.testing.assert_close(logits.grad, reference.grad.to(dtype))


def test_loss_of_pieces_adds_up_to_that_of_the_batch() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 4, 11), torch.randint(0, 11, (6, 4))
    labels[1, 1:] = labels[5] = models.IGNORE
    count = (labels != models.IGNORE).sum()
    whole = models.loss(logits, labels, smoothing=0.1, denominator=count)
    pieces = [
        models.loss(logits[rows], labels[rows], smoothing=0.1, denominator=count) for rows in ([0], [1, 2, 3], [4, 5])
    ]
    torch.testing.assert_close(sum(pieces), whole)
    assert pieces[2] > 0 and models.loss(logits[5:], labels[5:], smoothing=0.1, denominator=count) == 0


def test_saved_model_is_loaded_as_it_was_and_generates_without_warnings(
    tmp_path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    model = models.build_model(models.build_config("tiny", vocab_size=60)).eval()
    model.save_pretrained(tmp_path)
    loaded = models.load_pretrained(str(tmp_path)).eval()
    assert type(loaded) is type(model) and loaded.lm_head.weight is loaded.get_input_embeddings().weight
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)

    ids = loaded.generation_config
    assert (ids.bos_token_id, ids.pad_token_id, ids.eos_token_id) == (models.BOS, models.PAD, models.EOS)
    assert ids.decoder_start_token_id == models.EOS and ids.forced_bos_token_id is None

    capfd.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        output = loaded.generate(tokens(2, 5, 60), num_beams=4, max_new_tokens=6)
    assert (output[:, 0] == models.EOS).all()
    assert capfd.readouterr() == ("", "") and not caplog.records


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"preset": "huge"}, "huge.*tiny, small, base, big.*--preset"),
        ({"dropout": 1.0}, "dropout=1.0.*--dropout"),
        ({"vocab_size": 4}, "vocab_size=4"),
        ({"max_positions": 1}, "max_positions=1.*--max-positions"),
    ],
)
def test_settings_out_of_range(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        models.build_config(**{"preset": "tiny", "vocab_size": 100, **settings})


def test_folder_without_a_model(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"must be a folder or hub name of an encoder-decoder.*--model-name"):
        models.load_pretrained(str(tmp_path))
