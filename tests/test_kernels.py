"""The Triton kernel against the PyTorch path, in Triton's interpreter; on a GPU tests/test_masks.py tries it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

CODE = """
import torch
from gap_ds import kernels, masks

words = {2: torch.int16, 4: torch.int32, 8: torch.int64}
generator = torch.Generator().manual_seed(0)
for n in (0, 1, 7, 8, 9, kernels._BLOCK - 1, kernels._BLOCK, kernels._BLOCK + 1, 2 * kernels._BLOCK + 13):
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for offset in (0, 3):
            buffer = torch.randn(offset + n + 5, generator=generator).to(dtype)
            buffer[::7] = torch.tensor([float("nan")]).to(dtype)
            expected = buffer.clone()
            bits = masks.pack(torch.rand(n, generator=generator) < 0.4)
            masks.zero_pruned_(expected[offset : offset + n], bits)
            integers = buffer.view(words[buffer.element_size()])
            kernels.zero_pruned_(integers[offset : offset + n], bits)
            assert torch.equal(integers, expected.view(integers.dtype)), (n, dtype, offset)
"""


def test_the_kernel_equals_the_pytorch_path() -> None:
    pytest.importorskip("triton", reason="triton is not installed (it comes with the CUDA builds of torch)")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-4000:]
