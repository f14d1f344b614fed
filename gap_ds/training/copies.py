"""Masks on a copy of the model, such as an averaged one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gap_ds.masks import bitmask
from gap_ds.masks.local import local
from gap_ds.method.plan import clean_name
from gap_ds.sharding.shard import Shard
from gap_ds.training.run import Run


@torch.no_grad()
def apply(run: Run, module: nn.Module) -> None:
    """Zeroes the pruned weights of a copy, whose parameters are sharded as the model's, or whole on every rank.

    The copy may be wrapped, as by torch.optim.swa_utils.AveragedModel: names are compared from their ends.

    Raises:
        ValueError: the copy lacks an entry, or has it in another shape.
    """
    found = _by_name(list(run.plan.parameters()), module)
    pieces = {shard.name: shard for shard in run.backend.shards()}
    for entry in run.plan.entries:
        bits, shard = run.mask_state.bits.get(entry.name), run.mask_state.shards[entry.name]
        if bits is None:
            continue
        piece, held = pieces[entry.parameter], local(found[entry.parameter]).detach().view(-1)
        if held.numel() == piece.full_numel:
            kept = bitmask.unpack(bits, shard.numel).to(torch.uint8)
            whole = run.backend.comm.assemble_everywhere(kept, shard)
            uncut = Shard.of_range(piece.name, piece.shape, 0, piece.full_numel, 0, piece.owner)
            uncut.part(entry.name, held)[(whole == 0).to(held.device)] = 0
        elif held.numel() == piece.numel:
            bitmask.zero_pruned_(piece.part(entry.name, held), bits.to(held.device))
        else:
            raise ValueError(
                f"{piece.name}: the copy has {held.numel()} weights of it on this rank, and the model {piece.numel} of "
                f"{piece.full_numel}. Make the copy of the wrapped model, or of the whole one."
            )


def _by_name(names: list[str], module: nn.Module) -> dict[str, Tensor]:
    """The parameters of a copy by the names of the model's, without the prefix that a wrapper adds."""
    parameters = {clean_name(name): parameter for name, parameter in module.named_parameters()}
    if not names:
        return {}
    prefixes = [name.removesuffix(names[0]) for name in parameters if name == names[0] or name.endswith(f".{names[0]}")]
    for prefix in sorted(prefixes, key=len):
        if all(f"{prefix}{name}" in parameters for name in names):
            return {name: parameters[f"{prefix}{name}"] for name in names}
    raise ValueError(
        f"{names[0]}: is no parameter of {type(module).__name__}. Pass a copy of the model that is trained."
    )
