"""Training loops of `peers.py`: sparse training by this library, by other packages, and by an equivalent of RigL.

Each loop trains the example's model with the same AdamW. Packages are used by their public interface alone:

    torch_prune        torch.nn.utils.prune: a float mask, multiplied in every forward pass
    pat, pruning       torchao's PruneOptimizer before healing: dense latent weights, new masks in every step
    pat, healing       the same once it heals: fixed masks, on gradients before the step and on weights after it
    modelopt, 2:4      ModelOpt's sparsify, mode sparse_magnitude: a fixed 2:4 boolean mask, in every forward pass

`equivalent of rigl` is written here for the comparison: boolean masks on the weights after every step, and updates that
sort whole tensors, as in rigl-torch. It is not that package, whose last release is from 2020.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import io
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import measure
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

sys.path.insert(0, str(measure.ROOT / "examples"))
sys.path.insert(0, str(measure.ROOT / "examples" / "translation"))

import model as models
import overhead

import gap_ds
from gap_ds import GaPEngine
from gap_ds.method import rules

NEVER = 10**9
#: Fraction of the kept weights that an update of RigL exchanges.
FRACTION = 0.3


class Loop:
    """Training without masks; the base of the others.

    package: the name under which it is installed. requires: modules to import beyond those of this project.
    """

    package = "torch"
    requires: tuple[str, ...] = ()

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self.args, self.device = args, device
        config = models.build_config(args.preset, vocab_size=overhead.VOCABULARY)
        self.model: Any = models.build_model(config).to(device)
        models.choose_attention(self.model, device)
        self.start()

    def start(self) -> None:
        """Puts on masks and makes the optimizer."""
        self.optimizer: Any = self.adamw(self.model.parameters())

    @staticmethod
    def adamw(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=1e-4, fused=True)

    @property
    def target(self) -> float:
        """The density that the masks shall have."""
        return 1.0

    def modules(self) -> list[nn.Linear]:
        """The linear layers inside the blocks, which are the entries of the library."""
        found = [(name, module) for name, module in self.model.named_modules() if isinstance(module, nn.Linear)]
        return [module for name, module in found if "layers" in name.split(".")]

    def loss(self, batch: dict[str, Any]) -> Tensor:
        logits = self.model(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False).logits
        return models.loss(logits, batch["labels"], smoothing=0.1, denominator=self.args.tokens)

    def step(self, batch: dict[str, Any]) -> None:
        self.loss(batch).backward()
        self.update()
        self.optimizer.zero_grad(set_to_none=True)

    def update(self) -> None:
        """The optimizer's step, and the masking around it."""
        self.optimizer.step()

    def masking(self) -> Callable[[], object] | None:
        """Return one choice of new masks for all entries, as the package makes it; None: there is none."""
        return None

    def stored(self) -> list[Tensor]:
        """The weights of the entries as the optimizer updates them."""
        return [module.weight for module in self.modules()]

    def used(self) -> list[Tensor]:
        """The weights of the entries as the next forward pass has them."""
        return self.stored()

    def save(self) -> Any:
        """Return the state of a checkpoint, by the package's documented way."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load(self, state: Any) -> None:
        """Goes on from a checkpoint, in a fresh loop."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])


class Bare(Loop):
    """AdamW alone."""


class GapDs(Loop):
    """GaPEngine with all entries sparse, as for every peer: packed masks after the step."""

    package = "gap_ds"
    config: ClassVar[dict[str, Any]] = {"method": "static", "rounds": 1, "partitions": 1, "phase_steps": NEVER}

    def start(self) -> None:
        super().start()
        gap = {"sparsity": self.args.sparsity, "finetune_steps": 1} | self.config
        self.engine = GaPEngine(self.model, gap, optimizer=self.optimizer)

    @property
    def target(self) -> float:
        return sum(entry.keep for entry in self.engine.plan.entries) / self.engine.plan.numel

    def step(self, batch: dict[str, Any]) -> None:
        self.engine.backward(self.loss(batch))
        self.engine.step()

    def masking(self) -> Callable[[], object] | None:
        pruned = {entry: rules.PruneByMagnitude(entry.keep) for entry in self.engine.plan.entries}
        return lambda: self.engine.mask_state.select(pruned, 0)

    def save(self) -> Any:
        folder = tempfile.TemporaryDirectory()
        self.engine.save_checkpoint(folder.name)
        return folder

    def load(self, state: Any) -> None:
        self.engine.load_checkpoint(state.name)


