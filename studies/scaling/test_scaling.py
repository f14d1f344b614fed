"""scaling_model.py against the code that it models, and README.md against the committed fit: `pytest studies`."""

from __future__ import annotations

import doctest
import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
NAMES = ("scaling", "scaling_model", "scaling_network", "scaling_points")


@pytest.fixture(scope="module")
def code() -> Iterator[Any]:
    """The modules, by their names without `scaling_`. They are unloaded afterwards."""
    before, path = set(sys.modules), list(sys.path)
    sys.path.insert(0, str(HERE))
    try:
        yield SimpleNamespace(**{name.removeprefix("scaling_"): importlib.import_module(name) for name in NAMES})
    finally:
        sys.path[:] = path
        folders = str(HERE), str(HERE.parents[1] / "benchmarks")
        for name in set(sys.modules) - before:
            if str(getattr(sys.modules[name], "__file__", None)).startswith(folders):
                del sys.modules[name]


def test_rows_and_page_come_from_the_committed_fit(code: Any) -> None:
    assert not code.scaling.check(), "run `python studies/scaling/scaling.py --again`"


def test_it_runs_at_a_small_size(code: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run compares the masks of 4 simulated ranks with those of one, and the bytes sent with the forecast."""
    monkeypatch.setattr(sys, "argv", [str(HERE / "scaling.py"), "--quick", "--out", str(tmp_path)])
    assert code.scaling.main() == 0
    result = json.loads((tmp_path / "scaling.json").read_text(encoding="utf-8"))
    assert result["command"] == "python studies/scaling/scaling.py --quick" and result["rows"]
    assert (tmp_path / "scaling.png").stat().st_size > 1000


def test_examples(code: Any) -> None:
    for module in (code.scaling, code.model, code.network, code.points):
        assert not doctest.testmod(module).failed


def fitted(code: Any, **changes: float) -> Any:
    core = code.model.Work(7e-9, 1e-4, 3e-4, 1e-3, 5e-10, 1e-5)
    return code.model.Fitted(
        **({"core": core, "crc_byte": 1e-9, "sha_byte": 1e-9, "row": 1e-6, "spread": 1e-6} | changes)
    )


def row(code: Any, name: str, backend: str, ranks: int, **changes: float) -> Any:
    model = next(m for m in code.model.MODELS if m.name == name)
    return code.model.row(model, backend, ranks, fitted(code, **changes), code.model.Assumed())


@pytest.mark.parametrize("ranks", [8, 64, 500])
@pytest.mark.parametrize("backend", ["fsdp2", "zero2", "zero3"])
def test_the_layout_is_that_of_the_cut_model(code: Any, backend: str, ranks: int) -> None:
    """The busiest rank of a model cut weight by weight has the modelled share, up to rounding."""
    layers, rows, width = 48, 512, 4
    model = code.model.Model("", 3 * layers * rows * width, 3 * layers, rows, tokens=1, matrices=1)
    places = list(code.points.cuts(backend, ranks, model.pruned, model.entries))
    if backend == "fsdp2":
        per_rank = -(-rows // ranks) * width
        size = rows * width
        cut = [(min(r * per_rank, size), min((r + 1) * per_rank, size)) for r in range(ranks)]
        places = [[piece] * model.entries for piece in cut]
    owned = [sum(hi - lo for lo, hi in place) for place in places]
    assert sum(owned) == model.pruned
    found = code.model.layout(backend, model, ranks)
    assert max(owned) == pytest.approx(found.pruned, rel=0.02, abs=model.entries)
    pieces = max(sum(hi > lo for lo, hi in place) for place in places)
    assert pieces <= found.pieces <= pieces + 1
    holders = max(sum(hi > lo for lo, hi in entry) for entry in zip(*places, strict=True))
    assert holders <= found.holders <= holders + 1


def test_published_bytes(code: Any) -> None:
    """ZeRO-2: all weights in 16 bits except the rank's share, as in every step. Other backends: nothing."""
    assert row(code, "7B", "zero2", 64)["publish_MB"] == pytest.approx(2 * 7e9 * 63 / 64 / 1e6)
    assert 0 < row(code, "7B", "zero3", 64)["publish_MB"] < 1
    for backend in ("ddp", "hsdp", "fsdp1", "fsdp2"):
        assert row(code, "7B", backend, 64)["publish_MB"] == 0


def test_a_flat_buffer_makes_one_rank_do_all_of_it(code: Any) -> None:
    """K times an even share in a selection, no moments to clear: the grown weights lie on other ranks."""
    for changes in ({"core": code.model.Work(1.0, 0, 0, 0, 0, 0)}, {"core": code.model.Work(0, 0, 0, 0, 1.0, 0)}):
        flat, even = (row(code, "7B", backend, 64, **changes)["own_core_s"] for backend in ("zero2", "zero3"))
        assert flat == pytest.approx(3 * even if changes["core"].select_weight else even)


def test_hybrid_shard_groups(code: Any) -> None:
    """Own work, counts and ties depend on the group alone; only the checks depend on all ranks."""
    small, large = (row(code, "7B", "hsdp", ranks) for ranks in (64, 4096))
    for key in ("own_core_s", "own_accelerator_s", "counts_s", "ties_s", "mask_MB", "shard_group"):
        assert small[key] == large[key]
    assert small["checks_s"] < large["checks_s"]
    alone = row(code, "1B", "ddp", 4096)
    assert alone["counts_s"] == alone["ties_s"] == alone["counts_MB"] == 0 and alone["shard_group"] == 1


def test_nothing_of_a_selection_grows_with_the_ranks_but_latency(code: Any) -> None:
    small, large = (row(code, "405B", "fsdp2", ranks) for ranks in (512, 16384))
    assert small["counts_MB"] == large["counts_MB"] and small["ties_MB"] == large["ties_MB"]
    assert large["ties_s"] < 2 * small["ties_s"]


def test_the_yardstick_is_arithmetic(code: Any) -> None:
    """Llama 3 405B: 16 M tokens a step, 16,384 accelerators at 400 TFLOP/s each (arXiv 2407.21783, table 4)."""
    assert row(code, "405B", "fsdp2", 16384)["step_s"] == pytest.approx(6, rel=0.05)


def test_all_reduce_and_all_gather(code: Any) -> None:
    net = code.model.Network(latency=1.0, bandwidth=8.0)
    assert net.ring_s(16, 2) == 2 * (1 + 8 / 8) and net.tree_s(16, 2) == 2 * (1 + 16 / 8)
    assert net.reduce_s(16, 1024) == net.tree_s(16, 1024) == 2 * 10 * (1 + 16 / 8) < net.ring_s(16, 1024)
    assert net.reduce_s(16, 2) == net.ring_s(16, 2)
    assert net.gather_s(8, 4) == 2 + 3
