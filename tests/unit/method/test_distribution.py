"""Budgets: the rounding rule, uniform, and ERK against the rule of RigL."""

from __future__ import annotations

import math
from decimal import ROUND_HALF_UP, Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gap_ds.method.distribution import DISTRIBUTIONS, erk, keep_count, uniform

PROPERTY = settings(max_examples=300, deadline=None, derandomize=True, database=None)

shapes = st.lists(st.lists(st.integers(1, 60), min_size=2, max_size=4).map(tuple), min_size=1, max_size=8)
sparsities = st.one_of(
    st.sampled_from([0.0, 0.5, 0.75, 0.8, 0.9, 0.95, 0.98, 0.99, 0.999]), st.floats(0, 1, exclude_max=True)
)


@pytest.mark.parametrize(
    ("numel", "sparsity", "keep"),
    [
        (1000, 0.9, 100),
        (10, 0.75, 3),  # 2.5 is rounded up
        (2, 0.75, 1),  # 0.5 as well
        (30, 0.95, 2),  # 1.5; in binary 1 - 0.95 is slightly above 0.05
        (1000, 0.9985, 2),  # 1.5; in binary (1 - 0.9985) * 1000 is 1.4999999999999458
        (10_000_000_000, 0.9, 1_000_000_000),  # in binary 999999999.9999998
        (5, 0.99, 1),  # never 0
        (1, 0.999999, 1),
        (7, 0.0, 7),
        (176_160_768, 0.8, 35_232_154),  # 35232153.6
        (1000, 1e-5, 1000),
        (10**6, 1e-5, 999_990),
    ],
)
def test_keep_count(numel: int, sparsity: float, keep: int) -> None:
    assert keep_count(numel, sparsity) == keep


@PROPERTY
@given(st.integers(1, 10**12), sparsities)
def test_keep_count_rounds_the_written_decimal_half_up(numel: int, sparsity: float) -> None:
    exact = (1 - Decimal(repr(sparsity))) * numel
    exponent = exact.as_tuple().exponent
    assert isinstance(exponent, int)
    if exponent >= -300 and len(exact.as_tuple().digits) < 28:  # beyond that Decimal itself rounds
        assert keep_count(numel, sparsity) == max(1, int(exact.quantize(Decimal(1), ROUND_HALF_UP)))
    assert 1 <= keep_count(numel, sparsity) <= numel


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, math.nan, math.inf])
def test_sparsity_out_of_range(sparsity: float) -> None:
    with pytest.raises(ValueError, match=rf'sparsity={sparsity}: must lie in \[0, 1\)\. Set "sparsity"'):
        keep_count(10, sparsity)


@PROPERTY
@given(shapes, sparsities)
def test_every_distribution_keeps_something_and_not_too_much(shapes: list[tuple[int, ...]], sparsity: float) -> None:
    sizes = [math.prod(shape) for shape in shapes]
    for name, distribution in DISTRIBUTIONS.items():
        keep = distribution(shapes, sparsity)
        assert len(keep) == len(shapes)
        assert all(type(k) is int and 1 <= k <= n for k, n in zip(keep, sizes, strict=True)), name
    assert uniform(shapes, sparsity) == [keep_count(n, sparsity) for n in sizes]
    assert sum(erk(shapes, sparsity)) == max(keep_count(sum(sizes), sparsity), len(shapes))
    assert erk(shapes, 0.0) == sizes


def test_nothing_given() -> None:
    assert uniform([], 0.5) == [] == erk([], 0.5)


def test_erk_by_hand() -> None:
    # 40 + 4000 weights at 0.9: 404 kept. Weights of the entries 14 and 140: 404 / 154 * 14 = 36.7 and 367.3.
    assert erk([(4, 10), (40, 100)], 0.9) == [37, 367]
    # 25 + 10000 at 0.5: 5013 kept (5012.5); 5013 / 210 * 10 = 238 exceeds 25, so the other one gets the rest.
    assert erk([(5, 5), (100, 100)], 0.5) == [25, 4988]
    # Three alike and 50 to share: the remainder goes to the first ones.
    assert erk([(10, 5), (5, 10), (10, 5)], 1 - 50 / 150) == [17, 17, 16]


def test_erk_cuts_no_entry_off() -> None:
    # 10 of 10004 kept; by the rule the small one would get 10 / 204 * 4 = 0.2.
    assert erk([(2, 2), (100, 100)], 0.999) == [1, 9]
    assert erk([(2, 2)] * 5, 0.99) == [1] * 5


def rigl_erk(shapes: list[tuple[int, ...]], density: float) -> list[float]:
    """Densities by RigL's rule: the entry of largest raw density becomes dense, one kind at a time, until all fit."""
    raw = [sum(shape) / math.prod(shape) for shape in shapes]
    sizes = [math.prod(shape) for shape in shapes]
    dense: set[int] = set()
    while True:
        budget = density * sum(sizes) - sum(sizes[e] for e in dense)
        scale = budget / sum(raw[e] * sizes[e] for e in range(len(shapes)) if e not in dense)
        largest = max(raw[e] for e in range(len(shapes)) if e not in dense)
        if largest * scale <= 1:
            return [1.0 if e in dense else raw[e] * scale for e in range(len(shapes))]
        dense |= {e for e in range(len(shapes)) if raw[e] == largest}


