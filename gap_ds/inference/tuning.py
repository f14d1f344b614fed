"""Sparse inference: linear layers in whatever form is fastest on this machine, found by measuring it.

The forms are those of gap_ds/layers.py. What is measured of layers alone is a forecast; where the caller gives a run
of the model, whole runs with and without decide:

    1. the run is watched: which layer sees how many rows how often, and which are called with one and the same input
    2. layers that are alike are timed in every form; a group that saves too little of the run stays as it is
    3. runs before and after are timed in pairs until the gain is sure; else the group that saves least goes back, and
       they are timed again; at last everything goes back

R rows of activations that a layer sees at once: in the decoder sentences * beams, in an encoder all tokens of a batch.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gap_ds.inference import layers as linears
from gap_ds.inference import timing
from gap_ds.inference.layers import CSRLinear

Form = Literal["dense", "packed", "csr", "joined", "2:4"]
FORMS: tuple[Form, ...] = ("dense", "packed", "csr", "joined", "2:4")

#: (the same layers in each form, rows) -> seconds of a call in each form.
Measure = Callable[[Mapping[Form, Sequence[nn.Module]], int], Mapping[Form, float]]

#: Layers of one shape that are timed in turn, so that one layer's weights do not stay in the cache as they never do
#: in a model; calls in each form, at the most; and the time in seconds after which three calls are enough.
_LAYERS, _CALLS, _SECONDS = 12, 60, 0.5
#: Row counts of a layer that are measured one by one; where a run has shown more, they are rounded first.
_SIZES = 8
#: A group that saves a smaller share of the run is not worth what may go wrong.
_LEAST = 0.01
#: How often a group is put back before everything is.
_PUT_BACK = 2


@dataclass(frozen=True)
class Choice:
    """What was chosen for layers that are alike, a row of the table.

    names: of the layers.
    shape: (output, input) dimension.
    density: share of weights that are not zero.
    batch: calls by the number of rows in each, as (rows, calls), of each layer.
    form: what the layers are now.
    best: the fastest other form by the measurement of the layers alone; None if there was none to measure.
    ratio: seconds of the layers as they were over those in `best`: above 1 that form is faster. None with `best`.
    seconds: of all calls of all the layers in each form that was measured.
    run: seconds of whole runs before over those after, as last tested; None if they were not.
    why: the layers have the form they have, in a few words.
    """

    names: tuple[str, ...]
    shape: tuple[int, int]
    density: float
    batch: tuple[tuple[int, int], ...]
    form: Form
    best: Form | None
    ratio: float | None
    seconds: Mapping[Form, float]
    run: float | None
    why: str

    def row(self) -> dict[str, Any]:
        """The same for JSON."""
        return {**asdict(self), "names": list(self.names), "shape": list(self.shape)}


def sparsify_for_inference(
    model: nn.Module,
    batch: int | Callable[[nn.Module], object] = 1,
    *,
    form: Literal["auto", "dense", "packed", "csr", "joined", "2:4"] = "auto",
    min_sparsity: float = 0.5,
    margin: float | None = None,
    seconds: float = 60.0,
    measure: Measure | None = None,
) -> list[Choice]:
    """Gives the linear layers of a model the form that is fastest here, in place, and says which.

    Every `nn.Linear` is considered, wherever it is; for a sparse form at least `min_sparsity` of its weights must be
    zero. Any other module stays as it is. Afterwards the model is in evaluation mode, takes no gradients, and its
    results differ from the dense ones by rounding alone. Its state dict is that of the dense model, but for layers in
    the form `2:4`, which hold torch's own tensors. To train it, load it again.

    Args:
        batch: a function that runs the model as it will be used, such as
            ``lambda model: model.generate(**inputs, num_beams=4, max_new_tokens=16)``. Every layer is measured with
            the rows that it sees in it, as often as it sees them, and whole runs with and without the new forms are
            timed in turns: unless it is sure that the model gained, it is left with the very modules it came with. Or a
            number of rows that each layer will see at once. Then layers are measured alone, and nothing is known, nor
            guaranteed, about the model as a whole.
        form: `auto` to measure; any other is taken unmeasured by all layers that can have it. `joined` is `csr` with
            one product for layers that are called with the same input, which only a run can show.
        min_sparsity: in [0, 1].
        margin: how many times as fast another form, and the whole run, must at least be; 1.05 by default, and 1.2 if
            `batch` is a number.
        seconds: that choosing may take besides two runs of the model, one to watch and one to time. Half of them are
            for the layers; what was not measured, or is not sure, when they are over stays as it was. So give a run
            that takes a twentieth of them, or less.
        measure: in place of `measure_layers`, whose results are kept for the life of the process in `MEASURED`.
    Raises:
        ValueError: an argument out of range.
    """
    margin = _margin(batch, form, min_sparsity, margin, seconds)
    deadline = time.perf_counter() + seconds
    model.eval().requires_grad_(False)
    layers = _linears(model)
    run, rows = (batch, 0) if callable(batch) else (None, batch)
    seen = _watched(model, layers, run) if run else _Seen({name: Counter({rows: 1}) for name in layers})
    groups = _grouped(layers, seen, min_sparsity)
    if form != "auto":
        replacements = _asked_for(groups, seen, form)
        _replace(model, replacements)
        return [row for group in groups for row in group.rows(replacements, None, "asked for", "has no such form")]
    with seen.mode():
        begin = time.perf_counter()
        whole = timing.seconds(run, model, _device(model)) if run else math.inf
        deadline += time.perf_counter() - begin + seen.watching
        parts = _forecast(groups, seen, margin, whole, deadline - seconds / 2, measure)
        replacements, ratio, why = _merged(parts), None, "faster alone; no run was given to test"
        if run and parts:
            replacements, ratio, why = _tested(model, run, parts, margin, whole, deadline)
    _replace(model, replacements)
    return [
        row for group in groups for row in group.rows(replacements, ratio, why, "put back: whole runs gain without")
    ]


def _margin(batch: object, form: str, min_sparsity: float, margin: float | None, seconds: float) -> float:
    """The margin; ValueError for an argument out of range."""
    if not callable(batch) and (isinstance(batch, bool) or not isinstance(batch, int) or batch < 1):
        raise ValueError(f"batch={batch!r}: must be an int of at least 1, or a function that runs the model.")
    if form not in ("auto", *FORMS):
        raise ValueError(f"form={form!r}: must be auto, {', '.join(FORMS)}.")
    if form == "joined" and not callable(batch):
        raise ValueError("form='joined': only a run shows which layers have one input. Set batch to a function.")
    if not 0 <= min_sparsity <= 1:
        raise ValueError(f"min_sparsity={min_sparsity}: must lie in [0, 1].")
    if margin is not None and not margin >= 1:
        raise ValueError(f"margin={margin}: must be at least 1.")
    if not seconds > 0:
        raise ValueError(f"seconds={seconds}: must be above 0.")
    return margin if margin is not None else 1.05 if callable(batch) else 1.2


# -- which layers, with how many rows, and after which others ---------------------------------------------------------


def _linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The layers that may be replaced, by name; one that has several names has its first."""
    found: dict[nn.Linear, str] = {}
    for prefix, parent in model.named_modules():
        # These hand their children's weights to a fused kernel, past the children's forward.
        if isinstance(parent, (nn.MultiheadAttention, nn.TransformerEncoderLayer)):
            continue
        for name, child in parent._modules.items():
            # A subclass, a hook or a patched forward does something of its own.
            if type(child) is nn.Linear and not (
                child._forward_hooks or child._forward_pre_hooks or "forward" in child.__dict__
            ):
                found.setdefault(child, f"{prefix}.{name}" if prefix else name)
    return {name: layer for layer, name in found.items()}


