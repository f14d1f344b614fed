"""Export: the final sparse model as a complete Hugging Face folder, from any backend, at any time of a run."""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from gap_ds import masks, tensorfile
from gap_ds.checkpoint import write_json
from gap_ds.comm import Comm, by_rank
from gap_ds.plan import Plan, clean_name
from gap_ds.schedule import Schedule
from gap_ds.shard import Shard

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
            masks.zero_pruned_(piece, bits[shard.name])
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


def write_model(
    folder: Path,
    module: nn.Module,
    weights: dict[str, Tensor],
    dtype: torch.dtype,
    info: dict[str, Any],
    tokenizer: Any,
) -> None:
    """Writes a model folder so that it is whole or absent. For rank 0.

    A Hugging Face model becomes what `from_pretrained` reads, its weights under the names that the module gives them,
    as in gap.json and the masks; any other model becomes `model.safetensors` alone.
    """
    with aside(folder) as partial:
        if callable(getattr(module, "save_pretrained", None)):
            save_pretrained(module, partial, state_dict=weights)
            _say_dtype(partial / "config.json", dtype)
        else:
            save_file({name: tensor.contiguous() for name, tensor in weights.items()}, partial / "model.safetensors")
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        write_json(partial / INFO, info)
        write_card(partial)


def save_pretrained(model: Any, folder: Path, **options: Any) -> None:
    """`model.save_pretrained(folder, **options)`, with weights under the names and in the shapes that the model has.

    By default transformers 5 goes back to the names of earlier versions for some models, and splits or joins weights.
    """
    if "save_original_format" in inspect.signature(model.save_pretrained).parameters:
        options["save_original_format"] = False
    model.save_pretrained(folder, **options)


@contextmanager
def aside(folder: Path) -> Iterator[Path]:
    """An empty folder that becomes `folder`, in the place of what is there, when the block ends well; else it goes."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


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
        "mean_density": schedule.mean_density(*plan.per_partition()),
        "entries": {
            e.name: {
                **{"keep": e.keep, "nonzero": nonzero[e.name], "numel": e.numel},
                **{"partition": e.partition, "dims": list(e.dims)},
            }
            for e in plan.entries
        },
    }


def copy_config(source: Path, folder: Path, dtype: torch.dtype) -> None:
    """Copies config, generation config, tokenizer and what else lies in a Hugging Face folder, but for its weights."""
    for path in sorted(source.iterdir()):
        if path.is_file() and not is_weights(path) and path.name not in (INFO, CARD):
            shutil.copyfile(path, folder / path.name)
    _say_dtype(folder / "config.json", dtype)


def is_weights(path: Path) -> bool:
    """Whether a file holds weights, or says where they are."""
    return path.name.endswith((".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth"))


def _say_dtype(path: Path, dtype: torch.dtype) -> None:
    """The working copies may be bf16 where the exported weights are fp32: the config must say what the file holds."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config["dtype"] = str(dtype).removeprefix("torch.")
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
    """Writes the model card of an exported folder from its gap.json: what it is, how sparse, what it scored."""
    said = json.loads((folder / INFO).read_text(encoding="utf-8"))
    head: dict[str, Any] = {"tags": ["sparse", "pruning", "gap_ds"]}
    architecture = None
    if (folder / "config.json").is_file():
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        head = {"library_name": "transformers", "tags": [*head["tags"], str(config.get("model_type", "model"))]}
        architecture = (config.get("architectures") or ["AutoModel"])[0]
    # JSON is YAML: nothing in a name can end the front matter or become another key.
    front = "".join(f"{key}: {json.dumps(value)}\n" for key, value in head.items())
    (folder / CARD).write_text(f"---\n{front}---\n\n{_card_text(said, architecture)}", encoding="utf-8")


def _card_text(said: Mapping[str, Any], architecture: str | None) -> str:
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
    return "\n".join([*lines, *_loading(architecture)]) + "\n"


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


def _loading(architecture: str | None) -> list[str]:
    if architecture is None:
        text = (
            "Load `model.safetensors` with `safetensors.torch.load_file`, `compact.safetensors` with\n"
            "`gap_ds.load_compact`; both give a state dict."
        )
    else:
        text = f"""```python
from transformers import AutoTokenizer, {architecture}

import gap_ds

folder = "."  # this folder
model = {architecture}.from_pretrained(folder)  # of model.safetensors
model = gap_ds.load_compact(folder)  # of compact.safetensors: the same weights
tokenizer = AutoTokenizer.from_pretrained(folder)  # if the model was exported with one
gap_ds.sparsify_for_inference(model, batch=16)  # optional: the fastest form on this machine
```"""
    return text.split("\n")


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
