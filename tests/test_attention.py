"""The CPU's attention against the kernel's reference implementation in float64."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from p2l_engine.backbone.attention import over_runs
from p2l_engine.backbone.packing import Packed
from p2l_engine.kernels.attention import attention_reference
from p2l_engine.native import decoder
from p2l_engine.native.binding import lib
from tests.support.cases import slow_but
from tests.support.kernel_cases import FLOATS

ERROR = {torch.float32: (3e-6, 3e-6), torch.bfloat16: (3e-6, 2**-8)}  # absolute, relative: of the result's rounding
PAIRS = lib.p2l_isa_level() == 5  # the CPU has dot products of bfloat16
KINDS = [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False)]  # of tensors; whether rounded for products


@dataclass(frozen=True)
class Batch:
    """Prompts of random queries, keys and values: q's rows are apart in an array of NaN, NaN is before and after kv.

    rounded: as in ``decoder.attention``.
    """

    q: Tensor
    kv: Tensor
    starts: Tensor
    key_starts: Tensor
    last: bool
    rounded: bool

    @classmethod
    def of(cls, lengths, shared, heads, kv_heads, size, kind=(torch.float32, False), last=False, scale=1.0):
        dtype, rounded = kind
        queries = len(lengths) if last else sum(lengths)
        keys = sum(lengths) + sum(shared)
        rows = torch.full((queries + 2, heads * size + 5), torch.nan, dtype=dtype)
        q = rows[1:-1, 3:-2].view(queries, heads, size)
        q.copy_(torch.randn(q.shape) * scale)
        kv = torch.full((keys + 2, 2, kv_heads, size), torch.nan, dtype=dtype)[1:-1]
        kv.copy_(torch.randn(kv.shape))
        return cls(q, kv, offsets(lengths), offsets([a + b for a, b in zip(lengths, shared, strict=True)]), last, rounded)

    def attend(self):
        """The result, from within an array of which nothing else may be written."""
        columns = self.q.shape[1] * self.q.shape[2]
        room = torch.full((len(self.q) + 2, columns), torch.nan, dtype=self.q.dtype)
        out = decoder.attention(self.q, self.kv, self.starts, self.key_starts, self.last, room[1:-1], self.rounded)
        assert room[0].isnan().all()
        assert room[-1].isnan().all()
        return out

    def expected(self, absolute=False):
        """absolute: of the values' absolute values."""
        q, kv = (x.bfloat16() if PAIRS and self.rounded else x for x in (self.q, self.kv))
        kv = torch.stack([kv[:, 0], kv[:, 1].abs()], 1) if absolute else kv
        return attention_reference(q.double(), kv.double(), self.starts, self.key_starts, 0, self.last)

    def alone(self, i):
        """The same prompt without the others."""
        a, b, c, d = (int(x) for x in (*self.starts[i : i + 2], *self.key_starts[i : i + 2]))
        a, b = (i, i + 1) if self.last else (a, b)
        return slice(a, b), Batch(
            self.q[a:b], self.kv[c:d], self.starts[i : i + 2] - self.starts[i], offsets([d - c]), self.last, self.rounded
        )

    def check(self, error=0.0):
        """error: of the result, where that of the scores is more than a rounding of 1."""
        absolute, relative = (max(error, least) for least in ERROR[self.q.dtype])
        expected = self.expected()
        allowed = absolute + relative * expected.abs()
        if PAIRS and (self.rounded or self.q.dtype == torch.bfloat16):
            # Weights w are w (1 + e), |e| <= 2^-8, in both sums of the mean: off by |sum w e (v - mean)| / sum w (1 + e).
            allowed += 2**-8 * 1.01 * (self.expected(absolute=True) + expected.abs())
        excess = (self.attend().double() - expected).abs() / allowed
        assert (excess <= 1).all(), f"error: expected at most what is allowed, got {excess.max()} times it"


