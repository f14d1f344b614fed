"""The compiled loops against PyTorch and NumPy, their cache, and the fallback without them."""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gap_ds.inference.layers import CSRLinear, joined
from gap_ds.masks import bitmask, cpu, passes, selection
from gap_ds.masks.box import Box

PROPERTY = settings(max_examples=100, deadline=None, derandomize=True, database=None)
needs_compiler = pytest.mark.skipif(cpu.library() is None, reason="no C compiler, or GAP_DS_NATIVE=0")


def loops() -> cpu.Library:
    found = cpu.library()
    assert found is not None
    return found


@pytest.fixture
def anew() -> Iterator[None]:
    """`library` looks again in this test, and again after it."""
    cpu.library.cache_clear()
    yield
    cpu.library.cache_clear()


@pytest.fixture
def empty_cache(anew: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder where compiled loops will be kept; there is none yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("GAP_DS_NATIVE", raising=False)
    monkeypatch.setattr(cpu, "_FLAGS", [*cpu._FLAGS, "-O0"])  # compiles ten times as fast
    return tmp_path / "cache" / "gap_ds"


def sparse(outputs: int, inputs: int, density: float, seed: int, bias: bool = True) -> nn.Linear:
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(inputs, outputs, bias=bias).requires_grad_(False)
    layer.weight.copy_(torch.randn(outputs, inputs, generator=generator))
    layer.weight *= torch.rand(outputs, inputs, generator=generator) < density
    return layer


# -- masks -------------------------------------------------------------------------------------------------------------


@needs_compiler
@PROPERTY
@given(
    dtype=st.sampled_from([torch.int16, torch.int32, torch.int64]),
    count=st.integers(0, 300),
    offset=st.integers(0, 5),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    seed=st.integers(0, 99),
)
def test_words_are_zeroed_as_by_numpy(dtype: torch.dtype, count: int, offset: int, density: float, seed: int) -> None:
    """Any size, at unaligned addresses; words before and after the piece do not change."""
    generator = torch.Generator().manual_seed(seed)
    buffer = torch.randint(-(2**15), 2**15 - 1, (offset + count + 9,), generator=generator, dtype=dtype)
    bits = bitmask.pack(torch.rand(count, generator=generator) < density)
    expected = buffer.clone()
    bitmask._by_numpy(expected[offset : offset + count], bits)
    loops().zero_pruned_(buffer[offset : offset + count], bits)
    assert torch.equal(buffer, expected)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_large_pieces_use_the_compiled_loop(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """NaN, infinity and -0.0 become +0.0 where pruned and keep every bit where kept."""
    monkeypatch.setattr(bitmask, "_by_numpy", None)
    piece = torch.randn(bitmask.COMPILED + 3, dtype=torch.float32).to(dtype)
    piece[:9] = torch.tensor([float("nan"), float("inf"), -0.0] * 3, dtype=dtype)
    kept = torch.rand(piece.numel(), generator=torch.Generator().manual_seed(0)) < 0.3
    before = piece.clone()
    bitmask.zero_pruned_(piece, bitmask.pack(kept))
    words = {2: torch.int16, 4: torch.int32, 8: torch.int64}[piece.element_size()]
    assert torch.equal(piece.view(words), before.view(words) * kept)


@needs_compiler
@PROPERTY
@given(
    dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.float64]),
    count=st.integers(0, 300),
    offset=st.integers(0, 5),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    zeros=st.sampled_from([0.0, 0.99, 1.0]),
    seed=st.integers(0, 99),
)
def test_revived_weights_are_counted_as_by_pytorch(
    dtype: torch.dtype, count: int, offset: int, density: float, zeros: float, seed: int
) -> None:
    """At unaligned addresses. Both zeros are 0; NaN and subnormal numbers are not; neighbours are ignored."""
    generator = torch.Generator().manual_seed(seed)
    some = torch.tensor([float("nan"), float("inf"), 1e-40, -1.0], dtype=torch.float64)
    buffer = some[torch.randint(4, (offset + count + 9,), generator=generator)].to(dtype)
    place = torch.rand(offset + count + 9, generator=generator)
    buffer[place < zeros] = 0.0
    buffer[place < zeros / 2] = -0.0
    piece = buffer[offset : offset + count]
    kept = torch.rand(count, generator=generator) < density
    words = piece.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[piece.element_size()])
    expected = int(((piece != 0) & ~kept).sum())
    assert loops().count_revived_all([(words, bitmask.pack(kept))])() == [expected]
    assert bitmask.count_revived(piece, bitmask.pack(kept)) == expected


