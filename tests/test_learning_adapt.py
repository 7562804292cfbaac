"""learning/adapt.py: what votes move and what they leave, calibration in the simulator, priors, and names."""

from __future__ import annotations

import unicodedata

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from p2l_engine import learning
from p2l_engine.backbone.head import Head
from p2l_engine.feedback import Outcome, feedback_model
from p2l_engine.learning.adapt import LARGEST, adapt
from p2l_engine.learning.curves import leave_one_out
from p2l_engine.learning.names import check_connected, check_new
from p2l_engine.learning.new_models import Described, Descriptions
from p2l_engine.learning.prior import Basis, Scales, covariance, of_rows
from p2l_engine.learning.rows import NewModel
from p2l_engine.votes import Votes
from tests.support.cases import slow_but
from tests.support.simulate import Simulator, head_of, words_in


def joined(world, n, seed, **options):
    """A simulator's last model, added to the others with n votes; also the prompts of these."""
    prompts = world.prompts(n, seed)
    m = world.n_models - 1
    votes = world.votes(prompts, 40, seed)
    one_side = (votes.a == m) ^ (votes.b == m)
    votes = votes.where(one_side)
    first = np.unique(votes.prompt, return_index=True)[1]
    votes = votes.where(np.isin(np.arange(len(votes)), first))
    texts = [turns[0] for turns in votes.prompts]
    found = adapt(
        head_of(world, m), world.models[:m], world.feedback, votes, words_in(texts), [NewModel(world.models[m])], **options
    )
    return found, votes


def theta(head, hidden):
    out = torch.from_numpy(hidden) @ head.weight.T + head.bias
    return out[:, : head.n_models]


@pytest.mark.slow
def test_rows_and_pairs_that_no_vote_touches_keep_their_bits():
    world = Simulator.of("grk", 6)
    head, m = head_of(world, 5), 5
    prompts = world.prompts(50)
    n = len(prompts)
    # Model 2 against the new one, all won by the new one.
    votes = Votes.make(
        [(p,) for p in prompts], ("model-002", "new"), np.arange(n), np.zeros(n, int), np.ones(n, int), np.ones(n, int)
    )
    found = adapt(head, world.models[:5], world.feedback, votes, words_in(prompts), [NewModel("new")], known_votes=100)
    assert found.moved == ("model-002",)
    others = [0, 1, 3, 4]
    assert torch.equal(found.head.weight[others], head.weight[others])
    assert torch.equal(found.head.bias[others], head.bias[others])
    assert torch.equal(found.head.weight[m + 1 :], head.weight[m:])
    assert not torch.equal(found.head.weight[2], head.weight[2])
    before, after = theta(head, words_in(prompts)), theta(found.head, words_in(prompts))
    assert torch.equal(before[:, others], after[:, others])
    assert float((after[:, 2] - before[:, 2]).mean()) < 0  # it lost
    assert float(after[:, 5].mean()) > float(before[:, 2].mean())


@pytest.mark.slow
def test_a_known_row_moves_less_the_more_votes_it_counts_for():
    world, moves = Simulator.of("bt-tie", 4), []
    for known_votes in (10, 1_000, 100_000):
        found, _ = joined(world, 60, 1, known_votes=known_votes)
        moves.append(float((found.head.weight[:3] - head_of(world, 3).weight[:3]).abs().max()))
    assert moves[0] > 5 * moves[1] > 25 * moves[2] > 0


