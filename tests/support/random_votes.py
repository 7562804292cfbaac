"""Votes drawn at random, of every kind that training reads."""

from __future__ import annotations

from p2l_engine.votes import Votes


def random_votes(rng, feedback, p, m, v):
    """Votes (or values) of any weights, 0 among them; values on single models too."""
    a = rng.integers(m, size=v)
    b = (a + rng.integers(1, m, size=v)) % m
    if feedback.of_values:
        b[rng.random(v) < 0.5] = -1
        outcome = rng.poisson(2.0, v).astype(float) if feedback.counts else rng.normal(size=v)
    else:
        outcome = rng.integers(4 if feedback.has_ties else 2, size=v)
    weight = rng.exponential(size=v) * (rng.random(v) < 0.8)
    prompts, models = [(str(i),) for i in range(p)], [str(i) for i in range(m)]
    return Votes.make(prompts, models, rng.integers(p, size=v), a, b, outcome, weight)
