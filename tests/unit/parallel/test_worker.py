"""Values of a `ParallelWorker`."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from exchanging import ALONE, SIGNATURE, Model, start

from gap_ds.parallel import Exchange, ParallelWorker


def test_whether_a_worker_has_published(folder: str, tmp_path: Path) -> None:
    worker = ParallelWorker(0, folder)
    assert not worker.has_published()
    jobs = [start(folder, worker) for worker in (0, 1)]
    jobs[1].publish(0, Model(1).items(), Model(1).bits)
    assert not worker.has_published() and ParallelWorker(1, folder).has_published()
    (tmp_path / "file").write_text("")
    assert not ParallelWorker(0, str(tmp_path / "file")).has_published()


@pytest.mark.parametrize(
    ("worker", "sentence"),
    [
        (ParallelWorker(2, "x"), r"worker index=2: must be a whole number from 0 to 1"),
        (ParallelWorker(-1, "x"), r"index=-1"),
        (ParallelWorker(True, "x"), r"index=True"),
        (ParallelWorker("../../etc", "x"), r"index='../../etc'"),  # type: ignore[arg-type]
        (ParallelWorker(0, ""), r"exchange='': must name the folder"),
        (ParallelWorker(0, "x", 0.0), r"timeout=0.0: must be a number of seconds above 0"),
        (ParallelWorker(0, "x", math.inf), r"timeout=inf"),
        (ParallelWorker(0, "x", run=7), r"run='7': must be a text"),  # type: ignore[arg-type]
        (ParallelWorker(0, "x", run="x" * 1001), r"at most 1000 characters, such as a hash"),
        (ParallelWorker(0, "nosuch://x"), r"exchange='nosuch://x': cannot be opened \(ValueError: Protocol not known"),
        (ParallelWorker(0, "nosuch://me:secret@x?sig=secret"), r"exchange='nosuch://x'"),
    ],
)
def test_impossible_workers_are_refused(worker: ParallelWorker, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Exchange(worker, 2, SIGNATURE, "abc", "def", ALONE, ALONE)
