"""Costs of a boundary, a step's masks and an exchange on many ranks, as pure functions. `scaling.py` is the command.

N weights in the entries of a model, N' of them in a partition, E' entries of a partition, K partitions, R ranks. Times
are those of the slowest rank. The model takes three kinds of figures: sizes that follow from the code; `Fitted`, times
measured on one core; `Assumed`, everything about accelerators, networks and files.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from gap_ds.cli import plan as forecast
from gap_ds.masks import bitmask, selection

RANKS = (8, 64, 512, 4096, 16384)


@dataclass(frozen=True)
class Model:
    """A decoder of `layers` blocks with `matrices` prunable matrices each; `weights` in all of them.

    rows: of a matrix, its first dimension (here the hidden size); tokens: of a training step, over all ranks.
    """

    name: str
    weights: int
    layers: int
    rows: int
    tokens: int
    matrices: int = 7
    partitions: int = 3

    @property
    def entries(self) -> int:
        """Entries of one partition (E'): those that a boundary prunes."""
        return -(-self.layers * self.matrices // self.partitions)

    @property
    def pruned(self) -> int:
        """Weights of one partition (N')."""
        return self.weights // self.partitions

    @property
    def sparse(self) -> int:
        """Weights under masks while one partition is dense."""
        return self.weights - self.pruned


MILLION = 10**6
#: Layers and hidden sizes as in Llama 3.2 1B, Llama 2 7B, Llama 3.1 70B and 405B; weights rounded. Tokens: Llama 2 was
#: trained with 4 M a step, Llama 3 405B with 16 M for most of its training (arXiv 2307.09288, 2407.21783).
MODELS = (
    Model("1B", 10**9, 16, 2048, 4 * MILLION),
    Model("7B", 7 * 10**9, 32, 4096, 4 * MILLION),
    Model("70B", 70 * 10**9, 80, 8192, 16 * MILLION),
    Model("405B", 405 * 10**9, 126, 16384, 16 * MILLION),
)


def _because(value: float, reason: str) -> Any:
    return dataclasses.field(default=value, metadata={"reason": reason})


@dataclass(frozen=True)
class Assumed:
    """Assumed figures, with their meaning. The accelerator is an H100 SXM by its data sheet."""

    flops: float = _because(989e12, "FLOP/s of an accelerator in bf16, dense")
    utilisation: float = _because(
        0.4, "share of them that training gets, all waiting included: 0.38 to 0.43 in arXiv 2407.21783"
    )
    memory: float = _because(
        80e9, "bytes of an accelerator; a model whose weights, gradients and moments do not fit is left out"
    )
    memory_bandwidth: float = _because(2.7e12, "bytes/s of an accelerator's memory: 80 % of the data sheet's")
    launch: float = _because(10e-6, "s for each kernel, waiting for the device included")
    latency: float = _because(20e-6, "s for each message")
    bandwidth: float = _because(25e9, "bytes/s that a rank sends, and as much that it receives: 200 Gbit/s")
    file_bandwidth: float = _because(2e9, "bytes/s that one process reads or writes on a shared file system")
    file_open: float = _because(1e-3, "s to open a file there")

    def step_s(self, model: Model, ranks: int) -> float:
        """Seconds of a training step: its arithmetic alone, 6 FLOPs for each weight and token. The yardstick."""
        return 6 * model.weights * model.tokens / (ranks * self.flops * self.utilisation)


@dataclass(frozen=True)
class Work:
    """Seconds of a rank's work on its pieces, on one kind of processor.

    select_*: a selection, for each weight, for each piece that is not empty, for each entry, and once.
    zero_*: `bitmask.zero_pruned_`, for each fp32 weight and for each piece.
    """

    select_weight: float
    select_piece: float
    select_entry: float
    select_once: float
    zero_weight: float
    zero_piece: float

    def select_s(self, weights: float, pieces: int, entries: int) -> float:
        return (
            self.select_weight * weights + self.select_piece * pieces + self.select_entry * entries + self.select_once
        )

    def zero_s(self, weights: float, pieces: int) -> float:
        return self.zero_weight * weights + self.zero_piece * pieces


#: Counted in gap_ds/masks for an accelerator: bytes read and written for a weight in a selection; launches for a piece
#: in it; bytes for a masked weight (the kernel stores zeros only, but partly stored memory sectors are read as well).
SELECT_BYTES, SELECT_LAUNCHES, ZERO_BYTES = 160, 80, 8.125


def accelerator(assumed: Assumed, core: Work) -> Work:
    """The same work on an accelerator, assumed to be bound by its memory and by launches.

    The host's work for each entry and for each masked piece (one launch serves all) is as fitted to a core. None of it
    overlaps with the device.
    """
    return Work(
        select_weight=SELECT_BYTES / assumed.memory_bandwidth,
        select_piece=SELECT_LAUNCHES * assumed.launch,
        select_entry=core.select_entry,
        select_once=core.select_once,
        zero_weight=ZERO_BYTES / assumed.memory_bandwidth,
        zero_piece=core.zero_piece,
    )


@dataclass(frozen=True)
class Fitted:
    """Seconds measured on one core.

    core: own work on weights in memory.
    crc_byte, sha_byte: a checksum of a byte of masks; a hash of a byte of an exchanged file.
    row: making and stacking what one rank gives to an all-gather, in `Comm.all_gather`.
    spread: the place of one rank's piece of one entry, in the exchange (`Exchange._spreads`).
    """

    core: Work
    crc_byte: float
    sha_byte: float
    row: float
    spread: float


# -- network -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Network:
    """Seconds of one message, and bytes a second that one rank sends."""

    latency: float
    bandwidth: float

    def ring_s(self, size: float, ranks: int) -> float:
        """A ring all-reduce of so many bytes."""
        return 2 * (ranks - 1) * (self.latency + size / ranks / self.bandwidth)

    def tree_s(self, size: float, ranks: int) -> float:
        """A tree all-reduce: up and down again, each step with the whole message."""
        return 2 * math.ceil(math.log2(ranks)) * (self.latency + size / self.bandwidth)

    def reduce_s(self, size: float, ranks: int) -> float:
        """An all-reduce by the shorter of both."""
        return min(self.ring_s(size, ranks), self.tree_s(size, ranks))

    def gather_s(self, size: float, ranks: int) -> float:
        """An all-gather of so many bytes from every rank, by recursive doubling."""
        return math.ceil(math.log2(ranks)) * self.latency + (ranks - 1) * size / self.bandwidth


# -- how a backend spreads a model -------------------------------------------------------------------------------------

#: Ranks of a shard group of hybrid sharding.
HYBRID = 64
BACKENDS = ("ddp", "hsdp", "fsdp1", "fsdp2", "zero2", "zero3")


@dataclass(frozen=True)
class Layout:
    """Spread of a model under a backend, for the busiest rank.

    group: ranks that share the pieces of one entry. If smaller than all ranks, each group selects separately and all
        groups compare their masks.
    imbalance: the slowest rank's share of the pruned partition, over an even share.
    pruned, grown: its weights in the partition that a boundary prunes, and in the one that it grows.
    sparse: weights under masks, on the rank with most of them.
    pieces: entries of a partition with a piece on this rank.
    holders: ranks with a piece of one entry.
    publish: bytes that a rank receives when changed fp32 weights are published between two steps.
    state: bytes of weights, gradients and two moments on a rank.
    """

    group: int
    imbalance: float
    pruned: float
    grown: float
    sparse: float
    pieces: int
    holders: int
    publish: float
    state: float

    def publish_s(self, net: Network, ranks: int) -> float:
        """Seconds of publishing, as an all-gather."""
        return net.gather_s(self.publish / (ranks - 1), ranks) if self.publish else 0.0


def layout(backend: str, model: Model, ranks: int) -> Layout:
    """Return the spread of a model over R >= K ranks, as in gap_ds/sharding/backends.

        ddp        whole on every rank
        fsdp2      each matrix by rows, ceil(rows / R) on a rank: where there are more ranks than rows, some have none
        hsdp       the same within groups of 64 ranks
        fsdp1      each block as one flat parameter, so a rank has a piece of one or two of its matrices
        zero3      each matrix in R equal pieces
        zero2      the whole model as one flat buffer (as zero1): a rank has consecutive layers, so about R / K ranks
                   hold all of a partition and the others none of it

    zero2 publishes all weights in 16 bits (DeepSpeed's `update_lp_params`, as at the end of every step). zero3
    publishes the norms, which every rank keeps. FSDP publishes nothing: it gathers weights before computing.
    """
    n, entries = model.weights, model.entries
    group = {"ddp": 1, "hsdp": min(ranks, HYBRID)}.get(backend, ranks)
    imbalance, pieces, holders, publish, state = 1.0, entries, group, 0.0, 16 * n / group
    if backend in ("fsdp2", "hsdp"):
        imbalance = -(-model.rows // group) * group / model.rows
        holders = -(-model.rows // -(-model.rows // group))
    elif backend == "fsdp1":
        holders = min(group, -(-group // model.matrices) + 1)
        pieces = min(entries, -(-entries * holders // group))
    elif backend == "zero3":
        publish = 2.0 * (2 * model.layers + 1) * model.rows
    elif backend == "zero2":
        imbalance = float(model.partitions)
        pieces = min(entries, -(-entries * model.partitions // group) + 1)
        holders = min(group, -(-group // (entries * model.partitions)) + 1)
        publish = 2 * n * (ranks - 1) / ranks
        state = 2 * n + 14 * n / group
    pruned = imbalance * model.pruned / group
    flat = backend == "zero2"
    return Layout(
        group=group,
        imbalance=imbalance,
        pruned=pruned,
        grown=0.0 if flat else pruned,
        sparse=n / group if flat else imbalance * model.sparse / group,
        pieces=pieces,
        holders=holders,
        publish=publish,
        state=state,
    )


# -- costs -------------------------------------------------------------------------------------------------------------


def tie_sums(model: Model) -> list[int]:
    """Bytes of each all-reduce that divides ties in every entry (`selection._tie_ends`), for any number of ranks.

    >>> tie_sums(Model("tiny", 3 * 7 * 2**12, layers=3, rows=64, tokens=1))
    [56, 57344, 57344]
    """
    longest = (model.weights // (model.layers * model.matrices) - 1).bit_length()
    passes = -(-longest // selection._INDEX_BITS)
    return [8 * model.entries] + [8 * model.entries << selection._INDEX_BITS] * passes


def boundary(model: Model, backend: str, ranks: int, fitted: Fitted, assumed: Assumed) -> dict[str, float]:
    """Seconds and megabytes of one boundary of C-GaP that prunes a partition, breaks ties in every entry, grows one.

    The order is that of the engine: the ranks compare their position and masks; select; zero pruned weights and the
    moments of grown ones; publish; compare their masks again.
    """
    where, net = layout(backend, model, ranks), Network(assumed.latency, assumed.bandwidth)
    copies, entries = where.group < ranks, model.entries
    passes = len(selection.PASSES[31])
    counts, ties = forecast.selection_bytes(entries), tie_sums(model)
    select_net = passes * net.reduce_s(counts / passes, where.group) if where.group > 1 else 0.0
    ties_net = sum(net.reduce_s(size, where.group) for size in ties) if where.group > 1 else 0.0
    # 4 numbers for every rank's position; with copies, twice: a sum of a checksum per entry, and a number per rank.
    checks_net = net.gather_s(4 * 8, ranks)
    checks_own = fitted.row * ranks
    if copies:
        sums = net.reduce_s(8 * entries * (model.partitions - 1), where.group) if where.group > 1 else 0.0
        checks_net += 2 * (sums + net.gather_s(8, ranks))
        checks_own += 2 * (fitted.row * ranks + fitted.crc_byte * where.sparse / 8)

    def own(work: Work) -> float:
        zeroed = work.zero_s(where.pruned, where.pieces) + 2 * work.zero_s(
            where.grown, where.pieces if where.grown else 0
        )
        return work.select_s(where.pruned, where.pieces, entries) + zeroed

    return {
        "own_core_s": own(fitted.core),
        "own_accelerator_s": own(accelerator(assumed, fitted.core)),
        "counts_s": select_net,
        "ties_s": ties_net,
        "checks_s": checks_own + checks_net,
        "publish_s": where.publish_s(net, ranks),
        "counts_MB": (counts if where.group > 1 else 0) / 1e6,
        "ties_MB": (sum(ties) if where.group > 1 else 0) / 1e6,
        "publish_MB": where.publish / 1e6,
        # Bytes on every rank if the selection gathered the weights.
        "gather_instead_MB": 4 * model.pruned * (where.group - 1) / where.group / 1e6,
    }


#: Weights at a time of a selection on an accelerator and on a CPU, and bytes of scratch for each: measured on a CPU,
#: 25 MB for 2^18 weights (tests/unit/masks/test_selection.py bounds it), counted for an accelerator.
SCRATCH = {"core": 25e6, "accelerator": 24.0 * selection._DEVICE_CHUNK}


def memory(model: Model, backend: str, ranks: int) -> dict[str, float]:
    """Megabytes on a rank: masks; at a boundary new masks, held keys (at most 2 bits a weight), scratch of a chunk."""
    where = layout(backend, model, ranks)
    own = bitmask.nbytes(math.ceil(where.pruned)) + 4 * where.pruned / selection._FEW
    return {
        # A piece that ends inside a byte still takes a whole last byte.
        "mask_MB": (bitmask.nbytes(math.ceil(where.sparse)) + where.pieces * (model.partitions - 1)) / 1e6,
        "boundary_scratch_MB": (own + SCRATCH["accelerator"] * min(1.0, where.pruned / selection._DEVICE_CHUNK)) / 1e6,
        "counts_scratch_MB": forecast.selection_bytes(model.entries) / 2 / 1e6,
    }


def step_masks(model: Model, backend: str, ranks: int, fitted: Fitted, assumed: Assumed) -> dict[str, float]:
    """Seconds that the post-step hook adds to a step. It runs before the library spreads weights: nothing is sent."""
    where = layout(backend, model, ranks)
    pieces = where.pieces * (model.partitions - 1)
    return {
        "masks_core_s": fitted.core.zero_s(where.sparse, pieces),
        "masks_accelerator_s": accelerator(assumed, fitted.core).zero_s(where.sparse, pieces),
    }


def exchange(
    model: Model, backend: str, ranks: int, fitted: Fitted, assumed: Assumed, density: float = 0.2
) -> dict[str, float]:
    """Seconds of an exchange of parallel GaP, K workers of R ranks each, beyond the boundary (gap_ds/parallel).

    Rank 0 receives a partition tensor by tensor (1 byte per weight for the mask, 4 per kept weight), hashes and writes
    it. It then reads and hashes all K files while the others wait. Each rank reads its pieces; all publish.
    """
    where, net = layout(backend, model, ranks), Network(assumed.latency, assumed.bandwidth)
    entries, workers = model.entries, model.partitions
    size = bitmask.nbytes(model.pruned) + 4 * density * model.pruned
    # Two tensors for each entry, from each rank with a piece of it, one after the other.
    messages = 2 * entries * where.holders * assumed.latency if where.group > 1 else 0.0
    # Four meetings for each entry that is written, one for each that is read.
    meetings = 4 * entries + workers * (entries + 2)
    return {
        "exchange_gather_s": messages + (1 + 4 * density) * model.pruned / assumed.bandwidth * (where.group > 1),
        "exchange_hash_s": (1 + workers) * size * fitted.sha_byte,
        "exchange_files_s": (1 + workers + workers / where.group) * size / assumed.file_bandwidth
        + 2 * workers * where.pieces * assumed.file_open,
        "exchange_meetings_s": meetings * (fitted.row * ranks + net.gather_s(8, ranks))
        + (1 + workers) * fitted.spread * where.group * entries,
        "exchange_publish_s": where.publish_s(net, ranks),
        "exchange_file_MB": size / 1e6,
    }


def row(model: Model, backend: str, ranks: int, fitted: Fitted, assumed: Assumed) -> dict[str, Any]:
    """All figures for one model, backend and number of ranks; times of a boundary on accelerators also in steps."""
    where, step = layout(backend, model, ranks), assumed.step_s(model, ranks)
    at = boundary(model, backend, ranks, fitted, assumed)
    every = step_masks(model, backend, ranks, fitted, assumed)
    swap = exchange(model, backend, ranks, fitted, assumed)
    rest = sum(at[key] for key in ("counts_s", "ties_s", "checks_s", "publish_s"))
    seconds = [value for key, value in swap.items() if key.endswith("_s")]
    return {
        **{"weights": model.name, "backend": backend, "ranks": ranks},
        **{"tokens_per_rank": model.tokens // ranks, "step_s": step, "fits": where.state <= assumed.memory},
        **{"shard_group": where.group, "imbalance": where.imbalance},
        **memory(model, backend, ranks),
        **at,
        **{"boundary_core_s": at["own_core_s"] + rest, "boundary_s": at["own_accelerator_s"] + rest},
        "boundary_steps": (at["own_accelerator_s"] + rest) / step,
        **every,
        "masks_share": every["masks_accelerator_s"] / step,
        **swap,
        **{"exchange_s": sum(seconds), "exchange_steps": sum(seconds) / step},
    }


def rows(fitted: Fitted, assumed: Assumed) -> list[dict[str, Any]]:
    """All models, backends and numbers of ranks."""
    return [row(m, b, r, fitted, assumed) for m in MODELS for b in BACKENDS for r in RANKS]
