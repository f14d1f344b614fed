"""Checks that all ranks agree, where a difference would do silent harm: wrong masks, NaN weights.

A boundary is the place for it: ranks meet there anyway, and what is decided there stays. R ranks, E entries.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from gap_ds.masks import bitmask
from gap_ds.masks.box import Box
from gap_ds.method.plan import Plan, clean_name
from gap_ds.sharding.comm import Comm, raise_on_all_ranks, some_of, sum_of
from gap_ds.sharding.shard import Shard

_REDUCE = (
    "Gradients must be reduced over all ranks before every step: wrap the model by DistributedDataParallel, and do not "
    "average weights now and then (local SGD) or keep other experts on every rank under the same names. Else look at "
    "those machines, and go on from the newest checkpoint."
)
#: Micro-batches left out in a row, after which a run has diverged rather than met a bad batch.
MOST_SKIPPED = 50


def check_model(world: Comm, shards: Sequence[Shard]) -> None:
    """All ranks have parameters of the same names and whole shapes.

    Raises:
        ValueError: on all ranks, naming the ranks and this rank's first parameter that others do not have.
    """
    names = [f"{shard.name} {shard.shape}" for shard in shards]
    rows = world.all_gather(torch.tensor([_number("\n".join(names))], dtype=torch.int64, device="cpu")).view(-1)
    if others := (rows != rows[0]).nonzero().view(-1).tolist():
        raise ValueError(
            f"ranks 0 and {some_of(others)} have different models (this rank: {len(names)} parameters, "
            f"{names[0] if names else 'none'} and others). All ranks must train the same model. Where groups of ranks "
            "train separate ones (stages of a pipeline, two models), pass group= with the ranks of this one; experts "
            "of different ranks must be DTensors of one parameter."
        )


def _number(text: str) -> int:
    """A text's digest as a signed 64-bit number."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little", signed=True)


def check_position(world: Comm, step: int, signature: str, fingerprint: str, nonfinite: int, place: str) -> None:
    """All ranks are before the same step of the same run, and none has seen a loss that is not finite.

    Args:
        nonfinite: whether this rank has (`LossGuard.take`); place: what comes now, for the message.
    Raises:
        ValueError: on all ranks, naming the ranks and what they differ in.
    """
    texts = (signature, fingerprint)
    digests = [_number(text) for text in texts]
    rows = world.all_gather(torch.tensor([step, *digests, nonfinite], dtype=torch.int64, device="cpu"))
    for column, (what, own) in enumerate((("applied steps", str(step)), ("config", signature), ("plan", fingerprint))):
        others = (rows[:, column] != rows[0, column]).nonzero().view(-1).tolist()
        if others:
            told = f": {rows[0, 0]} and {rows[others[0], 0]}" if column == 0 else f" (this rank: {own})"
            raise ValueError(
                f"ranks 0 and {some_of(others)} have different {what}{told}. Give every rank the same model, config "
                "and checkpoint."
            )
    if ranks := rows[:, 3].nonzero().view(-1).tolist():
        raise ValueError(
            f"a loss before {place} was NaN or infinite on rank {some_of(ranks)}: stopped, because masks and "
            "checkpoints would come from ruined weights. Lower the learning rate, go on from the newest checkpoint, or "
            'leave such micro-batches out (nonfinite_loss="skip").'
        )


def check_masks(
    plan: Plan,
    bits: Mapping[str, Tensor],
    shards: Mapping[str, Shard],
    comm: Comm,
    world: Comm,
    replicated: bool = False,
) -> None:
    """Every copy of every mask is the same, on all groups of ranks that hold the model once, and within each group.

    Costs one pass over the bits, an all-reduce of E numbers within each group, and an all-gather of one number; where
    pieces are replicated within a group, an all-gather of 2 E numbers in it, too.

    Args:
        comm: the ranks among which the pieces of parameters are spread; world: all ranks.
        replicated: whether some pieces are on several ranks of `comm`.
    Raises:
        ValueError: on all ranks, naming the first entry whose masks differ and the ranks.
    """
    if comm.size == world.size and not replicated:
        return  # one group: there is no second copy to compare with
    names = [entry.name for entry in plan.entries if entry.name in bits]
    own = [_digest(bits[name], shards[name].box) for name in names]
    if replicated:
        _check_replicas(names, [shards[name].box for name in names], own, comm, world)
    if found := _differing(plan, [shards[name] for name in names], own, comm, world):
        first, others = found
        raise _drifted(names[min(first, len(names) - 1)], 0, others)


