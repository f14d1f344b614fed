"""BLEU and validation loss of a dense model, gradual pruning and the recipe of `cyclic_90`, in minutes on a GPU.

    python benchmarks/short_quality.py

The runs of `quality/run.py --preset gpu_short`: preset base on the generated corpus of the translation example, all at
once on the device. They show that training on it ends where it should; `quality/` has the tables that compare methods.
`--quick` is its preset `smoke`.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import measure

QUALITY = measure.ROOT / "benchmarks" / "quality"
NOTE = "loss: of validation after the last epoch, in nats; FLOPs of training relative to dense; one seed"


def main() -> None:
    args = measure.parser(__doc__).parse_args()
    preset, rows = ("smoke", ["dense", "gradual"]) if args.quick else ("gpu_short", [])
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(QUALITY / "run.py"), "--preset", preset, "--out", folder, "--results", folder]
        subprocess.run([*command, *(["--rows", *rows] if rows else [])], check=True)
        sys.path.insert(0, str(QUALITY))
        import records
        from rows import BY_NAME

        found = records.read(Path(folder) / f"quality_{preset}.jsonl")
    measure.write(
        "short_quality",
        [
            {"method": BY_NAME[record["row"]].title, "pruned": record["sparsity"], "epochs": record["epochs"]}
            | {"loss": round(record["validation_loss"][-1], 3), "BLEU": round(record["bleu"], 1)}
            | {"FLOPs": round(record["training_flops"], 3), "s": round(record["train_seconds"])}
            for record in found
        ],
        args.out,
        NOTE,
    )


if __name__ == "__main__":
    main()
