"""Parameters that are DTensors, on any mesh: where this rank's piece lies, and among which ranks pieces are spread.

    mesh (dp 2, tp 2)      a weight (Shard(0), Shard(1))      a norm (Shard(0), Replicate())
    | rank 0  rank 1 |     | box 0  box 1 |                   | box 0          |    ranks 1 and 3 have what 0 and 2
    | rank 2  rank 3 |     | box 2  box 3 |                   | box 2          |    have, and count nothing of it

All ranks among which some parameter is spread are one group, also where parameters lie on different meshes, as experts
do: a selection is one collective whatever the meshes are. Where several ranks of it have the same box, the first one
counts it. Ranks outside the group have copies of the whole, as with hybrid sharding; they decide for themselves, and
alike.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import Shard as ShardPlacement
from torch.distributed.tensor.placement_types import _StridedShard

from gap_ds.masks.box import Box, covers
from gap_ds.method.plan import clean_name
from gap_ds.sharding.comm import Apart, Comm, boxes_of, raise_on_all_ranks, some_of
from gap_ds.sharding.shard import Fixed, Shard

#: Groups made here, by their ranks: libraries free none, and a run may build several engines.
_GROUPS: dict[tuple[int, ...], dist.ProcessGroup] = {}


def shard_of(name: str, parameter: DTensor, owner: Callable[[], Tensor] | None = None) -> Shard:
    """This rank's piece of a parameter.

    Args:
        owner: by default the parameter object itself: FSDP2 keeps it for life, the optimizer holds it, and the local
            tensor is taken from it afresh at every use.
    Raises:
        ValueError: the piece is no box of the parameter, or does not lie in memory in the order of its indices, or the
            mesh has its ranks in an order in which torch does not tell whose piece is whose.
    """
    mesh = parameter.device_mesh
    for placement in parameter.placements:
        if not isinstance(placement, Replicate | ShardPlacement | _StridedShard):
            raise ValueError(
                f"{name}: has the placement {placement}, which gives no rank its weights: only Shard and Replicate are "
                "supported. Redistribute the parameter before the engine is built."
            )
    shape, piece = tuple(parameter.shape), _local(parameter)
    if not piece.is_contiguous():
        raise ValueError(
            f"{name}: this rank's piece of it is not contiguous in memory (strides {piece.stride()}). Build the "
            "parameter from piece.contiguous()."
        )
    # Outside of the mesh torch gives no offset; a scalar has none either.
    place = mesh.get_coordinate()
    cut = [dim for dim, placement in enumerate(parameter.placements) if not isinstance(placement, Replicate)]
    if place is not None and any(place[dim] != dist.get_rank(mesh.get_group(dim)) for dim in cut):
        # Collectives give out pieces by the rank in the group, which is sorted; offsets go by the place in the mesh.
        raise ValueError(
            f"{name}: lies on a mesh of the ranks {mesh.mesh.tolist()}, which do not ascend along each dimension, so "
            "that torch places its pieces in two orders. Build the mesh from ascending ranks."
        )
    size, offset = compute_local_shape_and_global_offset(shape, mesh, parameter.placements)
    if tuple(piece.shape) != tuple(size):
        raise ValueError(
            f"{name}: this rank's piece of it has the shape {tuple(piece.shape)}, and {parameter.placements} gives it "
            f"{tuple(size)} of {shape}. Cut the parameter by torch (distribute_tensor), or as it does."
        )
    if place is None:
        box = Box.span(0, 0, parameter.numel())
    else:
        sides = [_side(name, parameter, dim, place, (offset[dim], size[dim])) for dim in range(len(shape))]
        box = Box.of(*([one[i] for side in sides for one in side] for i in range(3)))
    return Shard(name, shape, box, 0, owner or Fixed(parameter), trainable=parameter.requires_grad)


def _side(
    name: str, parameter: DTensor, dim: int, place: Sequence[int], run: tuple[int, int]
) -> list[tuple[int, int, int]]:
    """The view, offset and size of a piece along a dimension, where it may lie in several runs: a row for each run.

        rows of the gates, then those of the ups, on 2 ranks:   | 0 0 1 1 | 0 0 1 1 |   the view (2, 4)

    Args:
        run: offset and size if it is one run.
    Raises:
        ValueError: the runs are not equally long, or not at equal distances.
    """
    of, mesh = parameter.shape[dim], parameter.device_mesh
    cuts = [
        (placement, int(size), at)
        for placement, size, at in zip(parameter.placements, mesh.shape, place, strict=True)
        if isinstance(placement, ShardPlacement | _StridedShard) and placement.dim % parameter.ndim == dim
    ]
    if not any(isinstance(placement, _StridedShard) for placement, _, _ in cuts):
        return [(of, *run)]
    own = torch.arange(of, device="cpu")
    for placement, size, at in cuts:
        parts = int(placement.split_factor) if isinstance(placement, _StridedShard) else 1
        own = torch.cat([_chunk(part, size, at) for part in (_chunk(own, parts, i) for i in range(parts))])
    starts = [0, *((own.diff() != 1).nonzero().flatten() + 1).tolist()]
    if len(starts) == 1:
        return [(of, int(own[0]) if len(own) else 0, len(own))]
    first, length = int(own[0]), len(own) // len(starts)
    period = int(own[starts[1]]) - first
    runs = first + torch.arange(len(starts), device="cpu")[:, None] * period + torch.arange(length, device="cpu")
    if not torch.equal(runs.flatten(), own) or of % period or first % period + length > period:
        raise ValueError(
            f"{name}: {parameter.placements} gives this rank indices of dimension {dim} in {len(starts)} runs that are "
            "not equally long or not at equal distances, which is no box. Cut it by a split factor that divides its "
            "size evenly."
        )
    return [(of // period, first // period, len(starts)), (period, first % period, length)]


def _chunk(tensor: Tensor, parts: int, index: int) -> Tensor:
    """One of `parts` parts of a vector, as long as torch.chunk makes them, but maybe empty."""
    length = -(-len(tensor) // parts)
    return tensor[index * length : (index + 1) * length]


@torch.no_grad()
def _local(parameter: DTensor) -> Tensor:
    return parameter.to_local()


def group_of(parameters: Mapping[str, Tensor], world: Comm) -> Comm:
    """The ranks among which all parameters are spread. All ranks of `world` must call this.

    Args:
        world: all ranks that train the model.
    Raises:
        Apart: the meshes have fewer ranks than train the model, or others.
    """
    spread: dict[tuple[int, ...], dist.ProcessGroup | None] = {}
    reached: set[int] = set()
    for parameter in parameters.values():
        if isinstance(parameter, DTensor):
            reached |= set(_ranks(parameter, whole=True))
            if (ranks := _ranks(parameter)) not in spread:
                spread[ranks] = _known_group(parameter, ranks)
    if reached and reached != set(world.ranks):
        raise Apart(
            f"{_first_outside(parameters, world)}: lies on a mesh of the ranks {some_of(reached)}, and the engine "
            f"trains on {some_of(world.ranks)}. Pass group= with the ranks of this model, where others train another "
            "one (a stage of a pipeline, a second model), or build the mesh over all ranks."
        )
    widest = max(spread, key=len, default=())
    nested = all(set(ranks) <= set(widest) for ranks in spread)
    if not _agreed(widest if nested else world.ranks, world):
        return world
    if len(widest) <= 1:
        return Comm(single=True, within=world)
    if widest == world.ranks:
        return world
    return Comm(spread[widest] or _made_group(widest), within=world)


def _agreed(ranks: tuple[int, ...], world: Comm) -> bool:
    """True if each rank is in the set of ranks that it found, and all members of a set have found the same one.

    Ranks outside of the mesh of some parameter find another set than those inside, which would wait for them in vain.
    """
    inside = world.ranks[world.rank] in ranks
    row = torch.tensor([zlib.crc32(repr(ranks).encode()), len(ranks) if inside else 0], device="cpu")
    found = Counter(tuple(each) for each in world.all_gather(row).tolist())
    return all(size == count for (_, size), count in found.items())


def _first_outside(parameters: Mapping[str, Tensor], world: Comm) -> str:
    meshes = ((n, set(_ranks(p, whole=True))) for n, p in parameters.items() if isinstance(p, DTensor))
    return next(name for name, ranks in meshes if ranks != set(world.ranks))


def _ranks(parameter: DTensor, whole: bool = False) -> tuple[int, ...]:
    """The ranks among which a parameter is spread, this one among them; whole: all that its mesh has."""
    mesh, here = parameter.device_mesh, parameter.device_mesh.get_coordinate()
    if whole or here is None:
        return tuple(sorted(mesh.mesh.flatten().tolist()))
    place = [at if isinstance(p, Replicate) else slice(None) for at, p in zip(here, parameter.placements, strict=True)]
    return tuple(sorted(mesh.mesh[tuple(place)].flatten().tolist()))


def _known_group(parameter: DTensor, ranks: tuple[int, ...]) -> dist.ProcessGroup | None:
    """The group of one of the mesh's dimensions, if its ranks are these; a rank outside of the mesh has none."""
    for dim in range(parameter.device_mesh.ndim if parameter.device_mesh.get_coordinate() else 0):
        group = parameter.device_mesh.get_group(dim)
        if tuple(sorted(dist.get_process_group_ranks(group))) == ranks:
            return group
    return None


