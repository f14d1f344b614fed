"""Bit masks against plain NumPy and Python."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gap_ds import masks

PROPERTY = settings(max_examples=200, deadline=None, derandomize=True, database=None)
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
BLOCK = 8 * masks._CPU_BLOCK
LENGTHS = [*range(101), BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 8, 2 * BLOCK + 13]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]

numpy_rng = np.random.default_rng


def some_mask(n: int, seed: int = 0) -> np.ndarray:
    return numpy_rng(n + seed).random(n) < 0.4


def bytes_of(kept: np.ndarray) -> list[int]:
    """The documented layout: bit i % 8 of byte i // 8, least significant first, unused bits zero."""
    out = [0] * ((len(kept) + 7) // 8)
    for i in np.flatnonzero(kept):
        out[i // 8] |= 1 << (i % 8)
    return out


def some_weights(n: int, dtype: torch.dtype) -> Tensor:
    """Weights with zeros of both signs, infinities, NaN and subnormal numbers among them."""
    weights = torch.from_numpy(numpy_rng(n).standard_normal(n))
    special = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1e-40, -1e-7], dtype=torch.float64)
    places = torch.from_numpy(numpy_rng(n + 1).integers(0, 2 * len(special), n))
    return torch.where(places < len(special), special[places % len(special)], weights).to(dtype)


def words(tensor: Tensor) -> Tensor:
    return tensor.view(WORDS[tensor.element_size()]).cpu()


@pytest.mark.parametrize("device", DEVICES)
def test_pack_count_and_unpack_by_the_layout(device: str) -> None:
    for n in LENGTHS:
        kept = some_mask(n)
        bits = masks.pack(torch.from_numpy(kept).to(device))
        assert bits.dtype == torch.uint8 and bits.device.type == device
        assert bits.tolist() == bytes_of(kept)
        assert bits.numel() == masks.nbytes(n) <= (n + 7) // 8  # at most one bit per weight, but for the last byte
        assert masks.count(bits) == kept.sum()
        restored = masks.unpack(bits, n)
        assert restored.dtype == torch.bool and restored.cpu().numpy().tolist() == kept.tolist()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kept", [True, False])
def test_all_and_nothing(device: str, kept: bool) -> None:
    for n in (0, 1, 7, 8, 9, 64, 65):
        bits = masks.pack(torch.full((n,), kept, device=device))
        assert masks.count(bits) == n * kept
        weights = torch.ones(n, device=device)
        masks.zero_pruned_(weights, bits)
        assert weights.sum() == n * kept


@PROPERTY
@given(st.lists(st.booleans(), max_size=80), st.data())
def test_unpack_from_anywhere(kept: list[bool], data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(kept)))
    numel = data.draw(st.integers(0, len(kept) - start))
    bits = masks.pack(torch.tensor(kept, dtype=torch.bool))
    assert masks.unpack(bits, numel, start).tolist() == kept[start : start + numel]


@pytest.mark.gpu
def test_unpack_from_anywhere_on_a_gpu() -> None:
    kept = some_mask(75)
    bits = masks.pack(torch.from_numpy(kept).cuda())
    for start in range(76):
        for numel in range(76 - start):
            assert masks.unpack(bits, numel, start).tolist() == kept[start : start + numel].tolist()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_pruned_changes_no_bit_of_a_kept_weight(dtype: torch.dtype, device: str) -> None:
    """Pruned weights become +0.0 in all bits, even where they were infinite, NaN or negative."""
    for n in LENGTHS:
        kept, weights = some_mask(n), some_weights(n, dtype)
        expected = np.where(kept, words(weights).numpy(), 0)
        piece = weights.to(device)
        masks.zero_pruned_(piece, masks.pack(torch.from_numpy(kept).to(device)))
        assert np.array_equal(words(piece).numpy(), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [1, 3, 8])
def test_zero_pruned_stays_inside_its_piece(dtype: torch.dtype, device: str, offset: int) -> None:
    """A piece of a flat buffer starts anywhere; its neighbours are not touched."""
    for n in (5, 16, 61, BLOCK + 3):
        buffer, kept = some_weights(offset + n + 9, dtype), some_mask(n, seed=1)
        expected = words(buffer).numpy().copy()
        expected[offset : offset + n][~kept] = 0
        moved = buffer.to(device)
        masks.zero_pruned_(moved[offset : offset + n], masks.pack(torch.from_numpy(kept).to(device)))
        assert np.array_equal(words(moved).numpy(), expected)


def test_zero_pruned_twice_is_once() -> None:
    kept, weights = torch.from_numpy(some_mask(100)), torch.randn(100, generator=torch.Generator().manual_seed(0))
    bits = masks.pack(kept)
    masks.zero_pruned_(weights, bits)
    once = weights.clone()
    masks.zero_pruned_(weights, bits)
    assert torch.equal(weights, once)


@pytest.mark.gpu
def test_blocks_of_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masks, "_DEVICE_BLOCK", 16)
    kept, weights = some_mask(1003), some_weights(1003, torch.bfloat16)
    piece, on_cpu = weights.cuda(), weights.clone()
    masks.zero_pruned_(piece, masks.pack(torch.from_numpy(kept).cuda()))
    masks.zero_pruned_(on_cpu, masks.pack(torch.from_numpy(kept)))
    assert torch.equal(words(piece), words(on_cpu))
