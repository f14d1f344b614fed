"""A dense teacher in the training loop of an example."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from common import sharding
from common.arguments import RunArguments
from gap_ds import distill
from gap_ds.method.schedule import Phase
from gap_ds.sharding.comm import Comm

#: Arguments that change the loss of a run with --teacher.
ARGUMENTS = ("teacher", "distillation", "temperature", "hidden_distillation", "teacher_phases")


class Distillation:
    """The teacher of a run, and its part of the loss in the phases of --teacher-phases."""

    def __init__(self, args: RunArguments, model: nn.Module) -> None:
        self._args, self._comm = args, Comm()
        self.teacher = distill.Teacher(model)
        #: Set in the calls of student and teacher.
        self.outputs = {"output_hidden_states": True} if args.hidden_distillation else {}

    def in_phase(self, phase: Phase) -> bool:
        """Return True if the teacher teaches in a phase."""
        return phase.kind in self._args.teacher_phases

    def loss(
        self,
        loss: Tensor,
        found: Any,
        wanted: Any,
        kept: Tensor | None = None,
        *,
        states: Mapping[str, Tensor | None],
        denominator: float | None = None,
    ) -> Tensor:
        """Return the loss of the task, mixed with the distances to the teacher.

        Args:
            found, wanted: outputs of student and teacher with `logits`.
            kept, denominator: of `distill.logit_distance`.
            states: fields of the outputs that contain hidden states -> their kept positions. The first state, the
                embedding or stem, is left out.
        """
        args = self._args
        distance = distill.logit_distance(
            found.logits, wanted.logits, kept, temperature=args.temperature, denominator=denominator
        )
        loss = (1 - args.distillation) * loss + args.distillation * distance
        for name, positions in states.items() if args.hidden_distillation else ():
            layers, targets = (getattr(output, name)[1:] for output in (found, wanted))
            hidden = distill.hidden_distance(layers, targets, positions, comm=self._comm)
            loss = loss + args.hidden_distillation * hidden
        return loss


def load(
    args: RunArguments,
    load_pretrained: Callable[..., nn.Module],
    device: torch.device,
    deepspeed: Mapping[str, Any] | None,
) -> Distillation | None:
    """Return the teacher of --teacher, sharded if the student's weights are; None without one.

    FSDP and ZeRO-3 shard the teacher over all ranks. With every other backend each rank has the whole teacher.
    """
    if args.teacher is None:
        return None
    model = load_pretrained(args.teacher, trust_remote_code=args.trust_remote_code).to(device)
    if args.backend in ("fsdp1", "fsdp2", "fairscale"):
        model = sharding.wrap(model, args.backend, device)
    if deepspeed is not None and deepspeed.get("zero_optimization", {}).get("stage") == 3:
        import deepspeed as library

        config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}, "steps_per_print": 10**9}
        model = library.initialize(model=model, config=config)[0]
    return Distillation(args, model)
