"""The layouts of a linear layer: results, dtypes, copies, state dicts."""

from __future__ import annotations

import copy
import io
import random
import threading
import warnings
from typing import Any

import pytest
import torch
from sparse_layers import Attention, layouts, linear, network
from torch import Tensor, nn
from torch.autograd import forward_ad

from gap_ds import sparsify_for_inference
from gap_ds.inference import layers as linears
from gap_ds.inference.layers import CSRLinear, csr_linear, joined_linear
from gap_ds.inference.layers.semi_structured_linear import SemiStructuredLinear

# ------------------------------------------------------------------------------------------------------------------ csr


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


def test_nan_and_infinity_are_kept_weights() -> None:
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


def test_csr_is_moved_copied_pickled_and_saved_like_any_module() -> None:
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
        sparsify_for_inference(model, layout="csr")
        inside = model(torch.ones(2, 32))
    with torch.no_grad():
        assert torch.equal(model(torch.ones(2, 32)), inside)


# --------------------------------------------------------------------------------------------------------------- joined


def joined(bias: bool = True, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    dense = Attention(bias=bias).to(dtype)
    model = copy.deepcopy(dense)
    table = sparsify_for_inference(model, lambda m: m(torch.ones(3, 16, dtype=dtype)), layout="joined")
    assert layouts(model) == ["joined", "joined", "joined", "csr"]
    assert {name: choice.layout for choice in table for name in choice.names} == {
        "q": "joined", "k": "joined", "v": "joined", "out": "csr"
    }  # fmt: skip
    return dense, model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(16,), (1, 16), (5, 16), (2, 3, 16), (0, 16)])
def test_joined_layers_equal_separate_ones(shape: tuple[int, ...], bias: bool, dtype: torch.dtype) -> None:
    dense, model = joined(bias, dtype)
    close = {"rtol": 3e-2, "atol": 3e-2} if dtype == torch.bfloat16 else {}
    separate = {name: CSRLinear(getattr(dense, name)) for name in "qkv"}
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            for x in (torch.randn(shape).to(dtype), torch.randn(*shape[:-1], 32).to(dtype)[..., ::2]):
                torch.testing.assert_close(model(x), dense(x), **close)
                for name in "qkv":
                    y = getattr(model, name)(x)
                    torch.testing.assert_close(y, separate[name](x))
                    assert y.is_contiguous() and y.shape == (*shape[:-1], getattr(dense, name).out_features)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_layers_with_the_same_input_share_one_product(monkeypatch: pytest.MonkeyPatch, mode: Any) -> None:
    sizes: list[int] = []
    real = csr_linear.product
    for module in (csr_linear, joined_linear):
        monkeypatch.setattr(module, "product", lambda w, *rest: (sizes.append(w.shape[0]), real(w, *rest))[1])
    _, model = joined()
    with mode():
        x = torch.randn(3, 16)
        sizes.clear()
        model(x)
        assert sizes == [40, 16] and model.q._join._held is None  # no part is left
        model(x, torch.randn(3, 16))
        assert sizes[2:] == [40, 8, 8, 16]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_joined_layers_in_any_use(mode: Any) -> None:
    """Any order and subset of calls, other inputs, inputs and results changed in place, memory used again."""
    dense, model = joined()
    rng = random.Random(0)
    with mode():
        x, y = torch.randn(3, 16), torch.randn(3, 16)
        for step in range(300):
            name, t = rng.choice("qkv"), rng.choice([x, y, x.clone(), torch.randn(rng.choice([1, 3]), 16)])
            result = getattr(model, name)(t)
            torch.testing.assert_close(result, getattr(dense, name)(t), msg=f"step {step}")
            if rng.random() < 0.3:
                result.zero_()
            if rng.random() < 0.3:
                t.mul_(1.5).clamp_(-9, 9)
        nan = torch.full((2, 16), float("nan"))
        for name in "qkv":  # NaN in, NaN out, except for outputs without weights
            layer = CSRLinear(getattr(dense, name))
            torch.testing.assert_close(getattr(model, name)(nan), layer(nan), equal_nan=True)
    x = torch.randn(3, 16)
    with torch.inference_mode():
        made = model.q(x)
    with torch.no_grad():
        assert made.is_inference() and not model.k(x).is_inference()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        torch.testing.assert_close(model(x).float(), dense(x).float(), rtol=5e-2, atol=5e-2)