@needs_compiler
def test_threads_share_the_counting_of_revived_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_SHARED", 1)
    monkeypatch.setattr(bitmask, "COMPILED", 1)
    piece, kept = torch.ones(1003), torch.rand(1003, generator=torch.Generator().manual_seed(0)) < 0.5
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            assert bitmask.count_revived(piece, bitmask.pack(kept)) == 1003 - int(kept.sum())
            assert bitmask.count_revived(piece * kept, bitmask.pack(kept)) == 0
    finally:
        torch.set_num_threads(threads)


# -- selection ---------------------------------------------------------------------------------------------------------


@needs_compiler
@PROPERTY
@given(
    count=st.integers(0, 300),
    offset=st.integers(0, 5),
    largest=st.sampled_from([0, 3, 2**20, 2**31 - 1]),
    shift=st.sampled_from([0, 10, 20]),
    seed=st.integers(0, 99),
)
def test_passes_over_keys_are_those_of_pytorch(count: int, offset: int, largest: int, shift: int, seed: int) -> None:
    """Any size, at unaligned addresses, from the invalid key to the largest."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randint(-1, largest + 1, (offset + count,), generator=generator).int()[offset:]
    oracle, some = passes.ByPyTorch(), [-1, 0, largest, *keys[:3].tolist()]
    for prefix in [key >> shift for key in some]:
        assert torch.equal(loops().keys_with(keys, shift, prefix), oracle.keys_with(keys, shift, prefix))
    for limit in some:
        assert torch.equal(loops().pack_above(keys, limit), oracle.pack_above(keys, limit))
    bits = torch.randint(-(2**31), 2**31 - 1, (offset + count,), generator=generator).int()[offset:]
    weights = torch.cat([bits.view(torch.float32), torch.tensor([math.nan, math.inf, -math.inf, -0.0, 2.0**-140])])[1:]
    assert torch.equal(loops().magnitude_keys(weights), oracle.magnitude_keys(weights))
    within = keys.clamp(max=2**14)
    counts, expected = torch.zeros(2, 2**14 + 2, dtype=torch.int64)
    for _ in range(2):  # counts add up
        loops().count_keys_(counts, within, shift, -1)
        oracle.count_keys_(expected, within, shift, -1)
    assert torch.equal(counts, expected) and int(counts.sum()) == 2 * count


@needs_compiler
def test_selection_from_large_pieces_uses_the_compiled_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = torch.randn(bitmask.COMPILED + 5, generator=torch.Generator().manual_seed(0)).bfloat16()

    def select() -> torch.Tensor:
        piece = selection.Piece("w", Box.span(0, len(weights), len(weights)), selection.magnitude_keys(weights), 0)
        return selection.select_largest([piece], [5000], selection.Single())[0]

    with monkeypatch.context() as patch:
        patch.setattr(bitmask, "COMPILED", 2**40)
        expected = select()
    for name in ("magnitude_keys", "count_keys_", "keys_with", "pack_above"):
        monkeypatch.setattr(passes.ByPyTorch, name, None)
    found = select()
    assert torch.equal(found, expected) and bitmask.count(found) == 5000


# -- products ----------------------------------------------------------------------------------------------------------


@needs_compiler
@PROPERTY
@given(
    outputs=st.integers(1, 70),
    inputs=st.integers(1, 70),
    rows=st.integers(0, 150),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_a_product_equals_that_of_the_dense_layer(
    outputs: int, inputs: int, rows: int, density: float, bias: bool, seed: int
) -> None:
    layer = sparse(outputs, inputs, density, seed, bias)
    x = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(seed))
    y = CSRLinear(layer)(x)
    expected = nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
    assert y.is_contiguous() and y.shape == (rows, outputs)
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)


@needs_compiler
def test_writes_stay_inside_the_result() -> None:
    """Neither beyond the last row of the last block nor into another thread's part."""
    layer, x = sparse(37, 50, 0.3, 0), torch.randn(65, 50)
    expected = CSRLinear(layer)(x)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        for share in (1, 2**40):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(cpu, "_SHARED", share)
                parts = [CSRLinear(layer)(x) for _ in range(5)]
            assert all(torch.equal(part, expected) for part in parts)
    finally:
        torch.set_num_threads(threads)


@needs_compiler
def test_threads_share_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_SHARED", 1)
    words, kept = torch.randint(-9, 9, (1003,), dtype=torch.int32), torch.rand(1003) < 0.5
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            found = words.clone()
            loops().zero_pruned_(found, bitmask.pack(kept))
            assert torch.equal(found, words * kept)
    finally:
        torch.set_num_threads(threads)


