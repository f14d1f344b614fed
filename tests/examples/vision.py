"""What the tests of examples/vision share, in this process and in worker_vision.py: its script, and a short run."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "vision" / "train.py"

GAP = {
    **{"sparsity": 0.8, "partitions": 3, "distribution": "erk", "include": ["embedder.embedder", "classifier"]},
    **{"phase_steps": 2, "rounds": 1, "finetune_steps": 3},
}
STEPS = 9  # of that schedule; 4 make an epoch


def load(script: Path, name: str) -> Any:
    """A script of the example as a module of another name: those of all examples are called `train`."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, script)
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def arguments(out: Path, gap: str, *more: str) -> list[str]:
    """The command line of a run of 9 steps on 64 drawings; of an option given twice the last one counts.

    The learning rate is small, because runs are compared that sum in another order.
    """
    fixed = "--preset resnet20_small --limit 64 --image-size 16 --crop-part 1 --smallest-crop 0.5 --batch-size 16"
    fixed += " --lr 0.02 --warmup-steps 2 --statistics-batches 2 --validate-every 1 --log-every 1 --threads 1"
    return [*fixed.split(), "--gap-config", gap, "--output-dir", str(out), *more]


def stop_at(step: int, number: int) -> Any:
    """In place of `runtime.Monitor.step`: sends this process a signal after a step."""
    from common import runtime

    original = runtime.Monitor.step

    def interrupted(self: Any, done: int, **figures: Any) -> None:
        original(self, done, **figures)
        if done == step:
            os.kill(os.getpid(), number)

    return interrupted
