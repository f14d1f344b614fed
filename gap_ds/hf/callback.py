"""`GaPCallback`: a Trainer's model trained sparse.

It builds a GaPEngine around what Accelerate has prepared, so that DDP, DeepSpeed and FSDP are one case. What all of it
rests on is the order of the Trainer's step (transformers 5.23, `Trainer._run_epoch`):

    backward; clip; optimizer.step() -> our post-step hook; learning rate; zero_grad; on_step_end -> a boundary, if one
    is due; log; evaluate; save -> on_save: the masks, into the checkpoint's own folder

Under DeepSpeed the optimizer has stepped already at the end of Accelerate's `backward`; the hook does not mind.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from gap_ds.hf.wrapped import FOLDER, innermost, refuse
from gap_ds.method.config import GaPConfig
from gap_ds.sharding.meanings import Meaning
from gap_ds.training import history, saving
from gap_ds.training.engine import GaPEngine

log = logging.getLogger("gap_ds")

#: Steps of a Trainer without a step of its optimizer, after which it is clear that there will be none.
_MOST_IDLE = 3


class GaPCallback(TrainerCallback):  # type: ignore[misc]
    """Trains the Trainer's model sparse: `Trainer(..., callbacks=[GaPCallback("gap.json")])` is all of it.

    For Trainer, Seq2SeqTrainer and what derives from them, on one process, DDP, DeepSpeed ZeRO, FSDP1 and FSDP2. Epochs
    are those of the Trainer. Its checkpoints carry the masks, and `resume_from_checkpoint` goes on bit for bit. Its
    training logs get `gap/phase`, `gap/density` (both of the next step) and `gap/partition`: the number of the dense
    partition, -1 if none is dense, the number of partitions if all of several are.

    After `train()` the model is exactly sparse, and `save_model` writes it as it is. `engine` is the GaPEngine of the
    last training: its `stats()`, `mask(name)` and `export(folder)` can be used until the next.

    Args:
        config: a GaPConfig, a dict, or the path of a JSON or YAML file.
        prune_at_end: whether a training that ends before its schedule does (early stopping, or a best model of an
            earlier phase) prunes what is dense then. Without it such a model is left as it is, with a warning.
        history: whether to record in OUTPUT_DIR/gap_history.jsonl what every boundary does to the masks, for
            `gap-ds report`; costs up to a bit for each weight of the entries.
        fresh: begin the schedule anew in a second `train()`, which goes on with the optimizer of the first; without
            it that is refused.
        optimizer_state: what state of the Trainer's optimizer means that gap_ds does not know, as in GaPEngine.
    Raises:
        ValueError: a mistake in the config; when training begins: a combination that is not supported, a schedule
            longer than the training, or a checkpoint without masks; at a boundary or a checkpoint: a loss before it
            was NaN or infinite.
    """

    def __init__(
        self,
        config: GaPConfig | dict[str, Any] | str | Path,
        *,
        prune_at_end: bool = True,
        history: bool = True,
        fresh: bool = False,
        optimizer_state: Mapping[str, Meaning] | None = None,
    ) -> None:
        self.config = GaPConfig.load(config)
        self.prune_at_end = prune_at_end
        self.history = history
        self.fresh = fresh
        self.optimizer_state = optimizer_state
        self.engine: GaPEngine | None = None
        #: Steps of the Trainer in a row in which no optimizer step was seen.
        self._idle = 0
        self._watched: tuple[Trainer, Callable[..., Tensor]] | None = None
        refuse(self.config)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        trainer, checkpoint = _caller(self)
        self._release()  # of a training before, or of an attempt with another batch size
        if state.is_hyper_param_search and _text(args.save_strategy) != "no":
            raise ValueError(
                f"save_strategy={_text(args.save_strategy)}: checkpoints of a hyperparameter search lie in folders "
                'that a callback does not learn. Set save_strategy to "no".'
            )
        self.engine = GaPEngine(
            trainer.model_wrapped,
            self.config,
            optimizer=innermost(trainer.model_wrapped, trainer.optimizer),
            steps_per_epoch=_steps_per_epoch(self.config, args, trainer.callback_handler.train_dataloader),
            masks_from=None if checkpoint is None else Path(checkpoint, FOLDER),
            history=Path(args.output_dir, history.NAME) if self.history else None,
            fresh=self.fresh,
            # Its steps are the Trainer's. The engine learns that some of them are left out.
            grad_scaler=getattr(trainer.accelerator, "scaler", None),
            optimizer_state=self.optimizer_state,
        )
        if self.history or _text(args.save_strategy) != "no":
            saving.require_shared(self.engine.run, Path(args.output_dir))
        self._check_length(self.engine, args, state)
        self._watch(trainer, self.engine)
        self._describe_saved(trainer, self.engine)
        # First of all callbacks: what the others see and report in a step is then the state after its boundary.
        handler = trainer.callback_handler
        handler.callbacks = [self, *(callback for callback in handler.callbacks if callback is not self)]

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        assert self.engine is not None
        before = self.engine.phase
        self._idle = 0 if self.engine.after_step() or self.engine.run.backend.skips_overflow else self._idle + 1
        if self._idle >= _MOST_IDLE:
            raise ValueError(
                f"the Trainer has made {self._idle} steps, but no step of optim={_text(args.optim)} was seen, so masks "
                "are not applied: it updates the weights without its step(), as optimizers do that step inside the "
                "backward pass. Use another one."
            )
        if self.engine.phase is not before and _text(args.logging_strategy) != "no":
            control.should_log = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        # Logs of evaluations are left alone: `evaluate` returns them.
        if self.engine is None or "loss" not in logs:
            return
        figures = _figures(self.engine)
        logs.update(figures)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(figures)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        assert self.engine is not None
        self.engine.save_masks(Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}", FOLDER))

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        assert self.engine is not None
        engine, what = self.engine, "the training"
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            # The Trainer has just put that checkpoint's weights in the place of the last ones.
            what = f"the best model ({state.best_model_checkpoint})"
            if not state.best_model_checkpoint.endswith(f"-{state.global_step}"):  # else it is the last model
                _check_best(engine, Path(state.best_model_checkpoint))
            engine.load_masks(Path(state.best_model_checkpoint, FOLDER))
        phase = engine.phase
        if phase.dense and self.config.record.prunes:
            density = engine.density
            if self.prune_at_end:
                engine.finish()
                done = f"it was pruned to {engine.density:.4f} now, without fine-tuning"
            else:
                done = "it is left so (prune_at_end=False)"
            if state.is_world_process_zero:
                log.warning(f"{what} ended at step {engine.applied_steps} in {phase}, density {density:.4f}: {done}")
        engine.check_weights()
        self._release()

    def _watch(self, trainer: Trainer, engine: GaPEngine) -> None:
        """Lets the engine see every micro-batch's loss, which a Trainer does not show to its callbacks.

        What the Trainer logs will not do: it puts the running mean in the place of a loss that is not finite.
        """
        training_step = trainer.training_step

        def watched(*args: Any, **kwargs: Any) -> Tensor:
            loss: Tensor = training_step(*args, **kwargs)
            engine.watch(loss)
            return loss

        self._watched = trainer, training_step
        trainer.training_step = watched

    def _describe_saved(self, trainer: Trainer, engine: GaPEngine) -> None:
        """Lets `save_model` write a gap.json beside the model; a Trainer tells its callbacks of checkpoints alone."""
        save_model = type(trainer).save_model

        def save(output_dir: str | None = None, _internal_call: bool = False) -> None:
            save_model(trainer, output_dir, _internal_call)
            if _internal_call or not trainer.is_world_process_zero():
                return
            try:
                engine.describe(trainer.args.output_dir if output_dir is None else output_dir)
            except ValueError as error:
                log.warning(f"no gap.json was written. {error}")

        trainer.save_model = save

    def _release(self) -> None:
        """Takes the hooks off the optimizer and the Trainer."""
        if self.engine is not None:
            self.engine.close()
        if self._watched is not None:
            trainer, training_step = self._watched
            trainer.training_step = training_step
            self._watched = None

    def _check_length(self, engine: GaPEngine, args: Any, state: Any) -> None:
        schedule = engine.schedule
        if schedule.total_steps > state.max_steps:
            given = f"max_steps={args.max_steps}" if args.max_steps > 0 else f"num_train_epochs={args.num_train_epochs}"
            raise ValueError(
                f"{given}: the training has {state.max_steps} steps and the schedule {schedule.total_steps}, so it "
                "would end before the model is sparse and fine-tuned. Train longer, or shorten the schedule in the "
                "GaP config."
            )
        last, some_dense = schedule.phases[-1].first_step, any(phase.dense for phase in schedule.phases[:-1])
        if args.load_best_model_at_end and some_dense and self.config.record.prunes and state.global_step == 0:
            by_steps = _text(args.eval_strategy) == "steps"
            wanted = last if by_steps else math.ceil(last * state.num_train_epochs / max(state.max_steps, 1))
            if (args.eval_delay or 0) < wanted and state.is_world_process_zero:
                log.warning(
                    "load_best_model_at_end: models of all phases are compared, also those with a dense partition, and "
                    f"the best one may be none of the fine-tuning. Set eval_delay={wanted} to compare sparse ones only."
                )


def _check_best(engine: GaPEngine, folder: Path) -> None:
    """Checks that the Trainer could load the best model: it passes over weights that were saved under other names.

    The last model's weights would be taken for the best one's; where few masks have changed, these show nothing.
    """
    if any(file for kind in ("global_step*", "pytorch_model_fsdp*") for file in folder.glob(kind)):
        return  # DeepSpeed's and FSDP's own files, which are read instead
    names: set[str] = set()
    for file in folder.glob("model*.safetensors"):
        with safe_open(file, "pt") as saved:
            names.update(saved.keys())
    if names and (missing := [name for name in engine.plan.parameters() if name not in names]):
        raise ValueError(
            f"{folder}: its weights of {missing[0]} and {len(missing) - 1} other entries were saved under other names, "
            "as transformers does with some models (mixtures of experts, ViT), and the Trainer loads the best model "
            "without them. Set load_best_model_at_end=False, and load that checkpoint by from_pretrained."
        )


def _caller(callback: GaPCallback) -> tuple[Any, str | None]:
    """The Trainer that is calling a callback, and the checkpoint that it has resumed from.

    A Trainer hands its callbacks the model before it was wrapped, and neither the DeepSpeed engine nor the checkpoint.
    It is on the stack, though: both are read from the frame of its training loop.
    """
    frame = inspect.currentframe()
    while frame is not None:
        found, names = frame.f_locals.get("self"), frame.f_locals
        calls = isinstance(found, Trainer) and any(other is callback for other in found.callback_handler.callbacks)
        if calls and "resume_from_checkpoint" in names:
            return found, names["resume_from_checkpoint"]
        frame = frame.f_back
    raise ValueError("GaPCallback: on_train_begin was not called by the train() of a transformers.Trainer that has it.")


def _text(strategy: Any) -> str:
    """The name of a strategy that is an enum or a text."""
    return str(getattr(strategy, "value", strategy))


def _steps_per_epoch(config: GaPConfig, args: Any, loader: Any) -> int | None:
    """Optimizer steps in an epoch as the Trainer counts them; the last one may have fewer micro-batches."""
    if not config.in_epochs:
        return None
    try:
        batches: int = len(loader)
    except TypeError:
        raise ValueError(
            "the training data has no length, so that an epoch has no number of steps. Set the times of the GaP config "
            'in steps: "phase_steps", "finetune_steps".'
        ) from None
    per_step: int = args.gradient_accumulation_steps
    return max(1, math.ceil(batches / per_step))


def _figures(engine: GaPEngine) -> dict[str, float]:
    """Figures for the Trainer's log, all of them numbers: a plot has no room for a set of partitions."""
    dense, partitions = sorted(engine.phase.dense), engine.config.kappa
    if not engine.config.record.prunes or len(dense) > 1:
        partition = partitions
    else:
        partition = dense[0] if dense else -1
    return {"gap/phase": engine.phase.index, "gap/density": engine.density, "gap/partition": partition}
