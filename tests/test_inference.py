"""Sparse inference: the same results in another form, and the form that the measurement says."""

from __future__ import annotations

import copy
import io
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gap_ds import inference, sparsify_for_inference
from gap_ds.inference import CSRLinear, Form, PackedLinear


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    inference.MEASURED.clear()
    yield
    torch.set_num_threads(threads)


def linear(outputs: int, inputs: int, density: float, bias: bool = True, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    layer = nn.Linear(inputs, outputs, bias=bias)
    with torch.no_grad():
        layer.weight.masked_fill_(torch.rand_like(layer.weight) >= density, 0.0)
    return layer


def network(density: float = 0.1) -> nn.Module:
    return nn.Sequential(linear(48, 32, density), nn.ReLU(), linear(32, 48, density), nn.Linear(32, 5))


def says(**seconds: float) -> Any:
    """A measurement with this outcome, whatever it is asked."""

    def measure(layers: Mapping[Form, Sequence[nn.Module]], rows: int) -> dict[Form, float]:
        return {form: seconds.get(form, 9.0) for form in layers}

    return measure


def forms(model: nn.Module) -> list[str]:
    names = {CSRLinear: "csr", PackedLinear: "packed", nn.Linear: "dense"}
    return [names[type(module)] for module in model if not isinstance(module, nn.ReLU)]


# ---------------------------------------------------------------------------------------------------- the form csr


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1,), (32,), (1, 32), (7, 32), (3, 1, 32), (2, 5, 32), (0, 32)])
def test_csr_equals_dense(shape: tuple[int, ...], bias: bool) -> None:
    layer = linear(48, shape[-1], 0.2, bias)
    sparse = CSRLinear(layer)
    for x in (torch.randn(shape), torch.randn(*shape[:-1], 2 * shape[-1])[..., ::2]):
        y = sparse(x)
        torch.testing.assert_close(y, layer(x).detach(), rtol=1e-5, atol=1e-6)
        assert y.is_contiguous() and not y.requires_grad


@pytest.mark.parametrize("density", [0.0, 1.0])
def test_csr_of_empty_and_full_weights(density: float) -> None:
    layer = linear(9, 7, density)
    torch.testing.assert_close(CSRLinear(layer)(torch.ones(3, 7)), layer(torch.ones(3, 7)).detach())


def test_nan_and_infinity_are_weights_like_any_other() -> None:
    layer = linear(8, 8, 0.2)
    with torch.no_grad():
        layer.weight[0, 0], layer.weight[1, 0] = float("nan"), float("inf")
    y = CSRLinear(layer)(torch.ones(2, 8))
    assert y[:, 0].isnan().all() and y[:, 1].isinf().all() and y[:, 2:].isfinite().all()


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 2e-3), (torch.float64, 1e-12)]
)
def test_other_dtypes(dtype: torch.dtype, tolerance: float) -> None:
    layer = linear(48, 32, 0.2).to(dtype)
    sparse, x = CSRLinear(layer), torch.randn(6, 32, dtype=dtype)
    exact = layer.double()(x.double()).detach()
    assert sparse(x).dtype == sparse.weight.dtype == dtype
    torch.testing.assert_close(sparse(x).double(), exact, rtol=tolerance, atol=tolerance)


def test_under_autocast() -> None:
    layer = linear(48, 32, 0.2)
    sparse, x = CSRLinear(layer), torch.randn(6, 32)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(sparse(x), layer.float()(x).float(), rtol=3e-2, atol=3e-2)