def test_without_votes_a_new_model_is_what_the_prior_says():
    world = Simulator.of("grk", 5)
    head, hidden = head_of(world, 5), words_in(world.prompts(80))
    none = Votes.make([], world.models, *[np.zeros(0, np.int64)] * 4)
    new = [NewModel("average"), NewModel("copy", like="model-001"), NewModel("strong", level=2.5)]
    found = adapt(head, world.models, world.feedback, none, hidden[:0], new, reference=hidden)
    assert found.models == (*world.models, "average", "copy", "strong")
    assert found.moved == ()
    torch.testing.assert_close(found.head.weight[5], head.weight[:5].mean(0), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(found.head.weight[6], head.weight[1], atol=1e-6, rtol=1e-6)
    assert float(theta(found.head, hidden)[:, 7].mean()) == pytest.approx(2.5, abs=1e-4)
    assert found.uncertainty is not None
    sure = found.uncertainty.deviation(torch.from_numpy(hidden))
    assert (sure[:, :5] == 0).all()
    assert (sure[:, 6] < sure[:, 5]).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bt", "bt-tie", "rk", "rk-reparam", "grk", "ols", "poisson"])
def test_a_model_is_learned_under_every_feedback_model(name):
    world = Simulator.of(name, 5, seed=3)
    world.spread = 1.0
    prompts = world.prompts(600, 1)
    votes, hidden = world.votes(prompts, 4), words_in(prompts)
    found = adapt(head_of(world, 4), world.models[:4], world.feedback, votes, hidden, [NewModel(world.models[4])])
    new = words_in(world.prompts(300, 5))
    truth, guess = world.truth(world.prompts(300, 5)).theta[:, 4], theta(found.head, new)[:, 4].numpy()
    assert np.corrcoef(truth, guess)[0, 1] > 0.9
    assert np.abs(truth - guess).mean() < 0.5


@pytest.mark.slow
@pytest.mark.parametrize(("name", "n"), [("bt", 10), ("bt-tie", 100), ("grk", 150)])
def test_the_posterior_covers_the_true_coefficients(name, n):
    covered = []
    for seed in range(30):
        world = Simulator.of(name, 8, seed=seed)
        found, _ = joined(world, n, 1, known_votes=1e6)
        texts = world.prompts(200, 9)
        hidden, truth = words_in(texts), world.truth(texts).theta[:, 7]
        away = np.abs(theta(found.head, hidden)[:, 7].numpy() - truth)
        covered.append((away < 1.96 * found.uncertainty.deviation(torch.from_numpy(hidden))[:, 7].numpy()).mean())
    assert 0.90 < np.mean(covered) < 0.985


def test_votes_in_two_parts_give_nearly_the_same_as_all_at_once():
    world = Simulator.of("grk", 6, seed=2)
    prompts = world.prompts(400, 1)
    votes, hidden, new = world.votes(prompts, 1), words_in(prompts), [NewModel(world.models[5])]
    scales = Scales(1.0, 0.5, 1.0)
    every = adapt(head_of(world, 5), world.models[:5], world.feedback, votes, hidden, new, reference=hidden, scales=scales)
    half = adapt(
        head_of(world, 5), world.models[:5], world.feedback, votes.of(range(200)), hidden[:200], new, reference=hidden,
        scales=scales,
    )  # fmt: skip
    both = adapt(half.head, half.models, world.feedback, votes.of(range(200, 400)), hidden[200:], uncertainty=half.uncertainty)
    assert both.models == every.models
    one, two = theta(every.head, hidden), theta(both.head, hidden)
    # Laplace's approximation of the first half, and no covariance between models, are all that differs.
    deviation = every.uncertainty.deviation(torch.from_numpy(hidden))[:, 5]
    assert float(((one - two)[:, 5].abs() / deviation).mean()) < 0.5


@pytest.mark.slow
@settings(max_examples=8)
@given(st.integers(1, 40), st.sampled_from(["bt", "grk"]), st.integers(0, 99))
def test_rows_that_training_fixed_stay_so_after_a_first_run_on_few_prompts(few, name, seed):
    """The first run's basis lacks directions that the second one's prompts show."""
    rng, feedback = np.random.default_rng(seed), feedback_model(name)
    weight = torch.from_numpy(rng.normal(size=(4 + feedback.has_eta, 30))).float() / 6
    head, names = Head(weight, torch.zeros(len(weight)), 4), ("a", "b", "c", "d")
    n = few + 80
    hidden = rng.normal(size=(n, 30)).astype(np.float32)
    a = rng.integers(0, 4, n)
    votes = Votes.make(
        [(str(i),) for i in range(n)], names, np.arange(n), a, (a + rng.integers(1, 4, n)) % 4, rng.integers(0, 2, n)
    )
    every = adapt(head, names, feedback, votes, hidden)
    first = adapt(head, names, feedback, votes.of(range(few)), hidden[:few])
    rest = votes.of(range(few, n))
    both = adapt(first.head, first.models, feedback, rest, hidden[few:], uncertainty=first.uncertainty)
    away = (theta(both.head, hidden) - theta(every.head, hidden)).numpy()
    assert np.abs(away).mean() < 0.05  # with the prior of new rows: 0.4
    sure = [found.uncertainty.deviation(torch.from_numpy(hidden)) for found in (both, every)]
    assert float((sure[0] / sure[1]).max()) < 4  # a single prompt says little of how prompts vary; else: 12
    assert set(first.uncertainty.trained) == {names[i] for i in np.unique(np.r_[votes.a[:few], votes.b[:few]])}


@pytest.mark.parametrize(
    ("new", "message"),
    [
        ([NewModel("model-001")], "got model-001"),
        ([NewModel("x"), NewModel("x")], "got x"),
        ([NewModel("x", like="y")], "like: expected some of model-000, model-001, model-002, got y"),
        ([NewModel("x"), NewModel("y", like="x")], "like: expected some of .*, got x"),
    ],
)
def test_new_models_that_are_no_new_ones_are_refused(new, message):
    world = Simulator.of("bt", 3)
    none = Votes.make([], world.models, *[np.zeros(0, np.int64)] * 4)
    with pytest.raises(ValueError, match=message):
        adapt(head_of(world, 3), world.models, world.feedback, none, words_in([]).reshape(0, 12), new)


@pytest.mark.parametrize(
    ("names", "b", "states", "message"),
    [
        (("model-000", "other"), 1, np.ones((1, 12)), "votes: expected votes on model-000, model-001, model-002, x, got other"),
        (("model-000", "x"), 1, np.ones((2, 12)), r"hidden: expected \[1, 12\], got \[2, 12\]"),
        (("model-000", "x"), 1, np.ones((1, 11)), r"hidden: expected \[1, 12\], got \[1, 11\]"),
        (("model-000", "x"), 1, np.full((1, 12), np.nan), "hidden: expected finite numbers"),
        (("model-000", "x"), -1, np.ones((1, 12)), "votes: b: expected 0 to 1, got -1"),
    ],
)
def test_votes_and_hidden_states_that_do_not_fit_are_refused_by_name(names, b, states, message):
    world, zero = Simulator.of("bt", 3), np.zeros(1, np.int64)
    votes = Votes.make([("p",)], names, zero, zero, zero + b, zero)
    given = states.astype(np.float32)
    with pytest.raises(ValueError, match=message):
        adapt(head_of(world, 3), world.models, world.feedback, votes, given, [NewModel("x")], reference=words_in(["a", "b"]))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["grk", "bt-tie"])
