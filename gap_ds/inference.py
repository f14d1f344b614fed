"""Sparse inference: linear layers in whatever form is fastest on this machine, found by measuring it.

    csr     on a CPU: compressed rows with 32-bit indices, multiplied by MKL in fp32 or fp64 (bf16 and fp16 in fp32)
    packed  on a CPU: dense in the blocked layout of oneDNN, as torch.compile packs the weights of a frozen model; also
            for layers that are not sparse, such as the output projection
    2:4     on an NVIDIA GPU of capability 8.0 or later: semi-structured, for weights that have the pattern

The product of csr is W @ x^T with x^T laid out by rows: MKL then streams over the columns of a row of W. The other
ways that torch offers (x @ W^T with W^T by compressed rows, a result laid out by columns) were measured to be 2 to 100
times slower. A single row x is multiplied as a vector, about twice as fast again for large weights.

R rows of activations that a layer sees at once: in the decoder sentences * beams, in an encoder all tokens of a batch.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

Form = Literal["dense", "packed", "csr", "2:4"]
FORMS: tuple[Form, ...] = ("dense", "packed", "csr", "2:4")

#: (the same layers in each form, rows) -> seconds of a call in each form.
Measure = Callable[[Mapping[Form, Sequence[nn.Module]], int], Mapping[Form, float]]

#: Layers of one shape that are timed in turn, so that one layer's weights do not stay in the cache as they never do
#: in a model, and the time in seconds after which no further round is begun.
_LAYERS, _ROUNDS, _SECONDS = 12, 9, 0.5
#: Row counts of a layer that are measured one by one; where a run has shown more, they are rounded first.
_SIZES = 8
#: Whole runs, with and without the new forms, that confirm a choice.
_PAIRS = 3


@dataclass(frozen=True)
class Choice:
    """What was chosen for layers that are alike, a row of the table.

    names: of the layers.
    shape: (output, input) dimension.
    density: share of weights that are not zero.
    batch: calls by the number of rows in each, as (rows, calls).
    form: what the layers are now.
    ratio: seconds of the layers as they were over those of the fastest other form: above 1 that form is faster. None:
        there is no other form, or nothing was measured.
    """

    names: tuple[str, ...]
    shape: tuple[int, int]
    density: float
    batch: tuple[tuple[int, int], ...]
    form: Form
    ratio: float | None

    def row(self) -> dict[str, Any]:
        """The same for JSON."""
        return {**asdict(self), "names": list(self.names), "shape": list(self.shape)}


def sparsify_for_inference(
    model: nn.Module,
    batch: int | Callable[[nn.Module], object] = 1,
    *,
    form: Literal["auto", "dense", "packed", "csr", "2:4"] = "auto",
    min_sparsity: float = 0.5,
    margin: float = 1.05,
    measure: Measure | None = None,
) -> list[Choice]:
    """Gives the linear layers of a model the form that is fastest here, in place, and says which.

    Every `nn.Linear` is considered, wherever it is; for a sparse form at least `min_sparsity` of its weights must be
    zero. Any other module stays as it is. Afterwards the model is in evaluation mode, takes no gradients, and its
    results differ from the dense ones by rounding alone. Its state dict is that of the dense model. To train it, load
    it again.

    Args:
        batch: rows that each layer will see at once, or a function that runs the model as it will be used, such as
            ``lambda model: model.generate(**inputs, num_beams=4, max_new_tokens=4)``: then every layer is measured
            with the rows that it has seen, as often as it saw them. The whole run is then timed as well: if it is not
            `margin` times as fast, all layers stay as they were.
        form: `auto` to measure; any other is taken unmeasured by all layers that can have it.
        margin: another form must be that many times as fast as the layer as it is.
        measure: in place of `measure_layers`, whose results are kept for the life of the process in `MEASURED`.
    Raises:
        ValueError: an argument out of range.
    """
    if isinstance(batch, int) and batch < 1:
        raise ValueError(f"batch={batch}: must be at least 1, or a function that runs the model.")
    if form not in ("auto", *FORMS):
        raise ValueError(f"form={form!r}: must be auto, {', '.join(FORMS)}.")
    model.eval().requires_grad_(False)
    layers = _linears(model)
    densities = {name: _density(layer.weight) for name, layer in layers.items()}
    seen = _rows_seen(model, layers, batch) if callable(batch) else {name: Counter({batch: 1}) for name in layers}
    groups: dict[Any, list[str]] = {}
    for name, layer in layers.items():
        # Layers that are measured as one: densities are told apart to a hundredth.
        kind = (tuple(layer.weight.shape), layer.weight.dtype, layer.weight.device, layer.bias is None)
        is_sparse = densities[name] <= 1 - min_sparsity
        loads = tuple(sorted(seen[name].items()))
        groups.setdefault((*kind, is_sparse, round(densities[name], 2), loads), []).append(name)
    table = []
    replacements: dict[nn.Module, nn.Module] = {}
    for key, names in groups.items():
        *_, is_sparse, _, loads = key
        offered = _offered([layers[name] for name in names], form, is_sparse, loads)
        chosen, ratio = _choose(offered, key[:-1], loads, form, margin, measure)
        if chosen != "dense":
            replacements |= {layers[name]: new for name, new in zip(names, offered[chosen], strict=True)}
        density = statistics.fmean(densities[name] for name in names)
        table.append(Choice(tuple(names), key[0], density, loads, chosen, ratio))
    _replace(model, replacements)
    if callable(batch) and form == "auto" and measure is None and replacements:
        before = {new: old for old, new in replacements.items()}
        if _gain(model, batch, before, replacements) < margin:
            _replace(model, before)
            return [replace(choice, form="dense") for choice in table]
    return table


# -- which layers, and with how many rows -----------------------------------------------------------------------------


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


def _density(weight: Tensor) -> float:
    return int(torch.count_nonzero(weight)) / max(1, weight.numel())


def _rows_seen(
    model: nn.Module, layers: Mapping[str, nn.Linear], run: Callable[[nn.Module], object]
) -> dict[str, Counter[int]]:
    """Calls of each layer by their rows; many different ones are rounded up to powers of two, so that few are timed."""
    seen: dict[str, Counter[int]] = {name: Counter() for name in layers}

    def count(rows: Counter[int]) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs["input"]
            if n := x.numel() // x.shape[-1]:
                rows[n] += 1

        return hook

    hooks = [layer.register_forward_pre_hook(count(seen[name]), with_kwargs=True) for name, layer in layers.items()]
    try:
        with torch.inference_mode():
            run(model)
    finally:
        for handle in hooks:
            handle.remove()
    return {name: rows if len(rows) <= _SIZES else _rounded(rows) for name, rows in seen.items()}


def _rounded(calls: Counter[int]) -> Counter[int]:
    """
    >>> _rounded(Counter({1: 2, 5: 1, 8: 3}))
    Counter({8: 4, 1: 2})
    """
    rounded: Counter[int] = Counter()
    for rows, count in calls.items():
        rounded[1 << (rows - 1).bit_length()] += count
    return rounded


# -- which form -------------------------------------------------------------------------------------------------------


def _offered(
    layers: Sequence[nn.Linear], form: str, is_sparse: bool, loads: Sequence[tuple[int, int]]
) -> dict[Form, list[nn.Module]]:
    """The layers in each form that all of them can have."""
    offered: dict[Form, list[nn.Module]] = {"dense": list(layers)}
    usual = max(loads, key=lambda load: load[1])[0] if loads else 1
    builders: dict[Form, Callable[[nn.Linear], nn.Module | None]] = {"packed": lambda layer: _packed(layer, usual)}
    if is_sparse:
        builders |= {"csr": _csr, "2:4": _semi_structured}
    for name, build in builders.items():
        if form in ("auto", name):
            made = [made for layer in layers if (made := build(layer)) is not None]
            if len(made) == len(layers):
                offered[name] = made
    return offered


def _choose(
    offered: Mapping[Form, Sequence[nn.Module]],
    kind: tuple[Any, ...],
    loads: Sequence[tuple[int, int]],
    form: str,
    margin: float,
    measure: Measure | None,
) -> tuple[Form, float | None]:
    """The form with the least time over all calls, and how many times as fast as dense the best other form is."""
    others: list[Form] = [name for name in offered if name != "dense"]
    if form != "auto" or not others or not loads:
        return next(iter(others if form != "auto" else ()), "dense"), None
    totals = dict.fromkeys(offered, 0.0)
    for rows, calls in loads:
        key = (*kind, rows, torch.get_num_threads(), tuple(offered))
        seconds = measure(offered, rows) if measure is not None else MEASURED.get(key)
        if seconds is None:
            seconds = MEASURED[key] = measure_layers(offered, rows)
        for name in totals:
            totals[name] += calls * seconds[name]
    best = min(others, key=lambda name: totals[name])
    ratio = totals["dense"] / max(totals[best], 1e-12)
    return (best if ratio >= margin else "dense"), ratio


#: What was measured in this process; clear it to measure again.
MEASURED: dict[Any, Mapping[Form, float]] = {}


def measure_layers(layers: Mapping[Form, Sequence[nn.Module]], rows: int) -> dict[Form, float]:
    """Median seconds of a call in each form. The forms take turns, so that what else the machine does falls on all."""
    first = layers["dense"][0]
    assert isinstance(first, nn.Linear)
    weight = first.weight
    # Not torch's generator: a seeded run must not depend on what was measured before it.
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, weight.shape[1], generator=generator).to(weight.device, weight.dtype)
    seconds: dict[Form, list[float]] = {form: [] for form in layers}
    with torch.inference_mode():
        for modules in layers.values():
            modules[0](x)
        begin = time.perf_counter()
        for done in range(_ROUNDS):
            if done >= 3 and time.perf_counter() - begin > _SECONDS:
                break
            for form, modules in layers.items():
                for module in modules[:_LAYERS]:
                    seconds[form].append(_seconds(module, x, x.device))
    return {form: statistics.median(times) for form, times in seconds.items()}


def _gain(
    model: nn.Module,
    run: Callable[[nn.Module], object],
    before: Mapping[nn.Module, nn.Module],
    after: Mapping[nn.Module, nn.Module],
) -> float:
    """How many times as fast a whole run is in the form that the model has now: the median of pairs in turns."""
    ratios = []
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with torch.inference_mode():
        run(model)
        for _ in range(_PAIRS):
            new = _seconds(run, model, device)
            _replace(model, before)
            try:
                ratios.append(_seconds(run, model, device) / max(new, 1e-12))
            finally:
                _replace(model, after)
    return statistics.median(ratios)


def _seconds(call: Callable[[Any], object], x: Any, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    call(x)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


# -- the forms --------------------------------------------------------------------------------------------------------


@contextmanager
def _no_beta_warning() -> Iterator[None]:
    """torch warns of its CSR tensors once in a process; what is used of them here is tested here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        yield


