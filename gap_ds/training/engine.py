"""`GaPEngine` joins what is kept (schedule, budgets, selection) with where it lies (backend), in one place.

A step: forward, backward, reduce, clip -> the innermost optimizer updates the fp32 pieces -> our post-step hook zeroes
their pruned weights -> the library copies them to bf16 and spreads them, zeros included -> `step()` counts the update
and asks the schedule. At a boundary: select over shards, set bits, zero weights, clear the moments of grown weights,
publish, log one line.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gap_ds.masks import bitmask
from gap_ds.method.config import GaPConfig
from gap_ds.method.schedule import Phase
from gap_ds.parallel import ParallelWorker
from gap_ds.sharding.backends import Training
from gap_ds.sharding.comm import Comm, ProcessGroup, operation
from gap_ds.sharding.meanings import Meaning
from gap_ds.training import boundary, copies, saving
from gap_ds.training.build import Options, build
from gap_ds.training.initialize import initialize
from gap_ds.training.run import Place
from gap_ds.training.updates import Updates


class GaPEngine:
    """Trains a model sparse by grow-and-prune, inside the sharding engine that it already has.

    Use it like DeepSpeed's engine, with any backend::

        engine = GaPEngine(model_or_deepspeed_engine, "cyclic_80", optimizer=optimizer, batches_per_epoch=len(loader))
        for batch in loader:
            loss = engine(**batch).loss
            engine.backward(loss)
            engine.step()

    After every applied step the pruned weights are exactly 0, in the fp32 weights and in the working copies, on every
    rank. Gradients are not masked: the clipping norm is that of the dense gradient. Other attributes are forwarded to
    the wrapped model or DeepSpeed engine.

    Args:
        model: a DeepSpeed engine, a DistributedDataParallel or FSDP module, or a plain model, on its device.
        config: a GaPConfig, a dict, the path of a JSON or YAML file, or the name of a shipped config.
        optimizer: the optimizer, already built over the model's parameters, or a list of several, such as Muon for
            matrices and AdamW for the rest: an update is complete when all have stepped. Not for a DeepSpeed engine.
        lr_scheduler: one or a list, stepped once per applied step; one that needs a metric (ReduceLROnPlateau) is only
            saved and restored, and you step it. With `lr_restart` it starts again in every phase, so it should cover
            one phase.
        steps_per_epoch, batches_per_epoch: updates in an epoch, or micro-batches, len(loader); one of them is required
            if the config counts in epochs. A loop that accumulates gradients by itself passes steps_per_epoch.
        nonfinite_loss: what to do about a loss that is NaN or infinite. `stop`: raise before the next boundary or
            checkpoint makes it permanent; free, and off under loss scaling, which skips such steps. `skip`: leave its
            micro-batch out on all ranks; costs a small all-reduce in every micro-batch.
        worker: with `method: parallel`, the number of this job and where it meets the others.
        masks_from: a folder that `save_masks` wrote: the run goes on from there. Weights and optimizer must already be
            restored, by whatever else saved them.
        history: file that records what every boundary does to the masks, for `gap-ds report`. Costs up to a further
            bit per weight of the entries.
        gradient_accumulation_steps, gradient_clipping, grad_scaler: as in DeepSpeed, for other models: `step()`
            updates at every n-th call; norm to clip at (0: off); a torch.amp.GradScaler.
        optimizer_state: what state of an optimizer means that gap_ds does not know, by its name: "moment" (one value
            per weight, first 0), "sequence" (another sequence of the weights), "other".
        fresh: begin a new schedule although the optimizer has stepped.
        group: the ranks that train this model, where others train another one: a stage of a pipeline, one of two
            models. By default all ranks of the job.
        whole: where the model is one stage of a pipeline, the whole one, which may be on the meta device and has the
            same names: partitions and budgets are then its own.
    Raises:
        ValueError: a mistake in the config, or a combination that is not supported; the message names the setting.
    """

    def __init__(
        self,
        model: nn.Module,
        config: GaPConfig | dict[str, Any] | str | Path,
        *,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
        lr_scheduler: Any = None,
        steps_per_epoch: int | None = None,
        batches_per_epoch: int | None = None,
        worker: ParallelWorker | None = None,
        nonfinite_loss: Literal["stop", "skip"] = "stop",
        masks_from: str | Path | None = None,
        history: str | Path | None = None,
        gradient_accumulation_steps: int = 1,
        gradient_clipping: float = 0.0,
        grad_scaler: Any = None,
        optimizer_state: Mapping[str, Meaning] | None = None,
        fresh: bool = False,
        group: ProcessGroup | None = None,
        whole: nn.Module | None = None,
    ) -> None:
        loop = (optimizer, lr_scheduler, gradient_accumulation_steps, gradient_clipping, grad_scaler, optimizer_state)
        training = Training(*loop, world=Comm(group))
        options = Options(steps_per_epoch, batches_per_epoch, worker, nonfinite_loss, masks_from, history, fresh, whole)
        self.run = build(model, config, training, options)
        self.config, self.schedule, self.plan = self.run.config, self.run.schedule, self.run.plan
        self.worker, self.mask_state = worker, self.run.mask_state
        self._place, self.last_boundary_seconds = Place(), 0.0
        #: The step of a boundary that has begun and is not over, as when it ended in an error.
        self._crossing: int | None = None
        self.closed = False  #: True once `close` has taken the hooks off: masks are no longer applied.
        self._updates = Updates(self.run, lambda: self._place)
        self.run.say(f"{self.signature}\n{self.plan.summary()}")
        try:
            self._enter(None, self.phase) if masks_from is None else self.load_masks(masks_from)
        except BaseException:
            self._updates.close()  # another engine may hook the optimizers
            raise

    @classmethod
    def initialize(cls, *, model: nn.Module, config: Any, gap_config: Any, **arguments: Any) -> GaPEngine:
        """Like `deepspeed.initialize`; gets its arguments and those of GaPEngine."""
        return initialize(cls, model=model, config=config, gap_config=gap_config, **arguments)

    # -- training --------------------------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped model's forward pass."""
        return self.run.backend.forward(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        """Backward pass of one micro-batch. `loss` is its mean, whatever the number of accumulated micro-batches."""
        if self._accepts(loss):
            self.run.backend.backward(loss)

    def watch(self, loss: Tensor) -> None:
        """Checks a loss that something else propagates, with nonfinite_loss="stop", as `backward` does."""
        self._accepts(loss)

    def _accepts(self, loss: Tensor) -> bool:
        """True if a micro-batch's loss may be propagated; the observers see those alone."""
        if accepted := self.run.guard.accepts(loss, self.applied_steps):
            for observer in self.run.observers:
                observer.loss_seen(loss)
        return accepted

    def step(self) -> None:
        """Ends a micro-batch. If that completes an update: optimizer step, masks, and at a boundary prune and grow."""
        self._require_whole()
        if self.run.guard.skipping:
            return
        self.run.backend.step()
        self.after_step()

    def after_step(self) -> bool:
        """Counts the update that the optimizer has applied since the last call, if any, and crosses a boundary.

        `step` calls this. Call it yourself only where something else steps the optimizer. Returns whether there was an
        update: micro-batches that only accumulate, and steps skipped for an fp16 overflow, are none.
        """
        self._require_whole()
        if not self._updates.complete():
            return False
        for observer in self.run.observers:
            observer.before_first_update()
            observer.update_applied()
        before, self._place = self._place, self._place.after_update()
        if before.changes_masks(self.schedule):
            self._enter(before.phase(self.schedule), self.phase)
        return True

    @property
    def applied_steps(self) -> int:
        """Updates applied so far, over all resumed runs."""
        return self._place.step

    @property
    def phase(self) -> Phase:
        """The phase that the next step belongs to."""
        return self._place.phase(self.schedule)

    @property
    def module(self) -> nn.Module:
        """The model inside all wrappers."""
        return self.run.backend.module

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The innermost optimizer, of several the first; `param_groups[0]["lr"]` is its next learning rate."""
        first: torch.optim.Optimizer = self.run.backend.optimizers[0]
        return first

    @property
    def finished(self) -> bool:
        """True once the whole schedule has been trained. Training on stays in the last phase."""
        return self._place.over or self.applied_steps >= self.schedule.total_steps

    @property
    def signature(self) -> str:
        """One line with every setting of the method that changes a result."""
        return self.run.signature

    # -- boundaries ------------------------------------------------------------------------------------------------

    def _enter(self, before: Phase | None, after: Phase) -> None:
        """Crosses the boundary between two phases, or does an update inside one (`before is after`)."""
        started = time.perf_counter()
        self._crossing = self.applied_steps
        done = boundary.cross(self.run, before, after, self.applied_steps)
        self._crossing = None
        self._updates.watch()
        self.last_boundary_seconds = seconds = time.perf_counter() - started
        self.run.say(
            f"step {self.applied_steps}: {after}, density {self.density:.4f}, {done}, {seconds:.3f} s",
            logging.DEBUG if before is after else logging.INFO,
        )

    def _require_whole(self) -> None:
        """Raises ValueError after a boundary that ended in an error: masks are not those that the schedule has."""
        if self._crossing is not None:
            raise ValueError(
                f"the boundary at step {self._crossing} ended in an error, so the masks are not those of the schedule, "
                "and nothing can be trained or saved from them. Call load_checkpoint, or start again from a checkpoint."
            )

    def finish(self) -> bool:
        """Ends the schedule now: prunes what is dense, as the last boundary would. Returns True if anything was dense.

        For a training that stops early. Training on keeps the masks fixed. All ranks must call this. A worker of
        parallel GaP prunes only its own partition, without an exchange: what the others have trained since the last
        round stays with them.
        """
        self._require_whole()
        pruned = boundary.finish(self.run, self.phase, self.applied_steps)
        self._place = Place(self.applied_steps, ended=self.applied_steps)
        if pruned:
            self._updates.watch()
            for observer in self.run.observers:
                observer.masks_changed(self.applied_steps, self.phase)
            self.run.say(f"step {self.applied_steps}: ended early, {pruned} entries pruned, density {self.density:.4f}")
        return pruned > 0

    # -- figures ---------------------------------------------------------------------------------------------------

    @property
    def density(self) -> float:
        """Density of all entries together in the next step, by their budgets, which every mask meets exactly.

        Where they change step by step, it is without the rounding of each to whole weights, groups or blocks; `stats`
        counts what is kept.
        """
        return self.schedule.density_at(self._place.schedule_step(self.schedule), *self.plan.per_partition())

    def stats(self) -> dict[str, Any]:
        """Exact figures of the current masks, which the weights were compared with; all ranks must call this.

        Returns:
            kept, numel: weights of the entries kept by the masks, and all; density: their ratio.
            model_sparsity: pruned weights relative to all weights of the model, embeddings and biases included.
            mask_bytes, optimizer_bytes, last_value_bytes: memory of this rank's masks, of its optimizers' state, and of
                the values that pruned weights had (`regrow: last_value`).
            entries: per entry name: kept, numel, partition, dense.
            zeros_checked_at: the applied step at which every pruned weight was last seen to be 0: now.
        """
        self.check_weights()
        place = {"applied_steps": self.applied_steps, "phase": self.phase.index, "zeros_checked_at": self.applied_steps}
        return place | self.mask_state.stats()

    def check_weights(self) -> None:
        """Checks that every pruned weight is exactly 0, in all copies that weights can come back from.

        Boundaries, checkpoints, exports and `finish` do so themselves. All ranks must call this.

        Raises:
            ValueError: on all ranks, with the first entry where that is not so, and likely causes.
        """
        self.run.agree_on_weights(f"at step {self.applied_steps}")

    def apply_to(self, module: nn.Module) -> None:
        """Puts the masks on a copy of the model, such as a moving average, sharded as the model is, or whole.

        Call it after the copy was updated and before it is evaluated or saved. All ranks must call this.

        Raises:
            ValueError: the copy lacks an entry, or has it in another shape.
        """
        copies.apply(self.run, module)

    def mask(self, name: str) -> Tensor | None:
        """This rank's piece of an entry's mask as a bool tensor; None while the entry is dense."""
        bits = self.mask_state.bits.get(name)
        return None if bits is None else bitmask.unpack(bits, self.mask_state.shards[name].numel)

    # -- files -----------------------------------------------------------------------------------------------------

    def save_masks(self, folder: str | Path) -> None:
        """Saves only the masks and the place in the schedule; all ranks must call this, between two updates."""
        self._require_whole()
        saving.save_masks(self.run, Path(folder), self._place)

    def load_masks(self, folder: str | Path) -> None:
        """Restores what `save_masks` saved; weights, optimizer and random state must come from the same moment.

        Raises:
            ValueError: the folder is not complete, is damaged, or belongs to another plan or schedule.
        """
        self._go_on(saving.load_masks(self.run, Path(folder)), f"masks of {folder}")

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
            tag: name of the checkpoint; `step_N` by default.
            client_state: anything that JSON can hold; `load_checkpoint` returns it.
            portable: also write what another number of ranks or another backend can go on from. With Adam these are 12
                further bytes per weight of the model, spread over the ranks.
            keep: how many checkpoints to leave in the folder; older ones go once the new one is visible. None: all.
        Raises:
            ValueError: something could not be written, for example on a full disk. On all ranks alike; older
                checkpoints are as they were.
        """
        self._require_whole()
        tag = tag or f"step_{self.applied_steps}"
        if self._updates.open:
            self.run.say(
                f"{tag}: is saved in the middle of an update, and no checkpoint holds gradients: a resumed run begins "
                "that update again, with other micro-batches. Save after the step that completes it.",
                logging.WARNING,
            )
        with operation(f"the checkpoint at step {self.applied_steps}"):
            return saving.save_checkpoint(self.run, Path(folder), tag, self._place, client_state, portable, keep)

    def load_checkpoint(self, folder: str | Path, tag: str | None = None) -> Any:
        """Restores FOLDER/TAG, or without a tag the newest whole checkpoint; returns the caller's `client_state`.

        Every file is compared with its checksum before anything is changed; a warning names damaged checkpoints that
        are passed over. With the backend and the number of ranks that saved it, and the same data, the run goes on bit
        for bit as if it had never stopped. With others it goes on from the same weights, masks and optimizer state, if
        it was saved with `portable=True`. All ranks must call this.

        Raises:
            ValueError: there is no whole checkpoint, FOLDER/TAG is damaged, it belongs to another plan or schedule, or
                it is not portable and would have to be.
        """
        with operation("the loading of a checkpoint"):
            place, client_state, path = saving.load_checkpoint(self.run, Path(folder), tag)
        self._go_on(place, f"resumed {path}")
        return client_state

    def _go_on(self, place: Place, what: str) -> None:
        self._place, self._crossing = place, None
        self._updates.forget()
        self.run.say(f"{what} at step {place.step}: {self.phase}")

    def export(
        self, folder: str | Path, *, tokenizer: Any = None, dtype: torch.dtype = torch.float32, overwrite: bool = False
    ) -> Path:
        """Writes the final sparse model. A partition that is dense now is pruned in the copy; the run is not disturbed.

        A Hugging Face model becomes a folder for `from_pretrained`, with the tokenizer if given; any other model
        becomes `model.safetensors`. Parameters have `dtype`, buffers keep theirs. `gap.json` holds the signature and
        exact counts. All ranks must call this.

        Args:
            overwrite: replace an exported model that the folder holds; anything else is never replaced.
        Raises:
            ValueError: the folder holds something already and `overwrite` is not set, or it is no exported model; or
                something could not be written. On all ranks alike; what was there is as it was.
        """
        self._require_whole()
        with operation(f"the export at step {self.applied_steps}"):
            return saving.export(self.run, Path(folder), self._place, tokenizer, dtype, overwrite)

    def describe(self, folder: str | Path) -> None:
        """Writes gap.json beside weights that something else saved, so that gap-ds inspects, reports and exports them.

        For `model.save_pretrained` and the like, on the model as it is now. Rank 0 counts the weights in the files; the
        other ranks do nothing, and none waits.

        Raises:
            ValueError: a partition is dense now, or the files hold other weights or names; nothing was written.
        """
        self._require_whole()
        saving.describe(self.run, Path(folder), self._place)

    def close(self) -> None:
        """Takes the hook off the optimizer; the model keeps its present weights."""
        for observer in self.run.observers:
            observer.close()
        self._updates.close()
        self.closed = True

    def __getattr__(self, name: str) -> Any:
        # Only reached for names that the engine itself does not have.
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.run.backend.forward, name)
