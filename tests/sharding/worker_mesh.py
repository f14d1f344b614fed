"""All rows of meshes with more than one dimension, one after the other in one group of 4 processes."""

from __future__ import annotations

import itertools
import json
import math
import os
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import observe
import reference
import torch
import torch.distributed as dist
import toy
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from worker_pattern import legal_mask

from gap_ds import GaPEngine, optim
from gap_ds.masks.local import local
from gap_ds.method.names import rows_of
from gap_ds.method.plan import clean_name
from gap_ds.sharding.comm import Comm
from gap_ds.sharding.mesh import group_of, shard_of, uncounted

warnings.filterwarnings("ignore", category=FutureWarning)
warnings.filterwarnings("ignore", category=UserWarning)

#: Width of the blocks: torch's tensor parallelism needs equal pieces.
HIDDEN, EXPERTS = 40, 4


# -- models ------------------------------------------------------------------------------------------------------------


class Experts(nn.Module):
    """All experts of a block as stacked weights; each computes all tokens, and a router weighs them.

    ep: the mesh over which the experts are spread.
    """

    ep: DeviceMesh | None = None
    #: Each rank has a part of all experts, as of gates and ups in one tensor: some of its first half, some of its last.
    packed = False

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(toy.WIDTH, EXPERTS, bias=False)
        self.up = nn.Parameter(torch.randn(EXPERTS, HIDDEN, toy.WIDTH) / 4)
        self.down = nn.Parameter(torch.randn(EXPERTS, toy.WIDTH, HIDDEN) / 6)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, WIDTH) to the same, whether experts are whole or spread over a mesh's dimension `ep`."""
        share = self.router(x).softmax(-1)
        up, down = (self._own(weight) for weight in (self.up, self.down))
        first = self._first(len(up))
        hidden = torch.einsum("bti,eoi->ebto", self._same(x), up).relu()
        own = torch.einsum("ebti,eoi,bte->bto", hidden, down, self._same(share)[..., first : first + len(up)])
        return self._summed(own)

    def _own(self, weight: Tensor) -> Tensor:
        return weight.to_local() if isinstance(weight, DTensor) else weight

    def _first(self, count: int) -> int:
        return 0 if self.ep is None or self.packed else self.ep.get_local_rank() * count

    def _same(self, x: Tensor) -> Tensor:
        """Equal on all ranks of `ep`; its gradient is their sum."""
        return (
            x
            if self.ep is None
            else DTensor.from_local(x, self.ep, [Replicate()]).to_local(grad_placements=[Partial()])
        )

    def _summed(self, x: Tensor) -> Tensor:
        if self.ep is None:
            return x
        return DTensor.from_local(x, self.ep, [Partial()]).redistribute(placements=[Replicate()]).to_local()


class Mixture(nn.Module):
    """The toy with experts, for expert parallelism."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(toy.VOCABULARY, toy.WIDTH)
        self.layers = nn.ModuleList(Experts() for _ in range(toy.BLOCKS))
        self.head = nn.Linear(toy.WIDTH, toy.VOCABULARY)

    def forward(self, tokens: Tensor, use_all: bool) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = x + layer(x)
        return functional.cross_entropy(self.head(x).flatten(0, 1), tokens.roll(1, dims=1).flatten())


class Context(toy.Toy):
    """The toy on one part of every sequence, as with context parallelism; no weight is cut by it."""

    part = 0, 1

    def forward(self, tokens: Tensor, use_all: bool) -> Tensor:
        rank, size = self.part
        wanted = tokens.roll(1, dims=1)
        mine = slice(rank * tokens.shape[1] // size, (rank + 1) * tokens.shape[1] // size)
        x = self.embedding(tokens[:, mine])
        for layer in self.layers:
            x = layer(x)
        x = self.frozen(x)
        x = x + self.sometimes(x) if use_all else x
        return functional.cross_entropy(self.head(self.norm(x)).flatten(0, 1), wanted[:, mine].flatten())


class Untied(nn.Module):
    """The toy without its tied head, and the part of it that one stage of a pipeline has."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding: nn.Module | None = nn.Embedding(toy.VOCABULARY, toy.WIDTH)
        # Other widths, so that budgets by ERK depend on the layers of both stages.
        self.layers = nn.ModuleDict({str(i): toy.Block(HIDDEN + 8 * i) for i in range(toy.BLOCKS)})
        self.head: nn.Module | None = nn.Linear(toy.WIDTH, toy.VOCABULARY)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.embedding is None else self.embedding(x)
        for layer in self.layers.values():
            x = layer(x)
        return x if self.head is None else self.head(x)

    def stage(self, number: int) -> Untied:
        """Drops what the other stage has."""
        for i in list(self.layers):
            if int(i) // 2 != number:
                del self.layers[i]
        self.embedding, self.head = (self.embedding, None) if number == 0 else (None, self.head)
        return self


