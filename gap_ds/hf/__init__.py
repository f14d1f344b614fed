"""Hugging Face: the Trainer, your own loop with Accelerate, and adapters of peft over a sparse base.

    callback     `GaPCallback`, for Trainer, Seq2SeqTrainer and what derives from them
    accelerator  `prepare`, for a loop with Accelerate
    adapters     `mask_adapters` and `merge`: low-rank updates that keep the zeros of their base
    axolotl      `GaPPlugin`: the callback by axolotl's config; imported by axolotl alone
    wrapped      what the first two have in common

Read `callback` first.
"""

from gap_ds.hf.accelerator import prepare
from gap_ds.hf.adapters import Merged, mask_adapters, merge
from gap_ds.hf.callback import GaPCallback

__all__ = ["GaPCallback", "Merged", "mask_adapters", "merge", "prepare"]
