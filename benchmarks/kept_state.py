"""Memory and time of optimizer state that is held for kept weights alone (`gap_ds.optim`), against torch's AdamW.

    OMP_NUM_THREADS=1 python benchmarks/kept_state.py
    OMP_NUM_THREADS=1 python benchmarks/kept_state.py --only memory --models base --backends zero2 --sparsities 0.9

Memory: C-GaP in 3 partitions, one round and fine-tuning, two steps for each phase, in fresh processes for every row.
`bytes` are those of all optimizer state for each weight of the model, summed over the ranks, before the last step of a
phase; `run` is the mean over a schedule whose fine-tuning is as long as a phase times `--finetune`. `RSS` is the
resident memory of both ranks without mapped files in the fine-tuning, and its peak over the whole run, boundaries
included. `plan` and `plan, fine-tuning` are what `gap-ds plan` predicts; if it is off by more than 5 % in a row, the
benchmark fails when all rows are written.

Time: one optimizer step over pieces of a million weights with gradients, `fused=True` and masks against packed state,
in turns. CPU time, which other load disturbs less, and on a GPU wall time; medians of the ratios in a round. `passes`
only sums the gradients and multiplies the weights by 1: about the traffic that is left where every cache line has a
kept weight, as 81 % of them do at 90 %. `--quick` is a size for tests.
"""

from __future__ import annotations

import argparse
import gc
import os
from collections.abc import Callable
from typing import Any

import measure
import overhead
import torch
from torch import nn

from gap_ds import GaPEngine, optim
from gap_ds.cli.plan import forecast
from gap_ds.masks import bitmask
from gap_ds.method.config import GaPConfig
from gap_ds.sharding.comm import Comm

MILLION = 1_000_000
#: Of the plan, relative to what is counted.
LARGEST_ERROR = 0.05
KEY = ("model", "backend", "sparsity", "optimizer")
TIME_KEY = ("weights", "sparsity", "way")
NOTE = "fp32; bytes of optimizer state for each weight of the model, summed over 2 ranks; dense AdamW has 8"
TIME_NOTE = "ratio: CPU time against fused AdamW and masks in the same round, median; interval: of that median, at 95 %"


def main() -> None:
    parser = measure.parser(__doc__)
    parser.add_argument("--only", choices=("memory", "time"), nargs="+", default=["memory", "time"])
    parser.add_argument("--models", nargs="+", default=["base", "llama"], choices=("tiny", "base", "llama"))
    parser.add_argument("--backends", nargs="+", default=["zero2", "zero3", "fsdp2"])
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.8, 0.9])
    parser.add_argument("--optimizers", nargs="+", default=["torch", "gap_ds"], choices=("torch", "gap_ds"))
    parser.add_argument("--finetune", type=int, default=2, help="length of the fine-tuning, in phases")
    parser.add_argument("--weights", nargs="+", type=int, default=[20 * MILLION, 200 * MILLION])
    parser.add_argument("--rounds", type=int, default=25)
    args = parser.parse_args()
    if args.quick:
        args.models, args.backends, args.sparsities = ["tiny"], ["fsdp2"], [0.9]
        args.weights, args.rounds = [300_007], 3
    for weights in args.weights if "time" in args.only else ():
        rows = [row for sparsity in args.sparsities for row in times(weights, sparsity, args.rounds)]
        measure.add("kept_state_time", rows, args.out, TIME_NOTE, TIME_KEY, measure.command())
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # glibc returns freed memory at once
    wrong = list[dict[str, Any]]()
    for model in args.models if "memory" in args.only else ():
        for backend in args.backends:
            for sparsity in args.sparsities:
                # Whole state does not depend on the sparsity.
                kinds = [kind for kind in args.optimizers if kind == "gap_ds" or sparsity == args.sparsities[-1]]
                if not kinds:
                    continue
                rows = [measure.on_ranks(2, memory, model, backend, sparsity, kind, args.finetune)[0] for kind in kinds]
                measure.add("kept_state", rows, args.out, NOTE, KEY, measure.command())
                wrong += [row for row in rows if max(off(row)) > LARGEST_ERROR]
    if wrong:
        raise SystemExit("\n".join(f"gap-ds plan is off by {max(off(row)):.1%}: {row}" for row in wrong))


def off(row: dict[str, Any]) -> list[float]:
    """How far the plan is from what was counted, over the run and in fine-tuning, relative to what was counted."""
    pairs = (("plan", "run"), ("plan, fine-tuning", "in fine-tuning"))
    return [abs(row[planned] / row[counted] - 1) for planned, counted in pairs]


# -- memory ------------------------------------------------------------------------------------------------------------


def network(name: str) -> tuple[nn.Module, Callable[[nn.Module], torch.Tensor]]:
    """A model, and its loss on one small batch: a preset of the translation example, or a Llama of 200 M weights."""
    torch.manual_seed(0)
    if name == "llama":
        from transformers import LlamaConfig, LlamaForCausalLM

        sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 15, "vocab_size": 4096}
        model: nn.Module = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=16))
        tokens = torch.randint(4096, (1, 32))
        return model, lambda wrapped: wrapped(input_ids=tokens, labels=tokens).loss
    args = argparse.Namespace(preset=name, tokens=64)
    batch = overhead.tokens(args, torch.device("cpu"))
    model = overhead.models.build_model(overhead.models.build_config(name, vocab_size=overhead.VOCABULARY))
    return model, lambda wrapped: wrapped(**batch).loss


