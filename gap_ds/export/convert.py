"""`compact` and `expand`: an exported model folder converted between its dense and its compact form."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from gap_ds.export import compact_file
from gap_ds.export import folder as folders
from gap_ds.export.card import fit_card
from gap_ds.export.folder import place
from gap_ds.export.info import INFO, ExportKeys, is_as_recorded, is_export, renew_digests
from gap_ds.export.weights import read_back, weight_files, write_weights
from gap_ds.method.names import by_parameter
from gap_ds.storage.atomic import replacing_folder
from gap_ds.storage.errors import printable
from gap_ds.storage.json import read_json
from gap_ds.storage.safetensors import LazyTensors, Progress, open_tensors


def compact(
    source: str | Path, out: str | Path, *, overwrite: bool = False, progress: Progress | None = None
) -> dict[str, Any]:
    """Converts an exported model folder into a compact one; `out` is whole or absent. Returns figures, for JSON.

    The weights are model.safetensors or the files in model.safetensors.index.json; gap.json lists the entries. All
    other files of the folder are copied, of folders in it chat templates alone; the card and gap.json then describe
    the new files.

    Raises:
        ValueError: `source` is no exported model or is damaged; `out` holds something and `overwrite` is not set, or it
            is no exported model.
    """
    source, out = Path(source), place(out)
    if not (source / INFO).is_file():
        raise ValueError(f"{source / INFO}: there is no such file: its folder is no exported model.")
    info = read_json(source / INFO, ExportKeys)
    with _folder(source, out, overwrite) as (aside, names), _opened(source, info.sha256) as tensors:
        entries = by_parameter(info.entries)
        if entries and set(entries).isdisjoint(tensors):
            name = printable(next(iter(info.entries)))
            raise ValueError(f"{source}: {name} and all other entries of {INFO} are in no file. Export it again.")
        compact_file.write(aside, tensors, entries, info.signature, progress)
        names += tensors
    return compact_file.figures(out)


def expand(source: str | Path, out: str | Path, *, overwrite: bool = False, progress: Progress | None = None) -> Path:
    """Converts a compact folder back into a dense one, for tools without the compact form; `out` is whole or absent.

    The tensors of its model.safetensors equal those of the first export bit for bit. Read and written one at a time.

    Raises:
        ValueError: as `compact_file.read`; `out` holds something and `overwrite` is not set, or it is no exported
            model.
    """
    source, out = Path(source), place(out)
    compact_file.read_contents(source)
    with _folder(source, out, overwrite) as (aside, names), compact_file.opened(source) as tensors:
        write_weights(aside, tensors, progress)
        names += tensors
    return out


def check_out(source: Path, out: Path, overwrite: bool) -> None:
    """ValueError: `out` is `source` or holds it, or may not be written (`folder.check_out`)."""
    if out.resolve() == source.resolve() or out.resolve() in source.resolve().parents:
        raise ValueError(f"{out}: is the model's own folder, or holds it. Choose another folder.")
    folders.check_out(out, overwrite)


@contextmanager
def _folder(source: Path, out: Path, overwrite: bool) -> Iterator[tuple[Path, list[str]]]:
    """An empty folder for weights, and a list for their names.

    It then gets the other files of `source`, is read back and becomes `out`, or vanishes.
    """
    check_out(source, out, overwrite)
    names: list[str] = []
    with replacing_folder(out) as aside:
        yield aside, names
        folders.copy_others(source, aside)
        if is_export(aside):
            renew_digests(aside)
            read_back(aside, out, dict.fromkeys(names))
        fit_card(aside)


@contextmanager
def _opened(source: Path, digests: Mapping[str, str]) -> Iterator[Mapping[str, Tensor]]:
    """The weights of an exported model, each read when it is looked up. ValueError: a file of them was changed."""
    homes: dict[str, Any] = {}
    with ExitStack() as stack:
        for path, expected in weight_files(source).items():
            file = stack.enter_context(open_tensors(path))
            if not is_as_recorded(path, digests):
                raise ValueError(
                    f"{path}: was changed: {INFO} has another SHA-256 of it. Export the model anew; if you have saved "
                    "other weights there on purpose, do so by gap_ds.export.save_pretrained."
                )
            names = list(file.keys())
            if lost := sorted(set(expected or ()) - set(names)):
                raise ValueError(f"{path}: lacks {printable(lost[0])}, which the index lists.")
            for name in names:
                if name in homes:
                    raise ValueError(f"{path}: holds {printable(name)}, which another file holds, too.")
                homes[name] = file
        yield LazyTensors(homes, lambda name: homes[name].get_tensor(name))