def offsets(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(
    "shape", slow_but([(9, 3, 64), (5, 1, 7)], [(9, 3, 64), (14, 2, 64), (4, 4, 8), (28, 4, 128), (3, 1, 20), (5, 1, 7)])
)
def test_it_is_the_references(shape, last, kind):
    lengths = [1, 2, 3, 8, 24, 17, 71, 1, 72, 73, 97]
    for shared in ([0] * len(lengths), [25, 0] * 5 + [70]):
        Batch.of(lengths, shared, *shape, kind, last).check()


@pytest.mark.slow
@settings(deadline=None, max_examples=80)
@given(
    st.lists(st.tuples(st.integers(1, 70) | st.integers(70, 300), st.sampled_from([0, 0, 1, 24, 75])), min_size=1, max_size=6),
    st.integers(1, 4),
    st.integers(1, 7),
    st.integers(1, 5).map(lambda n: 8 * n) | st.integers(1, 80),
    st.sampled_from(KINDS),
    st.booleans(),
)
def test_any_shape_is_the_references(prompts, kv_heads, group, size, kind, last):
    lengths, shared = zip(*prompts, strict=True)
    Batch.of(lengths, shared, kv_heads * group, kv_heads, size, kind, last).check()


@pytest.mark.parametrize("dtype", FLOATS)
def test_torch_computes_the_same_over_runs(dtype):
    """The other implementation, for GPUs."""
    lengths, shared = [3, 3, 40, 130], [0, 0, 6, 6]
    for last in (False, True):
        batch = Batch.of(lengths, shared, 6, 2, 16, (dtype, False), last)
        packed = Packed(*[torch.zeros(0)] * 4, batch.starts, batch.key_starts, tuple(lengths), tuple(shared), 130, 136)
        out = over_runs(batch.q, batch.kv, packed, last, torch.empty(len(batch.q), 96, dtype=dtype))
        torch.testing.assert_close(out.double(), batch.expected(), atol=FLOATS[dtype][0], rtol=FLOATS[dtype][1])


@pytest.mark.slow
def test_long_prompts():
    for kind in KINDS[:2]:
        Batch.of([1500, 5, 700], [0, 20, 20], 6, 2, 64, kind).check()
    Batch.of([3000], [0], 2, 1, 8, KINDS[2]).check()


@pytest.mark.parametrize("kind", KINDS[:2])
def test_equal_scores_are_means(kind):
    batch = Batch.of([100, 9], [3, 0], 4, 2, 8, kind, scale=0)
    batch.kv[:, 0] *= 1e30
    batch.check()
    batch.kv[:, 0] = 0
    batch.q.fill_(1)
    batch.check()


@pytest.mark.parametrize("kind", KINDS)
def test_scores_of_ten_thousand(kind):
    """Their rounding is 1e-3 in float32, as is then a weight's; the highest of clear differences takes all."""
    batch = Batch.of([1, 30, 150], [0, 4, 0], 6, 2, 64, kind, scale=1e4)
    assert batch.attend().isfinite().all()
    torch.testing.assert_close(batch.attend().double(), batch.expected(), atol=3e-2, rtol=2**-7)
    batch.q.fill_(1e4 / 8)
    batch.kv[:, 0] = (torch.arange(len(batch.kv)) % 37 == 0).float()[:, None, None] / 64 - 1
    batch.check()  # exact in float32: scores of -1e4 and 156 more


@pytest.mark.parametrize("kind", KINDS[:2])
def test_rising_and_falling_scores(kind):
    """Weights reach from 1 to below the least float, the highest last or first. A score of 300 has a rounding of 2e-5."""
    for sign in (1, -1):
        batch = Batch.of([300], [0], 1, 1, 8, kind)
        batch.q.fill_(1)
        batch.kv[:, 0] = sign * torch.arange(300)[:, None, None] / 8**0.5
        batch.check(error=1e-4)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_prompts_result_depends_on_nothing_else(kind, last, monkeypatch):
    lengths, shared = [40, 1, 24, 24, 200, 7, 100], [0, 9, 9, 0, 0, 9, 20]
    batch = Batch.of(lengths, shared, 9, 3, 64, kind, last)
    together, before = batch.attend(), torch.get_num_threads()
    monkeypatch.setattr(decoder, "PRODUCTS_PER_THREAD", 1)
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            assert torch.equal(batch.attend(), together)
    finally:
        torch.set_num_threads(before)
    for i in range(len(lengths)):
        rows, one = batch.alone(i)
        assert torch.equal(one.attend(), together[rows])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_and_infinity_stay_in_their_prompt(bad, kind):
    batch = Batch.of([20, 30, 100], [0, 0, 0], 4, 2, 16, kind)
    plain = batch.attend().clone()
    batch.kv[20 + 11, 0, 0, 3] = bad  # key 11 of prompt 1, of the first two heads
    batch.kv[50 + 80, 1, 1, 5] = bad  # value 80 of prompt 2, of the last two
    got = batch.attend()
    assert torch.equal(got[: 20 + 11], plain[: 20 + 11])  # earlier queries do not see the key
    assert torch.equal(got[20 + 11 : 50, 32:], plain[20 + 11 : 50, 32:])
    assert torch.equal(got[50:, :32], plain[50:, :32])
    assert not got[50 + 80 :, 37].isfinite().any()
    if bad != bad:
        assert got[20 + 11 : 50, :32].isnan().all()


def test_float32_is_rounded_only_if_asked_and_where_the_cpu_multiplies_bfloat16():
    exact, rounded = (Batch.of([40, 7], [0, 9], 6, 2, 20, kind) for kind in KINDS[:2])
    rounded = replace(rounded, q=exact.q, kv=exact.kv)
    before = replace(rounded, q=exact.q.bfloat16().float(), kv=exact.kv.bfloat16().float())
    assert torch.equal(rounded.attend(), (before if PAIRS else exact).attend())
    assert torch.equal(rounded.attend(), exact.attend()) == (not PAIRS)


def test_no_prompts_and_empty_prompts():
    Batch.of([], [], 2, 1, 8).check()
    Batch.of([0, 3, 0], [0, 0, 0], 2, 1, 8).check()


def test_what_does_not_fit_is_refused():
    batch = Batch.of([3, 4], [2, 0], 4, 2, 8)

    def attend(q=batch.q, kv=batch.kv, starts=batch.starts, key_starts=batch.key_starts, last=False, out=None):
        decoder.attention(q, kv, starts, key_starts, last, torch.empty(len(q), 32) if out is None else out)

    attend()
    for changes, message in (
        ({"q": batch.q.bfloat16()}, "q: expected contiguous rows of torch.float32 on the CPU, got torch.bfloat16"),
        ({"q": torch.zeros(7, 8, 4).transpose(1, 2)}, "q: expected contiguous"),
        ({"q": batch.q.flatten(1)}, r"q, kv: expected \[Q, heads, S\] and .* got \[7, 32\] and"),
        ({"q": batch.q.double(), "kv": batch.kv.double()}, "kv: expected contiguous float32 or bfloat16 on the CPU"),
        ({"kv": torch.zeros(9, 2, 3, 8)}, "a divisor of the heads"),
        ({"kv": torch.zeros(9, 2, 0, 8)}, "a divisor of the heads"),
        ({"kv": torch.zeros(9, 3, 2, 8)}, "q, kv: expected"),
        ({"kv": torch.zeros(9, 2, 2, 4)}, "q, kv: expected"),
        ({"kv": torch.zeros(9, 2, 2, 16)[..., ::2]}, "kv: expected contiguous"),
        ({"out": torch.empty(7, 31)}, r"out, starts, key_starts: expected \[7, 32\] and .* got \[7, 31\], \[3\] and \[3\]"),
        ({"out": torch.empty(7, 32).bfloat16()}, "out: expected contiguous"),
        ({"starts": batch.starts.long()}, "starts, key_starts: expected contiguous torch.int32"),
        ({"starts": batch.starts[:2]}, r"out, starts, key_starts: expected .* got \[7, 32\], \[2\] and \[3\]"),
        ({"starts": batch.starts[:0], "key_starts": batch.starts[:0]}, r"\[0\] and \[0\]"),
        ({"starts": offsets([3, 5])}, "starts, key_starts: expected offsets of all of q and kv"),
        ({"starts": offsets([3, 3])}, "offsets of all"),
        ({"starts": offsets([5, 2]), "key_starts": offsets([4, 5])}, "no prompt with fewer keys than queries"),
        ({"starts": offsets([9, -2])}, "offsets of all"),
        ({"key_starts": offsets([5, 5])}, "offsets of all"),
        ({"key_starts": batch.key_starts + 1}, "offsets of all"),
        ({"last": True}, "offsets of all"),
        ({"q": batch.q[:2], "last": True, "key_starts": offsets([9, 0])}, "fewer keys"),
    ):
        with pytest.raises(ValueError, match=message):
            attend(**changes)
