"""What ranks must agree on: every disagreement is told on all ranks, with the first entry or the ranks by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from fake_ranks import Rank, Ranks
from torch import Tensor, nn

from gap_ds import GaPEngine
from gap_ds.masks import bitmask
from gap_ds.masks.box import Box
from gap_ds.method.plan import Entry, Plan
from gap_ds.sharding.shard import Shard
from gap_ds.training import consistency
from gap_ds.training.consistency import LossGuard


class Rows:
    """A group of ranks, seen from one of them: what the others would send is made by a function of what it sends."""

    def __init__(self, *others: Any, rank: int = 0) -> None:
        self.others, self.rank, self.size = others, rank, len(others) + 1

    def all_gather(self, row: Tensor) -> Tensor:
        return torch.stack([row, *(other(row) for other in self.others)])

    def sum(self, row: Tensor) -> Tensor:
        return self.all_gather(row).sum(0)


def same(row: Tensor) -> Tensor:
    return row


def changed(column: int, by: int = 1) -> Any:
    def other(row: Tensor) -> Tensor:
        row = row.clone()
        row[column] += by
        return row

    return other


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ((same, changed(0)), "ranks 0 and 2 have different applied steps: 7 and 8."),
        ((changed(1), same, changed(1)), r"ranks 0 and 1, 3 have different config \(this rank: gap\|a\)."),
        ((changed(2),), r"ranks 0 and 1 have different plan \(this rank: abc\)."),
        ((same, changed(3)), "a loss before the boundary was NaN or infinite on rank 2: stopped"),
    ],
)
def test_positions(others: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        consistency.check_position(Rows(*others), 7, "gap|a", "abc", 0, "the boundary")


def test_equal_positions_pass() -> None:
    consistency.check_position(Rows(same, same), 7, "gap|a", "abc", 0, "the boundary")


def masks_of(*kept: list[bool]) -> tuple[Plan, dict[str, Tensor], dict[str, Shard]]:
    names = [f"layers.{i}.weight" for i in range(len(kept))]
    plan = Plan(tuple(Entry(n, (len(k),), 0, sum(k)) for n, k in zip(names, kept, strict=True)), 1, 100, 0)
    bits = {n: bitmask.pack(torch.tensor(k)) for n, k in zip(names, kept, strict=True)}
    shards = {
        n: Shard.of_range(n, (len(k),), 0, len(k), 0, lambda: torch.empty(0)) for n, k in zip(names, kept, strict=True)
    }
    return plan, bits, shards


def test_a_mask_that_differs_names_the_first_entry() -> None:
    mine = masks_of([True, False, True], [True, True, False], [False, True, True])
    theirs = masks_of([True, False, True], [True, False, True], [True, False, True])
    seen: list[Tensor] = []
    # The other copy's numbers, found by looking at what it would send itself.
    consistency.check_masks(*theirs, Rows(), Rows(lambda row: seen.append(row) or row))  # type: ignore[func-returns-value]
    consistency.check_masks(*mine, Rows(), Rows(same, same))

    rows = torch.tensor([consistency._digest(bits, Box.span(0, 3, 3)) for bits in theirs[1].values()])

    def other(row: Tensor) -> Tensor:
        return seen[0] if row.numel() == 1 else rows

    with pytest.raises(ValueError, match=r"layers.1.weight: its masks differ between ranks 0 and 1, so their copies"):
        consistency.check_masks(*mine, Rows(), Rows(other))


def test_copies_on_groups_of_ranks_are_compared() -> None:
    """Hybrid sharding: a world of 4, in which each of 2 groups holds the model once, cut in two pieces."""
    kept = [[True, False, True, True], [True, True, False, False]]

    def check(masks: list[list[list[bool]]]) -> Callable[[Any], None]:
        groups = [Ranks(2), Ranks(2)]

        def work(world: Any) -> None:
            copy, place = divmod(world.rank, 2)
            pieces = [mask[2 * place : 2 * place + 2] for mask in masks[copy]]
            plan, bits, shards = masks_of(*pieces)
            shards = {n: replace(shard, box=Box.span(2 * place, 2, 4)) for n, shard in shards.items()}
            consistency.check_masks(plan, bits, shards, Rank(groups[copy], place), world)

        return work

    assert Ranks(4).run(check([kept, kept])) == [None] * 4
    other = [kept[0], [True, False, True, False]]
    for error in Ranks(4).run(check([kept, other])):
        assert isinstance(error, ValueError)
        assert str(error).startswith("layers.1.weight: its masks differ between ranks 0 and 2, 3, so their copies")


def test_weights_that_drift_apart_under_equal_masks_are_told() -> None:
    """A world of 4, in which each of 2 groups holds the model once, cut in two pieces. An entry on rank 1 differs."""

    def check(change: float) -> Callable[[Any], str | None]:
        groups = [Ranks(2), Ranks(2)]

        def work(world: Any) -> str | None:
            copy, place = divmod(world.rank, 2)
            plan, _, shards = masks_of([True, True], [True, False])
            weights = [torch.tensor([1.0, 2.0 + place]), torch.tensor([3.0, 4.0 + (change if copy and place else 0)])]
            shards = {
                n: replace(shard, box=Box.span(2 * place, 2, 4), owner=partial(torch.clone, weight))
                for (n, shard), weight in zip(shards.items(), weights, strict=True)
            }
            return consistency.drifted_weights(plan, shards, Rank(groups[copy], place), world)

        return work

    assert Ranks(4).run(check(0.0)) == [None] * 4
    for warning in Ranks(4).run(check(1e-6)):
        assert warning.startswith("layers.1.weight: its weights differ between ranks 0 and 2, 3: their copies of the")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.float32, torch.float64])
def test_bits_of_weights_are_summed_in_every_width(dtype: torch.dtype) -> None:
    ones = torch.ones(3).to(dtype)
    assert consistency._sum_of_bits(ones) == consistency._sum_of_bits(ones.clone())
    for other in ([1.0, 1.0, 1.5], [1.0, 1.0, -1.0], [1.0, 1.0, 4.0]):
        assert consistency._sum_of_bits(ones) != consistency._sum_of_bits(torch.tensor(other).to(dtype))


def test_one_group_has_nothing_to_compare() -> None:
    group = Rows(same)
    group.all_gather = group.sum = None  # type: ignore[assignment,method-assign]
    consistency.check_masks(*masks_of([True]), group, group)


# -- losses that are not finite --------------------------------------------------------------------------------------

GAP = {"sparsity": 0.5, "partitions": 2, "phase_steps": 2, "rounds": 1, "finetune_steps": 2}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.pow(2).mean()


def engine(**options: Any) -> GaPEngine:
    model = Model()
    return GaPEngine(model, GAP, optimizer=torch.optim.AdamW(model.parameters(), lr=0.1), **options)


def train(gap: GaPEngine, *factors: float) -> None:
    for factor in factors:
        gap.backward(gap(torch.ones(2, 4)) * factor)
        gap.step()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_stop_ends_the_run_at_the_next_boundary(bad: float) -> None:
    gap = engine()
    train(gap, bad)
    with pytest.raises(ValueError, match="a loss before the boundary at step 2 was NaN or infinite on rank 0"):
        train(gap, 1.0)


def test_a_gradient_scaler_that_is_off_leaves_out_no_steps() -> None:
    gap = engine(grad_scaler=torch.amp.GradScaler("cpu", enabled=False))
    train(gap, float("nan"))
    with pytest.raises(ValueError, match="a loss before the boundary at step 2 was NaN or infinite on rank 0"):
        train(gap, 1.0)


def test_stop_ends_the_run_before_a_checkpoint(tmp_path: Any) -> None:
    gap = engine()
    train(gap, float("nan"))
    with pytest.raises(ValueError, match="a loss before the checkpoint at step 1 was NaN"):
        gap.save_checkpoint(tmp_path)
    assert not list(tmp_path.iterdir())


def test_skip_is_as_if_the_micro_batch_had_never_been() -> None:
    with_bad, without = engine(nonfinite_loss="skip"), engine()
    train(with_bad, 1.0, float("nan"), 1.0, float("inf"), 1.0, 1.0)
    train(without, 1.0, 1.0, 1.0, 1.0)
    assert with_bad.applied_steps == without.applied_steps == 4
    for a, b in zip(with_bad.module.parameters(), without.module.parameters(), strict=True):
        assert torch.equal(a, b)


def test_skip_gives_up_when_nothing_is_finite_any_more() -> None:
    gap = engine(nonfinite_loss="skip")
    with pytest.raises(ValueError, match=f"not finite in {consistency.MOST_SKIPPED + 1} micro-batches in a row"):
        train(gap, *[float("nan")] * 100)
    assert gap.applied_steps == 0


def test_skip_goes_on_as_long_as_good_micro_batches_come_between() -> None:
    """The limit is of micro-batches in a row, not of all."""
    gap = engine(nonfinite_loss="skip")
    for _ in range(3):
        train(gap, *[float("nan")] * (consistency.MOST_SKIPPED - 1), 1.0)
    assert gap.applied_steps == 3


def test_an_unknown_policy() -> None:
    with pytest.raises(ValueError, match=r"nonfinite_loss='ignore': must be "):
        engine(nonfinite_loss="ignore")


def test_the_watch_remembers_until_it_is_asked() -> None:
    watch = LossGuard("stop", Rows())  # type: ignore[arg-type]
    for value in (1.0, float("nan"), 1.0):
        assert watch.accepts(torch.tensor(value), 0)
    assert watch.take() == 1 and watch.take() == 0


def test_loss_scaling_skips_such_steps_itself() -> None:
    watch = LossGuard("stop", Rows(), harmless=True)  # type: ignore[arg-type]
    assert watch.accepts(torch.tensor(float("inf")), 0) and watch.take() == 0
