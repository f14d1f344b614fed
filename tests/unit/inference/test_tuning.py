"""Sparse inference: the same results in another form, and the form that the measurement says."""

from __future__ import annotations

import copy
import io
import json
import math
import random
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gap_ds import sparsify_for_inference
from gap_ds.inference import layers as linears
from gap_ds.inference import timing, tuning
from gap_ds.inference.layers import CSRLinear, JoinedLinear, PackedLinear
from gap_ds.inference.tuning import Form


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    tuning.MEASURED.clear()
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
    names = {JoinedLinear: "joined", CSRLinear: "csr", PackedLinear: "packed", nn.Linear: "dense"}
    return [names[type(module)] for module in model.modules() if type(module) in names]


def clock(cost: Callable[[nn.Module], float], noise: float = 0.0, seed: int = 0) -> Any:
    """In place of `timing.seconds`: a run takes as long as all its layers by their costs, but for lognormal noise."""
    rng = random.Random(seed)

    def seconds(call: Any, x: Any, device: torch.device) -> float:
        assert isinstance(x, nn.Module)
        return sum(cost(module) for module in x.modules()) * math.exp(rng.gauss(0, noise))

    return seconds


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
    """With a number of rows no run can tell whether the model gains: the layers must promise more."""
    model = network()
    choice = sparsify_for_inference(model, measure=says(dense=1.15, csr=1.0))[0]
    assert (choice.form, choice.best, choice.why) == ("dense", "csr", "not faster by the margin")
    assert sparsify_for_inference(model, measure=says(dense=1.15, csr=1.0), margin=1.1)[0].form == "csr"


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


def test_rows_that_a_run_has_shown_weigh_as_often_as_they_came(monkeypatch: pytest.MonkeyPatch) -> None:
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

    monkeypatch.setattr(timing, "seconds", clock(lambda m: {CSRLinear: 15.0, nn.Linear: 30.0}.get(type(m), 0.0)))
    model = Two()
    table = {choice.names[0]: choice for choice in sparsify_for_inference(model, run, measure=measure)}
    assert table["once"].batch == ((100, 1),) and table["often"].batch == ((3, 30), (100, 1))
    assert [table[name].form for name in ("once", "often", "never")] == ["dense", "csr", "dense"]
    assert table["often"].ratio == pytest.approx(31 / 17) and table["never"].ratio is None
    assert table["often"].seconds == pytest.approx({"dense": 31.0, "csr": 17.0, "packed": 93.0})
    assert [table[name].why for name in ("once", "often", "never")] == [
        "not faster by the margin", "whole runs confirm it", "never called"
    ]  # fmt: skip
    assert table["often"].run == pytest.approx(90 / 75)
    assert sorted(asked) == [3, 100, 100]


def test_many_row_counts_are_rounded() -> None:
    def run(model: Any) -> None:
        for rows in range(1, 12):
            model(torch.zeros(rows, 32))

    table = sparsify_for_inference(network(), run, measure=says(dense=1.0, csr=2.0))
    assert table[0].batch == ((1, 1), (2, 1), (4, 2), (8, 4), (16, 3))


# -------------------------------------------------------------------------------------------------- whole runs decide


def chain(layers: int = 1) -> nn.Module:
    """Every layer is a group of its own: no two have the same shape."""
    return nn.Sequential(*(linear(8 * (i + 2), 8 * (i + 1), 0.1, seed=i) for i in range(layers)))


def chosen(model: nn.Module, monkeypatch: pytest.MonkeyPatch, seconds: Any, says: Any, **options: Any) -> list[Any]:
    monkeypatch.setattr(timing, "seconds", seconds)
    return sparsify_for_inference(model, lambda model: model(torch.ones(4, 8)), measure=says, **options)


