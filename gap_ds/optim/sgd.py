"""SGD whose momentum is held for kept weights alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.sgd import sgd

from gap_ds.optim.kept import Kept, SGDSettings, Steps, of_group
from gap_ds.optim.sparse_state import Part, SparseState


class SGD(SparseState, torch.optim.SGD):
    """`torch.optim.SGD`, with the same arguments, whose momentum for a masked weight takes no memory.

    Give it to the engine as any optimizer. While an entry is sparse, its momentum is held for its kept weights alone: 4
    bytes for each of them in fp32. A grown weight's momentum begins at 0. Everything else has whole state.

    In fp32 on a CPU it equals torch.optim.SGD with masked weights bit for bit.
    """

    MOMENTS = ("momentum_buffer",)

    def _first_state(self, owner: Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
        """Nothing: steps are not counted."""
        return {}

    def _first_moments(self, group: Mapping[str, Any]) -> dict[str, bool]:
        """The momentum; the first update makes it of the gradient."""
        return {"momentum_buffer": False} if group["momentum"] else {}

    def _update(self, group: Mapping[str, Any], parts: Sequence[Part]) -> None:
        """One step of `torch.optim.sgd.sgd` for all parts together."""
        buffers = [part.moment("momentum_buffer") for part in parts]
        sgd(
            [part.weight for part in parts],
            [part.grad for part in parts],
            buffers,
            has_sparse_grad=False,
            **{key: group[key] for key in _SETTINGS},
            grad_scale=getattr(self, "grad_scale", None),
            found_inf=getattr(self, "found_inf", None),
        )
        if group["momentum"]:
            for part, buffer in zip(parts, buffers, strict=True):
                assert buffer is not None
                part.set_moment("momentum_buffer", buffer)

    def _update_by(self, steps: Steps, group: Mapping[str, Any], parts: Sequence[Part]) -> None:
        names, pieces = self._first_moments(group), list[tuple[Kept, bool]]()
        for part in parts:
            assert part.mask is not None
            made = all(part.moment(name) is not None for name in names)
            for name in names if not made else ():
                part.set_moment(name, part.weight.new_empty(part.mask.kept))
            pieces.append((part.kept(names), made))
        steps.sgd(pieces, of_group(SGDSettings, group))


_SETTINGS = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize", "foreach", "fused")
