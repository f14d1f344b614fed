"""Runs of examples/vision on the ranks of one group, one after the other: `python worker_vision.py OUT`."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
EXAMPLES = HERE.parents[1] / "examples"
sys.path[:0] = [str(HERE), str(EXAMPLES), str(EXAMPLES / "vision")]

import classifier  # noqa: E402
import torch  # noqa: E402
import vision  # noqa: E402
from common import runtime  # noqa: E402

ZERO1 = vision.ROOT / "configs" / "ds" / "zero1.json"

#: Name of the run -> (arguments, step after which it is stopped by a signal).
RUNS: dict[str, tuple[list[str], int | None]] = {
    "moved": (["--portable"], 5),
    "zero1": (["--deepspeed_config", str(ZERO1), "--ema", "0.5"], 5),
    "zero1 again": (["--deepspeed_config", str(ZERO1), "--ema", "0.5", "--resume"], None),
    "zero1 undisturbed": (["--deepspeed_config", str(ZERO1), "--ema", "0.5"], None),
}


def synchronised(out: Path) -> None:
    """Saves how far gradients and statistics over two unequal parts are from those of the whole batch, by name."""
    runtime.start_processes(seed=0, threads=1, deepspeed=False)
    pixels, labels = torch.randn(16, 3, 16, 16), torch.arange(16) % 10
    alone, shared = (classifier.build("resnet20_small", [str(i) for i in range(10)]).double() for _ in range(2))
    shared.load_state_dict(alone.state_dict())
    classifier.use_own_batch_norm(shared, everywhere=True)
    shared = shared.double()
    own_part = (slice(0, 6), slice(6, 16))[runtime.rank()]
    for model, part in ((alone, slice(None)), (shared, own_part)):
        for _ in range(2):  # running statistics of two steps
            logits = model(pixel_values=pixels[part].double()).logits
        torch.nn.functional.cross_entropy(logits, labels[part], reduction="sum").backward()
    far = {}
    for (name, own), whole in zip(shared.named_parameters(), alone.parameters(), strict=True):
        torch.distributed.all_reduce(own.grad)
        far[name] = float((own.grad - whole.grad).norm() / whole.grad.norm())
    for (name, own), whole in zip(shared.named_buffers(), alone.buffers(), strict=True):
        far[name] = float((own.double() - whole.double()).norm() / whole.double().norm())
    (out / "synchronised.json").write_text(json.dumps(far))


def main(out: Path) -> None:
    synchronised(out)
    train = vision.load(vision.SCRIPT, "vision_train")
    (out / "gap.json").write_text(json.dumps(vision.GAP))
    step = runtime.Monitor.step
    runtime.end_processes = runtime.barrier  # DeepSpeed remembers its group: all runs are in one
    for name, (more, stop) in RUNS.items():
        runtime.Monitor.step = vision.stop_at(stop, signal.SIGTERM) if stop and os.environ["RANK"] == "1" else step
        argv = vision.arguments(out / name.removesuffix(" again"), str(out / "gap.json"), *more)
        status = train.main(train.parse(argv))
        assert status == (128 + signal.SIGTERM if stop else 0), (name, status)
        runtime.Monitor.step = step


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    os._exit(0)  # libraries that tidy up at exit would wait for the other rank
