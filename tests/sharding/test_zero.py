"""Parity and invariants over DeepSpeed's stages, DDP and plain PyTorch: every row really trained by 2 processes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import parity
import pytest
import torch
from launch import run_workers
from parity import result
from safetensors.torch import load_file
from table_rows import marked, needed

import toy  # isort: skip


def row(name: str, stage: int | None, dtype: str, optimizer: str, **options: Any) -> dict[str, Any]:
    """A run, and the reference that it must equal.

    Stages 0 and 1, and DDP, average gradients after the last micro-batch; stages 2 and 3 after each.
    Where a parameter gets no gradient, DDP leaves it alone and DeepSpeed's flat buffers take zeros. Stage 3 and
    offloading take whatever gradient is left from the step before (DeepSpeed 0.19.8), so those rows use all parameters.
    """
    stale = stage == 3 or options.get("offload", False)
    arguments = {
        "optimizer_name": optimizer,
        "unused_is_zero": stage is not None,
        "skip": not stale,
        "every_micro_batch": stage in (2, 3),
    }
    reference = "_".join(["reference", *map(str, arguments.values())])
    work = "fp16" if dtype == "fp16" else "run"
    run = {"name": name, "stage": stage, "dtype": dtype, "optimizer": optimizer, "work": work, **options}
    return run | {"reference": reference, "reference_arguments": arguments}


#: Stages and precisions of the rows in which a block is frozen in mid-run.
FROZEN = [(1, "bf16"), (2, "bf16"), (3, "bf16"), (3, "fp32")]
ROWS = [row(f"ddp_{optimizer}", None, "fp32", optimizer) for optimizer in ("adamw", "sgd")]
ROWS += [row(f"zero{stage}_{dtype}", stage, dtype, "adamw") for stage in (0, 1, 2, 3) for dtype in ("fp32", "bf16")]
ROWS += [
    row(f"zero{stage}_{dtype}_offload", stage, dtype, "adamw", offload=True)
    for stage in (1, 2, 3)
    for dtype in ("fp32", "bf16")
]
ROWS += [row(f"zero{stage}_fp32_sgd", stage, "fp32", "sgd") for stage in (0, 1, 2, 3)]
ROWS += [row(f"zero3_{dtype}_persistent", 3, dtype, "adamw", persistence=10**5) for dtype in ("fp32", "bf16")]

ROWS += [row(f"zero{stage}_fp32_packed", stage, "fp32", "adamw", packed=True) for stage in (0, 1, 2, 3)]
ROWS += [row(f"zero{stage}_bf16_packed", stage, "bf16", "adamw", packed=True) for stage in (0, 1, 2, 3)]
ROWS += [row(f"zero{stage}_fp32_packed_offload", stage, "fp32", "adamw", packed=True, offload=True) for stage in (2, 3)]
ROWS += [row("zero3_fp32_packed_sgd", 3, "fp32", "sgd", packed=True)]
ROWS += [row("zero3_fp32_hpz", 3, "fp32", "adamw", hpz=2)]
ROWS += [row("zero3_fp32_beside_hpz", 3, "fp32", "adamw", beside_hpz=True)]

FP16 = [row(f"zero{stage}_fp16", stage, "fp16", "adamw") for stage in (0, 1, 2, 3)]

FREEZING = [row(f"freezing_zero{stage}_{dtype}", stage, dtype, "adamw", work="freezing") for stage, dtype in FROZEN]
EPOCHS = [row(f"epochs_zero{stage}", stage, "fp32", "adamw", work="epochs") for stage in (1, 3)]

BY_NAME = {run["name"]: run for run in ROWS + FP16 + FREEZING + EPOCHS}
#: One row of each precision for every stage. Persistent parameters are published in their own way.
SHORT = ["ddp_adamw", *(f"zero{stage}_{dtype}" for stage in (0, 1, 2, 3) for dtype in ("fp32", "bf16"))]
SHORT += ["zero2_fp32_packed", "zero2_fp16", "zero3_fp32_persistent", "freezing_zero2_bf16", "epochs_zero1"]


def names(kept: Callable[[dict[str, Any]], bool]) -> list[Any]:
    of_kind = [name for name, run in BY_NAME.items() if kept(run)]
    return marked(of_kind, [name for name in SHORT if name in of_kind])


NAMES = names(lambda run: run["work"] == "run")
EXACT = names(lambda run: run["work"] == "run" and run["dtype"] == "fp32")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    out = tmp_path_factory.mktemp("zero")
    (out / "rows.json").write_text(json.dumps([BY_NAME[name] for name in needed(request, "name")]))
    run_workers("worker_zero.py", 2, out)
    return out


def reference(out: Path, name: str) -> dict[str, Any]:
    found = result(out, BY_NAME[name]["reference"])
    return parity.of_kept(found) if BY_NAME[name].get("packed") else found


@pytest.mark.parametrize("name", NAMES)
def test_invariants_hold_after_every_step(trained: Path, name: str) -> None:
    """Pruned weights are 0 in fp32 and working copies, budgets exact, masks by a stable sort, steps counted once."""
    for rank in (0, 1):
        assert result(trained, name, rank)["wrong"] == []
    assert len(result(trained, name)["masks"]) == 5


@pytest.mark.parametrize("name", EXACT)
def test_fp32_equals_the_independent_reference_bit_for_bit(trained: Path, name: str) -> None:
    ours, reference_ = result(trained, name), reference(trained, name)
    for got, wanted in zip(ours["masks"], reference_["masks"], strict=True):
        assert got.keys() == wanted.keys()
        assert all(torch.equal(got[n], wanted[n]) for n in wanted)
    assert ours["losses"] == reference_["losses"]
    for key, weight in ours["weights"].items():
        assert torch.equal(weight, reference_["weights"][key]), key
    for key, moments in ours["moments"].items():
        assert len(moments) == len(reference_["moments"][key]) > 0
        assert all(torch.equal(a, b) for a, b in zip(moments, reference_["moments"][key], strict=True)), key


@pytest.mark.parametrize("name", NAMES)
def test_both_ranks_agree(trained: Path, name: str) -> None:
    first, second = result(trained, name, 0), result(trained, name, 1)
    for a, b in zip(first["masks"], second["masks"], strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("name", NAMES)
def test_resume_in_mid_phase_equals_never_having_stopped(trained: Path, name: str) -> None:
    straight = result(trained, name)
    resumed = straight["resumed"]
    for key, weight in straight["weights"].items():
        assert torch.equal(weight, resumed["weights"][key]), key
        assert all(torch.equal(a, b) for a, b in zip(straight["moments"][key], resumed["moments"][key], strict=True)), (
            key
        )
    assert all(torch.equal(resumed["masks"][n], mask) for n, mask in straight["masks"][-1].items())


@pytest.mark.parametrize("name", NAMES)
def test_export_is_the_final_sparse_model(trained: Path, name: str) -> None:
    ours = result(trained, name)
    exported = load_file(trained / "final" / name / "model.safetensors")
    for key, weight in ours["weights"].items():
        assert torch.equal(exported[key], weight.view(exported[key].shape)), key
    assert "frozen.weight" in exported
    info = json.loads((trained / "final" / name / "gap.json").read_text())
    assert info["kept"] == 8 * 118 and all(row["nonzero"] == 118 for row in info["entries"].values())


@pytest.mark.parametrize("name", NAMES)
def test_export_in_mid_phase_prunes_the_dense_partition_in_the_copy(trained: Path, name: str) -> None:
    # That the run itself is not disturbed is shown by every other test: all rows export in step 4.
    exported = load_file(trained / "mid" / name / "model.safetensors")
    for block in range(toy.BLOCKS):
        for matrix in ("fc1", "fc2"):
            assert int(exported[f"layers.{block}.{matrix}.weight"].count_nonzero()) == 118


@pytest.mark.parametrize("name", NAMES)
def test_a_mask_takes_one_bit_per_owned_weight(trained: Path, name: str) -> None:
    run, total = BY_NAME[name], 0
    for rank in (0, 1):
        bits, weights, masks = result(trained, name, rank)["mask_bits"]
        assert bits <= weights + 7 * masks  # a piece ends in the middle of a byte at most once
        total += weights
    shares = 2 if run["stage"] in (None, 0) and run["dtype"] == "fp32" else 1
    assert total >= 8 * 592 * shares


@pytest.mark.parametrize("name", NAMES)
def test_a_boundary_sends_counts_and_no_weights(trained: Path, name: str) -> None:
    for sums, other in result(trained, name)["traffic"]:
        # 4 entries leave their partition: three histograms, whose size does not depend on the weights.
        assert sums == [(4 + 1, 2048), (4, 1024), (4, 1024)]
        # The ranks compare 4 numbers of their position; where each has all masks, also one number for those.
        assert all(call in ("all_gather 4", "all_gather 1") for call in other)


@pytest.mark.parametrize("name", names(lambda run: run["work"] == "freezing"))
def test_a_block_that_is_frozen_in_mid_run_stays_exact_and_is_named(trained: Path, name: str) -> None:
    """Masks hold, files have the fp32 weights and not the working copies, and one warning names the first entry."""
    for rank in (0, 1):
        ours = result(trained, name, rank)
        assert ours["wrong"] == [] and ours["kept"] == 8 * 118
        frozen = [text for text in ours["warned"] if "frozen since the engine was built." in text]
        assert len(frozen) == (rank == 0) and all(
            text.startswith("layers.0.fc1.weight and 1 others") for text in frozen
        )
    ours = result(trained, name)
    exported = load_file(trained / "final" / name / "model.safetensors")
    middle = load_file(trained / "mid" / name / "model.safetensors")
    pieces = [
        load_file(path) for path in (trained / "checkpoints" / name / "step_5" / "gap").glob("portable_*.safetensors")
    ]
    for block in range(toy.BLOCKS):
        key = f"layers.{block}.fc1.weight"
        assert torch.equal(exported[key], ours["weights"][key].view(exported[key].shape))
        kept = middle[key] != 0
        assert torch.equal(middle[key][kept], ours["saved"][key].view(middle[key].shape)[kept])
        assert not torch.equal(middle[key], middle[key].bfloat16().float())
        portable = torch.cat([tensors[f"weight:{key}"] for tensors in pieces if f"weight:{key}" in tensors])
        assert portable.numel() == 592 and portable.count_nonzero() == ours["saved"][key].count_nonzero()
        assert not torch.equal(portable, portable.bfloat16().float())


@pytest.mark.parametrize("name", names(lambda run: run["work"] == "epochs"))
def test_epochs_are_counted_in_batches(trained: Path, name: str) -> None:
    ours = result(trained, name)
    assert ours["phases"] == [1, 2, 2, 2] and ours["applied"] == 8 and ours["finished"] and ours["none"] == []
    assert any("steps_per_epoch=8: counts updates, and an update has 4 micro-batches" in t for t in ours["warned"])


@pytest.mark.parametrize("name", names(lambda run: run["work"] == "fp16"))
def test_a_step_skipped_for_an_fp16_overflow_is_no_step(trained: Path, name: str) -> None:
    """The loss scale starts so high that DeepSpeed skips steps; those are not counted, and masks hold all the same."""
    for rank in (0, 1):
        seen = result(trained, name, rank)
        assert seen["wrong"] == []
        skipped, applied = seen["counts"][-1]
        # DeepSpeed's wrapper of stage 0 does not read the initial scale from the config, and skips nothing here.
        assert (skipped > 0 or name == "zero0_fp16") and applied >= 3 and skipped + applied == 12
        assert seen["phase"] == applied // 3


def test_combinations_that_would_train_with_wrong_masks_are_refused(trained: Path) -> None:
    for rank in (0, 1):
        said = result(trained, "refusals", rank)
        assert "zero_optimization.round_robin_gradients=True is not supported" in said["round_robin"]
        assert "Set it to false." in said["round_robin"]
        assert "zero_optimization.offload_optimizer.ratio=0.5 is not supported" in said["twin flow"]
        assert "gradient_clipping: has no effect with a DeepSpeed engine" in said["two owners"]
        assert "checkpoint.load_universal=True is not supported: it restores whole state" in said["universal"]


@pytest.mark.parametrize("name", names(lambda run: run.get("packed") and run["stage"] == 3))
def test_deepspeeds_access_to_packed_state_is_an_error_that_names_another(trained: Path, name: str) -> None:
    for rank in (0, 1):
        assert "Read optimizer.state_dict(), which has whole tensors" in result(trained, name, rank)["said"]


@pytest.mark.full
def test_deepspeed_cpu_adam(tmp_path: Path) -> None:
    """Invariants with DeepSpeedCPUAdam, which torch compiles for about a minute at its first use.

    Its extension keeps powers of the betas by repeated products and computes them afresh after a resume, so a resumed
    run differs in the last bits, with or without masks.
    """
    rows = [row(f"zero{stage}_{dtype}_cpu_adam", stage, dtype, "cpu_adam", offload=True) for stage, dtype in CPU_ADAM]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    run_workers("worker_zero.py", 2, tmp_path)
    for run in rows:
        test_invariants_hold_after_every_step(tmp_path, run["name"])


CPU_ADAM = [(2, "fp32"), (2, "bf16"), (3, "bf16")]


@pytest.mark.parametrize("name", NAMES)
def test_checkpoints_are_exported_without_their_ranks(trained: Path, name: str) -> None:
    """Frozen weights, too, of which ZeRO-1 has none among its optimizer's; ZeRO-0 is refused with the way out."""
    reason = parity.export_offline(trained, name)
    if BY_NAME[name]["stage"] == 0:
        assert reason is not None and "ZeRO-1, -2 and -3 alone" in reason
    else:
        assert reason is None