@needs_compiler
def test_shares_cover_all_outputs() -> None:
    for outputs in (1, 15, 16, 17, 100, 1024):
        for threads in (1, 2, 3, 7, 64):
            shares = cpu._shares(outputs, threads)
            assert [low for low, _ in shares] == [0, *(high for _, high in shares[:-1])]
            assert shares[-1][1] == outputs and len(shares) <= threads


@needs_compiler
def test_a_forked_process_starts_new_threads() -> None:
    """Threads are not forked: an inherited pool would wait for ever."""
    layer, x = sparse(64, 64, 0.5, 0), torch.randn(8, 64)
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "_SHARED", 1)
        torch.set_num_threads(2)
        try:
            expected = CSRLinear(layer)(x)
            made = CSRLinear(layer)
            child = os.fork()
            if child == 0:
                os._exit(0 if torch.equal(made(x), expected) else 1)
            assert os.waitpid(child, 0)[1] == 0
        finally:
            torch.set_num_threads(threads)


@pytest.mark.parametrize("inputs", [16, 700, 3000])
@pytest.mark.parametrize("rows", [1, 2, 31, 64, 65, 96, 129, 385])
def test_rows_are_multiplied_in_even_blocks(rows: int, inputs: int) -> None:
    blocks, most = cpu.row_blocks(rows, inputs), {16: 64, 700: 64, 3000: 32}[inputs]
    sizes = [end - start for start, end in blocks]
    assert [start for start, _ in blocks] == [0, *(end for _, end in blocks[:-1])] and blocks[-1][1] == rows
    assert max(sizes) <= most and max(sizes) - min(sizes) <= 1 and len(blocks) == -(-rows // most)


@needs_compiler
def test_mkl_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [sparse(n, 30, 0.3, n) for n in (20, 7)]
    x = torch.randn(100, 30)
    alone = [CSRLinear(layer) for layer in layers]
    together = joined([CSRLinear(layer) for layer in layers])
    with torch.no_grad():
        compiled = [layer(x) for layer in [*alone, *together]]
        monkeypatch.setattr(cpu, "library", lambda: None)
        for layer, y in zip([*alone, *together], compiled, strict=True):
            torch.testing.assert_close(layer(x), y, rtol=1e-4, atol=1e-5)


@needs_compiler
@pytest.mark.usefixtures("anew")
@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64, torch.device("meta")], ids=str)
def test_defaults_of_torch_change_nothing(default: torch.dtype | torch.device) -> None:
    """A loop writes to memory of fixed dtype and device; with the caller's defaults it would overrun it."""
    layer, x = sparse(21, 300, 0.3, 0), torch.randn(64, 300)
    expected, made = layer(x), CSRLinear(layer)
    try:
        if isinstance(default, torch.dtype):
            torch.set_default_dtype(default)
        else:
            torch.set_default_device(default)
        found = loops()
        assert found._room(100).dtype == torch.float32 and found._room(100).device.type == "cpu"
        y = made(x)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


@needs_compiler
def test_weights_elsewhere_are_refused_and_not_read() -> None:
    """PyTorch raises, as with dense layers, and no loop reads an invalid address."""
    made = CSRLinear(sparse(5, 6, 0.5, 0)).to("meta")
    with pytest.raises((RuntimeError, NotImplementedError)):
        made(torch.randn(3, 6))


@needs_compiler
def test_pytorch_multiplies_if_gradients_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = sparse(9, 8, 0.5, 0)
    made = CSRLinear(layer)
    monkeypatch.setattr(cpu, "library", lambda: pytest.fail("records no gradients"))
    x = torch.randn(3, 8, requires_grad=True)
    torch.testing.assert_close(made(x), layer(x))


# -- without the loops -------------------------------------------------------------------------------------------------


def compiler(folder: Path, script: str) -> str:
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@needs_compiler
@pytest.mark.usefixtures("empty_cache")
@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo 'unknown machine' >&2; exit 1", "unknown machine"),
        ('case "$*" in *-dM*) exit;; esac; while [ "$1" != -o ]; do shift; done; echo nonsense > $2', "too short"),
    ],
)
def test_a_compiler_that_fails_is_not_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture, script: str, reason: str
) -> None:
    monkeypatch.setenv("CC", compiler(tmp_path, script))
    with caplog.at_level("INFO", logger="gap_ds.masks.cpu"):
        assert cpu.library() is None and cpu.library() is None
    (line,) = [record.getMessage() for record in caplog.records]
    assert reason in line and "NumPy, PyTorch and MKL" in line
    layer, x = sparse(5, 6, 0.5, 0), torch.randn(4, 6)
    torch.testing.assert_close(CSRLinear(layer)(x), layer(x))


