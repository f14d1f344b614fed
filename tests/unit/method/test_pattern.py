"""Patterns: legal masks with exact budgets against a brute force, and a plain run from the config to the export."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

from gap_ds import GaPConfig, GaPEngine
from gap_ds.checkpoint.inspect import inspect
from gap_ds.masks import bitmask, selection
from gap_ds.masks.box import Box
from gap_ds.method import plan
from gap_ds.method.pattern import Block, NofM, Pattern, Unstructured, parse
from gap_ds.method.rules import DropAndGrow

PROPERTY = settings(max_examples=200, deadline=None, derandomize=True, database=None)

#: Where the output and the input dimension lie: shape from (outputs, inputs), and the two dimensions.
Layout = tuple[Callable[[int, int], tuple[int, ...]], tuple[int, int]]
LAYOUTS: dict[str, Layout] = {
    "linear": (lambda o, i: (o, i), (0, 1)),
    "conv1d": (lambda o, i: (o, i, 3), (0, 1)),
    "conv2d": (lambda o, i: (o, i, 2, 3), (0, 1)),
    "gpt2": (lambda o, i: (i, o), (1, 0)),
    "conv_transpose": (lambda o, i: (i, o, 2), (1, 0)),
    "experts": (lambda o, i: (3, o, i), (1, 2)),
    "experts_transposed": (lambda o, i: (3, i, o), (2, 1)),
}


def groups_of(pattern: Pattern, shape: tuple[int, ...], dims: tuple[int, int]) -> list[list[int]]:
    """Flat indices of the weights that a pattern takes together, by plain loops; in order of the first index."""
    found: dict[tuple[int, ...], list[int]] = {}
    for flat, index in enumerate(itertools.product(*map(range, shape))):
        key = list(index)
        if isinstance(pattern, NofM):
            key[dims[1]] //= pattern.m
        elif isinstance(pattern, Block):
            key[dims[0]] //= pattern.height
            key[dims[1]] //= pattern.width
            key = key[: max(dims) + 1]
        found.setdefault(tuple(key), []).append(flat)
    return sorted(found.values())


def brute_force(pattern: Pattern, scores: Tensor, keep: int, dims: tuple[int, int]) -> Tensor:
    """The mask that the definition asks for, by exact arithmetic and a sort of (score, index) pairs."""
    flat = [Fraction(s) for s in scores.flatten().tolist()]
    groups = groups_of(pattern, tuple(scores.shape), dims)
    kept: list[int] = []
    if isinstance(pattern, NofM):
        for group in groups:
            kept += sorted(group, key=lambda i: (-flat[i], i))[: pattern.n]
    else:
        for group in sorted(groups, key=lambda g: (-sum(flat[i] for i in g), g[0])):
            kept += group if len(kept) < keep else []
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    mask[kept] = True
    return mask.view(scores.shape)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Pattern, Tensor, int, tuple[int, int]]:
    """A pattern, scores of a shape that fits, a legal budget, and where outputs and inputs lie."""
    make, dims = LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))]
    kind = draw(st.sampled_from(["unstructured", "N:M", "block"]))
    pattern: Pattern = Unstructured()
    outputs, inputs = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    if kind == "N:M":
        m = draw(st.sampled_from([2, 3, 4, 8]))
        pattern, inputs = NofM(draw(st.integers(1, m - 1)), m), m * draw(st.integers(1, 3))
    elif kind == "block":
        pattern = Block(draw(st.integers(1, 4)), draw(st.integers(1, 4)))
        outputs, inputs = pattern.height * draw(st.integers(1, 3)), pattern.width * draw(st.integers(1, 3))
    shape = make(outputs, inputs)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scores = {
        "ties": lambda: torch.randint(0, 4, shape, generator=generator) / 4,
        "zeros": lambda: torch.zeros(shape),
        "magnitudes": lambda: torch.randn(shape, generator=generator).abs(),
        "keys": lambda: torch.randint(0, 2**31, shape, generator=generator).to(torch.int32),
    }[draw(st.sampled_from(["ties", "zeros", "magnitudes", "keys"]))]()
    return pattern, scores, pattern.budget(shape, draw(st.integers(1, math.prod(shape))), dims), dims


@PROPERTY
@given(cases())
def test_masks_are_those_of_the_brute_force(case: tuple[Pattern, Tensor, int, tuple[int, int]]) -> None:
    pattern, scores, keep, dims = case
    before = scores.clone()
    mask = pattern.mask(scores, keep, dims)
    assert mask.dtype == torch.bool and mask.shape == scores.shape and torch.equal(scores, before)
    assert int(mask.sum()) == keep
    assert torch.equal(mask, brute_force(pattern, scores, keep, dims))
    assert illegal(pattern, mask, dims) == 0


def exchanged(
    pattern: Pattern, scores: Tensor, kept: Tensor, growth: Tensor, keep: int, drop: int, dims: tuple[int, int]
) -> Tensor:
    """The mask after an update that the definition asks for, by sorts of (score, index) pairs."""
    flat, came = ([Fraction(s) for s in values.flatten().tolist()] for values in (scores, growth))
    was, groups = kept.flatten().tolist(), groups_of(pattern, tuple(scores.shape), dims)
    stay: list[int] = []
    grown: list[int] = []
    if isinstance(pattern, NofM):
        each, more = divmod(drop, len(groups))
        ranked = [sorted((i for i in g if was[i]), key=lambda i: (-flat[i], i)) for g in groups]
        stays = keep // len(groups) - each
        # The last one of each group is dropped next; where they tie, in the last group first.
        last = sorted(range(len(groups)), key=lambda g: (flat[ranked[g][stays - 1]] if stays else 0, -g))
        for g, group in enumerate(groups):
            extra = g in last[:more]
            here = ranked[g][: stays - extra]
            others = sorted((i for i in group if i not in here), key=lambda i: (-came[i], i))
            stay, grown = stay + here, grown + others[: each + extra]
    else:
        size = len(groups[0])
        left = max(1, math.floor(Fraction(keep - drop, size) + Fraction(1, 2)))
        best = sorted((g for g in groups if was[g[0]]), key=lambda g: (-sum(flat[i] for i in g), g[0]))[:left]
        others = sorted((g for g in groups if g not in best), key=lambda g: (-sum(came[i] for i in g), g[0]))
        stay = [i for g in best for i in g]
        grown = [i for g in others[: keep // size - left] for i in g]
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    mask[stay + grown] = True
    return mask.view(scores.shape)


def illegal(pattern: Pattern, mask: Tensor, dims: tuple[int, int]) -> int:
    """How many groups of a mask are not as the pattern wants them."""
    allowed = {NofM: lambda n, size: n == pattern.n, Block: lambda n, size: n in (0, size)}.get(type(pattern))
    groups = groups_of(pattern, tuple(mask.shape), dims)
    kept = mask.flatten().tolist()
    return sum(allowed is not None and not allowed(sum(kept[i] for i in g), len(g)) for g in groups)


@PROPERTY
@given(cases())
def test_a_permuted_layout_is_the_same_pattern(case: tuple[Pattern, Tensor, int, tuple[int, int]]) -> None:
    """The layout decides ties between groups only: without ties, a transposed entry has the transposed mask."""
    pattern, scores, keep, dims = case
    scores = torch.randperm(scores.numel(), generator=torch.Generator().manual_seed(keep)).view(scores.shape)
    if isinstance(pattern, Block):
        scores = (scores + 2) ** 3  # sums of few cubes seldom tie
        sums = [sum(scores.flatten()[g].tolist()) for g in groups_of(pattern, tuple(scores.shape), dims)]
        if len(set(sums)) < len(sums):
            return
    swapped = pattern.mask(scores.transpose(*dims), keep, (dims[1], dims[0]))
    assert torch.equal(swapped.transpose(*dims), pattern.mask(scores, keep, dims))


@PROPERTY
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 400), st.sampled_from(sorted(LAYOUTS)))
def test_budgets(outputs: int, inputs: int, keep: int, layout: str) -> None:
    make, dims = LAYOUTS[layout]
    shape = make(outputs, inputs)
    keep = min(keep, math.prod(shape))
    assert Unstructured().budget(shape, keep, dims) == keep and Unstructured().misfit(shape, dims) is None
    pattern = NofM(3, 4)
    assert (pattern.misfit(shape, dims) is None) == (inputs % 4 == 0)
    if inputs % 4 == 0:
        assert 4 * pattern.budget(shape, keep, dims) == 3 * math.prod(shape)
    block = Block(2, 3)
    assert (block.misfit(shape, dims) is None) == (outputs % 2 == 0 and inputs % 3 == 0)
    if block.misfit(shape, dims) is None:
        size, budget = len(groups_of(block, shape, dims)[0]), block.budget(shape, keep, dims)
        assert budget % size == 0 and size <= budget <= math.prod(shape)
        assert budget == size or 2 * abs(budget - keep) <= size


@PROPERTY
@given(st.integers(1, 40), st.integers(1, 40))
def test_every_name_is_read_back(a: int, b: int) -> None:
    for pattern in (NofM(a, b), Block(a, b)):
        legal = a < b <= 32 if isinstance(pattern, NofM) else a * b > 1
        if legal:
            assert parse(str(pattern)) == pattern
        else:
            with pytest.raises(ValueError, match="must be"):
                parse(str(pattern))


def test_unstructured_is_what_is_selected_over_shards() -> None:
    scores = torch.randint(-3, 4, (7, 9), generator=torch.Generator().manual_seed(0)).float()
    piece = selection.Piece("w", Box.span(0, 63, 63), selection.magnitude_keys(scores.flatten()), 0)
    bits = selection.select_largest([piece], [20], selection.Single())
    whole = Unstructured().mask(scores.abs(), 20, (0, 1))
    assert torch.equal(bitmask.unpack(bits[0], 63).view(7, 9), whole)


# -- in the plan ---------------------------------------------------------------------------------------------------


class Conv1D(nn.Module):
    """GPT-2's layer: a Linear whose weight is (in, out)."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Experts(nn.Module):
    """Three stacked experts, as transformers has them: (E, out, in), or (E, in, out)."""

    def __init__(self, is_transposed: bool) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        self.up_proj = nn.Parameter(torch.randn(3, 8, 16) / 4)
        self.bias = nn.Parameter(torch.zeros(3, 8))

    def forward(self, x: Tensor) -> Tensor:
        up = self.up_proj if self.is_transposed else self.up_proj.transpose(1, 2)
        return torch.einsum("bi,eio->bo", x, up)


