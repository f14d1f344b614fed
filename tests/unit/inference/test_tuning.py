"""The choice of layouts: by the times of layers, and by whole runs."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from sparse_layers import Attention, clock, layouts, linear, network, times
from torch import Tensor, nn

from gap_ds import sparsify_for_inference
from gap_ds.inference import measure as measurement
from gap_ds.inference import timing
from gap_ds.inference.layers import CSRLinear, JoinedLinear, Layout


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    measurement.MEASURED.clear()
    yield
    torch.set_num_threads(threads)


def test_the_measurement_decides() -> None:
    for seconds, wanted in ((times(dense=2.0, csr=1.0), "csr"), (times(dense=1.0, csr=2.0), "dense")):
        model = network()
        table = sparsify_for_inference(model, batch=4, measure=seconds)
        assert layouts(model) == [wanted, wanted, "dense"]  # the last layer is not sparse
        assert [choice.names for choice in table] == [("0",), ("2",), ("3",)]
        assert {choice.layout for choice in table[:2]} == {wanted} and table[0].shape == (48, 32)
        assert table[0].ratio == (2.0 if wanted == "csr" else 0.5) and table[0].batch == ((4, 1),)
        assert table[0].density == pytest.approx(0.1, abs=0.02)
        assert json.loads(json.dumps([choice.row() for choice in table]))[0]["layout"] == wanted


def test_a_small_gain_is_not_taken() -> None:
    """Without a run to test, the layers must be faster by a larger margin."""
    model = network()
    choice = sparsify_for_inference(model, measure=times(dense=1.15, csr=1.0))[0]
    assert (choice.layout, choice.best, choice.reason) == ("dense", "csr", "not faster by the margin")
    assert sparsify_for_inference(model, measure=times(dense=1.15, csr=1.0), margin=1.1)[0].layout == "csr"


def test_layers_that_are_not_sparse_get_no_sparse_layout() -> None:
    model = network(density=0.8)
    assert sparsify_for_inference(model, measure=times(dense=2.0, csr=1.0)) and layouts(model) == ["dense"] * 3
    sparsify_for_inference(model, min_sparsity=0.1, measure=times(dense=2.0, csr=1.0))
    assert layouts(model) == ["csr", "csr", "dense"]
    sparsify_for_inference(model, measure=times(dense=2.0, csr=1.0, packed=0.5))
    assert layouts(model) == ["csr", "csr", "packed"]


def test_a_layout_can_be_requested() -> None:
    # 2:4 requires a GPU.
    for layout, wanted in (("csr", "csr"), ("packed", "packed"), ("dense", "dense"), ("2:4", "dense")):
        model = network()
        table = sparsify_for_inference(model, layout=layout, measure=times())  # type: ignore[arg-type]
        assert layouts(model)[:2] == [wanted, wanted] and table[0].ratio is None


def test_rows_are_weighted_by_their_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """csr is faster for few rows and slower for many: the layer that mostly sees few becomes csr."""

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

    def measure(layers: Mapping[Layout, Sequence[nn.Module]], rows: int) -> dict[Layout, float]:
        asked.append(rows)
        return {"dense": 1.0, "packed": 3.0, "csr": 2.0 if rows > 50 else 0.5}

    monkeypatch.setattr(timing, "seconds", clock(lambda m: {CSRLinear: 15.0, nn.Linear: 30.0}.get(type(m), 0.0)))
    model = Two()
    table = {choice.names[0]: choice for choice in sparsify_for_inference(model, run, measure=measure)}
    assert table["once"].batch == ((100, 1),) and table["often"].batch == ((3, 30), (100, 1))
    assert [table[name].layout for name in ("once", "often", "never")] == ["dense", "csr", "dense"]
    assert table["often"].ratio == pytest.approx(31 / 17) and table["never"].ratio is None
    assert table["often"].seconds == pytest.approx({"dense": 31.0, "csr": 17.0, "packed": 93.0})
    assert [table[name].reason for name in ("once", "often", "never")] == [
        "not faster by the margin", "whole runs confirm it", "never called"
    ]  # fmt: skip
    assert table["often"].run == pytest.approx(90 / 75)
    assert sorted(asked) == [3, 100, 100]


def test_many_row_counts_are_rounded() -> None:
    def run(model: Any) -> None:
        for rows in range(1, 12):
            model(torch.zeros(rows, 32))

    table = sparsify_for_inference(network(), run, measure=times(dense=1.0, csr=2.0))
    assert table[0].batch == ((1, 1), (2, 1), (4, 2), (8, 4), (16, 3))


def chain(layers: int = 1) -> nn.Module:
    """Layers of different shapes, each a separate group."""
    return nn.Sequential(*(linear(8 * (i + 2), 8 * (i + 1), 0.1, seed=i) for i in range(layers)))


def chosen(model: nn.Module, monkeypatch: pytest.MonkeyPatch, seconds: Any, measure: Any, **options: Any) -> list[Any]:
    monkeypatch.setattr(timing, "seconds", seconds)
    return sparsify_for_inference(model, lambda model: model(torch.ones(4, 8)), measure=measure, **options)


@pytest.mark.parametrize(("ratio", "least", "most"), [(0.9, 0, 2), (0.94, 0, 2), (1.5, 195, 200)])
def test_noise_does_not_decide(monkeypatch: pytest.MonkeyPatch, ratio: float, least: int, most: int) -> None:
    """Layers alone are twice as fast; 200 tries with runs that vary by 20 % decide by the ratio of whole runs."""
    accepted = 0
    for seed in range(200):
        model = chain()
        before = list(model.modules())
        seconds = clock(lambda m: {CSRLinear: 1.0, nn.Linear: ratio}.get(type(m), 0.0), noise=0.2, seed=seed)
        (choice,) = chosen(model, monkeypatch, seconds, times(dense=2.0, csr=1.0))
        accepted += choice.layout == "csr"
        assert (choice.best, choice.ratio) == ("csr", 2.0) and choice.run is not None
        if choice.layout == "dense":
            assert all(a is b for a, b in zip(model.modules(), before, strict=True))
            assert choice.reason.startswith("whole runs did not")
    assert least <= accepted <= most


def test_no_run_begins_after_the_deadline() -> None:
    assert timing.gains(lambda new: 1.0, 1.05, 0.0) == (None, None)
    model = chain()
    table = sparsify_for_inference(model, lambda m: m(torch.ones(4, 8)), seconds=1e-9)
    assert (
        table[0].layout == "dense"
        and table[0].reason == "not measured in the time given"
        and layouts(model) == ["dense"]
    )


def test_the_group_that_saves_least_goes_back_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the smallest group in csr nothing is gained, although it is faster alone."""

    def cost(module: nn.Module) -> float:
        if isinstance(module, CSRLinear):
            return {8: 50.0, 16: 2.0, 24: 2.0}[module.in_features]
        return 10.0 if isinstance(module, nn.Linear) else 0.0

    def measure(layers: Mapping[Layout, Sequence[nn.Module]], rows: int) -> dict[Layout, float]:
        return {"dense": 10.0, "packed": 99.0, "csr": 5.0 if layers["dense"][0].in_features == 8 else 2.0}  # type: ignore[operator]

    model = chain(3)
    table = chosen(model, monkeypatch, clock(cost), measure)
    assert layouts(model) == ["dense", "csr", "csr"]
    assert [choice.reason for choice in table] == ["put back: whole runs gain without", *["whole runs confirm it"] * 2]
    assert table[0].run == table[1].run == pytest.approx(30 / 14)
    before = list((model := chain(3)).modules())
    costs = clock(lambda m: {CSRLinear: 20.0, nn.Linear: 10.0}.get(type(m), 0.0))
    table = chosen(model, monkeypatch, costs, measure)
    assert all(a is b for a, b in zip(model.modules(), before, strict=True))
    assert {(choice.layout, choice.best, choice.reason) for choice in table} == {
        ("dense", "csr", "whole runs did not gain")
    }