def test_joined_layers_from_several_threads() -> None:
    dense, model = joined()
    wrong: list[float] = []

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for _ in range(200):
                x = torch.randn(3, 16, generator=generator)
                wrong.append(float((model(x) - dense(x)).abs().max()))

    threads = [threading.Thread(target=work, args=(seed % 3,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wrong) == 1200 and max(wrong) < 1e-4


def test_joined_layers_are_moved_copied_pickled_and_saved_like_any_module() -> None:
    dense, model = joined()
    x = torch.randn(3, 16)
    with torch.no_grad():
        wanted = model(x)
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        for twin in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
            assert torch.equal(twin(x), wanted) and twin.q._join is twin.k._join is not model.q._join
            assert twin.q._join.layers == [twin.q, twin.k, twin.v]
            data = {layer.values.untyped_storage().data_ptr() for layer in (twin.q, twin.k, twin.v)}
            assert len(data) == 1  # the weights are stored once
        alone = copy.deepcopy(model.k)
        torch.testing.assert_close(alone(x), dense.k(x))
        double = copy.deepcopy(model).double()
        torch.testing.assert_close(double(x.double()).float(), wanted)
        model.k.double()  # one layer alone: they no longer share a product
        torch.testing.assert_close(model.q(x), dense.q(x))
        torch.testing.assert_close(model.k(x), dense.k(x))
        torch.testing.assert_close(model.v(x), dense.v(x))
    saved, state = model.state_dict(), dense.state_dict()
    assert saved.keys() == state.keys() and all(torch.equal(saved[name].float(), state[name]) for name in state)


@pytest.mark.parametrize("layout", ["csr", "joined"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_csr_follows_its_bias(layout: str, dtype: torch.dtype) -> None:
    """Changed in place, also where torch does not count it, replaced, and taken away from one layer or all."""
    dense, model = joined(dtype=dtype)
    if layout == "csr":
        model = nn.ModuleDict({name: CSRLinear(layer) for name, layer in dense.named_children()})
    x = torch.randn(3, 16).to(dtype)

    def check() -> None:
        with torch.no_grad():
            for name in "qkv":
                found, wanted = (twin.get_submodule(name)(x).float() for twin in (model, dense))
                torch.testing.assert_close(found, wanted, atol=0.05, rtol=0.02)

    check()
    for twin in (dense, model):
        torch.manual_seed(0)
        for name in "qkv":
            part = twin.get_submodule(name)
            part.bias = nn.Parameter(torch.randn(part.out_features, dtype=dtype), requires_grad=False)
    check()
    for twin in (dense, model):
        twin.k.bias.mul_(3)
    check()
    for twin in (dense, model):
        twin.v.bias.data.fill_(5)
    check()
    for name in ("k", "q", "v"):
        for twin in (dense, model):
            twin.get_submodule(name).bias = None
        check()


def test_layers_that_cannot_be_joined() -> None:
    layer = CSRLinear(linear(8, 16, 0.2))
    for other in (linear(8, 12, 0.2), linear(8, 16, 0.2, bias=False), linear(8, 16, 0.2).double()):
        with pytest.raises(ValueError, match="that are joined"):
            linears.joined([layer, CSRLinear(other)])


# --------------------------------------------------------------------------------------------------------------- packed


def packed(layer: nn.Linear, rows: int = 4) -> Any:
    made = linears.packed(layer, rows)
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


def test_packed_is_moved_copied_pickled_and_saved_like_any_module() -> None:
    layer, x = linear(48, 32, 1.0), torch.randn(4, 32)
    made = packed(layer)
    buffer = io.BytesIO()
    torch.save(made, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(made), torch.load(buffer, weights_only=False)):
        assert torch.equal(twin(x), made(x)) and twin.state_dict().keys() == layer.state_dict().keys()
    assert made.weight is layer.weight  # tied weights stay tied
    half = copy.deepcopy(made).to(torch.bfloat16)
    torch.testing.assert_close(half(x.bfloat16()).float(), made(x), rtol=3e-2, atol=3e-2)
    double = copy.deepcopy(made).double()  # there is no packed product in fp64
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
    assert sparsify_for_inference(model, layout="2:4")[0].layout == "2:4"
    with torch.inference_mode():
        for given in inputs(x):
            torch.testing.assert_close(model(given), layer(given), rtol=1e-2, atol=1e-2)


def inputs(x: Tensor) -> list[Tensor]:
    """Inputs of a linear layer whose rows may not follow each other, and one without rows."""
    rows = x.view(8, -1, x.shape[1])
    return [x, rows, rows[:, 0], rows[:, 1:2], x.t().contiguous().t(), rows.transpose(0, 1), x[:0], x[0]]


def test_two_of_four_gets_rows_that_follow_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's product of semi-structured weights takes others for such."""
    made, product = SemiStructuredLinear(6, 4), nn.functional.linear

    def of_neighbours(x: Tensor, *rest: Tensor) -> Tensor:
        assert x.is_contiguous() and x.numel()
        return product(x, *rest)

    monkeypatch.setattr(nn.functional, "linear", of_neighbours)
    for given in inputs(torch.randn(16, 6)):
        torch.testing.assert_close(made(given), product(given, made.weight, made.bias))


def test_two_of_four() -> None:
    assert linears.is_2_of_4(torch.tensor([[0.0, 1, 2, 0, 0, 0, 0, 3]]))
    assert not linears.is_2_of_4(torch.tensor([[0.0, 1, 2, 3]]))
    assert not linears.is_2_of_4(torch.zeros(3, 6))


def test_torch_does_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = network()
        sparsify_for_inference(model, layout="csr")
        model(torch.ones(2, 32))


# ------------------------------------------------------------------------------------------------------- other weights


@pytest.mark.parametrize("layout", ["packed", "csr", "joined"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_other_weights_with_other_masks_are_loaded(layout: Any, dtype: torch.dtype, mode: Any) -> None:
    model, x = Attention(density=0.2).to(dtype), torch.randn(3, 16).to(dtype)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for weight in other.parameters():
            weight.copy_(torch.randn(weight.shape) * (torch.rand(weight.shape) < 0.4))
    with mode():
        sparsify_for_inference(model, lambda model: model(x), layout=layout)
        if layout in layouts(model):  # else this torch or CPU has no packed product
            assert not torch.allclose(model(x), other(x))
        model.load_state_dict(other.state_dict())
        torch.testing.assert_close(model(x), other(x), rtol=2e-2, atol=2e-2)
        assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("layout", ["packed", "csr", "joined"])
def test_weights_that_do_not_fit_are_refused_as_usual(layout: Any) -> None:
    model = Attention()
    state = model.state_dict()
    sparsify_for_inference(model, lambda model: model(torch.ones(1, 16)), layout=layout)
    del state["k.weight"]
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "k.weight"'):
        model.load_state_dict(state)
    assert model.load_state_dict(state, strict=False).missing_keys == ["k.weight"]
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "q.mask"'):
        model.load_state_dict({**Attention().state_dict(), "q.mask": torch.ones(1)})
    with pytest.raises(RuntimeError, match=r"size mismatch for k\.weight"):
        model.load_state_dict({**Attention().state_dict(), "k.weight": torch.ones(16, 8)})


def test_packed_follows_its_weight() -> None:
    """Changed in place, replaced, assigned by load_state_dict, or tied to another layer that loads."""
    embedding, x = nn.Embedding(48, 32), torch.randn(4, 32)
    layer = nn.Linear(32, 48)
    layer.weight = embedding.weight
    model = nn.ModuleDict({"out": packed(layer), "embedding": embedding}).requires_grad_(False)
    made = model["out"]

    def check() -> None:
        torch.testing.assert_close(made(x), nn.functional.linear(x, made.weight, made.bias))

    check()
    made.weight.mul_(2)
    check()
    model.load_state_dict({"embedding.weight": torch.randn(48, 32)}, strict=False)
    check()
    for _ in range(2):
        made.weight = nn.Parameter(torch.randn(48, 32), requires_grad=False)
    check()
    model.load_state_dict({"out.weight": torch.randn(48, 32), "out.bias": torch.ones(48)}, strict=False, assign=True)
    check()


def test_packed_gives_the_gradient_of_its_input() -> None:
    layer, x = linear(48, 32, 1.0).requires_grad_(False), torch.randn(4, 32, requires_grad=True)
    (wanted,) = torch.autograd.grad(layer(x).square().sum(), x)
    (found,) = torch.autograd.grad(packed(layer)(x).square().sum(), x)
    torch.testing.assert_close(found, wanted)


@pytest.mark.full  # torch loads its rules for 1.5 s
def test_forward_mode_derivatives_are_right_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTORCH_JIT", "0")  # saves torch a second of compiling rules that are not used here
    layer, x, direction = linear(48, 32, 0.2).requires_grad_(False), torch.randn(4, 32), torch.randn(4, 32)
    with forward_ad.dual_level():
        y = packed(layer)(forward_ad.make_dual(x, direction))
        torch.testing.assert_close(forward_ad.unpack_dual(y).tangent, direction @ layer.weight.t())
        with pytest.raises(RuntimeError, match="SparseCsr"):  # torch has none of its own CSR product
            CSRLinear(layer)(forward_ad.make_dual(x, direction))


def test_packed_where_the_product_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As by a CPU without products in bf16, to which a packed fp32 layer is cast, or on which it is unpickled."""
    made, x = packed(linear(48, 32, 1.0)), torch.randn(4, 32)

    def refuse(*arguments: Any) -> Tensor:
        raise RuntimeError("needs the cpu support")

    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", refuse)
    half = copy.deepcopy(made).to(torch.bfloat16)
    assert half._packed is None
    torch.testing.assert_close(half(x.bfloat16()).float(), made(x), rtol=3e-2, atol=3e-2)


# ----------------------------------------------------------------------------------------------------- inputs first


@pytest.mark.parametrize("layout", ["packed", "csr", "joined"])
def test_gpt2_is_the_same_in_every_layout(layout: Any) -> None:
    """Its linear layers are transformers' Conv1D, with weights (inputs, outputs)."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50, n_positions=32)
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2 and ".h." in name:
                weight.mul_(10 * (torch.rand_like(weight) < 0.3))
    other, tokens = copy.deepcopy(model), torch.randint(50, (2, 7))
    table = sparsify_for_inference(model, lambda model: model(tokens), layout=layout)
    shapes = {name.rpartition(".h.0.")[2]: choice.shape for choice in table for name in choice.names if ".h.0." in name}
    assert shapes["attn.c_attn"] == (48, 16) and shapes["mlp.c_proj"] == (16, 64)
    if layout != "packed" or "packed" in layouts(model):
        assert not any(type(module).__name__ == "Conv1D" for module in model.transformer.h.modules())
    for weights in (other, transformers.GPT2LMHeadModel(config).eval()):
        model.load_state_dict(weights.state_dict())
        torch.testing.assert_close(model(tokens).logits, weights(tokens).logits.detach(), rtol=1e-4, atol=1e-5)
        for name, value in weights.state_dict().items():
            assert torch.equal(model.state_dict()[name], value) and model.state_dict()[name].is_contiguous()
    twin = copy.deepcopy(model)
    assert torch.equal(twin(tokens).logits, model(tokens).logits)
