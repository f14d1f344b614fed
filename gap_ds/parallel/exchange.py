"""One worker's side of the exchange: it publishes its file of a round, waits for the others', and reads all of them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any, Literal, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor

from gap_ds.masks import bitmask
from gap_ds.masks.codec import spread
from gap_ds.parallel import identity
from gap_ds.parallel import items as file
from gap_ds.parallel.items import FORMAT, VERSION, Item, Received, Slot
from gap_ds.parallel.ranks import on_rank_zero
from gap_ds.parallel.transport import Writing, open_folder, without_secrets
from gap_ds.sharding.comm import Comm, by_rank, raise_on_all_ranks
from gap_ds.storage import safetensors as tensorfile
from gap_ds.storage.errors import error_text, printable, summarize_error

log = logging.getLogger("gap_ds")
T = TypeVar("T")
Bytes: TypeAlias = np.ndarray[Any, np.dtype[np.uint8]]

#: The largest JSON file that is read, and what a header may have beyond the one that is expected.
MAX_JSON, _SLACK = 1 << 20, 1 << 16
#: Bytes read or written at a time.
_CHUNK = 1 << 24
#: Seconds: between two looks for the others' files (first, and at most); between two lines of progress; that a damaged
#: JSON file gets to become whole; before a file is read again.
_POLL, _POLL_MOST, _PROGRESS, _SETTLE, _AGAIN = 0.05, 5.0, 30.0, 10.0, 1.0
#: What to do about a file of another run.
_OWN = "Give this run an exchange folder of its own."


@dataclass(frozen=True)
class ParallelWorker:
    """Which worker of parallel GaP this job is.

    index: 0 .. workers - 1; the partition that is dense here.
    exchange: the folder or fsspec URL where the workers meet; every run needs one of its own.
    timeout: seconds to wait for the others at the end of a round.
    run: what else must be equal among the workers of one run, beside the config, the plan and the weights at the start:
        for example the learning rate and the data, as "lr:0.1|data:x". A worker with another one is refused.
    resume: this job may be one of the run that was killed before its first checkpoint, and is started again. Otherwise
        a job that begins at step 0 where this worker has published already is refused: the folder is another run's.
    """

    index: int
    exchange: str
    timeout: float = 3600.0
    run: str = ""
    resume: bool = False

    @property
    def shown(self) -> str:
        """`exchange` for messages, without what is secret in a URL."""
        return without_secrets(self.exchange)

    def has_published(self) -> bool:
        """Whether this worker has published the first round in its folder, be it in this run or in another one."""
        try:
            return open_folder(self.exchange).size(f"{_name(0, self.index)}.json") >= 0
        except OSError:  # what may be wrong with the folder is told when it is used
            return False


@dataclass(frozen=True)
class Manifest:
    """What is said of a complete file: its size in bytes, its SHA-256 in hexadecimal digits, when it was published."""

    bytes: int
    sha256: str
    published: str


@dataclass(frozen=True)
class _Spread:
    """Of one parameter, for each of the R ranks: its piece, the kept weights in it, and those before it."""

    starts: list[int]
    numels: list[int]
    kept: list[int]
    before: list[int]


@dataclass(frozen=True)
class _Verified:
    """A file that is whole: its path, and of each tensor the bytes (begin, end) in it."""

    path: str
    where: dict[str, tuple[int, int]]


class Exchange:
    """One worker's side of the exchange. All ranks of the job must make the same calls.

    Errors are raised on all ranks alike, so that none waits for one that has left.

    Args:
        worker: which one this job is.
        workers: K, the number of workers, which is the plan's number of partitions.
        signature: of the run; its last part, `|v:...`, may differ between workers.
        fingerprint: of the plan.
        tensors: fingerprint of what is exchanged (`identity.of_tensors`).
        world: all ranks of the job.
        comm: the ranks among which the pieces of a parameter are spread.
        shared: what becomes of the tensors in no partition: their mean over the workers, or worker 0's.
    Raises:
        ValueError: the worker's numbers are impossible, or the folder cannot be used or belongs to another run.
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
        shared: Literal["average", "first"] = "average",
    ) -> None:
        _check_worker(worker, workers)
        self.worker, self.workers, self.shared = worker, workers, shared
        # Whoever puts parameters together is the one that writes.
        assert (world.rank == 0) == (comm.writes and comm.rank == 0)
        self._world, self._comm = world, comm
        self._plan = fingerprint
        #: What all JSON files of a run begin with.
        self._identity = {
            **{"signature": identity.unversioned(signature), "plan": fingerprint, "tensors": tensors},
            **{"workers": workers, "run": worker.run},
        }
        #: Whether this job may find a round that this worker has published before, because it goes on.
        self.rejoins = worker.resume
        #: Bytes of this worker's own file that were written, and of all files that all ranks of this job read, in the
        #: last round; manifests are not counted.
        self.bytes_written = 0
        self.bytes_read = 0
        self._read = 0
        self._shown = worker.shown
        self._folder = open_folder(worker.exchange)
        on_rank_zero(world, self._enter())

    def begin(self, weights: str) -> None:
        """Before the first round of a job that begins at step 0: it must be a job of the run that the folder holds.

        All workers of a run begin with the same weights, and so does one that is started again. Jobs that go on from a
        checkpoint do not call this.

        Args:
            weights: fingerprint of those that the job begins with, before any mask (`identity.of_weights`).
        Raises:
            ValueError: the run began with other weights, or this worker has published already and is not told to go on.
        """
        on_rank_zero(self._world, self._begin(weights))

    def combine(self, round: int, items: Sequence[Item], bits: Mapping[str, Tensor]) -> Iterator[Received]:
        """Publishes this worker's partition, waits for the others, and returns what all partitions became.

        A partition is taken from its own worker: this worker's too, from its file, so that a job that was killed after
        it had published goes on with what the others have read. The result is the same on all workers bit for bit.
        Nothing is returned unless all files of the round are whole. The iterator goes through collectives: every rank
        must go through it to its end.

        Args:
            items: all that is exchanged (`items_of`).
            bits: mask of this rank's piece of each entry of the worker's own partition, on the device of the weights.
        Raises:
            ValueError: a mask does not keep the entry's budget, a file cannot be written or read, or is damaged; this
                worker has published the round in another run.
            TimeoutError: another worker has not published in time.
        """
        started = time.perf_counter()
        self.publish(round, items, bits)
        manifests = self.wait(round)
        return self._reported(self.read(round, items, manifests), round, [m.bytes for m in manifests], started)

    def _reported(
        self, received: Iterator[Received], round: int, sizes: Sequence[int], started: float
    ) -> Iterator[Received]:
        yield from received
        index = self.worker.index
        self._say(
            f"round {round}: worker {index} wrote {self.bytes_written} bytes and read {self.bytes_read} bytes, checks "
            f"included; in the compact form its file has {sizes[index]} bytes, and the files of all {self.workers} "
            f"workers have {sum(sizes)}; {time.perf_counter() - started:.3f} s"
        )

    # -- writing ---------------------------------------------------------------------------------------------------

    def publish(self, round: int, items: Sequence[Item], bits: Mapping[str, Tensor]) -> None:
        """Writes this worker's file of a round, tensor by tensor, and says in `bytes_written` how much that was.

        If this job goes on and has published the round before, nothing is written: others may have read it.
        """
        file.check_items(items, self.workers)
        index, name = self.worker.index, _name(round, self.worker.index)
        self.bytes_written = 0
        if on_rank_zero(self._world, self._before(round)):
            return
        own = file.selected(items, index, self.shared)
        table = dict(zip((item.name for item in own), self._spreads(own, bits), strict=True))
        kept = {item.name: sum(table[item.name].kept) for item in own if item.keep is not None}
        self._together(partial(file.check_kept, own, kept))
        slots = file.layout(own, kept)
        writes = self._world.rank == 0
        target = self._together(lambda: self._folder.stream(f"{name}.safetensors") if writes else None)
        digest, size = hashlib.sha256(), 0
        try:
            for contents in self._contents(round, slots, table, bits):
                size += self._together(partial(_write, target, contents, digest))
            self._together(lambda: target.close() if target is not None else None)
        except BaseException:
            if target is not None:
                target.discard()
            raise
        described = {
            **{"format": FORMAT, "version": VERSION, **self._identity, "round": round, "worker": index},
            **{"bytes": size, "sha256": digest.hexdigest()},
            "published": _now(),
        }
        self._together(lambda: self._put(f"{name}.json", described) if writes else None)
        self.bytes_written = int(self._world.broadcast_object(size))

    def _before(self, round: int) -> Generator[None, None, bool]:
        """Whether this worker has published a round before; ValueError if that was in another run, for all we know."""
        index = self.worker.index
        if (manifest := (yield from self._manifest(round, index))) is None:
            return False
        path = self._path(f"{_name(round, index)}.json")
        if not self.rejoins:
            raise ValueError(
                f"{path}: worker {index} published round {round} at {printable(manifest.published)}, and this job "
                "began at step 0. A new run needs an exchange folder of its own: name another, or delete this one when "
                "no job uses it. A job of the same run that is started again must go on from its checkpoint, or be "
                "told that it goes on (ParallelWorker(resume=True), in the examples --resume)."
            )
        log.warning(
            f"round {round}: worker {index} has published at {printable(manifest.published)}, before this job was "
            "started or resumed. That file is used."
        )
        return True

    def _put(self, name: str, table: Mapping[str, Any]) -> None:
        target = self._folder.stream(name)
        try:
            target.write(json.dumps(table, indent=1).encode())
            target.close()
        except BaseException:
            target.discard()
            raise

    def _contents(
        self, round: int, slots: Sequence[Slot], table: Mapping[str, _Spread], bits: Mapping[str, Tensor]
    ) -> Iterator[Callable[[], Bytes]]:
        """What gives the bytes of a file, tensor by tensor, on the rank that writes; not to be called on the others."""
        header = tensorfile.header_bytes(file.header(slots, self._metadata(round, self.worker.index)))
        yield lambda: np.frombuffer(header, np.uint8)
        for slot in slots:
            # A rank that has no memory left for its piece must say so before the others wait for it.
            piece = self._together(partial(self._piece, slot, bits))
            whole, spread = None, table[slot.item.name]
            # Where groups of ranks hold the same pieces, one group writes, and the others keep step with it.
            if self._comm.writes and slot.part == "values":
                whole = self._comm.assemble(piece, spread.before, spread.kept, slot.shape[0])
            elif self._comm.writes:
                whole = self._comm.assemble(piece, spread.starts, spread.numels, slot.item.full_numel)
            yield partial(_encoded, slot, whole)

    def _piece(self, slot: Slot, bits: Mapping[str, Tensor]) -> Tensor:
        """This rank's piece of what is assembled for a tensor of the file; nothing where its group does not write."""
        item = slot.item
        if not self._comm.writes:
            return torch.empty(0)
        if slot.part == "mask":
            return bitmask.unpack(bits[item.name], item.numel).to(torch.uint8)
        if slot.part == "values":
            piece = item.piece()
            return piece.float()[bitmask.unpack(bits[item.name], item.numel).to(piece.device)]
        return item.piece().to(item.dtype)

    def _spreads(self, items: Sequence[Item], bits: Mapping[str, Tensor]) -> list[_Spread]:
        """How pieces, and the kept weights in them, are spread over the ranks; known to every rank."""
        kept = [bitmask.count(bits[item.name]) if item.keep is not None else 0 for item in items]
        spreads = []
        rows = [(item.start, item.numel, n) for item, n in zip(items, kept, strict=True)]
        for starts, numels, counts in by_rank(rows, self._comm):
            # Of two pieces that begin alike, one is empty and comes first.
            order = sorted(range(len(starts)), key=lambda rank: (starts[rank], numels[rank]))
            sums = accumulate((counts[rank] for rank in order), initial=0)
            before = dict(zip(order, sums, strict=False))
            spreads.append(_Spread(starts, numels, counts, [before[rank] for rank in range(len(starts))]))
        return spreads

    # -- waiting ---------------------------------------------------------------------------------------------------

    def wait(self, round: int) -> list[Manifest]:
        """The manifests of all K workers, once all have published.

        Raises:
            TimeoutError: a worker has not published within the worker's timeout.
            ValueError: a manifest is damaged, or belongs to another run.
        """
        return on_rank_zero(self._world, self._wait(round))

    def _wait(self, round: int) -> Generator[None, None, list[Manifest]]:
        found: dict[int, Manifest] = {}
        timeout, pause, trouble = self.worker.timeout, _POLL, ""
        started = last = time.monotonic()
        while True:
            self._folder.refresh()
            for worker in range(self.workers):
                try:
                    manifest = None if worker in found else (yield from self._manifest(round, worker))
                except OSError as error:  # a network may be away for a while
                    manifest, trouble = None, f" (the folder could not be read: {summarize_error(error)})"
                if manifest is not None:
                    found[worker] = manifest
            missing = [worker for worker in range(self.workers) if worker not in found]
            if not missing:
                return [found[worker] for worker in range(self.workers)]
            who = f"worker{'s' if len(missing) > 1 else ''} {', '.join(str(worker) for worker in missing)}"
            now = time.monotonic()
            if now - started >= timeout:
                raise TimeoutError(
                    f"round {round}: {who} of {self.workers} did not publish in {self._shown} within {timeout:g} s"
                    f"{trouble}. Check that each job runs, with its own worker index and this exchange folder, and "
                    'start this one again from its checkpoint; or raise "timeout".'
                )
            if now - last >= _PROGRESS:
                last = now
                log.info(
                    f"round {round}: waiting for {who}, {now - started:.0f} of {timeout:g} s, {self._shown}{trouble}"
                )
            time.sleep(max(0.0, min(pause, started + timeout - now)))
            pause = min(1.5 * pause, _POLL_MOST)
            yield

    def _manifest(self, round: int, worker: int) -> Generator[None, None, Manifest | None]:
        """A worker's manifest; None if there is none yet."""
        name = f"{_name(round, worker)}.json"
        types = {"round": int, "worker": int, "bytes": int, "sha256": str, "published": str}
        table = yield from self._json(name, types)
        if table is None:
            return None
        if different := identity.differences(table, self._identity):
            raise ValueError(f"{self._path(name)}: belongs to another run: {different}. {_OWN}")
        if (table["round"], table["worker"]) != (round, worker):
            raise ValueError(
                f"{self._path(name)}: is that of round {table['round']}, worker {table['worker']}. Delete it, and "
                f"start worker {worker} again from its checkpoint."
            )
        return Manifest(table["bytes"], table["sha256"], table["published"])

    # -- reading ---------------------------------------------------------------------------------------------------

    def read(self, round: int, items: Sequence[Item], manifests: Sequence[Manifest]) -> Iterator[Received]:
        """This rank's pieces of all items: partition k from worker k's file, the shared ones from all.

        Rank 0 checks all files against their manifests first; the pieces are then read one at a time.

        Raises:
            ValueError: a file is damaged or is not of this plan (at once), or cannot be read (in the course of it).
        """
        file.check_items(items, self.workers)
        self._read = 0
        files = [on_rank_zero(self._world, self._verify(round, worker, items, m)) for worker, m in enumerate(manifests)]
        return self._pieces(items, files)

    def _pieces(self, items: Sequence[Item], files: Sequence[_Verified]) -> Iterator[Received]:
        for worker, source in enumerate(files):
            own = [item for item in items if item.partition == worker]
            entries = [item for item in own if item.keep is not None]
            bits = self._together(partial(self._read_masks, source, entries))
            spreads = self._spreads(entries, bits)
            self._together(partial(self._check_masks, source, entries, spreads))
            for item, pieces in zip(entries, spreads, strict=True):
                before = pieces.before[self._comm.rank]
                value = self._together(partial(self._read_weights, source, item, bits[item.name], before))
                yield Received(item.name, value, bits.pop(item.name))
            for item in own:
                if item.keep is None:
                    yield Received(item.name, self._together(partial(self._read_whole, source, item)), None)
        for item in items:
            if item.partition is None:
                yield Received(item.name, self._together(partial(self._read_shared, files, item)), None)
        self.bytes_read = int(self._world.sum(torch.tensor([self._read], dtype=torch.int64)))

    def _read_masks(self, source: _Verified, entries: Sequence[Item]) -> dict[str, Tensor]:
        """The bits of this rank's pieces, cut out of the bytes that cover them."""
        found = {}
        for item in entries:
            begin = source.where[f"{item.name}.mask"][0]
            lo, hi = item.start // 8, bitmask.nbytes(item.start + item.numel) if item.numel else item.start // 8
            covering = tensorfile.decode(self._fetch(source.path, begin + lo, begin + hi), torch.uint8)
            found[item.name] = bitmask.pack(bitmask.unpack(covering, item.numel, start=item.start - 8 * lo))
        return found

    def _check_masks(self, source: _Verified, entries: Sequence[Item], spreads: Sequence[_Spread]) -> None:
        """A mask with more or fewer bits than values would put weights into wrong places."""
        for item, pieces in zip(entries, spreads, strict=True):
            begin, end = source.where[f"{item.name}.values"]
            if sum(pieces.kept) != (end - begin) // 4:
                raise ValueError(
                    f"{self._path(source.path)}: the mask of {item.name} keeps {sum(pieces.kept)} weights, and there "
                    f"are {(end - begin) // 4}: it is damaged, or the pieces of the ranks do not make up the parameter"
                )

    def _read_weights(self, source: _Verified, item: Item, bits: Tensor, before: int) -> Tensor:
        begin = source.where[f"{item.name}.values"][0] + 4 * before
        data = self._fetch(source.path, begin, begin + 4 * bitmask.count(bits))
        return spread(tensorfile.decode(data, torch.float32), bits, item.numel)

    def _read_whole(self, source: _Verified, item: Item) -> Tensor:
        width = item.dtype.itemsize
        begin = source.where[item.name][0] + width * item.start
        return tensorfile.decode(self._fetch(source.path, begin, begin + width * item.numel), item.dtype)

    def _read_shared(self, files: Sequence[_Verified], item: Item) -> Tensor:
        """The mean over the workers, or worker 0's piece.

        Summed in fp64 in the order of the workers and rounded once: the same on every worker bit for bit, and equal
        values are their own mean.
        """
        first = self._read_whole(files[0], item)
        if not file.is_averaged(item, self.shared):
            return first
        total = first.double()
        for source in files[1:]:
            total += self._read_whole(source, item)
        return (total / self.workers).to(item.dtype)

    def _fetch(self, path: str, begin: int, end: int) -> bytes:
        """Exactly the bytes [begin, end) of a file."""
        if begin == end:
            return b""
        try:
            data = self._folder.read(path, begin, end)
        except OSError as error:
            raise ValueError(f"{self._path(path)}: cannot be read ({summarize_error(error)})") from error
        if len(data) != end - begin:
            raise ValueError(f"{self._path(path)}: is truncated: {len(data)} bytes at {begin} instead of {end - begin}")
        self._read += len(data)
        return data

    def _verify(
        self, round: int, worker: int, items: Sequence[Item], manifest: Manifest
    ) -> Generator[None, None, _Verified]:
        """A file, once all of it was seen to be what its manifest says. One that is not gets a second look."""
        path = f"{_name(round, worker)}.safetensors"
        second = False
        while True:
            try:
                return (yield from self._look(path, round, worker, items, manifest))
            except (OSError, ValueError) as error:
                sentence = f"{self._path(path)}: {error_text(error).removeprefix(f'{self._path(path)}: ')}"
                if second:
                    raise ValueError(
                        f"{sentence}. To have worker {worker} write it again, delete its manifest "
                        f"(worker_{worker}.json) and start that worker again from its checkpoint."
                    ) from error
                log.warning(f"{sentence}; reading it once more")
            second = True
            time.sleep(_AGAIN)
            yield
            self._folder.refresh()

    def _look(
        self, path: str, round: int, worker: int, items: Sequence[Item], manifest: Manifest
    ) -> Generator[None, None, _Verified]:
        size = self._folder.size(path)
        if size != manifest.bytes:
            raise ValueError(f"has {size} bytes instead of the {manifest.bytes} that its manifest says")
        own, metadata = file.selected(items, worker, self.shared), self._metadata(round, worker)
        # The header is known but for shared budgets, so its size is bounded.
        expected = tensorfile.header_bytes(file.header(file.layout(own, file.budgets(own)), metadata))
        first = self._fetch(path, 0, min(8, size))
        start = 8 + tensorfile.header_length(first, size, len(expected) + _SLACK)
        text = self._fetch(path, 8, start)
        slots = file.accept(text, size - start, own, metadata)
        digest = hashlib.sha256(first + text)
        for begin in range(start, size, _CHUNK):
            digest.update(self._fetch(path, begin, min(begin + _CHUNK, size)))
            yield
        if digest.hexdigest() != manifest.sha256:
            raise ValueError("its SHA-256 is not that of its manifest: it is damaged")
        return _Verified(path, {slot.name: (start + slot.begin, start + slot.end) for slot in slots})

    # -- the folder's identity -------------------------------------------------------------------------------------

    def _enter(self) -> Generator[None, None, None]:
        """Makes run.json, or checks that of the worker that was first."""
        try:
            table = yield from self._first("run.json", {})
        except OSError as error:
            raise ValueError(
                f"exchange={self._shown!r}: cannot be used as exchange folder ({summarize_error(error)}). Name a "
                "folder or URL that every worker can read and write."
            ) from error
        if different := identity.differences(table, self._identity):
            raise ValueError(
                f"{self._shown}: is the exchange folder of another run: {different}. Give this run a folder of its "
                "own, or start it with the settings of that one."
            )

    def _begin(self, weights: str) -> Generator[None, None, None]:
        """Makes start.json, or checks that of the worker that was first."""
        if not self.rejoins:
            yield from self._before(0)
        said = {"weights": weights, "worker": self.worker.index, "began": _now()}
        table = yield from self._first("start.json", said)
        if different := identity.differences(table, self._identity):
            raise ValueError(f"{self._path('start.json')}: belongs to another run: {different}. {_OWN}")
        if table["weights"] != weights:
            raise ValueError(
                f"{self._path('start.json')}: worker {table['worker']} began at {printable(table['began'])} with other "
                f"weights than worker {self.worker.index} now: either the folder is another run's, or the jobs have "
                f"built different models. Build the same one in every worker, from one seed. {_OWN}"
            )

    def _first(self, name: str, said: Mapping[str, Any]) -> Generator[None, None, dict[str, Any]]:
        """A JSON file that the first worker to come writes, with what it says of itself; as it is for all then."""
        with contextlib.suppress(FileExistsError):
            table = {"format": FORMAT, "version": VERSION, **self._identity, **said}
            self._folder.create(name, json.dumps(table, indent=1).encode())
        self._folder.refresh()
        # Read back even if it was just written: where there is no exclusive creation, another may have been later.
        found = yield from self._json(name, {key: type(value) for key, value in said.items()})
        if found is None:
            raise ValueError(f"{self._path(name)}: vanished. Do not delete the exchange folder of a running run.")
        return found

    def _json(self, name: str, types: Mapping[str, type]) -> Generator[None, None, dict[str, Any] | None]:
        """A JSON file of ours with these fields and those of the run; None if there is none.

        Where a system shows a file while it is written, it may look damaged for a moment.
        """
        types = {**{key: type(value) for key, value in self._identity.items()}, **types}
        end = time.monotonic() + _SETTLE
        while True:
            try:
                text = self._folder.read(name, 0, MAX_JSON + 1)
                if len(text) > MAX_JSON:
                    raise ValueError(f"is longer than {MAX_JSON} bytes")
                return file.load_record(text, types)
            except FileNotFoundError:
                return None
            except ValueError as error:
                if time.monotonic() >= end:
                    raise ValueError(
                        f"{self._path(name)}: {error}. If nothing else explains it, the file is damaged: delete it, "
                        "and start the worker that wrote it again from its checkpoint."
                    ) from None
            time.sleep(min(0.2, _SETTLE))
            yield
            self._folder.refresh()

    def _metadata(self, round: int, worker: int) -> dict[str, str]:
        known = {"format": FORMAT, "version": VERSION, "plan": self._plan, "round": round, "worker": worker}
        return {key: str(value) for key, value in known.items()}

    def _together(self, work: Callable[[], T]) -> T:
        return raise_on_all_ranks(self._world, work)

    def _path(self, name: str) -> str:
        return f"{self._shown.rstrip('/')}/{name}"

    def _say(self, message: str, level: int = logging.INFO) -> None:
        if self._world.rank == 0:
            log.log(level, message)


