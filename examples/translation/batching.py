"""Cut encoded rows into optimizer steps that are the same for any number of ranks, and pad them.

Shape legend: B rows of a micro-batch, S and T tokens of its longest source and target.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import datasets
import numpy as np
import torch

IGNORED = -100  # label of a padded position, as in torch and transformers


@dataclass(frozen=True)
class Step:
    """Work of one rank in one optimizer step."""

    epoch: int
    index: int  # of the step in its epoch
    micro_batches: list[list[int]]  # row numbers; one list per accumulation step, none empty
    target_tokens: int  # of the whole step, over all ranks and micro-batches: the divisor of the loss


class TokenBatches:
    """Cuts the rows of each epoch into optimizer steps of about `batch_tokens` tokens.

    Guarantees, for any arguments:
    - Every row is in exactly one micro-batch of one rank per epoch. No micro-batch is empty.
    - All ranks have the same steps. Every epoch has the same number of steps.
    - An epoch is a function of (lengths, batch_tokens, seed, epoch). It does not depend on world_size and accumulation
      as long as batch_tokens >= 2 * world_size * accumulation * longest row.
    - No step exceeds batch_tokens, unless world_size * accumulation rows (one per micro-batch) already do.

    Rows are sorted by length, ties in a random order, and cut from the longest row down. The sorted lengths are the
    same in every epoch, and so are the cuts. Then the steps are shuffled. The rows of a step are dealt to the
    micro-batches in turn, so all of them have about the same work.

    Args:
        lengths, target_lengths: tokens of each row, on the longer side and on the target side.
        batch_tokens: of one optimizer step over all ranks and micro-batches, as rows x longest row (with padding).
    """

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray,
        target_lengths: Sequence[int] | np.ndarray,
        batch_tokens: int,
        *,
        world_size: int = 1,
        rank: int = 0,
        accumulation: int = 1,
        seed: int = 0,
    ) -> None:
        self._lengths = np.asarray(lengths, dtype=np.int32)
        self._target_lengths = np.asarray(target_lengths, dtype=np.int32)
        assert self._lengths.shape == self._target_lengths.shape and self._lengths.ndim == 1
        assert 0 <= rank < world_size
        if accumulation < 1:
            raise ValueError(f"accumulation of {accumulation} micro-batches: must be at least 1.")
        if batch_tokens < 1:
            raise ValueError(f"batches of {batch_tokens} tokens: must be at least 1. Set --batch-tokens.")
        self._parts = world_size * accumulation
        if len(self._lengths) < self._parts:
            raise ValueError(
                f"{len(self._lengths)} rows for {world_size} ranks x {accumulation} accumulation steps: at least "
                f"{self._parts} are needed. Set --dataset, or use fewer ranks or accumulation steps."
            )
        self._world_size, self._rank, self._seed = world_size, rank, seed
        self._bounds = _cut(np.sort(self._lengths)[::-1], batch_tokens, self._parts)

    @classmethod
    def of(cls, encoded: datasets.Dataset, batch_tokens: int, **options: int) -> TokenBatches:
        """Return the sampler of a data set made by `encode`. Options as in the constructor."""
        return cls(_numbers(encoded, "length"), _numbers(encoded, "target_length"), batch_tokens, **options)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of every epoch."""
        return len(self._bounds) - 1

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Step]:
        """Yield this rank's steps of an epoch, from `start_step` on (to resume inside an epoch)."""
        if not 0 <= start_step <= self.steps_per_epoch:
            raise ValueError(f"step {start_step} of an epoch: must lie in [0, {self.steps_per_epoch}].")
        random = np.random.default_rng((self._seed, epoch))
        shuffled = random.permutation(len(self._lengths))
        order = shuffled[np.argsort(-self._lengths[shuffled], kind="stable")]
        steps = random.permutation(self.steps_per_epoch)
        for index in range(start_step, len(steps)):
            rows = order[self._bounds[steps[index]] : self._bounds[steps[index] + 1]]
            # micro-batch m of the step is number m // world_size of rank m % world_size
            micro_batches = [rows[m :: self._parts].tolist() for m in range(self._rank, self._parts, self._world_size)]
            yield Step(epoch, index, micro_batches, int(self._target_lengths[rows].sum()))


