"""Time of a training step with the engine, relative to the same step without it, and time of a whole boundary.

    OMP_NUM_THREADS=1 python benchmarks/overhead.py
    OMP_NUM_THREADS=1 python benchmarks/overhead.py --presets base --backends zero2 zero3
    OMP_NUM_THREADS=1 python benchmarks/overhead.py --presets tiny --decide --seconds 120

Every row has fresh processes. One model takes steps A past its GaPEngine, whose hooks then do nothing, and steps B
through it, in the order A B B A, on the same batch. Where a model lies in memory changes its times by 1 to 2 %, so two
copies of it would differ without any engine. The learning rate is 0: the steps past the engine leave pruned weights 0.
`ratio` is the median ratio of neighbouring steps, `interval` its 95 % confidence interval, `cpu_ratio` the same for CPU
time. On a CPU, `own_ms` is the time inside the engine's calls of a step (looks at weights, masks, loss guard,
counting). It scatters far less than whole steps, but excludes the effect of these calls on the caches. These steps have
no boundary. Six boundaries are timed separately, from the end of a step until the next one can begin (`boundary_ms`),
also in steps with the engine (`boundary_steps`). The processes keep the memory that they free (`KEPT_MEMORY`): page
faults took a tenth of a step of preset tiny, and made two thirds of its scatter. fairscale uses CUDA streams; without a
GPU the tests' stand-in replaces them. `--quick` is a size for tests.

With `--decide` steps are timed until the CPU time of all ranks decides if the ratio is at most 1.01: until its interval
lies on one side, or --seconds have passed. Where the masks lie in memory may change it, for as long as they lie there:
so the model is built anew after every few pairs, and the interval is that of the builds' means, by Student's t. It is
looked at three times at most, after ever twice as many builds, and holds at 99 % each time, so that a wrong decision is
below 3 %.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import measure
import torch
import torch.distributed as dist
from torch import nn

sys.path.insert(0, str(measure.ROOT / "examples"))
sys.path.insert(0, str(measure.ROOT / "examples" / "translation"))
sys.path.insert(0, str(measure.ROOT / "benchmarks" / "quality"))

import compare
import model as models
from common import sharding

from gap_ds import GaPEngine

BACKENDS = ("plain", "ddp", "fsdp1", "fsdp2", "fairscale", "zero0", "zero1", "zero2", "zero3")
#: Default rows.
ROWS = {"small": BACKENDS, "base": ("plain", "fsdp2", "zero2", "zero3")}
#: The aim for the ratio, and how often and at which level `--decide` looks at it.
AIM, LOOKS, LEVEL = 1.01, 3, 0.99
#: Pairs of a build, and the fewest builds, with `--decide`.
PAIRS, LEAST = 48, 6
#: Steps through the engine before those that are timed: it looks at a part of the weights in each, and lists the part
#: when it is looked at first.
ROUND = 32
#: glibc's settings by which a process keeps the memory that it frees, and takes no block by mmap.
KEPT_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_TOP_PAD_": str(2**28)}
KEY = ("preset", "backend", "ranks", "tokens", "dtype")
NOTE = "ratio: of neighbouring steps through the engine and past it, median; interval: of that median, at 95 %"
VOCABULARY = 6000


def main() -> None:
    parser = measure.parser(__doc__)
    parser.add_argument("--presets", nargs="+", choices=list(models.PRESETS), default=list(ROWS))
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, help="default: all for small, four for base")
    parser.add_argument("--ranks", type=int, default=2, help="of all backends except plain, which has 1")
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--tokens", type=int, default=512, help="target tokens of a step of one rank")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--seconds", type=float, default=20, help="of timed steps for each row")
    parser.add_argument("--pairs", type=int, nargs=2, default=[20, 200], help="fewest and most timed pairs of steps")
    parser.add_argument("--decide", action="store_true", help="go on until CPU time decides about the aim")
    parser.add_argument("--boundaries", type=int, default=6, help="timed apart; a multiple of 3")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row:
        return one(argparse.Namespace(**json.loads(args.row)))
    if args.quick:
        args.presets, args.tokens, args.pairs, args.boundaries = ["tiny"], 64, [3, 3], 3
        args.backends = args.backends or ["plain"]
    failed = []
    for preset in args.presets:
        for backend in args.backends or (BACKENDS if args.decide else ROWS.get(preset, ("plain",))):
            row = argparse.Namespace(**vars(args) | {"preset": preset, "backend": backend})
            row.ranks = 1 if backend == "plain" else args.ranks
            try:
                measure.add("overhead", [launch(row)], args.out, NOTE, KEY, command(row))
            except subprocess.CalledProcessError as error:
                failed.append(f"{preset} {backend}: status {error.returncode}")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def launch(args: argparse.Namespace) -> dict[str, Any]:
    """Make a row in fresh processes."""
    with tempfile.TemporaryDirectory() as name:
        out = Path(name) / "row.json"
        words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(args.ranks)]
        words = [] if args.backend == "plain" else words
        row = json.dumps({**vars(args), "out": str(out)})
        subprocess.run([sys.executable, *words, __file__, "--row", row], check=True, env=os.environ | KEPT_MEMORY)
        found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
        return found


def command(args: argparse.Namespace) -> str:
    """Return the command line of this row."""
    words = ["--presets", args.preset, "--backends", args.backend, "--ranks", args.ranks, "--sparsity", args.sparsity]
    words += ["--tokens", args.tokens, "--dtype", args.dtype, "--seconds", args.seconds, "--pairs", *args.pairs]
    words += ["--decide"] if args.decide else []
    return "python benchmarks/overhead.py " + " ".join(map(str, [*words, "--boundaries", args.boundaries]))


def one(args: argparse.Namespace) -> None:
    """Time one row, on every rank; rank 0 writes it."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    device = start(args.backend)
    batch = tokens(args, device)
    barrier = dist.barrier if dist.is_initialized() else lambda: None
    found = until_decided(args, device, batch, barrier) if args.decide else timed(args, device, batch, barrier)
    result = summary(args, found)
    gc.collect()
    if args.boundaries:
        seconds = boundaries(args, device, batch)
        result |= {"boundary_ms": round(1e3 * statistics.median(seconds), 2)}
        result |= {"boundary_steps": round(1e3 * statistics.median(seconds) / result["engine_ms"], 3)}
    if not dist.is_initialized() or dist.get_rank() == 0:
        Path(args.out).write_text(json.dumps(result), encoding="utf-8")
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


