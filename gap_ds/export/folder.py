"""Export: the final sparse model as a complete Hugging Face folder, from any backend, at any time of a run."""

from __future__ import annotations

import fcntl
import hashlib
import inspect
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from gap_ds.checkpoint.folder import write_json
from gap_ds.masks import bitmask
from gap_ds.method.plan import Plan, clean_name
from gap_ds.method.schedule import Schedule
from gap_ds.sharding.comm import Comm, by_rank, raise_on_all_ranks, summarize_error
from gap_ds.sharding.shard import Shard
from gap_ds.storage import safetensors as tensorfile

T = TypeVar("T")

INFO = "gap.json"

#: Called with (name of a tensor, bytes done, bytes in all).
Progress = Callable[[str, int, int], None]


def full_weights(
    module: nn.Module, shards: Sequence[Shard], bits: Mapping[str, Tensor], comm: Comm, dtype: torch.dtype
) -> dict[str, Tensor]:
    """On rank 0 all weights and buffers of the model with masks applied, on the CPU; on other ranks an empty dict.

    The run's own weights are not touched. Parameters travel one at a time. All ranks of `comm` must call this.

    Args:
        bits: packed mask of this rank's piece of each entry that is to be sparse.
    """
    weights: dict[str, Tensor] = {}
    ranges = by_rank([(shard.start, shard.numel) for shard in shards], comm)
    for shard, (starts, numels) in zip(shards, ranges, strict=True):
        piece = shard.weight().clone()
        if shard.name in bits and shard.numel:
            bitmask.zero_pruned_(piece, bits[shard.name])
        piece = piece.to(dtype) if piece.is_floating_point() else piece
        whole = comm.assemble(piece, starts, numels, shard.full_numel)
        if whole is not None:
            weights[shard.name] = whole.view(shard.shape)
    if comm.rank == 0:
        weights |= {name: buffer.detach().cpu().clone() for name, buffer in buffers(module)}
    return weights


