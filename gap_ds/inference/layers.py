"""The layouts of a linear layer for inference: modules that replace an `nn.Linear` or a `Conv1D` of transformers.

    csr     CPU: compressed rows with 32-bit indices, multiplied in fp32 or fp64 (bf16 and fp16 weights in fp32)
    joined  CPU: csr layers that are called one after the other with one input (q, k and v) share one product
    packed  CPU: dense in the blocked layout of oneDNN, as torch.compile packs the weights of a frozen model; useful
            for layers that are not sparse, too, such as the output projection
    2:4     NVIDIA GPU of capability 8.0 or later: semi-structured, for weights that have the pattern

csr computes W @ x^T with x^T stored by rows, so that each weight multiplies a contiguous row: the same column of all
rows of x. Large inputs are multiplied a few rows at a time, so that x^T stays in the cache. In fp32 the loops of
gap_ds/masks/cpu.c do it where a compiler is found, otherwise MKL does.

I input dimension, O output dimension, R rows of activations. `tuning` chooses the fastest layout.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from gap_ds.masks import cpu

Layout = Literal["dense", "packed", "csr", "joined", "2:4"]
LAYOUTS: tuple[Layout, ...] = ("dense", "packed", "csr", "joined", "2:4")


def has_inputs_first(layer: nn.Module) -> bool:
    """True for the `Conv1D` of transformers: GPT-2's linear layer, whose weight is (I, O)."""
    return (type(layer).__module__, type(layer).__name__) == ("transformers.pytorch_utils", "Conv1D")


def matrix(layer: nn.Module) -> Tensor:
    """The weight of a linear layer or of its replacement, without gradient: (O, I)."""
    assert isinstance(layer.weight, Tensor)
    weight = layer.weight.detach()
    return weight.t() if has_inputs_first(layer) else weight


def layout_of(layer: nn.Module) -> Layout:
    """The layout of a linear layer or of its replacement."""
    if isinstance(layer, JoinedLinear):
        return "joined"
    if isinstance(layer, CSRLinear):
        return "csr"
    if isinstance(layer, PackedLinear):
        return "packed"
    return "2:4" if isinstance(layer.weight, torch.sparse.SparseSemiStructuredTensor) else "dense"