def drifted_weights(plan: Plan, shards: Mapping[str, Shard], comm: Comm, world: Comm) -> str | None:
    """A warning if the weights of an entry are not the same on all groups of ranks that hold the model once, else None.

    Masks that never change cannot show it, and others only when they differ. It is no error, because processors of
    several kinds in one job may round an optimizer's step in several ways.

    Costs one pass over the weights, and the collectives of `check_masks`. All ranks call it.
    """
    if comm.size == world.size:
        return None
    held = [shards[entry.name] for entry in plan.entries]
    own = iter(bitmask.on_host([_sum_of_bits(shard.weight()) for shard in held if shard.numel]).tolist())
    found = _differing(plan, held, [next(own) if shard.numel else 0 for shard in held], comm, world)
    if found is None:
        return None
    first, others = found
    return (
        f"{plan.entries[first].name}: its weights differ between ranks 0 and {some_of(others)}: their copies of the "
        f"model have drifted apart. {_REDUCE}"
    )


def _sum_of_bits(weights: Tensor) -> Tensor:
    """The sum of the bits of weights (numel,), read as integers, modulo 2^31 - 1; on their device, without waiting.

    That modulus, unlike 2^31, counts signs.

    >>> _sum_of_bits(torch.tensor([0.0, 1.0])), _sum_of_bits(torch.tensor([1.0, 1.0]))
    (tensor(1065353216), tensor(2130706432))
    """
    integers = {1: torch.int8, 2: torch.int16}.get(weights.element_size(), torch.int32)  # 8 bytes: two halves
    return weights.view(integers).sum(dtype=torch.int64) % (2**31 - 1)


def _differing(
    plan: Plan, shards: Sequence[Shard], own: Sequence[int], comm: Comm, world: Comm
) -> tuple[int, list[int]] | None:
    """Index of the first shard whose numbers, summed within each group, are not those of rank 0; and the ranks.

    Args:
        own: 31-bit numbers of this rank's pieces: sums of 2^32 ranks do not overflow.
    """
    whole = torch.tensor(sum_of(shards, own, comm), dtype=torch.int64, device="cpu")
    total = zlib.crc32(whole.numpy().tobytes(), len(shards))
    totals = world.all_gather(torch.tensor([total], dtype=torch.int64, device="cpu")).view(-1)
    if bool((totals == totals[0]).all()):
        return None
    padded = torch.zeros(len(plan.entries), dtype=torch.int64, device="cpu")
    padded[: len(shards)] = whole
    rows = world.all_gather(padded)
    first = int((rows != rows[0]).any(0).nonzero()[0, 0])
    return first, (rows[:, first] != rows[0, first]).nonzero().view(-1).tolist()


def _check_replicas(
    names: Sequence[str], boxes: Sequence[Box], digests: Sequence[int], comm: Comm, world: Comm
) -> None:
    """Ranks of one group that hold the same box of an entry have the same mask of it."""
    places = [zlib.crc32(repr(box).encode()) for box in boxes]
    rows = comm.all_gather(torch.tensor([places, digests], dtype=torch.int64, device="cpu"))

    def compare() -> None:
        for name, at, masks in zip(names, *rows.permute(1, 2, 0).tolist(), strict=True):
            first: dict[int, int] = {}
            for rank, (place, mask) in enumerate(zip(at, masks, strict=True)):
                if mask != masks[first.setdefault(place, rank)]:
                    raise _drifted(name, first[place], [rank])

    raise_on_all_ranks(world, compare)


def _drifted(name: str, first: int, others: list[int]) -> ValueError:
    return ValueError(
        f"{name}: its masks differ between ranks {first} and {some_of(others)}, so their copies "
        f"of the weights have drifted apart. {_REDUCE}"
    )


