"""`GaPEngine`: joins what is kept (schedule, budgets, selection) with where it lies (backend), in one place.

A step: forward, backward, reduce, clip -> the innermost optimizer updates the fp32 pieces -> our post-step hook zeroes
their pruned weights -> the library copies them to bf16 and spreads them, zeros included -> `step()` counts the update
and asks the schedule. At a boundary: select over shards, set bits, zero weights, clear the moments of grown weights,
publish, one log line.
"""

from __future__ import annotations

import copy
import logging
import os
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gap_ds._version import __version__
from gap_ds.checkpoint import folder as checkpoint
from gap_ds.checkpoint import portable as portable_files
from gap_ds.checkpoint.run_state import RandomState, State
from gap_ds.export import folder as export
from gap_ds.masks import bitmask
from gap_ds.method import plan, rules, schedule
from gap_ds.method.config import GaPConfig
from gap_ds.method.schedule import Phase
from gap_ds.parallel import Exchange, ParallelWorker, Received, identity, items_of
from gap_ds.sharding.backends import Training, detect
from gap_ds.sharding.comm import Comm, operation, raise_on_all_ranks, summarize_error
from gap_ds.storage.json import read_json
from gap_ds.training import consistency, mask_state
from gap_ds.training.consistency import LossGuard
from gap_ds.training.history import History
from gap_ds.training.mask_state import MaskState

log = logging.getLogger("gap_ds")


