"""Translate text with an exported model, dense or compact, one sentence a line.

    python translate.py out/model < input.en > output.de
    python translate.py out/compact --input input.en --output output.de --threads 4 --beams 1

Translations come in the order of the input, one a line; an empty line stays empty. With --sparse (the default) layers
get the layout that is fastest for the batches of this input: layers are measured, then whole translations of one batch
confirm the choice, within --choose seconds and the time of two such translations. --dense leaves all layers dense.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import evaluate
import torch
from model import load_pretrained
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from gap_ds import sparsify_for_inference
from gap_ds.export import compact_file, load_compact
from gap_ds.inference.tuning import Choice
from gap_ds.storage import atomic


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit status: 0, or 2 after one line on stderr."""
    arguments = parse(argv)
    try:
        run(arguments)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model_dir", type=Path, metavar="MODEL_DIR", help="exported model, dense or compact")
    parser.add_argument("--input", type=Path, metavar="FILE", help="sentences, one a line; default: stdin")
    parser.add_argument("--output", type=Path, metavar="FILE", help="translations; default: stdout")
    parser.add_argument("--beams", type=int, default=4, metavar="N", help="width of the beam; 1 is greedy search")
    parser.add_argument("--batch-tokens", type=int, default=2048, metavar="N", help="source tokens in a batch")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads")
    parser.add_argument(
        "--device", metavar="NAME", help="such as cpu, cuda or cuda:1; default: cuda where there is one"
    )
    layout = parser.add_mutually_exclusive_group()
    layout.add_argument("--sparse", action="store_true", default=True, help="sparse layers where they are faster")
    layout.add_argument("--dense", action="store_false", dest="sparse", help="all layers dense")
    parser.add_argument("--choose", type=float, default=60, metavar="SECONDS", help="time limit for --sparse")
    parser.add_argument("--table", action="store_true", help="print the chosen layouts on stderr")
    return parser.parse_args(argv)


