"""`ParallelWorker`: which worker of parallel GaP a job is. You pass it to the engine."""

from __future__ import annotations

import math
from dataclasses import dataclass

from gap_ds.parallel.transport import open_folder, without_secrets


@dataclass(frozen=True)
class ParallelWorker:
    """Which worker of parallel GaP this job is.

    index: 0 .. workers - 1; the partition that is dense in this job.
    exchange: the folder or fsspec URL where the workers meet. Every run needs a separate one.
    timeout: seconds to wait for the other workers at the end of a round.
    run: what else must be equal among the workers of a run, beside the config, the plan and the first weights: for
        example the learning rate and the data, as "lr:0.1|data:x". A worker with another text is refused.
    resume: True if this job may restart a worker that was killed before its first checkpoint. Otherwise a job that
        begins at step 0 is refused if this worker has published before, because the folder belongs to another run.
    """

    index: int
    exchange: str
    timeout: float = 3600.0
    run: str = ""
    resume: bool = False

    @property
    def shown(self) -> str:
        """`exchange` for messages, without the secrets in a URL."""
        return without_secrets(self.exchange)

    def has_published(self) -> bool:
        """True if this worker has published the first round in its folder, in this run or in an earlier one."""
        try:
            return open_folder(self.exchange).size(f"{file_stem(0, self.index)}.json") >= 0
        except OSError:  # errors of the folder are reported when it is used
            return False

    def check(self, workers: int) -> None:
        """Check the values against the number of workers.

        Raises:
            ValueError: a value is impossible.
        """
        if type(self.index) is not int or not 0 <= self.index < workers:
            raise ValueError(
                f"worker index={self.index!r}: must be a whole number from 0 to {workers - 1}, one for each of the "
                f'{workers} partitions. Start one job per partition, or change "partitions".'
            )
        if not isinstance(self.exchange, str) or not self.exchange:
            raise ValueError(f"exchange={self.exchange!r}: must name the folder or URL where the workers meet.")
        is_number = isinstance(self.timeout, int | float) and not isinstance(self.timeout, bool)
        if not is_number or not 0 < self.timeout < math.inf:
            raise ValueError(f"timeout={self.timeout!r}: must be a number of seconds above 0.")
        if not isinstance(self.run, str) or len(self.run) > 1000:
            raise ValueError(f"run={str(self.run)[:50]!r}: must be a text of at most 1000 characters, such as a hash.")


def file_stem(round: int, worker: int) -> str:
    """Path of a worker's two files below the exchange folder, without their endings. It consists of numbers only."""
    return f"round_{int(round)}/worker_{int(worker)}"
