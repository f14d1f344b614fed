"""Perplexity of an exported model, dense or sparse, or of any decoder-only model; and tasks of lm-eval.

    python examples/language/evaluate.py --model-dir OUT/model --dataset FOLDER --split test
    python examples/language/evaluate.py --model-dir OUT/model --tasks hellaswag arc_easy

Under torchrun the processes share the rows; every token counts once. Tasks run on one process.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import decoder
import documents
import perplexity
import torch
from packing import Packed
from transformers.hf_argparser import HfArg

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import arguments, pretrained, runtime


@dataclass
class Arguments:
    """Score a language model."""

    model_dir: str = HfArg(help="exported model: folder or hub name")
    dataset: str | None = HfArg(default=None, help="folder, file or hub name; default: Python's own documentation")
    dataset_config: str | None = HfArg(default=None, help="configuration of a hub dataset")
    text_column: str = HfArg(default="text", help="of the documents; translation.en: a field of a column")
    split: str = HfArg(default="test", help="split to score")
    limit: int | None = HfArg(default=None, help="use N documents only")
    context: int | None = HfArg(default=None, help="tokens of a row; default: the model's positions, at most 1024")
    across_documents: bool = HfArg(default=False, help="let tokens attend to the documents before theirs on a row")
    tasks: list[str] = field(default_factory=list, metadata={"help": "tasks of lm-eval instead of the perplexity"})
    task_folder: str | None = HfArg(default=None, help="folder with tasks of your own, as lm-eval's --include_path")
    task_limit: int | None = HfArg(default=None, help="examples of each task")
    trust_remote_code: bool = HfArg(default=False, help="run code that comes with the model")
    batch_size: int = HfArg(default=8, help="rows of a batch of a process")
    bf16: bool = HfArg(default=False, help="autocast to bf16")
    threads: int | None = HfArg(default=None, help="CPU threads of each process")
    json: str | None = HfArg(default=None, help="file to write the scores to")

    def __post_init__(self) -> None:
        arguments.check_at_least(self, {"limit": 1, "context": 2, "task_limit": 1, "batch_size": 1, "threads": 1})


def main(args: Arguments) -> int:
    """Score, and return the exit status."""
    device = runtime.start_processes(seed=0, threads=args.threads, deepspeed=False)
    if args.tasks and runtime.world_size() > 1:
        raise ValueError("--tasks: run on one process. Start plain python, without a launcher.")
    if args.tasks:
        _library()  # before the model is loaded
    tokenizer = pretrained.tokenizer(args.model_dir, args.trust_remote_code)
    model = decoder.load_pretrained(args.model_dir, trust_remote_code=args.trust_remote_code).to(device).eval()
    autocast = torch.autocast(device.type, torch.bfloat16) if args.bf16 else nullcontext()
    with autocast:
        scores = score_tasks(args, model, tokenizer) if args.tasks else score_text(args, model, tokenizer)
    if runtime.rank() == 0:
        print(json.dumps(scores, indent=1) if args.tasks else perplexity.text(scores))
        if args.json:
            Path(args.json).write_text(json.dumps(scores, indent=1) + "\n", encoding="utf-8")
    runtime.end_processes()
    return 0


def score_text(args: Arguments, model: Any, tokenizer: Any) -> dict[str, Any]:
    """Return the perplexity of the documents of a split."""
    context = args.context or min(1024, getattr(model.config, "max_position_embeddings", 1024))
    decoder.check_context(model, context)
    if not args.across_documents:
        decoder.check_documents_apart(model)
    with runtime.first_rank_first():
        rows = documents.load(
            args.dataset, args.split, config=args.dataset_config, column=args.text_column, limit=args.limit
        )
        encoded = documents.encode(rows, tokenizer)
    packed = Packed.of(encoded, context, across=args.across_documents)

    def forward(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
        logits: torch.Tensor = model(**inputs, use_cache=False).logits
        return logits

    scores = perplexity.score(forward, packed, args.batch_size)
    return {**scores, "bits_per_byte": perplexity.bits_per_byte(scores, sum(encoded["bytes"])), "context": context}


def score_tasks(args: Arguments, model: Any, tokenizer: Any) -> dict[str, Any]:
    """Return the figures of lm-eval's tasks, by task. ValueError for a task that it does not have."""
    lm_eval = _library()
    from lm_eval.models.huggingface import HFLM

    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=args.batch_size)
    manager = lm_eval.tasks.TaskManager(include_path=args.task_folder)
    if unknown := [task for task in args.tasks if not manager.match_tasks([task])]:
        raise ValueError(f"--tasks {unknown[0]}: lm-eval has no such task. `lm_eval ls tasks` lists them.")
    found = lm_eval.simple_evaluate(
        model=wrapped, tasks=list(args.tasks), limit=args.task_limit, task_manager=manager, bootstrap_iters=0
    )
    return {
        task: {name: value for name, value in figures.items() if isinstance(value, int | float)}
        for task, figures in found["results"].items()
    }


def _library() -> Any:
    """Return lm-eval. ValueError if it is not installed."""
    try:
        import lm_eval
        import lm_eval.tasks
    except ModuleNotFoundError as error:
        raise ValueError(
            f"--tasks: needs lm-eval, and {error.name} is not installed. Run pip install 'lm-eval[hf]'."
        ) from None
    return lm_eval


def parse(argv: Sequence[str] | None = None) -> Arguments:
    """Parse the command line. ValueError for a mistake in it."""
    return arguments.parse(Arguments, argv)


if __name__ == "__main__":
    runtime.run(lambda: main(parse()))
