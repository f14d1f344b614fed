"""Jobs of a run, each an engine: killed, restarted, of another run or model."""

from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from exchanging import same
from torch import Tensor, nn

from gap_ds import GaPEngine
from gap_ds.parallel import ParallelWorker


class Layers(nn.Module):
    """Two blocks, one for each partition, between an embedding and a norm."""

    def __init__(self, vocabulary: int = 5, norm: type[nn.Module] = nn.LayerNorm, counter: torch.dtype = torch.int64):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, 6)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(6, 6)) for _ in range(2))
        self.norm = norm(6)
        self.register_buffer("counter", torch.ones((), dtype=counter))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = x + layer(x).tanh()
        return self.norm(x).square().mean()


PARALLEL = {"method": "parallel", "sparsity": 0.5, "phase_steps": 3, "rounds": 2, "partitions": 2, "finetune_steps": 1}


def engine(folder: Path, worker: int, seed: int = 0, resume: bool = False, **built: Any) -> GaPEngine:
    torch.manual_seed(seed)
    model = Layers(**built)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    me = ParallelWorker(worker, str(folder), timeout=30.0, resume=resume)
    return GaPEngine(model, PARALLEL, optimizer=optimizer, worker=me)


def train(job: GaPEngine, last: int | None = None) -> GaPEngine:
    """To the step before `last`, or to the end."""
    while not job.finished and job.applied_steps != last:
        random = torch.Generator().manual_seed(10 * job.applied_steps + job.worker.index)
        job.backward(job(torch.randint(5, (4,), generator=random)))
        job.step()
    return job


def both(*jobs: GaPEngine) -> list[dict[str, Tensor]]:
    """Return the final states of two workers that train at the same time."""
    with ThreadPoolExecutor(2) as pool:
        return [dict(job.module.state_dict()) for job in pool.map(train, jobs)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("undisturbed")
    return both(engine(folder, 0), engine(folder, 1))


def equal(found: list[dict[str, Tensor]], wanted: list[dict[str, Tensor]]) -> bool:
    return all(same(a[name], b[name]) for a, b in zip(found, wanted, strict=True) for name in b)


def test_a_second_run_in_the_same_folder_is_refused_in_its_first_step(tmp_path: Path) -> None:
    both(engine(tmp_path, 0), engine(tmp_path, 1))
    for worker in (0, 1):
        job = engine(tmp_path, worker)
        with pytest.raises(ValueError, match=rf"worker_{worker}.json: worker {worker} published round 0 at 20.*, and "):
            train(job)
        assert job.applied_steps == 0
        for resume in (False, True):  # a job with other first weights never belongs to this run
            job = engine(tmp_path, worker, seed=1, resume=resume)
            with pytest.raises(ValueError, match="published round 0 at" if not resume else "began at 20.* with other"):
                train(job)


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_a_worker_that_is_killed_before_it_has_published_joins_again(
    tmp_path: Path, undisturbed: list[dict[str, Tensor]], steps: int
) -> None:
    train(engine(tmp_path, 0), last=steps)
    assert equal(both(engine(tmp_path, 0), engine(tmp_path, 1)), undisturbed)


@pytest.mark.parametrize("way", ["resume", "checkpoint"])
def test_a_worker_that_is_killed_after_it_has_published_joins_again(
    tmp_path: Path, undisturbed: list[dict[str, Tensor]], way: str
) -> None:
    """Without a checkpoint it needs `resume=True`: from the same weights, it repeats its first steps."""
    folder, saved = tmp_path / "exchange", tmp_path / "saved"
    first = train(engine(folder, 0), last=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        first.save_checkpoint(saved)
    second = engine(folder, 1)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(train, second)
        train(first, last=3)  # has published round 0, and is lost
        again = engine(folder, 0, seed=0 if way == "resume" else 1, resume=way == "resume")
        if way == "checkpoint":
            again.load_checkpoint(saved)
        train(again)
        running.result()
    assert equal([dict(job.module.state_dict()) for job in (again, second)], undisturbed)


def test_a_job_can_go_back_to_a_checkpoint_before_a_round_it_has_published(
    tmp_path: Path, undisturbed: list[dict[str, Tensor]]
) -> None:
    jobs = [engine(tmp_path / "exchange", worker) for worker in (0, 1)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        train(jobs[0], last=2).save_checkpoint(tmp_path / "saved")
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(train, jobs[1])
        train(jobs[0], last=4).load_checkpoint(tmp_path / "saved")
        train(jobs[0])
        running.result()
    assert equal([dict(job.module.state_dict()) for job in jobs], undisturbed)


@pytest.mark.parametrize("built", [{"vocabulary": 7}, {"norm": nn.BatchNorm1d}, {"counter": torch.int32}])
def test_a_model_that_differs_beside_its_entries_is_refused_at_the_start(tmp_path: Path, built: dict[str, Any]) -> None:
    engine(tmp_path, 0)
    with pytest.raises(ValueError, match=r"another run: tensors \w+ \(here \w+\), so a vocabulary, a norm, a bias or"):
        engine(tmp_path, 1, **built)


def test_frozen_weights_must_be_equal_too(tmp_path: Path) -> None:
    jobs = []
    for worker in (0, 1):
        torch.manual_seed(0)
        model = Layers()
        model.embedding.requires_grad_(False).weight.add_(worker)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        me = ParallelWorker(worker, str(tmp_path))
        jobs.append(GaPEngine(model, PARALLEL, optimizer=optimizer, worker=me))
    train(jobs[0], 1)
    with pytest.raises(ValueError, match="with other weights than worker 1 now"):
        train(jobs[1], 1)


def test_an_optimizer_that_averages_its_weights_is_refused(tmp_path: Path) -> None:
    model = Layers()
    optimizer = torch.optim.ASGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match='method="parallel": is not supported with optimizer=ASGD, which averages'):
        GaPEngine(model, PARALLEL, optimizer=optimizer, worker=ParallelWorker(0, str(tmp_path)))


@pytest.mark.parametrize("started", ["3", "1", "two"])
def test_another_number_of_workers_than_partitions_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, started: str
) -> None:
    monkeypatch.setenv("GAP_DS_WORKERS", started)
    with pytest.raises(ValueError) as caught:
        engine(tmp_path, 0)
    assert str(caught.value) == (
        f"GAP_DS_WORKERS={started}: as many workers were started, and there are 2 partitions, one for each worker. "
        'Start 2 (gap-ds parallel --workers 2), or change "partitions".'
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("started", ["2", ""])
def test_as_many_workers_as_partitions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, started: str) -> None:
    monkeypatch.setenv("GAP_DS_WORKERS", started)
    engine(tmp_path, 0)
    monkeypatch.setenv("GAP_DS_WORKERS", "5")  # no matter of other methods
    model = Layers()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    GaPEngine(model, {**PARALLEL, "method": "cyclic"}, optimizer=optimizer)
