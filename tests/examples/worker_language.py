"""Runs of examples/language on the ranks of one group, one after the other: `python worker_language.py OUT DATA`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
EXAMPLES = HERE.parents[1] / "examples"
sys.path[:0] = [str(HERE), str(EXAMPLES), str(EXAMPLES / "language")]

import language  # noqa: E402
from common import runtime  # noqa: E402

#: Name of the run -> arguments.
RUNS = {
    "fsdp2": ["--backend", "fsdp2"],
    "zero2": ["--deepspeed_config", "zero2.json"],
}


def main(out: Path, data: Path) -> None:
    train = language.load(language.SCRIPT, "language_train")
    evaluate = language.load(language.SCRIPT.with_name("evaluate.py"), "language_evaluate")
    runtime.end_processes = runtime.barrier  # DeepSpeed remembers its group: all runs are in one
    # fp32, unlike the shipped config: its result is compared with a run of one process. Left out, clipping is at 1.
    (out / "zero2.json").write_text(
        '{"zero_optimization": {"stage": 2, "round_robin_gradients": false}, "gradient_clipping": 0.0}'
    )
    os.chdir(out)
    for name, more in RUNS.items():
        argv = language.arguments(data, out / name, str(data / "gap.json"), *more)
        assert train.main(train.parse(argv)) == 0, name
    scored = ["--model-dir", str(data / "plain" / "model"), "--dataset", str(data), "--threads", "1"]
    assert evaluate.main(evaluate.parse([*scored, "--json", str(out / "scores.json"), "--batch-size", "3"])) == 0


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    os._exit(0)  # libraries that tidy up at exit would wait for the other rank
