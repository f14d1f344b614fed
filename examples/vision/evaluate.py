"""Top-1 and top-5 accuracy of an exported model, dense or sparse, or of any image classifier.

    python examples/vision/evaluate.py --model-dir OUT/model --dataset FOLDER --split validation

Size, crop, mean and deviation come from the exported model. Under torchrun the processes share the pictures; every
picture counts once.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers.hf_argparser import HfArg

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import classifier
import images
import numpy as np
import scoring
from common import arguments, runtime, sampling, sources
from transformers import AutoImageProcessor


@dataclass
class Arguments:
    """Score an image classifier."""

    model_dir: str = HfArg(help="exported model: folder or hub name")
    dataset: str | None = HfArg(default=None, help="folder, parquet file or hub name; default: drawn pictures")
    dataset_config: str | None = HfArg(default=None, help="configuration of a hub dataset")
    split: str = HfArg(default="validation", help="split to score")
    image_column: str = HfArg(default="image", help="of parquet files and hub datasets")
    label_column: str = HfArg(default="label", help="of parquet files and hub datasets")
    limit: int | None = HfArg(default=None, help="use N rows only")
    skip_damaged: bool = HfArg(default=False, help="leave out pictures that cannot be decoded, and count them")
    trust_remote_code: bool = HfArg(default=False, help="run code that comes with the model")
    image_size: int | None = HfArg(default=None, help="pixels of a side; default: the model's")
    crop_part: float | None = HfArg(default=None, help="part of the shorter side that is kept; default: the model's")
    batch_size: int = HfArg(default=128, help="pictures of a batch of a process")
    workers: int = HfArg(default=0, help="decoding processes")
    bf16: bool = HfArg(default=False, help="autocast to bf16")
    threads: int | None = HfArg(default=None, help="CPU threads of each process")
    json: str | None = HfArg(default=None, help="file to write the scores to")

    def __post_init__(self) -> None:
        arguments.check_at_least(self, {"limit": 1, "image_size": 1, "batch_size": 1, "workers": 0, "threads": 1})
        if self.crop_part is not None and not 0 < self.crop_part <= 1:
            raise ValueError(f"crop_part={self.crop_part}: must lie in (0, 1]. Set --crop-part.")


def main(args: Arguments) -> int:
    """Score, and return the exit status."""
    device = runtime.start_processes(seed=0, threads=args.threads, deepspeed=False)
    columns = {"image_column": args.image_column, "label_column": args.label_column}
    source = images.load(args.dataset, args.split, config=args.dataset_config, limit=args.limit, **columns)
    model = classifier.load_pretrained(args.model_dir, trust_remote_code=args.trust_remote_code).to(device).eval()
    source = numbered_as(source, model.config.id2label)
    images.check_labels(source, model.config.num_labels)
    try:
        processor = AutoImageProcessor.from_pretrained(args.model_dir, trust_remote_code=args.trust_remote_code)
        size = args.image_size or _side(processor.size)
        mean, deviation = (torch.tensor(v, device=device) for v in (processor.image_mean, processor.image_std))
    except (OSError, ValueError, AttributeError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(
            f"model {args.model_dir!r}: has no image processor with a size, mean and deviation "
            f"({sources.first_line(error)}). Set --model-dir."
        ) from error
    change = images.Evaluation(size, args.crop_part or getattr(processor, "crop_pct", None) or 0.875)

    def forward(pictures: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16) if args.bf16 else nullcontext():
            return model(pixel_values=images.normalise(pictures.to(device), mean, deviation)).logits

    loader = images.Loader(source, change, seed=0, workers=args.workers, skip=args.skip_damaged)
    ranks = {"world_size": runtime.world_size(), "rank": runtime.rank()}
    scores = scoring.score(forward, loader(sampling.evaluation_batches(len(source), args.batch_size, **ranks)))
    for message in sorted(loader.skipped):
        print(f"left out: {message}", file=sys.stderr)
    if runtime.rank() == 0:
        print(f"top-1 {scores['top1']:.2f} %, top-5 {scores['top5']:.2f} %, {scores['pictures']:.0f} pictures")
        if args.json:
            Path(args.json).write_text(json.dumps(scores, indent=1) + "\n", encoding="utf-8")
    runtime.end_processes()
    return 0


def numbered_as(source: images.Source, names: Mapping[int, str]) -> images.Source:
    """Return a split with the model's numbers of its classes; as it is if the model does not have all of their names.

    A split that lacks a class has other numbers for those after it.
    """
    numbers = {name: int(number) for number, name in names.items()}
    if not set(source.classes) <= set(numbers):
        return source
    return replace(source, labels=np.array([numbers[name] for name in source.classes])[source.labels])


def _side(size: dict[str, int]) -> int:
    """Return the pixels of a side. Image processors store them under different keys."""
    side = size.get("shortest_edge") or size.get("height")
    if side is None:
        raise ValueError(f"its size has neither shortest_edge nor height: {size}")
    return side


def parse(argv: Sequence[str] | None = None) -> Arguments:
    """Parse the command line. ValueError for a mistake in it."""
    return arguments.parse(Arguments, argv)


if __name__ == "__main__":
    runtime.run(lambda: main(parse()))