def untied() -> Untied:
    torch.manual_seed(1)
    return Untied()


def unsharded(row: dict[str, Any]) -> nn.Module:
    torch.manual_seed(1)
    return Mixture() if row.get("experts") else Context(HIDDEN) if row.get("cp") else toy.Toy(HIDDEN)


# -- meshes ------------------------------------------------------------------------------------------------------------


def tensor_parallel(model: nn.Module, mesh: DeviceMesh, sequence: bool = False) -> None:
    plan: dict[str, Any] = {}
    for i in range(toy.BLOCKS):
        if sequence:
            plan[f"layers.{i}.norm"] = SequenceParallel(use_local_output=False)
        plan[f"layers.{i}.fc1"] = ColwiseParallel(input_layouts=Shard(1) if sequence else Replicate())
        plan[f"layers.{i}.fc2"] = RowwiseParallel()
    parallelize_module(model, mesh, plan)

    def cut(_: nn.Module, arguments: tuple[Tensor]) -> tuple[DTensor]:
        """This rank's part of every sequence, for the norm."""
        return (DTensor.from_local(arguments[0], mesh, [Replicate()]).redistribute(placements=[Shard(1)]),)

    for layer in model.layers if sequence else []:
        layer.norm.register_forward_pre_hook(cut, prepend=True)


def expert_parallel(model: nn.Module, mesh: DeviceMesh, packed: bool = False) -> None:
    for layer in model.layers:
        for dim, name in enumerate(("up", "down"), 1):
            cut = _StridedShard(dim, split_factor=2) if packed else Shard(0)
            setattr(layer, name, nn.Parameter(distribute_tensor(getattr(layer, name).detach(), mesh, [cut])))
        layer.ep, layer.packed = mesh, packed


def sharded(model: nn.Module, mesh: DeviceMesh, place: Callable[[nn.Parameter], Any] | None = None) -> nn.Module:
    for layer in model.layers.values() if isinstance(model, Untied) else model.layers:
        fully_shard(layer, mesh=mesh, shard_placement_fn=place)
    return fully_shard(model, mesh=mesh, shard_placement_fn=place)


def last(parameter: nn.Parameter) -> Shard | None:
    """The last dimension, where it can be cut evenly."""
    return Shard(parameter.dim() - 1) if parameter.shape[-1] % 4 == 0 else None


