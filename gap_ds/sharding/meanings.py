"""Meanings of optimizer state: which tensors of it have a value for each weight, and what those start with.

What a state tensor means cannot be seen from its shape: a preconditioner may be as large as the weight, and zero is not
every state's first value. So the meaning comes from a table, by the optimizer's classes and its name for the tensor:

    moment     one value per weight, such as Adam's exp_avg; a regrown weight starts with the moment's first value
    sequence   other values of the weights themselves, such as schedule-free's z; pruned like the weights
    other      anything else; left alone
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

#: A moment's first value, or how it follows from the settings of its parameter group.
First: TypeAlias = float | Callable[[Mapping[str, Any]], float]
Meaning: TypeAlias = Literal["moment", "sequence", "other"]


@dataclass(frozen=True)
class Kinds:
    """Meaning of an optimizer's state: first values of its moments, names of its sequences and of the rest."""

    moments: Mapping[str, First] = field(default_factory=dict)
    sequences: tuple[str, ...] = ()
    other: tuple[str, ...] = ()

    def of(self, name: str) -> Meaning | None:
        """The meaning of a state tensor; None if it is not known."""
        if name in self.moments:
            return "moment"
        if name in self.sequences:
            return "sequence"
        return "other" if any(fnmatch.fnmatchcase(name, pattern) for pattern in self.other) else None

    def over(self, base: Kinds) -> Kinds:
        """These meanings, and those that a base has for names which these do not know."""
        moments = {name: first for name, first in base.moments.items() if self.of(name) is None}
        sequences = tuple(name for name in base.sequences if self.of(name) is None)
        return Kinds({**moments, **self.moments}, self.sequences + sequences, self.other + base.other)


_ADAM = Kinds({"exp_avg": 0.0, "exp_avg_sq": 0.0, "max_exp_avg_sq": 0.0})
_FREE = Kinds({"exp_avg_sq": 0.0, "max_exp_avg_sq": 0.0}, sequences=("z",))
#: Shampoo and SOAP keep statistics of rows and columns; SOAP's second moment is in their eigenbasis, not per weight.
_SHAMPOO = Kinds({"momentum_buffer": 0.0, "momentum": 0.0}, other=("pre_cond_*", "inv_pre_cond_*"))
_SOAP = Kinds({"exp_avg": 0.0}, other=("exp_avg_sq", "GG", "Q"))

#: By class name. Sources: torch/optim, deepspeed/ops, transformers, and the published code of each optimizer.
KNOWN: Mapping[str, Kinds] = {
    # Where two names have the same record, one can go on with the state of the other.
    **dict.fromkeys(("Adam", "AdamW", "FusedAdam", "DeepSpeedCPUAdam"), _ADAM),
    **dict.fromkeys(("FusedLamb", "Lamb"), replace(_ADAM)),
    "NAdam": replace(_ADAM),
    "RAdam": replace(_ADAM),
    "Adamax": Kinds({"exp_avg": 0.0, "exp_inf": 0.0}),
    "Adadelta": Kinds({"square_avg": 0.0, "acc_delta": 0.0}),
    "Adagrad": Kinds({"sum": lambda group: float(group.get("initial_accumulator_value", 0.0))}),
    "DeepSpeedCPUAdagrad": Kinds({"exp_avg_sq": 0.0}),
    "Adafactor": Kinds(
        {"variance": 0.0, "exp_avg": 0.0, "exp_avg_sq": 0.0},
        other=("row_var", "col_var", "exp_avg_sq_row", "exp_avg_sq_col"),
    ),
    "ASGD": Kinds(sequences=("ax",)),
    "Rprop": Kinds({"prev": 0.0, "step_size": lambda group: float(group["lr"])}),
    "RMSprop": Kinds({"square_avg": 0.0, "momentum_buffer": 0.0, "grad_avg": 0.0}),
    "SGD": Kinds({"momentum_buffer": 0.0}),
    # Some variants step what is no matrix by Adam.
    **{
        name: Kinds({"momentum_buffer": 0.0, "exp_avg": 0.0, "exp_avg_sq": 0.0}) for name in ("Muon", "MuonWithAuxAdam")
    },
    **dict.fromkeys(("Lion", "FusedLion", "DeepSpeedCPULion"), Kinds({"exp_avg": 0.0})),
    **{f"{name}ScheduleFree": replace(_FREE) for name in ("AdamW", "RAdam", "SGD")},
    **{f"ScheduleFree{name}": replace(_FREE) for name in ("AdamW", "RAdam", "SGD")},
    "Shampoo": _SHAMPOO,
    "SOAP": _SOAP,
    # The bases of all optimizers of bitsandbytes, whose own names are those of torch (AdamW, Lion).
    "Optimizer1State": Kinds({"state1": 0.0}),
    "Optimizer2State": Kinds({"state1": 0.0, "state2": 0.0}),
}
#: Of a class that the table does not have: names that optimizers give to moments which start at zero.
USUAL = Kinds({"exp_avg": 0.0, "exp_avg_sq": 0.0, "max_exp_avg_sq": 0.0, "momentum_buffer": 0.0})