@dataclass
class Times:
    """Wall and CPU seconds of neighbouring steps, and seconds inside the engine's calls of a step."""

    bare: list[tuple[float, float]] = field(default_factory=list)
    engine: list[tuple[float, float]] = field(default_factory=list)
    own: list[float] = field(default_factory=list)
    #: Trimmed mean of the logarithms of the ratios of CPU times, over the ranks, for each build of the model.
    builds: list[float] = field(default_factory=list)

    def ratios(self, clock: int) -> list[float]:
        """Return the ratios of neighbouring steps. clock: 0 wall, 1 CPU."""
        return [b[clock] / a[clock] for a, b in zip(self.bare, self.engine, strict=True)]

    def add(self, other: Times) -> None:
        """Add those of another build."""
        for name, values in vars(other).items():
            getattr(self, name).extend(values)


def timed(
    args: argparse.Namespace,
    device: torch.device,
    batch: dict[str, Any],
    barrier: Callable[[], Any],
    pairs: int | None = None,
) -> Times:
    """Build a model and time pairs of steps. pairs: None for as many as fit the time."""
    step, engine = build(args, device, sparse=True, lr=0.0)
    own = own_seconds(engine) if device.type == "cpu" else []
    bare = past(engine, args, device)
    works = {"bare": lambda: bare(batch), "engine": lambda: step(batch)}

    def before() -> None:
        engine._updates._watched.mark()  # a step past the engine is no change that it has missed
        barrier()

    for _ in range(min(ROUND, args.pairs[0])):
        step(batch)
    warm = measure.in_turns(works, min(4, args.pairs[0]), before)
    pairs = pairs or agreed_pairs(args, sum(map(statistics.median, warm.values())), device)
    times = Times(**measure.in_turns(works, pairs, before, measure.both_seconds), own=own[-pairs - 1 : -1])
    logarithms, cut = sorted(map(math.log, times.ratios(1))), pairs // 5
    middle = statistics.mean(logarithms[cut : pairs - cut])  # without a fifth at either end: other load
    times.builds.append(over_ranks(middle, device))
    return times


def over_ranks(value: float, device: torch.device) -> float:
    """Return the mean over the ranks."""
    if not dist.is_initialized():
        return value
    total = torch.tensor(value, dtype=torch.float32, device=device)
    dist.all_reduce(total)
    return float(total) / dist.get_world_size()