class GaPEngine:
    """Trains a model sparse by grow-and-prune, inside the sharding engine it already has.

    Use it as DeepSpeed's engine is used, whatever the backend::

        engine = GaPEngine(model_or_deepspeed_engine, "configs/gap/cyclic_80.json", steps_per_epoch=len(loader))
        for batch in loader:
            loss = engine(**batch).loss
            engine.backward(loss)
            engine.step()

    After every applied step the pruned weights are exactly 0, in the fp32 weights and in the working copies, on every
    rank. Gradients are not masked: a clipping norm is that of the dense gradient. Attributes that the engine does not
    have are those of the wrapped model or DeepSpeed engine.

    Args:
        model: a DeepSpeed engine, a DistributedDataParallel module or a plain model, on its device.
        config: a GaPConfig, a dict, or the path of a JSON or YAML file.
        optimizer: of a model that is no DeepSpeed engine; already built over its parameters.
        lr_scheduler: stepped once per applied step. With `lr_restart` it starts again in every phase, so it should
            cover one phase.
        steps_per_epoch: applied optimizer steps in an epoch; needed where the config counts in epochs.
        nonfinite_loss: what a loss that is NaN or infinite does. `stop`: the run ends with an error before a boundary
            or a checkpoint can make it permanent; costs nothing, and loss scaling has its own way. `skip`: its
            micro-batch is left out on all ranks; costs a small all-reduce in every micro-batch.
        worker: with `method: parallel`, which worker this job is and where it meets the others.
        masks_from: a folder that `save_masks` wrote: the run goes on from there. The weights and the optimizer are
            already restored, by whatever else saved them.
        history: file to record what every boundary does to the masks (`gap-ds report` draws it); costs up to a further
            bit for each weight of the entries. See history.py.
        gradient_accumulation_steps, gradient_clipping, grad_scaler: for a model that is no DeepSpeed engine: `step()`
            updates at every n-th call; norm to clip at (0: off); a torch.amp.GradScaler.
    Raises:
        ValueError: a mistake in the config, or a combination that is not supported; the message names the setting.
    """

    def __init__(
        self,
        model: nn.Module,
        config: GaPConfig | dict[str, Any] | str | Path,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        lr_scheduler: Any = None,
        steps_per_epoch: int | None = None,
        worker: ParallelWorker | None = None,
        nonfinite_loss: Literal["stop", "skip"] = "stop",
        masks_from: str | Path | None = None,
        history: str | Path | None = None,
        gradient_accumulation_steps: int = 1,
        gradient_clipping: float = 0.0,
        grad_scaler: Any = None,
    ) -> None:
        self.config = GaPConfig.load(config)
        self.worker = _check_worker(self.config, worker)
        self.schedule = schedule.build(self.config, steps_per_epoch, worker.index if worker else 0)
        training = Training(optimizer, lr_scheduler, gradient_accumulation_steps, gradient_clipping, grad_scaler)
        self._backend = detect(model, training)
        self._world = Comm()
        self._lr_scheduler = lr_scheduler if lr_scheduler is not None else getattr(model, "lr_scheduler", None)
        self._grad_scaler = grad_scaler
        if self.config.lr_restart and self._lr_scheduler is None:
            raise ValueError(
                '"lr_restart" has no effect without a learning-rate scheduler: pass lr_scheduler, or remove it'
            )
        if self.config.lr_restart and masks_from is not None:
            raise ValueError(
                f'masks_from="{masks_from}" with "lr_restart": where the learning rate began is not known any more. '
                "Build the engine before anything is restored, and call load_masks."
            )
        self._first_lr = self._lr_state()

        shards = self._backend.shards()
        frozen = {shard.name for shard in shards if not shard.trainable}
        shapes = {shard.name: shard.shape for shard in shards}
        kept = mask_state.inherited(self.config, shards, self._backend.comm) if self.config.reuses_masks else None
        self.plan = plan.build(self._backend.module, self.config, shapes, frozen, kept)
        self.mask_state = MaskState(self.plan, self.config, self._backend)
        self._rule = rules.rule(self.config)
        self._history = None
        if history is not None:
            comms = (self._backend.comm, self._world)
            self._history = History(Path(history), self.plan, self.signature, self.mask_state, *comms)
        self._exchange = None
        #: Of a worker, a fingerprint of the weights it has, until it is known whether it begins or goes on.
        self._start: str | None = None
        if worker is not None:
            tensors = identity.of_tensors(items_of(self.plan, shards, dict(export.buffers(self._backend.module))))
            of_run = (self.plan.kappa, self.signature, self.plan.fingerprint, tensors)
            self._exchange = Exchange(worker, *of_run, self._world, self._backend.comm, self.config.unpartitioned)
            self._start = identity.of_weights(shards, self._backend.comm)
        self.applied_steps = 0
        self._updated = False
        #: Whether `finish` has ended the schedule before its last step.
        self._over = False
        self._watch = LossGuard(nonfinite_loss, self._world, harmless=self._backend.skips_overflow)
        self.last_boundary_seconds = 0.0
        self._hook = self._backend.optimizer.register_step_post_hook(self._after_update)
        self._say(self.signature)
        if masks_from is None:
            self._enter(None, self.phase)
        else:
            self.load_masks(masks_from)

    @classmethod
    def initialize(
        cls,
        *,
        model: nn.Module,
        config: dict[str, Any] | str | Path,
        gap_config: GaPConfig | dict[str, Any] | str | Path,
        steps_per_epoch: int | None = None,
        worker: ParallelWorker | None = None,
        nonfinite_loss: Literal["stop", "skip"] = "stop",
        history: str | Path | None = None,
        **deepspeed_arguments: Any,
    ) -> GaPEngine:
        """As `deepspeed.initialize`, which gets `model`, `config` and all further arguments; returns a GaPEngine.

        Args:
            config: the DeepSpeed config, a dict or a JSON file.
            gap_config: the GaP config; it is validated before DeepSpeed starts.
        """
        from gap_ds.sharding.backends import zero

        gap = GaPConfig.load(gap_config)
        _check_worker(gap, worker)
        schedule.build(gap, steps_per_epoch)  # complains before anything is allocated
        if not {"optimizer", "model_parameters"} & deepspeed_arguments.keys():
            deepspeed_arguments["model_parameters"] = [p for p in model.parameters() if p.requires_grad]
        config = str(config) if isinstance(config, Path) else config
        engine = zero.initialize(model=model, config=config, **deepspeed_arguments)
        return cls(
            engine,
            gap,
            steps_per_epoch=steps_per_epoch,
            worker=worker,
            nonfinite_loss=nonfinite_loss,
            history=history,
        )

    # -- training --------------------------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped model's forward pass."""
        return self._backend.forward(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        """Backward pass of one micro-batch; the loss is its mean, whatever the number of accumulated micro-batches."""
        if self._watch.accepts(loss, self.applied_steps):
            self._backend.backward(loss)

    def watch(self, loss: Tensor) -> None:
        """Looks at a loss that something else propagates, as `backward` does: one that is not finite ends the run.

        With nonfinite_loss="stop" alone: a micro-batch that is not ours to propagate cannot be left out.
        """
        self._watch.accepts(loss, self.applied_steps)

    def step(self) -> None:
        """Ends a micro-batch. If that completes an update: optimizer step, masks, and at a boundary prune and grow."""
        if self._watch.skipping:
            return
        self._backend.step()
        self.after_step()

    def after_step(self) -> bool:
        """Counts the update that the optimizer has applied since the last call, if any, and crosses a boundary.

        `step` does this. Call it yourself only where something else steps the optimizer. Returns whether there was an
        update: micro-batches that only accumulate, and steps skipped for an fp16 overflow, are none.
        """
        if not self._updated:
            return False
        self._updated = False
        if self._exchange is not None and self._start is not None:
            self._exchange.begin(self._start)
            self._start = None
        before = self.phase
        self.applied_steps += 1
        if self.phase is not before or self.applied_steps in before.updates:
            self._enter(before, self.phase)
        return True

    @property
    def phase(self) -> Phase:
        """The phase that the next step belongs to."""
        return self.schedule.phases[-1] if self._over else self.schedule.phase_at(self.applied_steps)

    @property
    def module(self) -> nn.Module:
        """The model inside all wrappers."""
        return self._backend.module

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The innermost optimizer; its `param_groups[0]["lr"]` is the learning rate of the next step."""
        return self._backend.optimizer

    @property
    def finished(self) -> bool:
        """Whether the whole schedule has been trained. Training on stays in the last phase."""
        return self._over or self.applied_steps >= self.schedule.total_steps

    @property
    def signature(self) -> str:
        """One line with everything of the method that changes the result."""
        return self.config.signature(__version__)

    def _after_update(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Post-step hook: zeroes the pruned weights that the optimizer has just changed."""
        self._updated = True
        self.mask_state.zero_pruned(optimizer)
        if rules.needs_gradient(self.config, self.phase, self.applied_steps + 1):
            self.mask_state.copy_gradients(optimizer)

    def _enter(self, before: Phase | None, after: Phase) -> None:
        """Does to every entry what the boundary between two phases, or an update inside one, asks for."""
        with operation(f"the boundary at step {self.applied_steps}"):
            self._cross(before, after)
            if self._history is not None:
                self._history.record(self.applied_steps, after)

    def _cross(self, before: Phase | None, after: Phase) -> None:
        started = time.perf_counter()
        self._agree(f"the boundary at step {self.applied_steps}")
        updates = []
        for left, entered in rules.stages(self.config, before, after):
            updates += self._apply(left, entered)
            if self._exchange is not None and left is not None and entered is not after:
                self._combine(self._exchange, left.round)
        self._agree_on_masks()
        if before is not None and before is not after:
            if self.config.optimizer_state == "reset":
                _reset(self._backend.optimizer)
            if self.config.lr_restart:
                self._restart_lr()
        self.last_boundary_seconds = time.perf_counter() - started
        grown = sum(isinstance(update, rules.Grow) for update in updates)
        changed = sum(not isinstance(update, rules.Grow | rules.Keep) for update in updates)
        self._say(
            f"step {self.applied_steps}: {after}, density {self.density:.4f}, {changed} entries pruned, {grown} grown, "
            f"{self.last_boundary_seconds:.3f} s",
            logging.DEBUG if before is after else logging.INFO,
        )

    def _agree(self, place: str) -> None:
        """Before what cannot be taken back: all ranks are at the same place of the same run, with finite losses."""
        position = (self.applied_steps, self.signature, self.plan.fingerprint)
        consistency.check_position(self._world, *position, self._watch.take(), place)
        self._agree_on_masks()

    def _agree_on_masks(self) -> None:
        consistency.check_masks(
            self.plan, self.mask_state.bits, self.mask_state.shards, self._backend.comm, self._world
        )

    def _apply(self, before: Phase | None, after: Phase) -> list[rules.Update]:
        """Does to all entries what their rule says; what that was."""
        updates = {entry: self._rule(entry, before, after, self.applied_steps) for entry in self.plan.entries}
        self.mask_state.apply(updates, self.applied_steps)
        return list(updates.values())

    def _combine(self, exchange: Exchange, round_: int) -> None:
        """Takes every partition from its worker, and what is shared as all have agreed; this worker's own included."""
        shards = {shard.name: shard for shard in self._backend.shards()}
        buffers = dict(export.buffers(self._backend.module))
        items = items_of(self.plan, list(shards.values()), buffers)

        def receive(received: Received) -> None:
            if (shard := shards.get(received.name)) is None:
                buffers[received.name].copy_(received.value.view(buffers[received.name].shape))
                return
            if received.bits is not None:
                self.mask_state.replace(shard, received.bits)
            if shard.numel:
                shard.weight().copy_(received.value)

        exchange.combine(round_, items, self.mask_state.bits, receive)
        self._backend.publish()

    # -- learning rate ---------------------------------------------------------------------------------------------

    def _lr_state(self) -> Any:
        """The scheduler's state and the learning rates, before the first step."""
        if self._lr_scheduler is None:
            return None
        lrs = [group["lr"] for group in self._lr_groups()]
        return copy.deepcopy(self._lr_scheduler.state_dict()), lrs

    def _lr_groups(self) -> list[dict[str, Any]]:
        """The parameter groups that the scheduler sets; a wrapped optimizer (OSS) may copy them to its innermost."""
        groups: list[dict[str, Any]]
        groups = getattr(self._lr_scheduler, "optimizer", self._backend.optimizer).param_groups
        return groups

    def _restart_lr(self) -> None:
        assert self._lr_scheduler is not None
        state, lrs = self._first_lr
        self._lr_scheduler.load_state_dict(copy.deepcopy(state))
        for group, lr in zip(self._lr_groups(), lrs, strict=True):
            group["lr"] = lr

    # -- figures ---------------------------------------------------------------------------------------------------

    @property
    def density(self) -> float:
        """Density of all entries together in the next step, by their budgets (which every mask meets exactly)."""
        step = max(self.applied_steps, self.schedule.total_steps) if self._over else self.applied_steps
        return self.schedule.density_at(step, *self.plan.per_partition())

    def stats(self) -> dict[str, Any]:
        """Exact figures of the current masks, counted over all ranks; all ranks must call this.

        Returns:
            kept, numel: weights of the entries kept by the masks, and all; density: their ratio.
            model_sparsity: pruned weights relative to all weights of the model, embeddings and biases included.
            mask_bytes: memory of this rank's masks.
            entries: per entry name: kept, numel, partition, dense.
        """
        kept = self.mask_state.kept()
        rows = {
            e.name: {"kept": n, "numel": e.numel, "partition": e.partition, "dense": e.name not in self.mask_state.bits}
            for e, n in zip(self.plan.entries, kept, strict=True)
        }
        total = sum(kept)
        return {
            "applied_steps": self.applied_steps,
            "phase": self.phase.index,
            "kept": total,
            "numel": self.plan.numel,
            "density": total / self.plan.numel,
            "model_sparsity": (self.plan.numel - total) / self.plan.total,
            "mask_bytes": sum(bits.numel() for bits in self.mask_state.bits.values()),
            "entries": rows,
        }

    def mask(self, name: str) -> Tensor | None:
        """This rank's piece of an entry's mask as a bool tensor; None while the entry is dense."""
        bits = self.mask_state.bits.get(name)
        return None if bits is None else bitmask.unpack(bits, self.mask_state.shards[name].numel)

    # -- the end, and masks next to other checkpoints ---------------------------------------------------------------

    def finish(self) -> bool:
        """Ends the schedule now: what is dense is pruned as at the last boundary; whether there was any such entry.

        For a training that is stopped early. Training on has fixed masks. All ranks must call this. A worker of
        parallel GaP prunes its own partition alone, without an exchange: what the others have trained since the last
        round stays theirs.
        """
        dense = self._to_prune()
        if not dense:
            return False
        with operation(f"the end at step {self.applied_steps}"):
            self._agree(f"the end at step {self.applied_steps}")
            self.mask_state.apply(dense, self.applied_steps)
            self._agree_on_masks()
        self._over = True
        if self._history is not None:
            self._history.record(self.applied_steps, self.phase)
        self._say(f"step {self.applied_steps}: ended early, {len(dense)} entries pruned, density {self.density:.4f}")
        return True

    def _to_prune(self) -> dict[plan.Entry, rules.PruneByMagnitude]:
        """What still has to be pruned for the final model: the entries that are dense in this phase, in a ramp too."""
        dense = self.phase.dense
        return {
            e: rules.PruneByMagnitude(e.keep) for e in self.plan.entries if e.partition in dense and e.keep < e.numel
        }

    def save_masks(self, folder: str | Path) -> None:
        """Saves the masks and the place in the schedule alone, beside weights and optimizer that something else saves.

        All ranks must call this, between two updates. The folder is complete when it holds `state.json`.
        """
        folder = Path(folder)
        self._agree(f"the masks saved at step {self.applied_steps}")
        if self._world.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "state.json").unlink(missing_ok=True)
        self._world.barrier()
        raise_on_all_ranks(self._world, lambda: self._write_masks(folder))
        if self._world.rank == 0:
            checkpoint.write_json(folder / "state.json", self._state().model_dump())
        self._world.barrier()

    def load_masks(self, folder: str | Path) -> None:
        """Restores what `save_masks` saved; weights, optimizer and random state must come from the same moment.

        Raises:
            ValueError: the folder is not complete, is damaged, or belongs to another plan or schedule.
        """
        path = Path(folder)
        if not (path / "state.json").is_file():
            raise ValueError(
                f"{path}: holds no masks: its checkpoint was written without gap_ds, or the run was killed before it "
                "was complete. Use an earlier checkpoint."
            )
        state = read_json(path / "state.json", State)
        state.check(path, self._state())
        self._read_masks(path, state.applied_steps)()
        self._say(f"masks of {path} at step {self.applied_steps}: {self.phase}")

    # -- checkpoint and export -------------------------------------------------------------------------------------

    def save_checkpoint(
        self,
        folder: str | Path,
        tag: str | None = None,
        client_state: Any = None,
        *,
        portable: bool = False,
        keep: int | None = None,
    ) -> Path:
        """Saves everything that decides the next step to FOLDER/TAG; all ranks must call this, between two updates.

        Args:
            tag: name of the checkpoint; `step_N` if not given.
            client_state: what the caller wants back from `load_checkpoint`: anything that JSON can say.
            portable: also write what another number of ranks or another backend can go on from. With Adam these are 12
                further bytes for each weight of the model, spread over the ranks.
            keep: how many checkpoints to leave in the folder; older ones go once the new one is visible. None: all.
        Raises:
            ValueError: something could not be written, for example on a full disk. On all ranks alike; older
                checkpoints are as they were.
        """
        self._agree(f"the checkpoint at step {self.applied_steps}")

        def write(aside: Path) -> None:
            raise_on_all_ranks(self._world, lambda: self._backend.save(aside))
            self._updated = False  # to have any state to save, an optimizer before its first step is stepped with lr 0
            raise_on_all_ranks(self._world, lambda: self._write_masks(aside / "gap"))
            if portable:
                buffers = dict(export.buffers(self._backend.module))
                portable_files.write(aside / "gap", self._backend, buffers, self._world)
            raise_on_all_ranks(self._world, lambda: self._write_state(aside / "gap", client_state))

        with operation(f"the checkpoint at step {self.applied_steps}"):
            return checkpoint.save(Path(folder), tag or f"step_{self.applied_steps}", self._world, write, keep)

    def _write_masks(self, folder: Path) -> None:
        if self._backend.comm.writes:
            about = {
                "signature": self.signature,
                "applied_steps": str(self.applied_steps),
                "phase": str(self.phase.index),
                "gap_ds": __version__,
            }
            self.mask_state.write(folder, about)
            if self._history is not None:
                self._history.write(folder)

    def _write_state(self, folder: Path, client_state: Any) -> None:
        checkpoint.write_json(folder / f"rng_{self._world.rank}.json", RandomState.now().model_dump())
        if self._world.rank == 0:
            checkpoint.write_json(folder / "state.json", self._state(client_state).model_dump())

    def load_checkpoint(self, folder: str | Path, tag: str | None = None) -> Any:
        """Restores FOLDER/TAG; without a tag the newest that is whole. Returns the caller's `client_state`.

        Every file is compared with its checksum before anything is changed; damaged checkpoints that are passed over
        are named in a warning. With the backend and the number of ranks that saved it, and the same data, the run goes
        on bit for bit as if it had never stopped. With others it goes on from the same weights, masks and optimizer
        state, if it was saved with `portable=True`. All ranks must call this.

        Raises:
            ValueError: there is no whole checkpoint, FOLDER/TAG is damaged, it belongs to another plan or schedule, or
                it is not portable and would have to be.
        """
        with operation("the loading of a checkpoint"):
            path = checkpoint.find_whole(Path(folder), tag, self._world)
            return self._restore(path)

    def _restore(self, path: Path) -> Any:
        # Everything is read and checked before anything is changed.
        state = read_json(path / "gap" / "state.json", State)
        state.check(path, self._state())
        take_masks = self._read_masks(path / "gap", state.applied_steps)
        same_ranks = state.ranks == self._world.size
        random = read_json(path / "gap" / f"rng_{self._world.rank}.json", RandomState) if same_ranks else None
        self._restore_weights(path, state)
        take_masks()
        if state.lr_scheduler is not None and self._lr_scheduler is not None:
            self._lr_scheduler.load_state_dict(state.lr_scheduler)
        if state.grad_scaler is not None and self._grad_scaler is not None:
            self._grad_scaler.load_state_dict(state.grad_scaler)
        if random is not None:
            random.restore()
        else:
            warnings.warn(f"saved by {state.ranks} ranks: the random state is not restored", stacklevel=2)
        self._world.barrier()  # a rank that could not restore its part has left: nobody goes on without it
        self._say(f"resumed {path} at step {self.applied_steps}: {self.phase}")
        return state.client_state

    def _read_masks(self, folder: Path, step: int) -> Callable[[], None]:
        """Reads the masks before a step from a folder; what is returned goes on with them."""
        phase = self.schedule.phase_at(step)
        sparse = {entry.name for entry in self.plan.entries if phase.is_masked(entry.partition, step)}
        pieces = self.mask_state.read(folder, sparse)
        recorded = self._history.read(folder) if self._history is not None else None

        def go_on() -> None:
            self.mask_state.restore(*pieces)
            self.applied_steps, self._updated, self._over = step, False, False
            if self._exchange is not None:
                self._start = None
                self._exchange.rejoin()
            if self._history is not None:
                self._history.restore(recorded, step, phase)

        return go_on

    def _restore_weights(self, path: Path, state: State) -> None:
        """Weights and optimizer state: from the library's own files if it can read them, else from portable ones."""
        backend = self._backend
        was, now = (f"{n} on {r} ranks" for n, r in [(state.backend, state.ranks), (backend.name, self._world.size)])
        if was != now and portable_files.exists(path / "gap"):
            portable_files.read(path / "gap", backend, dict(export.buffers(backend.module)), self._world)
            backend.publish()
            backend.recount(state.applied_steps, state.counters)
            return
        if was != now and not (backend.reshards and state.backend == backend.name):
            raise ValueError(
                f"{path}: was saved by {was}, and this is {now}: that takes a checkpoint saved with portable=True. "
                f"Go on with {was}, and save such a one there."
            )
        try:
            backend.load(path)
        except Exception as error:  # each library has errors of its own for a damaged, missing or foreign file
            raise ValueError(
                f"{path}: {now} cannot restore what {was} saved ({summarize_error(error)}). Use an earlier "
                "checkpoint, or the backend and the number of ranks that saved this one."
            ) from error

    def _state(self, client_state: Any = None) -> State:
        return State(
            applied_steps=self.applied_steps,
            signature=self.signature,
            plan=self.plan.fingerprint,
            entries=[(e.name, list(e.shape), e.partition, e.keep, list(e.dims)) for e in self.plan.entries],
            worker=None if self.worker is None else self.worker.index,
            first_steps=[phase.first_step for phase in self.schedule.phases],
            ranks=self._world.size,
            backend=self._backend.name,
            lr_scheduler=None if self._lr_scheduler is None else _plain(self._lr_scheduler.state_dict()),
            grad_scaler=None if self._grad_scaler is None else self._grad_scaler.state_dict(),
            counters=self._backend.counters(),
            manifest=True,
            client_state=client_state,
        )

    def export(
        self, folder: str | Path, *, tokenizer: Any = None, dtype: torch.dtype = torch.float32, overwrite: bool = False
    ) -> Path:
        """Writes the final sparse model; a partition that is dense now is pruned in the copy, the run is not disturbed.

        A Hugging Face model becomes a folder for `from_pretrained`, with the tokenizer if given; any other model
        becomes `model.safetensors`. Parameters have `dtype`, buffers their own. `gap.json` holds the signature and
        exact counts. All ranks must call this.

        Args:
            overwrite: replace an exported model that the folder holds; anything else is never replaced.
        Raises:
            ValueError: the folder holds something already and `overwrite` is not set, or it is no exported model; or
                something could not be written. On all ranks alike; what was there is as it was.
        """
        folder = export.place(folder)

        def gather() -> dict[str, Tensor]:
            bits = {**self.mask_state.bits, **self.mask_state.select(self._to_prune(), self.applied_steps)}
            if not self._backend.comm.writes:
                return {}
            shards, comm = self._backend.shards(), self._backend.comm
            return export.full_weights(self._backend.module, shards, bits, comm, dtype)

        def about(weights: Mapping[str, Tensor]) -> dict[str, Any]:
            nonzero = {entry.name: int(weights[entry.name].count_nonzero()) for entry in self.plan.entries}
            info = export.info(self.plan, self.schedule, self.signature, self.applied_steps, nonzero)
            return {**info, "training_flops": self.plan.training_flops(info["mean_density"])}

        with operation(f"the export at step {self.applied_steps}"):
            export.save(
                folder,
                self._backend.module,
                gather,
                about,
                self._world,
                tokenizer=tokenizer,
                dtype=dtype,
                overwrite=overwrite,
            )
        return folder

    # -- the rest --------------------------------------------------------------------------------------------------

    def _say(self, message: str, level: int = logging.INFO) -> None:
        if self._world.rank == 0:
            log.log(level, message)

    def close(self) -> None:
        """Takes the hook off the optimizer; the model keeps its present weights."""
        if self._history is not None:
            self._history.flush()
        self._hook.remove()

    def __getattr__(self, name: str) -> Any:
        # Only reached for what the engine itself does not have.
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._backend.forward, name)


