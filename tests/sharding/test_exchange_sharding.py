"""The exchange of parallel GaP between real jobs whose ranks cut the parameters in different ways."""

from __future__ import annotations

import json
import multiprocessing
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import run_workers
from worker_exchange import TENSORS, alone, tensors

from gap_ds.masks import bitmask

ROW = {"folder": "exchange", "publish_only": False, "timeout": 120.0}
ROWS: list[dict[str, Any]] = [
    {**ROW, "name": "published", "worker": 0, "ranks": 2, "cut": "even", "publish_only": True},
    {**ROW, "name": "one", "worker": 1, "ranks": 1, "cut": "even"},
    {**ROW, "name": "even", "worker": 0, "ranks": 2, "cut": "even"},
    {**ROW, "name": "last", "worker": 0, "ranks": 2, "cut": "last"},
    {**ROW, "name": "whole", "worker": 0, "ranks": 2, "cut": "whole"},
    {**ROW, "name": "three", "worker": 0, "ranks": 3, "cut": "even"},
    {**ROW, "name": "alone", "worker": 1, "ranks": 2, "cut": "even", "timeout": 0.5, "folder": "elsewhere"},
    {**ROW, "name": "broken", "worker": 0, "ranks": 3, "cut": "even", "broken": 1, "folder": "elsewhere"},
]


