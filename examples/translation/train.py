"""Train a translation Transformer sparse by grow-and-prune, export it, and report its BLEU.

    deepspeed examples/translation/train.py --gap-config configs/gap/cyclic_80.json \\
        --deepspeed_config configs/ds/zero2.json --dataset FOLDER --output-dir runs/cyclic_80

Runs as well under torchrun and plain python; without --deepspeed_config it trains by PyTorch alone. `main` is the
recipe, from top to bottom.
"""

from __future__ import annotations

import json
import logging
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import data
import evaluate
import model as models
import runtime
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoTokenizer, HfArgumentParser, PreTrainedTokenizerBase
from transformers.hf_argparser import HfArg

from gap_ds import GaPConfig, GaPEngine

log = logging.getLogger("translation")


@dataclass
class Arguments:
    """Train a sparse translation Transformer by grow-and-prune."""

    gap_config: str = HfArg(help="GaP config, JSON or YAML (configs/gap)")
    output_dir: str = HfArg(help="folder of the run: checkpoints, metrics, results, the exported model")
    deepspeed_config: str | None = HfArg(default=None, help="DeepSpeed config (configs/ds); default: PyTorch alone")
    dense: bool = HfArg(default=False, help="train the same model as long, without sparsity")

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
    seed: int = HfArg(default=0, help="of weights, batches and dropout; masks have their own in the GaP config")
    bf16: bool = HfArg(default=False, help="autocast to bf16; with DeepSpeed its config decides")

    resume: bool = HfArg(default=False, help="go on from the newest checkpoint in --output-dir")
    overwrite: bool = HfArg(default=False, help="delete what is in --output-dir")
    save_every: int | None = HfArg(default=None, help="optimizer steps between checkpoints; default: an epoch")
    log_every: int = HfArg(default=50, help="optimizer steps between lines of metrics.jsonl")
    tensorboard: bool = HfArg(default=False, help="write TensorBoard files too")
    threads: int | None = HfArg(default=None, help="CPU threads of each process")

    beams: int = HfArg(default=4, help="width of the beam when scoring")
    length_penalty: float = HfArg(default=1.0, help="exponent of the length a hypothesis is divided by")
    samples: int = HfArg(default=3, help="translations to print")
    local_rank: int = field(default=-1, metadata={"help": "set by launchers; LOCAL_RANK is read instead"})


def main(args: Arguments) -> int:
    """Trains, exports and scores; the exit status."""
    gap = gap_config(args)
    device = runtime.start_processes(args.seed, args.threads, deepspeed=args.deepspeed_config is not None)
    folder = prepare_folder(args)

    # Data: rows, a joint BPE, token ids, and batches that are the same for any number of ranks.
    with runtime.first_rank_first():
        rows = {split: load_rows(args, split) for split in (args.train_split, args.validation_split, args.test_split)}
        tokenizer = load_tokenizer(args, folder, rows[args.train_split])
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
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, betas=(0.9, 0.997), eps=1e-9, fused=True)
    engine = build_engine(args, gap, model.to(device), optimizer, sampler.steps_per_epoch)
    runtime.seed_everything(args.seed + 1 + runtime.rank())  # dropout must differ between ranks

    # Training.
    first_step = 0
    if args.resume and (folder / "checkpoints" / "latest").exists():
        engine.load_checkpoint(folder / "checkpoints")
        first_step = engine.applied_steps
    started = time.perf_counter()
    tokens, stopped = train_model(args, engine, folder, (train, sampler), (validation, held_out), tokenizer, device)
    if stopped:
        if runtime.rank() == 0:
            print(
                f"stopped at step {engine.applied_steps} and saved. Go on with the same command and --resume.",
                file=sys.stderr,
            )
        return 128 + stopped
    seconds = time.perf_counter() - started

    # The final sparse model, and what it is worth: scored as exported, spread over the ranks.
    engine.export(folder / "model", tokenizer=tokenizer, overwrite=True)
    stats = engine.stats()
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
            "dense": args.dense,
            "train_seconds": round(seconds, 1),
            "trained_from_step": first_step,
            "tokens_per_second": round(tokens / seconds, 1),
            "score_seconds": round(time.perf_counter() - scored, 1),
            "density_at_end": stats["density"],
            "steps_per_epoch": sampler.steps_per_epoch,
            "ranks": runtime.world_size(),
            "device": str(device.type),
            "torch": torch.__version__,
            "arguments": asdict(args),
        }
        for i in range(min(args.samples, len(hypotheses))):
            print(f"source      {test[i]['source']}\nreference   {test[i]['target']}\ntranslation {hypotheses[i]}\n")
        print(f"{results['signature']}\n{scores}\n{folder / 'results.json'}")
        (folder / "results.json.partial").write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", "utf-8")
        (folder / "results.json.partial").replace(folder / "results.json")
    runtime.barrier()
    return 0


