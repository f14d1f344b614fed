"""The final sparse model as a folder: written from any backend, converted to and from the compact form, loaded.

    folder        a Hugging Face folder, or model.safetensors alone; whole or absent
    info, card    gap.json and README.md of such a folder
    compact_file  compact.safetensors: masks and kept weights
    convert       a dense folder to a compact one and back
    load          `load_compact`
    inspect       counts of an export, compared with its gap.json

Read `folder` first. Nothing here trains, or resumes a run: see `checkpoint`.
"""

from gap_ds.export.card import add_scores
from gap_ds.export.convert import compact, expand
from gap_ds.export.folder import buffers, full_weights, place, save, save_pretrained
from gap_ds.export.info import INFO, ExportInfo
from gap_ds.export.load import load_compact

__all__ = [
    "INFO",
    "ExportInfo",
    "add_scores",
    "buffers",
    "compact",
    "expand",
    "full_weights",
    "load_compact",
    "place",
    "save",
    "save_pretrained",
]
