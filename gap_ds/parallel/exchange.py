"""One worker's side of the exchange: it publishes its file of a round, waits for the others, and reads all files.

All ranks of the job call the public methods of `Exchange`. A round's collectives are in this file and those it calls
in `gap_ds.sharding`.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Literal, TypeVar

import torch
from torch import Tensor

from gap_ds.masks import bitmask
from gap_ds.masks.box import Box
from gap_ds.parallel import identity
from gap_ds.parallel.items import FORMAT, VERSION, Item, Received, check_items, check_kept, layout, selected
from gap_ds.parallel.reading import Reader
from gap_ds.parallel.records import Manifest, Records
from gap_ds.parallel.transport import Folder, Writing, open_folder
from gap_ds.parallel.worker import ParallelWorker, file_stem
from gap_ds.sharding.comm import Comm, Place, boxes_of, raise_on_all_ranks
from gap_ds.sharding.rank_zero import on_rank_zero
from gap_ds.storage import safetensors
from gap_ds.storage.errors import summarize_error

log = logging.getLogger("gap_ds")
T = TypeVar("T")

#: Bytes written at a time.
_CHUNK = 1 << 24


class Exchange:
    """One worker's side of the exchange. All ranks of the job must make the same calls.

    Errors are raised on all ranks alike, so that no rank waits for one that has left.

    Args:
        worker: the worker that this job is.
        workers: K, the number of workers, which is the plan's number of partitions.
        signature: of the run; its last part, `|v:...`, may differ between workers.
        fingerprint: of the plan.
        tensors: fingerprint of what is exchanged (`identity.of_tensors`).
        world: all ranks of the job.
        comm: the ranks among which the pieces of a parameter are spread.
        unpartitioned: rule for the tensors in no partition: "average" over the workers, or "first", those of worker 0.
    Raises:
        ValueError: the worker's values are impossible, or the folder cannot be used or belongs to another run.
    """

    def __init__(
        self,
        worker: ParallelWorker,
        workers: int,
        signature: str,
        fingerprint: str,
        tensors: str,
        world: Comm,
        comm: Comm,
        unpartitioned: Literal["average", "first"] = "average",
    ) -> None:
        worker.check(workers)
        # The rank that assembles parameters must be the one that writes.
        assert (world.rank == 0) == (comm.writes and comm.rank == 0)
        self.worker, self.workers, self.unpartitioned = worker, workers, unpartitioned
        self._world, self._comm, self._plan = world, comm, fingerprint
        #: Bytes of this worker's file that were written, and of all files that all ranks of this job have read, in the
        #: last round; manifests are not counted.
        self.bytes_written = 0
        self.bytes_read = 0
        self._folder = open_folder(worker.exchange)
        run = identity.RunRecord(
            format=FORMAT,
            version=VERSION,
            signature=identity.unversioned(signature),
            plan=fingerprint,
            tensors=tensors,
            workers=workers,
            run=worker.run,
        )
        self._records = Records(worker, self._folder, run)
        _on_rank_zero(world, self._records.enter)

    def begin(self, weights: str) -> None:
        """Check, in a job that begins at step 0, that it belongs to the run of the folder. Call it before any round.

        All workers of a run begin with the same weights, and so does a worker that is started again. Jobs that continue
        from a checkpoint call `rejoin` instead.

        Args:
            weights: fingerprint of the first weights, before any mask (`identity.of_weights`).
        Raises:
            ValueError: the run began with other weights, or this worker has published already and may not resume.
        """
        _on_rank_zero(self._world, partial(self._records.begin, weights))

    def rejoin(self) -> None:
        """Accept rounds that this worker has published before: this job continues from a checkpoint of the run."""
        self._records.rejoins = True

    def combine(
        self, round: int, items: Sequence[Item], bits: Mapping[str, Tensor], receive: Callable[[Received], None]
    ) -> None:
        """Publish this worker's partition, wait for the others, and read what all partitions became.

        A partition is taken from its worker's file; this worker's too, so that a job that was killed after it had
        published goes on with what the others have read. The result is the same on all workers bit for bit.

        Args:
            items: everything that is exchanged (`items_of`).
            bits: mask of this rank's piece of each entry of the worker's own partition, on the device of the weights.
            receive: called with this rank's piece of each item, once all files of the round are verified.
        Raises:
            ValueError: a mask does not keep the entry's budget, a file cannot be written or read, or is damaged; this
                worker has published the round in another run.
            TimeoutError: another worker has not published in time.
        """
        started = time.perf_counter()
        self.publish(round, items, bits)
        manifests = self.wait(round)
        self.read(round, items, manifests, receive)
        if self._world.rank == 0:
            index, sizes = self.worker.index, [manifest.bytes for manifest in manifests]
            log.info(
                f"round {round}: worker {index} wrote {self.bytes_written} bytes and read {self.bytes_read} bytes, "
                f"checks included; in the compact form its file has {sizes[index]} bytes, and the files of all "
                f"{self.workers} workers have {sum(sizes)}; {time.perf_counter() - started:.3f} s"
            )

    # -- publish ---------------------------------------------------------------------------------------------------

    def publish(self, round: int, items: Sequence[Item], bits: Mapping[str, Tensor]) -> None:
        """Write this worker's file of a round, tensor by tensor, and then its manifest. Sets `bytes_written`.

        If this job continues a run and the worker has published the round before, nothing is written: the others may
        have read that file.
        """
        check_items(items, self.workers)
        self.bytes_written = 0
        if _on_rank_zero(self._world, partial(self._records.published_before, round)):
            return
        own = selected(items, self.worker.index, self.unpartitioned)
        spreads = spread_over_ranks(own, bits, self._comm)
        kept = {item.name: sum(spreads[item.name].kept) for item in own if item.keep is not None}
        self._together(partial(check_kept, own, kept))
        tensors = layout(own, kept)
        first = safetensors.header_bytes(safetensors.header_table(tensors, self._metadata(round, self.worker.index)))
        owners = {name: item for item in own for name in item.parts}
        file = _File(self._folder, f"{file_stem(round, self.worker.index)}.safetensors")
        try:
            _on_rank_zero(self._world, partial(file.write, first))
            for name in tensors:
                item = owners[name]
                # A rank without memory for its piece must report that before the others wait for it.
                piece = self._together(partial(self._piece, item, item.parts[name], bits))
                whole = self._assemble(item, item.parts[name], piece, spreads[item.name], bits)
                _on_rank_zero(self._world, partial(file.write_tensor, item.parts[name], whole))
                del piece, whole  # before the next one comes
            self.bytes_written = _on_rank_zero(self._world, partial(self._complete, round, file))
        except BaseException:
            file.discard()
            raise

    def _complete(self, round: int, file: _File) -> int:
        """Complete the file, and write its manifest last: from then on the file counts. Returns its size."""
        file.close()
        self._records.publish(round, file.size, file.digest.hexdigest())
        return file.size

    def _piece(self, item: Item, part: str, bits: Mapping[str, Tensor]) -> Tensor:
        """Return this rank's piece of a tensor of the file; a mask as one flag per weight.

        It is empty in a group of ranks that does not write.
        """
        if not self._comm.writes:
            return torch.empty(0, device="cpu")
        if part == "whole":
            return item.shard.weight().to(item.dtype)
        kept = bitmask.unpack(bits[item.name], item.box.numel)
        if part == "mask":
            return kept.to(torch.uint8)
        piece = item.shard.weight()
        return piece.float()[kept.to(piece.device)]

    def _assemble(
        self, item: Item, part: str, piece: Tensor, spread: Spread, bits: Mapping[str, Tensor]
    ) -> Tensor | None:
        """Return the whole tensor on rank 0, None on the other ranks; a mask as one flag per weight.

        Where several groups of ranks hold the same pieces, the group of rank 0 assembles for all.
        """
        if not self._comm.writes:
            return None
        if part != "values":
            return self._comm.assemble(piece, spread.boxes, item.shard.full_numel)
        places: Sequence[Place] = spread.of_values()
        if not spread.in_order:
            # Kept values of boxes that are no ranges lie between each other's: only the whole mask tells where.
            flags = self._comm.assemble(self._piece(item, "mask", bits), spread.boxes, item.shard.full_numel)
            if flags is not None:
                places = [_Among(box, flags) for box in spread.boxes]
        return self._comm.assemble(piece, places, sum(spread.kept))

    # -- wait ------------------------------------------------------------------------------------------------------

    def wait(self, round: int) -> list[Manifest]:
        """Wait until all K workers have published, and return their manifests.

        Raises:
            TimeoutError: a worker has not published within the worker's timeout.
            ValueError: a manifest is damaged, or belongs to another run.
        """
        return _on_rank_zero(self._world, partial(self._records.wait, round, self.workers))

    # -- read ------------------------------------------------------------------------------------------------------

    def read(
        self, round: int, items: Sequence[Item], manifests: Sequence[Manifest], receive: Callable[[Received], None]
    ) -> None:
        """Call `receive` with this rank's piece of every item: partition k from worker k's file, shared ones from all.

        Rank 0 first compares all files with their manifests. The pieces are then read one at a time. Sets `bytes_read`.

        Raises:
            ValueError: a file is damaged or does not fit the plan (before anything is received), or cannot be read.
        """
        check_items(items, self.workers)
        reader = Reader(self._folder, self._records)
        sources = []
        for worker, manifest in enumerate(manifests):
            own, path = selected(items, worker, self.unpartitioned), f"{file_stem(round, worker)}.safetensors"
            verify = partial(reader.verify, path, own, self._metadata(round, worker), manifest)
            sources.append(_on_rank_zero(self._world, verify))
        for worker, source in enumerate(sources):
            entries = [item for item in items if item.partition == worker and item.keep is not None]
            bits = self._together(partial(reader.masks, source, entries))
            spreads = spread_over_ranks(entries, bits, self._comm)
            self._together(partial(reader.check_masks, source, {name: sum(s.kept) for name, s in spreads.items()}))
            for item in entries:
                spread = spreads[item.name]
                before = spread.before[self._comm.rank] if spread.in_order and item.shard.counted else None
                value = self._together(partial(reader.weights, source, item, bits[item.name], before))
                receive(Received(item.name, value, bits.pop(item.name)))
        for item in items:
            if item.partition is None:
                load = partial(reader.unpartitioned, sources, item, self.unpartitioned)
            elif item.keep is None:
                load = partial(reader.whole, sources[item.partition], item)
            else:
                continue
            receive(Received(item.name, self._together(load), None))
        self.bytes_read = int(self._world.sum(torch.tensor([reader.bytes], dtype=torch.int64, device="cpu")))

    # -- both ------------------------------------------------------------------------------------------------------

    def _metadata(self, round: int, worker: int) -> dict[str, str]:
        """Return what the header of a worker's file must contain beside its tensors."""
        known = {"format": FORMAT, "version": VERSION, "plan": self._plan, "round": round, "worker": worker}
        return {key: str(value) for key, value in known.items()}

    def _together(self, work: Callable[[], T]) -> T:
        return raise_on_all_ranks(self._world, work)