def test_learning_curves_come_near_the_row_that_was_left_out(name):
    world = Simulator.of(name, 4, seed=1)
    prompts = world.prompts(200, 1)
    votes = world.votes(prompts, 4)
    points = leave_one_out(head_of(world, 4), world.models, world.feedback, votes, words_in(prompts), (0, 10, 150, 10**6))
    assert [point.votes for point in points] == [0, 10, 150]
    assert [point.models for point in points] == [4] * 3
    assert points[0].excess > points[2].excess
    assert abs(points[2].excess) < 0.15
    assert len({point.own_row for point in points}) == 1
    assert min(point.error for point in points) > 0
    with pytest.raises(ValueError, match="two models and three prompts"):
        leave_one_out(head_of(world, 4), world.models, world.feedback, votes.of([0, 1]), words_in(prompts[:2]))


def test_the_basis_is_uncorrelated_and_spans_the_rows():
    rng = np.random.default_rng(0)
    hidden, rows = rng.normal(size=(300, 20)) @ rng.normal(size=(20, 20)), rng.normal(size=(5, 21))
    basis = Basis.of(hidden.astype(np.float32), rows, 12)
    x = basis.features(hidden)
    np.testing.assert_allclose(x[:, 0], 1.0)
    np.testing.assert_allclose(np.cov(x[:, 1:].T), np.eye(11), atol=0.15)  # of the shrunk covariance
    away = np.c_[hidden, np.ones(300)] @ (rows - rows.mean(0)).T
    np.testing.assert_allclose(x @ basis.coordinates.T, away, atol=1e-6)