def _cut(lengths: np.ndarray, batch_tokens: int, parts: int) -> np.ndarray:
    """Return the bounds of the steps in rows sorted from long to short: step i is rows bounds[i] to bounds[i + 1].

    The first row of a step is the longest and determines how many rows fit. A remainder at the end shares its rows
    half and half with the step before, unless it has at least half as many rows.

    >>> _cut(np.array([5, 5, 4, 3, 2, 1, 1]), 10, 1).tolist()  # 5 5 | 4 3 | 2 1 1
    [0, 2, 4, 7]
    >>> _cut(np.array([3] * 13), 12, 1).tolist()  # 4 | 4 | 3 | 2 and not 4 | 4 | 4 | 1
    [0, 4, 8, 11, 13]
    """
    bounds = [0]
    while bounds[-1] < len(lengths):
        fit = batch_tokens // max(1, int(lengths[bounds[-1]]))
        bounds.append(min(bounds[-1] + max(fit, parts), len(lengths)))
    if len(bounds) > 2:
        before, last, end = bounds[-3:]
        if 2 * (end - last) < last - before:
            bounds[-2] = before + (end - before + 1) // 2
        if end - bounds[-2] < parts:  # batch_tokens holds less than two rows per micro-batch
            del bounds[-2]
    return np.array(bounds, dtype=np.int64)


def _numbers(encoded: datasets.Dataset, column: str) -> np.ndarray:
    """Return an integer column as an array, one number a row."""
    return np.asarray(encoded.select_columns([column]).with_format("numpy")[:][column])


def collate(rows: Sequence[Mapping[str, Sequence[int]]], pad_id: int, multiple_of: int = 1) -> dict[str, torch.Tensor]:
    """Pad rows to one length: `input_ids` and `attention_mask` (B, S), `labels` (B, T) with -100 where padded.

    S and T are rounded up to a multiple of `multiple_of`.

    >>> batch = collate([{"input_ids": [7, 2], "labels": [8, 9, 2]}, {"input_ids": [2], "labels": [2]}], pad_id=1)
    >>> batch["input_ids"].tolist(), batch["attention_mask"].tolist(), batch["labels"].tolist()
    ([[7, 2], [2, 1]], [[1, 1], [1, 0]], [[8, 9, 2], [2, -100, -100]])
    """

    def pad(sequences: Sequence[Sequence[int]], fill: int) -> torch.Tensor:
        width = -(-max(len(ids) for ids in sequences) // multiple_of) * multiple_of
        padded = np.full((len(sequences), width), fill, dtype=np.int64)
        for line, ids in zip(padded, sequences, strict=True):
            line[: len(ids)] = ids
        return torch.from_numpy(padded)

    sources = [row["input_ids"] for row in rows]
    return {
        "input_ids": pad(sources, pad_id),
        "attention_mask": pad([[1] * len(ids) for ids in sources], 0),
        "labels": pad([row["labels"] for row in rows], IGNORED),
    }


def batches(
    encoded: datasets.Dataset,
    sampler: TokenBatches,
    epoch: int,
    start_step: int,
    pad_id: int,
    *,
    multiple_of: int = 1,
    prefetch: int = 8,
) -> Iterator[tuple[Step, list[dict[str, torch.Tensor]]]]:
    """Yield this rank's steps of an epoch from `start_step` on, each with its collated micro-batches.

    A thread reads `prefetch` steps ahead. It ends with the epoch, with an error (raised here), or when the iterator is
    closed or dropped.
    """
    columns = encoded.select_columns(["input_ids", "labels"])

    def load(step: Step) -> tuple[Step, list[dict[str, torch.Tensor]]]:
        # One read for the whole step: reading rows one by one costs more than everything else here.
        found = columns[[row for rows in step.micro_batches for row in rows]]
        rows = [{"input_ids": s, "labels": t} for s, t in zip(found["input_ids"], found["labels"], strict=True)]
        bounds = np.cumsum([0, *(len(micro) for micro in step.micro_batches)])
        return step, [collate(rows[a:b], pad_id, multiple_of) for a, b in pairwise(bounds)]

    yield from _ahead((load(step) for step in sampler.epoch(epoch, start_step)), prefetch)


def _ahead(items: Iterator[Any], prefetch: int) -> Iterator[Any]:
    """Yield the items, which a thread makes up to `prefetch` items ahead."""
    ready: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(maxsize=prefetch)
    stop, finished = threading.Event(), StopIteration()

    def put(item: Any, error: BaseException | None) -> None:
        while not stop.is_set():
            try:
                return ready.put((item, error), timeout=0.1)
            except queue.Full:  # the reader may have stopped: check `stop` again
                continue

    def produce() -> None:
        try:
            for item in items:
                put(item, None)
                if stop.is_set():
                    return
            put(None, finished)
        except BaseException as error:  # raised in the reader
            put(None, error)

    thread = threading.Thread(target=produce, name="batches", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if error is finished:
                return
            if error is not None:
                raise error
            yield item
    finally:
        stop.set()
        thread.join()
