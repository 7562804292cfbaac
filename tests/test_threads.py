"""Results do not depend on the number of threads, up to rounding."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from p2l_engine import Engine, Leaderboard
from p2l_engine.native import routing
from p2l_engine.train.batches import PromptVotes, collate
from p2l_engine.train.model import build
from p2l_engine.votes import read
from tests.support import tiny
from tests.support.threads import threads
from tests.support.training import settings

PROMPTS = ["", "hello", *("x" * n for n in range(100, 900, 100))]  # long enough for several threads


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_coefficients_and_leaderboards(family, dtype, n, tmp_path):
    engine = Engine.from_pretrained(tiny.write(tmp_path, tiny.config(family)), device="cpu", dtype=dtype)
    with threads(1):
        one = engine.coefficients(PROMPTS)
        board = Leaderboard.over(one)
    with threads(n):
        several = engine.coefficients(PROMPTS)
        again = Leaderboard.over(one)
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    np.testing.assert_allclose(several.theta, one.theta, atol=tolerance * np.abs(one.theta).max())
    np.testing.assert_allclose(again.coefficients(one.models), board.coefficients(one.models), atol=1e-9)


@pytest.mark.slow
def test_gradients_of_training(tmp_path):
    config = settings(tmp_path, dtype="float32", max_length=512)
    votes, _ = read(config.train_data_path)
    model, _ = build(config, len(votes.models))
    encoder = Engine.from_pretrained(tmp_path / "base", device="cpu").encoder
    items = PromptVotes(votes, encoder)
    batch = collate([items[i] | {"ids": np.tile(items[i]["ids"], 12)} for i in range(16)])
    found = []
    for n in (1, 2, 3):
        model.zero_grad()
        with threads(n):
            model(**batch)["loss"].backward()
        found.append({name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None})
    assert len(found[0]) > 20
    for several in found[1:]:
        for name, gradient in found[0].items():
            torch.testing.assert_close(several[name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()), msg=name)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("how", ["arrays", "arrays torch", "engine"])
def test_a_forked_child_does_not_wait_for_its_parents_threads(how):
    """Threads do not survive a fork: the native core starts others in the child, torch stays on one; the answers stay."""
    command = [sys.executable, "-m", "tests.support.forked", *how.split()]
    subprocess.run(
        command, cwd=Path(__file__).parent.parent, env=os.environ | {"OMP_NUM_THREADS": "2"}, check=True, timeout=1200
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environment", "code", "expected"),
    [
        ("3", "", "3"),
        ("2,4", "", "2"),
        ("", "", "CPUs"),
        ("none", "", "CPUs"),
        ("0", "", "CPUs"),
        ("3", "import torch; torch.set_num_threads(2)", "2"),
        ("3", "import torch; torch.set_num_threads(5)", "3"),
    ],
)
def test_the_most_threads(environment, code, expected):
    """Read when the first call asks, in a process of its own."""
    command = f"from p2l_engine.native import binding, cpus\n{code}\nprint(binding.max_threads(), cpus.available())"
    found = subprocess.run(
        [sys.executable, "-c", command], env=os.environ | {"OMP_NUM_THREADS": environment}, check=True, capture_output=True
    )
    most, available = found.stdout.decode().split()
    assert most == (available if expected == "CPUs" else expected)


@pytest.mark.parametrize("n", [1, 31, 32, 33, 64, 1000])
def test_routing_does_not_depend_on_threads(n, monkeypatch):
    """Not in the last bit, but for the sums over all prompts that choose a batch's dual price."""
    rng = np.random.default_rng(n)
    v, costs, q = rng.random((n, 7)), rng.exponential(size=7), rng.dirichlet(np.ones(7))
    theta, lam = 30 * rng.normal(size=(n, 7)), rng.exponential(size=n)
    budget = np.full(n, costs.mean())

    def answers():
        each = routing.solve_budget(v, costs, budget, budget)
        hulls = routing.hulls(v, costs)
        return [routing.win_rates(theta, q), routing.tie_win_rates(theta, lam, True, q), *each, *hulls]

    found = []
    for most in (1, 2, 3, 7):
        monkeypatch.setattr(routing.binding, "max_threads", lambda most=most: most)
        found.append(answers())
    for other in found[1:]:
        for first, again in zip(found[0], other, strict=True):
            np.testing.assert_array_equal(np.asarray(again), np.asarray(first))
