"""Optimizers of gap_ds.optim against those of torch.optim with masked weights: equal bits, less state."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gap_ds import GaPEngine, optim
from gap_ds.checkpoint import portable
from gap_ds.cli.plan import forecast
from gap_ds.masks import bitmask
from gap_ds.masks import cpu as masks_cpu
from gap_ds.method.config import GaPConfig
from gap_ds.optim import cpu, kept
from gap_ds.sharding import moments
from gap_ds.sharding.optimizers import Optimizers
from gap_ds.sharding.shard import Shard

#: Odd sizes: vectors of a processor have rests, bytes of a mask too.
SIZES = (13, 37)
GAP = {"sparsity": 0.8, "partitions": 2, "phase_steps": 3, "rounds": 2, "finetune_steps": 3}
OTHER_METHODS = {
    "rigl": {"method": "rigl", "sparsity": 0.7, "update_steps": 2, "phase_steps": 8, "finetune_steps": 3},
    "mean": {**GAP, "regrow_moments": "mean_second"},
    "last": {**GAP, "regrow": "last_value"},
    "reset": {**GAP, "optimizer_state": "reset"},
    "warmup": {**GAP, "regrow_warmup_steps": 2},
}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, SIZES[0])
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(*SIZES), nn.ReLU(), nn.Linear(*SIZES[::-1])) for _ in range(4)
        )
        self.sometimes = nn.Linear(SIZES[0], 3)

    def forward(self, tokens: Tensor, step: int) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = x + layer(x)
        return x.square().mean() + (self.sometimes(x).mean() if step % 2 else 0.0)


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """Two parameter groups with other settings."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    return [
        {"params": matrices, "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() < 2], "lr": 1e-3},
    ]


def build(kind: Any, config: dict[str, Any] | None = None, **settings: Any) -> GaPEngine:
    torch.manual_seed(0)
    model = Model()
    return GaPEngine(model, config or GAP, optimizer=kind(groups(model), lr=1e-2, **settings))


def train(engine: GaPEngine, steps: int = 1) -> None:
    for _ in range(steps):
        step = engine.applied_steps
        tokens = torch.randint(11, (4, 5), generator=torch.Generator().manual_seed(step))
        engine.backward(engine(tokens, step))
        engine.step()


def state(engine: GaPEngine) -> dict[str, Tensor]:
    """Weights, and moments of the weights that are kept, by name."""
    found = {name: p.detach().clone() for name, p in engine.module.named_parameters()}
    for shard in engine.run.backend.shards():
        mask = engine.mask(shard.name) if shard.name in engine.mask_state.shards else None
        for name, moment, _ in engine.run.backend.optimizers.moments(shard):
            found[f"{name} {shard.name}"] = (moment if mask is None else moment[mask]).clone()
    return found


def assert_equal(ours: GaPEngine, theirs: GaPEngine) -> None:
    a, b = state(ours), state(theirs)
    assert a.keys() == b.keys()
    for name, value in b.items():
        assert torch.equal(a[name], value), (ours.applied_steps, name)