def buffers(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Buffers that a checkpoint holds; they are whole on every rank."""
    return [
        (clean_name(f"{prefix}.{name}" if prefix else name), buffer)
        for prefix, owner in module.named_modules()
        for name, buffer in owner._buffers.items()
        if buffer is not None and name not in owner._non_persistent_buffers_set
    ]


def save(
    folder: Path,
    module: nn.Module,
    gather: Callable[[], dict[str, Tensor]],
    about: Callable[[Mapping[str, Tensor]], dict[str, Any]],
    world: Comm,
    *,
    tokenizer: Any,
    dtype: torch.dtype,
    overwrite: bool,
) -> None:
    """Writes a model folder, whole or not at all, on rank 0. All ranks must call this.

    A Hugging Face model becomes what `from_pretrained` reads, its weights under the names that the module gives them,
    as in gap.json and the masks; any other model becomes `model.safetensors` alone.

    Args:
        gather: on rank 0 the weights, in `dtype`; on the others anything. All ranks call it, once the folder, the
            tokenizer and the dtypes are found to be fine.
        about: what gap.json says of these weights; on rank 0.
    Raises:
        ValueError: it cannot be written, on all ranks alike; what was there is as it was.
    """
    with ExitStack() as stack:

        def begin() -> Path:
            check_out(folder, overwrite)
            if not dtype.is_floating_point:
                raise ValueError(f"dtype={dtype}: must be one of floating-point numbers, such as torch.bfloat16.")
            for name, tensor in [("dtype", torch.empty(0, dtype=dtype)), *buffers(module)]:
                tensorfile.name_of(tensor.dtype, name)
            partial = stack.enter_context(aside(folder))
            if tokenizer is not None:
                tokenizer.save_pretrained(partial)
            return partial

        def first(work: Callable[[], T]) -> T | None:
            return raise_on_all_ranks(world, lambda: _writing(folder, work) if world.rank == 0 else None)

        partial = first(begin)
        weights = gather()
        first(lambda: _write(partial or folder, module, weights, about, dtype))
        first(stack.close)


def _writing(folder: Path, work: Callable[[], T]) -> T:
    """What `work` returns; errors of all kinds become a ValueError that names the folder."""
    try:
        return work()
    except ValueError:
        raise
    except Exception as error:  # of the disk, of transformers, of a tokenizer
        raise ValueError(f"{folder}: cannot be written ({summarize_error(error)}).") from error


def _write(
    folder: Path,
    module: nn.Module,
    weights: dict[str, Tensor],
    about: Callable[[Mapping[str, Tensor]], dict[str, Any]],
    dtype: torch.dtype,
) -> None:
    if dtype == torch.float16:
        for name, weight in weights.items():
            check_range(name, int(weight.isinf().sum()), dtype)
    info = about(weights)  # before transformers takes them out one by one
    if callable(getattr(module, "save_pretrained", None)):
        save_pretrained(module, folder, state_dict=weights)
        _complete(folder / "config.json", dtype)
    else:
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors")
    write_json(folder / INFO, info)
    renew_digests(folder)
    write_card(folder)


def check_range(name: str, lost: int, dtype: torch.dtype) -> None:
    """ValueError: some weights became infinite in `dtype`."""
    if lost:
        most = torch.finfo(dtype).max
        raise ValueError(
            f"{name}: {lost:,} of its weights are beyond {most:,.0f}, the largest number of {dtype}. Export it as "
            "bfloat16 or float32."
        )


def save_pretrained(model: Any, folder: Path, **options: Any) -> None:
    """`model.save_pretrained(folder, **options)`, with weights under the names and in the shapes that the model has.

    By default transformers 5 goes back to the names of earlier versions for some models, and splits or joins weights.
    The model's config stays as it is: what transformers sets in it is about the files. In an exported folder gap.json
    gets the digests of the new weights.
    """
    if "save_original_format" in inspect.signature(model.save_pretrained).parameters:
        options["save_original_format"] = False
    config = getattr(model, "config", None)
    before = {key: getattr(config, key) for key in ("dtype", "architectures") if hasattr(config, key)}
    try:
        model.save_pretrained(folder, **options)
    finally:
        for key, value in before.items():
            setattr(config, key, value)
    if (folder / INFO).is_file():
        renew_digests(folder)


# -- folders: whole or absent, and nothing lost that is not an export --------------------------------------------------


def place(folder: str | Path) -> Path:
    """A folder by a path that ends in its name, also where it is given as `.` or `..`."""
    path = Path(folder)
    return path.resolve() if path.name in ("", "..") else path


def check_out(folder: Path, overwrite: bool) -> None:
    """Refuses to write an exported model where something else is.

    Raises:
        ValueError: `folder` is a file, a link or the current folder; or it holds something, and `overwrite` is not set
            or it is no exported model.
    """
    if folder.is_symlink():
        raise ValueError(f"{folder}: is a symbolic link. Choose another folder, or the one that it leads to.")
    for above in (folder, *folder.parents):
        if above.exists() and not above.is_dir():
            raise ValueError(f"{above}: is a file, and no folder. Choose another folder.")
    if not folder.exists():
        return
    if folder.resolve() in (here := Path.cwd().resolve(), *here.parents):
        raise ValueError(f"{folder}: is the current folder, or holds it. Choose another folder.")
    if not any(folder.iterdir()):
        return
    if not overwrite:
        raise ValueError(f"{folder}: is not empty. Choose another folder, or overwrite it on purpose (overwrite=True).")
    if not is_export(folder):
        raise ValueError(
            f"{folder}: holds no exported model ({INFO}), so it is not overwritten. Choose another folder, or delete "
            "it yourself."
        )


def is_export(folder: Path) -> bool:
    """Whether a folder has the gap.json of an exported model; a config of that name is none."""
    try:
        said = json.loads((folder / INFO).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(said, dict) and {"signature", "entries"} <= said.keys()


@contextmanager
def aside(folder: Path) -> Iterator[Path]:
    """An empty folder that becomes `folder`, in the place of what is there, when the block ends well; else it goes.

        FOLDER.partial/new    what is being written; a rename makes it FOLDER
        FOLDER.partial/old    what was in FOLDER, from just before that rename until after it

    A process that is killed between the two leaves `old` whole; the next one puts it back, or replaces it.

    Raises:
        ValueError: the disk refuses something, or another process is writing there now.
    """
    partial = folder.with_name(f"{folder.name}.partial")
    new, old = partial / "new", partial / "old"
    shown = False
    try:
        with _alone_in(partial):
            try:
                for path in partial.iterdir():  # what a killed process has left
                    if path != old or folder.exists():
                        _delete(path)
                new.mkdir()
                yield new
                if folder.exists():
                    folder.rename(old)
                new.rename(folder)
                shown = True
            finally:
                if old.exists() and not folder.exists():
                    old.rename(folder)
                is_lost = old.exists() and not shown  # somebody else has made FOLDER meanwhile
                shutil.rmtree(new if is_lost else partial, ignore_errors=True)
    except OSError as error:
        raise ValueError(f"{folder}: cannot be written ({error}).") from error


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Makes a folder, if there is none, that no other process has then; ValueError if one does.

    The lock ends with its process. Where the file system has no locks, nothing is known of other processes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        taken = False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            taken = True
        except OSError:
            pass
        if taken or os.fstat(descriptor).st_ino != folder.stat().st_ino:
            raise ValueError(f"{folder}: another process is writing there. Wait for it, or choose another folder.")
        yield
    finally:
        os.close(descriptor)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


@dataclass(frozen=True)
class Count:
    """Weights of a tensor, and how many of them are not zero."""

    numel: int
    nonzero: int


def write_weights(path: Path, tensors: Mapping[str, Tensor], progress: Progress | None = None) -> dict[str, Count]:
    """Writes a safetensors file that transformers reads, a tensor at a time; each is asked for twice.

    Args:
        progress: told after each tensor, in bytes.
    """
    layout, counts, end = [], {}, 0
    for name in tensors:
        tensor = tensors[name]
        begin, end = end, end + tensor.numel() * tensor.element_size()
        layout.append((name, tensorfile.name_of(tensor.dtype, name), tuple(tensor.shape), (begin, end)))
        counts[name] = Count(tensor.numel(), int(torch.count_nonzero(tensor)))
    header = tensorfile.table(layout, {"format": "pt"})  # transformers refuses a file that does not say so
    with path.open("wb") as file:
        file.write(tensorfile.header_bytes(header))
        for name, *_, (_, done) in layout:
            data: Any = tensorfile.encode(tensors[name].detach().cpu())
            file.write(data)
            if progress:
                progress(name, done, end)
        file.flush()
        os.fsync(file.fileno())
    return counts


def info(
    plan: Plan, schedule: Schedule, signature: str, applied_steps: int, nonzero: Mapping[str, int]
) -> dict[str, Any]:
    """What gap.json says of an exported model. `nonzero`: weights of each entry that are not zero."""
    pruned = sum(e.numel - e.keep for e in plan.entries)
    return {
        "signature": signature,
        "applied_steps": applied_steps,
        "entry_sparsity": pruned / plan.numel,
        "model_sparsity": pruned / plan.total,
        "kept": plan.keep,
        "numel": plan.numel,
        "model_numel": plan.total,
        "mean_density": schedule.mean_density(*plan.per_partition()),
        "entries": {
            e.name: {
                **{"keep": e.keep, "nonzero": nonzero[e.name], "numel": e.numel},
                **{"partition": e.partition, "dims": list(e.dims)},
            }
            for e in plan.entries
        },
    }


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of each file of weights in a folder, by its name."""
    return {path.name: sha256(path) for path in sorted(folder.glob("*.safetensors"))}


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    total = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**22):
            total.update(chunk)
    return total.hexdigest()


