"""Keeps what was collected, for test_table.py; scripts have no doctests."""

from __future__ import annotations

import pytest
from table_rows import COLLECTED

collect_ignore_glob = ["worker_*.py", "preload.py"]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Before any test is deselected."""
    config.stash[COLLECTED] = {
        f"{item.path.name}::{item.name}": {mark.name for mark in item.iter_markers()} for item in items
    }
