"""Translate text with an exported model, dense or compact, one sentence a line.

    python translate.py out/model < input.en > output.de
    python translate.py out/compact --input input.en --output output.de --threads 4 --beams 1

Translations come in the order of the input; an empty line stays empty. With --sparse (the default) the sparse layers
get the form that a short measurement says is fastest for the batches of this input; --dense leaves them as they are.
"""

from __future__ import annotations

import argparse
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
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from gap_ds import compact, sparsify_for_inference
from gap_ds.inference import Choice


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 2 with one sentence on stderr."""
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
    parser.add_argument("--output", type=Path, metavar="FILE", help="where to; default: stdout")
    parser.add_argument("--beams", type=int, default=4, metavar="N", help="width of the beam; 1 is greedy search")
    parser.add_argument("--batch-tokens", type=int, default=2048, metavar="N", help="source tokens in a batch")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads")
    parser.add_argument("--device", metavar="NAME", help="cpu or cuda; default: cuda where there is one")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--sparse", action="store_true", default=True, help="sparse layers where they are faster")
    form.add_argument("--dense", action="store_false", dest="sparse", help="all layers dense")
    parser.add_argument("--table", action="store_true", help="print on stderr what was chosen for which layers")
    return parser.parse_args(argv)


def run(arguments: argparse.Namespace) -> None:
    """What the command line does. ValueError for settings or files that do not fit together."""
    if arguments.beams < 1 or arguments.batch_tokens < 1 or (arguments.threads or 1) < 1:
        raise ValueError("--beams, --batch-tokens, --threads: at least 1 each.")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    disable_progress_bar()  # of loading
    console = Console(stderr=True, highlight=False, markup=False)
    model, tokenizer = load(arguments.model_dir, getattr(torch, arguments.dtype))
    model.to(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    lines = read_lines(arguments.input)
    sentences = [line for line in lines if line]
    if arguments.sparse and sentences:
        for choice in sparsify(model, tokenizer, sentences, arguments.beams, arguments.batch_tokens):
            if arguments.table:
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
    write_lines(arguments.output, [next(rest) if line else "" for line in lines])
    rate = len(sentences) / seconds if sentences else 0.0
    print(f"{len(sentences)} sentences in {seconds:.1f} s: {rate:.1f} sentences/s", file=sys.stderr)


def load(folder: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of an exported folder, dense or compact; code that comes with a model is never run."""
    if not folder.is_dir():
        raise ValueError(f"model_dir={str(folder)!r}: must be a folder with an exported model. Set MODEL_DIR.")
    if (folder / compact.FILE).is_file():
        model = compact.load_compact(folder, dtype=dtype)
        if not isinstance(model, PreTrainedModel) or not model.config.is_encoder_decoder:
            raise ValueError(f"model_dir={str(folder)!r}: holds no model that translates. Set MODEL_DIR.")
    else:
        model = load_pretrained(str(folder), dtype=dtype)
    return model, AutoTokenizer.from_pretrained(folder, local_files_only=True)


def sparsify(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sentences: Sequence[str], beams: int, batch_tokens: int
) -> list[Choice]:
    """Gives the layers their form, measured with the middle one of the batches that will be translated."""
    positions = getattr(model.config, "max_position_embeddings", None)
    cut = {"truncation": True, "max_length": positions} if positions else {}
    tokens = tokenizer(list(sentences), **cut)["input_ids"]
    batches = evaluate.batches_by_tokens([len(ids) for ids in tokens], batch_tokens)
    rows = {"input_ids": [tokens[i] for i in batches[len(batches) // 2]]}
    inputs = tokenizer.pad(rows, padding_side="right", return_tensors="pt").to(model.device)

    def few_steps(model: Any) -> None:
        """The decoder's layers see the same number of rows in every step, so that few tell as much as all."""
        model.generate(**inputs, num_beams=beams, do_sample=False, min_new_tokens=4, max_new_tokens=4, max_length=None)

    return sparsify_for_inference(model, few_steps)


def describe(choice: Choice) -> str:
    """A line of the table."""
    rows = ", ".join(f"{rows} rows x {calls}" for rows, calls in choice.batch)
    ratio = "not measured" if choice.ratio is None else f"sparse is {choice.ratio:.2f} times as fast"
    return (
        f"{len(choice.names):3} layers {choice.shape[0]} x {choice.shape[1]}, density {choice.density:.2f}, {rows}: "
        f"{choice.form} ({ratio})"
    )


def read_lines(path: Path | None) -> list[str]:
    # Not str.splitlines: text holds U+2028 and the like inside a sentence.
    data = sys.stdin.buffer.read() if path is None else path.read_bytes()
    try:
        lines = data.decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path or 'stdin'}: is no UTF-8 (byte {error.start}). Set --input.") from None
    if lines[-1] == "":
        lines.pop()
    return [line.strip() for line in lines]


def write_lines(path: Path | None, lines: Sequence[str]) -> None:
    data = "".join(line + "\n" for line in lines).encode("utf-8")
    if path is not None:
        path.write_bytes(data)
        return
    sys.stdout.buffer.write(data)
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