def test_a_kept_basis_keeps_its_columns_and_grows():
    rng = np.random.default_rng(0)
    hidden, rows = rng.normal(size=(300, 20)).astype(np.float32), rng.normal(size=(5, 21))
    few = Basis.of(hidden[:6], rows, 16)
    more = Basis.of(hidden, rows, 16, few.matrix)
    assert few.matrix.shape[1] < 16 == more.matrix.shape[1]
    assert np.array_equal(more.matrix[:, : few.matrix.shape[1]], few.matrix)


@pytest.mark.parametrize("n", [0, 1, 2])
@pytest.mark.parametrize("m", [1, 2, 3])
def test_few_rows_and_few_prompts_give_a_finite_prior(n, m):
    rng = np.random.default_rng(1)
    basis = Basis.of(rng.normal(size=(n, 6)).astype(np.float32), rng.normal(size=(m, 7)), 4)
    scales = of_rows(basis)
    assert min(scales.free, scales.level) > 0
    assert np.isfinite(covariance(basis, scales)).all()


@pytest.mark.parametrize(
    ("new", "known", "retired", "message"),
    [
        (["a"], ["a", "b"], [], "'a' is in the checkpoint"),
        (["A"], ["a", "b"], [], "'A' and 'a' differ in case or white space only"),
        ([" a"], ["a", "b"], [], "differ in case or white space only"),
        (["x", "X"], ["a"], [], "'X' and 'x' differ in case"),
        (["old"], ["a"], ["old"], "'old' is the name of a retired model"),
        (["Old "], ["a"], ["old"], "'Old ' is like 'old', the name of a retired model"),
        (["caf\u00e9", "cafe\u0301"], ["a"], [], "code points of the same characters"),
        (["a\u200b"], ["a"], [], "code points of the same characters"),
        (["\uff41"], ["a"], [], "code points of the same characters"),
        ([" "], ["a"], [], "expected a name that can be read"),
        (["\u200b"], ["a"], [], "expected a name that can be read"),
    ],
)
def test_names_that_cannot_be_added(new, known, retired, message):
    with pytest.raises(ValueError, match=message):
        check_new(new, known, retired)


spellings = st.text(alphabet="aB\u00e9e\u0301 \u200b\u00a0", min_size=1, max_size=4)


@given(st.lists(spellings, min_size=1, max_size=4, unique=True), st.integers(0, 3))
def test_names_that_look_alike_are_refused_whoever_had_them_first(names, first):
    """Every new name but such as look like nothing before them."""
    visible = ["".join(unicodedata.normalize("NFC", name).replace("\u200b", "").split()) for name in names]
    plain = [v.casefold() for v in visible]
    known, retired, new = names[:1] if first == 0 else [], names[:1] if first == 1 else [], names[first < 2 :]
    alike = len(set(plain)) < len(plain) or "" in plain[first < 2 :]
    try:
        check_new(new, known, retired)
    except ValueError:
        assert alike or not all(plain)
    else:
        inner = [" ".join(unicodedata.normalize("NFC", name).replace("\u200b", "").split()).casefold() for name in names]
        assert len(set(inner)) == len(inner)


