"""JSON files of an exchange folder: one run, one start, damaged manifests, late and missing workers."""

from __future__ import annotations

import json
import logging
import threading
from pathlib import Path
from typing import Any

import fsspec
import pytest
from exchanging import Model, expected, overwrite, publish_all, raw, same, start, take

from gap_ds.parallel import Exchange
from gap_ds.parallel.records import MAX_JSON


def test_files_of_another_run_are_refused_where_run_json_was_deleted(tmp_path: Path) -> None:
    publish_all(str(tmp_path))
    (tmp_path / "run.json").unlink()
    job = start(str(tmp_path), 0, fingerprint="def")
    with pytest.raises(ValueError, match=r"round_0/worker_0.json: belongs to another run: plan abc \(here def\)"):
        job.publish(0, Model(0).items(), Model(0).bits)
    with pytest.raises(ValueError, match=r"worker_0.json: belongs to another run"):
        job.wait(0)
    (tmp_path / "run.json").unlink()
    with pytest.raises(ValueError, match=r'worker_0.json: belongs to another run: run "" \(here "other"\)'):
        start(str(tmp_path), 0, run="other").wait(0)


def test_all_workers_begin_with_the_same_weights(folder: str) -> None:
    start(folder, 0).begin("these")
    start(folder, 1).begin("these")
    with pytest.raises(ValueError, match=r"start.json: worker 0 began at 20.* with other weights than worker 1 now: "):
        start(folder, 1).begin("others")
    start(folder, 0).begin("these")


def test_a_new_run_in_the_folder_of_another_one_is_refused(folder: str) -> None:
    for job in publish_all(folder):
        job.begin("these")
    message = (
        r"round_0/worker_0.json: worker 0 published round 0 at 20.*, and this job began at step 0\. A new run needs"
    )
    before = raw(folder, "round_0/worker_0.json")
    with pytest.raises(ValueError, match=message):
        start(folder, 0, resume=False).begin("these")
    with pytest.raises(ValueError, match="with other weights than worker 0 now"):
        start(folder, 0).begin("others")
    with pytest.raises(ValueError, match=message):
        start(folder, 0, resume=False).publish(0, Model(0).items(), Model(0).bits)
    assert raw(folder, "round_0/worker_0.json") == before


@pytest.mark.parametrize("published", [False, True])
def test_a_job_that_was_killed_in_its_first_round_joins_again(folder: str, published: bool) -> None:
    jobs = [start(folder, worker, resume=False) for worker in (0, 1)]
    for worker, job in enumerate(jobs):
        job.begin("these")
        if worker or published:
            job.publish(0, Model(worker).items(), Model(worker).bits)
    again = start(folder, 0, resume=published)  # before it has published, it needs no permission
    again.begin("these")
    found = take(again)
    assert all(same(found[name].value, wanted) for name, wanted in expected(2).items())


def test_a_folder_without_a_start_is_given_one(folder: str) -> None:
    """Jobs that continue from a checkpoint do not write the weights that their run began with."""
    (job, _) = publish_all(folder)
    job.begin("these")
    assert json.loads(raw(folder, "start.json"))["weights"] == "these"
    system, root = fsspec.core.url_to_fs(folder)
    assert {"run.json", "start.json"} <= {path.rpartition("/")[2] for path in system.ls(root, detail=False)}


def test_workers_that_start_together_agree_on_one_record(folder: str) -> None:
    for attempt in range(5):
        results: list[Any] = [None] * 4
        here = f"{folder}/{attempt}"

        def work(i: int, here: str = here, results: list[Any] = results) -> None:
            try:
                results[i] = start(here, i % 2, fingerprint=f"plan {i // 2}")
            except ValueError as error:
                results[i] = error

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        won = json.loads(raw(here, "run.json"))["plan"]
        if not folder.startswith("memory"):  # its exclusive creation looks first and writes then
            assert [isinstance(r, Exchange) for r in results] == [f"plan {i // 2}" == won for i in range(4)]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "run.json: is damaged or of another kind"),
        (b"\xff\xfe", "run.json: is damaged or of another kind"),
        (b"[" * 100_000, "run.json: is damaged or of another kind"),
        (b"[]", "run.json: is damaged or of another kind"),
        (b'{"format": "other"}', "format: Input should be 'gap_ds.exchange'"),
        (b'{"format": "gap_ds.exchange", "version": 1}', "version: .*is 1, but this gap_ds reads 2: all workers need"),
        (b'{"format": "gap_ds.exchange", "version": "2"}', "version: Input should be a valid integer"),
        (b'{"format": "gap_ds.exchange", "version": 2}', "signature: Field required"),
        (b" " * (MAX_JSON + 1), "is longer than"),
    ],
)
def test_a_damaged_record_is_refused(folder: str, content: bytes, sentence: str) -> None:
    start(folder, 0)
    overwrite(folder, "run.json", content)
    with pytest.raises(ValueError, match=sentence):
        start(folder, 1)


