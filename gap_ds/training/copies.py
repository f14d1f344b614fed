"""Masks on a copy of the model, such as an averaged one."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from gap_ds.masks import bitmask
from gap_ds.masks.local import local
from gap_ds.method.plan import clean_name
from gap_ds.sharding.comm import raise_on_all_ranks
from gap_ds.sharding.shard import Shard
from gap_ds.training.run import Run


@torch.no_grad()
def apply(run: Run, module: nn.Module) -> None:
    """Zeroes the pruned weights of a copy, whose parameters are sharded as the model's, or whole on every rank.

    The copy may be wrapped, as by torch.optim.swa_utils.AveragedModel: names are compared from their ends.

    Raises:
        ValueError: the copy lacks an entry, or has it in another shape.
    """
    pieces = {shard.name: shard for shard in run.backend.shards()}
    comm = run.backend.comm
    found, cut = raise_on_all_ranks(run.world, lambda: _held(run, module, pieces))
    # A rank may hold all of a tensor that is sharded, and the others nothing of it.
    is_cut = dict(zip(found, comm.sum(torch.tensor(cut, dtype=torch.int64, device="cpu")).tolist(), strict=True))
    for entry in run.plan.entries:
        bits, shard = run.mask_state.bits.get(entry.name), run.mask_state.shards[entry.name]
        if bits is None:
            continue
        piece, held = pieces[entry.parameter], found[entry.parameter]
        flat = held.reshape(-1)  # a copy of it where it is laid out in another memory format
        if is_cut[entry.parameter]:
            bitmask.zero_pruned_(piece.part(entry.name, flat), bits.to(flat.device))
        else:
            kept = bitmask.unpack(bits, shard.numel).to(torch.uint8)
            whole = comm.assemble_everywhere(kept, shard)
            uncut = Shard.of_range(piece.name, piece.shape, 0, piece.full_numel, 0, piece.owner)
            uncut.part(entry.name, flat)[(whole == 0).to(flat.device)] = 0
        if flat.data_ptr() != held.data_ptr():
            held.copy_(flat.view(held.shape))


def _held(run: Run, module: nn.Module, pieces: Mapping[str, Shard]) -> tuple[dict[str, Tensor], list[int]]:
    """This rank's piece of each parameter of a copy by name; and for each, 1 if it is not whole on this rank."""
    named = _by_name(list(run.plan.parameters()), module)
    found = {name: local(parameter).detach() for name, parameter in named.items()}
    for name, held in found.items():
        if held.numel() not in (pieces[name].numel, pieces[name].full_numel):
            raise ValueError(
                f"{name}: the copy has {held.numel()} weights of it on this rank, and the model {pieces[name].numel} "
                f"of {pieces[name].full_numel}. Make the copy of the wrapped model, or of the whole one."
            )
    return found, [int(held.numel() != pieces[name].full_numel) for name, held in found.items()]


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