def test_groups_that_save_too_little_are_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(layers: Mapping[Layout, Sequence[nn.Module]], rows: int) -> dict[Layout, float]:
        small = layers["dense"][0].in_features == 8
        return {"dense": 0.5, "csr": 0.1, "packed": 9.0} if small else {"dense": 50.0, "csr": 10.0, "packed": 90.0}

    costs = clock(lambda m: {CSRLinear: 10.0, nn.Linear: 50.0}.get(type(m), 0.0))
    table = chosen(model := chain(2), monkeypatch, costs, measure)
    assert layouts(model) == ["dense", "csr"] and table[0].reason == "saves less than 1% of the run"
    before = list((model := chain(2)).modules())
    asked: list[nn.Module] = []
    costs = clock(lambda m: asked.append(m) or {nn.Linear: 50_000.0}.get(type(m), 0.0))  # type: ignore[func-returns-value]
    table = chosen(model, monkeypatch, costs, times(dense=2000.0, csr=1.0))
    assert all(a is b for a, b in zip(model.modules(), before, strict=True)) and len(asked) == len(before)
    assert {choice.reason for choice in table} == {"all layers together save too little of the run"}


def test_a_run_that_fails_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def run(model: Any) -> None:
        calls.append(1)
        if len(calls) > 3:
            raise RuntimeError("no more")
        model(torch.ones(4, 8))

    before = list((model := chain()).modules())
    with pytest.raises(RuntimeError, match="no more"):
        sparsify_for_inference(model, run, measure=times(dense=2.0, csr=1.0))
    assert all(a is b for a, b in zip(model.modules(), before, strict=True))


def test_only_layers_that_always_share_an_input_are_joined() -> None:
    def crossed(model: Any) -> None:
        model(torch.ones(3, 16), torch.ones(3, 16))

    def sometimes(model: Any) -> None:
        model(torch.ones(3, 16))
        model.k(torch.ones(3, 16))

    for run, wanted in ((crossed, ["csr", "joined", "joined", "csr"]), (sometimes, ["csr"] * 4)):
        sparsify_for_inference(model := Attention(), run, layout="joined")
        assert layouts(model) == wanted