def wrap(row: dict[str, Any]) -> nn.Module:
    """The model on the row's mesh. Sets the group that trains it, and the data of this rank."""
    model, rank = unsharded(row), dist.get_rank()
    toy.Job.group, toy.Job.data_rank = None, rank
    match row["mesh"]:
        case "alone":  # this rank and no other
            toy.Job.group, toy.Job.data_rank = GROUPS[rank,], rank // 2
            return model
        case "tp_groups" | "ep_groups":  # two models, each on two ranks
            pair = rank // 2
            mesh = DeviceMesh.from_group(GROUPS[2 * pair, 2 * pair + 1], "cpu", mesh_dim_names=("tp",))
            toy.Job.group, toy.Job.data_rank = GROUPS[2 * pair, 2 * pair + 1], pair
            (tensor_parallel if row["mesh"] == "tp_groups" else expert_parallel)(model, mesh)
            return model
        case "tp4":
            toy.Job.data_rank = 0
            tensor_parallel(model, init_device_mesh("cpu", (4,)))
            return model
        case "ddp":
            toy.Job.data_rank = rank // 2
            return DistributedDataParallel(model, find_unused_parameters=True)
        case "shard1":
            return sharded(model, init_device_mesh("cpu", (4,)), last)
        case "fsdp4":
            return sharded(model, init_device_mesh("cpu", (4,)))
        case "cp":
            mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
            toy.Job.data_rank, model.part = mesh.get_local_rank("dp"), (mesh.get_local_rank("cp"), 2)
            return sharded(model, mesh["dp", "cp"]._flatten("dp_cp"))
        case "hsdp_tp":
            mesh = init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("replicate", "dp", "tp"))
            tensor_parallel(model, mesh["tp"])
            toy.Job.data_rank = mesh.get_local_rank("replicate")
            return sharded(model, mesh["replicate", "dp"])
        case "fsdp_tp" | "fsdp_sp":
            mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
            tensor_parallel(model, mesh["tp"], sequence=row["mesh"] == "fsdp_sp")
        case "fsdp_ep" | "fsdp_ep_1" | "fsdp_packed":
            mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
            expert_parallel(model, mesh["ep"], packed=row["mesh"] == "fsdp_packed")
        case other:
            raise AssertionError(other)
    toy.Job.data_rank = mesh.get_local_rank("dp")
    place = (lambda p: Shard(1) if p.dim() == 3 else None) if row["mesh"] == "fsdp_ep_1" else None
    return sharded(model, mesh["dp"], place)


#: Process groups by their ranks, made by all ranks in the same order.
GROUPS: dict[tuple[int, ...], Any] = {}


def build(row: dict[str, Any], **training: Any) -> GaPEngine:
    model = wrap(row)
    gap = row.get("gap", toy.GAP)
    training = {"gradient_accumulation_steps": toy.ACCUMULATION, "gradient_clipping": row.get("clip", 0.0), **training}
    return GaPEngine(model, gap, optimizer=adamw(model), group=toy.Job.group, **training)


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def whole(engine: GaPEngine) -> Callable[[str], Tensor]:
    """A whole parameter by torch's own means."""

    def weight(name: str) -> Tensor:
        engine.run.backend.publish()
        parameters = {clean_name(n): p for n, p in engine.module.named_parameters()}
        parameter, rows = rows_of(name)
        found = parameters[parameter].detach()
        whole = found.full_tensor() if isinstance(found, DTensor) else found
        return whole[slice(*rows) if rows else slice(None)]

    return weight


# -- what a row does ---------------------------------------------------------------------------------------------------


def run(row: dict[str, Any], out: Path) -> dict[str, Any]:
    """A whole run, saved and exported in step 4, and a second engine that goes on from there."""
    engine, name = build(row), row["name"]
    select = (
        partial(legal_mask, pattern=row["gap"]["pattern"]) if "pattern" in row.get("gap", {}) else reference.largest
    )
    first = dist.get_global_rank(toy.Job.group, 0) if toy.Job.group else 0  # of the ranks that train this model
    folder = out / "checkpoints" / f"{name}.{first}"
    at = {4: lambda: engine.save_checkpoint(folder, portable=True)}
    result = observe.train(engine, whole(engine), at=at, select=select)
    result |= observe.final_state(engine) | {"stats": engine.stats(), "plan": engine.plan}
    engine.export(out / "final" / folder.name)
    result["exported"] = (
        load_file(out / "final" / folder.name / "model.safetensors") if dist.get_rank() == first else {}
    )
    engine.close()
    resumed = build(row)
    resumed.load_checkpoint(folder)
    again = observe.train(resumed, whole(resumed), first=5, select=select)
    result["wrong"] += again["wrong"]
    result["resumed"] = observe.final_state(resumed) | {"masks": observe.full_masks(resumed)}
    resumed.close()
    if not row.get("experts"):
        result["reference"] = independent(row.get("clip", 0.0), select if "gap" in row else reference.largest)
    return result


