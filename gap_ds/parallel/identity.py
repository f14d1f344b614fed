"""The run that an exchange folder belongs to: fingerprints of what all workers have alike, and what differs."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from typing import Any, Literal

import torch
from pydantic import ConfigDict, field_validator

from gap_ds.parallel.items import VERSION, Item
from gap_ds.sharding.comm import Comm, sum_of
from gap_ds.sharding.shard import Shard
from gap_ds.storage.errors import printable
from gap_ds.storage.json import Record
from gap_ds.storage.safetensors import NAMES

#: Weights of a piece per chunk.
_CHUNK = 1 << 22


class RunRecord(Record):
    """The first fields of every JSON file of an exchange folder, equal in all files of a run.

    signature: of the config, without the version of the library.
    plan, tensors: fingerprints of the plan and of the exchanged tensors.
    workers: K. run: the text of `ParallelWorker.run`.
    """

    model_config = ConfigDict(extra="forbid")

    format: Literal["gap_ds.exchange"]
    version: int
    signature: str
    plan: str
    tensors: str
    workers: int
    run: str

    @field_validator("version")
    @classmethod
    def _check_version(cls, version: int) -> int:
        if version != VERSION:
            raise ValueError(f"is {version}, but this gap_ds reads {VERSION}: all workers need one version of gap_ds")
        return version


def differences(there: RunRecord, here: RunRecord) -> str:
    """Return what differs between the run of a file and this run, for a message; empty if nothing does."""
    found = [f"{a} (here {b})" for a, b in _pairs(there.signature, here.signature)]
    if there.plan != here.plan:
        found.append(
            f"plan {printable(there.plan)} (here {here.plan}), so the model, the sparsity, the distribution, the "
            "pattern or the partitions differ"
        )
    elif there.tensors != here.tensors:
        found.append(
            f"tensors {printable(there.tensors)} (here {here.tensors}), so a vocabulary, a norm, a bias or a buffer "
            "differs in its name, shape, dtype or partition"
        )
    if there.workers != here.workers:
        found.append(f"{there.workers} workers (here {here.workers})")
    if pairs := _pairs(there.run, here.run):
        was, now = ("|".join(texts) for texts in zip(*pairs, strict=True))
        found.append(f'run "{was}" (here "{now}"), so settings of the training script differ')
    return ", ".join(found[:5])


def _pairs(there: str, here: str) -> list[tuple[str, str]]:
    """Return the parts, between bars, in which two texts differ.

    >>> _pairs("a|s:0.8|k:3", "a|s:0.9")
    [('s:0.8', 's:0.9'), ('k:3', 'nothing')]
    """
    if there == here:
        return []
    was, now = there.split("|"), here.split("|")
    pairs = zip_longest(was, now, fillvalue="nothing")
    return [(printable(a), b) for a, b in pairs if a != b]


def unversioned(signature: str) -> str:
    """Return a signature without the version of the library at its end.

    >>> unversioned("gap|k:3|s:0.8|v:0.1.0")
    'gap|k:3|s:0.8'
    """
    return re.sub(r"\|v:[^|]*\Z", "", signature)


# -- fingerprints ---------------------------------------------------------------------------------------------------


def of_tensors(items: Sequence[Item]) -> str:
    """Return a fingerprint of the exchanged tensors: names, shapes, dtypes and partitions, for any sharding.

    The fingerprint of the plan covers the entries only. This one also covers embeddings, norms, biases and buffers.

    >>> def bias(numel, of):
    ...     return Item(Shard.of_range("bias", (of,), 0, numel, 0, torch.Tensor), None)
    >>> of_tensors([bias(2, of=2)]) == of_tensors([bias(1, of=2)])
    True
    >>> of_tensors([bias(2, of=2)]) == of_tensors([bias(3, of=3)])
    False
    """
    return _digest(sorted((item.name, item.shape, NAMES[item.dtype], str(item.partition)) for item in items))


def of_weights(shards: Iterable[Shard], comm: Comm) -> str:
    """Return a fingerprint of all weights in fp32, for any sharding and device. All ranks must call this.

    Frozen ones are not exchanged, so they must be equal from the beginning.

    For each parameter it takes the sum of (2 i + 1) times the bit pattern of weight i, modulo 2^64, so the order of the
    pieces does not matter. The cost is one pass over the weights, and a sum of one number per parameter over the ranks.

    >>> def shard(start, weight):
    ...     return Shard.of_range("w", (4,), start, weight.numel(), 0, lambda: weight)
    >>> alone = Comm(single=True)
    >>> of_weights([shard(0, torch.arange(4.0))], alone) == of_weights([shard(0, torch.arange(4.0).flip(0))], alone)
    False
    """
    shards = list(shards)
    rows = zip(shards, sum_of(shards, [_sum(shard) for shard in shards], comm), strict=True)
    return _digest(sorted((shard.name, shard.shape, total) for shard, total in rows))


def _sum(shard: Shard) -> int:
    """Return the sum for the weights of a piece, as a signed 64-bit integer."""
    piece = shard.weight()
    total = torch.zeros((), dtype=torch.int64, device=piece.device)
    for lo in range(0, piece.numel(), _CHUNK):
        patterns = piece[lo : lo + _CHUNK].float().view(torch.int32).to(torch.int64)
        total += (patterns * (2 * shard.box.indices(lo, lo + patterns.numel(), piece.device) + 1)).sum()
    return int(total)


def _digest(rows: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]
