"""gap_ds: scheduled grow-and-prune sparse training inside DeepSpeed ZeRO and PyTorch's own parallelism.

>>> from gap_ds import GaPConfig
>>> GaPConfig(sparsity=0.9, partitions=3, phase_epochs=1, rounds=2, finetune_epochs=2).kappa
3
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gap_ds._version import __version__

if TYPE_CHECKING:
    from gap_ds.export import load_compact
    from gap_ds.inference.tuning import sparsify_for_inference
    from gap_ds.method.config import GaPConfig
    from gap_ds.parallel import ParallelWorker
    from gap_ds.training.engine import GaPEngine

__all__ = ["GaPConfig", "GaPEngine", "ParallelWorker", "__version__", "load_compact", "sparsify_for_inference"]

_HOMES = {
    "GaPConfig": "gap_ds.method.config",
    "GaPEngine": "gap_ds.training.engine",
    "ParallelWorker": "gap_ds.parallel",
    "load_compact": "gap_ds.export",
    "sparsify_for_inference": "gap_ds.inference.tuning",
}


def __getattr__(name: str) -> Any:
    # Imported at first use: `import gap_ds` costs nothing, and `python -m` finds its module unimported.
    if name not in _HOMES:
        raise AttributeError(f"module 'gap_ds' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