def pipeline(row: dict[str, Any], out: Path) -> dict[str, Any]:
    """Two stages on two ranks each, by GPipe; then the whole model on this rank alone, with the same data."""
    rank = dist.get_rank()
    number, gap = rank % 2, {**toy.GAP, "distribution": "erk"}
    stages = {0: GROUPS[0, 2], 1: GROUPS[1, 3]}
    module = sharded(untied().stage(number), DeviceMesh.from_group(stages[number], "cpu", mesh_dim_names=("dp",)))
    with torch.device("meta"):
        whole = Untied()
    engine = GaPEngine(module, gap, optimizer=adamw(module), group=stages[number], whole=whole)
    pair = GROUPS[0, 1] if rank < 2 else GROUPS[2, 3]
    stage = PipelineStage(module, number, 2, torch.device("cpu"), group=pair)

    def loss(logits: Tensor, wanted: Tensor) -> Tensor:
        return functional.cross_entropy(logits.flatten(0, 1), wanted.flatten())

    schedule = ScheduleGPipe(stage, n_microbatches=2, loss_fn=loss)
    for step in range(toy.STEPS):
        tokens = toy.batch(step, 0, rank // 2)[0]
        schedule.step(tokens) if number == 0 else schedule.step(target=tokens.roll(1, dims=1))
        engine.optimizer.step()
        engine.optimizer.zero_grad()
        engine.after_step()
    toy.Job.group, toy.Job.data_rank = stages[number], None
    found = {"stats": engine.stats(), "final": observe.final_state(engine), "masks": observe.full_masks(engine)}
    engine.save_checkpoint(out / "checkpoints" / f"pipeline{number}")
    engine.close()
    model = untied()
    alone = GaPEngine(model, gap, optimizer=adamw(model), group=GROUPS[rank,])
    for step in range(toy.STEPS):
        batches = [toy.batch(step, 0, data)[0] for data in (0, 1)]
        sum(loss(model(tokens), tokens.roll(1, dims=1)) / 2 for tokens in batches).backward()
        alone.optimizer.step()
        alone.optimizer.zero_grad()
        alone.after_step()
    toy.Job.group = GROUPS[rank,]
    found["whole"] = {"stats": alone.stats(), "final": observe.final_state(alone), "masks": observe.full_masks(alone)}
    alone.close()
    return found


def boxes(row: dict[str, Any], out: Path) -> dict[str, Any]:
    """The boxes of DTensors of all placements on a mesh, compared with the numbers that this rank holds."""
    mesh, wrong = init_device_mesh("cpu", (2, 2)), []
    for shape in [(), (5,), (1, 4), (5, 3), (7, 9), (4, 6, 2), (3, 1, 5)]:
        numbers = torch.arange(math.prod(shape)).view(shape)
        ways = [Replicate(), *(Shard(dim) for dim in range(len(shape)))]
        for placements in itertools.product(ways, ways):
            parameter = nn.Parameter(distribute_tensor(numbers.float(), mesh, placements))
            found = shard_of("w", parameter)
            if found.box.indices().tolist() != parameter.to_local().flatten().long().tolist():
                wrong.append(f"{shape} {placements}: {found.box}")
            comm = group_of({"w": parameter}, Comm())
            counted = "w" not in uncounted([found], comm)
            total = torch.tensor(found.numel * counted)
            dist.all_reduce(total)
            if int(total) != math.prod(shape) * 4 // comm.size:
                wrong.append(f"{shape} {placements}: {int(total)} weights are counted in groups of {comm.size}")
    line = init_device_mesh("cpu", (4,))
    for shape, on, placements in [
        ((16, 3), line, [_StridedShard(0, split_factor=2)]),
        ((3, 24), line, [_StridedShard(1, split_factor=3)]),
        ((3, 8, 2), mesh, [Shard(0), _StridedShard(1, split_factor=2)]),
        ((8, 5), mesh, [_StridedShard(0, split_factor=2), Shard(0)]),
    ]:
        numbers = torch.arange(math.prod(shape)).view(shape)
        found = shard_of("w", parameter := nn.Parameter(distribute_tensor(numbers.float(), on, placements)))
        if found.box.indices().tolist() != parameter.to_local().flatten().long().tolist() or uncounted([found], Comm()):
            wrong.append(f"{shape} {placements}: {found.box}")
    # A weight that half of the ranks do not hold, beside one that is spread among others.
    numbers, half = torch.arange(35.0).view(7, 5), DeviceMesh("cpu", [0, 1])
    pieces = {
        "half": nn.Parameter(distribute_tensor(numbers, half, [Shard(0)])),
        "all": nn.Parameter(distribute_tensor(numbers, mesh, [Replicate(), Shard(0)])),
    }
    comm = group_of(pieces, Comm())
    for name, found in ((name, shard_of(name, parameter)) for name, parameter in pieces.items()):
        total = torch.tensor(found.numel * (name not in uncounted([found], comm)))
        dist.all_reduce(total)
        if comm.size != 4 or int(total) != 35:
            wrong.append(f"{name}: {int(total)} weights are counted among {comm.size} ranks")
    return {"wrong": wrong}


class Parts(nn.Module):
    """Layers that are the same on every rank, each of which has other rows of the batch: gradients are summands."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        loss = x.pow(4).mean()
        return loss.full_tensor() if isinstance(loss, DTensor) else loss


def summands(row: dict[str, Any], out: Path) -> dict[str, Any]:
    """Replicated DTensors by an optimizer that holds state for kept weights alone, and with growth by gradient."""
    mesh, found = init_device_mesh("cpu", (4,)), dict[str, dict[str, Tensor]]()
    gap = {"method": "rigl", "sparsity": 0.5, "phase_steps": 6, "update_steps": 2, "finetune_steps": 1}
    for kind, group in (("alone", GROUPS[dist.get_rank(),]), ("parts", None)):
        torch.manual_seed(1)
        model = Parts() if kind == "alone" else distribute_module(Parts(), mesh)
        optimizer = optim.AdamW(model.parameters(), lr=1e-2)
        engine = GaPEngine(model, gap, optimizer=optimizer, group=group)
        for _ in range(6):
            x = torch.randn(8, 8)
            engine.backward(engine(x if kind == "alone" else distribute_tensor(x, mesh, [Shard(0)])))
            engine.step()
        found[kind] = {name: local(p).detach().clone() for name, p in model.named_parameters()}
        engine.close()
    return found


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    # One tensor at a time: torch's grouped updates do not take tensors of several meshes.
    return torch.optim.AdamW(trained(model), lr=1e-2, foreach=False)


def independent(clip: float = 0.0, select: Callable[..., Tensor] = reference.largest) -> dict[str, Any]:
    """The same training of the whole toy, without gap_ds."""
    keep = round(toy.WIDTH * HIDDEN * (0.2 if select is reference.largest else 0.5))
    return reference.train("adamw", False, trained, clip, hidden=HIDDEN, select=partial(select, keep=keep))


def chain(row: dict[str, Any], out: Path) -> dict[str, Any]:
    """One run that goes over several meshes, each of which takes three steps; compared with one that stays."""
    found: dict[str, Any] = {"wrong": []}
    for i, mesh in enumerate(row["meshes"]):
        engine = build({**row, "mesh": mesh})
        toy.Job.data_rank = 0  # all ranks see the same data, so that the number of ranks changes nothing
        folder = out / "checkpoints" / row["name"]
        if i:
            engine.load_checkpoint(folder)
        found["wrong"] += observe.train(engine, whole(engine), first=3 * i, last=3 * i + 3)["wrong"]
        if mesh != "alone":
            engine.save_checkpoint(folder, portable=row["portable"])
        found |= observe.final_state(engine) | {"masks": observe.full_masks(engine)}
        engine.close()
    return found | {"reference": independent()}


def main(out: Path) -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    for ranks in [(0, 1), (2, 3), (0, 2), (1, 3), (0,), (1,), (2,), (3,)]:
        GROUPS[ranks] = dist.new_group(list(ranks))
    rows = json.loads((out / "rows.json").read_text())
    kinds = {"chain": chain, "pipeline": pipeline, "boxes": boxes, "summands": summands}
    works = {row["name"]: partial(kinds.get(row.get("what", ""), run), row, out) for row in rows}
    observe.work_through(out, works)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)  # results are handed over: no library's clean-up at exit can spoil them