@contextlib.contextmanager
def _no_beta_warning() -> Iterator[None]:
    """Hides the warning that torch's CSR tensors are in beta; our tests cover the operations used here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        yield


class CSRLinear(nn.Module):
    """A linear layer with its weight in compressed rows: x (..., I) -> (..., O), contiguous, in the dtype of x.

    It can be moved, cast, copied and pickled like any module. Its state dict holds the dense weight in the shape of the
    given layer's, with pruned weights at +0.0, and it loads a dense weight with any zeros.
    """

    crow: Tensor  # (O + 1,) int32
    col: Tensor  # (kept,) int32
    values: Tensor  # (kept,) in the layer's dtype

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = matrix(linear)
        self.out_features, self.in_features = weight.shape
        self._inputs_first = has_inputs_first(linear)
        self._fill(weight)
        self.bias: nn.Parameter | None = linear.bias
        self._build()

    def _fill(self, weight: Tensor) -> None:
        with _no_beta_warning():
            matrix = weight.to_sparse_csr()
        self.register_buffer("crow", matrix.crow_indices().int(), persistent=False)
        self.register_buffer("col", matrix.col_indices().int(), persistent=False)
        self.register_buffer("values", matrix.values(), persistent=False)

    @property
    def weight(self) -> Tensor:
        """(O, I) as a CSR tensor, for code that reads its dtype or device."""
        return self._csr(self.values)

    def forward(self, input: Tensor) -> Tensor:
        if torch.is_autocast_enabled(input.device.type):  # it would cast to a dtype that has no CSR product
            with torch.autocast(input.device.type, enabled=False):
                return self.forward(input)
        (y,) = _product(self._matrix, self._cast_bias(), input, [self.out_features])
        return _shaped(y, input)

    def _build(self) -> None:
        # No CSR product takes a dtype smaller than fp32. For fp32 and fp64 this is no copy.
        dtype = torch.float64 if self.values.dtype == torch.float64 else torch.float32
        self._matrix = self._csr(self.values.to(dtype))

    def _cast_bias(self) -> Tensor | None:
        """The bias in the dtype of the product; cast at every call, as a kept copy would miss changes of the bias."""
        bias = self.bias
        return None if bias is None else bias.detach().to(self._matrix.dtype).contiguous()

    def _csr(self, values: Tensor) -> Tensor:
        with _no_beta_warning():
            size = (self.out_features, self.in_features)
            return torch.sparse_csr_tensor(
                self.crow, self.col, values, size, check_invariants=False, device=values.device
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CSRLinear:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._build()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_matrix"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._build()

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        weight = self.weight.to_dense()
        destination[prefix + "weight"] = weight.t().contiguous() if self._inputs_first else weight
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        name = prefix + "weight"
        shape = tuple(self.weight.t().shape if self._inputs_first else self.weight.shape)
        weight = state_dict.get(name)
        if weight is None:
            missing_keys += [name] if strict else []
        elif weight.shape != shape:
            error_msgs.append(f"size mismatch for {name}: {tuple(weight.shape)} in the file, {shape} in the model.")
        else:
            given = weight.detach().to(self.values.device, self.values.dtype)
            self._fill(given.t() if self._inputs_first else given)
        others = {key: value for key, value in state_dict.items() if key != name}
        super()._load_from_state_dict(others, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        self._build()

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, kept={self.values.numel()}"


def _product(matrix: Tensor, bias: Tensor | None, x: Tensor, outputs: Sequence[int]) -> tuple[Tensor, ...]:
    """matrix (O, I) times x (..., I), in the dtype of the matrix: a contiguous part (R, o) for each o in outputs.

    Args:
        outputs: rows of the matrix in each part, in order; they sum to O.
    """
    rows = x.reshape(-1, matrix.shape[1]).to(matrix.dtype)
    has_loops = matrix.dtype == torch.float32 and matrix.device.type == "cpu" and not _is_traced(rows)
    if has_loops and (loops := cpu.library()) is not None:
        weights = matrix.crow_indices(), matrix.col_indices(), matrix.values()
        return loops.multiply(*weights, bias, rows.contiguous(), outputs)
    if rows.shape[0] == 1:
        y = torch.mv(matrix, rows[0]) if bias is None else torch.addmv(bias, matrix, rows[0])
        return tuple(part[None] for part in torch.split(y, list(outputs)))
    parts = tuple(rows.new_empty(rows.shape[0], size) for size in outputs)
    for start, end in cpu.row_blocks(rows.shape[0], rows.shape[1], rows.element_size()):
        columns = rows[start:end].t().contiguous()
        if bias is None:
            y = torch.mm(matrix, columns)
        else:
            y = torch.addmm(bias[:, None].expand(-1, end - start), matrix, columns)
        for part, piece in zip(parts, torch.split(y, list(outputs)), strict=True):
            part[start:end] = piece.t()
    return parts


def _is_traced(x: Tensor) -> bool:
    """True if the product needs autograd or a compiler to see it, or is not on a CPU: the loops in C offer neither."""
    if (x.requires_grad and torch.is_grad_enabled()) or torch.compiler.is_compiling() or x.device.type != "cpu":
        return True
    # Forward-mode autograd does not set requires_grad.
    return forward_ad.unpack_dual(x).tangent is not None  # type: ignore[no-untyped-call]


def _shaped(y: Tensor, x: Tensor) -> Tensor:
    """Reshapes a product (R, O) to (..., O), contiguous because callers of nn.Linear rely on that."""
    return y.to(x.dtype).view(*x.shape[:-1], y.shape[-1])


def csr(linear: nn.Linear) -> CSRLinear | None:
    """The layer in compressed rows; None where torch cannot multiply them."""
    weight = linear.weight
    if weight.device.type != "cpu" or not weight.is_floating_point() or weight.numel() >= 2**31:
        return None
    try:
        with torch.no_grad():
            made = CSRLinear(linear)
            made(weight.new_zeros(2, made.in_features))  # without the loops, a torch without MKL fails here
        return made
    except (RuntimeError, NotImplementedError):
        return None


class JoinedLinear(CSRLinear):
    """A `CSRLinear` that shares one product with other layers that are called right after it with the same input.

    The first layer multiplies the rows of all layers, and each other layer fetches its part. It does so once, and only
    if its input is the tensor that was multiplied, unchanged since (in inference mode, where torch counts no changes:
    if it has equal values). Otherwise it computes its own product. So results equal those of separate layers for any
    order of calls, other inputs, inputs changed in place and calls from several threads. The one exception: a change
    that torch does not count, by `.data` or NumPy, between two of the calls goes unseen. The product is held until all
    parts are fetched or the first layer is called again.
    """

    def __init__(self, layer: nn.Linear | CSRLinear, join: _Join, place: int) -> None:
        nn.Module.__init__(self)
        made = layer if isinstance(layer, CSRLinear) else CSRLinear(layer)
        self.in_features, self.out_features = made.in_features, made.out_features
        self._inputs_first = made._inputs_first
        for name in ("crow", "col", "values"):
            self.register_buffer(name, getattr(made, name), persistent=False)
        self.bias = made.bias
        self._join, self._place = join, place
        self._build()

    def forward(self, input: Tensor) -> Tensor:
        if torch.is_autocast_enabled(input.device.type):
            with torch.autocast(input.device.type, enabled=False):
                return self.forward(input)
        # A held product has no autograd history, and a compiler would treat it as a constant.
        if _is_traced(input):
            return super().forward(input)
        y = self._join.fetch(self._place, input) if self._place else self._join.multiply(input)
        return super().forward(input) if y is None else _shaped(y, input)

    def _build(self) -> None:
        super()._build()
        self._join.reset()


class _Join:
    """State shared by joined layers: their rows stacked in one matrix, and the parts not fetched yet."""

    def __init__(self) -> None:
        self.layers: list[JoinedLinear] = []
        self.reset()

    def reset(self) -> None:
        """Drops the stacked matrix; the next product builds it again."""
        self._stack: Tensor | None = None
        self._held: _Held | None = None

    def multiply(self, x: Tensor) -> Tensor | None:
        """Returns the first layer's part and holds the others. None if dtypes, devices or biases no longer agree."""
        stack = self._build() if self._stack is None else self._stack
        biases = [bias for layer in self.layers if (bias := layer._cast_bias()) is not None]
        if stack is None or len(biases) not in (0, len(self.layers)):
            return None
        bias = torch.cat(biases) if biases else None
        first, *others = _product(stack, bias, x, [layer.out_features for layer in self.layers])
        held, version = (x.clone(), None) if x.is_inference() else (x, x._version)
        self._held = _Held(held, version, torch.is_inference_mode_enabled(), dict(enumerate(others, start=1)))
        return first

    def fetch(self, place: int, x: Tensor) -> Tensor | None:
        """The held part of the layer at this place; None if it was fetched or made from another input."""
        held = self._held  # read once: another thread may replace it
        if held is None or not held.is_of(x):
            return None
        y = held.left.pop(place, None)
        if not held.left and self._held is held:
            self._held = None
        return y

    def _build(self) -> Tensor | None:
        """Stacks the layers' rows; None if dtypes or devices no longer agree."""
        layers = self.layers
        if len({(layer._matrix.dtype, layer.values.device) for layer in layers}) > 1:
            return None
        with _BUILDING:
            kept = [layer.values.numel() for layer in layers]
            starts = [sum(kept[:i]) for i in range(len(layers))]
            crows = [layers[0].crow[:1], *(layer.crow[1:] + at for layer, at in zip(layers, starts, strict=True))]
            col = torch.cat([layer.col for layer in layers])
            values = torch.cat([layer._matrix.values() for layer in layers])
            size = (sum(layer.out_features for layer in layers), layers[0].in_features)
            with _no_beta_warning():
                stack = torch.sparse_csr_tensor(
                    torch.cat(crows), col, values, size, check_invariants=False, device=values.device
                )
            for layer, own_col, own in zip(layers, torch.split(col, kept), torch.split(values, kept), strict=True):
                layer.col = own_col  # a view, so that no weight is stored twice
                layer.values = own if layer.values.dtype == own.dtype else layer.values
                layer._matrix = layer._csr(own)
            self._stack = stack
            return stack

    def __getstate__(self) -> dict[str, Any]:
        return {"layers": self.layers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.layers = state["layers"]
        self.reset()


@dataclass(frozen=True)
class _Held:
    """The product of all joined layers.

    x: the input that was multiplied, kept alive so that no other tensor gets its identity. A copy if it is an
        inference tensor, which has no version.
    version: version counter of x at the product; torch increments it at each change in place. None with a copy.
    inference: True if the product was made in inference mode.
    left: the parts not fetched yet, by place.
    """

    x: Tensor
    version: int | None
    inference: bool
    left: dict[int, Tensor]

    def is_of(self, x: Tensor) -> bool:
        if self.inference != torch.is_inference_mode_enabled():
            return False
        if self.version is not None:
            return self.x is x and x._version == self.version
        return self.x.dtype == x.dtype and self.x.shape == x.shape and torch.equal(self.x, x)


_BUILDING = threading.Lock()


def joined(layers: Sequence[CSRLinear]) -> list[JoinedLinear]:
    """Layers that share one product, to be called in this order. They share their weights with the given ones.

    Raises:
        ValueError: the layers differ in input dimension, dtype or use of a bias, or hold 2^31 weights or more.
    """
    first = layers[0]
    if any((layer.in_features, layer.values.dtype) != (first.in_features, first.values.dtype) for layer in layers):
        raise ValueError("layers that are joined have the same input dimension and dtype.")
    if sum(layer.values.numel() for layer in layers) >= 2**31 or len({layer.bias is None for layer in layers}) > 1:
        raise ValueError("layers that are joined all have a bias or none, and fewer than 2^31 weights.")
    join = _Join()
    join.layers = [JoinedLinear(layer, join, place) for place, layer in enumerate(layers)]
    return join.layers


class PackedLinear(nn.Module):
    """A linear layer with a second copy of its weight, in the blocked layout that oneDNN multiplies fastest.

    The weight itself stays, for the state dict and for tied weights; when it changes, it is packed again. Changes that
    torch does not count, by `.data` or NumPy, go unseen. Under autocast, and where a gradient of the input is wanted,
    the layer acts as the given one.

    Args:
        rows: rows of activations that it usually gets at once. Others give correct results, too.
    """

    def __init__(self, linear: nn.Linear, rows: int = 1) -> None:
        super().__init__()
        self.out_features, self.in_features = matrix(linear).shape
        self._inputs_first, self._rows = has_inputs_first(linear), rows
        self.weight, self.bias = linear.weight, linear.bias
        self.register_load_state_dict_post_hook(_repack)  # type: ignore[no-untyped-call]
        self._build()

    @property
    def _matrix(self) -> Tensor:
        return self.weight.t() if self._inputs_first else self.weight

    def forward(self, input: Tensor) -> Tensor:
        # A compiler cannot lower the packed product, and packs frozen weights itself; autograd has no formula for it.
        if _is_traced(input):
            return nn.functional.linear(input, self._matrix, self.bias)
        source, version = self._source
        if self.weight is not source or _version(self.weight) != version:
            self._build()
        packed, is_cast = self._packed, torch.is_autocast_enabled(input.device.type)
        if packed is None or is_cast or input.dtype != packed.dtype or input.numel() == 0:
            return nn.functional.linear(input, self._matrix, self.bias)
        rows = input.reshape(-1, self.in_features)
        y: Tensor = torch.ops.mkldnn._linear_pointwise(rows, packed, self.bias, "none", [], "")
        return y.view(*input.shape[:-1], self.out_features)

    def _build(self) -> None:
        self._packed: Tensor | None = None
        self._source = self.weight, _version(self.weight)
        if self.weight.device.type != "cpu" or self.weight.dtype not in (torch.float32, torch.bfloat16):
            return
        refused = contextlib.suppress(RuntimeError)  # bf16 on a CPU without such products: the layer stays dense
        with refused, torch.no_grad(), torch.inference_mode(False):  # oneDNN takes no inference tensors
            weight = self._matrix.clone() if self.weight.is_inference() else self._matrix.detach()
            self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), self._rows)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._build()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_packed", "_source")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._build()

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def _version(weight: Tensor) -> int | None:
    """Number of changes in place; torch does not count those of inference tensors."""
    return None if weight.is_inference() else weight._version