def renew_digests(folder: Path) -> None:
    """Writes the digests of a folder's weights to its gap.json."""
    said = json.loads((folder / INFO).read_text(encoding="utf-8"))
    write_json(folder / INFO, {**said, "sha256": digests(folder)})


def copy_config(source: Path, folder: Path, dtype: torch.dtype, architecture: str) -> None:
    """Copies config, generation config, tokenizer and what else lies in a Hugging Face folder, but for its weights.

    Args:
        architecture: class of the model, for a config that names none.
    """
    for path in sorted(source.iterdir()):
        if path.is_file() and not is_weights(path) and path.name not in (INFO, CARD):
            shutil.copyfile(path, folder / path.name)
    _complete(folder / "config.json", dtype, architecture)


def is_weights(path: Path) -> bool:
    """Whether a file holds weights, or says where they are."""
    return path.name.endswith((".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth"))


def _complete(path: Path, dtype: torch.dtype, architecture: str | None = None) -> None:
    """The working copies may be bf16 where the exported weights are fp32: the config must say what the file holds."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config["dtype"] = str(dtype).removeprefix("torch.")
    if architecture is not None and not config.get("architectures"):
        config["architectures"] = [architecture]
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


# -- the model card ----------------------------------------------------------------------------------------------------

CARD = "README.md"


def add_scores(folder: Path, scores: Mapping[str, float], dataset: str, how: str = "") -> None:
    """Adds to an exported model what it scored, such as {"bleu": 34.5}, and says so on its card.

    Args:
        dataset: what it was scored on, for people.
        how: the metric's own signature or settings.
    """
    said = json.loads((folder / INFO).read_text(encoding="utf-8"))
    kept = [row for row in said.get("scores", []) if row["dataset"] != dataset]
    rows = [{"metric": metric, "value": value, "dataset": dataset, "how": how} for metric, value in scores.items()]
    write_json(folder / INFO, {**said, "scores": kept + rows})
    write_card(folder)


def write_card(folder: Path) -> None:
    """Writes the model card of an exported folder: what gap.json says it is, and how the weights here are loaded."""
    said = json.loads((folder / INFO).read_text(encoding="utf-8"))
    head: dict[str, Any] = {"tags": ["sparse", "pruning", "gap_ds"]}
    if (config := _config(folder)) is not None:
        head = {"library_name": "transformers", "tags": [*head["tags"], str(config.get("model_type", "model"))]}
    # JSON is YAML: nothing in a name can end the front matter or become another key.
    front = "".join(f"{key}: {json.dumps(value)}\n" for key, value in head.items())
    text = "\n".join([*_figures(said), *_loading(folder, config)])
    (folder / CARD).write_text(f"---\n{front}---\n\n{text}\n", encoding="utf-8")


def fit_card(folder: Path) -> None:
    """Makes a card that was copied here say how the weights that are here are loaded; all else stays as it is."""
    path = folder / CARD
    if path.is_file():
        lines = "\n".join(_loading(folder, _config(folder))) + "\n"
        path.write_text(_LOADING.sub(lambda _: lines, path.read_text(encoding="utf-8")), encoding="utf-8")


def _config(folder: Path) -> dict[str, Any] | None:
    """A Hugging Face model's config; None where there is none that can be read."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return config if isinstance(config, dict) else None


