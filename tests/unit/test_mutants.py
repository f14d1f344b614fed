"""`make mutants` takes long; that its faults still have their places in the package is checked here."""

from __future__ import annotations

import runpy
from pathlib import Path


def test_every_fault_has_its_place_and_its_tests() -> None:
    mutants = runpy.run_path(str(Path(__file__).resolve().parents[1] / "mutants.py"))
    sources = [path.read_text(encoding="utf-8") for path in mutants["ROOT"].rglob("gap_ds/**/*.py")]
    for name, fault in mutants["FAULTS"].items():
        assert sum(source.count(fault.text) for source in sources) == 1, name
        for test in fault.tests:
            file, function = test.split("::")
            assert f"def {function.partition('[')[0]}(" in (mutants["ROOT"] / file).read_text(encoding="utf-8"), test