@pytest.mark.parametrize(("ratio", "least", "most"), [(0.9, 0, 2), (0.94, 0, 2), (1.5, 195, 200)])
def test_noise_does_not_decide(monkeypatch: pytest.MonkeyPatch, ratio: float, least: int, most: int) -> None:
    """The layers promise the twofold; runs that vary by a fifth tell what becomes of it, in 200 tries."""
    accepted = 0
    for seed in range(200):
        model = chain()
        before = list(model.modules())
        seconds = clock(lambda m: {CSRLinear: 1.0, nn.Linear: ratio}.get(type(m), 0.0), noise=0.2, seed=seed)
        (choice,) = chosen(model, monkeypatch, seconds, says(dense=2.0, csr=1.0))
        accepted += choice.form == "csr"
        assert (choice.best, choice.ratio) == ("csr", 2.0) and choice.run is not None
        if choice.form == "dense":
            assert all(a is b for a, b in zip(model.modules(), before, strict=True))
            assert choice.why.startswith("whole runs did not")
    assert least <= accepted <= most


def test_the_verdict_by_simulation() -> None:
    """As stated beside `timing.LOOKS`: runs that vary by a fifth, 1,000 tries; and an early end where it is quiet."""

    def outcome(ratio: float, noise: float, tries: int = 1000) -> tuple[float, float]:
        accepted = pairs = 0
        for seed in range(tries):
            rng = random.Random(seed)
            calls: list[bool] = []

            def timed(new: bool, rng: random.Random = rng, calls: list[bool] = calls) -> float:
                calls.append(new)
                return (1.0 if new else ratio) * math.exp(rng.gauss(0, noise))

            accepted += timing.gains(timed, 1.05, math.inf)[0] is True
            pairs += len(calls) // 2
            assert calls[:6] == [False, True, True, False, False, True]
        return accepted / tries, pairs / tries

    assert outcome(0.94, 0.2)[0] <= 0.005 and outcome(1.0, 0.2)[0] <= 0.02
    assert outcome(1.5, 0.2)[0] >= 0.99 and outcome(1.08, 0.03)[0] >= 0.97
    assert outcome(2.0, 0.03)[1] < 4 and outcome(0.8, 0.03)[1] < 4


def test_no_pair_is_begun_after_the_deadline() -> None:
    assert timing.gains(lambda new: 1.0, 1.05, 0.0) == (None, None)
    model = chain()
    table = sparsify_for_inference(model, lambda m: m(torch.ones(4, 8)), seconds=1e-9)
    assert table[0].form == "dense" and table[0].why == "not measured in the time given" and forms(model) == ["dense"]


