"""Packing, the CPU's steps against the kernels' reference implementations in float64, and the shared prefix."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from p2l_engine import Engine
from p2l_engine.backbone.on_cpu import CpuOperations
from p2l_engine.backbone.packing import Packed
from p2l_engine.engine.graphs import BUCKETS, bucket_of
from p2l_engine.kernels import rms_norm, rotary, swiglu
from p2l_engine.native.embedding import embed
from tests.support import tiny
from tests.support.kernel_cases import FLOATS, close
from tests.support.threads import threads

PREFIXED = "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}" + tiny.TEMPLATE
PROMPTS = ["a", "hello", "\n\nwhite space first", "x" * 300, "", "Schreibe ein Gedicht.", "y" * 9000, "hello"]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rows", [1, 5, 700])
@pytest.mark.parametrize("columns", [576, 123, 1])
def test_the_steps_match_the_references(dtype, rows, columns):
    do, near = CpuOperations(dtype), FLOATS[dtype]
    for _ in range(2):  # the second time in buffers that were used
        x, delta = (torch.randn(rows, columns).to(dtype) for _ in range(2))
        weight, summed = torch.randn(columns).to(dtype), (x + delta).double()
        expected = rms_norm.rms_norm_reference(summed.clone(), weight.double(), 1e-5)
        close(do.norm(x, weight, 1e-5, delta), expected, *near)
        assert torch.equal(x.double(), summed)
        gate_up = (torch.randn(rows, 2 * columns) * 30).to(dtype)
        close(do.swiglu(gate_up), swiglu.swiglu_reference(gate_up.double()), *near)


@pytest.mark.parametrize(
    ("stored", "dtype"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
)
@pytest.mark.parametrize(("tokens", "columns"), [(0, 576), (1, 576), (700, 123), (64, 1), (5, 0)])
def test_embeddings_are_the_rows_of_the_table(stored, dtype, tokens, columns):
    table = (torch.randn(31, columns) * 10.0 ** torch.randint(-9, 9, (31, 1))).to(stored)
    table[3:7] = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0], dtype=stored)[:, None]
    ids = torch.randint(0, 31, (tokens,), dtype=torch.int32)
    for count in (1, 3):
        with threads(count):
            found = CpuOperations(dtype).embed(ids, table)
        assert found.dtype == dtype
        torch.testing.assert_close(found, F.embedding(ids, table).to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("ids", "table", "dtype", "message"),
    [
        ([0, 31], torch.zeros(31, 4), torch.float32, "tokens: expected numbers from 0 to 30, got 0 to 31"),
        ([-1], torch.zeros(31, 4), torch.float32, "tokens: expected numbers from 0 to 30, got -1 to -1"),
        ([0], torch.zeros(0, 4), torch.float32, "tokens: expected numbers from 0 to -1"),
        ([0], torch.zeros(31, 8)[:, ::2], torch.float32, "table: expected contiguous"),
        ([0], torch.zeros(31), torch.float32, r"tokens, table, out: expected \[T\] int32, \[V, D\]"),
        ([0], torch.zeros(31, 4), torch.bfloat16, "table, out: expected"),
        ([0], torch.zeros(31, 4, dtype=torch.float64), torch.float64, "table, out: expected"),
    ],
)  # fmt: skip
def test_embeddings_that_do_not_exist_are_refused(ids, table, dtype, message):
    out = torch.zeros(len(ids), table.shape[-1], dtype=dtype)
    with pytest.raises(ValueError, match=message):
        embed(torch.tensor(ids, dtype=torch.int32), table, out)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("queries", "keys", "size"), [(9, 3, 64), (6, 6, 20), (5, 0, 8), (0, 2, 64)])
def test_the_rope_step_matches_its_reference(dtype, queries, keys, size):
    angles = torch.rand(40, size // 2) * 7
    positions = torch.randint(0, 40, (17,), dtype=torch.int32)
    sources = torch.cat([torch.arange(17), torch.tensor([-4, -1])])[torch.randperm(19)].int()
    x, prefix = torch.randn(17, (queries + 2 * keys) * size).to(dtype), torch.randn(4, 2, keys, size).to(dtype)
    exact = x.double()
    shape = (queries, keys, angles.cos(), angles.sin(), positions, sources)
    expected = rotary.rotary_reference(exact, *shape, prefix.double())
    close(CpuOperations(dtype).rope(x, *shape, prefix), expected, *FLOATS[dtype])
    close(x, exact, *FLOATS[dtype])


def test_the_steps_carry_nan_and_infinity():
    for dtype in FLOATS:
        x = torch.tensor([[1.0, torch.nan, torch.inf, -torch.inf, 3e38, -3e38]]).to(dtype)
        gate_up = torch.cat([x, torch.ones_like(x)], 1)
        torch.testing.assert_close(CpuOperations(dtype).swiglu(gate_up), swiglu.swiglu_reference(gate_up), equal_nan=True)
        assert CpuOperations(dtype).norm(x, torch.ones(6, dtype=dtype), 1e-5).isnan().any()


@pytest.mark.slow
def test_what_does_not_fit_is_refused():
    do = CpuOperations(torch.float32)
    with pytest.raises(ValueError, match="weight: expected contiguous float32 or bfloat16"):
        do.norm(torch.zeros(2, 4), torch.zeros(4, dtype=torch.float64), 1e-5)
    with pytest.raises(ValueError, match="x: expected"):
        do.norm(torch.zeros(2, 4)[:, ::2], torch.zeros(2), 1e-5)
    with pytest.raises(ValueError, match="delta"):
        do.norm(torch.zeros(2, 4), torch.zeros(4), 1e-5, torch.zeros(3, 4))
    with pytest.raises(ValueError, match="gate_up: expected"):
        do.swiglu(torch.zeros(2, 5))
    table = torch.zeros(4, 2)
    for sources, positions, prefix in (([2], [0, 0], None), ([-1], [0, 0], None), ([-3], [0, 0], 2), ([1], [0, 4], None)):
        given = None if prefix is None else torch.zeros(prefix, 2, 1, 4)
        with pytest.raises(ValueError, match="sources, positions: expected"):
            do.rope(
                torch.zeros(2, 12), 1, 1, table, table, torch.tensor(positions, dtype=torch.int32),
                torch.tensor(sources, dtype=torch.int32), given,
            )  # fmt: skip
    with pytest.raises(ValueError, match="cos, sin, prefix"):
        do.rope(torch.zeros(2, 12), 1, 1, table, table[:2], torch.zeros(2).int(), torch.zeros(2).int())
    with pytest.raises(ValueError, match="dtype: expected float32, bfloat16 or int8 on a CPU"):
        Engine.from_pretrained(None, device="cpu", dtype=torch.float16)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.booleans()), min_size=1, max_size=8),
    st.integers(0, 4),
    st.none() | st.tuples(st.integers(0, 6), st.integers(1, 5)),
)
def test_packing_puts_every_token_and_key_in_its_place(shapes, p, extra):
    prefix = np.arange(100, 100 + p, dtype=np.int32) if p else None
    prompts = [
        np.concatenate([prefix if prefix is not None and begins else [], np.arange(n) + 1000 * i]).astype(np.int32)
        for i, (n, begins) in enumerate(shapes, 1)
    ]
    shared = [p if begins else 0 for _, begins in shapes]
    size = (sum(map(len, prompts)) - sum(shared), len(prompts))
    fill = (size[0] + extra[0], size[1] + extra[1]) if extra else None
    packed = Packed.of(prompts, prefix, fill)
    assert packed.shared == (*shared, *[p] * (len(packed) - len(prompts)))
    assert (len(packed.tokens), len(packed)) == (fill or size)
    assert len(packed.sources) == len(packed.tokens) + sum(packed.shared)
    keys = np.concatenate([packed.tokens.numpy(), prefix if prefix is not None else []])[packed.sources.numpy()]
    if prefix is not None:  # row -1 - s of the prefix
        negative = packed.sources.numpy() < 0
        keys[negative] = prefix[-1 - packed.sources.numpy()[negative]]
    for i, ids in enumerate(prompts):
        first, last = packed.starts[i], packed.starts[i + 1]
        assert packed.tokens[first:last].tolist() == ids[shared[i] :].tolist()
        assert packed.positions[first:last].tolist() == list(range(shared[i], len(ids)))
        assert packed.last[i] == last - 1
        assert keys[packed.key_starts[i] : packed.key_starts[i + 1]].tolist() == ids.tolist()
    assert sum(run.prompts for run in packed.runs()) == len(packed)
    assert (packed.longest_own, packed.longest) == (
        max(packed.lengths),
        max(map(sum, zip(packed.lengths, packed.shared, strict=True))),
    )
    copy = packed.within(packed.buffer.clone())
    assert (copy.longest_own, copy.longest) == (packed.longest_own, packed.longest)
    assert all(torch.equal(getattr(copy, n), getattr(packed, n)) for n in ("tokens", "sources", "last", "key_starts"))
    assert all(getattr(packed, n).data_ptr() % 16 == packed.tokens.data_ptr() % 16 for n in ("sources", "last", "starts"))


@pytest.mark.slow
@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.integers(1, 1100), min_size=1, max_size=12) | st.lists(st.integers(1, 90), min_size=1, max_size=70),
    st.booleans(),
)
def test_a_graphs_bucket_is_the_smallest_that_holds_the_prompts(lengths, sharing):
    prefix = np.arange(9, dtype=np.int32) if sharing else None
    prompts = [np.concatenate([np.arange(9 * sharing), np.zeros(n)]).astype(np.int32) for n in lengths]
    fits = [b for b in BUCKETS if sum(lengths) <= b.tokens and len(lengths) < b.prompts and max(lengths) <= b.longest]
    bucket = bucket_of(prompts, prefix)
    assert bucket == min(fits, default=None)
    if bucket is not None:  # all batches of a bucket have the sizes that its graph was captured with
        packed = Packed.of(prompts, prefix, bucket[:2])
        assert (len(packed.tokens), len(packed)) == bucket[:2]
        assert len(packed.sources) == bucket.tokens + bucket.prompts * (9 * sharing)
        assert packed.lengths[: len(lengths)] == tuple(lengths)
    if sharing:
        assert bucket_of([*prompts, np.ones(3, np.int32)], prefix) is None


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.slow
def test_a_shared_prefix_changes_nothing(dtype, tmp_path):
    folder = tiny.write(tmp_path, template=PREFIXED)
    engine = Engine.from_pretrained(folder, device="cpu", dtype=dtype)
    prefix = engine.backbone.prefix
    assert len(prefix) == 44  # to the end of "<|im_start|>user\n"
    shared = engine.coefficients(PROMPTS)
    # The prompt of 9,000 tokens has lost its beginning, and shares nothing.
    assert Packed.of(engine.encoder.encode(PROMPTS), prefix).shared == (44,) * 6 + (0, 44)
    # A batch is full when its own tokens are as many as it may have: those of the prefix are not computed.
    engine.tokens_per_batch = 200
    sizes = [len(rows) for rows, _ in engine.stream(["word"] * 30, lambda hidden, rows: (hidden.float(),))]
    own = len(engine.encoder.encode(["word"])[0]) - 44
    assert sizes[0] == 200 // (own + 44 // 8)
    engine.backbone.share(None)
    alone = engine.coefficients(PROMPTS)
    scale = np.abs(alone.theta).max()
    np.testing.assert_allclose(shared.theta, alone.theta, atol=scale * (1e-5 if dtype == torch.float32 else 0.03))
    np.testing.assert_allclose(shared.eta, alone.eta, atol=scale * (1e-5 if dtype == torch.float32 else 0.03))


def test_a_prompt_whose_first_token_joins_the_prefix_shares_nothing(tmp_path, caplog):
    engine = Engine.from_pretrained(tiny.write(tmp_path, template=PREFIXED), device="cpu", dtype=torch.float32)
    ids = engine.encoder.encode(["hello"])[0].copy()
    ids[40] += 1
    with caplog.at_level(logging.WARNING):
        assert Packed.of([ids, engine.backbone.prefix], engine.backbone.prefix).shared == (0, 0)
