"""The native core on Arm: compiled for armv8.2-a and run by qemu, it gives what it gives on this machine."""

from __future__ import annotations

import inspect
import re

import numpy as np
import pytest
import torch

from p2l_engine.native import decoder, embedding, panels, routing, votes
from p2l_engine.native.panels import Panels
from tests.support import arm

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(arm.MISSING),
        reason=f"{' and '.join(arm.MISSING)} not installed (gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user)",
    ),
]

SIZES = [(1, 1), (1, 2), (3, 7), (33, 16), (40, 131)]  # prompts, models; from 32 prompts on two threads
OTHERS = {"p2l_isa_level", "p2l_layer"}  # describes the machine; calls the functions that are compared one by one


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return arm.build(tmp_path_factory.mktemp("arm"))


@pytest.fixture(scope="module")
def core(program):
    found = arm.Core(program)
    yield found
    found.close()


def functions(module):
    """Those of the core that a module calls."""
    return set(re.findall(r"lib\.(p2l_\w+)\(", inspect.getsource(module)))


def both(core, call):
    """The results of a call, a list of arrays, here and on Arm."""
    here = call()
    with pytest.MonkeyPatch.context() as patch:
        arm.use(core, patch)
        there = call()
    return here, there


def same(core, call, rtol=1e-12, atol=1e-13):
    """Whole numbers are equal, the others up to the order of roundings (fused multiply-add, exp in vectors)."""
    for here, there in zip(*both(core, call), strict=True):
        here, there = np.asarray(here), np.asarray(there)
        assert here.dtype == there.dtype
        if here.dtype.kind in "ib":
            np.testing.assert_array_equal(there, here)
        else:
            np.testing.assert_allclose(there, here, rtol, atol)


@pytest.mark.parametrize("spread", [1.0, 40.0, 700.0])
@pytest.mark.parametrize(("n", "m"), SIZES)
def test_routing(n, m, spread, core):
    rng = np.random.default_rng(n * 1000 + m)
    theta = spread * rng.normal(size=(n, m))
    q, each = rng.dirichlet(np.ones(m)), rng.dirichlet(np.ones(m), n)
    lam, costs, v = rng.exponential(size=n), rng.exponential(size=m), rng.random((n, m))
    allowed = rng.random((n, m)) < 0.7
    allowed[:, 0] = True
    for opponents in (q, each):
        same(core, lambda opponents=opponents: [routing.win_rates(theta, opponents)])
        for grounded in (False, True):
            same(core, lambda opponents=opponents, g=grounded: [routing.tie_win_rates(theta, lam, g, opponents)])
    order = np.argsort(costs)
    for log_lambda in (None, lam):
        given = (theta, log_lambda, log_lambda is not None, q, order, costs[order])
        same(core, lambda given=given: [routing.contending_win_rates(*given)])
    rate = routing.win_rates(theta, q).max(1).clip(1e-9, 1 - 1e-9)
    rate[0] = 0
    same(core, lambda: [routing.bt_score(theta, q, rate)], 1e-9, 1e-9)
    e = np.exp(theta / spread)
    for count in (2, 3, 4):
        handicap = None if count == 2 else np.exp(lam)
        same(core, lambda count=count, handicap=handicap: [routing.outcomes(e, handicap, count == 4, count, 2)])
    for mask in (None, allowed):
        for amounts in (costs, rng.exponential(size=(n, m))):
            cheapest = np.where(np.ones_like(allowed) if mask is None else mask, amounts, np.inf).min(1)
            budget = cheapest + rng.exponential(size=n)
            budget[-1] = np.inf
            same(core, lambda mask=mask, a=amounts, b=budget: routing.solve_budget(v, a, b, b, mask))
            same(core, lambda mask=mask, a=amounts: routing.hulls(v, a, mask))
        same(core, lambda mask=mask: routing.best_models(v, costs, mask, 5, 1e-9))
    others = rng.permuted(costs)
    same(core, lambda: [routing.undominated(v.round(1), [costs.round(1), others], allowed)])
    same(core, lambda: [routing.noise_of(np.arange(n) * 10**12, m)])
    sizes, models, cost, value = routing.hulls(v, costs)
    offsets = np.concatenate([[0], sizes.cumsum()]).astype(np.int64)
    for slack in (0.0, n / 4, 1e9):
        same(core, lambda slack=slack: routing.select_steps(offsets, cost, value, slack))
        price, left = routing.select_steps(offsets, cost, value, slack)

        def take(price=price, left=left):
            out = np.zeros((n, 2), np.int32), np.zeros((n, 2)), np.zeros(n), np.zeros(n)
            routing.take_steps(offsets, models, cost, value, price, left, out)
            return out

        same(core, take)
    assert core.called >= functions(routing)


@pytest.mark.parametrize("spread", [1.0, 40.0])
@pytest.mark.parametrize(("n", "m"), SIZES[1:])
def test_the_loss_of_votes(n, m, spread, core):
    rng = np.random.default_rng(n * 1000 + m)
    theta, excess, prompt = (
        spread * rng.normal(size=(n, m)).clip(-3, 3),
        rng.exponential(size=n),
        np.sort(rng.integers(n, size=9 * n)),
    )
    a = rng.integers(m, size=9 * n)
    b = (a + rng.integers(1, m, size=9 * n)) % m
    for outcomes, grounded, half_ties in (
        (2, False, False),
        (2, False, True),
        (3, False, False),
        (3, True, False),
        (4, True, False),
    ):
        outcome = rng.integers(4 if half_ties or outcomes > 2 else 2, size=9 * n)
        drawn = votes.VoteArrays(np.searchsorted(prompt, np.arange(n + 1)), a, b, outcome, rng.exponential(size=9 * n))
        of = (theta, excess if outcomes > 2 else None, grounded, drawn, outcomes, half_ties)
        same(core, lambda of=of: votes.votes_loss(*of))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "heads", "half"), [(1, 1, 1), (3, 2, 5), (65, 3, 32)])
