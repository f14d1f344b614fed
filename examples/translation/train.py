"""Train a translation Transformer sparse by grow-and-prune, export it, and report its BLEU.

    deepspeed examples/translation/train.py --gap-config configs/gap/cyclic_80.json \\
        --deepspeed_config configs/ds/zero2.json --dataset FOLDER --output-dir runs/cyclic_80

Runs as well under torchrun and plain python; without --deepspeed_config it trains by PyTorch alone. `main` is the
recipe, from top to bottom.

SIGINT (Ctrl-C) or SIGTERM on any rank ends the run after the step it is in: saved, with exit status 130 or 143. Around
it, the deepspeed launcher answers Ctrl-C with a traceback of its own, and kills ranks that take more than 30 s; a
SIGTERM to the `deepspeed` command alone reaches no rank: send it to its process group, or to a rank.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NoReturn

import data
import evaluate
import model as models
import runtime
import sharding
import torch
from torch import nn
from transformers import AutoTokenizer, HfArgumentParser, PreTrainedTokenizerBase
from transformers.hf_argparser import HfArg

from gap_ds import GaPConfig, GaPEngine, Worker, checkpoint, schedule

log = logging.getLogger("translation")


@dataclass
class Arguments:
    """Train a sparse translation Transformer by grow-and-prune."""

    gap_config: str = HfArg(help="GaP config, JSON or YAML (configs/gap)")
    output_dir: str = HfArg(help="folder of the run: checkpoints, metrics, results, the exported model")
    deepspeed_config: str | None = HfArg(default=None, help="DeepSpeed config (configs/ds); default: PyTorch alone")
    backend: Literal["deepspeed", "fsdp2", "fsdp1", "fairscale", "ddp", "none"] | None = HfArg(
        default=None, help="sharding library; default: deepspeed with its config, else ddp, or none on one process"
    )
    dense: bool = HfArg(default=False, help="train the same model as long, without sparsity")
    gap_worker: int | None = HfArg(default=None, help="number of this worker of parallel GaP (gap-ds parallel sets it)")
    exchange: str | None = HfArg(default=None, help="exchange folder or URL of parallel GaP; default: in --output-dir")
    exchange_timeout: float = HfArg(default=7200.0, help="seconds to wait for the other workers at the end of a round")

    dataset: str | None = HfArg(default=None, help="folder, file or hub name; default: a generated corpus")
    dataset_config: str | None = HfArg(default=None, help="configuration of a hub dataset, e.g. de-en")
    source_lang: str = HfArg(default="en", help="language to translate from")
    target_lang: str = HfArg(default="de", help="language to translate into")
    train_split: str = HfArg(default="train", help="split to train on")
    validation_split: str = HfArg(default="validation", help="split of the loss after every epoch")
    test_split: str = HfArg(default="test", help="split to score")
    limit: int | None = HfArg(default=None, help="use the first N rows of every split only")

    preset: Literal["tiny", "small", "base", "big"] = HfArg(default="tiny", help="size of a fresh model")
    model_name: str | None = HfArg(default=None, help="pretrained model to make sparse instead: folder or hub name")
    trust_remote_code: bool = HfArg(default=False, help="run code that comes with the pretrained model")
    vocab_size: int = HfArg(default=6000, help="of the joint BPE of a fresh model")
    dropout: float = HfArg(default=0.1, help="of a fresh model, everywhere")
    max_length: int = HfArg(default=256, help="leave out longer pairs, in tokens")

    batch_tokens: int = HfArg(default=2048, help="tokens of an optimizer step, over all ranks, padding included")
    accumulation: int = HfArg(default=1, help="micro-batches of a rank in an optimizer step")
    lr: float = HfArg(default=2e-3, help="peak learning rate")
    lr_schedule: Literal["inverse_sqrt", "linear"] = HfArg(default="linear", help="after the warm-up")
    warmup_steps: int = HfArg(default=200, help="linear warm-up, in optimizer steps")
    label_smoothing: float = HfArg(default=0.1, help="of the training loss")
    teacher: str | None = HfArg(default=None, help="exported dense model to learn from in the fine-tuning phase")
    distillation: float = HfArg(default=0.5, help="weight of the teacher's distribution in the loss, with --teacher")
    seed: int = HfArg(default=0, help="of weights, batches and dropout; masks have their own in the GaP config")
    bf16: bool = HfArg(default=False, help="autocast to bf16; with DeepSpeed its config decides")

    resume: bool = HfArg(default=False, help="go on from the newest checkpoint in --output-dir, if there is one")
    overwrite: bool = HfArg(default=False, help="delete the run in --output-dir first")
    save_every: int | None = HfArg(default=None, help="optimizer steps between checkpoints; default: an epoch")
    keep_checkpoints: int = HfArg(default=2, help="checkpoints to leave in the folder: a damaged one is passed over")
    portable: bool = HfArg(default=False, help="let --resume go on with another number of ranks or another backend")
    log_every: int = HfArg(default=50, help="optimizer steps between lines of metrics.jsonl")
    tensorboard: bool = HfArg(default=False, help="write TensorBoard files too")
    threads: int | None = HfArg(default=None, help="CPU threads of each process")

    beams: int = HfArg(default=4, help="width of the beam when scoring")
    length_penalty: float = HfArg(default=1.0, help="exponent of the length a hypothesis is divided by")
    samples: int = HfArg(default=3, help="translations to print")
    local_rank: int = field(default=-1, metadata={"help": "set by launchers; LOCAL_RANK is read instead"})

    def __post_init__(self) -> None:
        for name, lowest in AT_LEAST.items():
            if (value := getattr(self, name)) is not None and not value >= lowest:
                raise ValueError(f"{name}={value}: must be at least {lowest}. Set --{name.replace('_', '-')}.")
        for name in ("dropout", "label_smoothing", "distillation"):
            if not 0 <= (value := getattr(self, name)) < 1:
                raise ValueError(f"{name}={value}: must lie in [0, 1). Set --{name.replace('_', '-')}.")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr={self.lr}: must be above 0. Set --lr.")
        if self.resume and self.overwrite:
            raise ValueError(
                "--resume and --overwrite: one goes on with what is in --output-dir, the other deletes it."
            )
        if (self.backend == "deepspeed") > (self.deepspeed_config is not None):
            raise ValueError('backend="deepspeed": needs a config. Set --deepspeed_config (configs/ds).')
        if self.deepspeed_config and self.backend not in (None, "deepspeed"):
            raise ValueError(f'--deepspeed_config: has no effect with backend="{self.backend}". Remove one of the two.')
        if self.bf16 and self.deepspeed_config:
            raise ValueError('--bf16: has no effect with --deepspeed_config. Set "bf16" in that file instead.')


AT_LEAST = {
    "gap_worker": 0,
    "exchange_timeout": 0,
    "max_length": 1,
    "batch_tokens": 1,
    "accumulation": 1,
    "beams": 1,
    "samples": 0,
    "threads": 1,
}
AT_LEAST |= {"keep_checkpoints": 1, "limit": 1, "save_every": 1, "log_every": 1, "warmup_steps": 0, "seed": 0}

# What a run that goes on must have as it was, besides its plan and schedule, which the engine compares.
FIXED = (
    "model_name vocab_size dropout source_lang target_lang max_length batch_tokens accumulation seed bf16 "
    "lr lr_schedule warmup_steps label_smoothing teacher distillation"
).split()

# What a run leaves in its folder, and --overwrite deletes; nothing else in there is touched.
FILES = ("results.json", "metrics.jsonl", "model", "model.partial", "checkpoints", "tokenizer", "tensorboard")


def main(args: Arguments) -> int:
    """Trains, exports and scores; the exit status."""
    gap, deepspeed = gap_config(args), deepspeed_config(args)
    args, worker = gap_worker(args, gap)
    device = runtime.start_processes(args.seed, args.threads, deepspeed=deepspeed is not None)
    folder, resumed = prepare_folder(args)

    # Data: rows, a joint BPE, token ids, and batches that are the same for any number of ranks.
    with runtime.first_rank_first():
        rows = {split: load_rows(args, split) for split in (args.train_split, args.validation_split, args.test_split)}
        tokenizer = load_tokenizer(args, folder, rows[args.train_split], trained=resumed)
        train, validation = (
            data.encode(rows[split], tokenizer, args.max_length) for split in (args.train_split, args.validation_split)
        )
    ranks = {"world_size": runtime.world_size(), "rank": runtime.rank()}
    sampler = data.TokenBatches.of(train, args.batch_tokens, accumulation=args.accumulation, seed=args.seed, **ranks)
    held_out = data.TokenBatches.of(validation, args.batch_tokens, **ranks)

    # Model, optimizer and learning rate of the paper, and the engine around them.
    if args.model_name:
        model = models.load_pretrained(args.model_name, trust_remote_code=args.trust_remote_code)
    else:
        config = models.build_config(args.preset, vocab_size=len(tokenizer), dropout=args.dropout)
        model = models.build_model(config)
    if deepspeed is None:
        default = "ddp" if runtime.world_size() > 1 else "none"
        model = sharding.wrap(model.to(device), args.backend or default, device)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, betas=(0.9, 0.997), eps=1e-9, fused=True)
    engine = build_engine(args, gap, worker, deepspeed, model, optimizer, sampler.steps_per_epoch)
    # Dropout must differ between ranks, and between the workers of parallel GaP.
    runtime.seed_everything(args.seed + 1 + runtime.rank() + (runtime.world_size() * worker.index if worker else 0))

    # Training, from the newest checkpoint on where there is one.
    state = {"batches": 0, "run": {"rows": len(train), **{name: getattr(args, name) for name in FIXED}}}
    if resumed:
        state = same_run(state, engine.load_checkpoint(folder / "checkpoints"))
    first_step, started = engine.applied_steps, time.perf_counter()
    tokens, stopped = train_model(args, engine, folder, state, (train, sampler), (validation, held_out), tokenizer)
    if stopped:
        if runtime.rank() == 0:
            print(
                f"stopped at step {engine.applied_steps} and saved. Go on with the same command and --resume.",
                file=sys.stderr,
            )
        return 128 + stopped
    seconds = time.perf_counter() - started

    if worker is not None and worker.index > 0:  # worker 0 has fine-tuned what all have made, and scores it
        if runtime.rank() == 0:
            print(f"worker {worker.index}: done after {engine.applied_steps} steps.")
            write_results(folder, {"worker": worker.index, **run_figures(args, engine, seconds, first_step)})
        runtime.end_processes()
        return 0

    # The final sparse model, and what it is worth: scored as exported, spread over the ranks.
    engine.export(folder / "model", tokenizer=tokenizer, overwrite=True)
    figures = run_figures(args, engine, seconds, first_step)
    figures |= {"tokens_per_second": round(tokens / seconds, 1), "density_at_end": engine.stats()["density"]}
    del engine, optimizer, model
    exported = models.load_pretrained(str(folder / "model")).to(device)
    test = rows[args.test_split]
    scored = time.perf_counter()
    hypotheses = evaluate.translate(
        exported, tokenizer, list(test["source"]), beams=args.beams, length_penalty=args.length_penalty
    )
    if runtime.rank() == 0:
        scores = evaluate.score(hypotheses, list(test["target"]))
        results = {
            **scores.to_dict(),
            **json.loads((folder / "model" / "gap.json").read_text(encoding="utf-8")),
            **figures,
            "score_seconds": round(time.perf_counter() - scored, 1),
            "steps_per_epoch": sampler.steps_per_epoch,
            "device": str(device.type),
        }
        for i in range(min(args.samples, len(hypotheses))):
            print(f"source      {test[i]['source']}\nreference   {test[i]['target']}\ntranslation {hypotheses[i]}\n")
        print(f"{results['signature']}\n{scores}\n{folder / 'results.json'}")
        write_results(folder, results)
    runtime.end_processes()
    return 0


def run_figures(args: Arguments, engine: GaPEngine, seconds: float, first_step: int) -> dict[str, Any]:
    """What a run cost, whoever scores it."""
    mean_density = engine.schedule.mean_density(*engine.plan.per_partition())
    return {
        "signature": engine.signature,
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


def write_results(folder: Path, results: dict[str, Any]) -> None:
    """results.json, which says that the run is over; whole or absent."""
    (folder / "results.json.partial").write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", "utf-8")
    (folder / "results.json.partial").replace(folder / "results.json")


def train_model(
    args: Arguments,
    engine: GaPEngine,
    folder: Path,
    state: dict[str, Any],
    train: tuple[Any, data.TokenBatches],
    validation: tuple[Any, data.TokenBatches],
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[float, int]:
    """Trains to the end of the schedule: (tokens seen by this call, 0), or the signal's number where one came.

    `state` goes into the checkpoints. Its "batches" counts the steps of data that were used: more than the applied
    steps where fp16 overflowed.
    """
    encoded, sampler = train
    per_epoch = sampler.steps_per_epoch
    share = runtime.world_size() * args.accumulation  # the engine averages over ranks and micro-batches
    device = next(engine.module.parameters()).device
    teacher = models.load_pretrained(args.teacher).to(device).eval() if args.teacher else None
    autocast = torch.autocast(device.type, torch.bfloat16) if args.bf16 else nullcontext()
    seen, since, total = 0.0, time.perf_counter(), engine.schedule.total_steps
    every = args.save_every or per_epoch
    engine.train()
    with (
        runtime.Interrupt() as interrupt,
        runtime.Monitor(folder, total, engine.applied_steps, args.log_every, args.tensorboard) as monitor,
    ):
        while not engine.finished:
            epoch, start = divmod(state["batches"], per_epoch)
            for step, micro_batches in data.batches(encoded, sampler, epoch, start, tokenizer.pad_token_id):
                phase, density, losses = engine.phase, engine.density, []
                lr = float(engine.optimizer.param_groups[0]["lr"])
                for batch in micro_batches:
                    labels = batch.pop("labels").to(device)
                    with autocast:
                        logits = forward(engine, tokenizer, batch, labels, device)
                        denominator = step.target_tokens / share
                        loss = models.loss(logits, labels, smoothing=args.label_smoothing, denominator=denominator)
                        if teacher is not None and phase.kind == "finetune":
                            with torch.no_grad():
                                wanted = forward(engine, tokenizer, batch, labels, device, teacher)
                            distance = models.distance(logits, wanted, labels, denominator=denominator)
                            loss = (1 - args.distillation) * loss + args.distillation * distance
                    engine.backward(loss)
                    engine.step()
                    losses.append(loss.detach())
                seen += step.target_tokens
                state["batches"] += 1
                done = engine.applied_steps
                monitor.step(
                    done,
                    epoch=epoch,
                    phase=phase.index,
                    density=density,
                    loss=float(sum(losses)) / args.accumulation,
                    lr=lr,
                    tokens_per_s=seen / (time.perf_counter() - since),
                )
                if state["batches"] % per_epoch == 0 or engine.finished:
                    loss = validation_loss(engine, validation, tokenizer, device, autocast)
                    monitor.write("validation", done, epoch=epoch, loss=loss, density=engine.density)
                stopped = interrupt.requested()
                if stopped or state["batches"] % every == 0 or engine.finished:
                    save(args, engine, folder / "checkpoints", state)
                if stopped:
                    return seen, stopped
                if engine.finished:
                    break
    return seen, 0


def forward(
    engine: GaPEngine,
    tokenizer: PreTrainedTokenizerBase,
    batch: dict[str, torch.Tensor],
    labels: torch.Tensor,
    device: Any,
    model: nn.Module | None = None,
) -> torch.Tensor:
    """Logits (B, T, V) of the engine, or of another model, given the labels shifted by one as the decoder's input."""
    inputs = {name: tensor.to(device) for name, tensor in batch.items()}
    shifted = labels.masked_fill(labels == data.IGNORED, tokenizer.pad_token_id).roll(1, dims=1)
    shifted[:, 0] = engine.module.config.decoder_start_token_id
    return (model or engine)(**inputs, decoder_input_ids=shifted, use_cache=False).logits