def train_model(
    args: Arguments,
    engine: GaPEngine,
    folder: Path,
    train: tuple[Any, data.TokenBatches],
    validation: tuple[Any, data.TokenBatches],
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
) -> tuple[float, int]:
    """Trains to the end of the schedule: (tokens seen by this call, 0), or the signal's number where one came."""
    encoded, sampler = train
    per_epoch = sampler.steps_per_epoch
    share = runtime.world_size() * args.accumulation  # the engine averages over ranks and micro-batches
    autocast = torch.autocast(device.type, torch.bfloat16) if args.bf16 and not args.deepspeed_config else nullcontext()
    interrupt = runtime.Interrupt()
    seen, since, total = 0.0, time.perf_counter(), engine.schedule.total_steps
    every = args.save_every or per_epoch
    engine.train()
    with runtime.Monitor(folder, total, engine.applied_steps, args.log_every, args.tensorboard) as monitor:
        while not engine.finished:
            epoch, start = divmod(engine.applied_steps, per_epoch)
            for step, micro_batches in data.batches(encoded, sampler, epoch, start, tokenizer.pad_token_id):
                phase, losses = engine.phase, []
                for batch in micro_batches:
                    labels = batch.pop("labels").to(device)
                    with autocast:
                        logits = forward(engine, tokenizer, batch, labels, device)
                        loss = models.loss(
                            logits, labels, smoothing=args.label_smoothing, denominator=step.target_tokens / share
                        )
                    engine.backward(loss)
                    engine.step()
                    losses.append(loss.detach())
                seen += step.target_tokens
                done = engine.applied_steps
                monitor.step(
                    done,
                    epoch=epoch,
                    phase=phase.index,
                    density=engine.density,
                    loss=float(sum(losses)) / args.accumulation,
                    lr=float(engine.optimizer.param_groups[0]["lr"]),
                    tokens_per_s=seen / (time.perf_counter() - since),
                )
                if done % per_epoch == 0 or engine.finished:
                    loss = validation_loss(engine, validation, tokenizer, device, autocast)
                    monitor.write("validation", done, epoch=epoch, loss=loss, density=engine.density)
                stopped = interrupt.requested()
                if stopped or done % every == 0 or engine.finished:
                    save(engine, folder / "checkpoints")
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
) -> torch.Tensor:
    """Logits (B, T, V) of the model given the labels shifted by one as the decoder's input."""
    inputs = {name: tensor.to(device) for name, tensor in batch.items()}
    shifted = labels.masked_fill(labels == data.IGNORED, tokenizer.pad_token_id).roll(1, dims=1)
    shifted[:, 0] = engine.module.config.decoder_start_token_id
    return engine(**inputs, decoder_input_ids=shifted, use_cache=False).logits


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
    args: Arguments, gap: GaPConfig, model: nn.Module, optimizer: torch.optim.Optimizer, steps_per_epoch: int
) -> GaPEngine:
    """The engine over DeepSpeed, over DistributedDataParallel, or over the model itself."""
    schedule = learning_rate(args, gap, steps_per_epoch)
    lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    if args.deepspeed_config:
        config = json.loads(Path(args.deepspeed_config).read_text(encoding="utf-8"))
        config["gradient_accumulation_steps"] = args.accumulation
        for dtype in ("bf16", "fp16"):  # the model adds its table of positions, a buffer, to the 16-bit embeddings
            if config.get(dtype, {}).get("enabled"):
                config.setdefault("data_types", {}).setdefault("buffer_dtype", dtype)
        return GaPEngine.initialize(
            model=model,
            config=config,
            gap_config=gap,
            steps_per_epoch=steps_per_epoch,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
        )
    wrapped = DistributedDataParallel(model) if runtime.world_size() > 1 else model
    return GaPEngine(
        wrapped,
        gap,
        optimizer=optimizer,
        lr_scheduler=lr_scheduler,
        steps_per_epoch=steps_per_epoch,
        gradient_accumulation_steps=args.accumulation,
    )