def until_decided(
    args: argparse.Namespace, device: torch.device, batch: dict[str, Any], barrier: Callable[[], Any]
) -> Times:
    """Build and time pairs until CPU time decides, or the time is over by the clock of rank 0."""
    times, most = Times(), LEAST
    started = time.perf_counter()
    while True:
        times.add(timed(args, device, batch, barrier, min(PAIRS, args.pairs[1])))
        gc.collect()
        done = len(times.builds)
        if done == 2:
            most = max(LEAST, int(args.seconds / (time.perf_counter() - started) * done))
        looked_at = done in {most // 2**look for look in range(LOOKS)} and done >= LEAST
        ended = torch.tensor(done >= most or (looked_at and decision(times.builds) != "undecided"), device=device)
        if dist.is_initialized():
            dist.broadcast(ended, 0)
        if ended:
            return times


def own_seconds(engine: GaPEngine) -> list[float]:
    """Return a list that collects the seconds inside the engine's calls, one number for every step from now on."""
    steps = [0.0]

    def timed(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any) -> Any:
            started = time.perf_counter()
            try:
                return call(*args)
            finally:
                steps[-1] += time.perf_counter() - started

        return wrapper

    engine._updates._look_first = timed(engine._updates._look_first)
    engine._updates._mask = timed(engine._updates._mask)
    engine.run.guard.accepts = timed(engine.run.guard.accepts)
    count = timed(engine.after_step)

    def ended() -> bool:
        updated = count()
        steps.append(0.0)
        return bool(updated)

    engine.after_step = ended
    return steps


def agreed_pairs(args: argparse.Namespace, pair: float, device: torch.device) -> int:
    """Return the number of pairs of steps, of `pair` seconds each, that fit the time. Rank 0 decides."""
    least, most = args.pairs
    number = torch.tensor(min(most, max(least, int(args.seconds / pair))), device=device)
    if dist.is_initialized():
        dist.broadcast(number, 0)
    return int(number)


def of_builds(builds: Sequence[float], level: float) -> tuple[float, float]:
    """Return the confidence interval of the ratio by Student's t, from the logarithms of the builds."""
    low, high = compare.interval(builds, level)
    return math.exp(low), math.exp(high)


def decision(builds: Sequence[float]) -> str:
    """Return whether the ratio is at most the aim: "yes" or "no" if the whole interval says so, else "undecided"."""
    low, high = of_builds(builds, LEVEL)
    return "yes" if high <= AIM else "no" if low > AIM else "undecided"


def boundaries(args: argparse.Namespace, device: torch.device, batch: dict[str, Any]) -> list[float]:
    """Time whole boundaries between cyclic phases of one step, in seconds. Drops the first, which loads libraries."""
    step, engine = build(args, device, sparse=True, phase_steps=1, rounds=args.boundaries // 3)
    crossed: list[float] = []
    count = engine.after_step

    def timed() -> None:
        before = engine.phase
        seconds = measure.seconds(count)
        if engine.phase is not before:
            crossed.append(seconds)

    engine.after_step = timed
    for _ in range(args.boundaries):
        step(batch)
    assert len(crossed) == args.boundaries, f"{len(crossed)} boundaries were crossed"
    return crossed[1:]


def start(backend: str) -> torch.device:
    """Join the launcher's processes, if there are any."""
    device = measure.device()
    if backend.startswith("zero"):
        import deepspeed

        deepspeed.init_distributed()
    elif "WORLD_SIZE" in os.environ:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def build(
    args: argparse.Namespace,
    device: torch.device,
    sparse: bool,
    phase_steps: int = 10**9,
    rounds: int = 1,
    lr: float = 1e-4,
) -> tuple[Callable[[dict[str, Any]], None], Any]:
    """Return one training step of a fresh model, bare or inside the engine, and the object that trains it."""
    torch.manual_seed(0)
    model = models.build_model(models.build_config(args.preset, vocab_size=VOCABULARY)).to(device)
    models.choose_attention(model, device)
    if not args.backend.startswith("zero"):
        model = wrap(model, args.backend, device)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=True)
    # The default is one endless phase with two of three partitions sparse, as in most of a cyclic run.
    gap = {"sparsity": args.sparsity, "partitions": 3, "phase_steps": phase_steps, "rounds": rounds}
    gap["finetune_steps"] = 1
    trained: Any = model
    if args.backend.startswith("zero"):
        import deepspeed

        config = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_clipping": 0.0,
            "zero_optimization": {"stage": int(args.backend[-1])},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 10**9,
        }
        if args.dtype == "bf16":
            config |= {"bf16": {"enabled": True}, "data_types": {"buffer_dtype": "bf16"}}
        trained, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        if sparse:
            trained = GaPEngine(trained, gap)
    else:
        trained = GaPEngine(model, gap, optimizer=optimizer) if sparse else Bare(model, optimizer)
    return step_of(trained, args, device), trained