def test_the_decoders_steps(rows, heads, half, dtype, core):
    size, rough = 2 * half, dict(rtol=2e-2, atol=2e-2) if dtype == torch.bfloat16 else dict(rtol=1e-5, atol=1e-5)
    columns = 4 * heads * size

    def random(*shape, seed=0):
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)

    def steps(*tensors):
        return [tensor.float().numpy() for tensor in tensors]

    weight, angles = random(columns, seed=1), random(rows + 3, half, seed=2).float()
    cos, sin = angles.cos(), angles.sin()

    def embeddings():
        tokens, table = torch.arange(rows, dtype=torch.int32) * 7 % 11, random(11, columns)
        return steps(*(embedding.embed(tokens, table, torch.zeros(rows, columns, dtype=to)) for to in (dtype, torch.float32)))

    def norm():
        x, out = random(rows, columns), random(rows, columns)
        decoder.rms_norm(x, weight, 1e-5, out, random(rows, columns, seed=3))
        return steps(x, out)

    def norm_backward():
        dx = random(rows, columns)
        d_weight = decoder.rms_norm_backward(
            random(rows, columns, seed=4), weight, random(rows, columns, seed=5), dx, 1e-5, True
        )
        return steps(dx, d_weight / rows)

    def swiglu():
        gate_up, out = 9 * random(rows, columns), random(rows, columns // 2)
        decoder.swiglu(gate_up, out)
        back, again = torch.zeros_like(gate_up), torch.zeros_like(out)
        decoder.swiglu_backward(gate_up, random(rows, columns // 2, seed=6), back, again)
        return steps(out, again, back)

    def rope():
        x, kv = random(rows, columns), torch.zeros(rows + 2, 2, heads, size, dtype=dtype)
        positions = torch.arange(rows, dtype=torch.int32) + 2
        sources = torch.cat([torch.tensor([-1, -2], dtype=torch.int32), torch.arange(rows, dtype=torch.int32)])
        decoder.rope_kv(x, 2 * heads, heads, cos, sin, positions, sources, kv, random(2, 2, heads, size, seed=7))
        turned, back = random(rows, columns), random(rows, columns)
        decoder.rope(turned, cos[:rows], sin[:rows], 4 * heads, 3 * heads)
        decoder.rope(back, cos[:rows], sin[:rows], 4 * heads, heads, inverse=True)
        return steps(x, kv, turned, back)

    def attention():
        # Prompts of some rows and of one, both behind two known keys.
        starts = torch.tensor([0, rows, rows + 1], dtype=torch.int32)
        key_starts = starts + torch.tensor([0, 2, 4], dtype=torch.int32)
        q, kv = random(rows + 1, 2 * heads, size, seed=8), random(rows + 5, 2, heads, size, seed=9)
        out, last = random(rows + 1, 2 * heads * size), random(2, 2 * heads * size)
        decoder.attention(q, kv, starts, key_starts, False, out)
        decoder.attention(q[[rows - 1, rows]], kv, starts, key_starts, True, last)
        return steps(out, last)

    for step in (embeddings, norm, norm_backward, swiglu, rope, attention):
        same(core, step, **rough)
    assert core.called >= functions(decoder) | functions(embedding)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
@pytest.mark.parametrize(("rows", "depth", "columns"), [(1, 3, 1), (13, 150, 70), (40, 576, 96)])
def test_products(rows, depth, columns, dtype, core):
    def product():
        rng = torch.Generator().manual_seed(0)
        x, weight, bias = (torch.randn(*shape, generator=rng) for shape in ((rows, depth), (columns, depth), (columns,)))
        packed = Panels.of(weight, bias, dtype, at_level=0)
        out, scratch = torch.zeros(rows, columns), torch.zeros(packed.scratch(rows), dtype=torch.uint8)
        return [panels.multiply(x, packed, out, scratch).numpy()]

    same(core, product, rtol=1e-4, atol=1e-4)


def test_levels_of_products(core):
    with pytest.MonkeyPatch.context() as patch:
        arm.use(core, patch)
        # torch's products are faster than what the compiler makes of plain C; int8 has no others.
        assert [panels.level(dtype) for dtype in panels.DTYPES] == [-1, -1, 0]


def test_an_infeasible_prompt_and_a_wrong_source_are_told(core):
    v, costs, budget = np.ones((2, 3)), np.array([1.0, 2.0, 3.0]), np.array([0.5, 1.0])
    same(core, lambda: routing.solve_budget(v, costs, budget, budget))

    def told():
        x, tables, kv = torch.ones(2, 12), torch.ones(4, 2), torch.zeros(1, 2, 1, 4)
        with pytest.raises(ValueError, match="expected tokens of x"):
            decoder.rope_kv(x, 1, 1, tables, tables, *(torch.tensor(s, dtype=torch.int32) for s in ([0, 1], [2])), kv)
        return [kv.numpy()]

    same(core, told)


def test_no_function_is_left_out(core):
    of_modules = set().union(*map(functions, (decoder, embedding, panels, routing, votes)))
    assert of_modules | OTHERS == set(core.kinds)