def config(sparsity: float, finetune: int) -> dict[str, Any]:
    """Three phases of two steps, and fine-tuning."""
    return {
        "sparsity": sparsity,
        "partitions": 3,
        "phase_steps": 2,
        "rounds": 1,
        "finetune_steps": 2 * finetune,
    }


def memory(name: str, backend: str, sparsity: float, kind: str, finetune: int) -> list[dict[str, Any]]:
    """One row: a run on this rank and the other one."""
    model, loss = network(name)
    settings = GaPConfig.load(config(sparsity, finetune))
    made = {"torch": torch.optim.AdamW, "gap_ds": optim.AdamW}[kind]
    forecasted = forecast(model, settings)["optimizer_state"]
    planned = forecasted if kind == "gap_ds" else dict.fromkeys(forecasted, forecasted["whole"])
    total = sum(p.numel() for p in model.parameters())
    engine = wrapped(model, backend, settings, lambda parameters: made(parameters, lr=1e-4))
    del model
    gc.collect()
    measure.reset_peak()
    held = []
    while not engine.finished:
        engine.backward(loss(engine))
        engine.step()
        if (engine.applied_steps + 1) % 2 == 0 and not engine.finished:
            held.append(engine.stats()["optimizer_bytes"])
    group, peak = Comm(), measure.status("VmHWM")
    measure.reset_peak()
    sums = group.sum(torch.tensor([*held, measure.memory(), peak])).tolist()
    *held, resident, peak = sums
    return [
        {
            "model": name,
            "backend": backend,
            "sparsity": sparsity,
            "optimizer": kind,
            "weights": total,
            "bytes in each phase": [round(value / total, 3) for value in held[:3]],
            "in fine-tuning": round(held[-1] / total, 3),
            "run": round(sum(held) / len(held) / total, 3),
            "run, of dense": round(sum(held) / len(held) / total / 8, 3),
            "fine-tuning, of dense": round(held[-1] / total / 8, 3),
            "plan": round(planned["mean"] / total, 3),
            "plan, fine-tuning": round(planned["last"] / total, 3),
            "RSS in fine-tuning, MB": round(resident / 1e6),
            "peak RSS, MB": round(peak / 1e6),
        }
    ]


def wrapped(model: nn.Module, backend: str, settings: GaPConfig, made: Callable[[Any], Any]) -> GaPEngine:
    """The model in a backend, with the engine."""
    if backend.startswith("zero"):
        ds = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": int(backend[-1])},
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": 0.0,
            "steps_per_print": 10**9,
        }
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        return GaPEngine.initialize(model=model, config=ds, gap_config=settings, optimizer=made(model.parameters()))
    if backend == "fsdp2":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (2,))
        for module in list(model.modules()):
            if isinstance(module, nn.ModuleList):
                for block in module:
                    fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return GaPEngine(model, settings, optimizer=made(model.parameters()))


# -- time --------------------------------------------------------------------------------------------------------------


def times(weights: int, sparsity: float, rounds: int) -> list[dict[str, Any]]:
    """A row for each way to step `weights` weights."""
    pieces = max(1, weights // MILLION)
    sizes = [weights // pieces] * pieces
    device = measure.device()
    torch.manual_seed(0)
    bits = [bitmask.pack(torch.rand(n, device=device) < 1 - sparsity) for n in sizes]

    def made(kind: Any, **settings: Any) -> tuple[list[nn.Parameter], Any]:
        parameters = [nn.Parameter(torch.randn(n, device=device)) for n in sizes]
        bitmask.zero_pruned_all_((p.detach(), mask) for p, mask in zip(parameters, bits, strict=True))
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        return parameters, kind(parameters, lr=1e-4, **settings)

    gradients = [torch.randn(n, device=device) for n in sizes]
    _, fused = made(torch.optim.AdamW, fused=True)
    _, default = made(torch.optim.AdamW)
    sparse, packed = made(optim.AdamW)
    for parameter, mask in zip(sparse, bits, strict=True):
        packed.divide(parameter, [(0, parameter.numel())])
        packed.change_mask(parameter, 0, mask)

    def with_masks(optimizer: Any) -> Callable[[], None]:
        def run() -> None:
            optimizer.step()
            parameters = optimizer.param_groups[0]["params"]
            bitmask.zero_pruned_all_((p.detach(), mask) for p, mask in zip(parameters, bits, strict=True))

        return run

    def passes() -> None:
        for gradient, weight in zip(gradients, sparse, strict=True):
            gradient.sum()
            weight.detach().mul_(1.0)

    works = {
        "fused AdamW and masks": with_masks(fused),
        "AdamW and masks": with_masks(default),
        "kept": packed.step,
        "passes": passes,
    }
    found = measure.in_turns(works, rounds, timer=lambda work: measure.both_seconds(work)[device.type == "cpu"])
    compared = measure.compared(found, "fused AdamW and masks")
    return [{"weights": weights, "sparsity": sparsity, "way": name, **row} for name, row in compared.items()]


if __name__ == "__main__":
    main()
