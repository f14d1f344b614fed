"""Trains the toy with a GaPEngine and looks at it from outside after every step: shared by the workers."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import reference
import torch
import torch.distributed as dist
import toy
from torch import Tensor

from gap_ds import GaPEngine, optim
from gap_ds.sharding.comm import Comm

#: The optimizers of `toy.OPTIMIZERS` that hold state for kept weights alone: rows with "packed".
PACKED: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda groups: optim.SGD(groups, lr=0.05, momentum=0.9),
    "adamw": lambda groups: optim.AdamW(groups, lr=1e-2),
}


def gather(pieces: Sequence[tuple[Any, Tensor]]) -> list[Tensor]:
    """The whole tensors, on every rank, from all ranks' (shard, piece of it)."""
    parts: list[Any] = [None] * toy.Job.size()
    own = [(shard.box.indices(), piece.detach().cpu().clone()) for shard, piece in pieces]
    dist.all_gather_object(parts, own, group=toy.Job.group)
    whole = []
    for i, (shard, piece) in enumerate(pieces):
        tensor = torch.zeros(shard.full_numel, dtype=piece.dtype)
        for rank in parts:
            indices, part = rank[i]
            tensor[indices] = part.to(tensor.dtype)
        whole.append(tensor.view(shard.shape))
    return whole


def full_masks(engine: GaPEngine) -> dict[str, Tensor]:
    """The whole mask of each sparse entry."""
    own = {e.name: engine.mask(e.name) for e in engine.plan.entries}
    pieces = {name: piece.to(torch.uint8) for name, piece in own.items() if piece is not None}
    whole = gather([(engine.mask_state.shards[name], piece) for name, piece in pieces.items()])
    return {name: mask.bool() for name, mask in zip(pieces, whole, strict=True)}


class Traffic:
    """Records what the selection sends between ranks at a boundary."""

    def __init__(self) -> None:
        self.sums: list[tuple[int, ...]] = []
        self.other: list[str] = []
        self._sum, self._all_gather, self._assemble = Comm.sum, Comm.all_gather, Comm.assemble
        self._everywhere = Comm.assemble_everywhere

    def __enter__(self) -> Traffic:
        def summed(comm: Comm, counts: Tensor) -> Tensor:
            assert counts.dtype == torch.int64
            self.sums.append(tuple(counts.shape))
            return self._sum(comm, counts)

        def gathered(comm: Comm, row: Tensor) -> Tensor:
            self.other.append(f"all_gather {row.numel()}")
            return self._all_gather(comm, row)

        def assembled(comm: Comm, *arguments: Any) -> Tensor | None:
            self.other.append("assemble")
            return self._assemble(comm, *arguments)

        def assembled_everywhere(comm: Comm, piece: Tensor, shard: Any) -> Tensor:
            self.other.append(f"assemble_everywhere {shard.full_numel}")
            return self._everywhere(comm, piece, shard)

        Comm.sum, Comm.all_gather, Comm.assemble = summed, gathered, assembled  # type: ignore[method-assign]
        Comm.assemble_everywhere = assembled_everywhere  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        Comm.sum, Comm.all_gather, Comm.assemble = self._sum, self._all_gather, self._assemble  # type: ignore[method-assign]
        Comm.assemble_everywhere = self._everywhere  # type: ignore[method-assign]


def train(
    engine: GaPEngine,
    working_copy: Callable[[str], Tensor],
    *,
    skip: bool = True,
    first: int = 0,
    last: int = toy.STEPS,
    full_fp32: Callable[[str], Tensor] | None = None,
    at: dict[int, Callable[[], None]] | None = None,
    select: Callable[[Tensor, int], Tensor] = reference.largest,
) -> dict[str, Any]:
    """Trains steps [first, last) and returns what was seen; `wrong` lists every violated invariant.

    Args:
        working_copy: the parameter that the forward pass uses, whole, through the library's own means.
        skip: whether one parameter gets no gradient in every other step.
        full_fp32: the fp32 parameter, whole, through the library's own means, where it has any.
        at: what to do after a step, by its number.
        select: the mask that is wanted, for an entry's magnitudes and budget.
    """
    shards = engine.mask_state.shards
    before: dict[str, Tensor] = {}

    def remember(*_: object) -> None:
        # Runs after the engine's own hook: the weights of the last step before a boundary, masked but not yet pruned.
        before.update({name: shard.weight().clone() for name, shard in shards.items()})

    handle = engine.optimizer.register_step_post_hook(remember)
    wrong: list[str] = []
    history, losses, traffic = [full_masks(engine)], [], []
    for step in range(first, last):
        phase = engine.phase
        for micro in range(toy.ACCUMULATION):
            tokens, use_all = toy.batch(step, micro, toy.Job.rank(), skip)
            loss = engine(tokens, use_all)
            losses.append(loss.item())
            engine.backward(loss)
            with Traffic() as seen:
                engine.step()
        if engine.applied_steps != step + 1:
            wrong.append(f"step {step}: {engine.applied_steps} applied steps")
        for name in engine.mask_state.bits:
            if shards[name].weight()[~engine.mask(name)].count_nonzero():
                wrong.append(f"step {step}: {name} has pruned weights that are not 0")
        if engine.phase is not phase:
            masks = full_masks(engine)
            history.append(masks)
            traffic.append((seen.sums, seen.other))
            left = [entry for entry in engine.plan.entries if entry.partition in phase.dense]
            weights = gather([(shards[entry.name], before[entry.name]) for entry in left])
            for entry, weight in zip(left, weights, strict=True):
                if not torch.equal(masks[entry.name], select(weight.abs(), entry.keep)):
                    wrong.append(f"step {step}: mask of {entry.name} is not that of a stable sort of whole tensors")
        if engine.phase is not phase or step == phase.first_step:
            wrong += [f"step {step}: {mistake}" for mistake in mistakes(engine, history[-1], working_copy, full_fp32)]
        if at and step in at:
            at[step]()
    handle.remove()
    return {"wrong": wrong, "masks": history, "losses": losses, "traffic": traffic}