class Layer(nn.Module):
    """One entry of each layout, (2, 16) -> (2, 16)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 4, 3, padding=1, groups=2)  # (4, 4, 3, 3)
        self.up = nn.ConvTranspose1d(4, 8, 3, padding=1)  # (4, 8, 3)
        self.gpt2 = Conv1D(8, 16)  # (16, 8)
        self.experts_a, self.experts_b = Experts(False), Experts(True)  # 16 -> 8, 8 -> 16
        self.fc = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(self.conv(x.view(2, 8, 2, 1)).view(2, 4, 2)).view(2, 16)
        return x + self.fc(self.experts_b(self.experts_a(y) + self.gpt2(x)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return (x**2).mean()


DIMS = {"conv": (0, 1), "up": (1, 0), "gpt2": (1, 0), "experts_a": (1, 2), "experts_b": (2, 1), "fc": (0, 1)}


def config(pattern: str, **changes: Any) -> GaPConfig:
    base = {"sparsity": 0.5, "partitions": 2, "phase_steps": 2, "rounds": 1, "finetune_steps": 2}
    return GaPConfig.load({**base, "pattern": pattern, **changes})


def test_dimensions_of_the_entries() -> None:
    built = plan.build(Model(), config("2:4"))
    assert {e.name.split(".")[2]: e.dims for e in built.entries} == DIMS
    assert len(built.entries) == 12 and built.pattern == NofM(2, 4)
    assert all(2 * e.keep == e.numel for e in built.entries)


def test_gpt2() -> None:
    transformers = pytest.importorskip("transformers")
    settings = {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0}
    with torch.device("meta"):
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**settings))
    assert {e.dims for e in plan.build(model, config("2:4")).entries} == {(1, 0)}


def test_a_shape_that_does_not_fit_is_refused() -> None:
    model = nn.ModuleList(nn.Sequential(nn.Linear(16, 37), nn.Linear(37, 16)) for _ in range(2))
    with pytest.raises(ValueError) as error:
        plan.build(model, config("2:4"))
    assert str(error.value) == (
        'pattern="2:4": 0.1.weight (and 1 others) does not go with it: its input dimension is 37, which is no multiple '
        'of 4. List it in "exclude" to keep it dense, or change "pattern".'
    )
    message = (
        r'pattern="block:4x4": 0\.0\.weight .* 37 x 16, which is not a whole number of 4 x 4 blocks\. List .*"excl'
    )
    with pytest.raises(ValueError, match=message):
        plan.build(model, config("block:4x4", sparsity=0.8))
    assert len(plan.build(model, config("2:4", exclude=[r"1\.weight"])).entries) == 2
    assert len(plan.build(model, config("block:1x4", exclude=[r"1\.weight"])).entries) == 2
    depthwise = nn.ModuleList(nn.Sequential(nn.Conv2d(8, 8, 3, groups=8)) for _ in range(2))
    with pytest.raises(ValueError, match="its input dimension is 1, which is no multiple of 4"):
        plan.build(depthwise, config("2:4", include=["0"]))


@pytest.mark.parametrize("distribution", ["uniform", "erk"])
def test_budgets_of_blocks(distribution: str) -> None:
    free = plan.build(Model(), config("unstructured", sparsity=0.8, distribution=distribution))
    built = plan.build(Model(), config("block:4x2", sparsity=0.8, distribution=distribution))
    for entry, unstructured in zip(built.entries, free.entries, strict=True):
        size = 8 * math.prod(entry.shape[max(entry.dims) + 1 :])
        wanted = max(1, math.floor(unstructured.keep / size + 0.5)) * size
        assert entry.keep == wanted and abs(entry.keep - unstructured.keep) <= max(size / 2, size - unstructured.keep)


# -- in a run ------------------------------------------------------------------------------------------------------


def run(engine: GaPEngine, steps: int) -> Iterator[int]:
    for step in range(engine.applied_steps, steps):
        x = torch.randn(2, 16, generator=torch.Generator().manual_seed(step))
        engine.backward(engine(x))
        engine.step()
        yield step


def build(pattern: str, **changes: Any) -> GaPEngine:
    torch.manual_seed(0)
    model = Model()
    return GaPEngine(model, config(pattern, **changes), optimizer=torch.optim.AdamW(model.parameters(), lr=0.01))


RUNS = [("2:4", 0.5), ("1:4", 0.75), ("block:4x4", 0.7), ("block:2x4", 0.5)]


@pytest.mark.parametrize("init", ["random", "magnitude"])
@pytest.mark.parametrize(("pattern", "sparsity"), RUNS)
def test_masks_are_legal_and_exact_in_every_step(pattern: str, sparsity: float, init: str, tmp_path: Path) -> None:
    engine = build(pattern, sparsity=sparsity, mask_init=init)
    weights = dict(engine.module.named_parameters())
    entries = {e.name: e for e in engine.plan.entries}

    def check(name: str, mask: Tensor) -> None:
        entry = entries[name]
        assert int(mask.sum()) == entry.keep
        assert illegal(engine.plan.pattern, mask.view(entry.shape), entry.dims) == 0

    seen = set()
    for step in run(engine, 6):
        for name in entries:
            if (mask := engine.mask(name)) is not None:
                check(name, mask)
                assert weights[name].flatten()[~mask].count_nonzero() == 0
        seen.add(engine.phase.index)
        if step == 2:
            engine.export(tmp_path / "mid")
            engine.save_checkpoint(tmp_path / "checkpoints")
    assert seen == {0, 1, 2}
    exported = load_file(tmp_path / "mid" / "model.safetensors")
    for name in entries:
        check(name, exported[name].flatten() != 0)
    resumed = build(pattern, sparsity=sparsity, mask_init=init)
    resumed.load_checkpoint(tmp_path / "checkpoints")
    assert resumed.applied_steps == 3
    for _ in run(resumed, 6):
        pass
    for (name, a), (_, b) in zip(weights.items(), resumed.module.named_parameters(), strict=True):
        assert torch.equal(a, b), name


MOVING: dict[str, dict[str, Any]] = {
    "rigl": {"method": "rigl", "phase_steps": 6, "update_steps": 2, "drop_fraction": 0.5},
    "set": {"method": "set", "phase_steps": 6, "update_steps": 2, "drop_fraction": 0.9},
    "gradual": {"method": "gradual", "phase_steps": 6, "update_steps": 1},
    "granet": {"method": "granet", "phase_steps": 6, "update_steps": 1},
    "ramp": {"partitions": 2, "rounds": 1, "phase_steps": 4, "update_steps": 1, "prune_ramp": 1.0},
    "rising": {"partitions": 2, "rounds": 1, "phase_steps": 4, "update_steps": 1, "target": "rising"},
    "grow": {"partitions": 2, "rounds": 2, "phase_steps": 2, "grow": "gradient", "grow_share": 0.6},
}


@pytest.mark.parametrize("method", MOVING)
@pytest.mark.parametrize(("pattern", "sparsity"), [("1:4", 0.75), ("block:2x4", 0.7)])
def test_masks_that_move_are_legal_and_exact(pattern: str, sparsity: float, method: str, tmp_path: Path) -> None:
    """In every step they keep the budget of the schedule; a resumed run goes on alike."""
    settings = {"sparsity": sparsity, "pattern": pattern, "finetune_steps": 2, **MOVING[method]}

    def build() -> GaPEngine:
        torch.manual_seed(0)
        model = Model()
        return GaPEngine(model, settings, optimizer=torch.optim.AdamW(model.parameters(), lr=0.01))

    engine = build()
    total, budgets = engine.schedule.total_steps, set[tuple[int, ...]]()
    for step in run(engine, total):
        phase = engine.phase
        at = [s for s in (phase.first_step, *phase.updates) if s <= step + 1][-1]
        kept = []
        for entry in engine.plan.entries:
            if (mask := engine.mask(entry.name)) is not None:
                wanted = engine.plan.pattern.nearest(entry.shape, phase.budget(entry, at), entry.dims)
                kept.append(int(mask.sum()))
                legal = engine.plan.pattern
                if isinstance(legal, NofM):
                    legal = NofM(wanted * legal.m // entry.numel, legal.m)
                assert kept[-1] == wanted and illegal(legal, mask.view(entry.shape), entry.dims) == 0
        budgets.add(tuple(kept))
        counts = sum(kept) + sum(e.numel for e in engine.plan.entries if engine.mask(e.name) is None)
        if pattern == "1:4":
            assert engine.density == pytest.approx(counts / engine.plan.numel)
        if step == 4:
            engine.save_checkpoint(tmp_path)
            assert inspect(tmp_path / "step_5", lambda *_: None)["problems"] == []
    assert engine.stats()["kept"] == engine.plan.keep and len(budgets) > (method not in ("rigl", "set"))
    resumed = build()
    resumed.load_checkpoint(tmp_path)
    for _ in run(resumed, total):
        pass
    for (name, a), (_, b) in zip(engine.module.named_parameters(), resumed.module.named_parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("method", ["rigl", "set"])
@pytest.mark.parametrize(("pattern", "sparsity"), [("2:4", 0.5), ("1:4", 0.75), ("3:4", 0.25), ("block:2x4", 0.7)])
def test_exchanges_are_those_of_the_brute_force(pattern: str, sparsity: float, method: str) -> None:
    times = {"phase_steps": 6, "update_steps": 2, "finetune_steps": 1, "drop_fraction": 0.7}
    torch.manual_seed(0)
    model = Model()
    config = {"method": method, "sparsity": sparsity, "pattern": pattern, "mask_init": "magnitude", **times}
    engine = GaPEngine(model, config, optimizer=torch.optim.SGD(model.parameters(), lr=0.01))
    weights, last = dict(engine.module.named_parameters()), dict[str, tuple[Tensor, Tensor, Tensor]]()

    def look(*_: Any) -> None:
        for entry in engine.plan.entries:
            mask, weight = engine.mask(entry.name), weights[entry.name]
            assert mask is not None and weight.grad is not None
            last[entry.name] = mask.view(entry.shape), weight.detach().abs().clone(), weight.grad.abs().clone()

    engine.optimizer.register_step_post_hook(look)
    moved = 0
    for step in run(engine, 6):
        phase = engine.phase
        if step + 1 not in phase.updates:
            continue
        for entry in engine.plan.entries:
            update = engine.run.rule(entry, phase, phase, step + 1)
            assert isinstance(update, DropAndGrow)
            was, magnitude, growth = last[entry.name]
            if method == "set":
                whole = Box.span(0, entry.numel, entry.numel)
                keys = selection.random_keys(0, f"{entry.name} {step + 1}", whole, torch.device("cpu"))
                growth = keys(0, entry.numel).view(entry.shape)
            of_update = (update.keep, update.drop, entry.dims)
            wanted = exchanged(engine.plan.pattern, magnitude, was, growth, *of_update)
            found = engine.mask(entry.name)
            assert found is not None and torch.equal(found.view(entry.shape), wanted), entry.name
            moved += int((wanted & ~was).sum())
    assert moved > 0


def test_a_checkpoint_of_another_pattern_is_refused(tmp_path: Path) -> None:
    build("2:4").save_checkpoint(tmp_path)
    for other in ("unstructured", "block:4x4"):  # at half the weights all budgets are the same
        with pytest.raises(ValueError, match=r"another plan.* the pattern"):
            build(other).load_checkpoint(tmp_path)


def test_a_weight_that_is_nan_stops_the_boundary() -> None:
    engine = build("2:4", mask_init="magnitude")
    with torch.no_grad():
        engine.module.layers[0].fc.weight[3, 1] = float("nan")
    message = r"layers\.0\.fc\.weight: 1 weights are NaN, so their magnitudes have no order\. .*diverged"
    with pytest.raises(ValueError, match=message):
        after = engine.schedule.phases[1]
        engine.mask_state.select(
            {e: engine.run.rule(e, engine.phase, after, after.first_step) for e in engine.plan.entries[:6]}, 0
        )


def test_what_travels_is_forecast() -> None:
    """Of each entry one number, and the scores of a group that is cut: half of the entries at a time."""
    pytest.importorskip("typer")
    from gap_ds.cli.plan import forecast

    ranks = forecast(Model(), config("2:4"), world_size=2)["ranks"]
    entries = [e for e in plan.build(Model(), config("2:4")).entries if e.partition == 0]
    # A group and what lies between its members: 4 rows of a matrix (in, out), 4 weights of one that is (out, in).
    half = sum(8 + 8 * 4 * math.prod(e.shape[e.dims[1] + 1 :]) for e in entries)
    assert (ranks["start_bytes"], ranks["boundary_bytes"]) == (half, half)
    assert ranks["sent"] == "counts, and scores of groups that are cut"
    assert forecast(Model(), config("unstructured"), world_size=2)["ranks"]["sent"] == "counts"


def test_the_shipped_config() -> None:
    path = Path(__file__).resolve().parents[3] / "configs" / "gap" / "cyclic_2of4.json"
    shipped = GaPConfig.load(path)
    assert json.loads(path.read_text())["pattern"] == "2:4" and re.search(r"\|pat:2:4\|", shipped.signature("1"))