class CSRLinear(nn.Module):
    """An `nn.Linear` whose weight is held by compressed rows: x (..., I) -> (..., O), contiguous, in the dtype of x.

    Moves between devices and dtypes, is copied and pickled as other modules are. In its state dict is the dense weight,
    with pruned weights at +0.0.
    """

    crow: Tensor  # (O + 1,) int32
    col: Tensor  # (kept,) int32
    values: Tensor  # (kept,) in the layer's dtype

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        with _no_beta_warning():
            matrix = linear.weight.detach().to_sparse_csr()
        self.register_buffer("crow", matrix.crow_indices().int(), persistent=False)
        self.register_buffer("col", matrix.col_indices().int(), persistent=False)
        self.register_buffer("values", matrix.values(), persistent=False)
        self.bias: nn.Parameter | None = linear.bias
        self._build()

    @property
    def weight(self) -> Tensor:
        """(O, I) in CSR layout, for code that asks for its dtype or device."""
        return self._csr(self.values)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):  # would cast the operands to a dtype that MKL does not have
            with torch.autocast(x.device.type, enabled=False):
                return self.forward(x)
        matrix, bias = self._matrix, self._bias
        rows = x.reshape(-1, self.in_features).to(matrix.dtype)
        if rows.shape[0] == 1:
            y = torch.mv(matrix, rows[0]) if bias is None else torch.addmv(bias, matrix, rows[0])
        else:
            columns = rows.t().contiguous()
            if bias is None:
                y = torch.mm(matrix, columns)
            else:
                y = torch.addmm(bias[:, None].expand(-1, rows.shape[0]), matrix, columns)
            y = y.t().contiguous()  # callers of nn.Linear rely on it
        return y.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def _build(self) -> None:
        # MKL has no smaller dtype than fp32; for fp32 these are no copies.
        dtype = torch.float64 if self.values.dtype == torch.float64 else torch.float32
        self._matrix = self._csr(self.values.to(dtype))
        self._bias = None if self.bias is None else self.bias.detach().to(dtype)

    def _csr(self, values: Tensor) -> Tensor:
        with _no_beta_warning():
            size = (self.out_features, self.in_features)
            return torch.sparse_csr_tensor(self.crow, self.col, values, size, check_invariants=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CSRLinear:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._build()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_matrix", "_bias")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._build()

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = self.weight.to_dense()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, kept={self.values.numel()}"


def _csr(linear: nn.Linear) -> nn.Module | None:
    """The layer by compressed rows; None where torch cannot multiply them."""
    weight = linear.weight
    if weight.device.type != "cpu" or not weight.is_floating_point() or weight.numel() >= 2**31:
        return None
    try:
        with torch.no_grad():
            made = CSRLinear(linear)
            made(weight.new_zeros(2, linear.in_features))  # a torch without MKL says so here
        return made
    except (RuntimeError, NotImplementedError):
        return None


class PackedLinear(nn.Module):
    """An `nn.Linear` with a second copy of its weight, in the layout that oneDNN multiplies fastest.

    The weight stays for the state dict and for those that it is tied to. Under autocast it is an `nn.Linear`.

    Args:
        rows: of activations that it mostly sees at once; any number is right.
    """

    def __init__(self, linear: nn.Linear, rows: int = 1) -> None:
        super().__init__()
        self.in_features, self.out_features, self._rows = linear.in_features, linear.out_features, rows
        self.weight, self.bias = linear.weight, linear.bias
        self._build()

    def forward(self, x: Tensor) -> Tensor:
        packed = self._packed
        if packed is None or x.dtype != packed.dtype or x.numel() == 0 or torch.is_autocast_enabled(x.device.type):
            return nn.functional.linear(x, self.weight, self.bias)
        rows = x.reshape(-1, self.in_features)
        y: Tensor = torch.ops.mkldnn._linear_pointwise(rows, packed, self.bias, "none", [], "")
        return y.view(*x.shape[:-1], self.out_features)

    def _build(self) -> None:
        self._packed: Tensor | None = None
        if self.weight.device.type != "cpu" or self.weight.dtype not in (torch.float32, torch.bfloat16):
            return
        with torch.no_grad(), torch.inference_mode(False):  # oneDNN takes no tensors that inference mode has made
            weight = self.weight.clone() if self.weight.is_inference() else self.weight.detach()
            self._packed = torch.ops.mkldnn._reorder_linear_weight(weight, self._rows)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._build()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_packed"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._build()

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def _packed(linear: nn.Linear, rows: int) -> nn.Module | None:
    """The layer packed for oneDNN; None where this torch, CPU or dtype has no such product."""
    if linear.weight.numel() == 0:
        return None
    try:
        made = PackedLinear(linear, rows)
        with torch.inference_mode():
            made(linear.weight.new_zeros(2, linear.in_features))
        return made if made._packed is not None else None
    except (RuntimeError, AttributeError, NotImplementedError):  # the operators are torch's own, not its interface
        return None


def is_2_of_4(weight: Tensor) -> bool:
    """Whether of every 4 neighbours along the input dimension at most 2 are not zero; weight (O, I)."""
    if weight.dim() != 2 or weight.shape[1] % 4:
        return False
    return not bool(((weight != 0).reshape(-1, 4).sum(dim=1) > 2).any())


def _semi_structured(linear: nn.Linear) -> nn.Module | None:
    """The layer with a 2:4 weight; None where the pattern, the dtype, the sizes or the device do not allow it."""
    weight = linear.weight.detach()
    if not weight.is_cuda or torch.version.cuda is None or torch.cuda.get_device_capability(weight.device) < (8, 0):
        return None
    if weight.dtype not in (torch.float16, torch.bfloat16) or not is_2_of_4(weight):
        return None
    try:
        made = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
        made.weight = nn.Parameter(torch.sparse.to_sparse_semi_structured(weight), requires_grad=False)
        made.bias = linear.bias
        made.eval()(weight.new_zeros(2, linear.in_features))
        return made
    except (RuntimeError, NotImplementedError, ValueError):  # torch names no other way to ask for the sizes it takes
        return None
