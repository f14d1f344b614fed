"""The verdict on two variants of a run, by simulation."""

from __future__ import annotations

import math
import random

from gap_ds.inference import timing


def test_the_verdict_by_simulation() -> None:
    """The figures beside `timing.LOOKS`, from 1,000 tries each; and an early verdict without much noise."""

    def outcome(ratio: float, noise: float, tries: int = 1000) -> tuple[float, float]:
        accepted = pairs = 0
        for seed in range(tries):
            rng = random.Random(seed)
            calls: list[bool] = []

            def timed(new: bool, rng: random.Random = rng, calls: list[bool] = calls) -> float:
                calls.append(new)
                return (1.0 if new else ratio) * math.exp(rng.gauss(0, noise))

            accepted += timing.gains(timed, 1.05, math.inf)[0] is True
            pairs += len(calls) // 2
            assert calls[:6] == [False, True, True, False, False, True]
        return accepted / tries, pairs / tries

    assert outcome(0.94, 0.2)[0] <= 0.005 and outcome(1.0, 0.2)[0] <= 0.02
    assert outcome(1.5, 0.2)[0] >= 0.99 and outcome(1.08, 0.03)[0] >= 0.97
    assert outcome(2.0, 0.03)[1] < 4 and outcome(0.8, 0.03)[1] < 4