def _figures(said: Mapping[str, Any]) -> list[str]:
    kept, numel = said["kept"], said["numel"]
    lines = [
        "# Sparse model trained with gap_ds",
        "",
        f"Scheduled grow-and-prune. {len(said['entries'])} matrices keep {kept:,} of {numel:,} weights: "
        f"{said['entry_sparsity']:.2%} of them are exactly zero, which is {said['model_sparsity']:.2%} of the whole "
        f"model. Exported after {said['applied_steps']:,} optimizer steps.",
        "",
        "    " + said["signature"],
        "",
        *_sparsity_table(said["entries"]),
        "",
    ]
    if scores := said.get("scores"):
        lines += ["| score | | on | how |", "|---|---|---|---|"]
        for row in scores:
            metric, dataset, how = (_cell(row[key]) for key in ("metric", "dataset", "how"))
            lines.append(f"| {metric} | {row['value']:.2f} | {dataset} | `{how}` |")
        lines += [""]
    return lines


def _cell(text: str) -> str:
    """A text as it may stand in a table."""
    return " ".join(text.split()).replace("|", "\\|")


def _sparsity_table(entries: Mapping[str, Mapping[str, int]]) -> list[str]:
    """A row for the entries that differ only in the number of their block; gap.json has each."""
    rows: dict[str, list[Mapping[str, int]]] = {}
    for name, entry in entries.items():
        rows.setdefault(re.sub(r"\.\d+\.", ".N.", name), []).append(entry)
    lines = ["| entries | number | weights | zero | least to most |", "|---|---|---|---|---|"]
    for name, alike in rows.items():
        numel = sum(entry["numel"] for entry in alike)
        zero = 1 - sum(entry["nonzero"] for entry in alike) / max(1, numel)
        each = [1 - entry["nonzero"] / max(1, entry["numel"]) for entry in alike]
        lines.append(f"| {name} | {len(alike)} | {numel:,} | {zero:.2%} | {min(each):.2%} to {max(each):.2%} |")
    return lines


