"""A run: configs, folder, consistency of checkpoints, and the engine around the model."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from common import runtime
from common.arguments import RunArguments
from gap_ds import GaPConfig, GaPEngine, ParallelWorker, checkpoint
from gap_ds.method import schedule
from gap_ds.method.plan import clean_name
from gap_ds.training import boundary_losses, history

log = logging.getLogger("examples")

Arguments = TypeVar("Arguments", bound=RunArguments)

#: Files that a run writes and --overwrite deletes; other files stay. The exchange folder of parallel GaP is not among
#: them: other workers may be using it already.
FILES = (
    *(
        "results.json",
        "metrics.jsonl",
        history.NAME,
        boundary_losses.NAME,
        "model",
        "model.partial",
        "checkpoints",
        "tokenizer",
    ),
    "tensorboard",
)

# -- configs -----------------------------------------------------------------------------------------------------------


def gap_config(args: RunArguments) -> GaPConfig:
    """Return the GaP config of this run."""
    gap = GaPConfig.load(args.gap_config)
    return gap.as_dense() if args.dense else gap


def gap_worker(
    args: Arguments, gap: GaPConfig, same: Iterable[str], script: str
) -> tuple[Arguments, ParallelWorker | None]:
    """Return the arguments with the worker's folder, and the worker of parallel GaP. Other methods: (args, None).

    Args:
        same: names of arguments that must be equal on all workers and are not in the signature of the config.
    Raises:
        ValueError: the config has no such worker, or the exchange folder belongs to an earlier run.
    """
    if gap.method != "parallel":
        for name in ("gap_worker", "exchange"):
            if getattr(args, name) is not None:
                raise ValueError(f'--{name.replace("_", "-")}: has no effect with method="{gap.method}". Remove it.')
        return args, None
    if args.gap_worker is None:
        raise ValueError(
            'method="parallel": every worker is a separate job. Start all by gap-ds parallel --workers '
            f"{gap.kappa} -- {script} ..., or each by --gap-worker 0, 1, ..."
        )
    if args.gap_worker >= gap.kappa:
        raise ValueError(f"--gap-worker {args.gap_worker}: must be below {gap.kappa}, the number of partitions.")
    folder = Path(args.output_dir)
    shared = {name: getattr(args, name) for name in same} | _arithmetic(args)
    text = "|".join(f"{name}:{value}" for name, value in sorted(shared.items()))
    text = text if len(text) <= 1000 else hashlib.sha256(text.encode()).hexdigest()
    exchange = args.exchange or str(folder / "exchange")
    worker = ParallelWorker(args.gap_worker, exchange, args.exchange_timeout, text, args.resume)
    if not args.resume and worker.has_published():
        raise ValueError(
            f"exchange={worker.shown!r}: worker {worker.index} has published there, in a run before. Go on with that "
            "run by --resume; or start afresh in another --output-dir or --exchange, or delete that folder when no "
            "worker uses it. --overwrite leaves it alone, because the other workers may have begun."
        )
    return replace(args, output_dir=str(folder / f"worker_{args.gap_worker}")), worker


def _arithmetic(args: RunArguments) -> dict[str, Any]:
    """Return the settings that change the numbers of a run by more than rounding, from arguments and DeepSpeed config.

    Backend and number of ranks are not among them: workers may differ in both, also after a restart (--portable). The
    number of micro-batches in a step over all ranks is.
    """
    config = {} if args.deepspeed_config is None else _read_deepspeed(args.deepspeed_config)
    sections = {name: config.get(name) for name in ("bf16", "bfloat16", "fp16", "torch_autocast")}
    enabled = [name for name, section in sections.items() if isinstance(section, dict) and section.get("enabled")]
    return {
        "precision": "+".join(enabled) or "fp32",
        "gradient_clipping": config.get("gradient_clipping", args.gradient_clipping),
        "accumulation x ranks": args.accumulation * int(os.environ.get("WORLD_SIZE", "1")),
    }


def deepspeed_config(args: RunArguments, batch_flag: str) -> dict[str, Any] | None:
    """Return the DeepSpeed config of this run, completed from the arguments; None without --deepspeed_config.

    Args:
        batch_flag: the example's argument for the size of a batch.
    Raises:
        ValueError: the config contradicts the arguments.
    """
    if args.deepspeed_config is None:
        return None
    origin, config = f"--deepspeed_config {args.deepspeed_config}", _read_deepspeed(args.deepspeed_config)
    for key, instead in (("optimizer", "--lr"), ("scheduler", "--lr-schedule"), ("train_batch_size", batch_flag)):
        if key in config:
            raise ValueError(f'{origin}: "{key}" would have no effect. Remove it, and set {instead}.')
    if (given := config.get("gradient_accumulation_steps", 1)) not in (1, "auto", args.accumulation):
        raise ValueError(
            f"{origin}: gradient_accumulation_steps={given}, but --accumulation {args.accumulation}: set both alike."
        )
    config["gradient_accumulation_steps"] = args.accumulation
    config["train_micro_batch_size_per_gpu"] = 1  # required by DeepSpeed; the example cuts its batches itself
    if auto := [key for key, value in _items(config) if value == "auto"]:
        raise ValueError(f'{origin}: {auto[0]}="auto" is for the Trainer of transformers. Set a value, or remove it.')
    return config


def _read_deepspeed(path: str) -> dict[str, Any]:
    """Read a DeepSpeed config. ValueError if the file has no JSON object."""
    origin = f"--deepspeed_config {path}"
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{origin}: cannot be read as JSON ({error}). Set another file (configs/ds).") from None
    if not isinstance(config, dict):
        raise ValueError(f"{origin}: holds a {type(config).__name__}, must hold an object. Set another file.")
    return config


def _items(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield all settings of a config, nested ones as "section.key"."""
    for key, value in config.items():
        yield key, value
        if isinstance(value, dict):
            yield from ((f"{key}.{inner}", setting) for inner, setting in _items(value))


