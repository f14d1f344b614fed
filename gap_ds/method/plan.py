"""The plan: which weights of a model are entries, which partition each belongs to, and how many weights it keeps.

Everything here works on the module tree and on shapes alone, so a model on the meta device will do. E entries, K
partitions, N weights. The plan of a model and a config is the same for every backend and any number of ranks.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction

from torch import Tensor, nn

from gap_ds.method.config import GaPConfig
from gap_ds.method.distribution import DISTRIBUTIONS, keep_count, round_half_up
from gap_ds.method.entries import Dense, find_entries, summarize
from gap_ds.method.matrices import Experts, Matrices
from gap_ds.method.names import by_parameter, inside, matching, no_match, parent, rows_of
from gap_ds.method.partitions import assign, shape_of
from gap_ds.method.pattern import Pattern, Unstructured, parse

#: Name components that wrappers insert: FSDP1 and fairscale, activation checkpointing, torch.compile.
_WRAPPERS = re.compile(r"(?<![^.])(_fsdp_wrapped_module|_fpw_module|_checkpoint_wrapped_module|_orig_mod)\.")


def clean_name(name: str) -> str:
    """The name that a module or parameter has in the model that was wrapped.

    >>> clean_name("_orig_mod.layers.0._checkpoint_wrapped_module.fc1.weight")
    'layers.0.fc1.weight'
    >>> clean_name("layers.0.my_orig_mod.weight")  # a name of the model's, which only ends like a wrapper's
    'layers.0.my_orig_mod.weight'
    """
    return _WRAPPERS.sub("", name + ".").removesuffix(".")


@dataclass(frozen=True)
class Entry:
    """One prunable weight tensor and its budget; `dims` are its output and its input dimension.

    It is a parameter, or some rows of one (`name[lo:hi]`): a group of the experts that one tensor holds.

    `experts`: the experts of its block that it belongs to, if any; two entries that differ only in it are equal.
    """

    name: str
    shape: tuple[int, ...]
    partition: int
    keep: int
    dims: tuple[int, int] = (0, 1)
    experts: Experts | None = field(default=None, compare=False)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def parameter(self) -> str:
        """The name of the parameter that the entry is, or is a part of."""
        return rows_of(self.name)[0]


@dataclass(frozen=True)
class Plan:
    """The entries of a model in module order, their pattern, and what the figures of the whole model need.

    `total` is the number of weights of the model, tied ones once. `dense_matmul` is the number of weights outside the
    entries that are multiplied with (a tied head included, embedding look-ups not). `shared_budget`: whether
    the budgets of a partition's entries are one budget, shared by one threshold (distribution "global"). `blocks`
    are the names of the repeated blocks. `dense` are the matrices and tables that are no entries, with the reason.
    `held` are the entries that are frozen: the base of adapters.
    """

    entries: tuple[Entry, ...]
    kappa: int
    total: int
    dense_matmul: int
    pattern: Pattern = field(default_factory=Unstructured)
    shared_budget: bool = False
    blocks: tuple[str, ...] = ()
    dense: tuple[Dense, ...] = ()
    held: frozenset[str] = frozenset()

    @property
    def numel(self) -> int:
        """Weights in all entries."""
        return sum(entry.numel for entry in self.entries)

    @property
    def keep(self) -> int:
        """Weights that all entries keep in the final model."""
        return sum(entry.keep for entry in self.entries)

    def per_partition(self) -> tuple[list[int], list[int]]:
        """(kept weights, weights) of each of the K partitions."""
        keep, numel = [0] * self.kappa, [0] * self.kappa
        for entry in self.entries:
            keep[entry.partition] += entry.keep
            numel[entry.partition] += entry.numel
        return keep, numel

    def parameters(self) -> dict[str, tuple[int, ...]]:
        """The whole shape of each parameter that is an entry, or that entries make up."""
        shapes = {entry.name: entry.shape for entry in self.entries}
        return {
            parameter: (sum(shapes[name][0] for name in names), *shapes[names[0]][1:])
            for parameter, names in by_parameter(shapes).items()
        }

    def training_flops(self, mean_density: float) -> float:
        """FLOPs of training relative to the dense model, given the entries' mean density over the run.

        Counted are the products with weights, forward and backward alike; attention scores and norms are not. Every
        weight counts alike, which is exact where each is used once for a token. How many positions a convolution has,
        and how many tokens an expert, is in no shape: a ResNet with ERK, whose early layers have the most positions and
        stay the densest, may have several times these FLOPs.
        """
        return (mean_density * self.numel + self.dense_matmul) / (self.numel + self.dense_matmul)

    def summary(self) -> str:
        """One line: the entries, their share of the matrix weights, names and shares of what stays dense.

        A partition of more than twice the mean is named, too: while it is dense, much of the model is.
        """
        line, (_, sizes) = summarize(len(self.entries), self.numel, self.dense), self.per_partition()
        largest = max(range(self.kappa), key=sizes.__getitem__)
        if self.kappa * sizes[largest] <= 2 * self.numel:
            return line
        return (
            f"{line} Partition {largest} has {sizes[largest] / self.numel:.0%} of the entries' weights, over twice the "
            'mean: lower "partitions", or write them as lists of name patterns.'
        )

    def became_trainable(self, trained: Container[str]) -> list[str]:
        """The matrices that were frozen when the plan was made, are trained now, and so stay dense.

        Args:
            trained: names of the parameters that are trained now.
        """
        return [row.name for row in self.dense if row.reason == "frozen" and row.name in trained]

    @property
    def fingerprint(self) -> str:
        """Hash of the pattern and all names, shapes, partitions and budgets: equal plans, equal fingerprints."""
        rows = [[e.name, list(e.shape), e.partition, e.keep, list(e.dims)] for e in self.entries]
        selection = f"{self.pattern}, pooled" if self.shared_budget else str(self.pattern)
        return hashlib.sha256(json.dumps([selection, rows]).encode()).hexdigest()[:16]

    def partition_of(self, name: str) -> int | None:
        """The partition that any parameter or buffer goes with: that of all entries of its block, or of its module.

        None for what lies outside every block (embeddings, final norms, heads), or beside entries of more than one
        partition.
        """
        block = next((block for block in self.blocks if inside(name, block)), parent(name))
        while inside(name, block):
            partitions = {entry.partition for entry in self.entries if inside(entry.name, block)}
            if len(partitions) < 2:
                return next(iter(partitions), None)
            # A block cut apart: what lies nearer to the entries of one partition goes with it.
            below = name.removeprefix(f"{block}.").partition(".")
            if not below[1]:
                return None
            block = f"{block}.{below[0]}".removeprefix(".")
        return None


def build(
    model: nn.Module,
    config: GaPConfig,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    frozen: Container[str] | None = None,
    kept: Mapping[str, int] | None = None,
) -> Plan:
    """The plan of a model: `draft`, then `budgeted`."""
    return budgeted(draft(model, config, shapes, frozen), config, kept)


def draft(
    model: nn.Module,
    config: GaPConfig,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    frozen: Container[str] | None = None,
) -> Plan:
    """The plan of a model in which every entry keeps all of its weights.

    Args:
        shapes: full shape of every parameter by its clean name. A sharding backend hands this over, because the
            parameters it leaves in the module tree may be empty or flattened.
        frozen: names of the parameters that are not trained, and so no entries, except under adapters (find_entries).

    Raises:
        ValueError: no entry was found, a name pattern matches nothing, there are more partitions than blocks, the
            written partitions overlap or leave entries out, or an entry's shape does not go with the pattern.
    """
    parameters = {clean_name(name): p for name, p in model.named_parameters()}
    if shapes is None:
        shapes = {name: tuple(p.shape) for name, p in parameters.items()}
    if frozen is None:
        frozen = {name for name, p in parameters.items() if not p.requires_grad}
    modules = {clean_name(name): module for name, module in model.named_modules()}
    ordered = _in_module_order(shapes, modules)
    matrices = Matrices(modules, ordered)
    found = find_entries(modules, matrices, ordered, frozen, config)
    experts = {name: matrices.experts(name) for name in found.names}
    partition = assign(found.names, ordered, found.blocks, experts, config)
    pattern = parse(config.pattern)
    dims = _dims({name: ordered[name] for name in found.names}, matrices, pattern)

    def entry(name: str, k: int) -> Entry:
        (parameter, rows), shape = rows_of(name), shape_of(name, ordered)
        own = (mixture := experts[parameter]) and mixture.of_rows(rows, ordered[parameter][0])
        return Entry(name, shape, k, math.prod(shape), dims[parameter], own)

    return Plan(
        tuple(itertools.starmap(entry, partition.items())),
        kappa=1 + max(partition.values()),
        total=sum(math.prod(shape) for shape in shapes.values()),
        dense_matmul=_dense_matmul(_tensors(modules), matrices, shapes, set(found.names)),
        pattern=pattern,
        shared_budget=config.distribution == "global",
        blocks=tuple(found.blocks),
        dense=found.dense,
        held=frozenset(name for name in found.names if name in frozen),
    )


def budgeted(plan: Plan, config: GaPConfig, kept: Mapping[str, int] | None = None) -> Plan:
    """A drafted plan with the budget of each entry.

    Args:
        kept: where masks are taken over (`config.reuses_masks`), the number of weights that each entry keeps, by name.

    Raises:
        ValueError: a name pattern of the distribution matches nothing, or `kept` does not go with the plan.
    """
    shapes = {entry.name: entry.shape for entry in plan.entries}
    keep = _inherited(shapes, config, kept) if config.reuses_masks else _budgets(plan, config)
    if not config.reuses_masks:
        keep = {name: n for of_one in by_parameter(shapes).values() for name, n in _shared(keep, of_one).items()}
    entries = (replace(e, keep=plan.pattern.budget(e.shape, keep[e.name], e.dims)) for e in plan.entries)
    return replace(plan, entries=tuple(entries))


def of_part(whole: Plan, model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> Plan:
    """The plan of a part of a model, such as a stage of a pipeline: its entries, with the whole model's budgets.

    Args:
        whole: the plan of the whole model, in which the parameters have the same names.
        shapes: full shape of every parameter of the part by its clean name.
    Raises:
        ValueError: the part has no entry, or one threshold holds for entries of several parts.
    """
    if whole.shared_budget:
        raise ValueError(
            'distribution="global": one threshold holds for all entries of a partition, and a part of the model sees '
            'its own alone. Set "uniform", "erk", or a sparsity by name.'
        )
    same = {name for name, shape in whole.parameters().items() if shapes.get(name) == shape}
    entries = tuple(entry for entry in whole.entries if entry.parameter in same)
    if not entries:
        raise ValueError(
            f"whole: has no entry that is a parameter of this part ({next(iter(shapes), 'which is empty')} is one of "
            f"the part, {whole.entries[0].name} of the whole). Parts must keep the names and shapes of the "
            "whole model; a part without entries needs no engine."
        )
    modules = {clean_name(name): module for name, module in model.named_modules()}
    matrices = Matrices(modules, shapes)
    return replace(
        whole,
        entries=entries,
        total=sum(math.prod(shape) for shape in shapes.values()),
        dense_matmul=_dense_matmul(_tensors(modules), matrices, shapes, same),
        dense=tuple(row for row in whole.dense if row.name in shapes),
    )


def _shared(keep: Mapping[str, int], names: Sequence[str]) -> dict[str, int]:
    """The budget of a parameter, shared by its entries in proportion to their rows; each keeps at least 1.

    So budgets do not depend on where partitions cut.

    >>> _shared({"up": 5}, ["up[0:1]", "up[1:3]", "up[3:4]"]), _shared({"up": 5}, ["up"])
    ({'up[0:1]': 1, 'up[1:3]': 3, 'up[3:4]': 1}, {'up': 5})
    """
    parameter, rows = rows_of(names[-1])
    if rows is None:
        return {parameter: keep[parameter]}
    whole = Fraction(keep[parameter], rows[1])
    ends = [round_half_up(whole * rows_of(name)[1][1]) for name in names]  # type: ignore[index]
    return {name: max(1, hi - lo) for name, lo, hi in zip(names, [0, *ends], ends, strict=False)}


def _budgets(plan: Plan, config: GaPConfig) -> dict[str, int]:
    """Weights that each parameter keeps."""
    shapes = plan.parameters()
    if isinstance(config.distribution, str):
        numbers = {entry.parameter: entry.experts.in_one_tensor if entry.experts else 1 for entry in plan.entries}
        each = [_of_one(shape, numbers[name]) for name, shape in shapes.items()]
        keep = DISTRIBUTIONS[config.distribution](each, config.sparsity, [numbers[name] for name in shapes])
        return dict(zip(shapes, keep, strict=True))
    sparsity, matched = dict.fromkeys(shapes, config.sparsity), dict[str, str]()
    for pattern, ratio in config.distribution.items():
        if not (found := matching(pattern, shapes)):
            raise ValueError(no_match("distribution", pattern, list(shapes)))
        if twice := next((name for name in found if name in matched), None):
            raise ValueError(
                f'distribution: {twice} matches "{matched[twice]}" and "{pattern}". Each entry must match one at most.'
            )
        sparsity |= dict.fromkeys(found, ratio)
        matched |= dict.fromkeys(found, pattern)
    return {name: keep_count(math.prod(shape), sparsity[name]) for name, shape in shapes.items()}


def _of_one(shape: tuple[int, ...], experts: int) -> tuple[int, ...]:
    """Shape of the matrix of one expert in a tensor that stacks them, (E, ...), or has them in its rows, (E * F, H)."""
    if experts == 1:
        return shape
    return shape[1:] if shape[0] == experts else (shape[0] // experts, *shape[1:])


def _inherited(
    shapes: Mapping[str, tuple[int, ...]], config: GaPConfig, kept: Mapping[str, int] | None
) -> dict[str, int]:
    """Weights that each entry keeps by the masks that are taken over."""
    where = f'mask_init="{config.mask_init}"'
    if kept is None:
        raise ValueError(f"{where}: how many weights an entry keeps is known in training alone, from the weights.")
    if missing := next((name for name in shapes if name not in kept), None):
        raise ValueError(
            f'{where}: {missing} has no mask in "mask_file": its partition was dense then. Use the last checkpoint of '
            'the run, or list it in "exclude".'
        )
    for name, shape in shapes.items():
        if kept[name] > math.prod(shape):
            raise ValueError(f"{where}: {name} keeps {kept[name]} weights and has {math.prod(shape)}.")
    if all(kept[name] == math.prod(shape) for name, shape in shapes.items()):
        raise ValueError(f"{where}: no entry has a pruned weight. Load the sparse weights before the engine is built.")
    return {name: kept[name] for name in shapes}


def _tensors(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Every parameter under each of its names; where it was flattened, the view that the module has in its place."""
    return {
        f"{name}.{leaf}".removeprefix("."): tensor
        for name, module in modules.items()
        for leaf, tensor in (*vars(module).items(), *module._parameters.items())
        if isinstance(tensor, Tensor)
    }


