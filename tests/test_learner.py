"""learning/learner.py: votes one batch after the other, against adapt on all of them; saved and resumed; from many threads."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from p2l_engine.backbone.head import Head
from p2l_engine.feedback import NAMES, Outcome, feedback_model
from p2l_engine.learning.adapt import adapt
from p2l_engine.learning.learner import Learner
from p2l_engine.learning.rows import NewModel
from p2l_engine.votes import Votes
from tests.support.cases import slow_but
from tests.support.simulate import Simulator, head_of, words_in

REFERENCE = 60  # prompts


def stream(name, prompts=120, seed=3):
    """A learner for a world whose last model is new, its votes, and what adapt needs for the same."""
    world = Simulator.of(name, 5)
    texts = world.prompts(prompts, seed)
    votes, hidden = world.votes(texts, 4, seed), words_in(texts)
    reference = words_in(world.prompts(REFERENCE, 9))
    head, models, new = head_of(world, 4), world.models[:4], [NewModel(world.models[4])]
    learner = Learner(head, models, world.feedback, reference, new, known_votes=200)
    return world, learner, votes, hidden, reference, (head, models, world.feedback, new)


def batches(votes, sizes):
    """The votes, prompt by prompt, in batches of these numbers of prompts, again and again."""
    start, k = 0, 0
    while start < len(votes.prompts):
        some = range(start, min(start + sizes[k % len(sizes)], len(votes.prompts)))
        yield votes.of(some), some
        start, k = some.stop, k + 1


def theta(head, hidden):
    out = torch.from_numpy(hidden).double() @ head.weight.double().T + head.bias.double()
    return out[:, : head.n_models].numpy()


@pytest.mark.parametrize("name", slow_but(("grk", "ols"), sorted(set(NAMES) - {"bag"})))
def test_refined_it_is_what_adapt_finds_from_all_votes(name):
    _, learner, votes, hidden, reference, (head, models, feedback, new) = stream(name)
    for part, some in batches(votes, (1, 7, 30)):
        learner.update(part, hidden[list(some)])
    assert learner.votes == learner.pending == len(votes)
    apart = learner.refine()
    assert learner.pending == 0
    found, uncertainty = learner.head()
    expected = adapt(head, models, feedback, votes, hidden, new, reference=reference, known_votes=200, scales=learner.scales)
    np.testing.assert_allclose(theta(found, hidden), theta(expected.head, hidden), atol=1e-5)
    both = [u.deviation(torch.from_numpy(hidden)).numpy() for u in (uncertainty, expected.uncertainty)]
    np.testing.assert_allclose(*both, rtol=1e-4)
    assert apart < 1.0  # the updates were within their own uncertainty
    assert learner.refine() < 1e-3


@pytest.mark.slow
@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=3), st.integers(0, 10**6))
def test_updates_come_near_in_any_batches(sizes, seed):
    _, learner, votes, hidden, *_ = stream("grk", 60, seed)
    for part, some in batches(votes, sizes):
        learner.update(part, hidden[list(some)])
    before = theta(learner.head()[0], hidden)
    deviation = learner.head()[1].deviation(torch.from_numpy(hidden)).numpy()
    learner.refine()
    after = theta(learner.head()[0], hidden)
    assert (np.abs(after - before) / np.maximum(deviation, 1e-6)).mean() < 0.7


def test_rows_that_no_vote_touches_keep_their_bits():
    world, learner, votes, hidden, _, (head, *_) = stream("bt")
    kept = votes.among([world.models[0], world.models[4]])
    index = {turns: i for i, turns in enumerate(votes.prompts)}
    learner.update(kept, hidden[[index[turns] for turns in kept.prompts]])
    learner.refine()
    found, uncertainty = learner.head()
    assert torch.equal(found.weight[1:4], head.weight[1:4])
    assert set(uncertainty.models) == {world.models[0], world.models[4]}


@pytest.mark.parametrize("refine", slow_but((True,), [False, True]))
@pytest.mark.parametrize("name", ["grk", "ols"])
def test_a_saved_learner_goes_on_alike(name, refine, tmp_path):
    _, learner, votes, hidden, _, (head, _, feedback, _) = stream(name)
    parts = list(batches(votes, (20,)))
    for part, some in parts[:3]:
        learner.update(part, hidden[list(some)])
    if refine:
        learner.refine()
        learner.update(parts[3][0], hidden[list(parts[3][1])])
    learner.save(tmp_path / "state")
    again = Learner.load(tmp_path / "state", head, feedback)
    assert (again.models, again.votes, again.pending) == (learner.models, learner.votes, learner.pending)
    for each in (learner, again):
        for part, some in parts[4:]:
            each.update(part, hidden[list(some)])
        each.refine()
    np.testing.assert_allclose(theta(again.head()[0], hidden), theta(learner.head()[0], hidden), atol=1e-6)


def test_other_heads_and_damaged_states_are_refused(tmp_path):
    _, learner, votes, hidden, _, (head, _, feedback, _) = stream("bt")
    learner.update(votes, hidden)
    path = tmp_path / "state"
    learner.save(path)
    with pytest.raises(ValueError, match="another head"):
        Learner.load(path, Head(head.weight + 1, head.bias, head.n_models), feedback)
    with pytest.raises(ValueError, match="another feedback"):
        Learner.load(path, head, feedback_model("bt-tie"))
    data = path.read_bytes()
    for damaged in (b"", data[:100], data[:-10], b"{}" + data):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="expected the state of a Learner"):
            Learner.load(path, head, feedback)
    with pytest.raises(FileNotFoundError):
        Learner.load(tmp_path / "none", head, feedback)


def test_votes_that_cannot_be_learned_from_change_nothing():
    world, learner, votes, hidden, *_ = stream("bt")
    one, zero = np.ones(1, int), np.zeros(1, int)
    wrong = [
        (Votes.make([("x",)], ("other", world.models[0]), zero, zero, one, zero), hidden[:1], "got other"),
        (Votes.make([("x",)], world.models, zero, zero, one, zero + Outcome.TIE), hidden[:1], "no ties"),
        (Votes.make([("x",)], world.models, zero, zero, one, zero), hidden[:2], r"\[1, 12\], got \[2, 12\]"),
        (Votes.make([("x",)], world.models, zero, zero, one, zero), hidden[:1] * np.nan, "finite"),
        (Votes.make([("x",)], world.models, zero, zero, one, zero, np.array([1e12])), hidden[:1], "divide all weights"),
        (Votes.make([("x",)], world.models, zero, zero, one, zero, np.array([np.nan])), hidden[:1], "expected finite numbers"),
        (Votes.make([("x",)], world.models, zero, zero, one, zero + 0.5), hidden[:1], "expected votes for bt"),
        (Votes.make([("x",)], world.models, zero, zero - 1, one, zero), hidden[:1], "votes: a: expected 0 to 4, got -1"),
        (Votes.make([("x",)], world.models, zero, zero, one - 2, zero), hidden[:1], "votes: b: expected 0 to 4, got -1"),
        (Votes.make([("x",)], world.models, zero, zero, one * 9, zero), hidden[:1], "votes: b: expected 0 to 4, got 9"),
        (Votes.make([("x",)], world.models, one, zero, one, zero), hidden[:1], "votes: prompt: expected 0 to 0, got 1"),
    ]
    for votes, states, message in wrong:
        with pytest.raises(ValueError, match=message):
            learner.update(votes, states)
    assert learner.votes == 0
    assert learner.refine() == 0.0
    assert torch.equal(learner.head()[0].weight[:4], learner._head.weight[:4])


def test_of_votes_of_which_one_batch_fails_none_is_learned():
    _, learner, votes, hidden, *_ = stream("poisson", 200)
    outcome = votes.outcome.copy()
    outcome[-1] = 1e300  # in the last of several batches
    before = theta(learner.head()[0], hidden)
    with pytest.raises(ArithmeticError, match="beyond float64"):
        learner.update(Votes.make(votes.prompts, votes.models, votes.prompt, votes.a, votes.b, outcome), hidden)
    assert learner.votes == 0
    assert np.array_equal(theta(learner.head()[0], hidden), before)
    learner.update(votes, hidden)
    assert learner.votes == len(votes) > 512


def test_votes_without_weight_change_nothing():
    _, learner, votes, hidden, *_ = stream("grk", 30)
    weights = np.arange(len(votes)) % 2.0
    both = Votes(votes.prompts, votes.models, votes.prompt, votes.a, votes.b, votes.outcome, weights)
    learner.update(both, hidden)
    learner.refine()
    _, other, *_ = stream("grk", 30)
    kept = votes.where(weights > 0)
    index = {turns: i for i, turns in enumerate(votes.prompts)}
    other.update(kept, hidden[[index[turns] for turns in kept.prompts]])
    other.refine()
    np.testing.assert_allclose(theta(learner.head()[0], hidden), theta(other.head()[0], hidden), atol=1e-6)


@pytest.mark.slow
def test_many_threads_update_while_it_refines():
    _, learner, votes, hidden, reference, (head, models, feedback, new) = stream("grk", 96)
    parts = list(batches(votes, (6,)))

    def work(own):
        for part, some in own:
            learner.update(part, hidden[list(some)])

    threads = [threading.Thread(target=work, args=(parts[i::4],)) for i in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        learner.refine()
    for thread in threads:
        thread.join()
    learner.refine()
    assert learner.votes == len(votes)
    expected = adapt(head, models, feedback, votes, hidden, new, reference=reference, known_votes=200, scales=learner.scales)
    np.testing.assert_allclose(theta(learner.head()[0], hidden), theta(expected.head, hidden), atol=1e-5)
