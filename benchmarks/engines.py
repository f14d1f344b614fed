"""An exported sparse model in other inference engines on a CPU: its logits there, and what its zeros are worth.

    python benchmarks/engines.py

A Llama with random weights, whole and with 90 % of its pruned matrices zero, without a cache: one forward pass by
torch, by torch after `sparsify_for_inference`, by ONNX Runtime and by OpenVINO, from the file that `torch.onnx.export`
writes. OpenVINO runs twice, the second time with sparse weight decompression allowed. One thread, interleaved, CPU
time. `ratio` is the time of the sparse model relative to that of the dense one in the same engine. Needs onnx,
onnxscript, onnxruntime and openvino, which are no dependencies of gap_ds: an engine that is missing is left out.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure
import torch
import transformers
from torch import Tensor, nn

from gap_ds import sparsify_for_inference

SIZES = {"vocab_size": 8000, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8}
QUICK = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
SPARSITY = 0.9

Run = Callable[[], Tensor]


def main() -> None:
    parser = measure.parser(__doc__)
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 16, 128])
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(1)
    sizes = QUICK if args.quick else SIZES
    rows = []
    for tokens in [4] if args.quick else args.tokens:
        rows += compare(sizes, tokens, 2 if args.quick else args.rounds)
    versions = {name: _version(name) for name in ("onnxruntime", "openvino")}
    measure.write("engines", rows, args.out, f"{SPARSITY:.0%} of the pruned matrices zero; {versions}")


class Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits


def build(sizes: dict[str, int], sparsity: float) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**sizes, num_attention_heads=8, attn_implementation="eager")
    model = transformers.LlamaForCausalLM(config).eval()
    for name, weight in model.named_parameters():
        if ".layers." in name and weight.dim() == 2:
            weight.data *= torch.rand(weight.shape) >= sparsity
    return Logits(model)


@torch.inference_mode()
def compare(sizes: dict[str, int], tokens: int, rounds: int) -> list[dict[str, Any]]:
    ids = torch.randint(sizes["vocab_size"], (1, tokens), generator=torch.Generator().manual_seed(1))
    with tempfile.TemporaryDirectory() as folder:
        runs: dict[tuple[str, str], Run] = {}
        for kind, sparsity in (("dense", 0.0), ("sparse", SPARSITY)):
            for engine, run in engines(build(sizes, sparsity), ids, Path(folder) / kind).items():
                runs[engine, kind] = run
        wanted = {kind: runs["torch", kind]() for kind in ("dense", "sparse")}
        apart = {key: float((run() - wanted[key[1]]).abs().max()) for key, run in runs.items()}
        times = measure.in_turns({"/".join(key): run for key, run in runs.items()}, rounds, timer=_cpu_seconds)
    rows = []
    for engine in dict.fromkeys(engine for engine, _ in runs):
        dense, sparse = (times[f"{engine}/{kind}"] for kind in ("dense", "sparse"))
        ratios = [b / a for a, b in zip(dense, sparse, strict=True)]
        rows.append(
            {
                "engine": engine,
                "tokens": tokens,
                "dense ms": round(1000 * statistics.median(dense), 2),
                "sparse ms": round(1000 * statistics.median(sparse), 2),
                "ratio": round(statistics.median(ratios), 3),
                "interval": [round(bound, 3) for bound in measure.interval(ratios)],
                "largest difference of a logit": max(apart[engine, "dense"], apart[engine, "sparse"]),
            }
        )
    return rows


def engines(model: nn.Module, ids: Tensor, folder: Path) -> dict[str, Run]:
    """Return what runs a model, by engine."""
    found: dict[str, Run] = {"torch": lambda: model(ids)}
    if _version("onnxscript") and (_version("onnxruntime") or _version("openvino")):
        folder.mkdir()
        path = str(folder / "model.onnx")
        program = torch.onnx.export(
            model, (ids,), dynamo=True, input_names=["ids"], output_names=["logits"], verbose=False
        )
        assert program is not None
        program.save(path)
        found |= _onnxruntime(path, ids) | _openvino(path, ids)
    ours = build_again(model)
    sparsify_for_inference(ours.model, lambda _: ours(ids), seconds=20)
    return found | {"torch, sparsify_for_inference": lambda: ours(ids)}


def build_again(model: nn.Module) -> Logits:
    copy = Logits(transformers.LlamaForCausalLM(model.model.config).eval())
    copy.load_state_dict(model.state_dict())
    return copy


def _onnxruntime(path: str, ids: Tensor) -> dict[str, Run]:
    if not _version("onnxruntime"):
        return {}
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return {"ONNX Runtime": lambda: torch.from_numpy(session.run(None, {"ids": ids.numpy()})[0])}


def _openvino(path: str, ids: Tensor) -> dict[str, Run]:
    if not _version("openvino"):
        return {}
    import openvino

    def run(settings: dict[str, Any]) -> Run:
        options = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32", **settings}
        compiled = openvino.Core().compile_model(path, "CPU", options)
        return lambda: torch.from_numpy(compiled([ids.numpy()])[0])

    decompress = {"CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE": 0.5}
    return {"OpenVINO": run({}), "OpenVINO, sparse weight decompression": run(decompress)}


def _cpu_seconds(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def _version(name: str) -> str | None:
    return importlib.metadata.version(name) if importlib.util.find_spec(name) else None


if __name__ == "__main__":
    main()
