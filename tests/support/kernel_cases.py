"""Every Triton kernel against its reference implementation in float64: odd shapes, poisoned outputs, random inputs
(seed: P2L_TEST_SEED).

Triton reads TRITON_INTERPRET when it is imported, so this module runs in a process of its own:
``TRITON_INTERPRET=1 python -m tests.support.kernel_cases`` prints a line for each case. On a GPU the tests call the cases.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModel

from p2l_engine import Catalog, Engine, InfeasibleBudget, Router, routing
from p2l_engine.backbone import DecoderConfig, DecoderWeights, PackedDecoder
from p2l_engine.backbone.on_gpu import GpuOperations
from p2l_engine.backbone.packing import Packed
from p2l_engine.catalog import CatalogModel
from p2l_engine.constraints import UNCONSTRAINED, Constraints
from p2l_engine.kernels import (
    attention,
    bt_score,
    budget_lp,
    pool_head,
    pool_head_win_rates,
    rms_norm,
    rotary,
    swiglu,
    win_rates,
)
from p2l_engine.prompts.parse import parse_batch
from p2l_engine.routing import cuda
from tests.support import tiny

# The interpreter's time grows with the number of blocks: more of them take other paths only on a GPU.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
PROMPTS, MODELS = (1, 5, 17), (1, 3, 34, 130) if INTERPRETED else (1, 3, 34, 130, 257)
# More than a whole number of blocks, a whole number, less than one.
HIDDEN = (576, 256 if INTERPRETED else 896, 123)
SHAPES = [(PROMPTS[(i + i // 3) % 3], m, d) for i, (m, d) in enumerate(itertools.product(MODELS, HIDDEN))]
FLOATS = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (2e-2, 1e-2)}  # absolute, relative


@contextmanager
def poisoned() -> Iterator[None]:
    """Makes torch.empty return NaN, or the least integer, so that elements that a kernel does not write are found."""
    plain, plain_like = torch.empty, torch.empty_like

    def poison(tensor: Tensor) -> Tensor:
        if tensor.dtype == torch.bool:
            return tensor.fill_(False)
        return tensor.fill_(torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).min)

    with (
        mock.patch.object(torch, "empty", lambda *a, **k: poison(plain(*a, **k))),
        mock.patch.object(torch, "empty_like", lambda *a, **k: poison(plain_like(*a, **k))),
    ):
        yield


def close(got: Tensor, expected: Tensor, absolute: float, relative: float) -> None:
    torch.testing.assert_close(got.double(), expected.double(), atol=absolute, rtol=relative)


def opponents(n: int, m: int, per_prompt: bool, device: str) -> Tensor:
    q = torch.rand((n, m) if per_prompt else (m,), device=device, dtype=torch.float64)
    return q / q.sum(-1, keepdim=True)


def case_rms_norm(device: str) -> None:
    for n, d, (dtype, near), added in itertools.product(PROMPTS, HIDDEN, FLOATS.items(), (False, True)):
        x, delta = (torch.randn(n, d, device=device).to(dtype) for _ in range(2))
        weight = (1 + 0.3 * torch.randn(d, device=device)).to(dtype)
        exact = (x + delta if added else x.clone()).double()
        expected = rms_norm.rms_norm_reference(exact, weight.double(), 1e-5)
        with poisoned():
            close(rms_norm.rms_norm(x, weight, 1e-5, delta if added else None), expected, *near)
        close(x, exact, 1e-6, 2**-7)  # the sum, rounded once


def case_swiglu(device: str) -> None:
    for n, inner, (dtype, near) in itertools.product(PROMPTS, (1, 123, 1536, 2049), FLOATS.items()):
        x = (4 * torch.randn(n, 2 * inner + 3, device=device).to(dtype))[:, : 2 * inner]
        with poisoned():
            close(swiglu.swiglu(x), swiglu.swiglu_reference(x.double()), *near)


def case_rotary(device: str) -> None:
    shapes = ((9, 3, 64), (14, 2, 64), (28, 4, 128), (6, 6, 20), (5, 0, 8), (0, 2, 64))
    for (queries, keys, size), n, (dtype, near) in itertools.product(shapes, PROMPTS, FLOATS.items()):
        angles = torch.rand(40, size // 2, device=device) * 7
        cos, sin = angles.cos(), angles.sin()
        positions = torch.randint(0, 40, (n,), device=device, dtype=torch.int32)
        x = torch.randn(n, (queries + 2 * keys) * size, device=device).to(dtype)
        prefix = torch.randn(4, 2, keys, size, device=device).to(dtype)
        own = torch.arange(n, dtype=torch.int32)
        for shared in (False, True):
            sources = torch.cat([own, torch.tensor([-4, -1, -3], dtype=torch.int32)]) if shared else own
            sources = sources[torch.randperm(len(sources))].to(device)
            exact = x.double()
            given = prefix.double() if shared else None
            expected = rotary.rotary_reference(exact, queries, keys, cos, sin, positions, sources, given)
            got = x.clone()
            with poisoned():
                given = prefix if shared else None
                close(rotary.rotary(got, queries, keys, cos, sin, positions, sources, given), expected, *near)
            close(got, exact, *near)


def case_attention(device: str) -> None:
    shapes = ((9, 3, 64), (14, 2, 64), (28, 4, 128), (6, 6, 20), (5, 1, 8))
    floats = {torch.float16: (5e-3, 5e-3), torch.bfloat16: (3e-2, 2e-2)}
    if device == "cpu":
        del floats[torch.bfloat16]  # the interpreter cannot multiply it
    for (heads, keys, size), n, (dtype, near), last in itertools.product(shapes, (1, 5), floats.items(), (False, True)):
        own = torch.randint(0, 100, (n,)) if n > 1 else torch.tensor([130])
        shared = torch.randint(0, 2, (n,)) * 22
        starts = torch.cat([torch.zeros(1), own.cumsum(0)]).int().to(device)
        key_starts = torch.cat([torch.zeros(1), (own + shared).cumsum(0)]).int().to(device)
        rows = n if last else int(own.sum())
        q = torch.randn(rows, heads * size + 24, device=device).to(dtype)[:, : heads * size].view(rows, heads, size)
        kv = (2 * torch.randn(int((own + shared).sum()), 2, keys, size, device=device)).to(dtype)
        given = (starts, key_starts, int(own.max()) + 70, last)
        with poisoned():
            got = attention.attention(q, kv, *given)
        there = (own + shared > 0).to(device) if last else slice(None)  # the output of a prompt without keys means nothing
        close(got[there], attention.attention_reference(q.double(), kv.double(), *given)[there], *near)


def head_inputs(n: int, k: int, d: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden [N, D], every second row of a larger tensor; weight [K, D], bias [K] and norm [D]."""
    hidden = torch.randn(2 * n, d, device=device).to(dtype)[::2]
    weight, bias = torch.randn(k, d, device=device) / d**0.5, torch.randn(k, device=device)
    return hidden, weight, bias, (1 + 0.3 * torch.randn(d, device=device)).to(dtype)