def test_it_is_moved_copied_pickled_and_saved_as_other_modules_are() -> None:
    layer, x = linear(48, 32, 0.2), torch.randn(4, 32)
    sparse = CSRLinear(layer)
    wanted = sparse(x)
    buffer = io.BytesIO()
    torch.save(sparse, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(sparse), torch.load(buffer, weights_only=False)):
        assert torch.equal(twin(x), wanted)
    state = sparse.state_dict()
    assert state.keys() == layer.state_dict().keys() and torch.equal(state["weight"], layer.weight)
    half = copy.deepcopy(sparse).to(torch.bfloat16)
    assert half(x.bfloat16()).dtype == half.weight.dtype == torch.bfloat16 and half.col.dtype == torch.int32
    torch.testing.assert_close(half.double()(x.double()).float(), wanted, rtol=3e-2, atol=3e-2)


def test_made_in_inference_mode_or_not() -> None:
    model = network()
    with torch.inference_mode():
        sparsify_for_inference(model, form="csr")
        inside = model(torch.ones(2, 32))
    with torch.no_grad():
        assert torch.equal(model(torch.ones(2, 32)), inside)


# ------------------------------------------------------------------------------------------------------ the choice


def test_the_measurement_decides() -> None:
    for seconds, wanted in ((says(dense=2.0, csr=1.0), "csr"), (says(dense=1.0, csr=2.0), "dense")):
        model = network()
        table = sparsify_for_inference(model, batch=4, measure=seconds)
        assert forms(model) == [wanted, wanted, "dense"]  # the last layer is not sparse
        assert [choice.names for choice in table] == [("0",), ("2",), ("3",)]
        assert {choice.form for choice in table[:2]} == {wanted} and table[0].shape == (48, 32)
        assert table[0].ratio == (2.0 if wanted == "csr" else 0.5) and table[0].batch == ((4, 1),)
        assert table[0].density == pytest.approx(0.1, abs=0.02)
        assert json.loads(json.dumps([choice.row() for choice in table]))[0]["form"] == wanted


def test_a_small_gain_is_not_taken() -> None:
    model = network()
    assert sparsify_for_inference(model, measure=says(dense=1.02, csr=1.0))[0].form == "dense"
    assert sparsify_for_inference(model, measure=says(dense=1.02, csr=1.0), margin=1.01)[0].form == "csr"


def test_layers_that_are_not_sparse_get_no_sparse_form() -> None:
    model = network(density=0.8)
    assert sparsify_for_inference(model, measure=says(dense=2.0, csr=1.0)) and forms(model) == ["dense"] * 3
    sparsify_for_inference(model, min_sparsity=0.1, measure=says(dense=2.0, csr=1.0))
    assert forms(model) == ["csr", "csr", "dense"]
    sparsify_for_inference(model, measure=says(dense=2.0, csr=1.0, packed=0.5))
    assert forms(model) == ["csr", "csr", "packed"]


def test_a_form_can_be_asked_for() -> None:
    # Not on a GPU: 2:4 stays dense.
    for form, wanted in (("csr", "csr"), ("packed", "packed"), ("dense", "dense"), ("2:4", "dense")):
        model = network()
        table = sparsify_for_inference(model, form=form, measure=says())  # type: ignore[arg-type]
        assert forms(model)[:2] == [wanted, wanted] and table[0].ratio is None