@needs_compiler
@pytest.mark.usefixtures("empty_cache")
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (r"s/\*eight &=/*eight |=/", "zero_pruned is wrong for words of 2 bytes"),
        (r"s/mask\[i\]) & bits) != bits/mask[i]) \& bits) == bits/", "count_revived is wrong for words of 2 bytes"),
        (r"s/0x7F800000 ? -1/0x7F800000 ? 0/", "magnitude_keys is wrong"),
        (r"s/- base\]++/- base] += 2/", "count_keys is wrong"),
        (r"s/return many/return 0/", "keys_with is wrong"),
        (r"s/(int32_t)limit) <</(int32_t)limit + 1) <</", "pack_above is wrong"),
        (r"s/+= values\[k + i\]/-= values[k + i]/", "multiply is wrong for 4 rows"),
    ],
)
def test_a_loop_with_wrong_results_is_not_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture, change: str, reason: str
) -> None:
    changed = f"*.c) sed '{change}' $word > $0.c; cmp -s $word $0.c && exit 1; word=$0.c"
    script = f'for word; do shift; case $word in {changed};; esac; set -- "$@" "$word"; done; exec cc "$@"'
    monkeypatch.setenv("CC", compiler(tmp_path, script))
    with caplog.at_level("INFO", logger="gap_ds.masks.cpu"):
        assert cpu.library() is None
    assert reason in caplog.text


@pytest.mark.usefixtures("empty_cache")
@pytest.mark.parametrize("setting", [{"GAP_DS_NATIVE": "0"}, {"CC": "", "PATH": ""}])
def test_loops_are_disabled_or_impossible(monkeypatch: pytest.MonkeyPatch, setting: dict[str, str]) -> None:
    for name, value in setting.items():
        monkeypatch.setenv(name, value)
    assert cpu.library() is None


@needs_compiler
@pytest.mark.usefixtures("empty_cache")
def test_compilers_that_refuse_flags_for_this_processor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """They compile without these flags."""
    script = 'for word; do case "$word" in -march*) exit 1;; esac; done; exec cc "$@"'
    monkeypatch.setenv("CC", compiler(tmp_path, script))
    assert cpu.library() is not None


# -- the cache ---------------------------------------------------------------------------------------------------------


@needs_compiler
def test_the_loops_are_compiled_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, empty_cache: Path) -> None:
    log = tmp_path / "log"
    script = f'case "$*" in *-dM*) ;; *) echo compiled >> {log};; esac; exec cc "$@"'
    monkeypatch.setenv("CC", compiler(tmp_path, script))

    def compilations() -> int:
        cpu.library.cache_clear()
        assert cpu.library() is not None
        return log.read_text().count("compiled")

    assert compilations() == 1
    (kept,) = empty_cache.iterdir()
    assert cpu.file_of(cpu.SOURCE) == kept
    kept.unlink()
    kept.write_bytes(b"damaged")
    assert compilations() == 2
    assert compilations() == 2 and list(empty_cache.iterdir()) == [kept] and kept.stat().st_size > 1000
    monkeypatch.setattr(cpu, "_FLAGS", [*cpu._FLAGS, "-g"])
    assert compilations() == 3 and len(list(empty_cache.iterdir())) == 2


@needs_compiler
@pytest.mark.usefixtures("empty_cache")
def test_a_cache_that_cannot_be_written_does_no_harm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert cpu.library() is not None


@needs_compiler
@pytest.mark.parametrize("mode", [0o777, 0o775])
def test_a_cache_that_others_can_write_to_is_not_used(empty_cache: Path, mode: int) -> None:
    empty_cache.mkdir(parents=True)
    empty_cache.chmod(mode)
    assert cpu.library() is not None and cpu.file_of(cpu.SOURCE) is None and not list(empty_cache.iterdir())


@needs_compiler
def test_of_processes_that_start_at_once_one_compiles(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    script = f'case "$*" in *-dM*) ;; *) echo compiled >> {log}; sleep 0.3;; esac; exec cc "$@"'
    monkeypatch.setenv("CC", compiler(tmp_path, script))
    children = []
    for _ in range(4):
        children.append(os.fork())
        if children[-1] == 0:
            os._exit(0 if cpu.library() is not None else 1)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    (kept,) = empty_cache.iterdir()
    assert kept.suffix == ".so" and empty_cache.stat().st_mode & 0o777 == 0o700
    assert log.read_text().split() == ["compiled"]


@needs_compiler
def test_who_waits_too_long_goes_without(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_PATIENCE", 0.1)
    assert cpu._private(empty_cache)
    with cpu._turn(empty_cache), pytest.raises(TimeoutError, match="another process compiles"), cpu._turn(empty_cache):
        pass