@pytest.mark.parametrize(("gain", "wanted"), [(0.5, "joined"), (0.99, "csr")])
def test_layers_are_joined_where_it_is_faster(monkeypatch: pytest.MonkeyPatch, gain: float, wanted: str) -> None:
    def measure(layers: Mapping[Layout, Sequence[nn.Module]], rows: int) -> dict[Layout, float]:
        if "joined" in layers:
            return {"csr": 3.0, "joined": 3.0 * gain}
        return {"dense": 10.0, "csr": 2.0, "packed": 20.0}

    costs = clock(lambda m: {JoinedLinear: 1.0, CSRLinear: 2.0, nn.Linear: 10.0}.get(type(m), 0.0))
    monkeypatch.setattr(timing, "seconds", costs)
    table = sparsify_for_inference(model := Attention(), lambda m: m(torch.ones(3, 16)), measure=measure)
    assert layouts(model) == [wanted] * 3 + ["csr"]
    rows = {name: choice for choice in table for name in choice.names}
    assert rows["q"].layout == wanted and rows["out"].layout == "csr"
    assert rows["q"].ratio == pytest.approx(10 / (2 * gain if wanted == "joined" else 2))
    assert rows["k"].seconds["dense"] == 20.0  # of k and v, which are alike


def test_measurements_are_kept_for_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = measurement.measure_layers

    def counted(layers: Mapping[Layout, Sequence[nn.Module]], rows: int) -> dict[Layout, float]:
        calls.append(rows)
        return real(layers, rows)

    monkeypatch.setattr(measurement, "measure_layers", counted)
    state = torch.get_rng_state()
    for batch in (2, 2, 8):
        sparsify_for_inference(copy.deepcopy(network()), batch)
        torch.set_rng_state(state)
    assert calls == [2, 2, 2, 8, 8, 8]  # three shapes, two batches
    before = torch.get_rng_state()
    measurement.MEASURED.clear()
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
        ({"layout": "coo"}, "layout='coo'"),
        ({"layout": "joined"}, "only a run shows"),
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


def test_modules_that_may_compute_something_else_stay() -> None:
    class Mine(nn.Linear):
        pass

    hooked, patched = linear(8, 8, 0.1), linear(8, 8, 0.1)
    hooked.register_forward_hook(lambda *args: None)
    patched.forward = lambda x: x  # type: ignore[method-assign]
    mine = Mine(8, 8)
    nn.init.zeros_(mine.weight)
    block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    nn.init.zeros_(block.linear1.weight)
    small = linear(8, 8, 0.1).requires_grad_(False).to(torch.float8_e4m3fn)  # torch cannot count its zeros
    model = nn.ModuleList([hooked, patched, mine, block, small])
    assert [choice.names for choice in sparsify_for_inference(model, layout="csr")] == []
    assert not block.training and block(torch.zeros(1, 3, 8)).shape == (1, 3, 8)


@pytest.mark.parametrize("layout", ["csr", "joined", "packed"])
def test_layers_are_called_by_keyword(layout: Any) -> None:
    class ByKeyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = linear(8, 8, 0.2), linear(8, 8, 0.2)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.q(input=x) + self.k(input=x)
            return y

    dense, x = ByKeyword(), torch.ones(2, 8)
    model = copy.deepcopy(dense)
    sparsify_for_inference(model, lambda model: model(x), layout=layout)
    assert layouts(model) == [layout] * 2
    torch.testing.assert_close(model(x), dense(x))


def test_a_layer_in_two_places_stays_one() -> None:
    layer = linear(8, 8, 0.1)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    assert [choice.names for choice in sparsify_for_inference(model, layout="csr")] == [("0",)]
    assert isinstance(model[0], CSRLinear) and model[0] is model[2]


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_layer_without_inputs_stays() -> None:
    model, x = nn.Sequential(nn.Linear(0, 8), linear(8, 8, 0.1)), torch.ones(3, 0)
    layouts = {choice.names: choice.layout for choice in sparsify_for_inference(model, lambda m: m(x), layout="csr")}
    assert layouts == {("0",): "dense", ("1",): "csr"}


def test_a_layer_whose_weight_others_read_stays() -> None:
    """Mamba multiplies by the weight of its dt_proj, and never calls it."""

    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.called, self.read = linear(8, 8, 0.1), linear(8, 8, 0.1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.read.weight @ self.called(x).transpose(1, 2)

    model, x = Reads(), torch.ones(2, 3, 8)
    wanted = model(x)
    choices = {choice.names: choice for choice in sparsify_for_inference(model, lambda model: model(x), layout="csr")}
    assert choices[("called",)].layout == "csr"
    assert (choices[("read",)].layout, choices[("read",)].reason) == ("dense", "never called")
    torch.testing.assert_close(model(x), wanted)
