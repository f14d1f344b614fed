"""History: what every boundary and every update did to each entry's mask, as a file of JSON lines.

The first line is a header: format, version, signature, and (name, weights, partition) of each entry. Every other line
holds, for the steps that follow `step`, one number per entry, in the same order:

    kept            weights that are active: those that the mask keeps, all of a dense entry
    came, went      weights that the entry's new mask keeps and its last one did not, and the reverse; null where the
                    entry gets no mask here, or never had one before
    active          weights that were active in any step so far, these included: what has been explored

`gap-ds report` draws it. Recording costs memory: a bit for each weight that was not active yet when masks were
recorded last, and one for each weight of a dense partition (its last mask). It changes nothing in the run.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from pathlib import Path

from torch import Tensor

from gap_ds import checkpoint
from gap_ds.masks import bitmask
from gap_ds.method.plan import Plan
from gap_ds.method.schedule import Phase
from gap_ds.sharding.comm import Comm, sum_of
from gap_ds.storage.atomic import replacing
from gap_ds.storage.errors import summarize_error
from gap_ds.training.mask_state import MaskState
from gap_ds.training.observer import Observer

NAME = "gap_history.jsonl"
FORMAT, VERSION = "gap_ds.history", 1

_SEEN, _BEFORE = "seen.safetensors", "before.safetensors"


class History(Observer):
    """Records the masks of a run into a file. All ranks call each method together; rank 0 writes.

    The file is not touched before the second line or a checkpoint, so that a run that goes on keeps what it has. A
    disk that refuses it is a warning: no run ends for its diary.
    """

    def __init__(self, path: Path, plan: Plan, signature: str, mask_state: MaskState, comm: Comm, world: Comm) -> None:
        self._path, self._plan, self._mask_state, self._comm, self._world = path, plan, mask_state, comm, world
        entries = [[entry.name, entry.numel, entry.partition] for entry in plan.entries]
        header = {"format": FORMAT, "version": VERSION, "signature": signature, "entries": entries}
        self._header = json.dumps(header)
        #: Lines that are not in the file yet.
        self._lines: list[str] = []
        #: What the file is to begin anew with, when there are lines to write; None: they are appended.
        self._head: list[str] | None = [self._header]
        #: Each entry's last mask, which it may not have any more; None before the first record.
        self._last: dict[str, Tensor] | None = None
        #: What was ever active of each entry. An entry that was dense is not in it: all of it was.
        self._seen: dict[str, Tensor] = {}

    def masks_changed(self, step: int, phase: Phase) -> None:
        """Adds a line: the masks as they are before a step."""
        first = self._last is None
        if self._last is None:
            self._last, self._seen = {}, dict(self._mask_state.bits)
        rows = [self._row(entry.name, self._last) for entry in self._plan.entries]
        shards = [self._mask_state.shards[entry.name] for entry in self._plan.entries for _ in range(4)]
        numbers = iter(sum_of(shards, [n or 0 for row in rows for n in row], self._comm))
        summed = list(zip(*[numbers] * 4, strict=True))
        columns: dict[str, list[int | None]] = {}
        for i, name in enumerate(("kept", "came", "went", "active")):
            columns[name] = [None if own[i] is None else all_[i] for own, all_ in zip(rows, summed, strict=True)]
        self._lines.append(json.dumps({"step": step, "phase": phase.index, **columns}))
        if not first:
            self._flush()

    def _row(self, name: str, last: dict[str, Tensor]) -> tuple[int, int | None, int | None, int]:
        """(kept, came, went, active) of this rank's piece of an entry."""
        numel, bits, before = self._mask_state.shards[name].numel, self._mask_state.bits.get(name), last.get(name)
        if bits is None:
            self._seen.pop(name, None)
            return numel, None, None, numel
        last[name] = bits
        if name in self._seen:
            self._seen[name] = self._seen[name] | bits
        active = bitmask.count(self._seen[name]) if name in self._seen else numel
        if before is None or before is bits:
            return bitmask.count(bits), None, None, active
        return bitmask.count(bits), bitmask.count(bits & ~before), bitmask.count(before & ~bits), active

    def close(self) -> None:
        """Writes what was recorded."""
        self._flush()

    def _flush(self) -> None:
        if self._world.rank == 0 and self._lines:
            try:
                self._append()
                self._head = None
            except OSError as error:
                warnings.warn(
                    f"{self._path}: {summarize_error(error)}: the history of the masks is not complete", stacklevel=2
                )
        self._lines = []

    def _append(self) -> None:
        text = "".join(f"{line}\n" for line in self._lines)
        if self._head is None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(text)
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self._path) as aside:
            aside.write_text("".join(f"{line}\n" for line in self._head) + text, encoding="utf-8")

    # -- with checkpoints ------------------------------------------------------------------------------------------

    def write(self, folder: Path) -> None:
        """Saves what the next record compares with, beside the masks of a checkpoint."""
        self._flush()
        before = {name: bits for name, bits in (self._last or {}).items() if name not in self._mask_state.bits}
        for name, bits in ((_SEEN, self._seen), (_BEFORE, before)):
            checkpoint.write_masks(folder / name, self._plan, self._mask_state.shards, bits, self._comm)

    def read(self, folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]] | None:
        """Reads the file of `write` for `restore`; None if that run recorded no history."""
        if not (folder / _SEEN).is_file():
            return None
        seen, before = (
            checkpoint.read_masks(folder / name, self._plan, None, self._mask_state.shards, self._comm)
            for name in (_SEEN, _BEFORE)
        )
        return seen, before

    def restore(self, found: tuple[dict[str, Tensor], dict[str, Tensor]] | None, step: int, phase: Phase) -> None:
        """Goes on before a step, from what was read and the masks as they are now.

        Lines of the file that come after the step are dropped with the next record. Without anything to go on from, a
        history begins here.
        """
        self._lines, self._head, self._last = [], [self._header], None
        if found is None:
            return self.masks_changed(step, phase)
        seen, before = (self._mask_state.on_device(pieces) for pieces in found)
        self._seen, self._last = seen, {**before, **self._mask_state.bits}
        if self._world.rank == 0:
            self._head += self._earlier(step)

    def _earlier(self, step: int) -> list[str]:
        """The lines of the file up to a step, if it is this run's."""
        kept: list[str] = []
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # a kill can cut the last line short
            header, *lines = self._path.read_text(encoding="utf-8", errors="replace").splitlines()
            for line in lines if header == self._header else ():
                if json.loads(line)["step"] <= step:
                    kept.append(line)
        if not kept:
            why = "is not of this run or damaged" if self._path.exists() else "there is no such file to go on with"
            warnings.warn(f"{self._path}: {why}: a history begins at step {step}", stacklevel=2)
        return kept