@torch.no_grad()
def validation_loss(
    engine: GaPEngine, validation: tuple[Any, data.TokenBatches], tokenizer: Any, device: torch.device, autocast: Any
) -> float:
    """Cross entropy in nats per target token of the model as it is now, over all ranks."""
    encoded, sampler = validation
    engine.eval()
    total, tokens = 0.0, 0
    for step, micro_batches in data.batches(encoded, sampler, 0, 0, tokenizer.pad_token_id):
        for batch in micro_batches:
            labels = batch.pop("labels").to(device)
            with autocast:
                logits = forward(engine, tokenizer, batch, labels, device)
                total += float(models.loss(logits, labels, smoothing=0.0, denominator=1))
        tokens += step.target_tokens
    engine.train()
    return runtime.total_over_ranks(total)[0] / tokens


def build_engine(
    args: Arguments,
    gap: GaPConfig,
    worker: Worker | None,
    deepspeed: dict[str, Any] | None,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps_per_epoch: int,
) -> GaPEngine:
    """The engine over DeepSpeed, or over a model that is wrapped already."""
    built: list[GaPEngine] = []  # the schedule asks the engine for the phase, and the engine is built around it
    relative = learning_rate(args, gap, steps_per_epoch, lambda: built[0].phase if built else None)
    lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, relative)
    built.append(wrap_engine(args, gap, worker, deepspeed, model, optimizer, lr_scheduler, steps_per_epoch))
    return built[0]


