"""Puts subtle faults into a copy of the package, one at a time, and says which of them the tests find.

python tests/mutants.py [NAME ...]      all faults, or some; the exit status is 1 if one is not found
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT = 600  # seconds for the tests of one fault
UPDATES = "tests/unit/training/test_updates.py::"
BETWEEN = "tests/unit/training/test_between_updates.py::"
CONSISTENCY = "tests/unit/training/test_consistency.py::"
SHARDING = "tests/sharding/test_"


@dataclass(frozen=True)
class Fault:
    """A text of the package that occurs once, what stands in its place then, and the tests that fail then."""

    text: str
    wrong: str
    tests: tuple[str, ...]


FAULTS = {
    "temperature_forgotten": Fault(
        "    return temperature**2 * total", "    return total", ("tests/unit/test_distill.py::test_logits",)
    ),
    "padding_counts": Fault(
        "    return rows if places is None else rows[places.to(rows.device)]\n",
        "    return rows\n",
        ("tests/unit/test_distill.py::test_padding_is_ignored",),
    ),
    "norm_of_this_rank": Fault(
        "            norm = comm.sum(norm).to(norm.device)\n",
        "            norm = comm.size * norm\n",
        (SHARDING + "distill_sharding.py::test_losses_and_weights_are_those_of_one_process",),
    ),
    "early_end_kept": Fault(
        "        self._place, self._crossing = place, None\n",
        "        self._place, self._crossing = Place(place.step, place.ended or self._place.ended), None\n",
        (UPDATES + "test_a_checkpoint_undoes_an_early_end",),
    ),
    "epoch_rounded_down": Fault(
        "return max(1, math.ceil(batches / per_step))",
        "return max(1, batches // per_step)",
        ("tests/unit/test_hf.py::test_the_last_step_of_an_epoch_may_have_fewer_micro_batches",),
    ),
    "hybrid_groups_not_compared": Fault(
        "if comm.size == world.size and not replicated:",
        "if comm.size > 1 and not replicated:",
        (CONSISTENCY + "test_copies_on_groups_of_ranks_are_compared",),
    ),
    "learning_rate_of_a_skipped_step": Fault(
        "if before is None or scaler.get_scale() >= before:",
        "if True:",
        (UPDATES + "test_a_step_that_the_gradient_scaler_skips_is_none_for_the_learning_rate",),
    ),
    "left_out_counted_in_all": Fault(
        "self._in_a_row = self._in_a_row + 1 if self.skipping else 0",
        "self._in_a_row = self._in_a_row + self.skipping",
        (CONSISTENCY + "test_skip_goes_on_as_long_as_good_micro_batches_come_between",),
    ),
    "scale_not_restored": Fault(
        "run.grad_scaler.load_state_dict(state.grad_scaler)",
        "pass",
        (UPDATES + "test_a_step_that_the_gradient_scaler_skips_is_none_for_the_learning_rate",),
    ),
    "moments_kept": Fault(
        "        if name not in keep:\n            bitmask.zero_pruned_(moment, before)\n",
        "        if name in keep:\n            bitmask.zero_pruned_(moment, before)\n",
        (UPDATES + "test_a_moving_mask_changes_at_its_updates_alone_and_what_comes_is_new",),
    ),
    "gradient_too_early": Fault(
        "place.phase(self._run.schedule), place.step + 1):",
        "place.phase(self._run.schedule), place.step + 2):",
        (UPDATES + "test_a_moving_mask_changes_at_its_updates_alone_and_what_comes_is_new",),
    ),
    "ramp_exported": Fault(
        "if final.at_target(entry.partition) and not phase.at_target(entry.partition)",
        "if not (phase.at_target(entry.partition) or entry.name in self.mask_state.bits)",
        (UPDATES + "test_an_export_in_a_ramp_has_the_final_budget",),
    ),
    "last_values_forgotten": Fault(
        "values = self._over(values.clone(), shard.name, before)",
        "pass",
        (UPDATES + "test_last_values_are_those_that_each_weight_had_when_it_was_pruned",),
    ),
    "growth_not_published": Fault(
        'if selected or self._config.regrow == "last_value":',
        "if selected:",
        (UPDATES + "test_every_change_of_weights_is_published_after_it",),
    ),
    "update_too_late": Fault(
        "phase.is_update(self.step + 1)",
        "phase.is_update(self.step)",
        (UPDATES + "test_a_moving_mask_changes_at_its_updates_alone_and_what_comes_is_new",),
    ),
    "change_in_place_overlooked": Fault(
        "None if self._watched.changed() else part",
        "part",
        (BETWEEN + "test_a_change_in_place_is_found_at_the_next_update",),
    ),
    "no_look_before_a_boundary": Fault(
        "rest=self._place().changes_masks(self._run.schedule)",
        "rest=False",
        (BETWEEN + "test_changes_that_pytorch_does_not_count_are_found_before_the_boundary",),
    ),
    "hooks_not_looked_for": Fault(
        "            self._hook_again()\n",
        "            pass\n",
        (BETWEEN + "test_hooks_that_are_taken_off_are_found_at_the_next_update",),
    ),
    "random_state_of_rank_0": Fault(
        'read_json(path / "gap" / f"rng_{run.world.rank}.json", RandomState)',
        'read_json(path / "gap" / "rng_0.json", RandomState)',
        (SHARDING + "fsdp.py::test_invariants_hold_after_every_step[fsdp2_adamw]",),
    ),
    "persistent_parameters_not_published": Fault(
        "    optimizer._partition_all_parameters()\n",
        "",
        (SHARDING + "zero.py::test_invariants_hold_after_every_step[zero3_fp32_persistent]",),
    ),
    "flat_offset_lost": Fault(
        "offset=0 if original else piece.offset_in_shard or 0",
        "offset=0",
        (SHARDING + "fsdp.py::test_invariants_hold_after_every_step[fsdp1_flat_adamw]",),
    ),
    "reduced_after_the_wrong_micro_batch": Fault(
        "self.sync((self.micro_step + 1) %",
        "self.sync(self.micro_step %",
        (SHARDING + "fsdp.py::test_fp32_equals_the_independent_reference[fsdp2_adamw]",),
    ),
}


def file_of(fault: Fault, root: Path) -> Path:
    """The one file of the package that has a fault's text, once."""
    places = {path: path.read_text(encoding="utf-8").count(fault.text) for path in root.rglob("gap_ds/**/*.py")}
    found = [path for path, n in places.items() for _ in range(n)]
    if len(found) != 1:
        raise SystemExit(f"{fault.text!r}: is {len(found)} times in the package, must be there once")
    return found[0]