def _made_group(ranks: tuple[int, ...]) -> dist.ProcessGroup:
    if ranks not in _GROUPS:
        # All ranks of the group come here together; others need not.
        group = dist.new_group(list(ranks), use_local_synchronization=True)
        assert isinstance(group, dist.ProcessGroup)
        _GROUPS[ranks] = group
    return _GROUPS[ranks]


def uncounted(shards: Sequence[Shard], comm: Comm) -> frozenset[str]:
    """The parameters whose piece on this rank is counted on another one. All ranks of `comm` must call this.

    Raises:
        ValueError: the pieces of a parameter do not make it up, each weight once.
    """
    if comm.size == 1:
        return frozenset()
    found = set()
    checked: set[tuple[Box, ...]] = set()
    for shard, boxes in zip(shards, boxes_of(shards, comm), strict=True):
        distinct = tuple(dict.fromkeys(box for box in boxes if box.numel))
        if distinct not in checked and not covers(distinct, Box.span(0, shard.full_numel, shard.full_numel)):
            raise ValueError(
                f"{shard.name}: the pieces of {comm.size} ranks do not make up its {shard.full_numel} weights, each "
                f"once. Shard it by torch's own placements, over a mesh of all ranks. (This rank: {shard.box}.)"
            )
        checked.add(distinct)
        if boxes.index(shard.box) != comm.rank:
            found.add(shard.name)
    return frozenset(found)


