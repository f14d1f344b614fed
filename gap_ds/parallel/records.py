"""The JSON files of an exchange folder: which run it belongs to, and which files are published. No collectives here.

`Exchange` calls these on rank 0 alone. They may take long: until all workers have published, or a folder is readable.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gap_ds.parallel import identity
from gap_ds.parallel.items import FORMAT, VERSION, load_record, printable
from gap_ds.parallel.transport import Folder
from gap_ds.parallel.worker import ParallelWorker, file_stem
from gap_ds.sharding.comm import summarize_error

log = logging.getLogger("gap_ds")

#: The largest JSON file that is read.
MAX_JSON = 1 << 20
#: Seconds between two looks for the files of the others: at first, and at most.
_POLL, _POLL_MOST = 0.05, 5.0
#: Seconds between two lines of progress; seconds that a damaged JSON file gets to become whole.
_PROGRESS, _SETTLE = 30.0, 10.0
#: What to do about a file of another run.
_ANOTHER_FOLDER = "Give this run a separate exchange folder."


@dataclass(frozen=True)
class Manifest:
    """Record of a complete file: its size in bytes, its SHA-256 in hexadecimal digits, and when it was published."""

    bytes: int
    sha256: str
    published: str


class Records:
    """Reads and writes the JSON files of one worker's job.

    Args:
        folder: the exchange folder; `worker.exchange` is shown in messages.
        run: what all JSON files of the run begin with: signature, plan, tensors, workers, run.
    """

    def __init__(self, worker: ParallelWorker, folder: Folder, run: Mapping[str, Any]) -> None:
        self._worker, self._folder, self._run = worker, folder, run
        #: True if this job may find a round that this worker has published before, because it continues a run.
        self.rejoins = worker.resume

    def path(self, name: str) -> str:
        """A file of the folder, for messages."""
        return f"{self._worker.shown.rstrip('/')}/{name}"

    # -- whose folder ----------------------------------------------------------------------------------------------

    def enter(self) -> None:
        """Write run.json, or check the one that the first worker wrote.

        Raises:
            ValueError: the folder belongs to another run, or cannot be read and written.
        """
        shown = self._worker.shown
        try:
            table = self._first("run.json", {})
        except OSError as error:
            raise ValueError(
                f"exchange={shown!r}: cannot be used as exchange folder ({summarize_error(error)}). Name a folder or "
                "URL that every worker can read and write."
            ) from error
        if different := identity.differences(table, self._run):
            raise ValueError(
                f"{shown}: is the exchange folder of another run: {different}. Give this run a separate folder, or "
                "start it with the settings of that run."
            )

    def begin(self, weights: str) -> None:
        """Write start.json, or check the one that the first worker wrote.

        Args:
            weights: fingerprint of the weights that this job begins with.
        Raises:
            ValueError: the run began with other weights, or this worker has published already and does not rejoin.
        """
        if not self.rejoins:
            self.published_before(0)
        fields = {"weights": weights, "worker": self._worker.index, "began": _now()}
        table, path = self._first("start.json", fields), self.path("start.json")
        if different := identity.differences(table, self._run):
            raise ValueError(f"{path}: belongs to another run: {different}. {_ANOTHER_FOLDER}")
        if table["weights"] != weights:
            raise ValueError(
                f"{path}: worker {table['worker']} began at {printable(table['began'])} with other weights than "
                f"worker {self._worker.index} now: the folder belongs to another run, or the jobs have built "
                f"different models. Build the same model in every worker, from one seed. {_ANOTHER_FOLDER}"
            )

    # -- manifests -------------------------------------------------------------------------------------------------

    def published_before(self, round: int) -> bool:
        """True if this worker has published a round in an earlier job of this run.

        Raises:
            ValueError: it has published, but this job does not rejoin, so the file may be another run's.
        """
        index = self._worker.index
        if (manifest := self.manifest(round, index)) is None:
            return False
        published = printable(manifest.published)
        if not self.rejoins:
            raise ValueError(
                f"{self.path(f'{file_stem(round, index)}.json')}: worker {index} published round {round} at "
                f"{published}, and this job began at step 0. A new run needs a separate exchange folder: name another "
                "one, or delete this one when no job uses it. To restart a job of the same run, load its checkpoint, "
                "or pass ParallelWorker(resume=True) (--resume in the examples)."
            )
        log.warning(
            f"round {round}: worker {index} has published at {published}, before this job was started or resumed. "
            "That file is used."
        )
        return True

    def publish(self, round: int, size: int, sha256: str) -> None:
        """Write this worker's manifest of a round. From then on the others read the file that it describes."""
        described = {"round": round, "worker": self._worker.index, "bytes": size, "sha256": sha256}
        target = self._folder.stream(f"{file_stem(round, self._worker.index)}.json")
        try:
            target.write(self._encoded(described | {"published": _now()}))
            target.close()
        except BaseException:
            target.discard()
            raise

    def manifest(self, round: int, worker: int) -> Manifest | None:
        """A worker's manifest; None if there is none yet.

        Raises:
            ValueError: it is damaged, or belongs to another run, round or worker.
        """
        name = f"{file_stem(round, worker)}.json"
        table = self._json(name, {"round": int, "worker": int, "bytes": int, "sha256": str, "published": str})
        if table is None:
            return None
        if different := identity.differences(table, self._run):
            raise ValueError(f"{self.path(name)}: belongs to another run: {different}. {_ANOTHER_FOLDER}")
        if (table["round"], table["worker"]) != (round, worker):
            raise ValueError(
                f"{self.path(name)}: is that of round {table['round']}, worker {table['worker']}. Delete it, and "
                f"start worker {worker} again from its checkpoint."
            )
        return Manifest(table["bytes"], table["sha256"], table["published"])

    def wait(self, round: int, workers: int) -> list[Manifest]:
        """The manifests of all workers, once all have published.

        Raises:
            TimeoutError: a worker has not published within the timeout.
            ValueError: a manifest is damaged, or belongs to another run.
        """
        found: dict[int, Manifest] = {}
        timeout, pause, shown = self._worker.timeout, _POLL, self._worker.shown
        started = last = time.monotonic()
        while True:
            trouble = self._look(round, workers, found)
            missing = [worker for worker in range(workers) if worker not in found]
            if not missing:
                return [found[worker] for worker in range(workers)]
            who = f"worker{'s' if len(missing) > 1 else ''} {', '.join(str(worker) for worker in missing)}"
            now = time.monotonic()
            if now - started >= timeout:
                raise TimeoutError(
                    f"round {round}: {who} of {workers} did not publish in {shown} within {timeout:g} s{trouble}. "
                    "Check that each job runs, with its worker index and this exchange folder, and start this one "
                    'again from its checkpoint; or raise "timeout".'
                )
            if now - last >= _PROGRESS:
                last = now
                log.info(f"round {round}: waiting for {who}, {now - started:.0f} of {timeout:g} s, {shown}{trouble}")
            time.sleep(max(0.0, min(pause, started + timeout - now)))
            pause = min(1.5 * pause, _POLL_MOST)

    def _look(self, round: int, workers: int, found: dict[int, Manifest]) -> str:
        """Add the manifests that are new. Returns what went wrong, for a message: a network may be down for a while."""
        trouble = ""
        self._folder.refresh()
        for worker in range(workers):
            try:
                if worker not in found and (manifest := self.manifest(round, worker)) is not None:
                    found[worker] = manifest
            except OSError as error:
                trouble = f" (the folder could not be read: {summarize_error(error)})"
        return trouble

    # -- JSON ------------------------------------------------------------------------------------------------------

    def _first(self, name: str, fields: Mapping[str, Any]) -> dict[str, Any]:
        """A JSON file that the first worker to come writes; returns the one in the folder, whoever wrote it."""
        with contextlib.suppress(FileExistsError):
            self._folder.create(name, self._encoded(fields))
        self._folder.refresh()
        # Read back even if it was just written: without exclusive creation another worker may have overwritten it.
        found = self._json(name, {key: type(value) for key, value in fields.items()})
        if found is None:
            raise ValueError(f"{self.path(name)}: vanished. Do not delete the exchange folder of a running run.")
        return found

    def _encoded(self, fields: Mapping[str, Any]) -> bytes:
        return json.dumps({"format": FORMAT, "version": VERSION, **self._run, **fields}, indent=1).encode()

    def _json(self, name: str, types: Mapping[str, type]) -> dict[str, Any] | None:
        """A JSON file with these fields and those of the run; None if there is none.

        Some file systems show a file while it is being written, so damage gets some seconds to pass.
        """
        types = {**{key: type(value) for key, value in self._run.items()}, **types}
        end = time.monotonic() + _SETTLE
        while True:
            try:
                text = self._folder.read(name, 0, MAX_JSON + 1)
                if len(text) > MAX_JSON:
                    raise ValueError(f"is longer than {MAX_JSON} bytes")
                return load_record(text, types)
            except FileNotFoundError:
                return None
            except ValueError as error:
                if time.monotonic() >= end:
                    raise ValueError(
                        f"{self.path(name)}: {error}. If nothing else explains it, the file is damaged: delete it, "
                        "and start the worker that wrote it again from its checkpoint."
                    ) from None
            time.sleep(min(0.2, _SETTLE))
            self._folder.refresh()


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
