"""The Triton kernels against PyTorch in Triton's interpreter; test_bitmask.py runs masking on a GPU.

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

COUNTED = """
import warnings
import torch
from gap_ds.masks import selection, tally, triton as kernels
from gap_ds.masks.box import Box
from gap_ds.masks.tally import Part, Tally

kernels._ROUNDS = 2  # the interpreter takes its time
block, program = kernels._COUNTED, kernels._COUNTED * kernels._ROUNDS
generator = torch.Generator().manual_seed(0)


def some(n, dtype):
    weights = (torch.randn(n, generator=generator) * 10.0 ** torch.randint(-6, 3, (n,), generator=generator)).to(dtype)
    weights[::50], weights[1::50], weights[2::50], weights[3::50] = float("nan"), float("inf"), 0.0, -0.0
    return weights


def counts(way, parts, shift, bins, size):
    found = torch.zeros(size + 1, dtype=torch.int64)
    way(found, parts, shift, bins)
    return found[:-1]


# Programs that are full and not, pieces that are empty, several in one budget; -1: where the threshold of none lies.
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    pieces = [some(n, dtype)[i % 3 :] for i, n in enumerate((5, 0, 1, block + 7, program + 3))]
    keys = [selection.ByPyTorch().magnitude_keys(piece.float()) for piece in pieces]
    some_key = int(keys[-1].median())
    for shift, bins in selection.PASSES[31]:
        prefix = (some_key >> shift) // bins
        parts = [Part(p, i // 2 * bins, prefix, 3 * bins + i) for i, p in enumerate(pieces)]
        parts += [Part(k, i // 2 * bins, prefix) for i, k in enumerate(keys)]
        found = counts(kernels.count_keys, parts, shift, bins, 3 * bins + 5)
        assert torch.equal(found, counts(tally.count_by_pytorch, parts, shift, bins, 3 * bins + 5))
        with_prefix = sum(int(((k >> shift).div(bins, rounding_mode="floor") == prefix).sum()) for k in keys)
        assert int(found[: 3 * bins].sum()) == 2 * with_prefix

# It passes the check before its first use, and a selection gives the same masks with it.
warnings.simplefilter("error")
assert tally.kernel(torch.device("cpu")) is kernels.count_keys
weights = [torch.randn(n, generator=generator).round(decimals=1) for n in (700, 3, 5_000)]


def pieces():
    return [
        selection.Piece(str(i), Box.span(0, len(w), len(w)), selection.magnitude_keys(w), i // 2)
        for i, w in enumerate(weights)
    ]


expected = selection.select_largest(pieces(), [99, 3000], selection.Single())
tally._way = lambda device: kernels.count_keys
selection._is_host = lambda device: False
found = selection.select_largest(pieces(), [99, 3000], selection.Single())
assert all(torch.equal(a, b) for a, b in zip(found, expected))
"""

STEPS = """
import itertools
import warnings
import torch
from gap_ds import GaPEngine, optim
from gap_ds.masks import bitmask
from gap_ds.optim import sparse_state
from gap_ds.optim import triton as triton_steps
from gap_ds.optim.kept import PROGRAM, check
from gap_ds.optim.triton import Kernels

kernels, generator = Kernels(), torch.Generator().manual_seed(0)


def close(a, b):
    return torch.allclose(a, b, rtol=1e-5, atol=1e-6)


# They pass the check before their first use.
check(kernels, torch.device("cpu"), close)

KINDS = [
    (optim.AdamW, {}),
    (optim.AdamW, {"amsgrad": True, "maximize": True, "betas": (0.4, 0.95)}),
    (optim.SGD, {"weight_decay": 0.1}),
    (optim.SGD, {"momentum": 0.9, "dampening": 0.3, "maximize": True}),
    (optim.SGD, {"momentum": 0.9, "nesterov": True}),
]
ranges = [(1, PROGRAM), (PROGRAM + 1, 7), (PROGRAM + 9, 2 * PROGRAM + 13), (3 * PROGRAM + 30, 64)]
for kind, settings in KINDS:
    found = []
    for steps in (kernels, None):
        sparse_state._steps = lambda device: steps
        generator.manual_seed(1)
        # Pieces start anywhere in one buffer, of any length; weights between them belong to none.
        owners = [torch.nn.Parameter(torch.randn(4 * PROGRAM, generator=generator)) for _ in range(2)]
        optimizer = kind(owners, lr=0.1, **settings)
        for owner, density in zip(owners, (0.1, 0.7)):
            optimizer.divide(owner, ranges)
            for start, numel in ranges:
                bits = bitmask.pack(torch.rand(numel, generator=generator) < density)
                optimizer.change_mask(owner, start, bits)
        for step in range(3):
            # One of them has fewer steps: another count, another launch.
            for owner in owners[: 1 + step % 2]:
                owner.grad = torch.randn(owner.shape, generator=generator)
            optimizer.step()
            optimizer.zero_grad()
        held = [value for owner in owners for _, value in optimizer._moments_of(owner)]
        found.append([*(o.detach() for o in owners), *itertools.chain(*held)])
    assert all(close(a, b) for a, b in zip(*found, strict=True)), (kind, settings)


# Tables are sent once, also where the pieces of a step are in several groups, or have taken several numbers of steps.
sparse_state._steps = lambda device: kernels
parameters = [torch.nn.Parameter(torch.randn(20, generator=generator)) for _ in range(3)]
groups = [{"params": parameters[:2]}, {"params": parameters[2:], "lr": 0.01}]
optimizer, sent = optim.AdamW(groups, lr=0.1), []
for parameter in parameters:
    optimizer.divide(parameter, [(0, 20)])
    optimizer.change_mask(parameter, 0, bitmask.pack(torch.arange(20) % 2 == 0))
    parameter.grad = torch.ones(20)
optimizer.state[parameters[0]] = optimizer._first_state(parameters[0], optimizer.param_groups[0])
optimizer.state[parameters[0]]["step"] += 5
send, triton_steps.sent = triton_steps.sent, lambda *given: sent.append(given) or send(*given)
for step in range(4):
    optimizer.step()
    assert len(sent) == 3, (step, len(sent))
triton_steps.sent = send


# A run over boundaries with it: pruned weights are untouched zeros, the others equal PyTorch's up to rounding.
def train():
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(24, 24) for _ in range(4)))
    config = {"sparsity": 0.7, "partitions": 2, "phase_steps": 2, "rounds": 1, "finetune_steps": 2}
    engine = GaPEngine(model, config | {"include": [".*weight"]}, optimizer=optim.AdamW(model.parameters(), lr=1e-2))
    while not engine.finished:
        engine.backward(engine(torch.randn(8, 24)).square().mean())
        engine.step()
    return model.state_dict(), engine.stats()["kept"]


runs = []
for steps in (kernels, None):
    sparse_state._steps = lambda device: steps
    runs.append(train())
assert runs[0][1] == runs[1][1]
assert all(close(runs[0][0][name], tensor) for name, tensor in runs[1][0].items())
"""

# Without a GPU triton compiles, too; only a launch needs the driver.
COMPILED = """
import itertools, pathlib, re, subprocess, tempfile
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from gap_ds.masks import selection, triton as kernels
from gap_ds.optim import triton as steps

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


def compiled(kernel, arguments, constants, target, warps):
    made = triton.compile(ASTSource(kernel, arguments, constants), target=target, options={"num_warps": warps})
    registers, shared, spilled = usage(target, made.asm)
    assert spilled == 0
    shared = max(shared, made.metadata.shared)
    print(target.backend, target.arch, kernel.__name__, *constants.values(), registers, shared)
    return registers, shared


for word, target in [(word, targets[0]) for word in kernels._WORD.values()] + [(tl.int32, t) for t in targets[1:]]:
    registers, shared = compiled(kernels._store_zeros, arguments, {(3,): word, (4,): kernels._BLOCK}, target, 4)
    # Half of the threads that a processor can hold are there at once with 64 registers each.
    assert registers <= 64 and shared == 0

arguments = {"table": "*i64", "counts": "*i64", "pieces": "i32", "halvings": "i32", "shift": "i32"}
arguments |= dict.fromkeys(("value", "bins", "block", "rounds"), "constexpr")
most, fewer = (bins for _, bins in selection.PASSES[31][:2])
cases = [(tl.float32, most, target) for target in targets] + [(tl.float32, fewer, targets[0])]
for value, bins, target in [*cases, (tl.bfloat16, most, targets[0]), (tl.int32, most, targets[0])]:
    constants = {(5,): value, (6,): bins, (7,): kernels._COUNTED, (8,): kernels._ROUNDS}
    registers, shared = compiled(kernels._count_keys, arguments, constants, target, kernels._WARPS)
    # One program of 16 warps fits a processor; its histogram lies in shared memory while the warps meet.
    assert registers <= 128 and shared <= 4 * bins

# Steps: names of the numbers, and of what is compiled for each kind of optimizer.
for kernel, numbers, kinds in (
    (steps._adamw, "sign decay one beta2 value size correction eps", {"largest": [False, True]}),
    (steps._sgd, "sign decay momentum rest rate", {"buffered": [True], "made": [True, False], "nesterov": [False]}),
):
    arguments = {"table": "*i64", "pieces": "i32", "halvings": "i32"} | dict.fromkeys(numbers.split(), "fp32")
    arguments |= dict.fromkeys([*kinds, "block"], "constexpr")
    for i, target in enumerate(targets):
        for choice in itertools.product(*kinds.values()) if i == 0 else [[values[0] for values in kinds.values()]]:
            constants = {(list(arguments).index(name),): value for name, value in zip(kinds, choice)}
            constants[(len(arguments) - 1,)] = steps.PROGRAM
            registers, shared = compiled(kernel, arguments, constants, target, 4)
            # The warps of a program meet once, to add up their kept weights.
            assert registers <= 128 and shared <= 4096
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton: pip install 'gap_ds[kernels]'")
@pytest.mark.parametrize(
    ("code", "interpret"),
    [(INTERPRETED, "1"), (COUNTED, "1"), (STEPS, "1"), (COMPILED, "0")],
    ids=["interpreted", "counting_interpreted", "steps_interpreted", "compiled"],
)
def test_the_kernels(code: str, interpret: str, tmp_path: Path) -> None:
    environment = os.environ | {
        "TRITON_INTERPRET": interpret,
        "TRITON_CACHE_DIR": str(tmp_path),
        "OMP_NUM_THREADS": "1",
    }
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-4000:]