def against(pairs, outcome=Outcome.A):
    names = sorted({name for pair in pairs for name in pair})
    a, b = (np.array([names.index(pair[side]) for pair in pairs]) for side in (0, 1))
    n = len(pairs)
    return Votes.make([("p",)], names, np.zeros(n, int), a, b, np.full(n, int(outcome)))


def test_models_that_no_chain_of_votes_connects_are_named():
    grk, bt = feedback_model("grk"), feedback_model("bt-tie")
    check_connected(against([("x", "y"), ("y", "a")]), ["a", "b"], bt)
    for feedback in (grk, bt):
        with pytest.raises(ValueError, match="connects x, y to a model of the checkpoint.*against one of a, b"):
            check_connected(against([("x", "y"), ("a", "b")]), ["a", "b"], feedback)
    votes = against([("x", "y"), ("y", "a")])
    votes.weight[1] = 0.0
    with pytest.raises(ValueError, match="connects x, y to"):
        check_connected(votes, ["a"], bt)
    check_connected(against([("x", "y")], Outcome.BOTH_BAD), ["a"], grk)
    with pytest.raises(ValueError, match="connects x, y"):
        check_connected(against([("x", "y")], Outcome.BOTH_BAD), ["a"], bt)


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)).filter(lambda p: p[0] != p[1]), min_size=1, max_size=9))
def test_chains_are_found_as_a_search_finds_them(pairs):
    reached = {0, 1}  # known
    for _ in range(7):
        reached |= {j for pair in pairs for i, j in (pair, pair[::-1]) if i in reached}
    lost = {f"m{i}" for pair in pairs for i in pair} - {f"m{i}" for i in reached}
    votes = against([(f"m{i}", f"m{j}") for i, j in pairs])
    try:
        check_connected(votes, ["m0", "m1"], feedback_model("bt"))
    except ValueError as error:
        assert set(str(error).split("connects ")[1].split(" to a model")[0].split(", ")) == lost
    else:
        assert not lost


def described(tmp_path, text):
    (tmp_path / "models.yaml").write_text(text)
    return Descriptions.read(tmp_path / "models.yaml")


def test_ratings_become_coefficients_by_least_squares(tmp_path):
    found = described(tmp_path, "models: {x: {prior_rating: 1300}}\nratings: {a: 1000, b: 1200}")
    assert found.as_new_models(["a", "b"], np.array([-1.0, 1.0])) == [NewModel("x", None, pytest.approx(2.0))]
    found = described(tmp_path, "models: {x: {prior_rating: 1400}}\nratings: {a: 1000}")
    assert found.as_new_models(["a"], np.array([0.5]))[0].level == pytest.approx(0.5 + np.log(10))
    assert described(tmp_path, "models: {x: {prior_rating: 1.5}, y: }").as_new_models(["a"], np.zeros(1))[0].level == 1.5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("models: {x: {liek: a}}", r"models.x: expected the keys like, prior_rating, cost, got liek"),
        ("model: {x: {}}", "expected the keys models, ratings, got model"),
        ("models: {}", "models: expected a mapping from names"),
        ("models: {x: {like: 3}}", r"models.x.like: expected the name"),
        ("models: {x: {prior_rating: .nan}}", r"models.x.prior_rating: expected a number"),
        ("models: {x: {prior_rating: 1.0e+308}}", r"models.x.prior_rating: expected a number of at most 1e\+100"),
        ("models: {x: {}}\nratings: {a: -1.0e+200}", r"ratings.a: expected a number of at most 1e\+100"),
        ("models: {x: {cost: -1}}", r"models.x.cost: expected a number of at least 0"),
        ("models: {x: {}, x: {}}", "occurs twice"),
        ("models: {1: {}}", "expected a mapping from text"),
        ("[", "expected YAML"),
    ],
)
def test_descriptions_are_strict(text, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        described(tmp_path, text)


def test_descriptions_that_name_unknown_models_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"like: expected models of the checkpoint \(a\), got b"):
        described(tmp_path, "models: {x: {like: b}}").as_new_models(["a"], np.zeros(1))
    with pytest.raises(ValueError, match="ratings: expected models of the checkpoint"):
        described(tmp_path, "models: {x: {}}\nratings: {b: 3}").as_new_models(["a"], np.zeros(1))