def resnet50() -> list[tuple[int, ...]]:
    """All convolutions of ResNet-50 and its classifier, which are entries under ERK."""
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7)]
    width = 64
    for out, blocks in ((256, 3), (512, 4), (1024, 6), (2048, 3)):
        for block in range(blocks):
            shapes += [(out // 4, width, 1, 1), (out // 4, out // 4, 3, 3), (out, out // 4, 1, 1)]
            shapes += [(out, width, 1, 1)] if block == 0 else []
            width = out
    return [*shapes, (1000, 2048)]


@pytest.mark.parametrize(("sparsity", "dense"), [(0.8, 8), (0.9, 1)])
def test_erk_is_rigls_on_resnet_50(sparsity: float, dense: int) -> None:
    shapes = resnet50()
    sizes = [math.prod(shape) for shape in shapes]
    assert sum(sizes) == 25_502_912 and len(shapes) == 54
    keep, densities = erk(shapes, sparsity), rigl_erk(shapes, 1 - sparsity)
    assert sum(k == n for k, n in zip(keep, sizes, strict=True)) == sum(d == 1 for d in densities) == dense
    for k, n, d in zip(keep, sizes, densities, strict=True):
        assert abs(k - d * n) <= 1
    # Where nothing is saturated, densities are proportional to sum(shape) / prod(shape).
    raw = [k / n / (sum(s) / n) for k, n, s in zip(keep, sizes, shapes, strict=True) if k < n]
    assert max(raw) / min(raw) < 1.001


def test_erk_gives_the_same_to_equal_shapes_in_any_order() -> None:
    shapes = resnet50()
    keep = dict(zip(shapes, erk(shapes, 0.9), strict=True))
    again = erk(shapes[::-1], 0.9)
    assert all(abs(k - keep[s]) <= 1 for s, k in zip(shapes[::-1], again, strict=True))


def layers() -> list[str]:
    """The names of the shapes of `resnet50`, in the same order."""
    names = ["stem"]
    for stage, blocks in enumerate((3, 4, 6, 3), 1):
        for block in range(blocks):
            names += [f"{stage}.{block}.{part}" for part in ("1x1", "3x3", "1x1 out")]
            names += [f"{stage}.{block}.downsample"] if block == 0 else []
    return [*names, "fc"]


def erdos_renyi_kernel(shapes: list[tuple[int, ...]], kept: int) -> list[float]:
    """Weights kept by RigL's rule: min(1, c (n_in + n_out + k_h + k_w) / (n_in n_out k_h k_w)), c by bisection.

    c is what makes the total `kept`. Written from arXiv 1911.11134, section 3, without the loop over saturated layers.
    """

    def amounts(c: float) -> list[float]:
        return [math.prod(shape) * min(1.0, c * sum(shape) / math.prod(shape)) for shape in shapes]

    low, high = 0.0, float(max(math.prod(shape) for shape in shapes))
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(amounts(middle)) < kept else (low, middle)
    return amounts(high)


#: The layers with most connections to a weight: the 1x1 convolutions of the first stage, at 80 % with some of the next.
SATURATED = {
    0.8: ["1.0.1x1", "1.0.1x1 out", "1.0.downsample", "1.1.1x1", "1.1.1x1 out", "1.2.1x1", "1.2.1x1 out", "2.0.1x1"],
    0.9: ["1.0.1x1"],
}


@pytest.mark.parametrize(("sparsity", "kept"), [(0.8, 5_100_582), (0.9, 2_550_291)])
def test_erk_is_the_erdos_renyi_kernel_of_resnet_50(sparsity: float, kept: int) -> None:
    shapes, names = resnet50(), layers()
    sizes = [math.prod(shape) for shape in shapes]
    assert len(names) == len(shapes) and len(set(names)) == 54
    keep, expected = erk(shapes, sparsity), erdos_renyi_kernel(shapes, kept)
    assert sum(keep) == kept  # 25,502,912 at 20 % is 5,100,582.4, at 10 % 2,550,291.2
    assert [name for name, k, n in zip(names, keep, sizes, strict=True) if k == n] == SATURATED[sparsity]
    assert [name for name, x, n in zip(names, expected, sizes, strict=True) if x == n] == SATURATED[sparsity]
    assert all(abs(k - x) < 1 for k, x in zip(keep, expected, strict=True))
    # The stem and the classifier are entries like the rest; the widest 3x3 convolutions are the sparsest.
    density = {name: k / n for name, k, n in zip(names, keep, sizes, strict=True)}
    assert density["stem"] > density["fc"] and min(density, key=lambda name: density[name]) == "4.0.3x3"


@PROPERTY
@given(shapes, sparsities)
def test_erk_is_the_erdos_renyi_kernel(shapes: list[tuple[int, ...]], sparsity: float) -> None:
    keep = erk(shapes, sparsity)
    expected = erdos_renyi_kernel(shapes, sum(keep))
    if min(expected) >= 1:  # else what keeps a small entry alive is taken from the largest
        assert all(abs(k - x) < 1 + 1e-6 for k, x in zip(keep, expected, strict=True))


@PROPERTY
@given(
    st.lists(st.tuples(st.tuples(st.integers(1, 30), st.integers(1, 30)), st.integers(1, 5)), min_size=1, max_size=6),
    sparsities,
)
def test_experts_in_one_tensor_have_the_budget_of_experts_as_modules(
    stacks: list[tuple[tuple[int, int], int]], sparsity: float
) -> None:
    shapes, numbers = zip(*stacks, strict=True)
    keep = erk(shapes, sparsity, numbers)
    modules = [e for e, number in enumerate(numbers) for _ in range(number)]
    expected = erdos_renyi_kernel([shapes[e] for e in modules], sum(keep))
    together = [sum(x for x, of in zip(expected, modules, strict=True) if of == e) for e in range(len(shapes))]
    if min(together) >= 1:
        assert all(abs(k - x) < 1 + 1e-6 for k, x in zip(keep, together, strict=True))


def test_global_shares_the_sum_of_the_uniform_budgets() -> None:
    assert DISTRIBUTIONS["global"]([(10, 10), (4, 5)], 0.8) == [20, 4]
    assert set(DISTRIBUTIONS) == {"uniform", "erk", "global"}