def past(engine: GaPEngine, args: argparse.Namespace, device: torch.device) -> Callable[[dict[str, Any]], None]:
    """Return one training step past an engine, whose hooks do nothing in it."""
    model, optimizers = engine.run.backend.forward, engine.run.backend.optimizers
    bare: Any = model if args.backend.startswith("zero") else Bare(model, engine.optimizer)
    step = step_of(bare, args, device)

    def quiet(batch: dict[str, Any]) -> None:
        optimizers.quiet = True
        step(batch)
        optimizers.quiet = False

    return quiet


def step_of(trained: Any, args: argparse.Namespace, device: torch.device) -> Callable[[dict[str, Any]], None]:
    """Return one training step of a model, bare or inside an engine."""
    autocast = args.dtype == "bf16" and not args.backend.startswith("zero")

    def step(batch: dict[str, Any]) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            logits = trained(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False).logits
            loss = models.loss(logits, batch["labels"], smoothing=0.1, denominator=args.tokens)
        trained.backward(loss)
        trained.step()

    return step


def wrap(model: nn.Module, backend: str, device: torch.device) -> nn.Module:
    """Shard the model as the examples do; fairscale on a CPU as the tests do."""
    if backend != "fairscale" or device.type == "cuda":
        return sharding.wrap(model, "none" if backend == "plain" else backend, device)
    sys.path.insert(0, str(measure.ROOT / "tests" / "sharding"))
    import worker_fairscale

    worker_fairscale.without_cuda()
    for stack in (model.model.encoder.layers, model.model.decoder.layers):
        for i, layer in enumerate(stack):
            stack[i] = worker_fairscale.FullyShardedDataParallel(layer, compute_device=device, bucket_cap_mb=0)
    return worker_fairscale.FullyShardedDataParallel(model, compute_device=device, bucket_cap_mb=0)


class Bare:
    """A training loop without the engine."""

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer

    def __call__(self, **batch: Any) -> Any:
        return self.model(**batch)

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def tokens(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Return a batch of 16-token sentences (B, 16)."""
    generator = torch.Generator().manual_seed(0)
    shape = (args.tokens // 16, 16)
    ids = [torch.randint(4, VOCABULARY, shape, generator=generator).to(device) for _ in range(3)]
    return {"input_ids": ids[0], "decoder_input_ids": ids[1], "labels": ids[2]}


def summary(args: argparse.Namespace, times: Times) -> dict[str, Any]:
    """Return the figures of the steps as a row."""
    ratios, cpu = times.ratios(0), times.ratios(1)
    wall = {name: [wall for wall, _ in getattr(times, name)] for name in ("bare", "engine")}
    figures = measure.compared(wall, "bare")
    result = {
        "preset": args.preset,
        "backend": args.backend,
        "ranks": dist.get_world_size() if dist.is_initialized() else 1,
        "tokens": args.tokens,
        "dtype": args.dtype,
        "pairs": len(ratios),
        "bare_ms": figures["bare"]["ms"],
        "engine_ms": figures["engine"]["ms"],
        "ratio": round(statistics.median(ratios), 4),
        "interval": _rounded(measure.interval(ratios)),
        "quartiles": figures["engine"]["quartiles"],
        "cpu_ratio": None,
        "cpu_interval": None,
    }
    if times.own:
        ms = 1e3 * statistics.median(times.own)
        result |= {"cpu_ratio": round(statistics.median(cpu), 4), "cpu_interval": _rounded(measure.interval(cpu))}
        result |= {"own_ms": round(ms, 3), "own_share": round(ms / result["engine_ms"], 5)}
    if args.decide:
        result["cpu_ratio"] = round(math.exp(statistics.mean(times.builds)), 4)
        result["cpu_interval"] = _rounded(of_builds(times.builds, LEVEL))
        result |= {"builds": len(times.builds), "decided": decision(times.builds)}
    return result


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(value, 4) for value in values]


if __name__ == "__main__":
    main()