def case_pool_head(device: str) -> None:
    _, few, many = pool_head.VARIANTS
    variants = [(few, 34, 123), (many, 3, 123), (many + 1, 130, 123)]
    if not INTERPRETED:
        variants += [(few, 3, 123), (many, 34, 123), (many + 1, 3, 123), (many + 1, 34, 123)]
    for (n, m, d), dtype in zip([*SHAPES[::2], *variants], itertools.cycle(FLOATS)):
        hidden, weight, bias, norm = head_inputs(n, m, d, dtype, device)
        for given in (norm, None):
            expected = pool_head.pool_head_reference(hidden, weight.double(), bias.double(), given, 1e-5)
            with poisoned():
                close(pool_head.pool_head(hidden, weight, bias, given, 1e-5), expected, 1e-5, 1e-5)


def case_win_rates(device: str) -> None:
    for n, m, per_prompt in itertools.product(PROMPTS, MODELS, (False, True)):
        theta, q = torch.randn(n, m + 1, device=device)[:, :m] * 5, opponents(n, m, per_prompt, device)
        with poisoned():
            close(win_rates.win_rates(theta, q), win_rates.win_rates_reference(theta.double(), q), 1e-6, 1e-5)
    assert win_rates.win_rates(torch.zeros(0, 4, device=device), torch.full((4,), 0.25, device=device)).shape == (0, 4)


def case_pool_head_win_rates(device: str) -> None:
    shapes = [*SHAPES, (1, 512, 576), (1, 600, 123)]
    # Each number of models and each width in both dtypes.
    for (n, m, d), dtype in zip(shapes, itertools.cycle(FLOATS)) if INTERPRETED else itertools.product(shapes, FLOATS):
        hidden, weight, bias, norm = head_inputs(n, m + 1, d, dtype, device)
        q = opponents(n, m, n == 5, device).float()
        doubles = (hidden, weight.double(), bias.double(), q.double(), norm, 1e-5)
        theta, v = pool_head_win_rates.pool_head_win_rates_reference(*doubles)
        with poisoned():
            got_theta, got_v = pool_head_win_rates.pool_head_win_rates(hidden, weight, bias, q, norm, 1e-5)
        close(got_theta, theta, 1e-5, 1e-5)
        close(got_v, v, 1e-5, 1e-5)