PAIRS = {
    "adamw": (optim.AdamW, torch.optim.AdamW, {}),
    "adamw-amsgrad-maximize": (optim.AdamW, torch.optim.AdamW, {"amsgrad": True, "maximize": True}),
    "adamw-foreach": (optim.AdamW, torch.optim.AdamW, {"foreach": True}),
    "adamw-beta": (optim.AdamW, torch.optim.AdamW, {"betas": (0.4, 0.95), "eps": 1e-6}),
    "sgd": (optim.SGD, torch.optim.SGD, {}),
    "sgd-momentum": (optim.SGD, torch.optim.SGD, {"momentum": 0.9}),
    "sgd-nesterov": (optim.SGD, torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "sgd-dampening": (optim.SGD, torch.optim.SGD, {"momentum": 0.9, "dampening": 0.3, "maximize": True}),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_equals_torch_with_masked_weights(pair: str) -> None:
    ours, theirs, settings = PAIRS[pair]
    first, second = build(ours, **settings), build(theirs, **settings)
    while not second.finished:
        train(first)
        train(second)
        assert_equal(first, second)
    assert first.stats()["kept"] == second.stats()["kept"]


def test_complex_weights_step_as_torchs() -> None:
    """They cannot be pruned, and may lie beside what is."""
    found = []
    for kind in (optim.AdamW, torch.optim.AdamW):
        weight = nn.Parameter(torch.tensor([1 + 2j, 3 - 1j]))
        optimizer = kind([weight], lr=0.1, foreach=True)
        for _ in range(2):
            weight.grad = torch.tensor([0.5 - 3j, 1j])
            optimizer.step()
        found.append(weight.detach())
    assert torch.equal(*found)


@pytest.mark.parametrize("method", OTHER_METHODS)
def test_every_change_of_masks_equals_torch(method: str) -> None:
    config = OTHER_METHODS[method]
    first, second = build(optim.AdamW, config), build(torch.optim.AdamW, config)
    while not second.finished:
        train(first)
        train(second)
        assert_equal(first, second)


def expected_bytes(engine: GaPEngine, moments: int, counted: bool) -> int:
    """4 bytes for each moment of a weight that is kept or not pruned, and for each count of an owner."""
    held = {e.name: e.numel for e in engine.plan.entries}
    held |= {name: bitmask.count(bits) for name, bits in engine.mask_state.bits.items()}
    parameters = dict(engine.module.named_parameters())
    numel = sum(held.get(name, p.numel()) for name, p in parameters.items())
    return 4 * moments * numel + (4 * len(parameters) if counted else 0)


@pytest.mark.parametrize(("kind", "moments"), [(optim.AdamW, 2), (optim.SGD, 1)])
def test_state_is_as_large_as_what_is_kept(kind: Any, moments: int) -> None:
    engine = build(kind, **({"momentum": 0.9} if kind is optim.SGD else {}))
    assert engine.stats()["optimizer_bytes"] == 0  # made at the first step, as torch's
    train(engine, 2)
    while not engine.finished:
        assert engine.stats()["optimizer_bytes"] == expected_bytes(engine, moments, kind is optim.AdamW)
        train(engine)


def test_the_plan_forecasts_the_most_state() -> None:
    """Gradual pruning begins dense, so the first update makes whole state; frozen weights have none."""
    config = {"method": "gradual", "sparsity": 0.8, "phase_steps": 6, "update_steps": 2, "finetune_steps": 1}
    model = Model()
    model.sometimes.requires_grad_(False)
    engine = GaPEngine(model, config, optimizer=optim.AdamW([p for p in model.parameters() if p.requires_grad]))
    held = []
    while not engine.finished:
        train(engine)
        held.append(engine.stats()["optimizer_bytes"])
    counts = 4 * sum(p.requires_grad for p in model.parameters())
    figures = forecast(model, GaPConfig.load(config))["optimizer_state"]
    assert (figures["most"], figures["last"]) == (max(held) - counts, held[-1] - counts)
    assert figures["most"] == figures["whole"] == 8 * sum(p.numel() for p in model.parameters() if p.requires_grad)


#: Before the first step, at a boundary, in the middle of a phase.
STOPS = [("adamw", 0), ("adamw", 3), ("sgd-momentum", 7), ("sgd", 3)]
STOPS_FULL = [("adamw", 2), ("adamw", 7), ("sgd-momentum", 0), ("sgd-momentum", 3)]


@pytest.mark.parametrize(
    ("pair", "stop"), [*STOPS, *(pytest.param(*row, marks=pytest.mark.full) for row in STOPS_FULL)]
)
def test_resume_equals_never_having_stopped(tmp_path: Path, pair: str, stop: int) -> None:
    kind, torchs, settings = PAIRS[pair]
    straight = build(kind, **settings)
    train(straight, stop)
    straight.save_checkpoint(tmp_path / "library")
    straight.save_checkpoint(tmp_path / "portable", portable=True)
    train(straight, 14 - stop)
    for other, folder in itertools.product((kind, torchs), ("library", "portable")):
        resumed = build(other, **settings)
        train(resumed, 5)
        resumed.load_checkpoint(tmp_path / folder)
        if other is kind and stop > 1:
            moments = {"adamw": 2, "sgd-momentum": 1, "sgd": 0}[pair]
            assert resumed.stats()["optimizer_bytes"] == expected_bytes(resumed, moments, pair == "adamw")
        train(resumed, 14 - stop)
        assert_equal(resumed, straight)


def test_a_run_of_torchs_adamw_goes_on_in_less_memory(tmp_path: Path) -> None:
    straight = build(torch.optim.AdamW)
    train(straight, 7)
    straight.save_checkpoint(tmp_path)
    train(straight, 7)
    resumed = build(optim.AdamW)
    resumed.load_checkpoint(tmp_path)
    train(resumed, 7)
    assert_equal(resumed, straight)


def test_masks_that_are_saved_apart_from_the_state(tmp_path: Path) -> None:
    straight = build(optim.AdamW)
    train(straight, 4)
    straight.save_masks(tmp_path)
    saved = copy.deepcopy([straight.module.state_dict(), straight.optimizer.state_dict()])
    train(straight, 10)
    for before in (True, False):  # the order in which loops restore them
        resumed = build(optim.AdamW)
        train(resumed, 1)
        resumed.module.load_state_dict(saved[0])
        if before:
            resumed.optimizer.load_state_dict(copy.deepcopy(saved[1]))
        resumed.load_masks(tmp_path)
        if not before:
            resumed.optimizer.load_state_dict(copy.deepcopy(saved[1]))
        train(resumed, 10)
        assert_equal(resumed, straight)


@pytest.mark.parametrize("pair", ["adamw", "sgd", "sgd-momentum"])
def test_state_dicts_are_torchs(pair: str) -> None:
    kind, torchs, settings = PAIRS[pair]
    ours, theirs = build(kind, **settings), build(torchs, **settings)
    train(ours, 5)
    train(theirs, 5)
    found, wanted = ours.optimizer.state_dict(), theirs.optimizer.state_dict()
    assert found.keys() == wanted.keys() and found["state"].keys() == wanted["state"].keys()
    for key, row in wanted["state"].items():
        assert row.keys() == found["state"][key].keys()
        assert all(found["state"][key][name].shape == value.shape for name, value in row.items())
    again = pickle.loads(pickle.dumps(ours.optimizer))
    for key, row in found["state"].items():
        assert all(torch.equal(again.state_dict()["state"][key][name], value) for name, value in row.items())


def test_state_is_no_tensor_for_others() -> None:
    """Under the name of a moment DeepSpeed looks for a flat buffer."""
    engine = build(optim.AdamW)
    train(engine)
    owner = engine.mask_state.shards[next(iter(engine.mask_state.bits))].owner()
    with pytest.raises(AttributeError, match=r"is no tensor with 'narrow'. Read optimizer.state_dict\(\)"):
        engine.optimizer.state[owner]["exp_avg"].narrow(0, 0, 1)


def test_closed_engines_leave_whole_state() -> None:
    engine = build(optim.AdamW)
    train(engine, 4)
    before = engine.optimizer.state_dict()["state"]
    engine.close()
    held = engine.optimizer.state
    for i, parameter in enumerate(p for group in engine.optimizer.param_groups for p in group["params"]):
        if parameter in held:
            assert held[parameter]["exp_avg"].shape == parameter.shape
            assert torch.equal(held[parameter]["exp_avg"], before[i]["exp_avg"])


def test_without_an_engine_it_is_torchs() -> None:
    torch.manual_seed(0)
    models = [Model(), Model()]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [optim.AdamW(groups(models[0]), lr=1e-2), torch.optim.AdamW(groups(models[1]), lr=1e-2)]
    assert not optimizers[0].state
    for step in range(3):
        losses = []
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            loss = model(torch.arange(11)[None], step)
            loss.backward()
            losses.append(optimizer.step(lambda loss=loss: loss))
        assert torch.equal(*losses)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)
        for name, value in optimizers[1].state[b].items():
            assert torch.equal(optimizers[0].state[a][name], value)


def flat(kind: Any, pieces: list[tuple[int, int]]) -> tuple[Tensor, torch.optim.Optimizer, Optimizers, list[Shard]]:
    """A flat buffer of 300 weights, as ZeRO has them, of which some ranges are entries."""
    owner = nn.Parameter(torch.randn(300, generator=torch.Generator().manual_seed(0)))
    optimizer = kind([owner], lr=1e-2)
    optimizers = Optimizers([optimizer])
    shards = [Shard.of_range(f"{start}", (numel,), 0, numel, start, lambda: owner) for start, numel in pieces]
    moments.divide(optimizers, shards)
    return owner, optimizer, optimizers, shards


@pytest.mark.parametrize(
    "pieces", [[(0, 300)], [(0, 51), (51, 99)], [(7, 100), (200, 100)], [(3, 60), (63, 1), (90, 8)]]
)
def test_pieces_of_a_flat_buffer(pieces: list[tuple[int, int]]) -> None:
    both = [flat(kind, pieces) for kind in (optim.AdamW, torch.optim.AdamW)]
    generator = torch.Generator().manual_seed(1)
    bits: dict[str, Tensor | None] = {}
    for step in range(12):
        gradient = torch.randn(300, generator=generator)
        name = both[0][3][step % len(pieces)].name
        new = bitmask.pack(torch.rand(int(both[0][3][step % len(pieces)].numel), generator=generator) < 0.3)
        after = None if step % 3 == 2 else new
        for owner, optimizer, optimizers, shards in both:
            shard = next(shard for shard in shards if shard.name == name)
            moments.change_mask(optimizers, shard, bits.get(name), after, {"exp_avg_sq": 0.5}, ())
            if after is not None:
                bitmask.zero_pruned_(shard.weight(), after)
            owner.grad = gradient.clone()
            optimizer.step()
            for shard in shards:
                mask = after if shard.name == name else bits.get(shard.name)
                if mask is not None:
                    bitmask.zero_pruned_(shard.weight(), mask)
        bits[name] = after
        assert torch.equal(both[0][0], both[1][0])
        for ours, theirs in zip(both[0][3], both[1][3], strict=True):
            kept = torch.ones(ours.numel, dtype=torch.bool)
            if (mask := bits.get(ours.name)) is not None:
                kept = bitmask.unpack(mask, ours.numel)
            a, b = (
                dict((n, m[kept]) for n, m, _ in o.moments(s))
                for (_, _, o, _), s in zip(both, (ours, theirs), strict=True)
            )
            assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in b)