# -- the folder --------------------------------------------------------------------------------------------------------


def prepare_folder(args: RunArguments) -> tuple[Path, bool]:
    """Return the run's folder, and True to continue from a checkpoint. ValueError where that was not requested."""
    folder = Path(args.output_dir)
    if (folder / "results.json").exists() and args.resume and args.gap_worker is not None:
        if runtime.rank() == 0:
            print(f"worker {args.gap_worker}: was done before.")
        runtime.end_processes()
        raise SystemExit(0)
    finished, begun = (folder / "results.json").exists(), (folder / "metrics.jsonl").exists()
    saved = bool(checkpoint.candidates(folder / "checkpoints"))
    runtime.barrier()
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir={args.output_dir!r}: is a file, must be a folder. Set --output-dir.")
    if finished and not args.overwrite:
        raise ValueError(
            f"output_dir={args.output_dir!r}: holds a finished run. Start afresh with --overwrite, or set another."
        )
    if (begun or saved) and not (args.resume or args.overwrite):
        raise ValueError(
            f"output_dir={args.output_dir!r}: holds an unfinished run. Go on with --resume, start afresh with "
            "--overwrite, or set another."
        )
    if runtime.rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        for path in (folder / name for name in FILES if args.overwrite):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        if args.resume and not saved:
            log.info("no checkpoint in %s yet: starting at step 0", folder / "checkpoints")
    runtime.barrier()
    return folder, args.resume and saved


def write_results(folder: Path, results: dict[str, Any]) -> None:
    """Write results.json, the mark of a finished run. The file is whole or absent."""
    (folder / "results.json.partial").write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", "utf-8")
    (folder / "results.json.partial").replace(folder / "results.json")


def figures(args: RunArguments, engine: GaPEngine, seconds: float, first_step: int) -> dict[str, Any]:
    """Return the cost figures of a run."""
    mean_density = engine.schedule.mean_density(*engine.plan.per_partition(), engine.applied_steps)
    return {
        "signature": engine.signature,
        "config": engine.config.model_dump(exclude_unset=True),
        "applied_steps": engine.applied_steps,
        "mean_density": mean_density,
        "training_flops": engine.plan.training_flops(mean_density),
        "dense": args.dense,
        "train_seconds": round(seconds, 1),
        "trained_from_step": first_step,
        "ranks": runtime.world_size(),
        "torch": torch.__version__,
        "arguments": asdict(args),
    }


def end_worker(index: int, engine: GaPEngine, folder: Path, figures: dict[str, Any]) -> int:
    """End the run of a worker that only explores. Returns the exit status."""
    if runtime.rank() == 0:
        print(f"worker {index}: done after {engine.applied_steps} steps.")
        write_results(folder, {"worker": index, **figures})
    runtime.end_processes()
    return 0


# -- checkpoints -------------------------------------------------------------------------------------------------------


def begin(args: RunArguments, fixed: Sequence[str], rows: int) -> dict[str, Any]:
    """Return the state of a run before its first step, as saved in checkpoints.

    "batches" counts the data steps, which exceed the applied steps where fp16 overflowed. "run" contains the settings
    that a resumed run must keep; the engine compares plan and schedule itself. The micro-batches of a step may be
    spread differently over ranks, if their total stays the same.

    Args:
        fixed: names of the arguments that a resumed run must keep.
        rows: number of rows of the training set.
    """
    of_all = {"gradient_clipping": args.gradient_clipping}
    of_all |= {"accumulation x ranks": args.accumulation * runtime.world_size()}
    run = {"rows": rows, **{name: getattr(args, name) for name in fixed}, **of_all}
    return {"batches": 0, "ranks": runtime.world_size(), "run": run}


def resume(engine: GaPEngine, folder: Path, state: dict[str, Any], seed: int) -> dict[str, Any]:
    """Load the newest checkpoint and return the state saved with it. ValueError if another run saved it."""
    saved = same_run(state, engine.load_checkpoint(folder / "checkpoints"))
    if saved["ranks"] != state["ranks"]:
        # The saved random states belong to other ranks. Draw new ones that differ between ranks and from earlier steps.
        sequence = np.random.SeedSequence((seed, state["ranks"], runtime.rank(), engine.applied_steps))
        runtime.seed_everything(int(sequence.generate_state(1)[0]))
    return {**saved, "ranks": state["ranks"]}


