"""Whole translations by a small M2M100 in every layout."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from sparse_layers import clock, times
from torch import Tensor, nn

from gap_ds import sparsify_for_inference
from gap_ds.inference import timing
from gap_ds.inference.layers import CSRLinear


@pytest.fixture(scope="module")
def translator() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.M2M100Config(
        vocab_size=60, d_model=32, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=64, decoder_ffn_dim=64,
        encoder_attention_heads=2, decoder_attention_heads=2, max_position_embeddings=64, init_std=0.3,
        bos_token_id=0, pad_token_id=1, eos_token_id=2, decoder_start_token_id=2,
    )  # fmt: skip
    model = transformers.M2M100ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and "layers" in name:
                module.weight.masked_fill_(torch.rand_like(module.weight) < 0.8, 0.0)
    return model


def source(rows: int = 3) -> dict[str, Tensor]:
    ids = torch.randint(4, 60, (rows, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    ids[0, 6:], mask[0, 6:] = 1, 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("beams", [1, 4])
def test_generate_with_and_without_beams(translator: Any, beams: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = copy.deepcopy(translator)

    def run(model: Any, **options: Any) -> Any:
        return model.generate(**source(), num_beams=beams, min_new_tokens=8, max_new_tokens=12, **options)

    monkeypatch.setattr(timing, "seconds", clock(lambda m: {CSRLinear: 1.0, nn.Linear: 2.0}.get(type(m), 0.0)))
    table = sparsify_for_inference(model, run, measure=times(dense=2.0, csr=1.0))
    names = [name for choice in table for name in choice.names if choice.layout == "csr"]
    assert len(names) == 2 * 6 + 2 * 10 and all("layers" in name for name in names)
    batches = {name: choice.batch for choice in table for name in choice.names}
    decoder, encoder = (batches[f"model.{side}.layers.0.fc1"] for side in ("decoder", "encoder"))
    assert encoder == ((27, 1),) and decoder[0][0] == 3 * beams and decoder[0][1] > 3
    assert batches["model.decoder.layers.1.encoder_attn.k_proj"][0][1] == 1  # cached after the first step
    assert torch.equal(run(model), run(translator))
    inputs = {**source(), "decoder_input_ids": torch.full((3, 4), 5)}
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, translator(**inputs).logits, rtol=1e-4, atol=1e-4)
    saved, wanted = model.state_dict(), translator.state_dict()
    assert saved.keys() == wanted.keys() and all(torch.equal(saved[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("beams", [1, 4])
@pytest.mark.parametrize("layout", ["packed", "joined"])
def test_generate_in_a_requested_layout(translator: Any, layout: Any, beams: int) -> None:
    model = copy.deepcopy(translator)

    def run(model: Any) -> Any:
        return model.generate(**source(), num_beams=beams, min_new_tokens=8, max_new_tokens=12)

    table = sparsify_for_inference(model, run, layout=layout)
    count = Counter(name for choice in table for name in [choice.layout] * len(choice.names))
    if layout == "joined":
        # q, k, v of 4 self-attentions; k, v of 2 cross-attentions; the other layers; the output projection
        assert count == {"joined": 4 * 3 + 2 * 2, "csr": 2 * 6 + 2 * 10 - 16, "dense": 1}
    elif count.get("dense"):
        pytest.skip("this torch or CPU has no packed product")
    assert torch.equal(run(model), run(translator))
    with torch.inference_mode():
        assert torch.equal(run(model), run(translator))
    saved, wanted = model.state_dict(), translator.state_dict()
    assert saved.keys() == wanted.keys() and all(torch.equal(saved[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("layout", ["packed", "csr", "joined"])
def test_generate_in_bf16(translator: Any, layout: Any) -> None:
    """Rounding is no worse than in dense bf16, and the translations score as well under the exact model."""
    dense = copy.deepcopy(translator).to(torch.bfloat16)
    model = copy.deepcopy(dense)

    def run(model: Any) -> Tensor:
        found = model.generate(**source(8), num_beams=4, min_new_tokens=8, max_new_tokens=8)
        assert isinstance(found, Tensor)
        return found

    table = sparsify_for_inference(model, run, layout=layout)
    if not any(choice.layout == layout for choice in table):
        pytest.skip("this torch or CPU has no packed product")
    inputs = {**source(), "decoder_input_ids": torch.full((3, 4), 5)}
    with torch.no_grad():
        exact = translator(**inputs).logits
        errors = [(m(**inputs).logits.float() - exact).abs().mean().item() for m in (model, dense)]
    assert errors[0] <= 1.2 * errors[1]
    found, wanted = run(model), run(dense)
    assert found.shape == wanted.shape
    scores = [likelihood(translator, source(8), tokens) for tokens in (found, wanted)]
    assert abs(scores[0] - scores[1]) < 0.05


def likelihood(model: Any, inputs: dict[str, Tensor], tokens: Tensor) -> float:
    """Mean log probability of a token; tokens (B, start token and T)."""
    with torch.no_grad():
        logs = model(**inputs, decoder_input_ids=tokens[:, :-1]).logits.log_softmax(-1)
    return float(logs.gather(-1, tokens[:, 1:, None]).mean())


def test_a_saved_model_is_the_dense_one(translator: Any, tmp_path: Any) -> None:
    import transformers

    model = copy.deepcopy(translator)
    sparsify_for_inference(model, layout="csr")
    model.save_pretrained(tmp_path)
    back = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(back.parameters(), translator.parameters(), strict=True))