@pytest.mark.parametrize("rating", [1290, -1290, 1e39, 1e100])
@pytest.mark.parametrize("ratings", [{}, {"a": 1.0, "b": 1.0 + 1e-9}, {"a": 0.1, "b": 0.2}])
def test_ratings_of_another_scale_are_refused(rating, ratings):
    given = Descriptions((Described("x", prior_rating=rating),), ratings or None)
    with pytest.raises(
        ValueError, match=r"models.x.prior_rating: expected a rating on the scale of 'ratings', or without them"
    ):
        given.as_new_models(["a", "b"], np.array([-1.0, 1.0]))


@given(st.lists(st.floats(-3, 3), min_size=2, max_size=5), st.lists(st.floats(-100, 100), min_size=5, max_size=5))
def test_a_higher_rating_is_never_worth_less(theta, ratings):
    known = [str(i) for i in range(len(theta))]
    given = Descriptions(
        (Described("x", prior_rating=1.0), Described("y", prior_rating=2.0)), dict(zip(known, ratings, strict=False))
    )
    try:
        low, high = given.as_new_models(known, np.array(theta))
    except ValueError as error:
        assert "prior_rating" in str(error)
    else:
        assert low.level <= high.level


def test_two_wins_widen_no_prior():
    world = Simulator.of("bt", 9)
    head, prompts = head_of(world, 9), world.prompts(2)
    weakest = world.models[int(theta(head, words_in(prompts)).mean(0).argmin())]
    zeros = np.zeros(2, int)
    votes = Votes.make([(p,) for p in prompts], (weakest, "new"), np.arange(2), zeros, zeros + 1, zeros + Outcome.B)
    found = adapt(head, world.models, world.feedback, votes, words_in(prompts), [NewModel("new")])
    start = of_rows(Basis.of(words_in(prompts), torch.cat([head.weight, head.bias[:, None]], 1).double().numpy()))
    assert found.scales.level < 1.5 * start.level
    after = theta(found.head, words_in(prompts)).mean(0)
    assert after[:9].mean() < after[9] < after[:9].max() + start.level


@pytest.mark.parametrize("known_votes", slow_but((200,), [200, 36_000]))
def test_of_many_rows_the_others_may_be_held(monkeypatch, known_votes):
    """Beyond ``LARGEST`` parameters: it makes deviations smaller, and hardly, as rows that training fixed hardly move."""
    world = Simulator.of("grk", 6)
    texts = words_in(world.prompts(100, 9))
    found = []
    for largest in (LARGEST, 0):
        monkeypatch.setattr(learning.adapt.posterior, "__defaults__", (largest,))
        found.append(joined(world, 60, 1, known_votes=known_votes)[0].uncertainty.deviation(torch.from_numpy(texts)))
    ratio = (found[1] / found[0])[:, 5]
    assert float(ratio.max()) < 1 + 1e-5
    assert float(ratio.min()) > (0.99 if known_votes == 36_000 else 0.7)


def test_what_two_prompts_do_not_show_stays_uncertain():
    world = Simulator.of("bt", 9)
    head, prompts = head_of(world, 9), world.prompts(200)
    hidden = words_in(prompts)
    zeros = np.zeros(2, int)
    votes = Votes.make([(p,) for p in prompts[:2]], (world.models[0], "new"), np.arange(2), zeros, zeros + 1, np.arange(2))
    found = adapt(head, world.models, world.feedback, votes, hidden[:2], [NewModel("new")])
    others = hidden[~(hidden[:, None] * hidden[None, :2]).sum(-1).any(1)]  # without a word of theirs
    deviation = found.uncertainty.deviation(torch.from_numpy(others))[:, -1]
    assert len(others) > 20
    assert float(deviation.min()) > 0.5 * found.scales.level
