"""Sparse inference: gives each linear layer the layout that is fastest on this machine, found by measurement.

    observe   one run of the model shows which layer sees how many rows how often, and which layers share an input
    measure   layers that are alike are timed alone, in every layout that they can have
    propose   groups that are faster by the margin and save a noticeable part of the run become changes
    confirm   runs with and without the changes are timed in pairs until the gain is certain; if it is not, the group
              that saves least is put back and the rest is tested again; in the end everything is put back

Times of layers alone only predict; where the caller gives a run of the model, whole runs decide.

R rows of activations that a layer sees at once: sentences * beams in a decoder, all tokens of a batch in an encoder.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import nn

from gap_ds.inference import timing
from gap_ds.inference.layers import LAYOUTS, Layout, layout_of
from gap_ds.inference.measure import Measure, Times
from gap_ds.inference.propose import Change, Goal, all_in, merged, propose
from gap_ds.inference.usage import Group, Usage, group_alike, observe, replaceable

#: Groups that are put back one by one before everything is.
_PUT_BACK = 2


@dataclass(frozen=True)
class Choice:
    """The layout chosen for layers that are alike; a row of the table.

    names: names of the layers.
    shape: (output, input) dimension.
    density: fraction of nonzero weights.
    batch: (rows, calls) of each layer.
    layout: the layout that the layers have now.
    best: the layout other than dense that is fastest for the layers alone; None if none was measured.
    ratio: seconds of the dense layers over those in `best`, above 1 if `best` is faster. None if `best` is.
    seconds: of all calls of all the layers, in each layout that was measured.
    run: seconds of whole runs before the change over those after it, in the last test; None if not tested.
    reason: why the layers have this layout, in a few words.
    """

    names: tuple[str, ...]
    shape: tuple[int, int]
    density: float
    batch: tuple[tuple[int, int], ...]
    layout: Layout
    best: Layout | None
    ratio: float | None
    seconds: Mapping[Layout, float]
    run: float | None
    reason: str

    def row(self) -> dict[str, Any]:
        """The choice as JSON values."""
        return {**asdict(self), "names": list(self.names), "shape": list(self.shape)}


def sparsify_for_inference(
    model: nn.Module,
    batch: int | Callable[[nn.Module], object] = 1,
    *,
    layout: Literal["auto", "dense", "packed", "csr", "joined", "2:4"] = "auto",
    min_sparsity: float = 0.5,
    margin: float | None = None,
    seconds: float = 60.0,
    measure: Measure | None = None,
) -> list[Choice]:
    """Give the linear layers of a model the layout that is fastest here, in place, and return the choices.

    Every `nn.Linear` and every `Conv1D` of GPT-2 is considered, wherever it is; a sparse layout requires that at least
    `min_sparsity` of its weights are zero. Other modules stay as they are. Afterwards the model is in evaluation mode
    without gradients, and its results differ from the dense ones only by rounding. Its state dict is that of the dense
    model, except for layers in the layout `2:4`, which hold torch's own tensors. To train the model, load it again.

    Args:
        batch: a function that runs the model as it will be used, such as
            ``lambda model: model.generate(**inputs, num_beams=4, max_new_tokens=16)``. Layers are measured with the
            rows that they see in this run, and whole runs with and without the new layouts are timed in turns: unless
            the gain is certain, the model keeps its modules. Or a number of rows that each layer will see at once.
            Then layers are measured alone, and nothing is guaranteed about the model as a whole.
        layout: `auto` to measure. Any other is given unmeasured to all layers that the run calls and that can have it.
            `joined` is `csr` with one product for layers that are called with the same input; it requires a function
            as `batch`.
        min_sparsity: in [0, 1].
        margin: speed-up, at least 1, that each group of layers and the whole run must reach. Default: 1.05, or 1.2 if
            `batch` is a number.
        seconds: time limit, besides two runs of the model (one to observe, one to time). Half of it is for the layers.
            Whatever is not measured or not certain by then stays dense. Use a run of at most a twentieth of it.
        measure: used in place of `measure.measure_layers`, whose results are kept in `measure.MEASURED`.
    Raises:
        ValueError: an argument is out of range.
    """
    margin = _margin(batch, layout, min_sparsity, margin, seconds)
    deadline = time.perf_counter() + seconds
    model.eval().requires_grad_(False)
    linears = replaceable(model)
    run, rows = (batch, 0) if callable(batch) else (None, batch)
    usage = observe(model, linears, run) if run else Usage({name: Counter({rows: 1}) for name in linears})
    groups = group_alike(linears, usage, min_sparsity)
    if layout != "auto":
        wanted = Decision(all_in(layout, groups, usage), None, "requested", "cannot have the requested layout")
        _replace(model, wanted.replacements)
        never = {group: "never called" for group in groups if not group.loads}
        return list(_table(groups, {}, never, wanted))
    with usage.mode():
        begin = time.perf_counter()
        goal = Goal(margin, timing.seconds(run, model, _device(model)) if run else math.inf)
        deadline += time.perf_counter() - begin + usage.seconds
        proposal = propose(groups, usage, goal, deadline - seconds / 2, measure)
        if run and proposal.changes:
            decision = confirm(model, run, proposal.changes, goal, deadline)
        else:
            decision = Decision(merged(proposal.changes), None, "faster alone; no run was given to test")
    _replace(model, decision.replacements)
    return list(_table(groups, proposal.times, proposal.reasons, decision))


def _margin(batch: object, layout: str, min_sparsity: float, margin: float | None, seconds: float) -> float:
    """The margin to use; ValueError if an argument is out of range."""
    if not callable(batch) and (isinstance(batch, bool) or not isinstance(batch, int) or batch < 1):
        raise ValueError(f"batch={batch!r}: must be an int of at least 1, or a function that runs the model.")
    if layout not in ("auto", *LAYOUTS):
        raise ValueError(f"layout={layout!r}: must be auto, {', '.join(LAYOUTS)}.")
    if layout == "joined" and not callable(batch):
        raise ValueError(
            f"layout='joined', batch={batch}: only a run shows which layers share an input. Set batch to a function."
        )
    if not 0 <= min_sparsity <= 1:
        raise ValueError(f"min_sparsity={min_sparsity}: must lie in [0, 1].")
    if margin is not None and not margin >= 1:
        raise ValueError(f"margin={margin}: must be at least 1.")
    if not seconds > 0:
        raise ValueError(f"seconds={seconds}: must be above 0.")
    return margin if margin is not None else 1.05 if callable(batch) else 1.2


@dataclass(frozen=True)
class Decision:
    """Replacements to make.

    run: seconds of whole runs before over those after, in the last test; None if not tested.
    reason: for the layers that are replaced; for all if none is.
    put_back: for the layers that stay dense although others are replaced.
    """

    replacements: Mapping[nn.Module, nn.Module]
    run: float | None
    reason: str
    put_back: str = "put back: whole runs gain without"


def confirm(
    model: nn.Module, run: Callable[[nn.Module], object], changes: Sequence[Change], goal: Goal, deadline: float
) -> Decision:
    """Tests changes by whole runs, with less of them each time, and returns those that gain. The model is unchanged.

    Args:
        changes: at least one.
        deadline: in time.perf_counter; no pair of runs begins after it.
    """
    ratio: float | None = None
    gained: bool | None = None
    for _ in range(1 + _PUT_BACK):
        replacements = merged(changes)
        gained, ratio = _gain(model, run, replacements, goal, deadline)
        if gained:
            return Decision(replacements, ratio, "whole runs confirm it")
        changes = sorted(changes, key=lambda change: change.saving)[1:]
        if not goal.is_reached(changes) or time.perf_counter() > deadline:
            break
    outcome = "gain" if gained is False else "decide it in the time given"
    return Decision({}, ratio, f"whole runs did not {outcome}")


def _gain(
    model: nn.Module,
    run: Callable[[nn.Module], object],
    after: Mapping[nn.Module, nn.Module],
    goal: Goal,
    deadline: float,
) -> tuple[bool | None, float | None]:
    """The verdict and the speed-up that `timing.gains` finds. The model is unchanged afterwards."""
    before = {new: old for old, new in after.items()}
    is_new = False

    def timed(new: bool) -> float:
        nonlocal is_new
        if new != is_new:
            _replace(model, after if new else before)
            is_new = new
        return timing.seconds(run, model, _device(model))

    try:
        if goal.run_seconds < 1:  # a first run is slower; in a longer one it does not matter
            timed(True)
        return timing.gains(timed, goal.margin, deadline)
    finally:
        if is_new:
            _replace(model, before)


def _replace(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and child in replacements:
                parent._modules[name] = replacements[child]


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _table(
    groups: Sequence[Group], times: Mapping[Group, Times], reasons: Mapping[Group, str], decision: Decision
) -> Iterator[Choice]:
    """One row for each layout that layers of a group have now."""
    for group in groups:
        members: dict[Layout, list[str]] = {}
        for name, layer in group.layers.items():
            members.setdefault(layout_of(decision.replacements.get(layer, layer)), []).append(name)
        measured = times.get(group)
        seconds = measured.seconds if measured else {}
        for layout, names in members.items():
            best = None if measured is None else measured.best if layout == "dense" else layout
            left = layout == "dense" and decision.replacements
            share = len(names) / len(group.layers)
            yield Choice(
                names=tuple(names),
                shape=(group.kind.outputs, group.kind.inputs),
                density=statistics.fmean(group.densities[name] for name in names),
                batch=group.loads,
                layout=layout,
                best=best,
                ratio=seconds["dense"] / max(seconds[best], 1e-12) if best else None,
                seconds={one: share * total for one, total in seconds.items()},
                run=decision.run,
                reason=reasons.get(group) or (decision.put_back if left else decision.reason),
            )
