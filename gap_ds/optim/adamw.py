"""AdamW whose moments are held for kept weights alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from gap_ds.masks.local import local
from gap_ds.optim.kept import AdamWSettings, Kept, Steps, of_group
from gap_ds.optim.sparse_state import Part, SparseState


class AdamW(SparseState, torch.optim.AdamW):
    """`torch.optim.AdamW`, with the same arguments, whose state for a masked weight takes no memory.

    Give it to the engine as any optimizer. While an entry is sparse, both moments are held for its kept weights alone:
    8 bytes for each of them in fp32. A grown weight's moments begin at 0, or with `regrow_moments: mean_second` at the
    mean second moment of its entry. Everything else has whole state.

    In fp32 on a CPU it equals torch.optim.AdamW with masked weights bit for bit, with fused=True up to rounding.

    Source: Loshchilov and Hutter, Decoupled weight decay regularization, ICLR 2019; torch.optim for the order of
    operations.
    """

    MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")

    def _first_state(self, owner: Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
        """The step count, where torch.optim.AdamW has it."""
        device = local(owner).device if group["capturable"] or group["fused"] else "cpu"
        return {"step": torch.zeros((), dtype=torch.float32, device=device)}

    def _first_moments(self, group: Mapping[str, Any]) -> dict[str, bool]:
        """Both moments, and with amsgrad the largest second ones."""
        return dict.fromkeys(self.MOMENTS if group["amsgrad"] else self.MOMENTS[:2], True)

    def _update(self, group: Mapping[str, Any], parts: Sequence[Part]) -> None:
        """One step of `torch.optim.adamw.adamw` for all parts together."""
        moments = {name: [part.made(name) for part in parts] for name in self._first_moments(group)}
        beta1, beta2 = group["betas"]
        adamw(
            [part.weight for part in parts],
            [part.grad for part in parts],
            moments["exp_avg"],
            moments["exp_avg_sq"],
            moments.get("max_exp_avg_sq", []),
            [part.step for part in parts if part.step is not None],
            amsgrad=group["amsgrad"],
            beta1=beta1,
            beta2=beta2,
            **{key: group[key] for key in _SETTINGS},
            has_complex=any(part.weight.is_complex() for part in parts),
            grad_scale=getattr(self, "grad_scale", None),
            found_inf=getattr(self, "found_inf", None),
        )

    def _update_by(self, steps: Steps, group: Mapping[str, Any], parts: Sequence[Part]) -> None:
        names, pieces = self._first_moments(group), list[tuple[Kept, float]]()
        for part in parts:
            assert part.step is not None
            part.step.add_(1)
            pieces.append((part.kept(names), part.step.item()))
        steps.adamw(pieces, of_group(AdamWSettings, group))


_SETTINGS = ("lr", "weight_decay", "eps", "maximize", "foreach", "capturable", "differentiable", "fused")
