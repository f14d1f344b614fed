"""Timing two ways of doing the same in turns, until it is sure which is faster.

Other processes slow a run down by a tenth or by half, and not evenly. So runs are compared in pairs, the order within a
pair changes, and the verdict waits until it is sure. With one thread the clock counts what the process has computed,
which leaves out the time that others had the core; that they have filled the caches it cannot leave out.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

#: Pairs of runs after which it is decided -> quantiles of Student's t for as many, at 0.998 to accept and at 0.95 to
#: give up. In quiet 3 or 4 pairs do. By simulation (test_tuning.py), with 20 % lognormal noise on every run: a
#: ratio of 0.94 is accepted in less than 0.5 % of the cases, one of 1.5 in 99.7 %; with 3 % noise, 1.08 in 98 %.
LOOKS = {
    3: (15.8, 2.9), 4: (8.1, 2.4), 5: (6.0, 2.1), 7: (4.5, 1.9),
    9: (4.0, 1.9), 12: (3.6, 1.8), 15: (3.4, 1.8), 20: (3.3, 1.7),
}  # fmt: skip
#: Standard deviation of a pair's log ratio that is assumed at the least: three pairs may agree by chance.
NOISE = 0.005


def seconds(call: Callable[[Any], object], x: Any, device: torch.device) -> float:
    """Of one call; with one thread on a CPU those that the process has computed, otherwise those that passed."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    clock = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    begin = clock()
    call(x)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - begin


def gains(timed: Callable[[bool], float], margin: float, deadline: float) -> tuple[bool | None, float | None]:
    """Whether the new way is at least `margin` times as fast (None: not known in time), and how many times it is.

    Args:
        timed: seconds of a run, told whether it is to go the new way; called as old, new, new, old, old, new, ...
        deadline: of time.perf_counter, after which no pair is begun.
    """
    ratios: list[float] = []
    while len(ratios) < max(LOOKS) and time.perf_counter() < deadline:
        new_first = len(ratios) % 2 == 1
        first, second = (max(timed(new), 1e-12) for new in (new_first, not new_first))
        ratios.append(second / first if new_first else first / second)
        decided = decision(ratios, margin)
        if decided is not None:
            return decided, statistics.median(ratios)
    return None, statistics.median(ratios) if ratios else None


def decision(ratios: Sequence[float], margin: float) -> bool | None:
    """True if the median reaches the margin and surely nothing is lost, False if it is unlikely to reach the margin.

    None where more pairs must tell. ratios: seconds of the old way over those of the new one, above 0.

    >>> decision([1.4, 1.41, 1.38], 1.05), decision([0.97, 0.99, 0.98], 1.05), decision([1.4, 0.9, 1.2], 1.05)
    (True, False, None)
    """
    if len(ratios) not in LOOKS:
        return None
    accept, give_up = LOOKS[len(ratios)]
    logs = [math.log(ratio) for ratio in ratios]
    mean, error = statistics.fmean(logs), max(NOISE, statistics.stdev(logs)) / math.sqrt(len(logs))
    reaches = statistics.median(ratios) >= margin
    if reaches and mean - accept * error >= 0:
        return True
    if not reaches and mean + give_up * error < math.log(margin):
        return False
    return None
