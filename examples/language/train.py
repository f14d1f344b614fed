"""Train a decoder-only language model sparse by grow-and-prune, export it, and report its perplexity.

    torchrun --nproc-per-node 8 examples/language/train.py --gap-config cyclic_80 --backend fsdp2 --bf16 \\
        --dataset FOLDER --preset llama_100m --output-dir runs/cyclic_80

The deepspeed launcher and plain python start it as well. `main` is the recipe, from top to bottom. Signals act as in
the translation example: a checkpoint after the step, status 130 or 143.
"""

from __future__ import annotations

import itertools
import json
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import decoder
import documents
import perplexity
import torch
from packing import Packed
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.hf_argparser import HfArg

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import arguments, bpe, cross_entropy, distillation, pretrained, run, runtime, sampling, sharding, training

from gap_ds import GaPEngine, export
from gap_ds.method.schedule import Phase


@dataclass
class Arguments(arguments.RunArguments):
    """Train a sparse language model by grow-and-prune."""

    dataset: str | None = HfArg(default=None, help="folder, file or hub name; default: Python's own documentation")
    text_column: str = HfArg(default="text", help="of the documents; translation.en: a field of a column")
    validation_split: str = HfArg(default="validation", help="split of the loss after every epoch")
    test_split: str = HfArg(default="test", help="split to score")

    preset: str = HfArg(default="gpt2_tiny", help="size of a fresh model: a file of examples/language/models")
    vocab_size: int = HfArg(default=8000, help="of the byte-level BPE of a fresh model")
    dropout: float = HfArg(default=0.0, help="of a fresh model, everywhere")
    context: int = HfArg(default=256, help="tokens of a row")
    across_documents: bool = HfArg(default=False, help="let tokens attend to the documents before theirs on a row")
    checkpointing: bool = HfArg(default=False, help="recompute activations in the backward pass to save memory")

    batch_size: int = HfArg(default=32, help="rows of an optimizer step, over all ranks and micro-batches")
    lr: float = HfArg(default=1e-3, help="peak learning rate")
    lr_schedule: Literal["cosine", "linear", "inverse_sqrt"] = HfArg(default="cosine", help="after the warm-up")
    weight_decay: float = HfArg(default=0.1, help="of all weights but norms and biases")
    label_smoothing: float = HfArg(default=0.0, help="of the training loss")

    def __post_init__(self) -> None:
        super().__post_init__()
        arguments.check_at_least(self, {"context": 2, "batch_size": 1, "weight_decay": 0})
        arguments.check_fraction(self, ["dropout"])


# Arguments that a resumed run must keep. The engine compares plan and schedule itself.
FIXED = (
    *"model_name vocab_size dropout text_column context across_documents batch_size seed bf16".split(),
    *"lr lr_schedule warmup_steps weight_decay label_smoothing".split(),
    *distillation.ARGUMENTS,
)

LR_SCHEDULES = {"cosine": run.cosine, "linear": run.linear, "inverse_sqrt": run.inverse_sqrt}

#: Documents that the tokenizer of a fresh model is trained on, the first of the split.
TOKENIZER_DOCUMENTS = 200_000


