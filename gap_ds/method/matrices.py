"""The use of each parameter, read from its shape, its module and its neighbours: matrix, router, table, vector.

Only a matrix of a block is pruned. No model class is named; where a rule reads a name, the name tells the use
(`router`, `_bias`, `_log`).

    matrix      multiplied with: Linear, convolution, experts in one tensor (E, out, in) or (E, in, out)
    router      picks experts: as many outputs as there are experts beside it
    depthwise   a convolution with one input channel per filter
    thin        a side of 4 or less in a wide block: gates, coefficients, the taps of a short convolution
    table       positions, embeddings and other bare parameters that are added or looked up
    vector      one row or column: biases, norms, scales, gates with one output
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

from torch import Tensor, nn

from gap_ds.method.blocks import find_stacks
from gap_ds.method.names import ancestors, inside, parent

Shapes = Mapping[str, tuple[int, ...]]

#: Longest short side of a thin matrix, and how many times as wide its block must be.
_THIN, _WIDE = 4, 8
_NORMS = nn.LayerNorm | nn.RMSNorm
_LOOKED_UP = nn.Embedding | nn.EmbeddingBag
_CONVOLUTIONS = nn.modules.conv._ConvNd
_TRANSPOSED = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
#: Bare parameters that are added, looked up or passed through a function in which 0 has no special place.
_TABLE = re.compile(r"(^|_)(\w*bias|pos|position\w*|rel_pos\w*|\w*embed\w*|\w*tokens?|\w*table|\w*scale|\w*log)(_|$)")
#: Modules that compute such a table.
_MAKES_TABLE = re.compile(r"\.(\w*bias_\w*|\w*_bias|cpb_mlp|rel_pos)\.")
#: Attributes in which modules keep the number of experts that a router picks from.
_EXPERTS = re.compile(r"(moe_)?(num|n)_(local_|routed_|total_)?experts")
#: Attributes in which modules keep the size of their input and output.
_SIZES = [("in_features", "out_features"), ("in_channels", "out_channels"), ("input_size", "output_size")]
#: Parameters from which a weight is computed: torch's parametrizations; weight_norm, spectral_norm and prune of old.
_COMPUTED = re.compile(r"(?P<owner>(?:.*\.)?)parametrizations\.(?P<name>\w+)\.original\d?|(?P<old>.*)_(?:orig|v)")


def computed_from(name: str, modules: Mapping[str, nn.Module], shapes: Shapes) -> str | None:
    """Name of the weight that a module computes from this parameter before each use; None if it is used itself."""
    if not (match := _COMPUTED.fullmatch(name)):
        return None
    if match["name"]:
        return f"{match['owner']}{match['name']}"
    attributes = vars(modules[parent(name)]) if parent(name) in modules else {}
    is_set = isinstance(attributes.get(match["old"].rpartition(".")[2]), Tensor)
    return match["old"] if is_set and match["old"] not in shapes else None


class Experts(NamedTuple):
    """The experts of a block that a matrix is of: their module, how many they are, and its expert's name among them.

    `expert` is empty where the matrix holds all of them, and `lo:hi` where it is their rows of such a matrix.
    """

    module: str
    number: int
    expert: str

    @property
    def in_one_tensor(self) -> int:
        """How many of them the matrix's tensor holds."""
        return self.number if not self.expert or ":" in self.expert else 1

    def of_rows(self, rows: tuple[int, int] | None, height: int) -> Experts:
        """Those that some rows of a matrix of all of them, of this height, are of."""
        if rows is None or self.expert:
            return self
        lo, hi = (row * self.number // height for row in rows)
        return self._replace(expert=f"{lo}:{hi}")


class Matrices:
    """The use of every parameter of two or more dimensions.

    Args:
        modules: every module by its clean name, in module order.
        shapes: full shape of every parameter by its clean name, frozen ones included, in module order.

    `blocks` are the names of the repeated blocks, in module order; `block_of` maps the parameters in them to theirs.
    """

    def __init__(self, modules: Mapping[str, nn.Module], shapes: Shapes) -> None:
        self._modules, self._shapes = modules, shapes
        use = {name: self._alone(name, shape) for name, shape in shapes.items() if len(shape) > 1}
        weights = [name for name in use if use[name] == "matrix"]
        stacked = [name for name in use if use[name] == "bare" and len(shapes[name]) > 2]
        self.blocks = find_stacks(modules, [*weights, *stacked], shapes)
        self.block_of = dict(self._in_blocks(use))
        of_block: dict[str, list[str]] = defaultdict(list)
        #: The numbers of experts that the routers of a block pick from.
        self._routed: dict[str, set[int]] = {}
        for name, block in self.block_of.items():
            if use[name] in ("matrix", "bare"):
                of_block[block].append(name)
        #: How many matrices of blocks lie in each module.
        self._held = Counter[str]()
        for block, names in of_block.items():
            width = self._width(names)
            use |= {name: self._beside(name, use[name], width) for name in names}
            # Thin ones too: a mixture may have four experts.
            tried = [name for name in names if use[name] in ("matrix", "thin")]
            self._held.update(prefix for name in tried for prefix in ancestors(name))
            routers = self._routers(block, tried)
            use |= dict.fromkeys(routers, "router")
            self._routed[block] = {self._outputs(name) or 0 for name in routers}
        use |= {name: "table" for name in use if use[name] == "bare"}
        self._use = use

    def use(self, name: str) -> str:
        """The use of a parameter of two or more dimensions, as in the module's docstring; or embedding, norm."""
        return self._use[name]

    def is_multiplied(self, name: str, shape: tuple[int, ...]) -> bool:
        """True for what a product with weights is counted for: matrices, routers, depthwise convolutions, gates.

        The name may be a second one of a tied parameter, which `shapes` lists under its first.
        """
        if len(shape) < 2:
            return False
        use = self._use.get(name) or self._alone(name, shape)
        return use in ("matrix", "router", "computed") or (name.endswith("weight") and use not in ("embedding", "norm"))

    def dims(self, name: str) -> tuple[int, int] | None:
        """(output, input) dimension of a matrix, as its module multiplies it; None if nothing shows it.

        Linear is (out, in) and a convolution (out, in, kernel ...); transposed convolutions and GPT-2's Conv1D have the
        inputs first. Experts in one tensor are (E, out, in) or (E, in, out): see `_experts_dims`.
        """
        owner, shape = self._modules.get(parent(name)), self._shapes[name]
        if isinstance(owner, _TRANSPOSED) or type(owner).__name__ == "Conv1D":
            return (1, 0)
        if len(shape) > 2 and not _is_convolution(owner):
            return self._experts_dims(name)
        if experts := self._flat_experts(name):
            return (1, 0) if name == experts[-1] else (0, 1)
        if len(shape) == 2 and _kept_sizes(owner, shape):
            return (1, 0)
        return (0, 1) if name.endswith("weight") or isinstance(owner, nn.RNNBase) else None

    def matrix_shape(self, name: str) -> tuple[int, ...]:
        """The shape; of experts stacked in the rows of one matrix (E * F, H), that of one expert."""
        shape = self._shapes[name]
        experts = self._count(parent(name)) if self._flat_experts(name) else 1
        return (shape[0] // experts, *shape[1:])

    def experts(self, name: str) -> Experts | None:
        """The experts that a matrix of a block belongs to; None if it belongs to none.

        Experts are the members of a list, or lie in one tensor; a router has an output for each, or a name tells it.
        """
        if (block := self.block_of.get(name)) is None:
            return None
        shape, owner = self._shapes[name], parent(name)
        for path in ancestors(owner):
            if not inside(parent(path), block) or parent(path) == block:
                break
            members = self._members(parent(path))
            if path in members and self._is_mixture(block, parent(path), len(members)):
                return Experts(parent(path), len(members), path.rpartition(".")[2])
        if self._flat_experts(name):
            return Experts(owner, self._count(owner), "")
        is_stack = len(shape) == 3 and self._use[name] == "matrix" and not _is_convolution(self._modules[owner])
        return Experts(owner, shape[0], "") if is_stack and self._is_mixture(block, owner, shape[0]) else None

    # -- one parameter by itself -----------------------------------------------------------------------------------

    def _alone(self, name: str, shape: tuple[int, ...]) -> str:
        weight = computed_from(name, self._modules, self._shapes) or name
        owner, leaf = self._modules.get(parent(weight)), weight.rpartition(".")[2]
        if owner is None:
            return "table"
        if isinstance(owner, _LOOKED_UP) or hasattr(owner, "padding_idx"):
            return "embedding"
        if isinstance(owner, _NORMS) or hasattr(owner, "normalized_shape"):
            return "norm"
        if min(_sides(shape, owner)) == 1:
            return "vector"
        if leaf.endswith("weight"):
            is_depthwise = isinstance(owner, _CONVOLUTIONS) and 1 < owner.groups == owner.in_channels
            if is_depthwise or (len(shape) > 2 and shape[1] == 1):
                return "depthwise"
            return "matrix" if weight == name else "computed"
        if isinstance(owner, nn.RNNBase):
            return "matrix"
        return "table" if _TABLE.search(leaf) else "bare"

    # -- beside the others of its block ----------------------------------------------------------------------------

    def _in_blocks(self, names: Mapping[str, str]) -> Iterator[tuple[str, str]]:
        blocks = set(self.blocks)
        for name in names:
            if block := next((prefix for prefix in ancestors(name) if prefix in blocks), None):
                yield name, block

    def _width(self, names: Sequence[str]) -> int:
        """The size that most sides of the matrices have; the largest of several."""
        sizes = Counter[int]()
        for name in names:
            shape = self._shapes[name]
            sides = shape[:2] if len(shape) == 2 or _is_convolution(self._modules.get(parent(name))) else ()
            sizes.update(sides or {*shape, math.prod(shape[1:]), math.prod(shape[:-1])})
        return max(sizes, key=lambda size: (sizes[size], size), default=0)

    def _beside(self, name: str, use: str, width: int) -> str:
        shape = self._shapes[name]
        side = min(_sides(shape, self._modules[parent(name)]))
        if _MAKES_TABLE.search(name.removeprefix(self.block_of[name])):
            return "table"
        if side <= _THIN and _WIDE * side <= width:
            return "bare" if use == "bare" else "thin"
        if use == "matrix" or self._flat_experts(name):
            return "matrix"
        # A bare parameter is multiplied with if it is as wide as the block, and about as long; or if it holds such
        # matrices, one for each expert.
        cuts = [(math.prod(shape[:cut]), math.prod(shape[cut:])) for cut in range(1, len(shape))]
        is_square = any(width in cut and 2 * min(cut) >= width for cut in cuts)
        is_stack = len(shape) == 3 and (width in shape[1:] or "expert" in parent(name).lower() or self._is_expert(name))
        return "matrix" if is_square or is_stack else "bare"

    def _is_expert(self, name: str) -> bool:
        return "expert" in type(self._modules[parent(name)]).__name__.lower()

    def _members(self, path: str) -> list[str]:
        """The members of a list of modules of one class that hold matrices; empty if it is none."""
        module = self._modules[path]
        if not isinstance(module, nn.ModuleList | nn.ModuleDict | nn.Sequential):
            return []
        members = [f"{path}.{child}" for child in module._modules if self._held[f"{path}.{child}"]]
        kinds = {type(self._modules[member]) for member in members}
        return members if len(members) > 1 and len(kinds) == 1 else []

    def _is_mixture(self, block: str, path: str, number: int) -> bool:
        """True if a module of a block holds as many experts as a router picks from, or is named so."""
        named = f"{path.removeprefix(block)} {type(self._modules[path]).__name__}".lower()
        return number in self._routed[block] or "expert" in named

    def _routers(self, block: str, names: Sequence[str]) -> list[str]:
        """The matrices with an output for each of the experts beside them.

        A router is the only matrix of its branch: that tells it from a shared expert.
        """
        counts: dict[str, set[int]] = defaultdict(set)
        for place, number in self._experts(block, names):
            for prefix in ancestors(place):
                if inside(prefix, block):
                    counts[prefix].add(number)
        return [
            name
            for name in names
            if "router" in f"{name.removeprefix(block)} {self._classes(name)}".lower()
            or any(
                self._held[branch] == 1 and self._outputs(name) in counts[parent(branch)]
                for branch in ancestors(name)
                if inside(parent(branch), block) and parent(branch) in counts
            )
        ]

    def _classes(self, name: str) -> str:
        """Class names of a parameter's module and of the one around it."""
        owners = [self._modules[path] for path in (parent(name), parent(parent(name))) if path in self._modules]
        return " ".join(type(owner).__name__ for owner in owners)

    def _outputs(self, name: str) -> int | None:
        """Number of outputs of a matrix with fewer outputs than inputs; None for every other parameter."""
        if len(self._shapes[name]) > 2 and max(self._shapes[name][2:]) > 1:
            return None
        output, input_ = self.dims(name) or (0, 1)
        shape = self._shapes[name]
        return shape[output] if shape[output] <= shape[input_] else None

    def _experts(self, block: str, names: Sequence[str]) -> Iterator[tuple[str, int]]:
        """(module around them, number) of the experts of a block."""
        for name in names:
            shape = self._shapes[name]
            if len(shape) == 3 and 1 < shape[0] < max(shape[1:]) and not _is_convolution(self._modules[parent(name)]):
                yield parent(name), shape[0]
        for path in {prefix for name in names for prefix in ancestors(name) if inside(prefix, block)}:
            if path not in self._modules:
                continue
            if number := self._count(path):
                yield path, number
            if path != block and (members := self._members(path)):
                yield parent(path), len(members)

    def _count(self, path: str) -> int:
        """Number of experts that a module keeps in an attribute; 0 if none."""
        found = (value for key, value in vars(self._modules[path]).items() if _EXPERTS.fullmatch(key))
        return max((value for value in found if isinstance(value, int)), default=0)

    def _flat_experts(self, name: str) -> list[str]:
        """Bare matrices of one shape (E * F, H) whose rows are those of E experts, in the module's order.

        The last one leads from the F hidden units back to the H of the block: it has the inputs first.
        """
        path, shape = parent(name), self._shapes[name]
        if name.endswith("weight") or len(shape) != 2 or (count := self._count(path)) < 2 or shape[0] % count:
            return []
        return [other for other in self._parameters(path) if self._shapes[other] == shape]

    def _parameters(self, path: str) -> list[str]:
        """Names of a module's parameters in its order; where they were flattened, of the views in their place."""
        module = self._modules[path]
        names = (f"{path}.{leaf}".removeprefix(".") for leaf in (*vars(module), *module._parameters))
        return [name for name in names if name in self._shapes]

    # -- experts in one tensor -------------------------------------------------------------------------------------

    def _experts_dims(self, name: str) -> tuple[int, int] | None:
        """The dimensions of matrices stacked in one tensor (..., a, b).

        In this order: transformers' `is_transposed`, the sizes that the module keeps, or the bias beside it, which
        has the size of the output; the same of another module of its class; the matrices that lie beside it, of which
        those that lead out of the block's width are the largest or the first; those beside another of its class.
        """
        last = len(self._shapes[name])
        tensors = [name, *self._tensors_of.get(type(self._modules[parent(name)]), [])]
        answers = (look(tensor) for look in (self._by_module, self._by_neighbours) for tensor in tensors)
        is_transposed = next((answer for answer in answers if answer is not None), None)
        return None if is_transposed is None else ((last - 1, last - 2) if is_transposed else (last - 2, last - 1))

    @cached_property
    def _tensors_of(self) -> dict[type[nn.Module], list[str]]:
        """Tensors of three dimensions by the class of their module."""
        found: dict[type[nn.Module], list[str]] = defaultdict(list)
        for path, module in self._modules.items():
            found[type(module)] += [name for name in self._parameters(path) if len(self._shapes[name]) == 3]
        return found

    def _by_module(self, name: str) -> bool | None:
        """True if the matrices of a tensor are (in, out), False if they are (out, in), None if nothing shows it."""
        owner, sizes = self._modules[parent(name)], self._shapes[name][-2:]
        if isinstance(known := getattr(owner, "is_transposed", None), bool):
            return known
        if (known := _kept_sizes(owner, sizes)) is not None:
            return known
        biases = (self._shapes.get(f"{name}_bias"), self._shapes.get(re.sub(r"weight$", "bias", name)))
        for bias in biases:
            if bias and len(bias) == 2 and sizes[0] != sizes[1] and bias[-1] in sizes:
                return bool(bias[-1] == sizes[1])
        return None

    def _by_neighbours(self, name: str) -> bool | None:
        beside = [
            other for other in self._tensors_of[type(self._modules[parent(name)])] if self._are_beside(name, other)
        ]
        kinds = Counter(self._shapes[other][-2:] for other in beside)
        if len(kinds) != 2:
            return None
        # Gate and up projection are two matrices, or one of twice the size; else the first leads out.
        (one, n), (two, m) = kinds.items()
        up, down = (one, two) if (n, math.prod(one)) >= (m, math.prod(two)) else (two, one)
        forth, back = up[1] == down[0], up[0] == down[1]
        if forth == back:
            width = self._width([n for n in self.block_of if self.block_of[n] == self.block_of.get(name)])
            forth, back = up[1] == width, up[0] == width
        return None if forth == back else back

    def _are_beside(self, name: str, other: str) -> bool:
        """True for two tensors of one module, or of two modules that hold one each."""
        pair, experts = (parent(name), parent(other)), (self._shapes[name][0], self._shapes[other][0])
        if pair[0] == pair[1] and self._is_expert(name):
            return True  # of experts that have no weights, one of two tensors may hold empty places
        return experts[0] == experts[1] and (
            pair[0] == pair[1] or (parent(pair[0]) == parent(pair[1]) and pair[0] != "")
        )


def _is_convolution(module: nn.Module | None) -> bool:
    return isinstance(module, _CONVOLUTIONS) or hasattr(module, "kernel_size")


def _sides(shape: tuple[int, ...], owner: nn.Module | None) -> tuple[int, int]:
    """(rows, columns) of a parameter as one matrix: its dimensions cut in two as evenly as it goes.

    A convolution has a row for each filter.
    """
    cuts = [1] if _is_convolution(owner) else range(1, len(shape))
    return max(((math.prod(shape[:cut]), math.prod(shape[cut:])) for cut in cuts), key=min)


def _kept_sizes(owner: nn.Module | None, sizes: tuple[int, ...]) -> bool | None:
    """True if the sizes are (in, out) by the module's attributes, False if (out, in), None if these are silent."""
    for pair in _SIZES:
        kept = (getattr(owner, pair[0], None), getattr(owner, pair[1], None))
        if kept[0] != kept[1] and sizes in (kept, kept[::-1]):
            return sizes == kept
    return None