def _repack(layer: PackedLinear, incompatible_keys: object) -> None:
    """A hook for `load_state_dict`, because the versions of inference tensors do not change."""
    layer._build()


def packed(linear: nn.Linear, rows: int) -> nn.Module | None:
    """The layer packed for oneDNN; None where this torch, CPU or dtype has no such product."""
    if linear.weight.numel() == 0:
        return None
    try:
        made = PackedLinear(linear, rows)
        with torch.inference_mode():
            made(linear.weight.new_zeros(2, made.in_features))
        return made if made._packed is not None else None
    except (RuntimeError, AttributeError, NotImplementedError):  # private operators of torch
        return None


def is_2_of_4(weight: Tensor) -> bool:
    """True if at most 2 of every 4 neighbours along the input dimension of a weight (O, I) are nonzero."""
    if weight.dim() != 2 or weight.shape[1] % 4:
        return False
    return not bool(((weight != 0).reshape(-1, 4).sum(dim=1) > 2).any())


class SemiStructuredLinear(nn.Linear):
    """A linear layer whose weight is semi-structured (2:4).

    torch's product of such weights takes the rows of its input for neighbours in memory, whatever its strides are, and
    refuses an input that is no view of rows, such as a transposed one. It has no product of nothing.
    """

    def forward(self, input: Tensor) -> Tensor:
        if input.numel() == 0:
            return input.new_empty(*input.shape[:-1], self.out_features, dtype=self.weight.dtype)
        return super().forward(input.contiguous())


def semi_structured(linear: nn.Linear) -> nn.Module | None:
    """The layer with a semi-structured weight; None if its pattern, dtype, sizes or device do not allow it."""
    weight = matrix(linear)
    if not weight.is_cuda or torch.version.cuda is None or torch.cuda.get_device_capability(weight.device) < (8, 0):
        return None
    if weight.dtype not in (torch.float16, torch.bfloat16) or not is_2_of_4(weight):
        return None
    try:
        made = SemiStructuredLinear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        made.weight = nn.Parameter(torch.sparse.to_sparse_semi_structured(weight.contiguous()), requires_grad=False)
        made.bias = linear.bias
        made.eval()(weight.new_zeros(2, weight.shape[1]))
        return made
    except (RuntimeError, NotImplementedError, ValueError):  # the only way to ask torch which sizes it takes
        return None