def learning_rate(args: Arguments, gap: GaPConfig, steps_per_epoch: int) -> Callable[[int], float]:
    """The learning rate relative to its peak, by step: of the run, or of each phase where the config restarts it."""
    from gap_ds import schedule

    plan = schedule.build(gap, steps_per_epoch)
    length = max(phase.steps for phase in plan.phases) if gap.lr == "restart" else plan.total_steps
    warmup = min(args.warmup_steps, max(1, length // 2))

    def relative(step: int) -> float:
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


def prepare_folder(args: Arguments) -> Path:
    """The run's folder. What is in it is neither overwritten nor continued unasked."""
    folder = Path(args.output_dir)
    found = "a finished run" if (folder / "results.json").exists() else "an unfinished run"
    begun = (folder / "results.json").exists() or (folder / "metrics.jsonl").exists()
    runtime.barrier()
    if args.resume and args.overwrite:
        raise ValueError("--resume and --overwrite: one goes on with what is in --output-dir, the other deletes it.")
    if begun and args.overwrite and runtime.rank() == 0:
        shutil.rmtree(folder)
    elif begun and not args.overwrite and (not args.resume or found == "a finished run"):
        hint = "" if found == "a finished run" else " Go on with --resume, or"
        raise ValueError(
            f"output_dir={args.output_dir!r}: holds {found}.{hint} start afresh with --overwrite, or set another."
        )
    if runtime.rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
    runtime.barrier()
    return folder


def load_rows(args: Arguments, split: str) -> Any:
    """Rows of a split with columns source and target."""
    return data.load_rows(
        args.dataset, split, args.source_lang, args.target_lang, config=args.dataset_config, limit=args.limit
    )


def load_tokenizer(args: Arguments, folder: Path, rows: Any) -> PreTrainedTokenizerBase:
    """The pretrained model's tokenizer, or a joint BPE, trained once by rank 0 and kept with the run."""
    if args.model_name:
        tokenizer = AutoTokenizer.from_pretrained(args.model_name, trust_remote_code=args.trust_remote_code)
        if hasattr(tokenizer, "src_lang"):
            tokenizer.src_lang, tokenizer.tgt_lang = args.source_lang, args.target_lang
        return tokenizer
    saved = folder / "tokenizer"
    if not (saved / "tokenizer.json").exists():
        data.train_tokenizer(data.texts(rows), args.vocab_size).save_pretrained(saved)
    return AutoTokenizer.from_pretrained(saved, local_files_only=True)


def save(engine: GaPEngine, folder: Path) -> None:
    """A checkpoint; the one before it goes once this one is whole."""
    newest = engine.save_checkpoint(folder)
    if runtime.rank() == 0:
        for old in folder.glob("step_*"):
            if old != newest:
                shutil.rmtree(old)


def parse(argv: Sequence[str] | None = None) -> Arguments:
    parsed: tuple[Arguments, ...] = HfArgumentParser(Arguments).parse_args_into_dataclasses(args=argv)
    return parsed[0]


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    arguments = parse()
    try:
        status = main(arguments)
    except (ValueError, OSError) as error:
        status = runtime.fail(error)
    sys.exit(status)
