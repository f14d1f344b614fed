"""Effect of BatchNorm's statistics in finished runs of the vision example: equal weights, other statistics.

    python benchmarks/vision_statistics.py --dataset DATA/eurosat_rgb32 --runs RUNS/*

Scores each run's exported model as it is, and with statistics recomputed from training pictures: cropped as in
training, and whole as in evaluation. No weight changes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import measure
import torch
from transformers import AutoImageProcessor

sys.path.insert(0, str(measure.ROOT / "examples"))
sys.path.insert(0, str(measure.ROOT / "examples" / "vision"))
import classifier
import images
import scoring
from common import sampling


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", required=True, help="folder with train and test pictures")
    parser.add_argument("--runs", type=Path, nargs="+", required=True, help="output folders of finished runs")
    parser.add_argument("--batches", type=int, default=60, help="of 128 pictures, for the statistics")
    parser.add_argument("--out", type=Path, default=measure.RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    train, test = (images.load(args.dataset, split) for split in ("train", "test"))
    rows = [compare(run, train, test, args.batches) for run in args.runs]
    rows.sort(key=lambda row: -row["evaluation_views"])
    note = (
        "top-1 (%) on the test pictures with BatchNorm's statistics as exported, and made anew from training pictures"
    )
    measure.write("vision_statistics", rows, args.out, note)


def compare(run: Path, train: images.Source, test: images.Source, batches: int) -> dict[str, Any]:
    """Return the accuracies of one run's model."""
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    folder = str(run / "model")
    model = classifier.load_pretrained(folder, trust_remote_code=True).eval().to(memory_format=torch.channels_last)
    processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
    mean, deviation = torch.tensor(processor.image_mean), torch.tensor(processor.image_std)
    whole = images.Evaluation(results["arguments"]["image_size"], results["arguments"]["crop_part"])
    cut = images.Training(whole.size, results["arguments"]["smallest_crop"])

    def forward(pictures: torch.Tensor) -> torch.Tensor:
        pixels = images.normalise(pictures, mean, deviation).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            return model(pixel_values=pixels).logits

    def top1() -> float:
        loader = images.Loader(test, whole, seed=0, workers=0, skip=False)
        return round(scoring.score(forward, loader(sampling.evaluation_batches(len(test), 128)))["top1"], 2)

    def anew(change: images.Training | images.Evaluation) -> float:
        keys = itertools.islice(sampling.Batches(len(train), 128, seed=0).micro_batches(0), batches)
        loader = images.Loader(train, change, seed=0, workers=0, skip=False)
        scoring.recompute_statistics(model, forward, loader(keys))
        return top1()

    row = {"run": run.name, "as_exported": top1(), "training_crops": anew(cut), "evaluation_views": anew(whole)}
    print(json.dumps(row), flush=True)
    return row


if __name__ == "__main__":
    main()