def _dims(shapes: Mapping[str, tuple[int, ...]], matrices: Matrices, pattern: Pattern) -> dict[str, tuple[int, int]]:
    """(output, input) dimension of each entry; raises ValueError where the pattern needs one that nothing shows."""
    found = {name: matrices.dims(name) for name in shapes}
    if not isinstance(pattern, Unstructured) and (unknown := [name for name, pair in found.items() if pair is None]):
        raise ValueError(
            f'pattern="{pattern}": {unknown[0]}{_others(unknown)} is a bare parameter of shape {shapes[unknown[0]]}; '
            'nothing shows which dimension is its input. List it in "exclude" to keep it dense, or change "pattern".'
        )
    dims = {name: pair or (len(shapes[name]) - 2, len(shapes[name]) - 1) for name, pair in found.items()}
    misfits = {name: why for name in shapes if (why := pattern.misfit(matrices.matrix_shape(name), dims[name]))}
    if misfits:
        name, misfit = next(iter(misfits.items()))
        raise ValueError(
            f'pattern="{pattern}": {name}{_others(misfits)} does not go with it: {misfit}. List it in "exclude" to '
            'keep it dense, or change "pattern".'
        )
    return dims


def _others(found: Collection[str]) -> str:
    return f" (and {len(found) - 1} others)" if len(found) > 1 else ""


def _dense_matmul(
    parameters: Mapping[str, Tensor], matrices: Matrices, shapes: Mapping[str, tuple[int, ...]], entries: set[str]
) -> int:
    """Weights outside the entries that are multiplied with; a head tied to an embedding counts once.

    Args:
        parameters: every parameter under each of its names. Where it is sharded it may be empty, and `shapes` knows
            a tied one under one name only: hence the way from a name over the parameter to its shape.
    """
    shape_of = {id(parameters[name]): shape for name, shape in shapes.items() if name in parameters}
    pruned = {id(parameters[name]) for name in entries if name in parameters}
    sizes = {
        id(p): math.prod(shape_of[id(p)])
        for name, p in parameters.items()
        if id(p) not in pruned and matrices.is_multiplied(name, shape_of.get(id(p), ()))
    }
    return sum(sizes.values())


def _in_module_order(shapes: Mapping[str, tuple[int, ...]], modules: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """The shapes sorted by the place of their module in the tree: backends list parameters in different orders."""
    place = {name: i for i, name in enumerate(modules)}
    return {name: shapes[name] for name in sorted(shapes, key=lambda n: (place.get(parent(n), len(place)), n))}
