"""The choice of entries: the trainable matrices of the blocks, changed by `include` and `exclude`."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Collection, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from gap_ds.method.config import GaPConfig
from gap_ds.method.matrices import Matrices, Shapes, computed_from
from gap_ds.method.names import ancestors, matching, no_match, parent, rows_of
from gap_ds.method.partitions import without_experts

#: Groups of dense matrices that a summary names.
_NAMED = 6


class Dense(NamedTuple):
    """A matrix or table that is no entry, and why: frozen, excluded, adapter, outside the blocks, or its use."""

    name: str
    numel: int
    reason: str


@dataclass(frozen=True)
class Found:
    """Names of the entries and of the blocks in module order, and what stays dense."""

    names: list[str]
    blocks: list[str]
    dense: tuple[Dense, ...]


def find_blocks(modules: Mapping[str, nn.Module], shapes: Shapes) -> list[str]:
    """Names of the repeated blocks of a model, in module order: see `gap_ds.method.blocks`.

    Args:
        modules: every module by its clean name.
        shapes: full shape of every parameter by its clean name.
    """
    return Matrices(modules, shapes).blocks


def find_entries(
    modules: Mapping[str, nn.Module], matrices: Matrices, shapes: Shapes, frozen: Container[str], config: GaPConfig
) -> Found:
    """The entries of a model.

    Args:
        shapes: full shape of every parameter by its clean name, in module order.

    Raises:
        ValueError: no entry was found, a pattern of names matches nothing, an entry is computed from other parameters
            by its module, or all entries are adapters over a frozen base.
    """
    embeddings = {id(m.weight) for m in modules.values() if isinstance(m, nn.Embedding)}
    tied = {name for name in shapes if id(getattr(modules.get(parent(name)), "weight", None)) in embeddings}
    prunable = [
        n for n, s in shapes.items() if len(s) > 1 and matrices.use(n) in ("matrix", "computed") and n not in tied
    ]
    inner = [name for name in prunable if name in matrices.block_of]
    chosen = {name for name in inner if name not in frozen}
    holds = config.mask_init == "from_weights" and not config.include
    if holds and _over_frozen(chosen, inner, matrices, shapes, frozen):
        chosen = {name for name in inner if name in frozen}  # the adapters are none: what is held is their base
    beside = _beside_trained_bases(chosen, modules)
    blocks = {matrices.block_of[name] for name in chosen}
    trainable = [name for name, shape in shapes.items() if len(shape) > 1 and 0 not in shape and name not in frozen]
    for pattern in config.include:
        if not (found := matching(pattern, trainable)):
            raise ValueError(no_match("include", pattern, trainable))
        chosen.update(found)
        beside.difference_update(found)
    if not isinstance(config.partitions, int) and not blocks:
        # Without repeated blocks the written partitions say what the entries are.
        free = [name for name in prunable if name not in frozen]
        patterns = [without_experts(pattern) for group in config.partitions for pattern in group]
        chosen.update(name for pattern in patterns for name in matching(pattern, free))
    excluded: set[str] = set()
    for pattern in config.exclude:
        if not (found := matching(pattern, sorted(chosen))):
            raise ValueError(no_match("exclude", pattern, sorted(chosen)))
        chosen.difference_update(found)
        excluded.update(found, matching(pattern, inner))
    names = [name for name in shapes if name in chosen and name not in beside]
    _check_entries(names, inner, frozen, modules, matrices, shapes, config, [n for n in prunable if n not in frozen])

    def reason(name: str) -> str:
        if name in excluded:
            return "excluded"
        if name in tied:
            return "embedding"
        if name in beside:
            return "adapter"
        if matrices.use(name) not in ("matrix", "computed"):
            return matrices.use(name)
        return "frozen" if name in matrices.block_of else "outside the blocks"

    left = [name for name, shape in shapes.items() if len(shape) > 1 and (name not in chosen or name in beside)]
    left = [name for name in left if matrices.use(name) not in ("vector", "norm") and not name.endswith("bias")]
    dense = tuple(Dense(name, math.prod(shapes[name]), reason(name)) for name in left)
    return Found(names, [block for block in matrices.blocks if block in blocks], dense)


def _check_entries(
    names: Sequence[str],
    inner: Sequence[str],
    frozen: Container[str],
    modules: Mapping[str, nn.Module],
    matrices: Matrices,
    shapes: Shapes,
    config: GaPConfig,
    free: Sequence[str],
) -> None:
    if not names:
        thin = [name for name in matrices.block_of if matrices.use(name) == "thin" and name not in frozen]
        if thin and inner and not config.exclude:
            raise ValueError(f"no entry found: only {_like_adapters(thin, inner, shapes)}")
        none_left = " All matrices of the blocks are frozen or excluded." if inner else ""
        raise ValueError(
            "no entry found: the model has no repeated blocks with trainable weights of 2 or more dimensions."
            f'{none_left} Name the weights to prune by "include"{_example(free)}.'
        )
    for name in names:
        if rows_of(name)[1] is not None:
            raise ValueError(
                f"{name}: a parameter's name that ends in [lo:hi] is that of rows of a parameter here. Rename it."
            )
        if weight := computed_from(name, modules, shapes):
            raise ValueError(
                f"{weight} is computed from {name} before each use (weight_norm, spectral_norm, orthogonal, "
                "torch.nn.utils.prune), so that a mask on one is no mask on the other. Remove that first "
                "(torch.nn.utils.parametrize.remove_parametrizations, remove_weight_norm, remove_spectral_norm, "
                f'prune.remove), or list {name} in "exclude".'
            )
    if not config.include and (adapters := _adapters(names, inner, matrices, shapes)):
        raise ValueError(f"only {_like_adapters(adapters, inner, shapes)}")


def _over_frozen(
    chosen: Collection[str], inner: Sequence[str], matrices: Matrices, shapes: Shapes, frozen: Container[str]
) -> bool:
    """True if all that is trained of the blocks are adapters beside frozen matrices, at least one."""
    if chosen:
        return bool(_adapters(sorted(chosen), inner, matrices, shapes))
    thin = any(matrices.use(name) == "thin" and name not in frozen for name in matrices.block_of)
    return thin and bool(inner)


def _beside_trained_bases(chosen: Collection[str], modules: Mapping[str, nn.Module]) -> set[str]:
    """The matrices of adapters whose base is chosen itself: all that a layer of peft has beside its `base_layer`.

    They begin at 0, or nearly so, and their product is added to the base: a mask on them is none on the sum.
    """
    layers = {path for path, module in modules.items() if hasattr(module, "adapter_layer_names")}
    bases = {f"{path}.base_layer" for path in layers}
    trained = {parent(path) for name in chosen for path in ancestors(name) if path in bases}
    return {n for n in chosen if bases.isdisjoint(ancestors(n)) and not trained.isdisjoint(ancestors(n))}


def _example(free: Sequence[str]) -> str:
    """An `include` for a model without blocks: the parts that hold matrices, but for the last one, a classifier."""
    parts = list(dict.fromkeys(name.partition(".")[0] for name in free))
    patterns = [re.escape(part) for part in (parts[:-1] or parts)]
    return f", for example {json.dumps(patterns)}" if patterns else ""


def _like_adapters(names: Sequence[str], inner: Sequence[str], shapes: Shapes) -> str:
    share = sum(math.prod(shapes[name]) for name in names) / sum(math.prod(shapes[name]) for name in inner)
    return (
        f"{len(names)} small matrices beside frozen ones are trained, such as {names[-1]} ({share:.2%} of the matrix "
        "weights of the blocks). They look like adapters over a frozen base. To hold the zeros of a sparse base, set "
        '"method" to static and "mask_init" to from_weights (and see gap_ds.hf.merge); to prune the base, make it '
        "trainable (requires_grad_) or build the engine before the adapters are added. To prune the adapters, name "
        'them in "include".'
    )


def _adapters(names: Sequence[str], inner: Sequence[str], matrices: Matrices, shapes: Shapes) -> list[str]:
    """The entries if each is a narrow matrix beside frozen ones of its block, as LoRA's are; else none."""
    sides: dict[str, int] = {}
    for name in set(inner).difference(names):
        block = matrices.block_of[name]
        sides[block] = max(sides.get(block, 0), min(shapes[name]))
    narrow = [n for n in names if 2 * min(shapes[n]) <= sides.get(matrices.block_of.get(n, ""), 0)]
    return narrow if len(narrow) == len(names) else []


def summarize(entries: int, numel: int, dense: Sequence[Dense]) -> str:
    """One line: the entries, their share of the matrix weights, and names and shares of what stays dense.

    Matrices whose names differ in numbers alone are one group; the largest groups are named.

    >>> summarize(8, 60, [Dense("h.0.gate.weight", 5, "router"), Dense("h.1.gate.weight", 5, "router")])
    '8 entries hold 85.7% of 70 matrix weights. Dense: h.*.gate.weight (router) 14.3%.'
    """
    total = numel + sum(row.numel for row in dense)
    groups = Counter[tuple[str, str]]()
    for row in dense:
        groups[re.sub(r"(?<![^.])\d+(?![^.])", "*", row.name), row.reason] += row.numel
    rows = groups.most_common()
    named = [f"{name} ({reason}) {size / total:.1%}" for (name, reason), size in rows[:_NAMED]]
    if rest := rows[_NAMED:]:
        named.append(f"{len(rest)} more {sum(size for _, size in rest) / total:.1%}")
    tail = f" Dense: {', '.join(named)}." if named else ""
    return f"{entries} entries hold {numel / total:.1%} of {total:,} matrix weights.{tail}"
