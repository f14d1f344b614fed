"""Bit masks against plain NumPy and Python."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gap_ds.masks import bitmask

PROPERTY = settings(max_examples=200, deadline=None, derandomize=True, database=None)
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
BLOCK = bitmask._CPU_BLOCK // 2  # weights of two bytes; two blocks of four bytes, four of eight
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
        bits = bitmask.pack(torch.from_numpy(kept).to(device))
        assert bits.dtype == torch.uint8 and bits.device.type == device
        assert bits.tolist() == bytes_of(kept)
        assert bits.numel() == bitmask.nbytes(n) <= (n + 7) // 8  # one bit per weight, rounded up to a byte
        assert bitmask.count(bits) == kept.sum()
        restored = bitmask.unpack(bits, n)
        assert restored.dtype == torch.bool and restored.cpu().numpy().tolist() == kept.tolist()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kept", [True, False])
def test_all_and_nothing(device: str, kept: bool) -> None:
    for n in (0, 1, 7, 8, 9, 64, 65):
        bits = bitmask.pack(torch.full((n,), kept, device=device))
        assert bitmask.count(bits) == n * kept
        weights = torch.ones(n, device=device)
        bitmask.zero_pruned_(weights, bits)
        assert weights.sum() == n * kept


@PROPERTY
@given(st.lists(st.booleans(), max_size=80), st.data())
def test_unpack_from_anywhere(kept: list[bool], data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(kept)))
    numel = data.draw(st.integers(0, len(kept) - start))
    bits = bitmask.pack(torch.tensor(kept, dtype=torch.bool))
    assert bitmask.unpack(bits, numel, start).tolist() == kept[start : start + numel]


@pytest.mark.gpu
def test_unpack_from_anywhere_on_a_gpu() -> None:
    kept = some_mask(75)
    bits = bitmask.pack(torch.from_numpy(kept).cuda())
    for start in range(76):
        for numel in range(76 - start):
            assert bitmask.unpack(bits, numel, start).tolist() == kept[start : start + numel].tolist()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_pruned_changes_no_bit_of_a_kept_weight(dtype: torch.dtype, device: str) -> None:
    """Pruned weights become exactly +0.0, even where they were infinite, NaN or negative."""
    for n in LENGTHS:
        kept, weights = some_mask(n), some_weights(n, dtype)
        expected = np.where(kept, words(weights).numpy(), 0)
        piece = weights.to(device)
        bitmask.zero_pruned_(piece, bitmask.pack(torch.from_numpy(kept).to(device)))
        assert np.array_equal(words(piece).numpy(), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [1, 3, 8])
def test_zero_pruned_stays_inside_its_piece(dtype: torch.dtype, device: str, offset: int) -> None:
    """A piece may start anywhere in a flat buffer; its neighbours do not change."""
    for n in (5, 16, 61, BLOCK + 3):
        buffer, kept = some_weights(offset + n + 9, dtype), some_mask(n, seed=1)
        expected = words(buffer).numpy().copy()
        expected[offset : offset + n][~kept] = 0
        moved = buffer.to(device)
        bitmask.zero_pruned_(moved[offset : offset + n], bitmask.pack(torch.from_numpy(kept).to(device)))
        assert np.array_equal(words(moved).numpy(), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_revived_weights_of_many_pieces(dtype: torch.dtype, device: str) -> None:
    """-0.0 is 0 and NaN is not. Some pieces are large enough for the compiled loop."""
    pieces, expected = [], []
    for n in LENGTHS:
        kept, weights = some_mask(n), some_weights(n, dtype)
        expected.append(int(((weights != 0) & ~torch.from_numpy(kept)).sum()))
        pieces.append((weights.to(device), bitmask.pack(torch.from_numpy(kept).to(device))))
    assert bitmask.count_revived_all(pieces) == expected and sum(expected)
    for piece, bits in pieces:
        bitmask.zero_pruned_(piece, bits)
    assert not any(bitmask.count_revived_all(pieces)) and bitmask.count_revived_all([]) == []


def test_zero_pruned_twice_is_once() -> None:
    kept, weights = torch.from_numpy(some_mask(100)), torch.randn(100, generator=torch.Generator().manual_seed(0))
    bits = bitmask.pack(kept)
    bitmask.zero_pruned_(weights, bits)
    once = weights.clone()
    bitmask.zero_pruned_(weights, bits)
    assert torch.equal(weights, once)


@pytest.mark.parametrize("device", DEVICES)
def test_many_pieces_at_once(device: str) -> None:
    """Pieces of all lengths, empty ones included, anywhere in buffers of several types: the same as one at a time."""
    buffers = [some_weights(20_000, dtype).to(device) for dtype in DTYPES]
    expected = [buffer.clone() for buffer in buffers]
    pieces, start = [], 1
    for seed, n in enumerate((0, 1, 7, 8, 9, 0, 4095, 4097, 1003, 0)):
        bits = bitmask.pack(torch.from_numpy(some_mask(n, seed)).to(device))
        for buffer, alone in zip(buffers, expected, strict=True):
            pieces.append((buffer[start : start + n], bits))
            bitmask.zero_pruned_(alone[start : start + n], bits)
        start += n + seed
    bitmask.zero_pruned_all_(iter(pieces))
    assert all(torch.equal(words(a), words(b)) for a, b in zip(buffers, expected, strict=True))
    bitmask.zero_pruned_all_([])


@pytest.mark.gpu
@pytest.mark.parametrize("element_size", WORDS)
def test_a_gpu_uses_the_kernel_and_waits_for_nothing(element_size: int) -> None:
    pytest.importorskip("triton")
    assert bitmask._way(torch.device("cuda", 0), element_size) is not bitmask._by_pytorch_all
    pieces = torch.ones(4, 1003, dtype=WORDS[element_size], device="cuda:0")
    bits = [bitmask.pack(torch.from_numpy(some_mask(1003, seed)).cuda()) for seed in range(4)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        bitmask.zero_pruned_all_(zip(pieces, bits, strict=True))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert int(pieces.sum()) == sum(bitmask.count(mask) for mask in bits)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pytorch_does_what_numpy_does(dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's operations, used on an accelerator without a kernel, give the same bits on all devices."""
    monkeypatch.setattr(bitmask, "_DEVICE_BLOCK", 16)
    for n in (*range(18), 127, 128, 129, 1003):
        for offset in (0, 3):
            buffer, bits = some_weights(offset + n + 5, dtype), bitmask.pack(torch.from_numpy(some_mask(n)))
            moved = buffer.to(device)
            bitmask.zero_pruned_(buffer[offset : offset + n], bits)
            bitmask._by_pytorch(moved.view(WORDS[dtype.itemsize])[offset : offset + n], bits.to(device))
            assert torch.equal(words(moved), words(buffer))