@dataclass(frozen=True)
class Layout:
    """How the parameters of a model are spread: `comm`, `shards` and `replicated` of its backend."""

    comm: Comm
    shards: Callable[[], list[Shard]]
    replicated: bool

    @staticmethod
    def of(module: nn.Module, find: Callable[[], list[Shard]], world: Comm) -> Layout:
        """Return the layout of a module, some of whose parameters may be DTensors. All ranks must call this.

        Args:
            find: the shard of every parameter, by `shard_of` where it is a DTensor.
            world: all ranks that train the model.
        Raises:
            ValueError: as `find`, `group_of` and `uncounted` do.
        """
        if not any(isinstance(parameter, DTensor) for parameter in module.parameters()):
            return Layout(Comm(single=True, within=world), find, False)
        # A piece may be refused on one rank alone; the others must hear of it before they compare their boxes.
        raise_on_all_ranks(world, find)
        return Layout.over(find, group_of({clean_name(name): p for name, p in module.named_parameters()}, world))

    @staticmethod
    def over(find: Callable[[], list[Shard]], comm: Comm) -> Layout:
        """Return the layout of pieces that are spread among the ranks of `comm`. All of them must call this.

        Raises:
            ValueError: as `uncounted` does.
        """
        first = find()
        elsewhere = uncounted(first, comm)
        copies = torch.tensor([sum(shard.trainable for shard in first if shard.name in elsewhere)], device="cpu")

        def shards() -> list[Shard]:
            return [replace(shard, counted=shard.name not in elsewhere) for shard in find()]

        return Layout(comm, shards, bool(comm.sum(copies)))


def clip(parameters: Iterable[Tensor], norm: float) -> None:
    """Clips the gradients of all parameters together at a norm, on whatever meshes they are.

    torch.nn.utils.clip_grad_norm_ stacks the norms of all parameters, which it can't where their meshes differ.
    """
    trained = [parameter for parameter in parameters if parameter.grad is not None]
    alike: dict[object, list[Tensor]] = {}
    for parameter in trained:
        key = (parameter.device_mesh, parameter.placements) if isinstance(parameter, DTensor) else None
        alike.setdefault(key, []).append(parameter)
    norms = [torch.nn.utils.get_total_norm([p.grad for p in group if p.grad is not None]) for group in alike.values()]
    whole = [one.full_tensor() if isinstance(one, DTensor) else one for one in norms]
    if whole:
        many = len(whole) > 1
        total = torch.linalg.vector_norm(torch.stack([one.to(whole[0].device) for one in whole])) if many else whole[0]
        for group in alike.values():
            torch.nn.utils.clip_grads_with_norm_(group, norm, total)
