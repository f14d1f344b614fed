"""Tokens per second of the translation example, compared with a bare DeepSpeed loop and transformers' trainer.

    OMP_NUM_THREADS=1 python benchmarks/throughput.py

    zero2   the example with the engine over DeepSpeed ZeRO-2; compared with a bare DeepSpeed loop
    plain   the example with the engine over PyTorch alone; compared with transformers' Seq2SeqTrainer

The loops of a pair train the example's model on the same batches in one process and take turns step by step: a turn
lasts from receiving a batch until requesting the next one. No loop reaches the end of an epoch, where the example would
validate and save. Ratios are those of times: of all timed steps (`ratio_of_tokens`), and the median over neighbouring
steps (`ratio`). The example's three boundaries are taken out of its steps and have a separate row with their total;
`example, with its boundaries` has both. One more loop has the model as transformers makes it, with PyTorch's fused
attention. `loader` is the example's data without training. `--quick` is a size for tests.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import logging
import os
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import measure
import torch

sys.path.insert(0, str(measure.ROOT / "examples"))
sys.path.insert(0, str(measure.ROOT / "examples" / "translation"))

import batching
import data
import model as models
import train
from common import run, runtime, training

from gap_ds import GaPEngine
from gap_ds.method.schedule import Phase

PAIRS = {"zero2": ("example", "bare DeepSpeed"), "plain": ("example", "Seq2SeqTrainer")}
FUSED = ", fused attention"
WARM_UP = 5
#: Option of glibc's mallopt. Threads have separate arenas, which allocate large tensors differently from the main
#: thread, where the example runs: that alone made 5 % of a step.
M_ARENA_MAX = -8


class Turns:
    """Lets loops in several threads take turns, one step each, and times the steps."""

    def __init__(self, names: Sequence[str]) -> None:
        self._waiting, self._changed = list(names), threading.Condition()
        self.seconds: dict[str, list[float]] = {name: [] for name in names}
        self.units: dict[str, list[int]] = {name: [] for name in names}

    def batches(self, name: str, steps: Iterable[tuple[int, Any]]) -> Iterator[tuple[int, Any]]:
        """Yield the steps, each when it is this loop's turn."""
        for units, batch in steps:
            with self._changed:
                assert self._changed.wait_for(lambda: self._waiting[0] == name, timeout=300)
            measure.synchronize()
            started = time.perf_counter()
            yield units, batch
            measure.synchronize()
            self.seconds[name].append(time.perf_counter() - started)
            self.units[name].append(units)
            self._pass(name)

    def _pass(self, name: str) -> None:
        with self._changed:
            self._waiting.append(self._waiting.pop(self._waiting.index(name)))
            self._changed.notify_all()

    def leave(self, name: str) -> None:
        """Remove a loop that has ended, maybe within its turn."""
        with self._changed:
            if name in self._waiting:
                self._waiting.remove(name)
            self._changed.notify_all()