def case_budget_lp(device: str) -> None:
    for n, m, coarse in itertools.product(PROMPTS, (1, 3, 34, 130), (False, True)):
        v, costs = torch.rand(n, m, device=device), torch.rand(n, m, device=device, dtype=torch.float64).exp()
        if coarse:  # equal values and equal costs abound
            v, costs = (v * 4).round() / 4, (costs * 2).round()
        shared = m % 2 == 1 and m > 1
        if shared:
            costs = costs[0].contiguous()
        full = costs.expand(n, m)
        share = torch.rand(n, device=device, dtype=torch.float64) * 1.3 - 0.1
        share[0] = 0.0
        low, high = full.amin(1), full.amax(1)
        budget = torch.maximum(low + share * (high - low), low)
        if n > 1:
            budget[-1] = torch.inf
        finite = budget.clamp_max(1e9)
        indices, probabilities, best, _ = budget_lp.budget_lp_reference(*(t.cpu() for t in (v, costs, finite)))
        assert bool((indices >= 0).all())
        assert bool((probabilities >= 0).all())
        with poisoned():
            got_indices, got, value, cost = (t.cpu() for t in budget_lp.budget_lp(v, costs, budget))
        close(value, best, 1e-12, 1e-12)
        close(got.sum(1), torch.ones(n), 1e-15, 0.0)
        assert bool((got >= 0).all())
        assert bool((cost <= finite.cpu() * (1 + 1e-12)).all())
        chosen = got_indices.long()
        close((got * v.cpu().double().gather(1, chosen)).sum(1), value, 1e-12, 1e-12)
        close((got * full.cpu().gather(1, chosen)).sum(1), cost, 1e-9, 1e-9)
    # Out of reach: no probability, and the cost that would be needed.
    with poisoned():
        out = budget_lp.budget_lp(
            torch.rand(1, 3, device=device), torch.tensor([2.0, 3, 4], dtype=torch.float64, device=device),
            torch.tensor([1.5], dtype=torch.float64, device=device),
        )  # fmt: skip
    assert out[1].tolist() == [[0.0, 0.0]]
    assert out[3].tolist() == [2.0]


