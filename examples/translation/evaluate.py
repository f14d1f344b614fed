"""Translate with an exported model and score the result, or score files of translations.

    python evaluate.py --model-dir out/model --dataset path/or/hub-name --split test --beams 4 --out results.json
    python evaluate.py --hypotheses mine.txt --references ref1.txt ref2.txt --json scores.json

Reports BLEU of sacreBLEU, cased and uncased (-lc), and chrF, each with its signature. Under torchrun or the deepspeed
launcher the processes share the sentences; the translations do not depend on their number.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from metrics import METRICS, Scorer, count_zeros, score
from model import load_pretrained, pretrained
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import (
    HfArgumentParser,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.logging import disable_progress_bar

# ---------------------------------------------------------------------------------------------------- translation


def translate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sources: Sequence[str], **options: Any
) -> list[str]:
    """Return the translations of `sources`, in their order, on every rank. Options as in `translate_share`.

    All ranks must call it with the same arguments. Under torch.distributed every rank translates a share.
    """
    rank, world_size = _rank_and_world_size()
    share = translate_share(model, tokenizer, sources, rank=rank, world_size=world_size, **options)
    return gather(share, len(sources))


def translate_share(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sources: Sequence[str],
    *,
    beams: int = 4,
    batch_tokens: int = 2048,
    length_penalty: float = 1.0,
    rank: int = 0,
    world_size: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> dict[int, str]:
    """Return this rank's translations, by position in `sources`. The texts do not depend on `world_size`.

    A translation has at most 1.5 x + 20 tokens for x source tokens, and at most as many as the model has positions.
    Longer sources are cut to the positions.

    Args:
        model: the Hugging Face model itself, not its DDP or DeepSpeed wrapper. Its mode is restored.
        beams: width of the beam; 1 is greedy search.
        batch_tokens: source tokens in a batch, padding included; a batch has at least one sentence.
        length_penalty: exponent of the length that a hypothesis is divided by.
        progress: called with (done, total), this rank's sentences.
    """
    if beams < 1 or batch_tokens < 1:
        raise ValueError(f"beams={beams}, batch_tokens={batch_tokens}: at least 1 each. Set --beams, --batch-tokens.")
    positions = getattr(model.config, "max_position_embeddings", None)
    cut = {"truncation": True, "max_length": positions} if positions else {}
    tokens = tokenizer(list(sources), **cut)["input_ids"] if sources else []
    batches = batches_by_tokens([len(ids) for ids in tokens], batch_tokens)

    # Ranks take whole batches: a sentence has the same neighbours, and the same rounding, at any world size.
    mine = batches[rank::world_size]
    total = sum(map(len, mine))
    # Under ZeRO-3 every forward pass gathers weights from all ranks: all ranks need the same number of passes.
    partitioned = world_size > 1 and any(hasattr(p, "ds_id") for p in model.parameters())
    idle = math.ceil(len(batches) / world_size) - len(mine) if partitioned else 0

    options = copy.deepcopy(model.generation_config)
    options.update(num_beams=beams, do_sample=False, use_cache=True, max_length=None)
    if beams > 1:
        options.update(length_penalty=length_penalty, early_stopping=False)
    # inference_mode is a little faster, but weights gathered under it cannot be trained afterwards.
    no_grad = torch.no_grad if partitioned else torch.inference_mode

    hypotheses: dict[int, str] = {}
    training = model.training
    model.eval()
    try:
        with no_grad():
            for number, batch in enumerate(mine + batches[-1:] * idle):
                rows = {"input_ids": [tokens[i] for i in batch]}
                inputs = tokenizer.pad(rows, padding_side="right", return_tensors="pt")
                limits = [max_new_tokens(len(ids), positions) for ids in rows["input_ids"]]
                options.max_new_tokens = max(limits)
                output = model.generate(
                    inputs["input_ids"].to(model.device),
                    attention_mask=inputs["attention_mask"].to(model.device),
                    generation_config=options,
                    logits_processor=LogitsProcessorList([_EndAt(limits, beams, options.eos_token_id, model.device)]),
                    synced_gpus=partitioned,
                )
                if number >= len(mine):
                    continue
                texts = tokenizer.batch_decode(output, skip_special_tokens=True, clean_up_tokenization_spaces=False)
                hypotheses.update(zip(batch, (text.strip() for text in texts), strict=True))
                if progress:
                    progress(len(hypotheses), total)
    finally:
        model.train(training)
    return hypotheses


def gather(share: dict[int, str], count: int) -> list[str]:
    """Merge all ranks' shares into one list of `count` translations in input order, on every rank."""
    _, world_size = _rank_and_world_size()
    shares: list[dict[int, str]] = [share] * world_size
    if world_size > 1:
        dist.all_gather_object(shares, share)
    merged = {position: text for part in shares for position, text in part.items()}
    assert len(merged) == count, (len(merged), count)
    return [merged[position] for position in range(count)]


