"""The repeated blocks of a model, found from the shape of the module tree. No model class is named.

decoder.layers          a stack: a list whose members hold matrices
decoder.layers.0        a block
encoder.stages.0.layers the stages of a ResNet or Swin are shells around lists: the inner members are the blocks
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from torch import nn

from gap_ds.method.names import ancestors, inside

#: Share of a member's matrix weights that its inner lists hold where the member is no more than a shell around them.
_SHELL = 0.8


def find_stacks(
    modules: Mapping[str, nn.Module], matrices: Sequence[str], shapes: Mapping[str, tuple[int, ...]]
) -> list[str]:
    """Names of the repeated blocks of a model, in module order.

    A stack is an outermost list of modules (`ModuleList`, `Sequential`, a `ModuleDict` with numbered keys) that have
    submodules and hold matrices. Members without matrices (a norm, Identity, None) are passed over. Members may be of
    different classes and a list may have one member. A Sequential also joins parts that are no blocks: there the
    members from the first to the last of a repeated class count, or a single one of a class that is repeated
    elsewhere. A model without such lists may have its blocks in numbered attributes (`layer1`, `layer2`).

    Args:
        modules: every module by its clean name, in module order; a shared one under its first name.
        matrices: names of the parameters that may be pruned.
    """
    search = _Search(modules, matrices, shapes)
    return _stacks(modules, search) or _stacks(modules, _Numbered(modules, matrices, shapes))


def _stacks(modules: Mapping[str, nn.Module], search: _Search) -> list[str]:
    stacks: dict[str, list[str]] = {}
    for name in modules:
        if not any(prefix in stacks for prefix in ancestors(name)) and (members := search.members(name)):
            stacks[name] = members
    blocks = {stack: search.refine(members) for stack, members in stacks.items()}
    repeated = {type(modules[block]) for found in blocks.values() for block in found}
    for name, module in modules.items():
        if not isinstance(module, nn.Sequential) or any(prefix in blocks for prefix in ancestors(name)):
            continue
        single = search.nested(name)
        if len(single) == 1 and type(modules[single[0]]) in repeated:
            blocks[name] = single
    place = {name: i for i, name in enumerate(modules)}
    return sorted((block for found in blocks.values() for block in found), key=place.__getitem__)


class _Search:
    def __init__(
        self, modules: Mapping[str, nn.Module], matrices: Sequence[str], shapes: Mapping[str, tuple[int, ...]]
    ) -> None:
        self._modules = modules
        self._outputs = {n: shape[0] for n, shape in shapes.items() if len(shape) == 2 and n.endswith("weight")}
        self._weights, self._matrices = Counter[str](), Counter[str]()
        for matrix in matrices:
            for prefix in ancestors(matrix):
                self._weights[prefix] += math.prod(shapes[matrix])
                self._matrices[prefix] += 1

    def _children(self, name: str) -> list[str]:
        """Children of a module; those that are None, or shared and listed under another name, are left out."""
        children = (f"{name}.{child}" if name else child for child in self._modules[name]._modules)
        return [child for child in children if child in self._modules]

    def nested(self, name: str) -> list[str]:
        """Children that have children and hold matrices."""
        return [child for child in self._children(name) if self._weights[child] and self._children(child)]

    def members(self, name: str) -> list[str]:
        """The blocks of a stack; empty if this is none."""
        module, nested = self._modules[name], self.nested(name)
        is_numbered = isinstance(module, nn.ModuleDict) and all(key[-1:].isdigit() for key in module._modules)
        if isinstance(module, nn.ModuleList) or is_numbered:
            is_deep = len(nested) > 1 or (len(nested) == 1 and self._matrices[nested[0]] > 1)
            return nested if is_deep else []
        if not isinstance(module, nn.Sequential) or not nested:
            return []
        # Members with one matrix, a convolution and its norm, are blocks only where there is nothing else.
        is_plain = len(nested) == len(module._modules) and self._is_list(name)
        deep = [member for member in nested if is_plain or self._matrices[member] > 1]
        counts = Counter(type(self._modules[member]) for member in deep)
        places = [nested.index(member) for member in deep if counts[type(self._modules[member])] > 1]
        return nested[places[0] : places[-1] + 1] if places else []

    def refine(self, members: list[str]) -> list[str]:
        """The inner blocks of members that are shells around one list of modules of one class; else the members.

        A ModuleList beside a matrix with an output for each of its modules is none: they are experts with a router.
        """
        inner = [self._lists(member) for member in members]
        blocks = [block for lists in inner for name in lists for block in self.nested(name)]
        is_staged = all(len(lists) == 1 for lists in inner) and len(blocks) > len(members)
        held = sum(self._weights[block] for block in blocks)
        return blocks if is_staged and held > _SHELL * sum(self._weights[member] for member in members) else members

    def _lists(self, member: str) -> list[str]:
        """The lists of modules of one class that are this member or its children."""
        if self._is_list(member):
            return [member]
        lists = [child for child in self._children(member) if self._is_list(child)]
        return [child for child in lists if not self._is_routed(child, member)]

    def _is_routed(self, child: str, member: str) -> bool:
        if isinstance(self._modules[child], nn.Sequential):  # which calls its modules one after the other
            return False
        beside = (name for name in self._outputs if inside(name, member) and not inside(name, child))
        return len(self.nested(child)) in {self._outputs[name] for name in beside}

    def _is_list(self, name: str) -> bool:
        children = [self._modules[child] for child in self._children(name)]
        is_list = isinstance(self._modules[name], nn.ModuleList | nn.Sequential)
        return is_list and len({type(child) for child in children}) == 1 and bool(self.nested(name))


class _Numbered(_Search):
    """The search in which every module is a list of its children with numbered names."""

    def members(self, name: str) -> list[str]:
        counts = Counter(member.rstrip("0123456789") for member in self.nested(name))
        return [member for member in self.nested(name) if counts[member.rstrip("0123456789")] > 1]

    def _is_list(self, name: str) -> bool:
        nested = self.nested(name)
        kinds = {type(self._modules[member]) for member in nested}
        return len(kinds) == 1 and all(member[-1].isdigit() for member in nested)