#: The part of a card that is about the form of the weights. Cards of before had no heading, and it at their end.
_LOADING = re.compile(r"(?:^## Loading$|^```python\nfrom transformers ).*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)


def _loading(folder: Path, config: Mapping[str, Any] | None) -> list[str]:
    """How the weights in this folder are loaded, dense or compact."""
    is_compact = not any(folder.glob("model.safetensors*"))
    if config is None:
        form, load = ("compact", "gap_ds.load_compact") if is_compact else ("model", "safetensors.torch.load_file")
        lines = [f"`{load}` gives the state dict of `{form}.safetensors`."]
    elif (own := _own_class(config)) is not None and is_compact:
        lines = [
            f"This model comes with code of its own, which gap_ds never runs: build it by {own}, and load",
            "`dict(gap_ds.export.compact.read(folder))` as its state dict.",
        ]
    else:
        lines = ["```python", *_snippet(folder, config, own, is_compact), "```"]
    return ["## Loading", "", *lines]


def _snippet(folder: Path, config: Mapping[str, Any], own: str | None, is_compact: bool) -> list[str]:
    names = config.get("architectures")
    name = str(names[0]) if isinstance(names, list) and names else "AutoModel"
    name = own or (name if name.isidentifier() else "AutoModel")
    has_tokenizer = any(folder.glob("tokenizer*.json"))
    if is_compact:
        load = "gap_ds.load_compact(folder)"
    elif own is not None:
        load = f"{name}.from_pretrained(folder, trust_remote_code=True)  # runs the .py files of this folder"
    else:
        load = f"{name}.from_pretrained(folder)"
    classes = sorted(([] if is_compact else [name]) + (["AutoTokenizer"] if has_tokenizer else []))
    lines = [f"from transformers import {', '.join(classes)}", ""] if classes else []
    lines += ["import gap_ds", "", 'folder = "."  # this folder', f"model = {load}"]
    lines += ["tokenizer = AutoTokenizer.from_pretrained(folder)"] if has_tokenizer else []
    lines += ["", "# Optional: each layer in the form that is fastest on this machine, for work like that of this run."]
    if has_tokenizer and ((folder / "generation_config.json").is_file() or name.endswith(_GENERATING)):
        return [
            *lines,
            'inputs = tokenizer(["A sentence like those to come."] * 4, return_tensors="pt")',
            "gap_ds.sparsify_for_inference(model, lambda model: model.generate(**inputs, max_new_tokens=8))",
        ]
    return [*lines, "# gap_ds.sparsify_for_inference(model, lambda model: model(**inputs))"]


_GENERATING = ("ForConditionalGeneration", "ForCausalLM")


def _own_class(config: Mapping[str, Any]) -> str | None:
    """The Auto class of a model whose code lies in its folder."""
    classes = config.get("auto_map")
    names = [key for key in classes if key.startswith("AutoModel")] if isinstance(classes, dict) else []
    return next((name for name in names if name.isidentifier()), None)


def weight_files(folder: Path) -> dict[Path, list[str] | None]:
    """The files of an exported model's weights, and the names that each should hold; None: whatever it holds.

    Raises:
        ValueError: there are none, the index is damaged, or names a file outside the folder.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return {single: None}
    if not index.is_file():
        raise ValueError(f"{folder}: has neither {single.name} nor {index.name}.")
    try:
        homes = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        outside = next((home for home in homes.values() if Path(home).name != home or home in ("", ".", "..")), None)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(f"{index}: is damaged.") from None
    if outside is not None:
        raise ValueError(f"{index}: names a file that is not in its folder ({outside[:200]!a}).")
    return {folder / home: [name for name in homes if homes[name] == home] for home in sorted(set(homes.values()))}
