"""A linear layer with its weight in compressed rows, for CPUs.

It computes W @ x^T with x^T stored by rows, so that each weight multiplies a contiguous row: the same column of all
rows of x. Large inputs are multiplied a few rows at a time, so that x^T stays in the cache. In fp32 the loops of
gap_ds/masks/cpu.c do it where a compiler is found, otherwise MKL does.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gap_ds.inference.layers.linear import has_inputs_first, is_traced, matrix
from gap_ds.masks import cpu


@contextlib.contextmanager
def no_beta_warning() -> Iterator[None]:
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
        with no_beta_warning():
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
        (y,) = product(self._matrix, self.cast_bias(), input, [self.out_features])
        return shaped(y, input)

    def _build(self) -> None:
        # No CSR product takes a dtype smaller than fp32. For fp32 and fp64 this is no copy.
        dtype = torch.float64 if self.values.dtype == torch.float64 else torch.float32
        self._matrix = self._csr(self.values.to(dtype))

    def cast_bias(self) -> Tensor | None:
        """The bias in the dtype of the product; cast at every call, as a kept copy would miss changes of the bias."""
        bias = self.bias
        return None if bias is None else bias.detach().to(self._matrix.dtype).contiguous()

    def _csr(self, values: Tensor) -> Tensor:
        with no_beta_warning():
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


def product(matrix: Tensor, bias: Tensor | None, x: Tensor, outputs: Sequence[int]) -> tuple[Tensor, ...]:
    """matrix (O, I) times x (..., I), in the dtype of the matrix: a contiguous part (R, o) for each o in outputs.

    Args:
        outputs: rows of the matrix in each part, in order; they sum to O.
    """
    rows = x.reshape(-1, matrix.shape[1]).to(matrix.dtype)
    has_loops = matrix.dtype == torch.float32 and matrix.device.type == "cpu" and not is_traced(rows)
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


def shaped(y: Tensor, x: Tensor) -> Tensor:
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
