"""Profile of the two hot paths: a training step with the engine, and a boundary.

    OMP_NUM_THREADS=1 python benchmarks/profile_paths.py

`parts` are wall times of the functions of a path, each without the functions inside it, over some steps. `operators`
are the operators' self times on the CPU or the GPU under torch.profiler, as shares of all operators. The profiler slows
small operators down, so the shares of parts come from a run without it. `--quick` is a size for tests.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import measure
import torch

sys.path.insert(0, str(measure.ROOT / "examples" / "translation"))

import model as models
import overhead

from gap_ds import GaPEngine
from gap_ds.masks import selection
from gap_ds.training import consistency
from gap_ds.training.mask_state import MaskState

#: Number of operators listed for each path.
MOST = 8


class Parts:
    """Seconds of functions, each without the functions inside it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._inside = [0.0]

    def of(self, name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a function so that its seconds are added to the part `name`."""

        @functools.wraps(work)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._inside.append(0.0)
            measure.synchronize()
            started = time.perf_counter()
            try:
                return work(*args, **kwargs)
            finally:
                measure.synchronize()
                seconds = time.perf_counter() - started
                self.seconds[name] += seconds - self._inside.pop()
                self._inside[-1] += seconds

        return timed


def main() -> None:
    parser = measure.parser(__doc__)
    parser.add_argument("--preset", choices=list(models.PRESETS), default="base")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--steps", type=int, default=6, help="of each path that are counted")
    args = parser.parse_args()
    if args.quick:
        args.preset, args.tokens, args.steps = "tiny", 64, 2
    rows = [row for path in (step, boundary) for row in path(args)]
    note = f"{args.preset}, {args.tokens} tokens, bf16, plain PyTorch, sparsity 0.9; ms of one step or boundary"
    measure.write("profile_paths", rows, args.out, note)


def build(args: argparse.Namespace, phase_steps: int, rounds: int) -> tuple[Callable[[], None], Any]:
    device = measure.device()
    args = argparse.Namespace(**vars(args) | {"backend": "plain", "sparsity": 0.9, "dtype": "bf16"})
    work, engine = overhead.build(args, device, sparse=True, phase_steps=phase_steps, rounds=rounds)
    batch = overhead.tokens(args, device)
    return lambda: work(batch), engine


def step(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Profile a step inside a phase."""
    work, engine = build(args, 10**9, 1)
    for _ in range(2):
        work()
    parts = Parts()
    optimizer = engine.optimizer
    with patched(
        (GaPEngine, "__call__", parts.of("forward pass", GaPEngine.__call__)),
        (models, "loss", parts.of("loss", models.loss)),
        (engine, "backward", parts.of("backward pass", engine.backward)),
        (optimizer, "step", parts.of("optimizer", optimizer.step)),
        (engine.mask_state, "zero_pruned", parts.of("masks after the step (gap_ds)", engine.mask_state.zero_pruned)),
        (engine, "step", parts.of("clearing gradients, and counting the step (gap_ds)", engine.step)),
    ):
        # The optimizer's hook calls engine.mask_state.zero_pruned: a part inside the optimizer's time.
        whole = sum(measure.seconds(work) for _ in range(args.steps))
    return rows("step", parts, whole, args.steps, work)


def boundary(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Profile a boundary of a cyclic run, which prunes a partition and grows the next one."""
    work, engine = build(args, 1, 2 * args.steps)
    cross, engine.after_step = engine.after_step, lambda: None
    for _ in range(3):
        work()
        cross()
    parts, whole = Parts(), 0.0
    with patched(
        (selection, "_histogram", parts.of("histograms of the keys", selection._histogram)),
        (selection.Decision, "mask", parts.of("masks from the threshold", selection.Decision.mask)),
        (MaskState, "_grow", parts.of("masks off, where an entry grows", MaskState._grow)),
        (MaskState, "_mask", parts.of("zeroing the pruned weights", MaskState._mask)),
        (consistency, "check_position", parts.of("ranks agree on the place", consistency.check_position)),
        (consistency, "check_masks", parts.of("ranks agree on the masks", consistency.check_masks)),
    ):
        for _ in range(args.steps):
            work()
            whole += measure.seconds(cross)
    work()
    return rows("boundary", parts, whole, args.steps, cross)


@contextmanager
def patched(*changes: tuple[Any, str, Any]) -> Iterator[None]:
    """Give attributes other values inside the context: (owner, name, value)."""
    with ExitStack() as stack:
        for owner, name, value in changes:
            stack.enter_context(mock.patch.object(owner, name, value))
        yield


def rows(path: str, parts: Parts, whole: float, times: int, work: Callable[[], object]) -> list[dict[str, Any]]:
    """Return rows of the whole path, of its parts, and of the operators in one more run under torch.profiler."""
    seconds = {**parts.seconds, "the rest": whole - sum(parts.seconds.values())}
    found = [{"path": path, "kind": "whole", "what": "", "ms": _ms(whole / times), "share": 1.0}]
    found += [
        {"path": path, "kind": "part", "what": name, "ms": _ms(value / times), "share": round(value / whole, 3)}
        for name, value in sorted(seconds.items(), key=lambda item: -item[1])
    ]
    cuda = torch.cuda.is_available()
    kinds = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if cuda else [])]
    with torch.profiler.profile(activities=kinds) as profile:
        work()
        measure.synchronize()
    own = {
        event.key: (event.self_device_time_total if cuda else event.self_cpu_time_total, event.count)
        for event in profile.key_averages()
    }
    total = sum(us for us, _ in own.values())
    most = sorted(own.items(), key=lambda item: -item[1][0])[:MOST]
    found += [
        {"path": path, "kind": "operator", "what": name, "ms": _ms(us / 1e6), "share": round(us / total, 3), "calls": n}
        for name, (us, n) in most
    ]
    return found


def _ms(seconds: float) -> float:
    return round(1e3 * seconds, 2)


if __name__ == "__main__":
    main()
