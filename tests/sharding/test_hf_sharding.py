"""GaPCallback in real Trainers on 2 processes: DDP, ZeRO, FSDP1 and FSDP2, against one training by a GaPEngine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from launch import run_workers
from parity import result
from safetensors.torch import load_file
from table_rows import marked, needed

from gap_ds.export.from_checkpoint import export_checkpoint, find_whole

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def row(name: str, kind: str, stage: int = 0, fsdp: int = 0, **options: Any) -> dict[str, Any]:
    """A run. Causal rows are resumed from the end of an epoch, seq2seq rows from a boundary in the middle of one."""
    saved = 3 if kind == "seq2seq" else 4
    return {"name": f"{name}_{kind}", "kind": kind, "stage": stage, "fsdp": fsdp, "saved": saved, "options": options}


ROWS = [
    run
    for kind in ("causal", "seq2seq")
    for run in (
        row("ddp", kind),
        row("zero2", kind, stage=2),
        row("zero3", kind, stage=3),
        row("fsdp1", kind, fsdp=1),
        row("fsdp2", kind, fsdp=2),
    )
]
#: With another arithmetic than the loop that the others are compared with.
MORE = [
    row("zero1_accumulating", "causal", stage=1, gradient_accumulation_steps=2, max_grad_norm=1.0),
    row("zero3_bf16", "causal", stage=3, bf16=True),
]
BY_NAME = {run["name"]: run for run in ROWS + MORE}
#: DeepSpeed and FSDP once, and both kinds of model.
SHORT = ["zero3_causal", "fsdp2_seq2seq"]
NAMES, ALL = marked([run["name"] for run in ROWS], SHORT), marked(BY_NAME, SHORT)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    out = tmp_path_factory.mktemp("hf")
    (out / "rows.json").write_text(json.dumps([BY_NAME[name] for name in needed(request, "name")]))
    run_workers("worker_hf.py", 2, out)
    return out


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name", ALL)
def test_masks_hold_after_every_optimizer_step(trained: Path, name: str) -> None:
    """As whole weights show it, by the library's own means, before and after boundaries; each step is counted once."""
    for rank in (0, 1):
        assert result(trained, name, rank)["wrong"] == []
    assert result(trained, name)["backend"] == name.partition("_")[0]


#: Rows whose weights end in other last bits than those of DistributedDataParallel, though their masks are the same.
NEARLY = ("zero3_causal", "zero3_seq2seq", "fsdp2_seq2seq")


@pytest.mark.parametrize("name", NAMES)
def test_the_callback_equals_an_engine(trained: Path, name: str) -> None:
    ours, wanted = result(trained, name), result(trained, f"engine_{BY_NAME[name]['kind']}")
    assert sorted(ours["masks"]) == [1, 3, 6, 9]
    for step, masks in ours["masks"].items():
        assert equal(wanted["masks"][step], masks), step
    for key, weight in wanted["state"]["weights"].items():
        got = ours["state"]["weights"][key]
        assert torch.allclose(got, weight, rtol=0, atol=1e-6) if name in NEARLY else torch.equal(got, weight), key


@pytest.mark.parametrize("name", ALL)
def test_resuming_equals_never_having_stopped(trained: Path, name: str) -> None:
    straight, saved = result(trained, name), BY_NAME[name]["saved"]
    resumed = straight["resumed"]
    assert min(resumed["masks"]) == saved + 1
    for step, masks in resumed["masks"].items():
        assert equal(straight["masks"][max(s for s in straight["masks"] if s <= step)], masks), step
    assert equal(straight["state"]["weights"], resumed["state"]["weights"])
    for key, moments in straight["state"]["moments"].items():
        assert all(torch.equal(a, b) for a, b in zip(moments, resumed["state"]["moments"][key], strict=True)), key


@pytest.mark.parametrize("name", ALL)
def test_the_saved_model_is_exactly_sparse(trained: Path, name: str) -> None:
    ours = result(trained, name)
    kind = {"causal": transformers.LlamaForCausalLM, "seq2seq": transformers.BartForConditionalGeneration}
    loaded = dict(kind[BY_NAME[name]["kind"]].from_pretrained(trained / name / "final").named_parameters())
    assert all(int(loaded[entry].count_nonzero()) == keep for entry, keep in ours["keep"].items())
    for key, weight in ours["state"]["weights"].items():
        assert torch.equal(loaded[key].float(), weight.to(loaded[key].dtype).float().view(loaded[key].shape)), key


@pytest.mark.parametrize("name", ALL)
def test_a_checkpoint_is_exported_without_its_ranks(trained: Path, name: str, tmp_path: Path) -> None:
    """From the files of the Trainer, of DeepSpeed or of FSDP beside the masks; the dense partition is pruned."""
    folder, keep = trained / name / f"checkpoint-{BY_NAME[name]['saved']}", result(trained, name)["keep"]
    path = find_whole(folder)
    assert path == folder
    export_checkpoint(path, tmp_path / "model", progress=lambda *_: None)
    weights = load_file(tmp_path / "model" / "model.safetensors")
    assert {entry: int(weights[entry].count_nonzero()) for entry in keep} == keep
    masks = result(trained, name)["masks"]
    for entry, mask in masks[max(step for step in masks if step <= BY_NAME[name]["saved"])].items():
        assert torch.equal(weights[entry].flatten() != 0, mask.flatten()), entry


@pytest.mark.parametrize("name", NAMES)
def test_the_log_has_phase_and_density(trained: Path, name: str) -> None:
    rows = result(trained, name)["log"]
    assert [(row["step"], row["gap/phase"], row["gap/partition"]) for row in rows] == [
        (3, 1, 1),
        (6, 2, -1),
        (9, 2, -1),
    ]
    assert rows[0]["gap/density"] > rows[1]["gap/density"] == pytest.approx(0.25, abs=1e-3)
