"""Products by packed weights on each instruction set that this machine has, against float64 and exact integers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from p2l_engine.native import panels
from p2l_engine.native.binding import lib
from p2l_engine.native.panels import GROUP, Panels

FLOAT_LEVELS = range(lib.p2l_linear_level(False) + 1)
INT8_LEVELS = range(lib.p2l_int8_level() + 1)
BF16_LEVEL = lib.p2l_linear_level(True)
KINDS = [
    *((torch.float32, level) for level in FLOAT_LEVELS),
    *((torch.int8, level) for level in INT8_LEVELS),
    *([(torch.bfloat16, BF16_LEVEL)] if BF16_LEVEL > 0 else []),
]


def product(x: torch.Tensor, weight: Panels) -> torch.Tensor:
    """The native product, with a guard behind its result and its scratch."""
    rows, guard = len(x), 64
    out = torch.full((rows * weight.columns + guard,), 7.0, dtype=x.dtype)
    size = weight.scratch(rows)
    scratch = torch.full((size + guard,), 7, dtype=torch.uint8)
    result = panels.multiply(x, weight, out[: rows * weight.columns].view(rows, weight.columns), scratch[:size])
    assert (out[-guard:] == 7).all()
    assert (scratch[size:] == 7).all()
    return result


def quantised(x: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The values [T, groups, GROUP] int64 and scales [T, groups] float32 of the rows' groups."""
    padded = torch.nn.functional.pad(x, (0, -x.shape[1] % GROUP)).view(len(x), -1, GROUP)
    step = padded.abs().amax(2) / torch.tensor(127.0)
    inverse = torch.where(step > 0, 1 / step, 0.0)
    return (padded * inverse[..., None]).round().long().numpy(), step.numpy()


def exact(x: torch.Tensor, weight: Panels) -> torch.Tensor:
    """The product in float64 of exactly what is multiplied; sums of int8 groups are exact integers."""
    plain = weight.plain().double()
    if weight.scale is None:
        found = x.double() @ plain.t()
    else:
        whole = torch.round(plain / torch.where(weight.scale > 0, weight.scale, 1.0).double()[:, None]).long().numpy()
        whole = np.pad(whole, ((0, 0), (0, -whole.shape[1] % GROUP))).reshape(len(whole), -1, GROUP)
        values, step = quantised(x)
        sums = np.einsum("tgk,cgk->tgc", values, whole)
        assert np.abs(sums).max(initial=0) < 2**31
        found = torch.from_numpy((sums * step.astype(np.float64)[..., None]).sum(1)) * weight.scale.double()
    return found if weight.bias is None else found + weight.bias.double()