def refusal(call: Callable[[], Any]) -> str:
    with pytest.raises(ValueError) as error:
        call()
    return str(error.value)


def test_what_is_refused() -> None:
    said = refusal(lambda: build(optim.AdamW, {**GAP, "regrow_moments": "keep_second"}))
    assert said.startswith('regrow_moments="keep_second": optimizer=AdamW of gap_ds.optim holds no moments of pruned')
    embedding = nn.Embedding(4, 3, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    assert "takes no sparse gradients" in refusal(optim.AdamW(embedding.parameters()).step)


@pytest.mark.parametrize("pair", ["adamw", "adamw-amsgrad-maximize", "sgd-nesterov"])
def test_without_a_compiler_it_equals_torch_too(pair: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "loops", lambda: None)
    ours, theirs, settings = PAIRS[pair]
    first, second = build(ours, **settings), build(theirs, **settings)
    train(first, 7)
    train(second, 7)
    assert_equal(first, second)


@pytest.mark.skipif(cpu.loops() is None, reason="no C compiler, or GAP_DS_NATIVE=0")
@pytest.mark.parametrize("threads", [1, 2])
def test_the_loops_in_c_equal_pytorch(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any size, at unaligned addresses, in several chunks and threads; nothing around the piece changes."""
    monkeypatch.setattr(kept, "CHUNK", 50)
    monkeypatch.setattr(masks_cpu, "_SHARED", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(threads)
    for numel, density in itertools.product([1, 7, 64, 65, 1000, 1024, 3333], [0.0, 0.1, 0.5, 1.0]):
        bits = bitmask.pack(torch.rand(numel, generator=generator) < density)
        start, found = numel % 5, []
        buffer = torch.randn(numel + 9, generator=generator)
        gradient = torch.randn(numel + 9, generator=generator)
        for loops in (True, False):
            owner = nn.Parameter(buffer.clone())
            optimizer = optim.AdamW([owner], lr=0.1)
            optimizer.divide(owner, [(start, numel)])
            optimizer.change_mask(owner, start, bits)
            with monkeypatch.context() as patched:
                if not loops:
                    patched.setattr(cpu, "loops", lambda: None)
                for scale in (1.0, 0.3):
                    owner.grad = gradient * scale
                    optimizer.step()
            found.append([owner.detach(), *(held for _, value in optimizer._moments_of(owner) for held in value)])
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)), (numel, density)
    torch.set_num_threads(before)


def test_portable_files_are_torchs(tmp_path: Path) -> None:
    """What another backend or number of ranks reads, by each kind of optimizer."""
    straight = build(optim.AdamW)
    train(straight, 7)
    folder = straight.save_checkpoint(tmp_path, portable=True) / "gap"
    train(straight, 3)
    for kind in (optim.AdamW, torch.optim.AdamW):
        resumed = build(kind)
        train(resumed, 7)  # the same place in the schedule, with other masks' state
        for parameter in resumed.module.parameters():
            parameter.data.zero_()
        portable.read(folder, resumed.run.backend, resumed.run.buffers(), resumed.run.world)
        resumed.mask_state.take_masks()
        train(resumed, 3)
        assert_equal(resumed, straight)
