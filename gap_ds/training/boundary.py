"""Boundaries between two phases: select, mask, exchange, reset, restart. All ranks call each function together."""

from __future__ import annotations

from collections import Counter

from gap_ds.method import rules
from gap_ds.method.schedule import Phase
from gap_ds.sharding.comm import operation
from gap_ds.training.run import Run


def cross(run: Run, before: Phase | None, after: Phase, step: int) -> str:
    """Crosses the boundary between two phases before a step, or does an update inside one (`before is after`).

    Returns:
        what happened to how many entries, in words.
    Raises:
        ValueError: ranks disagree on the place, the plan or a mask, or a loss was not finite.
    """
    place = f"the boundary at step {step}"
    with operation(place):
        run.agree(step, place)
        updates: list[rules.Update] = []
        for left, entered in rules.stages(run.config, before, after):
            of_stage = {entry: run.rule(entry, left, entered, step) for entry in run.plan.entries}
            run.mask_state.apply(of_stage, step)
            updates += of_stage.values()
            if left is not None and entered is not after:
                for observer in run.observers:
                    observer.round_pruned(left.round, entered, step)
        run.mask_state.forget_gradients()
        run.agree_on_masks()
        if before is not None and before is not after:
            if run.config.optimizer_state == "reset":
                run.backend.optimizers.reset()
            if run.config.lr_restart:
                run.learning_rate.restart()
        for observer in run.observers:
            observer.masks_changed(step, after)
    words: dict[type[rules.Update], str] = {rules.Grow: "grown", rules.DropAndGrow: "pruned and regrown"}
    done = Counter(words.get(type(update), "pruned") for update in updates if not isinstance(update, rules.Keep))
    return "entries: " + (", ".join(f"{count} {word}" for word, count in done.items()) or "none changed")


def finish(run: Run, phase: Phase, step: int) -> int:
    """Prunes what is dense in a phase, as the last boundary would; returns the number of entries."""
    dense = run.to_prune(phase)
    if dense:
        place = f"the end at step {step}"
        with operation(place):
            run.agree(step, place)
            run.mask_state.apply(dense, step)
            run.agree_on_masks()
    return len(dense)