def changed_flags(plan: Plan, module: nn.Module) -> Iterator[tuple[str, str]]:
    """The parameters that became frozen or trainable since the plan was made: first name of each kind, a warning."""
    trained = {clean_name(name): p.requires_grad for name, p in module.named_parameters()}
    if late := [e.name for e in plan.entries if not trained.get(e.parameter, True) and e.parameter not in plan.held]:
        yield (
            late[0],
            f"{late[0]}{_others(late)}: frozen since the engine was built. Masks hold, and boundaries still prune and "
            "grow these entries, but what grows stays 0. To train a part of the model alone, freeze the rest before "
            "the engine is built.",
        )
    if late := plan.became_trainable({name for name, flag in trained.items() if flag}):
        yield (
            late[0],
            f"{late[0]}{_others(late)}: trained now, and frozen when the engine was built, so it is no entry and stays "
            "dense. Make it trainable before the engine is built (its learning rate may be 0), or list it in "
            '"exclude".',
        )


def _others(names: Sequence[str]) -> str:
    return f" and {len(names) - 1} others" if len(names) > 1 else ""


def revived_message(name: str, found: int, place: str) -> str:
    """The error text for pruned weights that are not 0."""
    return (
        f"{name}: {found} of its pruned weights are not 0 ({place}). Something changed them besides the optimizers "
        "that the engine has: weights loaded after the engine was built (load them first, or use load_checkpoint), "
        "weights that do not belong to these masks, another optimizer, a parameter that was replaced, or a copy that "
        "was written back. Nothing is saved or pruned from them."
    )


def _digest(bits: Tensor, box: Box) -> int:
    """31 bits that depend on a piece's mask and place; 0 where there is none."""
    if not bits.numel():
        return 0
    return zlib.crc32(bits.cpu().numpy().tobytes(), zlib.crc32(repr(box).encode())) >> 1


class LossGuard:
    """Losses that are NaN or infinite: none may reach a mask or a checkpoint unseen.

    policy: `stop` remembers them for the next boundary or checkpoint, without making any step wait for the device;
        `skip` leaves the micro-batch out, on all ranks alike.
    harmless: whether no weight changes in a step with such a loss anyway (loss scaling): then `stop` does nothing.
    """

    def __init__(self, policy: Literal["stop", "skip"], world: Comm, harmless: bool = False) -> None:
        if policy not in ("stop", "skip"):
            raise ValueError(f'nonfinite_loss={policy!r}: must be "stop" or "skip".')
        self._policy, self._world, self._harmless = policy, world, harmless
        #: On the device of the losses: 0, or NaN once one was not finite; and a 0 to multiply losses by.
        self._sum: Tensor | None = None
        self._zero: Tensor | None = None
        self._in_a_row = 0
        #: Whether the micro-batch at hand is left out.
        self.skipping = False

    def accepts(self, loss: Tensor, step: int) -> bool:
        """True if a micro-batch's loss may be propagated; with `skip` all ranks must call this."""
        if self._policy == "stop" and self._harmless:
            return True
        if self._policy == "stop":
            self._add(loss.detach())
            return True
        bad = ~loss.detach().isfinite().all()
        self.skipping = bool(self._world.sum(bad.to(torch.int64).view(1)).item())
        self._in_a_row = self._in_a_row + 1 if self.skipping else 0
        if self._in_a_row > MOST_SKIPPED:
            raise ValueError(
                f"the loss was not finite in {self._in_a_row} micro-batches in a row before step {step}: the training "
                "has diverged. Lower the learning rate, or go on from an earlier checkpoint."
            )
        return not self.skipping

    def _add(self, loss: Tensor) -> None:
        """Notes a loss without allocating anything, and without waiting for the device."""
        if self._sum is None or self._zero is None or self._sum.device != loss.device:
            seen = self.take()
            self._zero = torch.zeros((), device=loss.device)
            self._sum = self._zero + float("nan") if seen else torch.zeros_like(self._zero)
        # 0 times infinity or NaN is NaN, and any sum with it.
        self._sum.addcmul_(loss if loss.dim() == 0 else (loss * self._zero).sum(), self._zero)

    def take(self) -> int:
        """1 if a loss on this rank since the last call was not finite and the policy is to stop, else 0."""
        if self._sum is None:
            return 0
        seen = int(self._sum.isnan())
        self._sum.zero_()
        return seen
