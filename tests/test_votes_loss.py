"""learning/votes_loss.py and csrc/votes.c: the loss of votes at a head's outputs, and its derivatives."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from p2l_engine.feedback import NAMES, feedback_model
from p2l_engine.learning import likelihood
from p2l_engine.learning import votes_loss as module
from p2l_engine.learning.votes_loss import votes_loss
from p2l_engine.native import binding
from p2l_engine.native import votes as core
from p2l_engine.votes import Votes
from tests.support.random_votes import random_votes

OF_VOTES = tuple(name for name in NAMES if not feedback_model(name).of_values)


def by_torch(feedback, votes, outputs):
    """The definition, differentiated."""
    m, out = len(votes.models), torch.from_numpy(outputs).requires_grad_()
    row, b = torch.from_numpy(votes.prompt), torch.from_numpy(votes.b)
    theta_b = torch.where(b < 0, 0.0, out[row, b.clamp_min(0)])
    eta = out[row, m] if feedback.has_eta else None
    each = feedback.log_likelihood(out[row, torch.from_numpy(votes.a)], theta_b, eta, torch.from_numpy(votes.outcome))
    loss = -(each * torch.from_numpy(votes.weight)).sum()
    return loss.item(), torch.autograd.grad(loss, out)[0].numpy()


def agrees(feedback, votes, outputs):
    loss, slope = votes_loss(feedback, votes, outputs)
    expected, by_output = by_torch(feedback, votes, outputs)
    heaviest = np.bincount(votes.prompt, votes.weight, len(votes.prompts))[:, None]
    assert loss == pytest.approx(expected, rel=1e-11, abs=1e-12)
    assert (np.abs(slope - by_output) <= 1e-11 * heaviest).all()


@given(
    name=st.sampled_from(NAMES),
    seed=st.integers(0, 2**32 - 1),
    spread=st.sampled_from([0.0, 1.0, 10.0, 70.0, 1e3]),
    far=st.sampled_from([0.0, 50.0, -50.0]),
)
def test_the_loss_is_its_definition(name, seed, spread, far):
    """Also of coefficients so far apart that torch has to compute it, and of tie parameters at their limits."""
    rng, feedback = np.random.default_rng(seed), feedback_model(name)
    spread = min(spread, 1.0) if feedback.of_values else spread
    votes = random_votes(rng, feedback, int(rng.integers(1, 9)), int(rng.integers(2, 7)), int(rng.integers(0, 60)))
    k = len(votes.models) + feedback.has_eta
    outputs = spread * rng.normal(size=(len(votes.prompts), k)) + (0.0 if feedback.of_values else far)
    if feedback.has_eta:
        outputs[:, -1] = rng.choice([-60.0, -15.0, 0.0, 1.0, 15.0, 30.0, 60.0], len(outputs))
    agrees(feedback, votes, outputs)


@pytest.mark.parametrize("name", OF_VOTES)
def test_the_native_core_is_what_computes_votes(name, monkeypatch):
    """Up to 300 between coefficients of a prompt (and to 0 where there is a ground); torch beyond, and for values."""
    rng, feedback = np.random.default_rng(3), feedback_model(name)
    votes = random_votes(rng, feedback, 6, 3, 200)
    calls, native = [], core.votes_loss
    monkeypatch.setattr(core, "votes_loss", lambda *of: calls.append(1) or native(*of))
    outputs = rng.normal(size=(6, 3 + feedback.has_eta))
    for gap, by_core in ((0.0, True), (290.0, True), (310.0, False), (1e9, False)):
        calls.clear()
        outputs[2, :3] = (0.0, gap, gap / 2)
        agrees(feedback, votes, outputs)
        assert bool(calls) == by_core
    outputs[2, :3] = 310.0  # near each other, far from the ground
    calls.clear()
    agrees(feedback, votes, outputs)
    assert bool(calls) == (not feedback.grounded)


@pytest.mark.parametrize("name", ["ols", "poisson"])
def test_values_are_differentiated(name):
    rng, feedback = np.random.default_rng(3), feedback_model(name)
    agrees(feedback, random_votes(rng, feedback, 6, 3, 200), rng.normal(size=(6, 3)))


def test_parts_of_the_votes_sum_to_the_whole(monkeypatch):
    """Where torch differentiates them, as far apart as these are."""
    rng, feedback = np.random.default_rng(0), feedback_model("grk")
    votes, outputs = random_votes(rng, feedback, 8, 4, 100), 400 * rng.normal(size=(8, 5))
    loss, slope = votes_loss(feedback, votes, outputs)
    monkeypatch.setattr(likelihood, "CHUNK", 7)
    parts = votes_loss(feedback, votes, outputs)
    assert parts[0] == pytest.approx(loss, rel=1e-12)
    np.testing.assert_allclose(parts[1], slope, atol=1e-12)


def test_threads_change_no_bit(monkeypatch):
    rng, feedback = np.random.default_rng(1), feedback_model("grk")
    votes, outputs = random_votes(rng, feedback, 1000, 5, 20_000), rng.normal(size=(1000, 6))
    found = []
    for count in (1, 2, 7):
        monkeypatch.setattr(binding, "threads", lambda *_, count=count: count)
        loss, slope = votes_loss(feedback, votes, outputs)
        found.append((loss, slope.tobytes()))
    assert len(set(found)) == 1


def test_ties_are_refused_where_there_are_none():
    votes = Votes.make([("p",)], ("x", "y"), np.zeros(1, np.int64), np.zeros(1, np.int64), np.ones(1, np.int64), np.array([2]))
    for outputs in (np.zeros((1, 2)), np.array([[0.0, 1e3]])):
        with pytest.raises(ValueError, match="knows no ties; leave them out or use 'bt-tie'"):
            votes_loss(feedback_model("bt"), votes, outputs)


def test_coefficients_that_are_no_numbers_are_not_given_to_the_core(monkeypatch):
    monkeypatch.setattr(core, "votes_loss", None)
    rng, feedback = np.random.default_rng(1), feedback_model("grk")
    votes = random_votes(rng, feedback, 3, 2, 30)
    for bad in (np.nan, np.inf, -np.inf):
        outputs = np.zeros((3, 3))
        outputs[1, 0] = bad
        assert not module._near(feedback, outputs[:, :2], outputs[:, 2])
        with np.errstate(invalid="ignore"):
            assert not np.isfinite(votes_loss(feedback, votes, outputs)[0])