def batches_by_tokens(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Group positions of sequences by length, longest first, so that rows x longest row <= `batch_tokens`.

    >>> batches_by_tokens([2, 9, 3, 3], batch_tokens=6)
    [[1], [2, 3], [0]]
    """
    batches: list[list[int]] = []
    for position in sorted(range(len(lengths)), key=lambda position: (-lengths[position], position)):
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= batch_tokens:
            batches[-1].append(position)
        else:
            batches.append([position])
    return batches


def max_new_tokens(source_tokens: int, positions: int | None) -> int:
    """Return the largest number of tokens of a translation, `</s>` included. positions: of the model; None: no limit.

    >>> max_new_tokens(10, None), max_new_tokens(10, 30)
    (35, 29)
    """
    limit = source_tokens * 3 // 2 + 20
    return limit if positions is None else min(limit, positions - 1)  # one position holds the start token


class _EndAt(LogitsProcessor):  # type: ignore[misc]
    """Allows only `</s>` once a sentence has reached its limit.

    With one limit for the batch, the length of a translation that repeats itself would depend on its neighbours.
    """

    def __init__(self, limits: Sequence[int], beams: int, eos: int | list[int], device: torch.device) -> None:
        self.first = min(limits)
        self.limits = torch.tensor(limits, device=device).repeat_interleave(beams).unsqueeze(-1)
        self.eos = [eos] if isinstance(eos, int) else eos

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """input_ids [B * beams, start token and tokens so far], scores [B * beams, vocabulary]."""
        if input_ids.shape[1] < self.first:
            return scores
        ended = torch.full_like(scores, -torch.inf)
        ended[:, self.eos] = scores[:, self.eos]
        return torch.where(input_ids.shape[1] >= self.limits, ended, scores)


# --------------------------------------------------------------------------------------------------- command line


@dataclass
class Arguments:
    """Translate and score (--model-dir, --dataset), or score text files (--hypotheses, --references)."""

    model_dir: str | None = field(default=None, metadata={"help": "folder of an exported Hugging Face model"})
    dataset: str | None = field(default=None, metadata={"help": "folder, file or hub name; default: shipped corpus"})
    dataset_config: str | None = field(default=None, metadata={"help": "configuration of a hub dataset, e.g. de-en"})
    split: str = field(default="test", metadata={"help": "split of the dataset"})
    source_lang: str = field(default="en", metadata={"help": "language translated from"})
    target_lang: str = field(default="de", metadata={"help": "language translated into"})
    limit: int | None = field(default=None, metadata={"help": "score the first N sentences only"})
    beams: int = field(default=4, metadata={"help": "width of the beam; 1 is greedy search"})
    length_penalty: float = field(default=1.0, metadata={"help": "exponent of the length a hypothesis is divided by"})
    batch_tokens: int = field(default=2048, metadata={"help": "source tokens in a batch, padding included"})
    dtype: Literal["float32", "bfloat16", "float16"] = field(default="float32", metadata={"help": "of the weights"})
    device: str | None = field(default=None, metadata={"help": "cpu or cuda; default: cuda where there is one"})
    threads: int | None = field(default=None, metadata={"help": "CPU threads of each process"})
    samples: int = field(default=3, metadata={"help": "translations to print"})
    trust_remote_code: bool = field(default=False, metadata={"help": "run code that comes with the model"})
    hypotheses: str | None = field(default=None, metadata={"help": "text file, one translation a line"})
    references: list[str] | None = field(default=None, metadata={"help": "text files, one reference a line"})
    metrics: list[str] = field(
        default_factory=lambda: list(METRICS), metadata={"help": "what to score: " + ", ".join(METRICS)}
    )
    out: str | None = field(default=None, metadata={"help": "JSON file for the results", "aliases": ["--json"]})
    overwrite: bool = field(default=False, metadata={"help": "replace the file of --out"})
    local_rank: int = field(default=-1, metadata={"help": "set by launchers, ignored: LOCAL_RANK is read instead"})


def main(argv: Sequence[str] | None = None) -> int:
    """Return 0, or 2 on every rank after an error; rank 0 prints one line to stderr."""
    rank = int(os.environ.get("RANK", 0))
    with contextlib.ExitStack() as quiet:
        if rank != 0:
            quiet.enter_context(contextlib.redirect_stdout(None))
            quiet.enter_context(contextlib.redirect_stderr(io.StringIO()))
        parsed = HfArgumentParser(Arguments, description=Arguments.__doc__).parse_args_into_dataclasses(args=argv)
    try:
        run(parsed[0])
    except (ValueError, OSError) as error:
        if rank == 0:
            print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def run(arguments: Arguments) -> None:
    """Run the command line. ValueError for settings or files that do not fit together."""
    sources = ("model_dir", "dataset", "hypotheses", "references")
    given = ["--" + name.replace("_", "-") for name in sources if getattr(arguments, name) is not None]
    of_files = given == ["--hypotheses", "--references"]
    if not of_files and given not in (["--model-dir"], ["--model-dir", "--dataset"]):
        raise ValueError(
            f"{', '.join(given) or 'nothing to score'}: must be --model-dir with or without --dataset,"
            " or --hypotheses with --references."
        )
    if arguments.out and Path(arguments.out).exists() and not arguments.overwrite:
        raise ValueError(f"out={arguments.out!r}: exists. Set another --out, or --overwrite.")

    if of_files:
        results = score_files(arguments)
    else:
        with _processes(arguments.device) as device:
            results = score_model(arguments, device)
    if arguments.out and int(os.environ.get("RANK", 0)) == 0:
        _write_json(Path(arguments.out), results)


def score_files(arguments: Arguments) -> dict[str, Any]:
    """Score a text file of translations against one or more files of references. Prints and returns the scores."""
    assert arguments.hypotheses is not None and arguments.references is not None
    hypotheses = _read_lines(arguments.hypotheses)
    references = [_read_lines(path) for path in arguments.references]
    for path, lines in zip(arguments.references, references, strict=True):
        if len(lines) != len(hypotheses):
            raise ValueError(
                f"{path} has {len(lines)} lines: must be {len(hypotheses)}, as {arguments.hypotheses} has."
                " Set --hypotheses or --references."
            )
    scores = score(hypotheses, references, arguments.metrics)
    if int(os.environ.get("RANK", 0)) == 0:
        print(scores)
    return {**scores.to_dict(), "hypotheses": arguments.hypotheses, "references": arguments.references}


def score_model(arguments: Arguments, device: torch.device) -> dict[str, Any]:
    """Score an exported model on a dataset. Prints and returns the scores."""
    from data import load_rows  # not at the top: scoring text files needs no `datasets`

    assert arguments.model_dir is not None
    if not Path(arguments.model_dir).is_dir():
        raise ValueError(f"model_dir={arguments.model_dir!r}: must be a folder with a saved model. Set --model-dir.")
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    disable_progress_bar()  # of loading: every process would show one
    rank, world_size = _rank_and_world_size()
    console = Console(stderr=True, quiet=rank != 0)

    rows = load_rows(
        arguments.dataset,
        arguments.split,
        arguments.source_lang,
        arguments.target_lang,
        config=arguments.dataset_config,
        limit=arguments.limit,
    )
    sources, references = list(rows["source"]), list(rows["target"])
    scorer = Scorer(references, arguments.metrics)
    code = arguments.trust_remote_code
    tokenizer = pretrained.tokenizer(arguments.model_dir, code)
    dtype = getattr(torch, arguments.dtype)
    model = load_pretrained(arguments.model_dir, trust_remote_code=code, dtype=dtype).to(device)

    start = time.perf_counter()
    with _progress(console) as progress:
        hypotheses = translate(
            model,
            tokenizer,
            sources,
            beams=arguments.beams,
            batch_tokens=arguments.batch_tokens,
            length_penalty=arguments.length_penalty,
            progress=progress,
        )
    seconds = time.perf_counter() - start
    scores = scorer(hypotheses)

    if rank == 0:
        for i in range(min(arguments.samples, len(sources))):
            print(f"{'source':12} {sources[i]}\n{'reference':12} {references[i]}\n{'translation':12} {hypotheses[i]}\n")
        print(scores)
    settings = ("model_dir", "dataset", "dataset_config", "split", "source_lang", "target_lang", "limit")
    search = ("beams", "length_penalty", "batch_tokens", "dtype")
    return {
        **scores.to_dict(),
        "zeros": count_zeros(model),
        **{name: getattr(arguments, name) for name in settings + search},
        "seconds": round(seconds, 3),
        "sentences_per_second": round(len(sources) / seconds, 2),
        "device": device.type,
        "threads": torch.get_num_threads(),
        "world_size": world_size,
    }


def find_device(name: str | None) -> torch.device:
    """Return the device of this name; ValueError if it is not available."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device={name!r}: is not available here ({first_line(error)}).") from None
    if device.type == "meta":
        raise ValueError(f"--device={name!r}: holds no weights. Set cpu or cuda.")
    return device


def first_line(error: BaseException) -> str:
    lines = str(error).strip().split("\n")
    return (lines[0] or type(error).__name__).rstrip(".:")


@contextlib.contextmanager
def _processes(wanted: str | None) -> Iterator[torch.device]:
    """Set up the launcher's process group, if there is one, and yield this process's device."""
    kind = wanted or ("cuda" if torch.cuda.is_available() else "cpu")
    device = find_device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if kind == "cuda" else kind)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        yield device
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def _progress(console: Console) -> Iterator[Callable[[int, int], None]]:
    columns = TextColumn("translating"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("translating", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _rank_and_world_size() -> tuple[int, int]:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def _read_lines(path: str) -> list[str]:
    # Not str.splitlines: news text has characters such as U+2028 inside sentences, which end no line for sacreBLEU.
    try:
        with open(path, encoding="utf-8", newline="\n") as file:
            return [line.rstrip() for line in file]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8 (byte {error.start}). Set another file.") from None


def _write_json(path: Path, results: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)  # a kill leaves the whole file or none


if __name__ == "__main__":
    sys.exit(main())
