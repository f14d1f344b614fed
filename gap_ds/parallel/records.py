"""The JSON files of an exchange folder: which run it belongs to, and which files are published. No collectives here.

`Exchange` calls these on rank 0 alone. They may take long: until all workers have published, or a folder is readable.
"""

from __future__ import annotations

import contextlib
import logging
import time
from typing import Any, TypeVar

from gap_ds.parallel.identity import RunRecord, differences
from gap_ds.parallel.transport import Folder
from gap_ds.parallel.worker import ParallelWorker, file_stem
from gap_ds.storage.errors import printable, summarize_error
from gap_ds.storage.json import parse_json

log = logging.getLogger("gap_ds")
R = TypeVar("R", bound=RunRecord)

#: The largest JSON file that is read, in bytes.
MAX_JSON = 1 << 20
#: Seconds between two looks for the files of the others: at first, and at most.
_POLL, _POLL_MOST = 0.05, 5.0
#: Seconds between two lines of progress; seconds that a damaged JSON file gets to become whole.
_PROGRESS, _SETTLE = 30.0, 10.0
#: What to do about a file of another run.
_ANOTHER_FOLDER = "Give this run a separate exchange folder."


class Start(RunRecord):
    """start.json: the fingerprint of the weights that a run begins with, and the worker that wrote it first."""

    weights: str
    worker: int
    began: str


class Manifest(RunRecord):
    """Record of a complete file: its size in bytes, its SHA-256 in hexadecimal digits, and when it was published."""

    round: int
    worker: int
    bytes: int
    sha256: str
    published: str


class Records:
    """Reads and writes the JSON files of one worker's job.

    Args:
        folder: the exchange folder; messages show `worker.shown`.
        run: the run of this job, as all JSON files contain it.
    """

    def __init__(self, worker: ParallelWorker, folder: Folder, run: RunRecord) -> None:
        self._worker, self._folder, self._run = worker, folder, run
        #: True if this job continues a run, so that it may find rounds that this worker has published before.
        self.rejoins = worker.resume

    def path(self, name: str) -> str:
        """Return the path of a file of the folder, for messages."""
        return f"{self._worker.shown.rstrip('/')}/{name}"

    # -- whose folder ----------------------------------------------------------------------------------------------

    def enter(self) -> None:
        """Write run.json, or check the one that the first worker wrote.

        Raises:
            ValueError: the folder belongs to another run, or cannot be read and written.
        """
        shown = self._worker.shown
        try:
            found = self._first("run.json", self._run)
        except OSError as error:
            raise ValueError(
                f"exchange={shown!r}: cannot be used as exchange folder ({summarize_error(error)}). Name a folder or "
                "URL that every worker can read and write."
            ) from error
        if different := differences(found, self._run):
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
        index = self._worker.index
        found = self._first("start.json", Start(**dict(self._run), weights=weights, worker=index, began=_now()))
        self._check_run("start.json", found)
        if found.weights != weights:
            raise ValueError(
                f"{self.path('start.json')}: worker {found.worker} began at {printable(found.began)} with other "
                f"weights than worker {index} now: the folder belongs to another run, or the jobs have built "
                f"different models. Build the same model in every worker, from one seed. {_ANOTHER_FOLDER}"
            )

    # -- manifests -------------------------------------------------------------------------------------------------

    def published_before(self, round: int) -> bool:
        """Return whether this worker has published a round in an earlier job of this run.

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
        index = self._worker.index
        fields: dict[str, Any] = {"round": round, "worker": index, "bytes": size, "sha256": sha256, "published": _now()}
        self._folder.put(f"{file_stem(round, index)}.json", _encoded(Manifest(**dict(self._run), **fields)))

    def manifest(self, round: int, worker: int) -> Manifest | None:
        """Return a worker's manifest; None if there is none yet.

        Raises:
            ValueError: it is damaged, or belongs to another run, round or worker.
        """
        name = f"{file_stem(round, worker)}.json"
        if (found := self._json(name, Manifest)) is None:
            return None
        self._check_run(name, found)
        if (found.round, found.worker) != (round, worker):
            raise ValueError(
                f"{self.path(name)}: is that of round {found.round}, worker {found.worker}. Delete it, and start "
                f"worker {worker} again from its checkpoint."
            )
        return found

    def wait(self, round: int, workers: int) -> list[Manifest]:
        """Return the manifests of all workers, once all have published.

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
        """Add the manifests that are new. Returns the last I/O error as text: a network may be down for a while."""
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

    def _first(self, name: str, record: R) -> R:
        """Write a JSON file unless another worker has written it before. Returns the content of the file."""
        with contextlib.suppress(FileExistsError):
            self._folder.create(name, _encoded(record))
        self._folder.refresh()
        # Read back even if it was just written: without exclusive creation another worker may have overwritten it.
        found = self._json(name, type(record))
        if found is None:
            raise ValueError(f"{self.path(name)}: vanished. Do not delete the exchange folder of a running run.")
        return found

    def _json(self, name: str, model: type[R]) -> R | None:
        """Return the content of a JSON file; None if there is none.

        Some file systems show a file while it is being written, so damage gets some seconds to pass.
        """
        end = time.monotonic() + _SETTLE
        while True:
            try:
                text = self._folder.read(name, 0, MAX_JSON + 1)
                if len(text) > MAX_JSON:
                    raise ValueError(f"is longer than {MAX_JSON} bytes")
                return parse_json(text, model)
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

    def _check_run(self, name: str, found: RunRecord) -> None:
        if different := differences(found, self._run):
            raise ValueError(f"{self.path(name)}: belongs to another run: {different}. {_ANOTHER_FOLDER}")


def _encoded(record: RunRecord) -> bytes:
    return record.model_dump_json(indent=1).encode()


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