def test_threads_do_not_share_scratch() -> None:
    """NumPy releases the GIL while it computes, so eight threads are inside `zero_pruned_` at once."""
    n, together, wrong = BLOCK + 13, threading.Barrier(8), []

    def work(seed: int) -> None:
        weights, kept = torch.from_numpy(numpy_rng(seed).standard_normal(n, dtype=np.float32)), some_mask(n, seed)
        bits, expected = bitmask.pack(torch.from_numpy(kept)), words(weights).numpy() * kept
        together.wait(timeout=60)
        for _ in range(5):
            piece = weights.clone()
            bitmask.zero_pruned_(piece, bits)
            if not np.array_equal(words(piece).numpy(), expected):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together.n_waiting == 0 and not together.broken and not wrong


def test_scratch_is_kept_and_no_larger_than_needed() -> None:
    scratch = bitmask._Scratch()
    index, expanded, items = scratch.room(4, 100)
    assert (index.shape, expanded.shape, items.shape) == ((100,), (100, 8), (100,))
    assert index.dtype == np.intp and np.shares_memory(expanded, items)
    assert scratch.room(4, 7)[0] is scratch.room(4, 100)[0] is index
    assert len(scratch.room(2, 3)[0]) == 3  # words of another size have separate scratch
    assert len(scratch.room(4, 101)[0]) == 101


def write_zeros(pieces: Sequence[tuple[Tensor, Tensor]]) -> Callable[[], None]:
    return lambda: [bitmask._by_pytorch(piece, bits) for piece, bits in pieces] and None


def write_too_much(pieces: Sequence[tuple[Tensor, Tensor]]) -> Callable[[], None]:
    return lambda: [piece.zero_() for piece, _ in pieces] and None


def do_not_compile(pieces: Sequence[tuple[Tensor, Tensor]]) -> Callable[[], None]:
    raise RuntimeError("ptxas is not there")


@pytest.mark.parametrize("element_size", WORDS)
@pytest.mark.parametrize(
    ("kernel", "complaint"),
    [
        (write_zeros, None),
        (write_too_much, "its results differ from PyTorch's"),
        (do_not_compile, "ptxas is not there"),
        (None, "ImportError|ModuleNotFoundError"),
    ],
)
def test_a_kernel_is_used_only_if_it_does_what_pytorch_does(
    kernel: Callable[..., None] | None, complaint: str | None, element_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = ModuleType("gap_ds.masks.triton")
    module.zero_pruned_all = kernel  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "gap_ds.masks.triton", module if kernel else None)
    if complaint is None:
        way = bitmask._kernel(torch.device("cpu"), element_size)
        assert way is not None and way([]).lasting
    else:
        with pytest.warns(UserWarning, match=f"triton's kernel is not used on cpu: .*({complaint})") as warned:
            assert bitmask._kernel(torch.device("cpu"), element_size) is None
        assert len(warned) == 1
