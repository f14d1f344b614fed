"""README.md of an exported model: its figures from gap.json, and how its weights are loaded."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gap_ds.export.info import INFO, EntryInfo, ExportInfo, Score, has_model_config
from gap_ds.storage.json import read_json, write_json

CARD = "README.md"

_TEMPLATE = """\
---
{front}---

# Sparse model trained with gap_ds

Scheduled grow-and-prune. {matrices} matrices keep {info.kept:,} of {info.numel:,} weights: \
{info.entry_sparsity:.2%} of them are exactly zero, which is {info.model_sparsity:.2%} of the whole model. \
{info.progress}

    {info.signature}

| entries | number | weights | zero | least to most |
|---|---|---|---|---|
{entries}

{scores}{loading}
"""
_SCORES = """\
| score | | on | how |
|---|---|---|---|
{rows}

"""
#: The part of a card about the form of the weights.
_LOADING = re.compile(r"^## Loading$.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
_GENERATING = ("ForConditionalGeneration", "ForCausalLM")


def write_card(folder: Path) -> None:
    """Writes the model card of an exported folder."""
    info, config = read_json(folder / INFO, ExportInfo), _config(folder)
    head: dict[str, Any] = {"tags": ["sparse", "pruning", "gap_ds"]}
    if config is not None:
        head = {"library_name": "transformers", "tags": [*head["tags"], str(config.get("model_type", "model"))]}
    text = _TEMPLATE.format(
        # JSON is YAML: nothing in a name can end the front matter or become another key.
        front="".join(f"{key}: {json.dumps(value)}\n" for key, value in head.items()),
        matrices=len(info.entries),
        info=info,
        entries="\n".join(_entry_rows(info.entries)),
        scores=_SCORES.format(rows="\n".join(map(_score_row, info.scores))) if info.scores else "",
        loading=_loading(folder, config),
    )
    (folder / CARD).write_text(text, encoding="utf-8")


def fit_card(folder: Path) -> None:
    """Makes a card that was copied to a folder describe how the weights there are loaded; all else stays as it is."""
    path = folder / CARD
    if path.is_file():
        loading = _loading(folder, _config(folder)) + "\n"
        path.write_text(_LOADING.sub(lambda _: loading, path.read_text(encoding="utf-8")), encoding="utf-8")


def add_scores(folder: str | Path, scores: Mapping[str, float], dataset: str, how: str = "") -> None:
    """Adds scores such as {"bleu": 34.5} to an exported model's gap.json and card, in place of earlier ones.

    Args:
        dataset: what the model was scored on, for people.
        how: the metric's own signature or settings.
    Raises:
        ValueError: the folder holds no exported model, or a score is NaN or infinite.
    """
    folder = Path(folder)
    if wrong := [metric for metric, value in scores.items() if not math.isfinite(value)]:
        raise ValueError(f"{wrong[0]}={scores[wrong[0]]}: must be a finite number, as JSON has no other. Leave it out.")
    info = read_json(folder / INFO, ExportInfo)
    kept = [row for row in info.scores if row.dataset != dataset]
    rows = [Score(metric=metric, value=float(value), dataset=dataset, how=how) for metric, value in scores.items()]
    write_json(folder / INFO, info.model_copy(update={"scores": kept + rows}))
    write_card(folder)


def _config(folder: Path) -> dict[str, Any] | None:
    """A transformers model's config; None if there is none that can be read."""
    try:
        return read_json(folder / "config.json", dict[str, Any]) if has_model_config(folder) else None
    except ValueError:
        return None


def _score_row(score: Score) -> str:
    metric, dataset, how = (
        " ".join(text.split()).replace("|", "\\|") for text in (score.metric, score.dataset, score.how)
    )
    return f"| {metric} | {score.value:.2f} | {dataset} | `{how}` |"


def _entry_rows(entries: Mapping[str, EntryInfo]) -> list[str]:
    """A row for the entries that differ only in the number of their block; gap.json lists them all."""
    groups: dict[str, list[EntryInfo]] = {}
    for name, entry in entries.items():
        groups.setdefault(re.sub(r"\.\d+\.", ".N.", name), []).append(entry)
    rows = []
    for name, alike in groups.items():
        numel = sum(entry.numel for entry in alike)
        zero = 1 - sum(entry.nonzero for entry in alike) / max(1, numel)
        each = [1 - entry.nonzero / max(1, entry.numel) for entry in alike]
        rows.append(f"| {name} | {len(alike)} | {numel:,} | {zero:.2%} | {min(each):.2%} to {max(each):.2%} |")
    return rows


def _loading(folder: Path, config: Mapping[str, Any] | None) -> str:
    """The section on how the weights in a folder are loaded, dense or compact."""
    is_compact = not any(folder.glob("model.safetensors*"))
    if config is None:
        form, load = ("compact", "gap_ds.load_compact") if is_compact else ("model", "safetensors.torch.load_file")
        body = f"`{load}` gives the state dict of `{form}.safetensors`."
    elif (own := _own_class(config)) is not None and is_compact:
        body = (
            f"The code of this model lies in its folder, and gap_ds never runs it: build the model with\n{own}, and "
            "load `dict(gap_ds.export.compact_file.read(folder))` as its state dict."
        )
    else:
        body = "\n".join(["```python", *_snippet(folder, config, own, is_compact), "```"])
    return f"## Loading\n\n{body}"


def _own_class(config: Mapping[str, Any]) -> str | None:
    """The Auto class of a model whose code lies in its folder."""
    classes = config.get("auto_map")
    names = [key for key in classes if key.startswith("AutoModel")] if isinstance(classes, dict) else []
    return next((name for name in names if name.isidentifier()), None)


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