def _check_worker(config: GaPConfig, worker: ParallelWorker | None) -> ParallelWorker | None:
    if config.method == "parallel" and worker is None:
        raise ValueError(
            'method="parallel": every worker is a job of its own and must know its number and where to meet the '
            "others. Start them by gap-ds parallel, or pass worker=ParallelWorker(index, exchange)."
        )
    if config.method != "parallel" and worker is not None:
        raise ValueError(f'worker {worker.index}: has no effect with method="{config.method}". Set "method".')
    started = os.environ.get("GAP_DS_WORKERS")  # set by gap-ds parallel
    if worker is not None and started and started != str(config.kappa):
        raise ValueError(
            f"GAP_DS_WORKERS={started}: as many workers were started, and there are {config.kappa} partitions, one for "
            f'each worker. Start {config.kappa} (gap-ds parallel --workers {config.kappa}), or change "partitions".'
        )
    return worker


def _reset(optimizer: torch.optim.Optimizer) -> None:
    """Clears all optimizer state, step counts included, as if training had just begun."""
    for state in optimizer.state.values():
        for key, value in state.items():
            if isinstance(value, Tensor):
                value.zero_()
            elif isinstance(value, int | float):
                state[key] = 0
    for group in optimizer.param_groups:
        if "step" in group:  # DeepSpeed's fused optimizers count here
            group["step"] = 0


def _plain(state: dict[str, Any]) -> dict[str, Any]:
    """A scheduler's state without what JSON cannot say and `load_state_dict` does not need (functions of lr)."""
    return {key: value for key, value in state.items() if not callable(value)}