def mistakes(
    engine: GaPEngine,
    masks: dict[str, Tensor],
    working_copy: Callable[[str], Tensor],
    full_fp32: Callable[[str], Tensor] | None,
) -> list[str]:
    """What is wrong with the masks, and with the weights as the library itself shows them whole."""
    wrong = []
    for entry in engine.plan.entries:
        if (entry.name in masks) == (entry.partition in engine.phase.dense):
            wrong.append(f"{entry.name} is masked or not against the schedule")
        if (mask := masks.get(entry.name)) is None:
            continue
        if int(mask.sum()) != entry.keep:
            wrong.append(f"{entry.name} keeps {int(mask.sum())} of {entry.keep}")
        for what, weight in (("fp32", full_fp32), ("working copy", working_copy)):
            if weight is not None and weight(entry.name)[~mask].count_nonzero():
                wrong.append(f"{what} of {entry.name} has pruned weights that are not 0")
    return wrong


def final_state(engine: GaPEngine) -> dict[str, dict[str, Any]]:
    """Whole fp32 weights and moments of every trained parameter."""
    shards = [shard for shard in engine.run.backend.shards() if shard.trainable]
    optimizers = engine.run.backend.optimizers
    own = [[moment for _, moment, _ in optimizers.moments(shard)] for shard in shards]
    counts: list[Any] = [None] * toy.Job.size()
    dist.all_gather_object(counts, [len(moments) for moments in own], group=toy.Job.group)
    moments = {}
    for i, shard in enumerate(shards):  # a rank that owns nothing of a parameter has no moments of it either
        padded = own[i] + [torch.empty(0)] * (max(rank[i] for rank in counts) - len(own[i]))
        moments[shard.name] = gather([(shard, moment) for moment in padded])
    weights = gather([(shard, shard.weight()) for shard in shards])
    return {"weights": {s.name: w for s, w in zip(shards, weights, strict=True)}, "moments": moments}


def draw_by_rank() -> None:
    """Before a checkpoint: every rank's random numbers are its own from now on."""
    torch.manual_seed(100 + dist.get_rank())


def drawn_by_rank() -> list[str]:
    """After it was loaded: what is wrong with the next random number."""
    wanted = torch.rand(1, generator=torch.Generator().manual_seed(100 + dist.get_rank()))
    return [] if torch.equal(torch.rand(1), wanted) else ["the random state is not that of this rank"]


def mask_bits(engine: GaPEngine) -> tuple[int, int, int]:
    """(bits that the masks take, weights they cover, number of masks) on this rank."""
    bits = sum(mask.numel() * 8 for mask in engine.mask_state.bits.values())
    return (
        bits,
        sum(engine.mask_state.shards[name].numel for name in engine.mask_state.bits),
        len(engine.mask_state.bits),
    )


def hand_over(out: Path, name: str, result: dict[str, Any]) -> None:
    """Leaves a row's result for the parent."""
    torch.save(result, out / f"{name}.{dist.get_rank()}.pt")


def work_through(out: Path, works: Mapping[str, Callable[[], dict[str, Any]]]) -> None:
    """All rows, one after the other; each result is handed over at once.

    The first error on any rank ends this process, so that the parent ends the others, which may be waiting.
    """
    for name, work in works.items():
        try:
            result = work()
        except Exception:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        hand_over(out, name, result)
    dist.barrier()