def main(args: Arguments) -> int:
    """Train, export and score; return the exit status."""
    gap = run.gap_config(args)
    deepspeed = run.deepspeed_config(args, batch_flag="--batch-size")
    of_all_workers = (*FIXED, "preset", "dataset", "dataset_config", "train_split", "limit")
    args, worker = run.gap_worker(args, gap, of_all_workers, "examples/language/train.py")
    device = runtime.start_processes(args.seed, args.threads, deepspeed=deepspeed is not None)
    folder, resumed = run.prepare_folder(args)

    # Data: documents, a tokenizer, rows of one length, and batches that are the same for any number of ranks.
    with runtime.first_rank_first():
        rows = {split: load_rows(args, split) for split in (args.train_split, args.validation_split, args.test_split)}
        tokenizer = load_tokenizer(args, folder, rows[args.train_split], trained=resumed)
        encoded = {split: documents.encode(found, tokenizer) for split, found in rows.items()}
    packed = {split: Packed.of(found, args.context, across=args.across_documents) for split, found in encoded.items()}
    train, validation = packed[args.train_split], packed[args.validation_split]
    ranks = {"world_size": runtime.world_size(), "rank": runtime.rank()}
    batches = sampling.Batches(len(train), args.batch_size, accumulation=args.accumulation, seed=args.seed, **ranks)

    # Model, optimizer and learning rate, and the engine around them.
    model = build_model(args, tokenizer)
    undecayed = {name for name, weight in model.named_parameters() if weight.dim() < 2}
    if deepspeed is None:
        default = "ddp" if runtime.world_size() > 1 else "none"
        model = sharding.wrap(model.to(device), args.backend or default, device)
    groups = run.groups(model, undecayed, args.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)
    shape = LR_SCHEDULES[args.lr_schedule]
    engine = run.build_engine(args, gap, worker, deepspeed, model, optimizer, batches.steps_per_epoch, shape)
    # Dropout must differ between ranks, and between the workers of parallel GaP.
    runtime.seed_everything(args.seed + 1 + runtime.rank() + (runtime.world_size() * worker.index if worker else 0))

    # Training, from the newest checkpoint if there is one.
    state = run.begin(args, FIXED, rows=len(train))
    if resumed:
        state = run.resume(engine, folder, state, args.seed)
    first_step, started = engine.applied_steps, time.perf_counter()
    taught = load_teacher(args, tokenizer, device, deepspeed)
    task = Language(args, device, train, batches, validation, taught)
    tokens, stopped = training.train(args, engine, folder, state, task)
    if stopped:
        return training.say_stopped(engine, stopped)
    seconds = time.perf_counter() - started

    figures = run.figures(args, engine, seconds, first_step)
    if worker is not None and worker.index > 0:  # worker 0 fine-tunes the merged model and scores it
        return run.end_worker(worker.index, engine, folder, figures)

    # The final sparse model, scored as exported; the ranks share the rows.
    engine.export(folder / "model", tokenizer=tokenizer, overwrite=True)
    figures |= {"tokens_per_second": round(tokens / seconds, 1), "density_at_end": engine.stats()["density"]}
    del engine, optimizer, model
    exported = decoder.load_pretrained(str(folder / "model"), trust_remote_code=args.trust_remote_code).to(device)
    scored = time.perf_counter()
    scores = task.score(exported.eval(), packed[args.test_split])
    scores["bits_per_byte"] = perplexity.bits_per_byte(scores, sum(encoded[args.test_split]["bytes"]))
    if runtime.rank() == 0:
        results = {
            **scores,
            **json.loads((folder / "model" / "gap.json").read_text(encoding="utf-8")),
            **figures,
            "score_seconds": round(time.perf_counter() - scored, 1),
            "steps_per_epoch": batches.steps_per_epoch,
            "device": str(device.type),
        }
        print(f"{results['signature']}\n{perplexity.text(scores)}\n{folder / 'results.json'}")
        run.write_results(folder, results)
        where = f"{args.dataset or 'documentation of Python'} {args.test_split}"
        how = f"context {args.context}, tokens of the model's vocabulary, {scores['tokens']} predicted"
        export.add_scores(folder / "model", {"perplexity": scores["perplexity"]}, where, how)
    runtime.end_processes()
    return 0