class GapDs2of4(GapDs):
    config: ClassVar[dict[str, Any]] = GapDs.config | {"pattern": "2:4", "sparsity": 0.5}


class GapDsRigl(GapDs):
    """Updates as RigL makes them; its steps are those of `GapDs`."""

    config: ClassVar[dict[str, Any]] = {"method": "rigl", "phase_steps": NEVER, "update_steps": NEVER // 10}

    def gradients(self, batch: dict[str, Any]) -> None:
        """Has gradients for an update; a step would discard them."""
        self.engine.backward(self.loss(batch))
        self.engine.mask_state.copy_gradients(self.optimizer)

    def masking(self) -> Callable[[], object] | None:
        moved = {
            entry: rules.DropAndGrow(entry.keep, int(FRACTION * entry.keep), by_gradient=True)
            for entry in self.engine.plan.entries
        }
        return lambda: self.engine.mask_state.select(moved, 1)


class TorchPrune(Loop):
    def start(self) -> None:
        for module in self.modules():
            prune.l1_unstructured(module, "weight", self.args.sparsity)
        super().start()

    @property
    def target(self) -> float:
        return 1 - float(self.args.sparsity)

    def masking(self) -> Callable[[], object] | None:
        method = prune.L1Unstructured(self.args.sparsity)
        pairs = [(weight.detach(), torch.ones_like(weight)) for weight in self.stored()]
        return lambda: [method.compute_mask(weight, ones) for weight, ones in pairs]

    def stored(self) -> list[Tensor]:
        return [module.weight_orig for module in self.modules()]

    def used(self) -> list[Tensor]:
        return [module.weight_orig * module.weight_mask for module in self.modules()]


class Pat(Loop):
    """torchao's PruneOptimizer with the k smallest magnitudes of each tensor pruned."""

    package = "torchao"
    requires = ("torchao",)
    heal_from = sys.maxsize

    def start(self) -> None:
        from torchao.prototype.pat import PruneOptimizer

        weights = [module.weight for module in self.modules()]
        chosen = set(map(id, weights))
        rest = [p for p in self.model.parameters() if id(p) not in chosen]
        pruned = {"params": weights, "group_type": "KElementGrouper", "k": 1}
        pruned |= {"prox_type": "MinSparsityConstraint", "min_sparsity": self.args.sparsity, "reg_lambda": 0.0}
        base = self.adamw([pruned, {"params": rest}])
        self.optimizer = PruneOptimizer(base, warmup_steps=0, healing_start_step=self.heal_from)

    @property
    def target(self) -> float:
        return 1 - float(self.args.sparsity)


class PatPruning(Pat):
    def masking(self) -> Callable[[], object] | None:
        from torchao.prototype.pat.optim import MinSparsityConstraint

        prox = MinSparsityConstraint(0.0, self.args.sparsity)
        pairs = [(weight.detach().clone(), weight.detach().clone()) for weight in self.stored()]

        def choose() -> None:
            for weight, latent in pairs:
                weight.copy_(latent)
                prox.apply_(weight.view(-1, 1), 0.0)

        return choose


class PatHealing(Pat):
    heal_from = 1


class ModelOpt(Loop):
    package = "nvidia-modelopt"
    requires = ("modelopt", "requests", "scipy")

    def start(self) -> None:
        import modelopt.torch.sparsity as sparsity

        with contextlib.redirect_stdout(io.StringIO()):  # a line for each layer
            sparsity.sparsify(self.model, "sparse_magnitude")
        super().start()

    @property
    def target(self) -> float:
        return 0.5

    def masking(self) -> Callable[[], object] | None:
        from modelopt.torch.sparsity.weight_sparsity.magnitude import create_asp_mask

        weights = [weight.detach() for weight in self.stored()]
        return lambda: [create_asp_mask(weight, "2:4 sparsity") for weight in weights]

    def stored(self) -> list[Tensor]:
        return [module._parameters["weight"] for module in self.modules()]

    def used(self) -> list[Tensor]:
        return [module.weight for module in self.modules()]

    def save(self) -> Any:
        import modelopt.torch.opt as opt

        return super().save() | {"masks": opt.modelopt_state(self.model)}

    def load(self, state: Any) -> None:
        import modelopt.torch.opt as opt

        plain = Bare(self.args, self.device)
        self.model = opt.restore_from_modelopt_state(plain.model, state["masks"])
        self.optimizer = self.adamw(self.model.parameters())
        super().load(state)


class Rigl(Loop):
    package = "written here"

    def start(self) -> None:
        super().start()
        self.masks = [kept_largest(weight.detach(), self.args.sparsity) for weight in self.stored()]

    @property
    def target(self) -> float:
        return 1 - float(self.args.sparsity)

    @torch.no_grad()
    def update(self) -> None:
        super().update()
        for weight, kept in zip(self.stored(), self.masks, strict=True):
            weight.mul_(kept)

    def gradients(self, batch: dict[str, Any]) -> None:
        """Has gradients for an update."""
        self.loss(batch).backward()

    def masking(self) -> Callable[[], object] | None:
        weights = [weight.detach() for weight in self.stored()]
        triples = list(zip(weights, [weight.grad for weight in self.stored()], self.masks, strict=True))
        return lambda: [exchange(*triple) for triple in triples]

    def save(self) -> Any:
        return super().save() | {"masks": self.masks}

    def load(self, state: Any) -> None:
        super().load(state)
        self.masks = state["masks"]


#: The loops by the name of their row. Those with a 2:4 pattern prune half of the weights.
LOOPS: dict[str, type[Loop]] = {
    "gap_ds": GapDs,
    "torch_prune": TorchPrune,
    "pat, healing": PatHealing,
    "pat, pruning": PatPruning,
    "equivalent of rigl": Rigl,
    "gap_ds, method rigl": GapDsRigl,
    "gap_ds, 2:4": GapDs2of4,
    "modelopt, 2:4": ModelOpt,
}


def missing(loop: type[Loop]) -> list[str]:
    """Return the modules that a loop needs and that are not installed."""
    return [name for name in loop.requires if importlib.util.find_spec(name) is None]


def version(loop: type[Loop]) -> str:
    """Return the package of a loop with its version."""
    known = {"torch": torch.__version__, "gap_ds": gap_ds.__version__, "written here": ""}
    found = known[loop.package] if loop.package in known else importlib.metadata.version(loop.package)
    return f"{loop.package} {found}".strip()


def kept_largest(weight: Tensor, sparsity: float) -> Tensor:
    keep = round((1 - sparsity) * weight.numel())
    kept = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
    kept[weight.abs().view(-1).topk(keep).indices] = True
    return kept.view(weight.shape)


def exchange(weight: Tensor, gradient: Tensor, kept: Tensor, fraction: float = FRACTION) -> Tensor:
    """Update a mask like RigL, by two sorts of the whole tensor."""
    flat, mask = weight.view(-1), kept.view(-1)
    dropped = int(fraction * int(mask.sum()))
    order = torch.sort(torch.where(mask, flat.abs(), torch.inf)).indices[:dropped]
    after = mask.clone()
    after[order] = False
    grown = torch.sort(torch.where(mask, -1.0, gradient.view(-1).abs()), descending=True).indices[:dropped]
    after[grown] = True
    return after.view(weight.shape)


def copied(state: Any) -> Any:
    """Return a checkpoint as it is read from a file."""
    if isinstance(state, tempfile.TemporaryDirectory):
        assert Path(state.name).is_dir()
        return state
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=False)