@dataclass(frozen=True)
class Spread:
    """One parameter, spread over R ranks: each piece, its kept weights, and those before it in the flattened one.

    boxes: of uncounted pieces, empty. in_order: whether all boxes are ranges, so that `before` means something.
    """

    boxes: list[Box]
    kept: list[int]
    before: list[int]

    @property
    def in_order(self) -> bool:
        """True if all pieces are ranges: then the kept values of each one follow those of another."""
        return all(box.is_range for box in self.boxes)

    def of_values(self) -> list[Box]:
        """Where the kept values of each piece lie among all, if they are in order."""
        total = sum(self.kept)
        return [Box.span(before, n, total) for before, n in zip(self.before, self.kept, strict=True)]


@dataclass(frozen=True)
class _Among:
    """Where the kept values of a box lie among those of the whole tensor, whose mask is `flags`, one per weight."""

    box: Box
    flags: Tensor

    @property
    def numel(self) -> int:
        return int(self.box.cut(self.flags).sum(dtype=torch.int64))

    def places(self, lo: int, hi: int) -> Tensor:
        """The places of kept values lo to hi of the box."""
        kept = self.box.indices()[self.box.cut(self.flags).bool()]
        return bitmask.count_before(bitmask.pack(self.flags.bool()), kept[lo:hi])


