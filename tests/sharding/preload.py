"""Imported once, by the server that worker processes are forked from (see launch.py): what takes seconds to import.

Nothing is computed here: a pool of threads would not outlive the fork.
"""

from __future__ import annotations

import importlib
import os

for name in (
    *("torch", "torch.distributed.fsdp", "torch.distributed.tensor", "torch._dynamo", "safetensors.torch"),
    *("deepspeed", "accelerate", "transformers", "transformers.modeling_utils", "fairscale.nn.data_parallel"),
    *("gap_ds.training.engine", "gap_ds.cli.export"),
):
    try:
        importlib.import_module(name)
    except ImportError:
        continue  # the worker that needs it says so

#: Of this process, after the imports: a fork takes along only the one that forks.
threads = len(os.listdir("/proc/self/task"))