def _check_worker(worker: ParallelWorker, workers: int) -> None:
    if type(worker.index) is not int or not 0 <= worker.index < workers:
        raise ValueError(
            f"worker index={worker.index!r}: must be a whole number from 0 to {workers - 1}, one for each of the "
            f'{workers} partitions. Start one job per partition, or change "partitions".'
        )
    if not isinstance(worker.exchange, str) or not worker.exchange:
        raise ValueError(f"exchange={worker.exchange!r}: must name the folder or URL where the workers meet.")
    is_number = isinstance(worker.timeout, int | float) and not isinstance(worker.timeout, bool)
    if not is_number or not 0 < worker.timeout < math.inf:
        raise ValueError(f"timeout={worker.timeout!r}: must be a number of seconds above 0.")
    if not isinstance(worker.run, str) or len(worker.run) > 1000:
        raise ValueError(f"run={str(worker.run)[:50]!r}: must be a text of at most 1000 characters, such as a hash.")


def _encoded(slot: Slot, whole: Tensor | None) -> Bytes:
    """The bytes of a tensor of the file that was assembled; of a mask, one flag for each weight."""
    assert whole is not None
    return tensorfile.encode(bitmask.pack(whole.bool()) if slot.part == "mask" else whole)


def _write(target: Writing | None, contents: Callable[[], Bytes], digest: hashlib._Hash) -> int:
    """Writes contents where there is a target; how many bytes these were."""
    if target is None:
        return 0
    data = contents()
    for lo in range(0, len(data), _CHUNK):
        chunk = data[lo : lo + _CHUNK].tobytes()
        digest.update(chunk)
        target.write(chunk)
    return len(data)


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _name(round: int, worker: int) -> str:
    """Path of a worker's files below the exchange folder, without their endings; made of numbers alone."""
    return f"round_{int(round)}/worker_{int(worker)}"
