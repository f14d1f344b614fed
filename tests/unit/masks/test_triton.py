"""The Triton kernel against PyTorch in Triton's interpreter; test_bitmask.py runs it on a GPU.

Tests start new processes, because triton decides at import whether it interprets or compiles.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

INTERPRETED = """
import warnings
import weakref
import torch
from gap_ds import GaPConfig, GaPEngine
from gap_ds.masks import bitmask as masks, triton as kernels

words = {2: torch.int16, 4: torch.int32, 8: torch.int64}
block = kernels._BLOCK
generator = torch.Generator().manual_seed(0)


def integers(tensor):
    return tensor.view(words[tensor.element_size()])


def check(lengths, dtype):
    # Pieces start anywhere, several in one buffer; the memory between them must not change.
    cuts, start = [], 0
    for i, n in enumerate(lengths):
        cuts.append(slice(start + i % 4, start + i % 4 + n))
        start = cuts[-1].stop
    cuts = [(i % 2, cut) for i, cut in enumerate(cuts)]
    buffers = [torch.randn(start + 5, generator=generator).to(dtype) for _ in range(2)]
    for buffer in buffers:
        buffer[::7] = float("nan")
    bits = [masks.pack(torch.rand(n, generator=generator) < 0.4) for n in lengths]
    by_pytorch, by_numpy = [b.clone() for b in buffers], [b.clone() for b in buffers]
    for (buffer, cut), mask in zip(cuts, bits):
        masks._by_pytorch(integers(by_pytorch[buffer])[cut], mask)
        masks._by_numpy(integers(by_numpy[buffer])[cut], mask)
    kernels.zero_pruned_all([(integers(buffers[buffer])[cut], mask) for (buffer, cut), mask in zip(cuts, bits)])()
    for found, *others in zip(buffers, by_pytorch, by_numpy):
        assert all(torch.equal(integers(found), integers(other)) for other in others), (lengths, dtype)


for dtype in (torch.float32, torch.bfloat16, torch.float64):
    for n in (0, 1, 7, 8, 9, block - 1, block, block + 1, 2 * block + 13):
        check([n], dtype)
    # Each program of a launch finds its piece, for any number of pieces, long and empty ones included.
    check([0, 0], dtype)
    check([0, 3 * block + 5, 0, 1, block, 2 * block - 1, 0], dtype)
    for pieces in (*range(2, 10), 33):
        check([5 + 3 * i for i in range(pieces)], dtype)

# It passes the check before its first use, and may be kept: it holds the places of its pieces and none of them.
warnings.simplefilter("error")
for element_size in (2, 4, 8):
    way = masks._kernel(torch.device("cpu"), element_size)
    assert way([]).lasting
weights, bits = torch.ones(20_000), masks.pack(torch.zeros(20_000, dtype=torch.bool))
pieces = [(weights[:9_000].view(torch.int32), bits[:1_125]), (weights[9_000:].view(torch.int32), bits[1_125:])]
masking, held = kernels.zero_pruned_all(pieces), weakref.ref(pieces[0][0])
del pieces
assert held() is None
for _ in range(3):
    weights.fill_(1.0)
    masking()
    assert not weights.any()


# Training gives the same weights with it.
def train():
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(24, 24) for _ in range(4)))
    config = GaPConfig(sparsity=0.7, partitions=2, phase_steps=2, rounds=1, finetune_steps=2, include=[".*weight"])
    engine = GaPEngine(model, config, optimizer=torch.optim.AdamW(model.parameters(), lr=1e-2))
    while not engine.finished:
        engine.backward(engine(torch.randn(8, 24)).square().mean())
        engine.step()
    return model.state_dict()


expected = train()
masks._way = lambda device, element_size: lambda pieces: masks.Masking(kernels.zero_pruned_all(pieces), lasting=True)
found = train()
assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
assert any((tensor == 0).any() for tensor in expected.values())
"""

# Without a GPU triton compiles, too; only a launch needs the driver.
COMPILED = """
import pathlib, re, subprocess, tempfile
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from gap_ds.masks import triton as kernels

arguments = {"table": "*i64", "pieces": "i32", "halvings": "i32", "word": "constexpr", "block": "constexpr"}
targets = [GPUTarget("cuda", arch, 32) for arch in (80, 90, 100)] + [GPUTarget("hip", "gfx942", 64)]


def usage(target, asm):
    # Registers of a thread, bytes of shared memory of a program, and spilled bytes or registers.
    if target.backend == "hip":
        fields = "vgpr_count", "group_segment_fixed_size", "vgpr_spill_count"
        return [int(re.search(rf"\\.{field}:\\s*(\\d+)", asm["amdgcn"])[1]) for field in fields]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        pathlib.Path(file.name).write_bytes(asm["cubin"])
        words = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        shown = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    return [int(re.search(rf"{field}:(\\d+)", shown)[1]) for field in ("REG", "SHARED", "LOCAL")]


for word, target in [(word, targets[0]) for word in kernels._WORD.values()] + [(tl.int32, t) for t in targets[1:]]:
    source = ASTSource(kernels._store_zeros, arguments, {(3,): word, (4,): kernels._BLOCK})
    compiled = triton.compile(source, target=target)
    registers, shared, spilled = usage(target, compiled.asm)
    print(target.backend, target.arch, word, registers, shared, spilled)
    # Half of the threads that a processor can hold are there at once with 64 registers each.
    assert registers <= 64 and shared == spilled == 0
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton: pip install 'gap_ds[kernels]'")
@pytest.mark.parametrize(("code", "interpret"), [(INTERPRETED, "1"), (COMPILED, "0")], ids=["interpreted", "compiled"])
def test_the_kernel(code: str, interpret: str, tmp_path: Path) -> None:
    environment = os.environ | {
        "TRITON_INTERPRET": interpret,
        "TRITON_CACHE_DIR": str(tmp_path),
        "OMP_NUM_THREADS": "1",
    }
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-4000:]
