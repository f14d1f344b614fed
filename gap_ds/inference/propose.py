"""Replacements of layers: all that can have a requested layout, or those that measurement predicts to be faster."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from gap_ds.inference import layers
from gap_ds.inference.layers import CSRLinear, JoinedLinear, Layout
from gap_ds.inference.measure import Measure, Times, candidates, time_group, time_joined
from gap_ds.inference.usage import Group, Usage

#: A group that saves a smaller fraction of the run stays dense: the gain is not worth the risk.
_LEAST = 0.01


@dataclass(frozen=True)
class Change:
    """Layers that are replaced, or put back, together.

    replacements: old layer -> new layer.
    saving: predicted seconds per run.
    joins: the new layers are joined csr layers; the change is useless without the one to csr of the same layers.
    """

    replacements: Mapping[nn.Module, nn.Module]
    saving: float
    joins: bool = False


@dataclass(frozen=True)
class Goal:
    """Gain that makes changes worth trying.

    margin: required speed-up, of a group and of the run; at least 1.
    run_seconds: duration of the run with dense layers; infinity if there is no run.
    """

    margin: float
    run_seconds: float

    def objection(self, times: Times) -> str | None:
        """The reason to leave a group dense; None if it is worth replacing."""
        if times.seconds["dense"] < self.margin * times.seconds[times.best]:
            return "not faster by the margin"
        return None if self.is_noticed(times.saving) else f"saves less than {_LEAST:.0%} of the run"

    def is_noticed(self, saving: float) -> bool:
        return math.isinf(self.run_seconds) or saving >= _LEAST * self.run_seconds

    def is_reached(self, changes: Sequence[Change]) -> bool:
        """True if the run reaches the margin, provided that the predictions hold. Without a run any change does."""
        after = self.run_seconds - sum(change.saving for change in changes)
        return bool(changes) and (math.isinf(self.run_seconds) or self.run_seconds >= self.margin * after)


@dataclass(frozen=True)
class Proposal:
    """Changes that are worth trying.

    times: the groups that were measured.
    reasons: for each group that stays dense whatever the test of whole runs shows, the reason.
    """

    changes: tuple[Change, ...]
    times: Mapping[Group, Times]
    reasons: Mapping[Group, str]


def merged(changes: Iterable[Change]) -> dict[nn.Module, nn.Module]:
    """The replacements of all changes. A join replaces the csr layers it is built on, and is dropped without them."""
    found: dict[nn.Module, nn.Module] = {}
    for change in sorted(changes, key=lambda change: change.joins):
        if not change.joins or change.replacements.keys() <= found.keys():
            found |= change.replacements
    return found


def all_in(layout: Layout, groups: Sequence[Group], usage: Usage) -> dict[nn.Module, nn.Module]:
    """Replacements that give every layer this layout if it can have it. Nothing is measured.

    A layer that the run never called stays: its weight may be read by other code (Mamba), which takes a dense one.
    """
    wanted: Layout = "csr" if layout == "joined" else layout
    found: dict[nn.Module, nn.Module] = {}
    for group in groups:
        if wanted != "dense" and group.loads and (made := candidates(group, wanted).get(wanted)):
            found |= zip(group.layers.values(), made, strict=True)
    if layout == "joined":
        linears = _linears(groups)
        for names in usage.shared:
            if new := _joined([found.get(linears[name]) for name in names]):
                found |= zip([linears[name] for name in names], new, strict=True)
    return found


def propose(groups: Sequence[Group], usage: Usage, goal: Goal, deadline: float, measure: Measure | None) -> Proposal:
    """Measures the groups, those with most multiplications first, and proposes the changes that promise to pay.

    Args:
        deadline: in time.perf_counter; no measurement begins after it.
        measure: see `measure.time_group`.
    Returns:
        No changes if the run cannot reach the margin even with all of them.
    """
    times: dict[Group, Times] = {}
    reasons: dict[Group, str] = {}
    changes: list[Change] = []
    rows: dict[str, CSRLinear] = {}
    for group in sorted(groups, key=lambda group: group.multiplications, reverse=True):
        made = candidates(group, "auto") if group.loads else {}
        if len(made) < 2:
            reasons[group] = "no other layout" if group.loads else "never called"
        elif time.perf_counter() > deadline:
            reasons[group] = "not measured in the time given"
        else:
            found = times[group] = time_group(group, made, usage.inference, measure)
            if objection := goal.objection(found):
                reasons[group] = objection
                continue
            changes.append(Change(dict(zip(group.layers.values(), found.layers, strict=True)), found.saving))
            rows |= {n: new for n, new in zip(group.layers, found.layers, strict=True) if type(new) is CSRLinear}
    if time.perf_counter() < deadline:
        for change, share, joined in _joins(groups, times, rows, usage, goal, measure):
            changes.append(change)
            for group in joined:
                seconds = times[group].seconds
                times[group] = replace(times[group], seconds={**seconds, "joined": share * seconds["csr"]})
    if not goal.is_reached(changes):
        left = {group: reasons.get(group, "all layers together save too little of the run") for group in groups}
        return Proposal((), times, left)
    return Proposal(tuple(changes), times, reasons)


def _joins(
    groups: Sequence[Group],
    times: Mapping[Group, Times],
    rows: Mapping[str, CSRLinear],
    usage: Usage,
    goal: Goal,
    measure: Measure | None,
) -> list[tuple[Change, float, set[Group]]]:
    """Joins that pay, each with its time as a fraction of that of the separate layers, and the groups it touches.

    Args:
        rows: the layers that are to be csr, by name. Sets of layers that are alike are measured together.
    """
    group_of = {name: group for group in groups for name in group.layers}
    linears = _linears(groups)
    alike: dict[tuple[Group, ...], list[tuple[str, ...]]] = {}
    for names in usage.shared:
        if all(name in rows for name in names):
            alike.setdefault(tuple(group_of[name] for name in names), []).append(names)
    found = []
    for members, sets in alike.items():
        new = [_joined([rows[name] for name in names]) for names in sets]
        joined = [one for one in new if one is not None]
        if len(joined) < len(sets):
            continue
        separate = [[rows[name] for name in names] for names in sets]
        share = time_joined(separate, joined, members, usage.inference, measure)
        # Seconds of the separate layers from their own groups, where they were compared with the dense ones.
        before = len(sets) * sum(times[group].seconds["csr"] / len(group.layers) for group in members)
        if not 0 < share * goal.margin <= 1 or not goal.is_noticed((1 - share) * before):
            continue
        replacements: dict[nn.Module, nn.Module] = {
            linears[name]: layer
            for names, one in zip(sets, joined, strict=True)
            for name, layer in zip(names, one, strict=True)
        }
        found.append((Change(replacements, (1 - share) * before, joins=True), share, set(members)))
    return found


def _linears(groups: Sequence[Group]) -> dict[str, nn.Linear]:
    return {name: layer for group in groups for name, layer in group.layers.items()}


def _joined(members: Sequence[nn.Module | None]) -> list[JoinedLinear] | None:
    found = [layer for layer in members if isinstance(layer, CSRLinear)]
    if len(found) < len(members):
        return None
    try:
        return layers.joined(found)
    except ValueError:
        return None