def check(x: torch.Tensor, weight: Panels) -> None:
    found, expected = product(x, weight), exact(x, weight)
    size = x.double().abs() @ weight.plain().double().abs().t() + (0 if weight.bias is None else weight.bias.double().abs())
    rounding = 2.0**-8 if x.dtype == torch.bfloat16 else 0.0
    assert (found.double() - expected).abs().le(rounding * expected.abs() + 1e-5 * size + 1e-30).all()


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    rows=st.integers(1, 40),
    depth=st.one_of(st.integers(1, 150), st.integers(GROUP - 5, 2 * GROUP + 5)),
    columns=st.integers(1, 100),
    bias=st.booleans(),
    spread=st.sampled_from([0.0, 1.0, 30.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_products_match_float64(kind, rows, depth, columns, bias, spread, seed):
    dtype, level = kind
    depth += depth % 2 if dtype == torch.bfloat16 else 0
    rng = torch.Generator().manual_seed(seed)
    values = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    # Rows and columns of very different sizes, some of them zero.
    x = torch.randn(rows, depth, generator=rng) * torch.exp(spread * torch.randn(rows, 1, generator=rng).clamp(-1, 1))
    x *= torch.rand(rows, 1, generator=rng) > 0.1
    w = torch.randn(columns, depth, generator=rng) * torch.exp(torch.randn(columns, 1, generator=rng))
    w *= torch.rand(columns, 1, generator=rng) > 0.1
    weight = Panels.of(w, torch.randn(columns, generator=rng) if bias else None, dtype, level)
    check(x.to(values), weight)


@pytest.mark.parametrize(("dtype", "level"), KINDS)
@pytest.mark.parametrize("shape", [(1, 576, 960), (37, 1536, 576), (300, 128, 64), (4097, 194, 33)])
def test_products_of_real_shapes_match_float64(dtype, level, shape):
    rows, depth, columns = shape
    x = torch.randn(rows, depth).to(torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
    check(x, Panels.of(torch.randn(columns, depth), torch.randn(columns), dtype, level))


@pytest.mark.parametrize("level", INT8_LEVELS)
@pytest.mark.parametrize("signs", [(1, 1), (1, -1), (-1, -1)])
def test_int8_sums_do_not_saturate(level, signs):
    # All products of a row have the same sign and the largest size: pairs of them do not fit into 16 bits at 8 bits each.
    x, w = (torch.full(shape, float(sign)) for shape, sign in zip([(3, 4864), (64, 4864)], signs, strict=True))
    weight = Panels.of(w, None, torch.int8, level)
    assert torch.allclose(product(x, weight), torch.full((3, 64), signs[0] * signs[1] * 4864.0), rtol=1e-6)


def test_no_rows_need_no_scratch_memory():
    weight = Panels.of(torch.randn(40, 64), None, torch.int8)
    assert panels.multiply(torch.empty(0, 64), weight, torch.empty(0, 40)).shape == (0, 40)


def test_int8_is_the_same_on_all_instruction_sets():
    x, w = torch.randn(13, 302) * 5, torch.randn(70, 302)
    weights = [Panels.of(w, None, torch.int8, level) for level in INT8_LEVELS]
    for other in weights[1:]:
        assert torch.equal(other.data, weights[0].data)
        assert torch.equal(other.scale, weights[0].scale)
    plain, *vectors = (product(x, weight) for weight in weights)
    assert all(torch.equal(result, vectors[0]) for result in vectors)
    # Sums of groups are added in float32, with or without fused multiplication.
    assert all(torch.allclose(result, plain, rtol=1e-5, atol=1e-4) for result in vectors)


@pytest.mark.parametrize(("dtype", "level"), KINDS)
def test_a_row_does_not_depend_on_the_others_nor_on_threads(dtype, level):
    x = torch.randn(700, 576).to(torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
    weight = Panels.of(torch.randn(96, 576), torch.randn(96), dtype, level)
    whole, threads = product(x, weight), torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for rows in (slice(0, 1), slice(3, 10), slice(0, 700), slice(650, 700)):
                assert torch.equal(product(x[rows].contiguous(), weight), whole[rows])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(("dtype", "level"), KINDS)
@pytest.mark.parametrize("bad", [torch.nan, -torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [0, 7, GROUP - 1, GROUP + 3])  # in a whole group of int8, and in the rest
def test_values_that_are_not_finite_spoil_their_row_alone(dtype, level, bad, place):
    x = torch.randn(5, 200).to(torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
    weight, others = Panels.of(torch.randn(40, 200), None, dtype, level), [0, 1, 3, 4]
    expected = product(x, weight)[others]
    x[2, place] = bad
    found = product(x, weight)
    assert not found[2].isfinite().any()
    assert torch.equal(found[others], expected)


@pytest.mark.parametrize("level", INT8_LEVELS)
@pytest.mark.parametrize("size", [1e-45, 1e-40, 1e-38, 1e-30, 1e30])
def test_rows_of_extreme_sizes(level, size):
    x = torch.randn(4, GROUP + 150).clamp(-2, 2) * size  # a whole group and the rest
    x[3, :GROUP] = 0
    weight = Panels.of(torch.randn(40, GROUP + 150) * 1e-3, None, torch.int8, level)
    expected = x.double() @ weight.plain().double().t()
    assert (product(x, weight).double() - expected).abs().max() <= 0.02 * expected.abs().max() + 1e-38


@pytest.mark.parametrize(("dtype", "level"), KINDS)
def test_parts_are_the_products_columns(dtype, level):
    x = torch.randn(4, 90).to(torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
    weight = Panels.of(torch.randn(130, 90), torch.randn(130), dtype, level)
    whole = product(x, weight)
    for first, last in ((0, 64), (64, 130), (32, 96), (5, 77), (129, 130)):
        part = weight.part(first, last)
        assert torch.equal(part.plain(), weight.plain()[first:last])
        assert torch.equal(product(x, part), whole[:, first:last])


def test_what_does_not_fit_is_refused():
    weight = Panels.of(torch.randn(40, 64), None, torch.int8)
    x, out, scratch = torch.randn(3, 64), torch.empty(3, 40), torch.empty(weight.scratch(3), dtype=torch.uint8)
    with pytest.raises(ValueError, match="scratch: expected"):
        panels.multiply(x, weight, out)
    with pytest.raises(ValueError, match="scratch: expected"):
        panels.multiply(x, weight, out, scratch[1:])
    with pytest.raises(ValueError, match="x: expected contiguous torch.float32"):
        panels.multiply(x.bfloat16(), weight, out, scratch)
    with pytest.raises(ValueError, match="x: expected"):
        panels.multiply(torch.randn(64, 3).t(), weight, out, scratch)
    with pytest.raises(ValueError, match="out: expected"):
        panels.multiply(x, weight, torch.empty(3, 41), scratch)
    with pytest.raises(ValueError, match="bfloat16 with even inputs"):
        Panels.of(torch.randn(4, 3), None, torch.bfloat16)
    with pytest.raises(ValueError, match="expected float32"):
        Panels.of(torch.randn(4, 3), None, torch.float16)
