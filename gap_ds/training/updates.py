"""Masks inside every optimizer step, and when an update is complete: the one place where training meets the masks."""

from __future__ import annotations

import logging
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from gap_ds.masks.local import local
from gap_ds.method import rules
from gap_ds.sharding import moments
from gap_ds.sharding.comm import raise_on_all_ranks
from gap_ds.training.run import Place, Run
from gap_ds.training.watched import Parts, Watched

#: Calls of `complete` in a row in which weights changed without a step, after which it is no coincidence.
_UNSEEN = 3
#: Calls in a row without a step, after which the weights are looked at, and again whenever there were twice as many.
_IDLE = 8
#: Updates that nobody counts, after which that is said.
_UNCOUNTED = 8
#: Steps of one optimizer while another has not stepped, after which that one is no longer used.
_ALONE = 32
#: The optimizers that some engine has hooked.
_HOOKED: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()


class Updates:
    """Hooks of all optimizers of a run. An update is complete when each of them has stepped.

    Args:
        place: asked in every step where the run is.
    Raises:
        ValueError: another engine has hooked one of the optimizers.
    """

    def __init__(self, run: Run, place: Callable[[], Place]) -> None:
        self._run, self._place = run, place
        #: Steps of each optimizer since the last complete update.
        self._stepped: Counter[int] = Counter()
        self._masked: set[str] = set()
        self._uncounted = 0
        #: False until the first update after masks came from elsewhere, such as when the engine was built.
        self._checked = False
        self._idle, self._unseen, self._version = 0, 0, self._read_version()
        #: Calls of `complete` since the last update: micro-batches.
        self._calls = 0
        #: All tensors that hold weights, as the last update left them.
        self._watched = Watched()
        self._parts = Parts()
        self._handles: list[Any] = []
        for optimizer in run.backend.optimizers:
            if optimizer in _HOOKED:
                raise ValueError(
                    f"optimizer={type(optimizer).__name__}: another GaPEngine masks its steps. Call close() on that "
                    "engine first, or build another optimizer."
                )
        moments.divide(run.backend.optimizers, run.mask_state.shards.values())
        self._hook()

    def _hook(self) -> None:
        for optimizer in self._run.backend.optimizers:
            _HOOKED.add(optimizer)
            self._handles.append(optimizer.register_step_pre_hook(self._before))
            self._handles.append(optimizer.register_step_post_hook(self._after))

    def _unhook(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def close(self) -> None:
        """Takes the hooks off, and what optimizers know of masks."""
        self._unhook()
        moments.release(self._run.backend.optimizers)
        for optimizer in self._run.backend.optimizers:
            _HOOKED.discard(optimizer)

    def forget(self) -> None:
        """Forgets steps that are not counted yet; the next update begins with the weights as they are now."""
        self._stepped.clear()
        self._masked.clear()
        self._checked = False
        self._idle, self._unseen, self._version = 0, 0, self._read_version()
        self._calls = 0
        self.watch()

    def watch(self) -> None:
        """Remembers all weights as they are now. Call it after masks or weights changed outside of an update."""
        self._run.mask_state.forget_lists()
        self._watched = Watched(self._run.mask_state.tensors())
        self._parts = Parts(self._run.mask_state.masked_weights())

    @property
    def open(self) -> bool:
        """True if micro-batches of an update were propagated, and others of it were not."""
        return self._calls % self._run.backend.micro_batches > 0

    def complete(self) -> bool:
        """True if an update was applied since the last call. All ranks must call this after the same steps.

        Raises:
            ValueError: weights change in steps that the hooks do not see; pruned weights were not 0 before the first
                update; or, there and before a boundary, the optimizer's state has an unknown meaning.
        """
        self._calls += 1
        self._uncounted = 0
        if any(handle.id not in (handle.hooks_dict_ref() or ()) for handle in self._handles):
            self._hook_again()
        if len(self._stepped) < len(self._run.backend.optimizers):
            self._look_for_unseen_steps()
            return False
        self._calls = 0
        self._watched.mark()
        masked, first = self._masked, not self._checked
        self._stepped, self._masked, self._checked = Counter(), set(), True
        self._idle, self._unseen, self._version = 0, 0, self._watched.first_version
        if missing := self._run.mask_state.unmasked(masked):
            self._run.doubt(
                f"{missing[0]}: was not masked in an update ({len(missing)} entries were not). The optimizer no longer "
                "holds its weights: its parameter groups were changed, or the model's parameters were replaced, as by "
                "load_state_dict(assign=True)."
            )
        # Some optimizers make a part of their state later, as every k-th step does.
        if first or self._place().changes_masks(self._run.schedule):
            raise_on_all_ranks(self._run.world, self._check_state)
        return True

    def _before(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        _out_of_graph(self._look_first, optimizer)

    def _after(self, optimizer: torch.optim.Optimizer, arguments: Sequence[Any], named: Mapping[str, Any]) -> None:
        _out_of_graph(self._mask, optimizer)
        if any(map(callable, (*arguments[1:], *named.values()))):  # a closure has made the gradients in the step
            _out_of_graph(self._copy_gradients, optimizer)

    def _copy_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        place = self._place()
        if rules.needs_gradient(self._run.config, place.phase(self._run.schedule), place.step + 1):
            self._run.mask_state.copy_gradients(optimizer)

    def _look_first(self, optimizer: torch.optim.Optimizer) -> None:
        if not self._run.backend.optimizers.quiet:
            self._run.mask_state.before_update(optimizer, self._place().step)
            self._copy_gradients(optimizer)  # now: some optimizers use their memory for other values
        # `is_available` would look for devices each time.
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():  # type: ignore[no-untyped-call]
            raise ValueError(
                f"optimizer={type(optimizer).__name__}: its step is captured into a CUDA graph, whose replays run no "
                "hooks, so masks would not be applied. Leave the optimizer step out of the graph."
            )
        if self._stepped or self._run.backend.optimizers.quiet:
            return
        if not self._checked:
            self._run.doubt_weights("before the first update")
            return
        # This update masks the weights that the forward pass has used, so the look at a boundary comes too late for
        # them. PyTorch does not count changes through a parameter's `data`: for these there is a part in every update.
        part = self._parts.next(rest=self._place().changes_masks(self._run.schedule))
        place = "before an update; they were 0 after the update before it"
        self._run.doubt_weights(place, None if self._watched.changed() else part)

    def _mask(self, optimizer: torch.optim.Optimizer) -> None:
        """Zeroes the pruned weights that the optimizer has just changed."""
        if self._run.backend.optimizers.quiet:
            return
        state = self._run.mask_state
        state.after_update(optimizer, self._place().step)
        masked = state.zero_pruned(optimizer)
        if masked and masked[0] in self._masked:
            self._say_uncounted()
        self._masked.update(masked)
        # A fused optimizer is stepped by a gradient scaler on overflow, too, and leaves all weights as they are.
        if (overflow := getattr(optimizer, "found_inf", None)) is not None and bool(overflow):
            self._version = self._read_version()
            return
        self._stepped[id(optimizer)] += 1
        if not self._run.backend.optimizers.used:
            self._run.backend.optimizers.used = True

    def _say_uncounted(self) -> None:
        """Warns, once until `complete` is called, if updates follow each other without it."""
        self._uncounted += 1
        if self._uncounted == _UNCOUNTED:
            self._run.say(
                f"{_UNCOUNTED} updates were made without engine.step() or engine.after_step(): masks are applied, but "
                "the schedule stands still. Call engine.after_step() after optimizer.step().",
                logging.WARNING,
            )

    def _check_state(self) -> None:
        self._run.raise_doubts()
        self._run.backend.optimizers.check_state(self._run.mask_state.shards.values())

    def _hook_again(self) -> None:
        """Notes that hooks were taken off, and counts the update that they have missed, so that all ranks meet."""
        optimizers = self._run.backend.optimizers
        self._run.doubt(
            f"{next(iter(self._run.mask_state.shards))}: its mask was not applied in a step of "
            f"optimizer={optimizers.names}: the engine's hooks were taken off. Leave them on the optimizer; "
            "close() ends the masking."
        )
        self._unhook()
        self._hook()
        if self._calls % self._run.backend.micro_batches == 0:
            self._stepped.update(id(optimizer) for optimizer in optimizers)
            self._masked.update(self._run.mask_state.bits)

    def _read_version(self) -> int:
        """PyTorch's count of in-place changes of the first entry of which this rank has a piece."""
        shards = self._run.mask_state.shards.values()
        return next((local(shard.owner())._version for shard in shards if shard.numel), 0)

    def _look_for_unseen_steps(self) -> None:
        optimizers = self._run.backend.optimizers
        if self._stepped:
            idle = [type(o).__name__ for o in optimizers if not self._stepped[id(o)]]
            if max(self._stepped.values()) >= _ALONE:
                raise ValueError(
                    f"optimizer={idle[0]}: has not stepped while another one did {_ALONE} times. An update is complete "
                    "when all optimizers have stepped: step each of them, or pass only those that are."
                )
            return
        version = self._read_version()
        self._unseen, self._version = self._unseen + 1 if version != self._version else 0, version
        self._idle += 1
        # The count misses changes of a parameter's `data` and those by CUDA graphs: these revive pruned weights.
        looks = self._idle >= _IDLE and self._idle & (self._idle - 1) == 0
        if self._unseen >= _UNSEEN or (looks and self._run.mask_state.revived()):
            raise ValueError(
                f"{next(iter(self._run.mask_state.shards))}: weights change, but no step of "
                f"optimizer={optimizers.names} is seen, so masks are not applied. Pass the optimizer that is stepped: "
                "it may have been built anew, or update weights without its step(), as optimizers that step inside "
                "the backward pass do."
            )


def _out_of_graph(hook: Callable[[torch.optim.Optimizer], None], optimizer: torch.optim.Optimizer) -> None:
    """Calls a hook, from a compiled optimizer step too, which must not trace it.

    torch.compiler.disable as a decorator would load the compiler, which takes as long as torch itself.
    """
    if torch.compiler.is_dynamo_compiling():
        torch.compiler.disable(hook)(optimizer)  # type: ignore[no-untyped-call]
    else:
        hook(optimizer)