def run(arguments: argparse.Namespace) -> None:
    """Translate as the arguments say; ValueError if settings or files do not fit together."""
    check(arguments)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    device = evaluate.find_device(arguments.device)
    disable_progress_bar()  # of loading
    console = Console(stderr=True, highlight=False, markup=False)
    model, tokenizer = load(arguments.model_dir, getattr(torch, arguments.dtype))
    model.to(device)
    lines = read_lines(arguments.input)
    sentences = [line for line in lines if line]
    chosen = ""
    if arguments.sparse and sentences:
        start = time.perf_counter()
        table = sparsify(model, tokenizer, sentences, arguments.beams, arguments.batch_tokens, arguments.choose)
        chosen = f"; choosing the layouts took {time.perf_counter() - start:.1f} s before"
        for choice in table if arguments.table else ():
            console.print(describe(choice), soft_wrap=True)

    columns = TextColumn("translating"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    start = time.perf_counter()
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("translating", total=len(sentences))
        translated = evaluate.translate(
            model,
            tokenizer,
            sentences,
            beams=arguments.beams,
            batch_tokens=arguments.batch_tokens,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    seconds = time.perf_counter() - start
    rest = iter(translated)
    write_lines(arguments.output, [one_line(next(rest)) if line else "" for line in lines])
    rate = len(sentences) / seconds if sentences else 0.0
    print(f"{len(sentences)} sentences in {seconds:.1f} s: {rate:.1f} sentences/s{chosen}", file=sys.stderr)


def check(arguments: argparse.Namespace) -> None:
    """Raise ValueError for settings that would fail only after the work is done."""
    for name in ("beams", "batch_tokens", "threads"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')}={value}: must be at least 1.")
    if not arguments.choose > 0:
        raise ValueError(f"--choose={arguments.choose}: must be above 0 seconds. Set --dense for dense layers.")
    output: Path | None = arguments.output
    if output is not None and (output.is_dir() or not os.access(output.absolute().parent, os.W_OK)):
        raise ValueError(f"--output={str(output)!r}: must be a file in a folder that exists and may be written to.")


def load(folder: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return model and tokenizer of an exported folder, dense or compact.

    Code that comes with a model is never run. transformers must not ask for permission either: it would read the answer
    from stdin, which holds the text to translate.

    Raises:
        ValueError: the folder holds no complete translation model.
    """
    if not folder.is_dir():
        raise ValueError(f"model_dir={str(folder)!r}: must be a folder with an exported model. Set MODEL_DIR.")
    try:
        if (folder / compact_file.FILE).is_file():
            AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            model = load_compact(folder, dtype=dtype)
        else:
            model = load_pretrained(str(folder), dtype=dtype, trust_remote_code=False)
    except SafetensorError as error:
        raise ValueError(
            f"model_dir={str(folder)!r}: the weights are damaged ({evaluate.first_line(error)})."
        ) from None
    if not isinstance(model, PreTrainedModel) or not model.config.is_encoder_decoder:
        raise ValueError(f"model_dir={str(folder)!r}: holds no model that translates. Set MODEL_DIR.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers raises many kinds, some from Rust
        raise ValueError(
            f"model_dir={str(folder)!r}: its tokenizer cannot be loaded ({evaluate.first_line(error)})."
        ) from None
    if not tokenizer or not len(tokenizer):
        raise ValueError(f"model_dir={str(folder)!r}: holds no tokenizer. Copy the one used in training into it.")
    return model, tokenizer


def sparsify(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sentences: Sequence[str],
    beams: int,
    batch_tokens: int,
    seconds: float = 60.0,
) -> list[Choice]:
    """Choose the layouts of the layers by translating the middle one of the batches of these sentences.

    Translations are as long as the longest sentence of the batch, or shorter if that would take more than a twentieth
    of the seconds: the decoder's layers see the same number of rows in every step, so a few steps show nearly as much.
    """
    positions = getattr(model.config, "max_position_embeddings", None)
    cut = {"truncation": True, "max_length": positions} if positions else {}
    tokens = tokenizer(list(sentences), **cut)["input_ids"]
    batches = evaluate.batches_by_tokens([len(ids) for ids in tokens], batch_tokens)
    rows = {"input_ids": [tokens[i] for i in batches[len(batches) // 2]]}
    inputs = tokenizer.pad(rows, padding_side="right", return_tensors="pt").to(model.device)
    most = max(2, min(inputs["input_ids"].shape[1], (positions or math.inf) - 1))

    def steps(model: Any, n: int) -> None:
        # evaluate.translate uses inference mode, too.
        with torch.inference_mode():
            model.generate(
                **inputs, num_beams=beams, do_sample=False, min_new_tokens=n, max_new_tokens=n, max_length=None
            )

    model.eval()
    spent = []
    for n in (1, 2):
        start = time.perf_counter()
        steps(model, n)
        spent.append(time.perf_counter() - start)
    step = max(spent[1] - spent[0], 0.1 * spent[1])
    count = int(max(2, min(most, (seconds / 20 - spent[1]) / step)))
    return sparsify_for_inference(model, lambda model: steps(model, count), seconds=seconds)


def one_line(text: str) -> str:
    """Return a translation without line breaks, so that lines of output and input correspond.

    >>> one_line("a\\r\\nb"), one_line("a b")
    ('a b', 'a b')
    """
    return " ".join(part.strip() for part in text.replace("\r", "\n").split("\n") if part.strip())


def describe(choice: Choice) -> str:
    """Return a line of the table."""
    rows = ", ".join(f"{rows} rows x {calls}" for rows, calls in choice.batch) or "no rows"
    notes = [choice.reason]
    if choice.ratio is not None:
        notes.insert(0, f"measured alone, {choice.best} is {choice.ratio:.2f} times as fast")
    if choice.run is not None:
        notes.append(f"whole run: {choice.run:.2f} times as fast")
    return (
        f"{len(choice.names):3} layers {choice.shape[0]} x {choice.shape[1]}, density {choice.density:.2f}, {rows}: "
        f"{choice.layout} ({'; '.join(notes)})"
    )


def read_lines(path: Path | None) -> list[str]:
    # Not str.splitlines: sentences may contain U+2028 and similar characters.
    data = sys.stdin.buffer.read() if path is None else path.read_bytes()
    try:
        lines = data.decode("utf-8-sig").split("\n")  # without a mark of the byte order
    except UnicodeDecodeError as error:
        raise ValueError(f"{path or 'stdin'}: is not UTF-8 (byte {error.start}). Set --input.") from None
    if lines[-1] == "":
        lines.pop()
    return [line.strip() for line in lines]


def write_lines(path: Path | None, lines: Sequence[str]) -> None:
    data = "".join(line + "\n" for line in lines).encode("utf-8")
    if path is not None:
        with atomic.replacing(path) as aside:  # a reader finds the old file or the whole new one
            aside.write_bytes(data)
        return
    sys.stdout.buffer.write(data)
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