def play(out: Path, name: str, rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Return the result of every rank of each job. The jobs run one after the other in one group of processes."""
    (out / f"{name}.json").write_text(json.dumps(rows))
    ranks = max(row["ranks"] for row in rows)
    run_workers("worker_exchange.py", ranks, out, name, timeout=240.0)
    found = [torch.load(out / f"{name}.{rank}.pt", weights_only=False) for rank in range(ranks)]
    return {row["name"]: [found[rank][row["name"]] for rank in range(row["ranks"])] for row in rows}


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[dict[str, Any]]]]:
    """A worker that published, the other on one rank, and the first one started again with other cuts."""
    out = tmp_path_factory.mktemp("exchange")
    return out, play(out, "jobs", ROWS)


READERS = ["one", "even", "last", "whole", "three"]


@pytest.mark.parametrize("name", READERS)
def test_every_rank_gets_its_pieces_of_the_same_model(jobs: Any, name: str) -> None:
    for found in jobs[1][name]:
        check(found)


def check(found: dict[str, Any]) -> None:
    """A rank is left with its pieces of what both workers have made."""
    assert "error" not in found, found["error"]
    (first, first_kept), (second, second_kept) = tensors(0), tensors(1)
    for tensor, (_, partition, is_entry) in TENSORS.items():
        wanted = (first, second)[partition][tensor] if partition is not None else None
        if wanted is None:
            wanted = ((first[tensor].double() + second[tensor].double()) / 2).float()
        start, numel = found["where"][tensor]
        if is_entry:
            kept = (first_kept | second_kept)[tensor]
            wanted = torch.where(kept, wanted, torch.zeros(()))
            assert torch.equal(found["bits"][tensor], bitmask.pack(kept[start : start + numel]))
        else:
            assert found["bits"][tensor] is None
        assert torch.equal(found["pieces"][tensor], wanted[start : start + numel])
    assert found["pieces"]["steps"].tolist() == [100]


def test_a_rank_without_pieces_takes_part(jobs: Any) -> None:
    assert all(jobs[1]["last"][0]["where"][tensor] == (0, 0) for tensor in TENSORS)


def test_a_job_that_was_started_again_writes_nothing(jobs: Any) -> None:
    size = (jobs[0] / "exchange" / "round_0" / "worker_0.safetensors").stat().st_size
    assert [found["written"] for found in jobs[1]["published"]] == [size, size]
    assert [found["written"] for name in ("even", "last", "whole") for found in jobs[1][name]] == [0] * 6


def test_the_ranks_together_read_each_byte_once_and_the_checked_ones_twice(jobs: Any) -> None:
    folder = jobs[0] / "exchange" / "round_0"
    files = [(folder / f"worker_{worker}.safetensors").read_bytes() for worker in (0, 1)]
    headers = sum(8 + int.from_bytes(data[:8], "little") for data in files)
    once = sum(map(len, files)) - headers
    steps = 8  # a buffer, which every rank reads
    assert {found["read"] for found in jobs[1]["one"]} == {2 * once + headers}
    assert {found["read"] for found in jobs[1]["last"]} == {2 * once + headers + steps}
    # Bytes of a mask that a cut goes through are read by both ranks.
    for name, ranks in (("even", 2), ("three", 3)):
        for found in jobs[1][name]:
            assert 0 <= found["read"] - (2 * once + headers) - steps * (ranks - 1) <= 3 * (ranks - 1)


def test_all_ranks_give_up_alike(jobs: Any) -> None:
    found = jobs[1]["alone"]
    assert found[0]["error"] == found[1]["error"]
    assert found[0]["error"].startswith("TimeoutError: round 0: worker 0 of 2 did not publish in ")


def test_a_rank_without_memory_for_a_piece_ends_all_ranks_at_once(jobs: Any) -> None:
    found = jobs[1]["broken"]
    assert len({rank["error"] for rank in found}) == 1
    assert found[0]["error"].startswith("ValueError: RuntimeError: ")
    assert list((jobs[0] / "elsewhere").glob("round_*/worker_0*")) == []


@pytest.mark.full
def test_two_processes_meet_at_a_url_and_one_is_killed_while_it_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a file lies in its place then; it does not count, and is written again."""
    monkeypatch.setenv("SHARED_ROOT", str(tmp_path / "remote"))
    spawn = multiprocessing.get_context("spawn")

    def start(worker: int, dies: bool) -> Any:
        row = {"worker": worker, "cut": "even", "folder": "shared://exchange", "timeout": 60.0, "publish_only": False}
        process = spawn.Process(target=alone, args=(row, tmp_path, dies))
        process.start()
        return process

    running = [start(0, dies=True), start(1, dies=False)]
    try:
        running[0].join(120)
        folder = tmp_path / "remote" / "exchange" / "round_0"
        assert running[0].exitcode == -signal.SIGKILL
        half = (folder / "worker_0.safetensors").read_bytes()
        assert not (folder / "worker_0.json").exists()
        end = time.monotonic() + 60
        while not (folder / "worker_1.json").exists() and time.monotonic() < end:
            time.sleep(0.05)
        assert running[1].exitcode is None
        running.append(start(0, dies=False))
        for process in running[1:]:
            process.join(120)
            assert process.exitcode == 0
    finally:
        for process in running:
            process.kill()
    whole = (folder / "worker_0.safetensors").read_bytes()
    assert 0 < len(half) < len(whole) == json.loads((folder / "worker_0.json").read_text())["bytes"]
    for worker in (0, 1):
        check(torch.load(tmp_path / f"alone.{worker}.pt", weights_only=False))


@pytest.mark.full
def test_two_jobs_that_run_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ports = iter((23461, 23467))  # both would look for a free one at the same moment
    monkeypatch.setattr("launch.free_port", lambda: next(ports))
    rows = [{**ROW, "name": str(worker), "worker": worker, "ranks": 2 - worker, "cut": "even"} for worker in (0, 1)]
    folders = [tmp_path / "first", tmp_path / "second"]
    with ThreadPoolExecutor(2) as pool:
        running = []
        for folder, row in zip(folders, rows, strict=True):
            folder.mkdir()
            row["folder"] = str(tmp_path / "exchange")
            running.append(pool.submit(play, folder, "job", [row]))
        pieces = [rank["pieces"] for rank in running[0].result()["0"]]
        whole = running[1].result()["1"][0]["pieces"]
    for tensor in TENSORS:
        assert torch.equal(torch.cat([rank[tensor] for rank in pieces]), whole[tensor])