def same_run(now: dict[str, Any], saved: Any) -> dict[str, Any]:
    """Return the state saved with a checkpoint. ValueError if a run with other settings than `now` saved it."""
    was = saved["run"] if isinstance(saved, dict) and "run" in saved else {}
    if changed := [
        f"{key}={was.get(key)!r} (now {value!r})" for key, value in now["run"].items() if was.get(key) != value
    ]:
        raise ValueError(
            f"the checkpoint was written with {', '.join(changed)}. Restore them, or start in a new folder."
        )
    return saved


def save(args: RunArguments, engine: GaPEngine, folder: Path, state: dict[str, Any]) -> None:
    """Save a checkpoint. The oldest is deleted once this one is complete."""
    engine.save_checkpoint(folder, client_state=state, keep=args.keep_checkpoints, portable=args.portable)


# -- the engine --------------------------------------------------------------------------------------------------------


def groups(model: nn.Module, undecayed: set[str], weight_decay: float) -> list[dict[str, Any]]:
    """Return two parameter groups of the optimizer: with weight decay, and without (norms and biases)."""
    named = [(clean_name(name).removeprefix("module."), p) for name, p in model.named_parameters() if p.requires_grad]
    return [
        {"params": [p for name, p in named if name not in undecayed], "weight_decay": weight_decay},
        {"params": [p for name, p in named if name in undecayed], "weight_decay": 0.0},
    ]


def build_engine(
    args: RunArguments,
    gap: GaPConfig,
    worker: ParallelWorker | None,
    deepspeed: dict[str, Any] | None,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps_per_epoch: int,
    shape: Callable[[int, int, int], float],
    optimizer_state: dict[str, Any] | None = None,
) -> GaPEngine:
    """Build the engine over DeepSpeed, or over a model that is already wrapped. `shape` as in `learning_rate`."""
    built: list[
        GaPEngine
    ] = []  # filled below: the learning rate needs the engine's phase, and the engine needs the scheduler
    relative = learning_rate(gap, steps_per_epoch, args.warmup_steps, shape, lambda: built[0].phase if built else None)
    lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, relative)
    same: dict[str, Any] = {
        **{"steps_per_epoch": steps_per_epoch, "worker": worker, "optimizer": optimizer, "lr_scheduler": lr_scheduler},
        **{"history": Path(args.output_dir, history.NAME), "optimizer_state": optimizer_state},
    }
    if deepspeed is not None:
        built.append(GaPEngine.initialize(model=model, config=deepspeed, gap_config=gap, **same))
    else:
        loop = {"gradient_accumulation_steps": args.accumulation, "gradient_clipping": args.gradient_clipping}
        built.append(GaPEngine(model, gap, **loop, **same))
    return built[0]


def learning_rate(
    gap: GaPConfig,
    steps_per_epoch: int,
    warmup_steps: int,
    shape: Callable[[int, int, int], float],
    phase: Callable[[], schedule.Phase | None],
) -> Callable[[int], float]:
    """Return a function from step to learning rate relative to its peak, over the run, or over each phase (lr_restart).

    All workers of parallel GaP follow the learning rate of worker 0, although the others end before it.

    Args:
        warmup_steps: steps of a linear rise from the first step on, at most half of the phase or run.
        shape: (step, warm-up steps, total steps) -> learning rate after the warm-up.
    """
    whole = schedule.build(gap, steps_per_epoch)

    def relative(step: int) -> float:
        length = (phase() or whole.phases[0]).steps if gap.lr_restart else whole.total_steps
        warmup = min(warmup_steps, max(1, length // 2))
        return (step + 1) / warmup if step < warmup else shape(step, warmup, length)

    return relative


def inverse_sqrt(step: int, warmup: int, length: int) -> float:
    """Learning rate that falls with the square root of the step.

    >>> inverse_sqrt(4, 4, 20), inverse_sqrt(15, 4, 20), inverse_sqrt(0, 0, 20)
    (0.8944271909999159, 0.5, 1.0)
    """
    return float((max(1, warmup) / (step + 1)) ** 0.5)


def linear(step: int, warmup: int, length: int) -> float:
    """Learning rate that falls linearly to 0.

    >>> linear(10, 10, 20), linear(15, 10, 20), linear(20, 10, 20)
    (1.0, 0.5, 0.0)
    """
    return max(0.0, (length - step) / max(1, length - warmup))


def cosine(step: int, warmup: int, length: int) -> float:
    """Learning rate along half a cosine, from 1 to 0.

    >>> cosine(10, 10, 20), round(cosine(15, 10, 20), 6), cosine(20, 10, 20)
    (1.0, 0.5, 0.0)
    """
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, length - warmup)))