def test_every_field_of_a_manifest_is_checked(tmp_path: Path) -> None:
    (job, _) = publish_all(str(tmp_path))
    path = tmp_path / "round_0" / "worker_1.json"
    manifest = json.loads(path.read_text())
    wrong = {"bytes": "7", "sha256": 7, "round": 1, "worker": 0, "workers": 5, "published": None, "plan": 3, "run": 1}
    wrong |= {"tensors": None}
    for key, value in wrong.items():
        path.write_text(json.dumps(manifest | {key: value}))
        with pytest.raises(ValueError, match=r"worker_1\.json"):
            job.wait(0)
        path.write_text(json.dumps({k: v for k, v in manifest.items() if k != key}))
        with pytest.raises(ValueError, match=rf"worker_1.json: is damaged .*\({key}: Field required\)"):
            job.wait(0)
    path.write_text(json.dumps(manifest | {"more": 1}))
    with pytest.raises(ValueError, match="more: Extra inputs are not permitted"):
        job.wait(0)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be used as exchange folder"):
        start(str(tmp_path / "file"), 0)
    with pytest.raises(ValueError, match="cannot be used as exchange folder"):
        start(str(tmp_path / "file" / "below"), 0)


def test_a_missing_worker_is_named(folder: str, clock: Any, caplog: pytest.LogCaptureFixture) -> None:
    jobs = [start(folder, worker, 4, timeout=100.0) for worker in range(4)]
    for worker in (0, 2):
        model = Model(worker, 4)
        jobs[worker].publish(3, model.items(), model.bits)
    with caplog.at_level(logging.INFO, "gap_ds"), pytest.raises(TimeoutError) as caught:
        jobs[0].wait(3)
    assert str(caught.value).startswith(f"round 3: workers 1, 3 of 4 did not publish in {folder} within 100 s. Check ")
    lines = [record.message for record in caplog.records if "waiting" in record.message]
    passed = [int(line.removeprefix("round 3: waiting for workers 1, 3, ").split()[0]) for line in lines]
    assert lines == [f"round 3: waiting for workers 1, 3, {s} of 100 s, {folder}" for s in passed]
    assert [s // 30 for s in passed] == [1, 2, 3] and clock.now == 100


def test_a_worker_that_comes_late_is_waited_for(folder: str, clock: Any) -> None:
    jobs, late = [start(folder, worker) for worker in (0, 1)], Model(1)

    def publish() -> None:
        if clock.now > 20:
            clock.while_asleep = lambda: None
            jobs[1].publish(0, late.items(), late.bits)

    clock.while_asleep = publish
    results = [take(job) for job in jobs]
    assert all(same(result[name].value, wanted) for result in results for name, wanted in expected(2).items())
    assert 20 < clock.now < 30


def test_a_network_that_is_down_for_a_while_is_waited_for(folder: str, clock: Any, monkeypatch: Any) -> None:
    job, _ = publish_all(folder)
    read, down = job._folder.read, True

    def unreliable(*arguments: Any) -> bytes:
        if down:
            raise OSError("unreachable")
        return read(*arguments)

    monkeypatch.setattr(job._folder, "read", unreliable)
    with pytest.raises(TimeoutError, match=r"within 60 s \(the folder could not be read: OSError: unreachable\)"):
        job.wait(0)

    def recover() -> None:
        nonlocal down
        down = False

    clock.while_asleep = recover
    assert len(job.wait(0)) == 2


def test_a_record_that_is_still_being_written_is_read_when_it_is_whole(
    folder: str, clock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gap_ds.parallel.records._SETTLE", 10.0)
    start(folder, 0)
    whole = raw(folder, "run.json")
    overwrite(folder, "run.json", whole[:20])
    clock.while_asleep = lambda: clock.now > 5 and overwrite(folder, "run.json", whole)
    start(folder, 1)
    assert 5 < clock.now < 6
    overwrite(folder, "run.json", whole[:20])
    clock.while_asleep = lambda: None
    with pytest.raises(ValueError, match=r"run.json: is damaged .*delete it, and start the worker that wrote it again"):
        start(folder, 1)
    assert 15 < clock.now < 17
