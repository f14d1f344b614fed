"""The shipped methods, one record each. To add one, append its record to `METHODS`; no other list has their names.

>>> from gap_ds.method.config import GaPConfig
>>> from gap_ds.method.schedule import build
>>> def show(method, worker=0, **settings):  # (steps, dense partitions) of each phase
...     times = {"phase_steps": 4, "finetune_steps": 2}
...     config = GaPConfig.load({"method": method, "sparsity": 0.8, **times, **settings})
...     print(f"{method:8}", *((phase.steps, sorted(phase.dense)) for phase in build(config, worker=worker).phases))
>>> show("cyclic", partitions=3, rounds=1)
cyclic   (4, [0]) (4, [1]) (4, [2]) (2, [])
>>> show("cyclic", partitions=3, rounds=2, partition_order="random")
cyclic   (4, [0]) (4, [2]) (4, [0]) (4, [1]) (4, [2]) (4, [1]) (2, [])
>>> show("parallel", partitions=3, rounds=2)
parallel (4, [0]) (4, [0]) (2, [])
>>> show("parallel", partitions=3, rounds=2, worker=1)
parallel (4, [1]) (4, [1]) (0, [])
>>> show("dsd", rounds=2)
dsd      (4, [0]) (4, []) (4, [0]) (4, []) (2, [])
>>> show("acdc", rounds=2, phase_steps=1, dense_steps=3)
acdc     (3, [0]) (1, [0]) (1, []) (1, [0]) (1, []) (2, [])
>>> show("one_shot")
one_shot (4, [0]) (2, [])
>>> show("gradual", update_steps=1)
gradual  (4, [0]) (2, [])
>>> show("granet", update_steps=1)
granet   (4, [0]) (2, [])
>>> show("rigl", update_steps=1)
rigl     (4, []) (2, [])
>>> show("set", update_steps=1)
set      (4, []) (2, [])
>>> show("static", partitions=3, rounds=1)
static   (4, []) (4, []) (4, []) (2, [])
>>> show("dense", partitions=3, rounds=1, sparsity=0.0)
dense    (4, [0, 1, 2]) (4, [0, 1, 2]) (4, [0, 1, 2]) (2, [0, 1, 2])
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import replace

from gap_ds.method.phases import Budget, Phase
from gap_ds.method.rules import (
    DropAndGrow,
    Keep,
    Method,
    Settings,
    Update,
    drop_count,
    first_mask,
    grow_and_prune,
    prune_and_grow,
)

# -- dense partitions, one exploring phase after the other -------------------------------------------------------------


def _none(config: Settings, worker: int) -> Iterator[frozenset[int]]:
    return itertools.repeat(frozenset())


def _all(config: Settings, worker: int) -> Iterator[frozenset[int]]:
    return itertools.repeat(frozenset(range(config.kappa)))


def _all_then_none(config: Settings, worker: int) -> Iterator[frozenset[int]]:
    return itertools.cycle((frozenset(range(config.kappa)), frozenset()))


def _of_worker(config: Settings, worker: int) -> Iterator[frozenset[int]]:
    return itertools.repeat(frozenset((worker,)))


def _one_by_one(config: Settings, worker: int) -> Iterator[frozenset[int]]:
    if config.partition_order == "cyclic":
        yield from (frozenset((k % config.kappa,)) for k in itertools.count())
    k, rng = 0, random.Random(f"order {config.seed}")
    while True:
        yield frozenset((k,))
        # Never the same partition twice in a row: it is dense already.
        k = rng.choice([other for other in range(config.kappa) if other != k])


# -- records -----------------------------------------------------------------------------------------------------------


def _drop_and_grow(config: Settings, entry: Budget, before: Phase | None, after: Phase, step: int) -> Update:
    """Masks of a fixed size that move at the updates of the exploring phase."""
    if before is None:
        return first_mask(config, entry)
    if before is not after:
        return Keep()
    drop = drop_count(config, entry, after, step)
    return DropAndGrow(entry.keep, drop, by_gradient=config.record.needs_gradient) if drop else Keep()


def _prune_and_regrow(config: Settings, entry: Budget, before: Phase | None, after: Phase, step: int) -> Update:
    """Gradual pruning, in which every update also replaces some of the weights that it leaves."""
    if before is not after or not after.prunes(entry.partition, step):
        return grow_and_prune(config, entry, before, after, step)
    keep = after.budget(entry, step)
    drop = drop_count(config, entry, after, step, keep)
    return prune_and_grow(config, keep, drop, by_gradient=True)


#: Of all methods that prune.
_PRUNED = frozenset({"distribution", "pattern", "lr_density_power"})
_GROWN = frozenset({"regrow_moments", "regrow_warmup"})

CYCLIC = Method(
    name="cyclic",
    summary="cyclic GaP (C-GaP): the partitions take turns being dense",
    source="Ma et al., Effective Model Sparsification by Scheduled Grow-and-Prune Methods, ICLR 2022, "
    "arXiv 2106.09857, section 3.1",
    reads=_PRUNED
    | set("partitions partition_assignment partition_order rounds dense update prune_ramp".split())
    | set("target grow grow_share mask_init optimizer_state regrow regrow_storage lr_restart".split())
    | _GROWN,
    dense=_one_by_one,
    rule=grow_and_prune,
    phases_per_round=None,
    least_partitions=2,
    global_budget=True,
)

PARALLEL = replace(
    CYCLIC,
    name="parallel",
    summary="parallel GaP (P-GaP): worker I trains with partition I dense, and the workers exchange partitions",
    source="Ma et al., ICLR 2022, arXiv 2106.09857, section 3.2",
    # Not "regrow": a worker grows at once what it has pruned and published, so last values would undo the pruning.
    reads=CYCLIC.reads - {"partition_order", "regrow", "regrow_storage"} | {"unpartitioned"},
    dense=_of_worker,
    phases_per_round=1,
    has_workers=True,
)

DSD = Method(
    name="dsd",
    summary="C-GaP with one partition: a dense and a sparse phase in each round",
    source="Han et al., DSD: Dense-Sparse-Dense Training for Deep Neural Networks, ICLR 2017, arXiv 1607.04381; "
    "its last phase is dense, here it is sparse",
    reads=_PRUNED
    | _GROWN
    | set("rounds dense update prune_ramp optimizer_state regrow regrow_storage lr_restart".split()),
    dense=_all_then_none,
    rule=grow_and_prune,
    phases_per_round=2,
    global_budget=True,
)

ACDC = replace(
    DSD,
    name="acdc",
    summary="like dsd, with short phases",
    source="Peste et al., AC/DC: Alternating Compressed/DeCompressed Training of Deep Neural Networks, NeurIPS 2021, "
    "arXiv 2106.12379",
    reads=DSD.reads - {"lr_restart"},
)

ONE_SHOT = Method(
    name="one_shot",
    summary="train dense, prune once, retrain",
    source="Han et al., Learning both Weights and Connections for Efficient Neural Networks, NIPS 2015, "
    "arXiv 1506.02626",
    reads=_PRUNED | {"optimizer_state", "lr_restart"},
    dense=_all,
    rule=grow_and_prune,
    global_budget=True,
)

GRADUAL = replace(
    ONE_SHOT,
    name="gradual",
    summary="prune little by little during one phase",
    source="Zhu and Gupta, To prune, or not to prune, 2017, arXiv 1710.01878",
    reads=ONE_SHOT.reads | {"dense", "update"},
    updates=True,
)

#: In the paper an update prunes by one threshold over all layers and then replaces a part of what is left; here one
#: selection keeps the rest of it, and each entry has its budget (with distribution="global" a partition has one). The
#: paper's layers begin sparse (ERK); these are dense.
GRANET = replace(
    GRADUAL,
    name="granet",
    summary="gradual pruning, with some weights regrown by gradient at every update",
    source="Liu et al., Sparse Training via Boosting Pruning Plasticity with Neuroregeneration, NeurIPS 2021, "
    "arXiv 2106.10404, algorithm 1",
    reads=GRADUAL.reads | _GROWN | {"drop_fraction"},
    rule=_prune_and_regrow,
    needs_gradient=True,
)

#: Grows by the gradient of the step before the update, over all micro-batches and ranks, clipped if the run clips. In
#: the paper an update takes the place of an optimizer step; here it follows one.
RIGL = Method(
    name="rigl",
    summary="drop by magnitude, grow by gradient",
    source="Evci et al., Rigging the Lottery: Making All Tickets Winners, ICML 2020, arXiv 1911.11134, algorithm 1",
    reads=_PRUNED | _GROWN | set("update drop_fraction mask_init optimizer_state lr_restart".split()),
    dense=_none,
    rule=_drop_and_grow,
    updates=True,
    needs_gradient=True,
)

#: In the paper an update follows each epoch and replaces a constant fraction of the positive weights (the smallest) and
#: of the negative ones (the largest). Here, as where RigL's paper compares with it, the magnitude decides whatever the
#: sign, and the fraction falls by RigL's cosine; `update_epochs: 1` updates after each epoch.
SET = replace(
    RIGL,
    name="set",
    summary="drop by magnitude, grow at random",
    source="Mocanu et al., Scalable training of artificial neural networks with adaptive sparse connectivity inspired "
    "by network science, Nature Communications 9, 2383, 2018",
    needs_gradient=False,
)

#: The phases of cyclic, so that the learning rate restarts at the same steps.
STATIC = Method(
    name="static",
    summary="fixed masks",
    source="",
    reads=_PRUNED | set("partitions partition_assignment rounds mask_init lr_restart".split()),
    dense=_none,
    rule=grow_and_prune,
    phases_per_round=None,
    inherits_masks=True,
)

DENSE = Method(
    name="dense",
    summary="no masks",
    source="",
    reads=frozenset({"partitions", "rounds", "dense", "lr_restart"}),
    dense=_all,
    rule=grow_and_prune,
    phases_per_round=None,
    prunes=False,
)

METHODS = {
    method.name: method for method in (CYCLIC, PARALLEL, DSD, ACDC, ONE_SHOT, GRADUAL, GRANET, RIGL, SET, STATIC, DENSE)
}
