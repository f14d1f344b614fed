"""What `make test` shows on every backend: a table, compared with the tests that were collected and with the README."""

from __future__ import annotations

from pathlib import Path

import pytest
from table_rows import COLLECTED

#: backend -> file, row in fp32, row in 16 bits
ROWS = {
    "plain": ("test_methods_sharding.py", "rigl_plain_fp32", "rigl_plain_bf16"),
    "DistributedDataParallel": ("test_methods_sharding.py", "rigl_ddp_fp32", "rigl_ddp_bf16"),
    **{f"ZeRO-{stage}": ("test_zero.py", f"zero{stage}_fp32", f"zero{stage}_bf16") for stage in (0, 1, 2, 3)},
    "FSDP1": ("test_fsdp.py", "fsdp1_adamw", "fsdp1_bf16"),
    "FSDP1, flat": ("test_fsdp.py", "fsdp1_flat_adamw", "fsdp1_flat_bf16"),
    "FSDP2": ("test_fsdp.py", "fsdp2_adamw", "fsdp2_bf16"),
    "fairscale FSDP": ("test_fairscale.py", "fsdp_adamw", "fsdp_bf16"),
    "fairscale FSDP, flat": ("test_fairscale.py", "fsdp_flat_adamw", "fsdp_flat_bf16"),
    "fairscale OSS": ("test_fairscale.py", "oss_adamw", "oss_bf16"),
}
#: invariant -> the test of each file that shows it
INVARIANTS = {
    "after every step pruned weights are 0, budgets exact, ranks agree": {
        file: "test_invariants_hold_after_every_step" for file, *_ in ROWS.values()
    },
    "fp32 equals the reference bit for bit": {
        "test_zero.py": "test_fp32_equals_the_independent_reference_bit_for_bit",
        "test_methods_sharding.py": "test_fp32_equals_the_independent_reference_bit_for_bit",
        "test_fsdp.py": "test_fp32_equals_the_independent_reference",
        "test_fairscale.py": "test_fp32_equals_the_independent_reference",
    },
    "a resumed run equals one that never stopped": {
        "test_zero.py": "test_resume_in_mid_phase_equals_never_having_stopped",
        "test_methods_sharding.py": "test_resume_between_two_updates_equals_never_having_stopped",
        "test_fsdp.py": "test_resume_in_mid_phase_equals_never_having_stopped",
        "test_fairscale.py": "test_resume_in_mid_phase_equals_never_having_stopped",
    },
    "the export is the sparse model": {
        "test_zero.py": "test_export_is_the_final_sparse_model",
        "test_methods_sharding.py": "test_an_export_on_the_way_keeps_exactly_the_target",
        "test_fsdp.py": "test_export_is_the_sparse_model_and_reloads",
        "test_fairscale.py": "test_export_is_the_sparse_model_and_reloads",
    },
}


@pytest.mark.parametrize("backend", ROWS)
@pytest.mark.parametrize("invariant", INVARIANTS)
def test_make_test_shows_every_invariant_on_every_backend(
    request: pytest.FixtureRequest, invariant: str, backend: str
) -> None:
    collected = request.config.stash[COLLECTED]
    if {name.partition("::")[0] for name in collected} == {Path(__file__).name}:
        pytest.skip("collect the whole folder")
    file, exact, half = ROWS[backend]
    for row in (exact,) if "bit for bit" in invariant else (exact, half):
        name = f"{file}::{INVARIANTS[invariant][file]}[{row}]"
        assert name in collected, f"{backend}: no test shows that {invariant}"
        assert not collected[name] & {"full", "slow", "gpu", "skip", "xfail"}, f"{name} is not in `make test`"


def test_the_readme_has_the_table() -> None:
    lines = ["| backend | file | row in fp32 | row in 16 bits |", "|---|---|---|---|"]
    lines += [f"| {backend} | `{file}` | `{exact}` | `{half}` |" for backend, (file, exact, half) in ROWS.items()]
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    assert "\n".join(lines) in readme
