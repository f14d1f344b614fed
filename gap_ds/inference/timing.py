"""Times two variants of a run in pairs until it is certain which one is faster.

Other processes slow runs down by a tenth or a half, and unevenly. So runs are compared in pairs, the order alternates,
and there is no verdict before it is certain. With one thread the clock counts CPU time of this process, which excludes
the time that others used the core, but not their effect on the caches.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

#: Number of pairs after which a verdict is tried -> quantiles of Student's t for this number, at 0.998 to accept and at
#: 0.95 to give up. On a quiet machine 3 or 4 pairs suffice. By simulation (test_timing.py) with 20 % lognormal noise on
#: every run, a ratio of 0.94 is accepted in less than 0.5 % of the cases, one of 1.5 in 99.7 %; with 3 % noise, 1.08 in
#: 98 %.
LOOKS = {
    3: (15.8, 2.9), 4: (8.1, 2.4), 5: (6.0, 2.1), 7: (4.5, 1.9),
    9: (4.0, 1.9), 12: (3.6, 1.8), 15: (3.4, 1.8), 20: (3.3, 1.7),
}  # fmt: skip
#: Lower bound on the standard deviation of a pair's log ratio, because three pairs may agree by chance.
NOISE = 0.005


def seconds(call: Callable[[Any], object], x: Any, device: torch.device) -> float:
    """Return the seconds of call(x): CPU time of the process with one thread on a CPU, otherwise wall time."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    clock = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    begin = clock()
    call(x)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - begin


def gains(timed: Callable[[bool], float], margin: float, deadline: float) -> tuple[bool | None, float | None]:
    """Return whether the new variant is faster by the margin (None: not certain in time), and the median speed-up.

    Args:
        timed: returns the seconds of a run, of the new variant if its argument is True. Called as old, new, new, old,
            old, new, ...
        margin: required speed-up, at least 1.
        deadline: in time.perf_counter; no pair begins after it.
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
    """Return True if the median reaches the margin and a loss is ruled out, False if the margin is out of reach.

    None if more pairs are needed. ratios: seconds of the old variant over those of the new one, above 0, by pair.

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
