"""gap_ds: scheduled grow-and-prune sparse training inside DeepSpeed ZeRO and PyTorch's own parallelism.

>>> from gap_ds import GaPConfig
>>> GaPConfig(sparsity=0.9, partitions=3, phase_epochs=1, rounds=2, finetune_epochs=2).kappa
3
"""

from gap_ds._version import __version__
from gap_ds.config import GaPConfig
from gap_ds.engine import GaPEngine

__all__ = ["GaPConfig", "GaPEngine", "__version__"]
