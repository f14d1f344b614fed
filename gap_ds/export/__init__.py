"""The final sparse model as a folder: written from any backend, converted to and from the compact form, loaded.

    folder           a Hugging Face folder, or model.safetensors alone; whole or absent
    writing          its weights, one at a time, and the other files of the model's own save_pretrained
    weights          the files of weights: found, opened, read back
    info, card       gap.json and README.md of such a folder
    compact_file     compact.safetensors: masks and kept weights
    convert          a dense folder to a compact one and back
    from_checkpoint  the same export from the files of a checkpoint
    load             `load_compact`
    inspect          counts of an export, compared with its gap.json

Read `folder` first. Nothing here trains, or resumes a run: see `checkpoint`.
"""

from gap_ds.export.card import add_scores
from gap_ds.export.convert import compact, expand
from gap_ds.export.folder import buffers, describe_saved, full_weights, place, save
from gap_ds.export.info import INFO, ExportInfo
from gap_ds.export.load import load_compact
from gap_ds.export.weights import Counted
from gap_ds.export.writing import Stream, save_pretrained

__all__ = [
    "INFO",
    "Counted",
    "ExportInfo",
    "Stream",
    "add_scores",
    "buffers",
    "compact",
    "describe_saved",
    "expand",
    "full_weights",
    "load_compact",
    "place",
    "save",
    "save_pretrained",
]