class Language:
    """Task of the training loop: cross entropy of the next token, and the distances to a teacher."""

    unit = "tokens"

    def __init__(
        self,
        args: Arguments,
        device: torch.device,
        train: Packed,
        batches: sampling.Batches,
        validation: Packed,
        taught: distillation.Distillation | None = None,
    ) -> None:
        self._args, self._device, self._batches, self._taught = args, device, batches, taught
        self._train, self._validation = train, validation
        self.steps_per_epoch = batches.steps_per_epoch
        self._share = runtime.world_size() * args.accumulation  # the engine averages over ranks and micro-batches
        self._autocast = torch.autocast(device.type, torch.bfloat16) if args.bf16 else nullcontext()
        #: The steps with the rows of all ranks.
        self._whole = sampling.Batches(len(train), args.batch_size, seed=args.seed)

    def batches(self, epoch: int, start: int) -> Iterator[tuple[int, Sequence[dict[str, torch.Tensor]]]]:
        """Yield steps with their predicted tokens."""
        own, whole = (sampler.micro_batches(epoch, start) for sampler in (self._batches, self._whole))
        for keys in itertools.islice(whole, self.steps_per_epoch - start):
            units = int(self._train.predicted[[row for _, row in keys]].sum())
            found = itertools.islice(own, self._args.accumulation)
            yield units, [self._train.rows([row for _, row in each]) for each in found]

    def loss(self, engine: GaPEngine, batch: dict[str, torch.Tensor], units: int, phase: Phase) -> torch.Tensor:
        """Return the cross entropy in nats per predicted token of the whole step."""
        denominator = units / self._share
        labels = batch.pop("labels").to(self._device)
        taught = self._taught if self._taught is not None and self._taught.in_phase(phase) else None
        options = taught.outputs if taught else {}
        found = self._forward(engine, batch, **options)
        smoothing = self._args.label_smoothing
        loss = cross_entropy.loss(found.logits, labels, smoothing=smoothing, denominator=denominator)
        if taught:
            wanted, kept = self._forward(taught.teacher, batch, **options), labels != cross_entropy.IGNORE
            loss = taught.loss(loss, found, wanted, kept, states={"hidden_states": kept}, denominator=denominator)
        return loss

    def after_step(self, engine: GaPEngine) -> None:
        """Do nothing."""

    def validate(self, engine: GaPEngine, epoch: int) -> dict[str, float]:
        """Return loss and perplexity of the validation split."""
        scores = self.score(engine, self._validation)
        return {"loss": scores["loss"], "perplexity": scores["perplexity"]}

    def score(self, model: Any, packed: Packed) -> dict[str, Any]:
        """Return the figures of a model, or of the engine, on packed documents."""
        rows = max(1, self._args.batch_size // self._share)  # those of a micro-batch
        return perplexity.score(lambda batch: self._forward(model, batch).logits, packed, rows)

    def _forward(self, model: Any, batch: dict[str, torch.Tensor], **options: Any) -> Any:
        inputs = {name: tensor.to(self._device) for name, tensor in batch.items()}
        with self._autocast:
            return model(**inputs, use_cache=False, **options)


def load_rows(args: Arguments, split: str) -> Any:
    """Return the documents of a split."""
    return documents.load(args.dataset, split, config=args.dataset_config, column=args.text_column, limit=args.limit)


def load_tokenizer(args: Arguments, folder: Path, rows: Any, trained: bool) -> PreTrainedTokenizerBase:
    """Return the pretrained model's tokenizer, or a byte-level BPE that rank 0 trains once and saves with the run."""
    if args.model_name:
        return pretrained.tokenizer(args.model_name, args.trust_remote_code)
    some = rows.select(range(min(len(rows), TOKENIZER_DOCUMENTS)))
    return bpe.of_run(folder / "tokenizer", documents.texts(some), args.vocab_size, end=False, trained=trained)


def build_model(args: Arguments, tokenizer: PreTrainedTokenizerBase) -> nn.Module:
    """Return the model to train."""
    if args.model_name:
        model = decoder.load_pretrained(args.model_name, trust_remote_code=args.trust_remote_code)
        decoder.check_context(model, args.context)
    else:
        model = decoder.build(args.preset, tokenizer, context=args.context, dropout=args.dropout)
    if not args.across_documents:
        decoder.check_documents_apart(model)
    if args.checkpointing:
        # The second name is that of earlier versions of transformers 5.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return model


def load_teacher(
    args: Arguments, tokenizer: PreTrainedTokenizerBase, device: torch.device, deepspeed: dict[str, Any] | None
) -> distillation.Distillation | None:
    """Return the teacher of --teacher. ValueError if its tokens are not the student's."""
    if args.teacher and pretrained.tokenizer(args.teacher, args.trust_remote_code).get_vocab() != tokenizer.get_vocab():
        raise ValueError(f"teacher={args.teacher!r}: has another vocabulary than the student. Set --teacher.")
    return distillation.load(args, decoder.load_pretrained, device, deepspeed)


def parse(argv: Sequence[str] | None = None) -> Arguments:
    """Parse the command line. ValueError for a mistake in it."""
    return arguments.parse(Arguments, argv)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    runtime.run(lambda: main(parse()))
