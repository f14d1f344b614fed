"""`Structure`: the modules that hold the entries, to notice a model whose modules were changed in mid-run.

Masks follow the tensors that the optimizer had when the engine was built. If a module is replaced or taken out, they go
on with its old tensors, which the model does not use any more: the figures would be those of another model.
"""

from __future__ import annotations

import weakref

from torch import nn

from gap_ds.method.names import parent
from gap_ds.method.plan import Plan, clean_name


class Structure:
    """The modules that hold the entries of a model, and its parameters, as they are when this is built.

    Wrappers around parts of the model (compiled, checkpointed) may be added and removed.

    Args:
        module: the model inside all wrappers.
    """

    def __init__(self, plan: Plan, module: nn.Module) -> None:
        modules = _by_name(module)
        held = {name: modules.get(parent(name)) for name in plan.parameters()}
        self._holders = {name: weakref.ref(holder) for name, holder in held.items() if holder is not None}
        self._names = {clean_name(name) for name, _ in module.named_parameters()}

    def lost(self, module: nn.Module) -> str | None:
        """An error for the first entry that the model does not hold where it did; None if all are there."""
        modules, names = _by_name(module), dict[int, str]()
        for name, holder in self._holders.items():
            found = modules.get(parent(name))
            if found is None or found is not holder():
                return (
                    f"{name}: the module that held it when the engine was built was replaced or taken out of the "
                    "model. Change the model (layers, adapters) before the engine is built, or close() it and build "
                    "another one."
                )
            parameter = found._parameters.get(name.rpartition(".")[2])
            if parameter is not None and (other := names.setdefault(id(parameter), name)) != name:
                return f"{name}: is the same parameter as {other} now. Tie weights before the engine is built."
        return None

    def added(self, module: nn.Module) -> tuple[str, str] | None:
        """The first trained matrix that the model did not have, and a warning; None if there are none."""
        trained = {clean_name(name): p.dim() for name, p in module.named_parameters() if p.requires_grad}
        found = [name for name, dim in trained.items() if dim > 1 and name not in self._names]
        if not found:
            return None
        others = f" and {len(found) - 1} others" if len(found) > 1 else ""
        return found[0], (
            f"{found[0]}{others}: added since the engine was built, so it is no entry and stays dense. Change the "
            "model before the engine is built."
        )


def _by_name(module: nn.Module) -> dict[str, nn.Module]:
    """Modules by their names without wrappers; of a wrapper and what is in it, the inner one."""
    return {clean_name(name): found for name, found in module.named_modules(remove_duplicate=False)}