class InTurns(train.Translation):
    """The example's task with batches in turn. `boundaries` maps steps to the seconds of their boundary."""

    def __init__(self, turns: Turns, name: str, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._turns, self._name, self._phase = turns, name, 0
        self.boundaries: dict[int, float] = {}

    def after_step(self, engine: GaPEngine) -> None:
        if engine.phase.index != self._phase:
            self._phase = engine.phase.index
            self.boundaries[engine.applied_steps - 1] = engine.last_boundary_seconds

    def validate(self, engine: GaPEngine, epoch: int) -> dict[str, float]:
        assert engine.finished, "an epoch ended within the timed steps"
        return {}

    def batches(self, epoch: int, start: int) -> Iterator[tuple[int, Sequence[dict[str, torch.Tensor]]]]:
        return self._turns.batches(self._name, super().batches(epoch, start))


def main() -> None:
    parser = measure.parser(__doc__)
    parser.add_argument("--pairs", nargs="+", choices=list(PAIRS), default=list(PAIRS))
    parser.add_argument("--preset", choices=list(models.PRESETS), default="small")
    parser.add_argument("--tokens", type=int, default=train.Arguments.batch_tokens, help="tokens of a step")
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    if args.quick:
        args.preset, args.tokens, args.steps, args.pairs = "tiny", 128, 24, ["plain"]
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(M_ARENA_MAX, 1)
    warnings.filterwarnings("ignore")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    note = (
        f"{args.preset}, {args.steps} steps of {args.tokens} tokens, bf16, generated corpus, 1 process; to the second "
    )
    note += (
        "loop: ratio_of_tokens, of the time of all steps; ratio, of neighbouring steps; interval: of its median, 95 %"
    )
    rows: list[dict[str, Any]] = []
    for pair in args.pairs:
        rows += compare(args, pair)
        measure.write("throughput", rows, args.out, note)


def compare(args: argparse.Namespace, pair: str) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        part = args.steps // 4
        gap = {
            "sparsity": 0.9,
            "partitions": 3,
            "rounds": 1,
            "phase_steps": part,
            "finetune_steps": args.steps - 3 * part,
        }
        (folder / "gap.json").write_text(json.dumps(gap))
        words = ["--gap-config", f"{folder}/gap.json", "--output-dir", f"{folder}/run", "--preset", args.preset]
        words += ["--batch-tokens", str(args.tokens), "--vocab-size", "2000", "--threads", str(torch.get_num_threads())]
        words += ["--backend", "none", "--bf16"] if pair == "plain" else []
        words += ["--deepspeed_config", str(measure.ROOT / "configs/ds/zero2.json")] if pair == "zero2" else []
        own = train.parse(words)
        turns = Turns([*PAIRS[pair], PAIRS[pair][1] + FUSED])
        tokens, loading, boundaries = race(own, folder / "run", turns, pair)
    example, other = PAIRS[pair]
    steps = min(map(len, turns.seconds.values()))
    assert all(WARM_UP <= step < steps for step in boundaries) and len(boundaries) == 3, f"boundaries {boundaries}"
    whole = turns.seconds[example]
    without = [seconds - boundaries.get(step, 0.0) for step, seconds in enumerate(whole)]
    loops = {example: without, f"{example}, with its boundaries": whole}
    loops |= {name: seconds for name, seconds in turns.seconds.items() if name != example}
    times = {name: seconds[WARM_UP:steps] for name, seconds in loops.items()}
    found = measure.compared(times, other)
    units = sum(turns.units[other][WARM_UP:steps])
    assert units == sum(turns.units[example][WARM_UP:steps]), "the loops have had other batches"
    rows = [
        {"pair": pair, "loop": name, "tokens_per_s": round(units / sum(values), 1)}
        | {"ratio_of_tokens": round(sum(values) / sum(times[other]), 3), **found[name]}
        for name, values in times.items()
    ]
    cost = sum(boundaries.values())
    three = {"ms": round(1e3 * cost, 1), "steps": round(1e3 * cost / found[example]["ms"], 2)}
    return [
        *rows,
        {"pair": pair, "loop": f"{len(boundaries)} boundaries", **three},
        {"pair": pair, "loop": "loader", "tokens_per_s": round(tokens / loading, 1)},
    ]


def race(args: train.Arguments, folder: Path, turns: Turns, pair: str) -> tuple[int, float, dict[int, float]]:
    """Train all loops. Returns the target tokens of an epoch, the loader's seconds for them, and `boundaries`."""
    deepspeed = train.deepspeed_config(args)
    device = runtime.start_processes(args.seed, args.threads, deepspeed=deepspeed is not None)
    folder, _ = run.prepare_folder(args)
    rows = {split: train.load_rows(args, split) for split in ("train", "validation")}
    tokenizer = train.load_tokenizer(args, folder, rows["train"], trained=False)
    encoded = {split: data.encode(rows[split], tokenizer, args.max_length) for split in rows}
    samplers = {split: batching.TokenBatches.of(found, args.batch_tokens) for split, found in encoded.items()}
    pairs = [(encoded[split], samplers[split]) for split in encoded]

    def build(fused: bool = False) -> tuple[Any, torch.optim.Optimizer]:
        runtime.seed_everything(0)
        model = models.build_model(models.build_config(args.preset, vocab_size=len(tokenizer))).to(device)
        if not fused:
            models.choose_attention(model, device)
        return model, torch.optim.Adam(model.parameters(), lr=args.lr, betas=(0.9, 0.997), eps=1e-9, fused=True)

    gap, shape = run.gap_config(args), train.LR_SCHEDULES[args.lr_schedule]
    per_epoch = samplers["train"].steps_per_epoch
    engine = run.build_engine(args, gap, None, deepspeed, *build(), per_epoch, shape)
    example, other = PAIRS[pair]
    steps = engine.schedule.total_steps
    assert steps < per_epoch, f"{steps} steps, but an epoch has {per_epoch}: the example would validate and save"
    plain = train.Translation(args, device, tokenizer, *pairs)
    started, tokens = time.perf_counter(), sum(units for units, _ in plain.batches(0, 0))
    seconds = time.perf_counter() - started
    loop = bare_deepspeed if pair == "zero2" else seq2seq_trainer
    for name in (other, other + FUSED):
        work = loop(plain, lambda name=name: build(name != other), deepspeed, steps, folder / name, turns, name)
        threading.Thread(target=work, daemon=True, name=name).start()
    task = InTurns(turns, example, args, device, tokenizer, *pairs)
    training.train(args, engine, folder, run.begin(args, train.FIXED, rows=len(encoded["train"])), task)
    turns.leave(example)
    for thread in threading.enumerate():
        if thread.name.startswith(other):
            thread.join(timeout=300)
    return tokens, seconds, task.boundaries


Build = Callable[[], tuple[Any, torch.optim.Optimizer]]


def endless(task: train.Translation) -> Iterator[tuple[int, Any]]:
    epoch = 0
    while True:
        yield from task.batches(epoch, 0)
        epoch += 1


def bare_deepspeed(
    task: train.Translation, build: Build, config: Any, steps: int, folder: Path, turns: Turns, name: str
) -> Callable[[], None]:
    """The loop of DeepSpeed's tutorial, with the example's forward pass and loss."""
    import deepspeed

    model, optimizer = build()
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    phase = Phase.__new__(Phase)  # used only with a teacher

    def work() -> None:
        for step, (units, (batch,)) in enumerate(turns.batches(name, endless(task))):
            engine.backward(task.loss(engine, batch, units, phase))
            engine.step()
            if step == steps:
                break
        turns.leave(name)

    return work


def seq2seq_trainer(
    task: train.Translation, build: Build, config: Any, steps: int, folder: Path, turns: Turns, name: str
) -> Callable[[], None]:
    """transformers' trainer with its label smoothing, on the example's batches."""
    from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

    model, optimizer = build()
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):  # with them the trainer would use DDP in a single process
        os.environ.pop(variable, None)

    class Batches(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
        def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
            for _, (batch,) in turns.batches(name, endless(task)):
                shifted = batch["labels"].masked_fill(batch["labels"] == batching.IGNORED, models.PAD).roll(1, dims=1)
                shifted[:, 0] = model.config.decoder_start_token_id
                yield {**batch, "decoder_input_ids": shifted}

    arguments = Seq2SeqTrainingArguments(
        output_dir=str(folder / "trainer"), max_steps=steps + 1, per_device_train_batch_size=1, bf16=True,
        use_cpu=not torch.cuda.is_available(), max_grad_norm=0.0, label_smoothing_factor=0.1, report_to=[],
        save_strategy="no", logging_strategy="no", disable_tqdm=True, remove_unused_columns=False,
    )  # fmt: skip
    trainer = Seq2SeqTrainer(
        model,
        arguments,
        train_dataset=Batches(),
        data_collator=lambda batches: batches[0],
        optimizers=(optimizer, None),
    )

    def work() -> None:
        trainer.train()
        turns.leave(name)

    return work


if __name__ == "__main__":
    main()
