"""What is known of the simulated world is found again: by training, by leaderboards, by the router."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from p2l_engine import Engine, Leaderboard, routing
from p2l_engine.feedback import feedback_model
from p2l_engine.leaderboard import OutcomeSums, fit
from p2l_engine.train.config import TrainConfig
from p2l_engine.train.run import train
from p2l_engine.votes.marginal import marginal_fit
from tests.support import tiny
from tests.support.cases import slow_but
from tests.support.simulate import Simulator

WINNERS = ("model_a", "model_b", "tie", "tie (bothbad)")


def write(votes, path):
    names, prompts = np.array(votes.models), np.array([json.dumps(prompt) for prompt in votes.prompts])
    columns = {"prompt": prompts[votes.prompt], "model_a": names[votes.a]}
    if votes.are_values:
        columns = {"prompt": columns["prompt"], "model": columns["model_a"], "value": votes.outcome}
    else:
        columns |= {"model_b": names[votes.b], "winner": [WINNERS[y] for y in votes.outcome]}
    pq.write_table(pa.table(columns), path)
    return str(path)


def trained(tmp_path, simulator, votes, **changes):
    tiny.write(tmp_path / "base", tiny.config(num_hidden_layers=1))  # words' effects add up: one layer learns them
    head = "rk" if simulator.feedback.has_eta else "bt"
    values = {
        "proj_name": "simulated", "pretrain_model_name": str(tmp_path / "base"), "output_dir": str(tmp_path),
        "train_data_path": write(votes, tmp_path / "votes.parquet"), "head_type": head, "loss_type": simulator.feedback.name,
        "learning_rate": 3e-3, "lr_schedule": "cosine", "warmup_ratio": 0.05, "batch_size": 64, "num_train_epochs": 4,
        "max_length": 64, "dtype": "float32",
    } | changes  # fmt: skip
    return Engine.from_pretrained(train(TrainConfig.model_validate(values)), device="cpu", dtype=torch.float32)


def value_loss(coefficients, votes):
    """The mean negative log-likelihood of values of single models."""
    theta = torch.from_numpy(coefficients.theta.astype(np.float64))[votes.prompt, votes.a]
    values = torch.from_numpy(votes.outcome)
    return -coefficients.feedback.log_likelihood(theta, torch.zeros_like(theta), None, values).mean().item()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "m"), [("grk", 9), ("bt", 34)])
def test_training_reaches_the_bayes_loss(name, m, tmp_path):
    simulator = Simulator.of(name, m)
    votes = simulator.votes(simulator.prompts(8000), 36 if m < 20 else 100)
    engine = trained(tmp_path, simulator, votes)
    fresh = simulator.prompts(400, seed=7)
    bayes = simulator.bayes_loss(fresh)
    # The expected loss over all pairs, not that of some votes: nothing is left to chance but what was learnt.
    c, truth = engine.coefficients(fresh), simulator.truth(fresh)
    expected = []
    for i in range(len(fresh)):
        known, guess = (OutcomeSums(simulator.feedback, simulator.models) for _ in range(2))
        known.add(truth.row(i))
        guess.add(c.row(i))
        expected.append(-(known.sums[0] * np.log(np.maximum(guess.sums[0], 1e-12))).sum(0).mean())
    assert bayes <= np.mean(expected) <= 1.01 * bayes


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ols", "poisson"])
def test_values_and_counts_are_learnt(name, tmp_path):
    simulator = Simulator(feedback_model(name), 4, spread=0.4)
    votes = simulator.votes(simulator.prompts(4000), 16)
    engine = trained(tmp_path, simulator, votes)
    fresh = simulator.votes(simulator.prompts(500, seed=7), 8, seed=8)
    known = simulator.truth([prompt[0] for prompt in fresh.prompts])
    at_best = value_loss(known, fresh)
    assert value_loss(engine.coefficients(fresh.prompts), fresh) < at_best + 0.02
    difference = engine.coefficients(fresh.prompts).theta - known.theta
    assert np.abs(difference).mean() < 0.15


@pytest.mark.parametrize("name", slow_but(("bt", "grk"), ["bt", "bt-tie", "rk", "rk-reparam", "grk"]))
def test_aggregated_leaderboards_are_those_of_infinitely_many_votes(name):
    simulator = Simulator(feedback_model(name), 6, spread=0.7)
    prompts = simulator.prompts(60)
    board = Leaderboard.over(simulator.truth(prompts))
    counted = marginal_fit(simulator.feedback, simulator.votes(prompts, 6000))
    np.testing.assert_allclose(board.coefficients(simulator.models), counted.theta, atol=0.1)
    if counted.eta is not None:
        assert board.eta == pytest.approx(counted.eta, abs=0.15 if name != "rk" else 0.6)


def test_one_prompts_leaderboard_is_recovered():
    simulator = Simulator.of("grk", 5)
    truth = simulator.truth(simulator.prompts(1))
    sums = OutcomeSums(truth.feedback, truth.models)
    sums.add(truth)
    found = fit(truth.feedback, sums.means[0], 5)
    np.testing.assert_allclose(found.theta, truth.theta[0], atol=1e-5)
    assert found.eta == pytest.approx(float(truth.eta[0]), abs=1e-5)


def test_the_routers_score_is_what_its_battles_give():
    simulator = Simulator.of("bt", 7)
    prompt = simulator.prompts(1)[0]
    theta = simulator.truth([prompt]).theta.astype(np.float64)
    q = np.full(7, 1 / 7)
    costs = np.linspace(1, 2, 7)
    v = routing.win_rates(theta, q)
    policies = routing.solve_budget(v, costs, 1.4)
    policy = np.zeros(7)
    np.add.at(policy, policies.indices[0], policies.probabilities[0])
    score = routing.bt_score(theta, q, policies.value)[0]
    opponents, won = simulator.battles(prompt, policy, q, 400_000)
    # The router as one more model: the coefficient that explains its battles best.
    counts = np.bincount(opponents, minlength=7)

    def win_rate_at(x):
        return (counts / counts.sum() / (1 + np.exp(theta[0] - x))).sum()

    low, high = -20.0, 20.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if win_rate_at(middle) < won.mean() else (low, middle)
    assert score == pytest.approx(low, abs=0.02)
