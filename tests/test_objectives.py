"""What routing maximises, against brute-force enumeration of the votes' outcomes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from p2l_engine import routing
from p2l_engine.feedback import Outcome, feedback_model
from p2l_engine.routing import values

NOT_LOST = {Outcome.A: 1.0, Outcome.B: 0.0, Outcome.TIE: 0.5, Outcome.BOTH_BAD: 0.5}


def enumerated(theta, q, eta, feedback):
    """sum_a q_a sum_outcomes P(outcome) * (1, 1/2 or 0), by the feedback model's own probabilities in float64."""
    t, e = torch.from_numpy(theta), torch.from_numpy(eta)
    p = feedback_model(feedback).probabilities(t[:, :, None], t[:, None, :], e[:, None, None]).numpy()
    return np.einsum("nbao,na,o->nb", p, np.broadcast_to(q, theta.shape), [NOT_LOST[o] for o in Outcome])


@pytest.mark.slow
@settings(deadline=None, max_examples=100)
@given(
    st.sampled_from(["rk", "rk-reparam", "grk", "bag", "bt", "bt-tie"]),
    st.integers(0, 10**9),
    st.integers(1, 7),
    st.integers(1, 12),
    st.sampled_from([0.3, 3.0, 30.0, 150.0]),
)
def test_half_ties_equal_the_enumeration(feedback, seed, n, m, spread):
    rng = np.random.default_rng(seed)
    theta, q = rng.normal(size=(n, m)) * spread, rng.dirichlet(np.ones(m), n if seed % 2 else None)
    eta = rng.normal(size=n) * (30 if feedback == "rk" else 5)
    v = routing.win_rates(theta, q, "half-ties", eta, feedback)
    np.testing.assert_allclose(v, enumerated(theta, q, eta, feedback), rtol=1e-9, atol=1e-13)
    assert (v >= 0).all()
    assert (v <= 1 + 1e-12).all()


@pytest.mark.parametrize("feedback", ["rk", "grk", "bt-tie"])
def test_models_of_another_form_go_through_their_probabilities(feedback, rng, monkeypatch):
    theta, q, eta = rng.normal(size=(9, 5)), rng.dirichlet(np.ones(5)), rng.normal(size=9)
    expected = routing.win_rates(theta, q, "half-ties", eta, feedback)
    other = replace(feedback_model(feedback), rao_kupper=False)
    monkeypatch.setattr(values, "feedback_model", lambda name: other)
    np.testing.assert_allclose(routing.win_rates(theta, q, "half-ties", eta, feedback), expected)


def test_two_models_share_one_win(rng):
    theta, eta = rng.normal(size=(50, 2)), rng.normal(size=50)
    first = routing.win_rates(theta, [0.0, 1.0], "half-ties", eta, "grk")[:, 0]
    second = routing.win_rates(theta, [1.0, 0.0], "half-ties", eta, "grk")[:, 1]
    np.testing.assert_allclose(first + second, 1)


def test_not_bad_is_the_chance_against_the_ground(rng):
    theta = rng.normal(size=(20, 4)) * 10
    v = routing.win_rates(theta, np.full(4, 0.25), "not-bad")
    np.testing.assert_allclose(v, 1 / (1 + np.exp(-theta)))
    # ... which is the grk model's P(not both bad) of a model beside one that never matters
    lone = feedback_model("grk").probabilities(
        torch.from_numpy(theta), torch.full((20, 4), -200.0, dtype=torch.float64), torch.zeros(20, 1)
    )
    np.testing.assert_allclose(v, 1 - lone[..., Outcome.BOTH_BAD].numpy(), atol=1e-12)


def test_hostile_values_stay_in_range():
    theta = np.array([[700.0, -700.0, 0.0], [1e4, -1e4, 3.0]])
    for feedback, eta in [("grk", [300.0, 0.0]), ("rk-reparam", [800.0, -800.0]), ("rk", [5000.0, -5000.0])]:
        v = routing.win_rates(theta, np.full(3, 1 / 3), "half-ties", np.array(eta), feedback)
        assert np.isfinite(v).all()
        assert (v >= 0).all()
        assert (v <= 1).all()


def test_names_and_eta_are_checked():
    theta, q = np.zeros((2, 3)), np.full(3, 1 / 3)
    with pytest.raises(ValueError, match="objective: expected 'bt', 'half-ties' or 'not-bad', got 'elo'"):
        routing.win_rates(theta, q, "elo")
    with pytest.raises(ValueError, match="eta: the objective 'half-ties' of the feedback model 'grk' needs it"):
        routing.win_rates(theta, q, "half-ties", feedback="grk")
    with pytest.raises(ValueError, match=r"eta: expected shape \[2\], got \[3\]"):
        routing.win_rates(theta, q, "half-ties", np.zeros(3), "grk")
    with pytest.raises(ValueError, match="feedback model: expected one of"):
        routing.win_rates(theta, q, "half-ties", np.zeros(2), "elo")
