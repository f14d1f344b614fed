"""Train a translation Transformer sparse by grow-and-prune, export it, and report its BLEU.

    deepspeed examples/translation/train.py --gap-config configs/gap/cyclic_80.json \\
        --deepspeed_config configs/ds/zero2.json --dataset FOLDER --output-dir runs/cyclic_80

torchrun and plain python start it as well; without --deepspeed_config it trains with PyTorch alone. `main` is the
recipe, from top to bottom.

SIGINT (Ctrl-C) or SIGTERM on any rank ends the run after the current step, with a checkpoint and exit status 130 or
143. The deepspeed launcher itself prints a traceback on Ctrl-C and kills ranks that take more than 30 s. A SIGTERM to
the `deepspeed` command alone reaches no rank: send it to its process group, or to a rank.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import batching
import data
import evaluate
import model as models
import torch
from transformers import PreTrainedTokenizerBase
from transformers.hf_argparser import HfArg

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import arguments, bpe, distillation, pretrained, run, runtime, sharding, training

from gap_ds import GaPEngine, export
from gap_ds.method.schedule import Phase


@dataclass
class Arguments(arguments.RunArguments):
    """Train a sparse translation Transformer by grow-and-prune."""

    dataset: str | None = HfArg(default=None, help="folder, file or hub name; default: the shipped corpus")
    source_lang: str = HfArg(default="en", help="language to translate from")
    target_lang: str = HfArg(default="de", help="language to translate into")
    validation_split: str = HfArg(default="validation", help="split of the loss after every epoch")
    test_split: str = HfArg(default="test", help="split to score")
    also_score: list[str] = field(default_factory=list, metadata={"help": "other splits to score"})

    preset: Literal["tiny", "small", "base", "big"] = HfArg(default="tiny", help="size of a fresh model")
    vocab_size: int = HfArg(default=6000, help="of the joint BPE of a fresh model")
    dropout: float = HfArg(default=0.1, help="of a fresh model, everywhere")
    max_length: int = HfArg(default=256, help="leave out longer pairs, in tokens")

    batch_tokens: int = HfArg(default=2048, help="tokens of an optimizer step, over all ranks, padding included")
    lr_schedule: Literal["inverse_sqrt", "linear"] = HfArg(default="linear", help="after the warm-up")

    beams: int = HfArg(default=4, help="width of the beam when scoring")
    length_penalty: float = HfArg(default=1.0, help="exponent of the length a hypothesis is divided by")
    samples: int = HfArg(default=3, help="translations to print")

    def __post_init__(self) -> None:
        super().__post_init__()
        arguments.check_at_least(self, {"max_length": 1, "batch_tokens": 1, "beams": 1, "samples": 0})
        arguments.check_fraction(self, ["dropout"])


# Arguments that a resumed run must keep. The engine compares plan and schedule itself.
FIXED = (
    *"model_name vocab_size dropout source_lang target_lang max_length batch_tokens seed bf16".split(),
    *"lr lr_schedule warmup_steps label_smoothing".split(),
    *distillation.ARGUMENTS,
)

LR_SCHEDULES = {"inverse_sqrt": run.inverse_sqrt, "linear": run.linear}


def main(args: Arguments) -> int:
    """Train, export and score; return the exit status."""
    gap, deepspeed = run.gap_config(args), deepspeed_config(args)
    of_all_workers = (*FIXED, "preset", "dataset", "dataset_config", "train_split", "limit")
    args, worker = run.gap_worker(args, gap, of_all_workers, "examples/translation/train.py")
    device = runtime.start_processes(args.seed, args.threads, deepspeed=deepspeed is not None)
    folder, resumed = run.prepare_folder(args)

    # Data: rows, a joint BPE, token ids, and batches that are the same for any number of ranks.
    with runtime.first_rank_first():
        splits = (args.train_split, args.validation_split, args.test_split, *args.also_score)
        rows = {split: load_rows(args, split) for split in splits}
        tokenizer = load_tokenizer(args, folder, rows[args.train_split], trained=resumed)
        train, validation = (
            data.encode(rows[split], tokenizer, args.max_length) for split in (args.train_split, args.validation_split)
        )
    ranks = {"world_size": runtime.world_size(), "rank": runtime.rank()}
    sampler = batching.TokenBatches.of(
        train, args.batch_tokens, accumulation=args.accumulation, seed=args.seed, **ranks
    )
    held_out = batching.TokenBatches.of(validation, args.batch_tokens, **ranks)

    # Model, optimizer and learning rate of the paper, and the engine around them.
    if args.model_name:
        model = models.load_pretrained(args.model_name, trust_remote_code=args.trust_remote_code)
    else:
        config = models.build_config(args.preset, vocab_size=len(tokenizer), dropout=args.dropout)
        model = models.build_model(config)
    models.choose_attention(model, device)
    if deepspeed is None:
        default = "ddp" if runtime.world_size() > 1 else "none"
        model = sharding.wrap(model.to(device), args.backend or default, device)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, betas=(0.9, 0.997), eps=1e-9, fused=True)
    shape = LR_SCHEDULES[args.lr_schedule]
    engine = run.build_engine(args, gap, worker, deepspeed, model, optimizer, sampler.steps_per_epoch, shape)
    # Dropout must differ between ranks, and between the workers of parallel GaP.
    runtime.seed_everything(args.seed + 1 + runtime.rank() + (runtime.world_size() * worker.index if worker else 0))

    # Training, from the newest checkpoint if there is one.
    state = run.begin(args, FIXED, rows=len(train))
    if resumed:
        state = run.resume(engine, folder, state, args.seed)
    first_step, started = engine.applied_steps, time.perf_counter()
    taught = distillation.load(args, models.load_pretrained, device, deepspeed)
    task = Translation(args, device, tokenizer, (train, sampler), (validation, held_out), taught)
    tokens, stopped = training.train(args, engine, folder, state, task)
    if stopped:
        return training.say_stopped(engine, stopped)
    seconds = time.perf_counter() - started

    figures = run.figures(args, engine, seconds, first_step)
    if worker is not None and worker.index > 0:  # worker 0 fine-tunes the merged model and scores it
        return run.end_worker(worker.index, engine, folder, figures)

    # The final sparse model, scored as exported; the ranks share the sentences.
    engine.export(folder / "model", tokenizer=tokenizer, overwrite=True)
    figures |= {"tokens_per_second": round(tokens / seconds, 1), "density_at_end": engine.stats()["density"]}
    del engine, optimizer, model
    exported = models.load_pretrained(str(folder / "model"), trust_remote_code=args.trust_remote_code).to(device)
    scored = time.perf_counter()
    hypotheses = {
        split: evaluate.translate(
            exported, tokenizer, list(rows[split]["source"]), beams=args.beams, length_penalty=args.length_penalty
        )
        for split in (args.test_split, *args.also_score)
    }
    if runtime.rank() == 0:
        figures |= {
            "score_seconds": round(time.perf_counter() - scored, 1),
            "steps_per_epoch": sampler.steps_per_epoch,
            "device": str(device.type),
        }
        write_scores(args, folder, rows, hypotheses, figures)
    runtime.end_processes()
    return 0


def write_scores(
    args: Arguments, folder: Path, rows: dict[str, Any], hypotheses: dict[str, list[str]], figures: dict[str, Any]
) -> None:
    """Score the translations of every split; print and write all results."""
    scores = {split: evaluate.score(found, list(rows[split]["target"])) for split, found in hypotheses.items()}
    of_test = scores[args.test_split]
    results = {
        **of_test.to_dict(),
        **json.loads((folder / "model" / "gap.json").read_text(encoding="utf-8")),
        **figures,
        "also_scored": {split: scores[split].to_dict() for split in args.also_score},
    }
    test, translations = rows[args.test_split], hypotheses[args.test_split]
    for i in range(min(args.samples, len(translations))):
        print(f"source      {test[i]['source']}\nreference   {test[i]['target']}\ntranslation {translations[i]}\n")
    print(results["signature"])
    for split, found in scores.items():
        print(f"{split}\n{found}")
    print(folder / "results.json")
    run.write_results(folder, results)
    how, where = of_test.signatures["bleu"], f"{args.dataset or 'generated sentences'} {args.test_split}"
    export.add_scores(folder / "model", {"bleu": of_test.bleu}, where, how)


class Translation:
    """Task of the training loop: cross entropy of the next token, and the distances to a teacher.

    Args:
        train, validation: encoded rows and their batches.
        taught: the teacher, if there is one.
    """

    unit = "tokens"

    def __init__(
        self,
        args: Arguments,
        device: torch.device,
        tokenizer: PreTrainedTokenizerBase,
        train: tuple[Any, batching.TokenBatches],
        validation: tuple[Any, batching.TokenBatches],
        taught: distillation.Distillation | None = None,
    ) -> None:
        self._args, self._device, self._tokenizer = args, device, tokenizer
        self._train, self._validation = train, validation
        self.steps_per_epoch = train[1].steps_per_epoch
        self._share = runtime.world_size() * args.accumulation  # the engine averages over ranks and micro-batches
        self._taught = taught
        self._autocast = torch.autocast(device.type, torch.bfloat16) if args.bf16 else nullcontext()

    def batches(self, epoch: int, start: int) -> Iterator[tuple[int, Sequence[dict[str, torch.Tensor]]]]:
        """Yield steps with their target tokens."""
        for step, micro_batches in batching.batches(*self._train, epoch, start, self._tokenizer.pad_token_id):
            yield step.target_tokens, micro_batches

    def loss(self, engine: GaPEngine, batch: dict[str, torch.Tensor], units: int, phase: Phase) -> torch.Tensor:
        """Return the label-smoothed cross entropy in nats per target token of the whole step."""
        args, denominator = self._args, units / self._share
        labels = batch.pop("labels").to(self._device)
        taught = self._taught if self._taught is not None and self._taught.in_phase(phase) else None
        options = taught.outputs if taught else {}
        with self._autocast:
            found = self._forward(engine, batch, labels, **options)
            loss = models.loss(found.logits, labels, smoothing=args.label_smoothing, denominator=denominator)
            if taught:
                wanted = self._forward(engine, batch, labels, taught.teacher, **options)
                kept, source = labels != models.IGNORE, batch["attention_mask"].to(self._device).bool()
                states = {"encoder_hidden_states": source, "decoder_hidden_states": kept}
                loss = taught.loss(loss, found, wanted, kept, states=states, denominator=denominator)
        return loss

    def after_step(self, engine: GaPEngine) -> None:
        """Do nothing."""

    @torch.no_grad()
    def validate(self, engine: GaPEngine, epoch: int) -> dict[str, float]:
        """Return the cross entropy in nats per target token of the validation split, over all ranks."""
        total, tokens = 0.0, 0
        for step, micro_batches in batching.batches(*self._validation, 0, 0, self._tokenizer.pad_token_id):
            for batch in micro_batches:
                labels = batch.pop("labels").to(self._device)
                with self._autocast:
                    logits = self._forward(engine, batch, labels).logits
                    total += float(models.loss(logits, labels, smoothing=0.0, denominator=1))
            tokens += step.target_tokens
        return {"loss": runtime.total_over_ranks(total)[0] / tokens}

    def _forward(
        self,
        engine: GaPEngine,
        batch: dict[str, torch.Tensor],
        labels: torch.Tensor,
        model: Callable[..., Any] | None = None,
        **options: Any,
    ) -> Any:
        """Return the output of the engine, or of `model`, with the labels shifted by one as decoder input."""
        inputs = {name: tensor.to(self._device) for name, tensor in batch.items()}
        shifted = labels.masked_fill(labels == batching.IGNORED, self._tokenizer.pad_token_id).roll(1, dims=1)
        shifted[:, 0] = engine.module.config.decoder_start_token_id
        return (model or engine)(**inputs, decoder_input_ids=shifted, use_cache=False, **options)


def deepspeed_config(args: Arguments) -> dict[str, Any] | None:
    """Return the DeepSpeed config of this run; None without --deepspeed_config."""
    config = run.deepspeed_config(args, batch_flag="--batch-tokens")
    for dtype in ("bf16", "fp16"):  # the model adds its position table, a buffer, to the 16-bit embeddings
        if config is not None and config.get(dtype, {}).get("enabled"):
            config.setdefault("data_types", {}).setdefault("buffer_dtype", dtype)
    return config


def load_rows(args: Arguments, split: str) -> Any:
    """Return the rows of a split with columns source and target."""
    return data.load_rows(
        args.dataset, split, args.source_lang, args.target_lang, config=args.dataset_config, limit=args.limit
    )


def load_tokenizer(args: Arguments, folder: Path, rows: Any, trained: bool) -> PreTrainedTokenizerBase:
    """Return the pretrained model's tokenizer, or a joint BPE that rank 0 trains once and saves with the run."""
    if args.model_name:
        tokenizer = pretrained.tokenizer(args.model_name, args.trust_remote_code)
        if hasattr(tokenizer, "src_lang"):
            tokenizer.src_lang, tokenizer.tgt_lang = args.source_lang, args.target_lang
        return tokenizer
    return bpe.of_run(folder / "tokenizer", data.texts(rows), args.vocab_size, end=True, trained=trained)


def parse(argv: Sequence[str] | None = None) -> Arguments:
    """Parse the command line. ValueError for a mistake in it."""
    return arguments.parse(Arguments, argv)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    runtime.run(lambda: main(parse()))