def passes(root: Path, tests: Iterable[str]) -> bool:
    """True if all tests pass, False if one fails; ends the program if there are no such tests."""
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--timeout", str(TIMEOUT), *tests]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        raise SystemExit(f"{' '.join(tests)}: pytest ended with {done.returncode}\n{done.stdout[-3000:]}")
    return done.returncode == 0


def main(names: list[str]) -> int:
    if unknown := set(names) - FAULTS.keys():
        raise SystemExit(f"{sorted(unknown)}: must be some of {', '.join(FAULTS)}")
    chosen = {name: fault for name, fault in FAULTS.items() if not names or name in names}
    lost = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "copy"
        shutil.copytree(ROOT, root, ignore=shutil.ignore_patterns(".*", "__pycache__", "build", "runs"), symlinks=True)
        places = {name: file_of(fault, root) for name, fault in chosen.items()}
        if not passes(root, dict.fromkeys(test for fault in chosen.values() for test in fault.tests)):
            raise SystemExit("the tests fail without a fault")
        for name, fault in chosen.items():
            whole = places[name].read_text(encoding="utf-8")
            places[name].write_text(whole.replace(fault.text, fault.wrong), encoding="utf-8")
            lost += [name] if passes(root, fault.tests) else []
            places[name].write_text(whole, encoding="utf-8")
            print(f"{'NOT FOUND' if name in lost else 'found':10} {name}", flush=True)
    print(f"{len(chosen) - len(lost)} of {len(chosen)} faults found")
    return int(bool(lost))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
