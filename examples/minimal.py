"""Train a small Llama sparse, with the whole training loop in one file.

    python examples/minimal.py                                  plain PyTorch, one process
    deepspeed --num_accelerators 2 examples/minimal.py          DeepSpeed ZeRO-2
    torchrun --nproc-per-node 2 examples/minimal.py             FSDP2

The model learns to continue arithmetic sequences, so nothing is downloaded. The final model is exported, loaded as a
user would load it, and the zeros in its pruned matrices are counted.
"""

import argparse
import json
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from gap_ds import GaPEngine

VOCABULARY, LENGTH, BATCH = 32, 16, 16
STEPS_PER_EPOCH = 20
#: Three partitions, each dense for one epoch, twice, then two epochs of fine-tuning: 8 epochs, 160 steps.
GAP = {"sparsity": 0.8, "partitions": 3, "phase_epochs": 1, "rounds": 2, "finetune_epochs": 2}
DEEPSPEED = {
    "train_micro_batch_size_per_gpu": BATCH,
    "zero_optimization": {"stage": 2, "round_robin_gradients": False},
    "zero_allow_untested_optimizer": True,
    "gradient_clipping": 1.0,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output-dir", type=Path, default=Path("runs/minimal"), help="folder of the exported model")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # only the deepspeed launcher sets it
    args = parser.parse_args()
    backend = "deepspeed" if args.local_rank is not None else "fsdp2" if "RANK" in os.environ else "plain"
    device = join_processes(backend)

    torch.manual_seed(0)  # every rank builds the same model
    config = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3}
    model = LlamaForCausalLM(LlamaConfig(**config, num_attention_heads=4)).to(device)
    engine = wrap(model, backend)

    generator = torch.Generator().manual_seed(1 + rank())  # every rank draws different sequences
    while not engine.finished:
        tokens = sequences(generator).to(device)
        loss = engine(input_ids=tokens, labels=tokens).loss
        engine.backward(loss)
        engine.step()
        if engine.applied_steps % STEPS_PER_EPOCH == 0:
            density = engine.stats()["density"]  # a collective: all ranks call it
            if rank() == 0:
                print(f"step {engine.applied_steps}: loss {loss:.3f}, density {density:.3f}", flush=True)

    folder = engine.export(args.output_dir, overwrite=True)
    if rank() == 0:
        count_zeros(folder)
    if dist.is_initialized():
        dist.destroy_process_group()


def join_processes(backend: str) -> torch.device:
    """Join the launcher's processes and return the device of this one."""
    cuda, local = torch.cuda.is_available(), int(os.environ.get("LOCAL_RANK", 0))
    if cuda:
        torch.cuda.set_device(local)
    if backend == "deepspeed":
        import deepspeed

        deepspeed.init_distributed()
    elif backend == "fsdp2":
        dist.init_process_group("nccl" if cuda else "gloo")
    return torch.device("cuda", local) if cuda else torch.device("cpu")


def wrap(model: nn.Module, backend: str) -> GaPEngine:
    """Shard the model as usual, then wrap it."""
    if backend == "fsdp2":
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    if backend == "deepspeed":
        import deepspeed

        model, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=DEEPSPEED)
        return GaPEngine(model, GAP, steps_per_epoch=STEPS_PER_EPOCH)
    return GaPEngine(model, GAP, optimizer=optimizer, steps_per_epoch=STEPS_PER_EPOCH, gradient_clipping=1.0)


def sequences(generator: torch.Generator) -> Tensor:
    """Draw arithmetic sequences modulo VOCABULARY, as token ids (BATCH, LENGTH)."""
    first = torch.randint(VOCABULARY, (BATCH, 1), generator=generator)
    difference = torch.randint(1, 5, (BATCH, 1), generator=generator)
    return (first + difference * torch.arange(LENGTH)) % VOCABULARY


def count_zeros(folder: Path) -> None:
    """Load the exported model and count the zeros of its pruned matrices."""
    weights = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    pruned = [weights[name] for name in json.loads((folder / "gap.json").read_text())["entries"]]
    zeros, total = sum(int((w == 0).sum()) for w in pruned), sum(w.numel() for w in pruned)
    print(f"{zeros:,} of {total:,} weights in the pruned matrices are exactly 0")


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


if __name__ == "__main__":
    main()