def test_rows_that_a_run_has_shown_weigh_as_often_as_they_came() -> None:
    """Sparse wins for few rows and loses for many: the layer that mostly sees few becomes sparse."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.once, self.often, self.never = (linear(16, 16, 0.1, seed=seed) for seed in range(3))

    def run(model: Any) -> None:
        model.once(torch.zeros(100, 16))
        model.often(torch.zeros(100, 16))
        for _ in range(30):
            model.often(input=torch.zeros(3, 1, 16))

    asked: list[int] = []

    def measure(layers: Mapping[Form, Sequence[nn.Module]], rows: int) -> dict[Form, float]:
        asked.append(rows)
        return {"dense": 1.0, "packed": 3.0, "csr": 2.0 if rows > 50 else 0.5}

    model = Two()
    table = {choice.names[0]: choice for choice in sparsify_for_inference(model, run, measure=measure)}
    assert table["once"].batch == ((100, 1),) and table["often"].batch == ((3, 30), (100, 1))
    assert [table[name].form for name in ("once", "often", "never")] == ["dense", "csr", "dense"]
    assert table["often"].ratio == pytest.approx(31 / 17) and table["never"].ratio is None
    assert sorted(asked) == [3, 100, 100]


def test_many_row_counts_are_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(model: Any) -> None:
        for rows in range(1, 12):
            model(torch.zeros(rows, 32))

    table = sparsify_for_inference(network(), run, measure=says(dense=1.0, csr=2.0))
    assert table[0].batch == ((1, 1), (2, 1), (4, 2), (8, 4), (16, 3))


@pytest.mark.parametrize(("gain", "wanted"), [(1.3, "csr"), (1.01, "dense")])
def test_the_whole_run_confirms_the_choice(monkeypatch: pytest.MonkeyPatch, gain: float, wanted: str) -> None:
    """A clock that only runs where a dense or a sparse layer is called: what the parts promise, the whole must keep."""
    monkeypatch.setattr(
        inference, "measure_layers", lambda layers, rows: {f: 1.0 if f == "csr" else 2.0 for f in layers}
    )
    monkeypatch.setattr(
        inference, "_seconds", lambda call, model, device: 1.0 if isinstance(model[0], CSRLinear) else gain
    )
    model = network()
    table = sparsify_for_inference(model, lambda model: model(torch.ones(4, 32)))
    assert forms(model)[0] == wanted and table[0].form == wanted and table[0].ratio == 2.0


# --------------------------------------------------------------------------------------------------- the form packed


def packed(layer: nn.Linear, rows: int = 4) -> Any:
    made = inference._packed(layer, rows)
    if made is None:
        pytest.skip("this torch or CPU has no packed product")
    return made


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(32,), (1, 32), (7, 32), (2, 5, 32), (0, 32)])
def test_packed_equals_dense(shape: tuple[int, ...], bias: bool) -> None:
    layer = linear(48, 32, 1.0, bias)
    for x in (torch.randn(shape), torch.randn(*shape[:-1], 64)[..., ::2]):
        y = packed(layer)(x)
        torch.testing.assert_close(y, layer(x), rtol=1e-5, atol=1e-6)
        assert y.is_contiguous()


def test_packed_is_moved_copied_pickled_and_saved_as_other_modules_are() -> None:
    layer, x = linear(48, 32, 1.0), torch.randn(4, 32)
    made = packed(layer)
    buffer = io.BytesIO()
    torch.save(made, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(made), torch.load(buffer, weights_only=False)):
        assert torch.equal(twin(x), made(x)) and twin.state_dict().keys() == layer.state_dict().keys()
    assert made.weight is layer.weight  # what is tied to it stays tied
    half = copy.deepcopy(made).to(torch.bfloat16)
    torch.testing.assert_close(half(x.bfloat16()).float(), made(x), rtol=3e-2, atol=3e-2)
    double = copy.deepcopy(made).double()  # for which there is no packed product
    torch.testing.assert_close(double(x.double()).float(), made(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert made(x).dtype == torch.bfloat16


@pytest.mark.gpu
def test_two_of_four_on_a_gpu() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(128, 256, device="cuda", dtype=torch.float16)
    with torch.no_grad():
        layer.weight.view(-1, 4)[:, [1, 3]] = 0
    model = nn.Sequential(copy.deepcopy(layer))
    x = torch.randn(64, 128, device="cuda", dtype=torch.float16)
    assert sparsify_for_inference(model, form="2:4")[0].form == "2:4"
    with torch.inference_mode():
        torch.testing.assert_close(model(x), layer(x), rtol=1e-2, atol=1e-2)


def test_real_measurements_are_kept_for_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = inference.measure_layers

    def counted(layers: Mapping[Form, Sequence[nn.Module]], rows: int) -> dict[Form, float]:
        calls.append(rows)
        return real(layers, rows)

    monkeypatch.setattr(inference, "measure_layers", counted)
    state = torch.get_rng_state()
    for batch in (2, 2, 8):
        sparsify_for_inference(copy.deepcopy(network()), batch)
        torch.set_rng_state(state)
    assert calls == [2, 2, 2, 8, 8, 8]  # three shapes, two batches
    before = torch.get_rng_state()
    inference.MEASURED.clear()
    model = network()
    before = torch.get_rng_state()
    sparsify_for_inference(model, 2)
    assert torch.equal(torch.get_rng_state(), before)


def test_arguments_out_of_range() -> None:
    with pytest.raises(ValueError, match="batch=0"):
        sparsify_for_inference(network(), 0)
    with pytest.raises(ValueError, match="form='coo'"):
        sparsify_for_inference(network(), form="coo")  # type: ignore[arg-type]


def test_modules_that_do_something_of_their_own_stay() -> None:
    class Mine(nn.Linear):
        pass

    hooked, patched = linear(8, 8, 0.1), linear(8, 8, 0.1)
    hooked.register_forward_hook(lambda *args: None)
    patched.forward = lambda x: x  # type: ignore[method-assign]
    mine = Mine(8, 8)
    nn.init.zeros_(mine.weight)
    block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    nn.init.zeros_(block.linear1.weight)
    model = nn.ModuleList([hooked, patched, mine, block])
    assert [choice.names for choice in sparsify_for_inference(model, form="csr")] == []
    assert not block.training and block(torch.zeros(1, 3, 8)).shape == (1, 3, 8)


def test_a_layer_with_two_places_stays_one() -> None:
    layer = linear(8, 8, 0.1)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    assert [choice.names for choice in sparsify_for_inference(model, form="csr")] == [("0",)]
    assert isinstance(model[0], CSRLinear) and model[0] is model[2]


def test_two_of_four() -> None:
    assert inference.is_2_of_4(torch.tensor([[0.0, 1, 2, 0, 0, 0, 0, 3]]))
    assert not inference.is_2_of_4(torch.tensor([[0.0, 1, 2, 3]]))
    assert not inference.is_2_of_4(torch.zeros(3, 6))


def test_no_warning_of_torch_is_passed_on() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = network()
        sparsify_for_inference(model, form="csr")
        model(torch.ones(2, 32))


# --------------------------------------------------------------------------------------------- whole translations


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
def test_generate_with_and_without_beams(translator: Any, beams: int) -> None:
    model = copy.deepcopy(translator)

    def run(model: Any, **options: Any) -> Any:
        return model.generate(**source(), num_beams=beams, min_new_tokens=8, max_new_tokens=12, **options)

    table = sparsify_for_inference(model, run, measure=says(dense=2.0, csr=1.0))
    names = [name for choice in table for name in choice.names if choice.form == "csr"]
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


def test_generate_in_bf16(translator: Any) -> None:
    dense = copy.deepcopy(translator).to(torch.bfloat16)
    model = copy.deepcopy(dense)
    assert {choice.form for choice in sparsify_for_inference(model, form="csr")} == {"csr", "dense"}
    inputs = {**source(), "decoder_input_ids": torch.full((3, 4), 5)}
    exact = translator(**inputs).logits
    with torch.no_grad():
        errors = [(m(**inputs).logits.float() - exact).abs().mean().item() for m in (model, dense)]
    assert errors[0] <= 1.2 * errors[1]  # products in fp32 round no worse than those in bf16
    assert model.generate(**source(), num_beams=4, max_new_tokens=6).shape[0] == 3


def test_a_saved_model_is_the_dense_one(translator: Any, tmp_path: Any) -> None:
    import transformers

    model = copy.deepcopy(translator)
    sparsify_for_inference(model, form="csr")
    model.save_pretrained(tmp_path)
    back = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(back.parameters(), translator.parameters(), strict=True))