def test_the_group_that_saves_least_goes_back_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cost that the layers alone do not show: with the smallest group in csr, nothing is gained."""

    def cost(module: nn.Module) -> float:
        if isinstance(module, CSRLinear):
            return {8: 50.0, 16: 2.0, 24: 2.0}[module.in_features]
        return 10.0 if isinstance(module, nn.Linear) else 0.0

    def measure(layers: Mapping[Form, Sequence[nn.Module]], rows: int) -> dict[Form, float]:
        return {"dense": 10.0, "packed": 99.0, "csr": 5.0 if layers["dense"][0].in_features == 8 else 2.0}  # type: ignore[operator]

    model = chain(3)
    table = chosen(model, monkeypatch, clock(cost), measure)
    assert forms(model) == ["dense", "csr", "csr"]
    assert [choice.why for choice in table] == ["put back: whole runs gain without", *["whole runs confirm it"] * 2]
    assert table[0].run == table[1].run == pytest.approx(30 / 14)
    before = list((model := chain(3)).modules())
    costs = clock(lambda m: {CSRLinear: 20.0, nn.Linear: 10.0}.get(type(m), 0.0))
    table = chosen(model, monkeypatch, costs, measure)
    assert all(a is b for a, b in zip(model.modules(), before, strict=True))
    assert {(choice.form, choice.best, choice.why) for choice in table} == {("dense", "csr", "whole runs did not gain")}


def test_what_saves_too_little_of_the_run_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(layers: Mapping[Form, Sequence[nn.Module]], rows: int) -> dict[Form, float]:
        small = layers["dense"][0].in_features == 8
        return {"dense": 0.5, "csr": 0.1, "packed": 9.0} if small else {"dense": 50.0, "csr": 10.0, "packed": 90.0}

    costs = clock(lambda m: {CSRLinear: 10.0, nn.Linear: 50.0}.get(type(m), 0.0))
    table = chosen(model := chain(2), monkeypatch, costs, measure)
    assert forms(model) == ["dense", "csr"] and table[0].why == "saves less than 1% of the run"
    before = list((model := chain(2)).modules())
    asked: list[nn.Module] = []
    costs = clock(lambda m: asked.append(m) or {nn.Linear: 50_000.0}.get(type(m), 0.0))  # type: ignore[func-returns-value]
    table = chosen(model, monkeypatch, costs, says(dense=2000.0, csr=1.0))
    assert all(a is b for a, b in zip(model.modules(), before, strict=True)) and len(asked) == len(before)
    assert {choice.why for choice in table} == {"all layers together save too little of the run"}


def test_a_run_that_fails_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def run(model: Any) -> None:
        calls.append(1)
        if len(calls) > 3:
            raise RuntimeError("no more")
        model(torch.ones(4, 8))

    before = list((model := chain()).modules())
    with pytest.raises(RuntimeError, match="no more"):
        sparsify_for_inference(model, run, measure=says(dense=2.0, csr=1.0))
    assert all(a is b for a, b in zip(model.modules(), before, strict=True))


# ------------------------------------------------------------------------------------------------------ joined layers


class Attention(nn.Module):
    """q, k and v of one input, k and v of another where there is one, and the order of calls as one likes it."""

    def __init__(self, density: float = 0.2, bias: bool = True) -> None:
        super().__init__()
        self.q, self.k, self.v = (linear(o, 16, density, bias, seed=o) for o in (24, 8, 8))
        self.out = linear(16, 8, density, bias)

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        other = x if other is None else other
        q, k, v = self.q(x), self.k(other), self.v(other)
        return self.out(q[..., :8] * k + v)


def joined(bias: bool = True, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    dense = Attention(bias=bias).to(dtype)
    model = copy.deepcopy(dense)
    table = sparsify_for_inference(model, lambda m: m(torch.ones(3, 16, dtype=dtype)), form="joined")
    assert forms(model) == ["joined", "joined", "joined", "csr"]
    assert {name: choice.form for choice in table for name in choice.names} == {
        "q": "joined", "k": "joined", "v": "joined", "out": "csr"
    }  # fmt: skip
    return dense, model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(16,), (1, 16), (5, 16), (2, 3, 16), (0, 16)])
def test_joined_layers_give_what_separate_ones_give(shape: tuple[int, ...], bias: bool, dtype: torch.dtype) -> None:
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
def test_one_product_serves_all_that_have_the_same_input(monkeypatch: pytest.MonkeyPatch, mode: Any) -> None:
    sizes: list[int] = []
    real = linears._product
    monkeypatch.setattr(linears, "_product", lambda w, *rest: (sizes.append(w.shape[0]), real(w, *rest))[1])
    _, model = joined()
    with mode():
        x = torch.randn(3, 16)
        sizes.clear()
        model(x)
        assert sizes == [40, 16] and model.q._join._held is None  # nothing stays behind
        model(x, torch.randn(3, 16))
        assert sizes[2:] == [40, 8, 8, 16]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_joined_layers_in_any_use(mode: Any) -> None:
    """Other orders, some of them, other inputs, inputs and results that are changed in place, memory used again."""
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
        for name in "qkv":  # equal to itself; an output that has no weights does not see it
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


def test_joined_layers_are_moved_copied_pickled_and_saved_as_other_modules_are() -> None:
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
            assert len(data) == 1  # the rows lie in memory once
        alone = copy.deepcopy(model.k)
        torch.testing.assert_close(alone(x), dense.k(x))
        double = copy.deepcopy(model).double()
        torch.testing.assert_close(double(x.double()).float(), wanted)
        model.k.double()  # one alone: no product for all any more
        torch.testing.assert_close(model.q(x), dense.q(x))
        torch.testing.assert_close(model.k(x), dense.k(x))
        torch.testing.assert_close(model.v(x), dense.v(x))
    saved, state = model.state_dict(), dense.state_dict()
    assert saved.keys() == state.keys() and all(torch.equal(saved[name].float(), state[name]) for name in state)


def test_layers_that_cannot_be_joined() -> None:
    layer = CSRLinear(linear(8, 16, 0.2))
    for other in (linear(8, 12, 0.2), linear(8, 16, 0.2, bias=False), linear(8, 16, 0.2).double()):
        with pytest.raises(ValueError, match="that are joined"):
            linears.joined([layer, CSRLinear(other)])


def test_only_layers_that_always_have_one_input_are_joined() -> None:
    def crossed(model: Any) -> None:
        model(torch.ones(3, 16), torch.ones(3, 16))

    def sometimes(model: Any) -> None:
        model(torch.ones(3, 16))
        model.k(torch.ones(3, 16))

    for run, wanted in ((crossed, ["csr", "joined", "joined", "csr"]), (sometimes, ["csr"] * 4)):
        sparsify_for_inference(model := Attention(), run, form="joined")
        assert forms(model) == wanted


@pytest.mark.parametrize(("gain", "wanted"), [(0.5, "joined"), (0.99, "csr")])
def test_layers_are_joined_where_it_is_faster(monkeypatch: pytest.MonkeyPatch, gain: float, wanted: str) -> None:
    def measure(layers: Mapping[Form, Sequence[nn.Module]], rows: int) -> dict[Form, float]:
        if "joined" in layers:
            return {"csr": 3.0, "joined": 3.0 * gain}
        return {"dense": 10.0, "csr": 2.0, "packed": 20.0}

    costs = clock(lambda m: {JoinedLinear: 1.0, CSRLinear: 2.0, nn.Linear: 10.0}.get(type(m), 0.0))
    monkeypatch.setattr(timing, "seconds", costs)
    table = sparsify_for_inference(model := Attention(), lambda m: m(torch.ones(3, 16)), measure=measure)
    assert forms(model) == [wanted] * 3 + ["csr"]
    rows = {name: choice for choice in table for name in choice.names}
    assert rows["q"].form == wanted and rows["out"].form == "csr"
    assert rows["q"].ratio == pytest.approx(10 / (2 * gain if wanted == "joined" else 2))
    assert rows["k"].seconds["dense"] == 20.0  # of both: k and v are alike


# --------------------------------------------------------------------------------------------------- the form packed


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
    real = tuning.measure_layers

    def counted(layers: Mapping[Form, Sequence[nn.Module]], rows: int) -> dict[Form, float]:
        calls.append(rows)
        return real(layers, rows)

    monkeypatch.setattr(tuning, "measure_layers", counted)
    state = torch.get_rng_state()
    for batch in (2, 2, 8):
        sparsify_for_inference(copy.deepcopy(network()), batch)
        torch.set_rng_state(state)
    assert calls == [2, 2, 2, 8, 8, 8]  # three shapes, two batches
    before = torch.get_rng_state()
    tuning.MEASURED.clear()
    model = network()
    before = torch.get_rng_state()
    sparsify_for_inference(model, 2)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 0}, "batch=0: must"),
        ({"batch": True}, "batch=True: must"),
        ({"batch": 4.0}, "batch=4.0: must"),
        ({"form": "coo"}, "form='coo'"),
        ({"form": "joined"}, "only a run shows"),
        ({"min_sparsity": 1.5}, r"min_sparsity=1.5: must lie in \[0, 1\]"),
        ({"min_sparsity": float("nan")}, "min_sparsity=nan"),
        ({"margin": 0.99}, "margin=0.99: must be at least 1"),
        ({"margin": float("nan")}, "margin=nan"),
        ({"seconds": 0}, "seconds=0: must"),
    ],
)
def test_arguments_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sparsify_for_inference(network(), **options)


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
    assert linears.is_2_of_4(torch.tensor([[0.0, 1, 2, 0, 0, 0, 0, 3]]))
    assert not linears.is_2_of_4(torch.tensor([[0.0, 1, 2, 3]]))
    assert not linears.is_2_of_4(torch.zeros(3, 6))


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
def test_generate_with_and_without_beams(translator: Any, beams: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = copy.deepcopy(translator)

    def run(model: Any, **options: Any) -> Any:
        return model.generate(**source(), num_beams=beams, min_new_tokens=8, max_new_tokens=12, **options)

    monkeypatch.setattr(timing, "seconds", clock(lambda m: {CSRLinear: 1.0, nn.Linear: 2.0}.get(type(m), 0.0)))
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


@pytest.mark.parametrize("beams", [1, 4])
@pytest.mark.parametrize("form", ["packed", "joined"])
def test_generate_in_a_form_that_was_asked_for(translator: Any, form: Any, beams: int) -> None:
    model = copy.deepcopy(translator)

    def run(model: Any) -> Any:
        return model.generate(**source(), num_beams=beams, min_new_tokens=8, max_new_tokens=12)

    table = sparsify_for_inference(model, run, form=form)
    count = Counter(name for choice in table for name in [choice.form] * len(choice.names))
    if form == "joined":  # q, k, v of 4 self-attentions; k, v of 2 cross-attentions; all others; the output projection
        assert count == {"joined": 4 * 3 + 2 * 2, "csr": 2 * 6 + 2 * 10 - 16, "dense": 1}
    elif count.get("dense"):
        pytest.skip("this torch or CPU has no packed product")
    assert torch.equal(run(model), run(translator))
    with torch.inference_mode():
        assert torch.equal(run(model), run(translator))
    saved, wanted = model.state_dict(), translator.state_dict()
    assert saved.keys() == wanted.keys() and all(torch.equal(saved[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("form", ["packed", "csr", "joined"])
def test_generate_in_bf16(translator: Any, form: Any) -> None:
    """Products are rounded no worse than dense ones: what is written scores as well under the exact model."""
    dense = copy.deepcopy(translator).to(torch.bfloat16)
    model = copy.deepcopy(dense)

    def run(model: Any) -> Tensor:
        found = model.generate(**source(8), num_beams=4, min_new_tokens=8, max_new_tokens=8)
        assert isinstance(found, Tensor)
        return found

    table = sparsify_for_inference(model, run, form=form)
    if not any(choice.form == form for choice in table):
        pytest.skip("this torch or CPU has no packed product")
    inputs = {**source(), "decoder_input_ids": torch.full((3, 4), 5)}
    with torch.no_grad():
        exact = translator(**inputs).logits
        errors = [(m(**inputs).logits.float() - exact).abs().mean().item() for m in (model, dense)]
    assert errors[0] <= 1.2 * errors[1]
    written, wanted = run(model), run(dense)
    assert written.shape == wanted.shape
    scores = [likelihood(translator, source(8), tokens) for tokens in (written, wanted)]
    assert abs(scores[0] - scores[1]) < 0.05


def likelihood(model: Any, inputs: dict[str, Tensor], tokens: Tensor) -> float:
    """Mean log probability of a token; tokens (B, start token and T)."""
    with torch.no_grad():
        logs = model(**inputs, decoder_input_ids=tokens[:, :-1]).logits.log_softmax(-1)
    return float(logs.gather(-1, tokens[:, 1:, None]).mean())


def test_a_saved_model_is_the_dense_one(translator: Any, tmp_path: Any) -> None:
    import transformers

    model = copy.deepcopy(translator)
    sparsify_for_inference(model, form="csr")
    model.save_pretrained(tmp_path)
    back = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(back.parameters(), translator.parameters(), strict=True))