def _replace(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and child in replacements:
                parent._modules[name] = replacements[child]


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


@dataclass
class _Seen:
    """What a run has shown.

    rows: calls of each layer by their rows.
    together: names of layers of one parent that were always called one after the other with the same tensor.
    inference: whether the layers were called in inference mode.
    watching: seconds that it took.
    """

    rows: dict[str, Counter[int]]
    together: list[tuple[str, ...]] = field(default_factory=list)
    inference: bool = False
    watching: float = 0.0

    def mode(self) -> AbstractContextManager[None]:
        """As the layers were called: the two ways differ in what a call costs."""
        return torch.inference_mode() if self.inference else torch.no_grad()


def _watched(model: nn.Module, layers: Mapping[str, nn.Linear], run: Callable[[nn.Module], object]) -> _Seen:
    """One run; many different row counts are rounded up to powers of two, so that few are timed."""
    begin = time.perf_counter()
    seen = _Seen({name: Counter() for name in layers})
    calls: Counter[str] = Counter()
    # By parent: the last input, held so that no other tensor is taken for it, and the layers that were called with it.
    last: dict[str, tuple[Tensor, list[str]]] = {}
    patterns: Counter[tuple[str, ...]] = Counter()

    def watch(name: str) -> Callable[..., None]:
        parent = name.rpartition(".")[0]

        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs["input"]
            seen.inference = torch.is_inference_mode_enabled()
            calls[name] += 1
            if n := x.numel() // x.shape[-1]:
                seen.rows[name][n] += 1
            before, names = last.get(parent, (None, []))
            if before is x and name not in names:
                names.append(name)
                return
            patterns[tuple(names)] += 1
            last[parent] = x, [name]

        return hook

    hooks = [layer.register_forward_pre_hook(watch(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        with torch.no_grad():  # as `generate` does; a run may enter inference mode itself
            run(model)
    finally:
        for handle in hooks:
            handle.remove()
    patterns.update(tuple(names) for _, names in last.values())
    always = [names for names, n in patterns.items() if len(names) > 1 and all(calls[name] == n for name in names)]
    seen.rows = {name: rows if len(rows) <= _SIZES else _rounded(rows) for name, rows in seen.rows.items()}
    seen.together, seen.watching = always, time.perf_counter() - begin
    return seen


def _rounded(calls: Counter[int]) -> Counter[int]:
    """
    >>> _rounded(Counter({1: 2, 5: 1, 8: 3}))
    Counter({8: 4, 1: 2})
    """
    rounded: Counter[int] = Counter()
    for rows, count in calls.items():
        rounded[1 << (rows - 1).bit_length()] += count
    return rounded


@dataclass
class _Group:
    """Layers that are measured as one.

    kind: what they have in common, for the key of a measurement.
    densities: share of weights that are not zero, by name.
    seconds: of all calls of all layers by form, once they are measured.
    best: the form that they are to have, or what else is the fastest.
    why: they stay as they are, if that is known before whole runs are tested.
    """

    kind: tuple[Any, ...]
    layers: dict[str, nn.Linear]
    densities: dict[str, float]
    is_sparse: bool
    loads: tuple[tuple[int, int], ...]
    seconds: dict[Form, float] = field(default_factory=dict)
    best: Form | None = None
    why: str = ""

    def rows(
        self, replacements: Mapping[nn.Module, nn.Module], run: float | None, why: str, left: str
    ) -> Iterator[Choice]:
        """A row of the table for each form that layers of the group have now.

        why, left: they have it, if they are among those that were replaced, and if only others were.
        """
        forms: dict[Form, list[str]] = {}
        for name, layer in self.layers.items():
            forms.setdefault(_form(replacements.get(layer, layer)), []).append(name)
        for form, names in forms.items():
            best = form if form != "dense" and self.best else self.best
            share = len(names) / len(self.layers)
            yield Choice(
                names=tuple(names),
                shape=(self.kind[0][0], self.kind[0][1]),
                density=statistics.fmean(self.densities[name] for name in names),
                batch=self.loads,
                form=form,
                best=best,
                ratio=self.seconds["dense"] / max(self.seconds[best], 1e-12) if best else None,
                seconds={form: share * total for form, total in self.seconds.items()},
                run=run,
                why=self.why or (left if form == "dense" and replacements else why),
            )


def _form(layer: nn.Module) -> Form:
    kinds: list[tuple[type[nn.Module], Form]] = [
        (linears.JoinedLinear, "joined"), (CSRLinear, "csr"), (linears.PackedLinear, "packed")
    ]  # fmt: skip
    return next((form for kind, form in kinds if isinstance(layer, kind)), "2:4" if _is_2_of_4(layer) else "dense")


def _is_2_of_4(layer: nn.Module) -> bool:
    return isinstance(layer.weight, torch.sparse.SparseSemiStructuredTensor)


def _grouped(layers: Mapping[str, nn.Linear], seen: _Seen, min_sparsity: float) -> list[_Group]:
    groups: dict[Any, _Group] = {}
    for name, layer in layers.items():
        weight = layer.weight
        density = int(torch.count_nonzero(weight)) / max(1, weight.numel())
        is_sparse = density <= 1 - min_sparsity
        # Densities are told apart to a hundredth.
        kind = (tuple(weight.shape), weight.dtype, weight.device, layer.bias is None, is_sparse, round(density, 2))
        loads = tuple(sorted(seen.rows[name].items()))
        group = groups.setdefault((kind, loads), _Group(kind, {}, {}, is_sparse, loads))
        group.layers[name], group.densities[name] = layer, density
    return list(groups.values())


# -- the forms offered, and what they save ----------------------------------------------------------------------------


def _offered(group: _Group, form: str) -> dict[Form, list[nn.Module]]:
    """The layers in each form that all of them can have."""
    layers = list(group.layers.values())
    offered: dict[Form, list[nn.Module]] = {"dense": [*layers]}
    usual = _usual(group)
    builders: dict[Form, Callable[[nn.Linear], nn.Module | None]] = {
        "packed": lambda layer: linears.packed(layer, usual)
    }
    if group.is_sparse:
        builders |= {"csr": linears.csr, "2:4": linears.semi_structured}
    for name, build in builders.items():
        if form in ("auto", name):
            made = [made for layer in layers if (made := build(layer)) is not None]
            if len(made) == len(layers):
                offered[name] = made
    return offered


def _usual(group: _Group) -> int:
    """The number of rows that came most often."""
    return max(group.loads, key=lambda load: load[1])[0] if group.loads else 1


def _asked_for(groups: Sequence[_Group], seen: _Seen, form: Form) -> dict[nn.Module, nn.Module]:
    """The replacements for a form that is not measured."""
    wanted = "csr" if form == "joined" else form
    replacements: dict[nn.Module, nn.Module] = {}
    layers = {name: layer for group in groups for name, layer in group.layers.items()}
    for group in groups:
        if made := _offered(group, wanted).get(wanted):
            replacements |= zip(group.layers.values(), made, strict=True)
    if form == "joined":
        for names in seen.together:
            if new := _join([replacements.get(layers[name]) for name in names]):
                replacements |= zip([layers[name] for name in names], new, strict=True)
    return {old: new for old, new in replacements.items() if old is not new}


def _join(layers: Sequence[nn.Module | None]) -> list[linears.JoinedLinear] | None:
    found = [layer for layer in layers if isinstance(layer, CSRLinear)]
    if len(found) < len(layers):
        return None
    try:
        return linears.joined(found)
    except ValueError:
        return None


@dataclass(frozen=True)
class _Part:
    """Replacements that are made or taken back together.

    saving: seconds of a run by forecast.
    joins: whether they take the place of layers by compressed rows, and are worth nothing without those.
    """

    replacements: dict[nn.Module, nn.Module]
    saving: float
    joins: bool = False


def _merged(parts: Sequence[_Part]) -> dict[nn.Module, nn.Module]:
    found: dict[nn.Module, nn.Module] = {}
    for part in sorted(parts, key=lambda part: part.joins):
        if not part.joins or part.replacements.keys() <= found.keys():
            found |= part.replacements
    return found


def _forecast(
    groups: Sequence[_Group], seen: _Seen, margin: float, whole: float, deadline: float, measure: Measure | None
) -> list[_Part]:
    """What is worth trying: the largest groups first, until the time is over. Empty if it cannot reach the margin."""
    parts = []
    made: dict[str, CSRLinear] = {}
    for group in sorted(groups, key=_work, reverse=True):
        offered = _offered(group, "auto") if group.loads else {}
        if len(offered) < 2:
            group.why = "no other form" if group.loads else "never called"
        elif time.perf_counter() > deadline:
            group.why = "not measured in the time given"
        else:
            chosen = _timed(group, offered, seen, margin, whole, measure)
            if chosen is not None:
                parts.append(chosen)
                made |= {
                    n: new for n, new in zip(group.layers, offered[_best(group)], strict=True) if type(new) is CSRLinear
                }
    if time.perf_counter() < deadline:
        parts += _forecast_joined(groups, made, seen, margin, whole, measure)
    if not _enough(parts, whole, margin):
        for group in groups:
            group.why = group.why or "all layers together save too little of the run"
        return []
    return parts


def _work(group: _Group) -> int:
    outputs, inputs = group.kind[0]
    return len(group.layers) * int(outputs * inputs) * sum(rows * calls for rows, calls in group.loads)


def _best(group: _Group) -> Form:
    assert group.best is not None
    return group.best


def _enough(parts: Sequence[_Part], whole: float, margin: float) -> bool:
    """Whether the run can reach the margin if the forecast is right; without a run every saving is enough."""
    return bool(parts) and (math.isinf(whole) or whole >= margin * (whole - sum(part.saving for part in parts)))


def _timed(
    group: _Group,
    offered: Mapping[Form, Sequence[nn.Module]],
    seen: _Seen,
    margin: float,
    whole: float,
    measure: Measure | None,
) -> _Part | None:
    """The group in its fastest form, if that is worth trying."""
    totals = dict.fromkeys(offered, 0.0)
    for rows, calls in group.loads:
        key = (*group.kind, _usual(group), len(group.layers), rows, seen.inference, tuple(offered))
        found = _measured(key, offered, rows, measure)
        for form in totals:
            totals[form] += len(group.layers) * calls * found[form]
    best = min((form for form in offered if form != "dense"), key=lambda form: totals[form])
    group.seconds, group.best = totals, best
    saving = totals["dense"] - totals[best]
    if totals["dense"] < margin * totals[best]:
        group.why = "not faster by the margin"
    elif not math.isinf(whole) and saving < _LEAST * whole:
        group.why = f"saves less than {_LEAST:.0%} of the run"
    else:
        return _Part(dict(zip(group.layers.values(), offered[best], strict=True)), saving)
    return None


def _forecast_joined(
    groups: Sequence[_Group],
    made: Mapping[str, CSRLinear],
    seen: _Seen,
    margin: float,
    whole: float,
    measure: Measure | None,
) -> list[_Part]:
    """Layers by compressed rows that have one input, in one product; those that are alike are measured as one."""
    group_of = {name: group for group in groups for name in group.layers}
    layers = {name: layer for group in groups for name, layer in group.layers.items()}
    alike: dict[Any, list[tuple[str, ...]]] = {}
    for names in seen.together:
        if all(name in made for name in names):
            alike.setdefault(tuple((group_of[n].kind, group_of[n].loads) for n in names), []).append(names)
    parts = []
    for kind, sets in alike.items():
        new = [_join([made[name] for name in names]) for names in sets]
        if any(one is None for one in new):
            continue
        offered: dict[Form, list[nn.Module]] = {
            "csr": [_Together([made[name] for name in names]) for names in sets],
            "joined": [_Together(one) for one in new if one is not None],
        }
        apart = together = 0.0
        for rows, calls in kind[0][1]:
            key = (kind, len(sets), rows, seen.inference, "joined")
            found = _measured(key, offered, rows, measure)
            apart, together = apart + calls * found["csr"], together + calls * found["joined"]
        if not 0 < together * margin <= apart:
            continue
        share = together / apart
        inside = {id(group_of[name]): group_of[name] for names in sets for name in names}
        # What the layers of a set take in their groups, by the measurement that is comparable with the dense one.
        saving = (1 - share) * sum(
            group_of[n].seconds["csr"] / len(group_of[n].layers) for names in sets for n in names
        )
        if not math.isinf(whole) and saving < _LEAST * whole:
            continue
        for group in inside.values():
            group.seconds["joined"] = share * group.seconds["csr"]
        pairs = [
            (layers[n], m) for names, one in zip(sets, new, strict=True) for n, m in zip(names, one or (), strict=True)
        ]
        parts.append(_Part(dict(pairs), saving, joins=True))
    return parts


class _Together(nn.Module):
    """Layers that are called one after the other with the same input, to be timed as one."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    @property
    def weight(self) -> Any:
        return self.layers[0].weight

    def forward(self, x: Tensor) -> None:
        for layer in self.layers:
            layer(x)


#: What was measured in this process; clear it to measure again.
MEASURED: dict[Any, Mapping[Form, float]] = {}


def _measured(
    key: tuple[Any, ...], offered: Mapping[Form, Sequence[nn.Module]], rows: int, measure: Measure | None
) -> Mapping[Form, float]:
    if measure is not None:
        return measure(offered, rows)
    key = (*key, torch.get_num_threads())
    if key not in MEASURED:
        MEASURED[key] = measure_layers(offered, rows)
    return MEASURED[key]


def measure_layers(layers: Mapping[Form, Sequence[nn.Module]], rows: int) -> dict[Form, float]:
    """Median seconds of a call in each form. The forms take turns, so that what else the machine does falls on all."""
    weight = next(iter(layers.values()))[0].weight
    assert isinstance(weight, Tensor)
    # Not torch's generator: a seeded run must not depend on what was measured before it.
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, weight.shape[1], generator=generator).to(weight.device, weight.dtype)
    seconds: dict[Form, list[float]] = {form: [] for form in layers}
    with torch.no_grad():
        for modules in layers.values():
            modules[0](x)
        begin = time.perf_counter()
        for done in range(_CALLS):
            if done >= 3 and time.perf_counter() - begin > _SECONDS:
                break
            for form, modules in layers.items():
                seconds[form].append(timing.seconds(modules[done % min(len(modules), _LAYERS)], x, x.device))
    return {form: statistics.median(times) for form, times in seconds.items()}


# -- whole runs -------------------------------------------------------------------------------------------------------


def _tested(
    model: nn.Module,
    run: Callable[[nn.Module], object],
    parts: list[_Part],
    margin: float,
    whole: float,
    deadline: float,
) -> tuple[dict[nn.Module, nn.Module], float | None, str]:
    """The replacements that whole runs confirm, the ratio that was last found, and what came of it.

    The model is given back as it came.
    """
    ratio: float | None = None
    gained: bool | None = None
    for _ in range(1 + _PUT_BACK):
        replacements = _merged(parts)
        gained, ratio = _gain(model, run, replacements, margin, whole, deadline)
        if gained:
            return replacements, ratio, "whole runs confirm it"
        parts = sorted(parts, key=lambda part: part.saving)[1:]
        if not _enough(parts, whole, margin) or time.perf_counter() > deadline:
            break
    why = "whole runs did not gain" if gained is False else "whole runs did not decide it in the time given"
    return {}, ratio, why


def _gain(
    model: nn.Module,
    run: Callable[[nn.Module], object],
    after: Mapping[nn.Module, nn.Module],
    margin: float,
    whole: float,
    deadline: float,
) -> tuple[bool | None, float | None]:
    """Whether the run gains, and how many times as fast it is; the model is given back as it came."""
    before = {new: old for old, new in after.items()}
    is_new = False

    def timed(new: bool) -> float:
        nonlocal is_new
        if new != is_new:
            _replace(model, after if new else before)
            is_new = new
        return timing.seconds(run, model, _device(model))

    try:
        if whole < 1:  # in a longer run it is not seen that the first one is slower
            timed(True)
        return timing.gains(timed, margin, deadline)
    finally:
        if is_new:
            _replace(model, before)