def case_bt_score(device: str) -> None:
    for n, m, spread in itertools.product(PROMPTS, MODELS, (1.0, 10.0)):
        theta, q = torch.randn(n, m, device=device) * spread, opponents(n, m, n == 5, device)
        if m > 3:
            q[..., : m // 2] = 0  # opponents without weight do not count, however strong
            q /= q.sum(-1, keepdim=True)
            theta[:, 0] = 80
        rate = torch.rand(n, device=device, dtype=torch.float64)
        if n == 17:
            rate[:8] = torch.tensor([0.0, 1.0, 1e-12, 1 - 1e-12, 1e-300, 0.5, 1e-6, 1 - 1e-6], dtype=torch.float64)
        with poisoned():
            score = bt_score.bt_score(theta, q, rate)
        # Where 1 - rate has few digits left, so has the score: there the win rate must do.
        close(score, bt_score.bt_score_reference(theta, q, rate), 1e-3, 1e-9)
        win = (q * torch.sigmoid(score[:, None] - theta.double())).sum(1)
        close(win, rate, 1e-14, 1e-9)


def case_decoder(device: str) -> None:
    """The decoder on Triton's kernels, with and without a shared prefix, against the CPU's own steps in float32."""
    for config in (tiny.config("llama", num_hidden_layers=2), tiny.config("qwen2", num_hidden_layers=1)):
        weights = {k: v + 0.05 * torch.randn_like(v) for k, v in AutoModel.from_config(config).state_dict().items()}
        packed, cpu = DecoderConfig.read(config.to_dict()), torch.device("cpu")
        of = [DecoderWeights.of(packed, weights, place, torch.float32, None) for place in (torch.device(device), cpu)]
        ours = PackedDecoder(packed, of[0], torch.device(device), torch.float32, GpuOperations)
        theirs = PackedDecoder(packed, of[1], cpu, torch.float32)
        prefix = np.arange(5, dtype=np.int32)
        prompts = [np.concatenate([prefix, np.arange(n)]).astype(np.int32) for n in (1, 7, 7, 19)] + [prefix[1:]]
        for shared in (None, prefix):
            ours.share(shared)
            theirs.share(shared)
            with poisoned():
                got = ours(Packed.of(prompts, shared).to(torch.device(device)))
            close(got.cpu(), theirs(Packed.of(prompts, shared)), 1e-4, 1e-4)


def case_routing(device: str) -> None:
    """The stages that stay on the GPU, against the native core."""
    theta, q = torch.randn(40, 34, device=device) * 2, opponents(40, 34, True, device).cpu().numpy()
    costs, budget = np.random.default_rng(torch.initial_seed()).exponential(size=34), 0.4
    with poisoned():
        v = cuda.win_rates(theta, q)
        policies = cuda.solve_budget(v, costs, budget)
        score = cuda.bt_score(theta, q, policies.value)
    exact = routing.win_rates(theta.cpu().double().numpy(), q)
    expected = routing.solve_budget(exact, costs, budget)
    for got, wanted in ((v, exact), (policies.value, expected.value), (policies.cost, expected.cost)):
        np.testing.assert_allclose(got.cpu().numpy(), wanted, atol=1e-5)
    np.testing.assert_allclose(score.cpu().numpy(), routing.bt_score(theta.cpu().numpy(), q, expected.value), atol=1e-4)
    limits = np.full(40, budget)
    limits[[7, 9]] = costs.min() / 2
    with pytest.raises(InfeasibleBudget, match="prompt 7 .and 1 more") as error:
        cuda.solve_budget(v, costs, limits)
    assert error.value.smallest == costs.min()
    limits[[7, 9]] = np.nextafter(costs.min(), 0)  # one rounding short
    assert float(cuda.solve_budget(v, costs, limits).cost[7]) == costs.min()
    v[3, 5] = torch.nan
    with pytest.raises(ValueError, match=r"v\[3, 5\]: expected a finite number"):
        cuda.solve_budget(v, costs, budget)


def case_router(device: str) -> None:
    """A batch routed on the GPU, against the same batch on the CPU."""
    with tempfile.TemporaryDirectory() as folder:
        engine = Engine.from_pretrained(tiny.write(Path(folder)), device=device, dtype=torch.float32)
    costs = [1.0, 2.0, 3.0, 4.0]
    names = ["delta", "alpha", "epsilon", "beta"]  # not in the checkpoint's order, and one model is left out
    catalog = Catalog(tuple(CatalogModel(n, c) for n, c in zip(names, costs, strict=True)))
    router = Router(engine, catalog, {"alpha": 0.5, "gamma": 0.25, "beta": 0.25}, unmatched="leave_out")
    prompts = parse_batch([f"prompt {i} " * (1 + i % 4) for i in range(12)])
    limits = np.linspace(1.0, 4.0, 12)
    for budget in (None, 2.5, limits):
        for fused in (0, 100):
            engine.head_win_rates.fused_up_to = fused
            with poisoned():
                got = router._route_on_gpu(prompts, Constraints(budget), None)
            for one, other in zip(got, router.decide(engine.coefficients(prompts), prompts, Constraints(budget)), strict=True):
                assert one.policy == pytest.approx(other.policy, abs=1e-3)
                for field in ("expected_cost", "win_rate", "score"):
                    assert getattr(one, field) == pytest.approx(getattr(other, field), abs=1e-4)
                assert one.why.split(":")[0] == other.why.split(":")[0]
    limits[5] = 0.5
    with pytest.raises(InfeasibleBudget, match="prompt 5: the cheapest policy costs 1.0"):
        router._route_on_gpu(prompts, Constraints(limits), None)
    engine.head.bias[2] = torch.nan
    with pytest.raises(FloatingPointError, match="not finite"):
        router._route_on_gpu(prompts, UNCONSTRAINED, None)
    assert router._route_on_gpu([], UNCONSTRAINED, None) == []


CASES: dict[str, Callable[[str], None]] = {
    name.removeprefix("case_"): case for name, case in list(globals().items()) if name.startswith("case_")
}


def remember_builtins() -> None:
    """The interpreter searches all of Triton's language for builtins at each call of a function within a kernel, a fifth of its
    time: they are the same each time."""
    from triton.language import core
    from triton.runtime import interpreter

    @functools.cache
    def names(of: Any) -> list[str]:
        return [name for name, member in inspect.getmembers(of) if core.is_builtin(member)]

    def patch(of: Any, builder: Any, scope: Any) -> None:
        for name in names(of):
            member = getattr(of, name)
            if core.is_builtin(member):  # not where an outer call has replaced it
                interpreter._patch_attr(of, name, member, builder, scope)

    assert callable(interpreter._patch_builtin)
    interpreter._patch_builtin = patch


def main() -> None:
    remember_builtins()
    seed = int(os.environ.get("P2L_TEST_SEED") or torch.seed())
    torch.manual_seed(seed)
    for name, case in CASES.items():
        try:
            case("cpu")
            print(f"{name}: same")
        except Exception:
            print(f"{name}: seed {seed}: {traceback.format_exc()!r}")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