def spread_over_ranks(items: Sequence[Item], bits: Mapping[str, Tensor], comm: Comm) -> dict[str, Spread]:
    """Return by name how items, and their kept weights, are spread over the ranks. All ranks must call this.

    Args:
        bits: mask of this rank's piece of each entry.
    """
    own = [bitmask.count(bits[i.name]) if i.keep is not None and i.shard.counted else 0 for i in items]
    boxes = boxes_of([item.shard for item in items], comm)
    kept = comm.all_gather(torch.tensor(own, dtype=torch.int64, device="cpu")).T.tolist()
    spreads = {}
    for item, places, counts in zip(items, boxes, kept, strict=True):
        # Of two pieces that begin at the same weight, one is empty and comes first.
        order = sorted(range(comm.size), key=lambda rank: (places[rank].start, places[rank].numel))
        sums = accumulate((counts[rank] for rank in order), initial=0)
        before = dict(zip(order, sums, strict=False))
        spreads[item.name] = Spread(places, counts, [before[rank] for rank in range(comm.size)])
    return spreads


def _on_rank_zero(world: Comm, work: Callable[[], T]) -> T:
    """`on_rank_zero`, with errors of the folder as a ValueError that says so."""

    def named() -> T:
        try:
            return work()
        except TimeoutError:
            raise
        except OSError as error:
            raise ValueError(f"the exchange folder cannot be used ({summarize_error(error)})") from error

    return on_rank_zero(world, named)


class _File:
    """The file that rank 0 writes, and its size and SHA-256 so far. Ranks that never write do not open it."""

    def __init__(self, folder: Folder, name: str) -> None:
        self._folder, self._name = folder, name
        self._target: Writing | None = None
        self.digest, self.size = hashlib.sha256(), 0

    def write(self, data: bytes | memoryview) -> None:
        if self._target is None:
            self._target = self._folder.stream(self._name)
        for lo in range(0, len(data), _CHUNK):
            chunk = bytes(data[lo : lo + _CHUNK])
            self.digest.update(chunk)
            self._target.write(chunk)
        self.size += len(data)

    def write_tensor(self, part: str, whole: Tensor | None) -> None:
        """Write a tensor; a mask comes as one flag per weight."""
        assert whole is not None
        self.write(safetensors.encode(bitmask.pack(whole.bool()) if part == "mask" else whole).data)

    def close(self) -> None:
        assert self._target is not None
        self._target.close()

    def discard(self) -> None:
        """Delete what was written, if it is not complete."""
        if self._target is not None:
            self._target.discard()