def wrap_engine(
    args: Arguments,
    gap: GaPConfig,
    worker: Worker | None,
    deepspeed: dict[str, Any] | None,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    lr_scheduler: torch.optim.lr_scheduler.LambdaLR,
    steps_per_epoch: int,
) -> GaPEngine:
    """A GaPEngine around DeepSpeed's, or around the model."""
    if deepspeed is not None:
        return GaPEngine.initialize(
            model=model,
            config=deepspeed,
            gap_config=gap,
            steps_per_epoch=steps_per_epoch,
            worker=worker,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
        )
    return GaPEngine(
        model,
        gap,
        optimizer=optimizer,
        lr_scheduler=lr_scheduler,
        steps_per_epoch=steps_per_epoch,
        worker=worker,
        gradient_accumulation_steps=args.accumulation,
    )


def learning_rate(
    args: Arguments,
    gap: GaPConfig,
    steps_per_epoch: int,
    phase: Callable[[], schedule.Phase | None],
) -> Callable[[int], float]:
    """The learning rate relative to its peak, by step: of the run, or of each phase where the config restarts it.

    The workers of parallel GaP have one learning rate, that of worker 0, although the others end before it.
    """
    whole = schedule.build(gap, steps_per_epoch)

    def relative(step: int) -> float:
        length = (phase() or whole.phases[0]).steps if gap.lr == "restart" else whole.total_steps
        warmup = min(args.warmup_steps, max(1, length // 2))
        if step < warmup:
            return (step + 1) / warmup
        if args.lr_schedule == "inverse_sqrt":
            return (warmup / (step + 1)) ** 0.5
        return max(0.0, (length - step) / max(1, length - warmup))

    return relative


def gap_config(args: Arguments) -> GaPConfig:
    """The GaP config of this run, complete before anything is started."""
    gap = GaPConfig.load(args.gap_config)
    if args.dense:
        return gap.as_dense()
    if args.model_name and "init" not in gap.model_fields_set and gap.method != "dsd":
        return GaPConfig.load({**gap.model_dump(exclude_unset=True), "init": "magnitude"})
    return gap


def gap_worker(args: Arguments, gap: GaPConfig) -> tuple[Arguments, Worker | None]:
    """Of parallel GaP, which worker this is; its folder is one in --output-dir. Otherwise the arguments as they are."""
    if gap.method != "parallel":
        for name in ("gap_worker", "exchange"):
            if getattr(args, name) is not None:
                raise ValueError(f'--{name.replace("_", "-")}: has no effect with method="{gap.method}". Remove it.')
        return args, None
    if args.gap_worker is None:
        raise ValueError(
            'method="parallel": every worker is a job of its own. Start all by gap-ds parallel --workers '
            f"{gap.kappa} -- examples/translation/train.py ..., or each by --gap-worker 0, 1, ..."
        )
    if args.gap_worker >= gap.kappa:
        raise ValueError(f"--gap-worker {args.gap_worker}: must be below {gap.kappa}, the number of partitions.")
    folder = Path(args.output_dir)
    # Workers of one run must have the same data and training settings, which no signature of the config knows.
    same = {
        name: getattr(args, name) for name in (*FIXED, "preset", "dataset", "dataset_config", "train_split", "limit")
    }
    digest = hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()[:16]
    exchange = args.exchange or str(folder / "exchange")
    worker = Worker(args.gap_worker, exchange, args.exchange_timeout, run=digest)
    return replace(args, output_dir=str(folder / f"worker_{args.gap_worker}")), worker


def deepspeed_config(args: Arguments) -> dict[str, Any] | None:
    """The DeepSpeed config of this run, with what its arguments decide filled in; None without --deepspeed_config."""
    if args.deepspeed_config is None:
        return None
    origin = f"--deepspeed_config {args.deepspeed_config}"
    try:
        config = json.loads(Path(args.deepspeed_config).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{origin}: cannot be read as JSON ({error}). Set another file (configs/ds).") from None
    if not isinstance(config, dict):
        raise ValueError(f"{origin}: holds a {type(config).__name__}, must hold an object. Set another file.")
    for key, instead in (("optimizer", "--lr"), ("scheduler", "--lr-schedule"), ("train_batch_size", "--batch-tokens")):
        if key in config:
            raise ValueError(f'{origin}: "{key}" would have no effect. Remove it, and set {instead}.')
    if (given := config.get("gradient_accumulation_steps", 1)) not in (1, "auto", args.accumulation):
        raise ValueError(
            f"{origin}: gradient_accumulation_steps={given}, but --accumulation {args.accumulation}: set both alike."
        )
    config["gradient_accumulation_steps"] = args.accumulation
    config["train_micro_batch_size_per_gpu"] = 1  # DeepSpeed asks for it; batches are cut by tokens
    if auto := [key for key, value in _items(config) if value == "auto"]:
        raise ValueError(f'{origin}: {auto[0]}="auto" is for the Trainer of transformers. Set a value, or remove it.')
    for dtype in ("bf16", "fp16"):  # the model adds its table of positions, a buffer, to the 16-bit embeddings
        if config.get(dtype, {}).get("enabled"):
            config.setdefault("data_types", {}).setdefault("buffer_dtype", dtype)
    return config


def _items(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """All settings of a config, nested ones as "section.key"."""
    for key, value in config.items():
        yield key, value
        if isinstance(value, dict):
            yield from ((f"{key}.{inner}", setting) for inner, setting in _items(value))


def prepare_folder(args: Arguments) -> tuple[Path, bool]:
    """The run's folder, and whether to go on from a checkpoint; no run is overwritten or continued unasked."""
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


def same_run(now: dict[str, Any], saved: Any) -> dict[str, Any]:
    """The state saved with a checkpoint. ValueError if another run saved it than the one that `now` begins."""
    was = saved["run"] if isinstance(saved, dict) and "run" in saved else {}
    if changed := [
        f"{key}={was.get(key)!r} (now {value!r})" for key, value in now["run"].items() if was.get(key) != value
    ]:
        raise ValueError(
            f"the checkpoint was written with {', '.join(changed)}. Restore them, or start in a new folder."
        )
    return saved


def load_rows(args: Arguments, split: str) -> Any:
    """Rows of a split with columns source and target."""
    return data.load_rows(
        args.dataset, split, args.source_lang, args.target_lang, config=args.dataset_config, limit=args.limit
    )


def load_tokenizer(args: Arguments, folder: Path, rows: Any, trained: bool) -> PreTrainedTokenizerBase:
    """The pretrained model's tokenizer, or a joint BPE, trained once by rank 0 and kept with the run."""
    if args.model_name:
        try:
            tokenizer = AutoTokenizer.from_pretrained(args.model_name, trust_remote_code=args.trust_remote_code)
        except (OSError, ValueError) as error:
            reason = str(error).strip().split("\n")[0]
            raise ValueError(f"model {args.model_name!r}: has no tokenizer ({reason}). Set --model-name.") from error
        if hasattr(tokenizer, "src_lang"):
            tokenizer.src_lang, tokenizer.tgt_lang = args.source_lang, args.target_lang
        return tokenizer
    if runtime.rank() == 0 and not trained:
        data.train_tokenizer(data.texts(rows), args.vocab_size).save_pretrained(folder / "tokenizer")
    return AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)


def save(args: Arguments, engine: GaPEngine, folder: Path, state: dict[str, Any]) -> None:
    """A checkpoint; the oldest goes once this one is whole."""
    engine.save_checkpoint(folder, client_state=state, keep=args.keep_checkpoints, portable=args.portable)


def parse(argv: Sequence[str] | None = None) -> Arguments:
    """The arguments of the command line. ValueError for a mistake in them."""
    parsed: tuple[Arguments, ...] = Parser(Arguments).parse_args_into_dataclasses(args=argv)
    return parsed[0]


class Parser(HfArgumentParser):
    """One sentence for a mistake, on one rank, instead of forty options on each."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}. --help lists all arguments.")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    runtime.run(lambda: main(parse()))
