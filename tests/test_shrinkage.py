"""Coefficients of prompts of new kinds fall back to one leaderboard: the distance, the file, every path of the engine, what a
decision says of it, and what middle and width votes ask for."""

from __future__ import annotations

import asyncio
import json
import shutil
from dataclasses import replace

import aiohttp
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from scipy.special import expit
from scipy.stats import norm

from p2l_engine import Engine, Router, checkpoint
from p2l_engine.backbone.head import Head
from p2l_engine.backbone.shrinkage import FILE, Shrinkage
from p2l_engine.backbone.theta_map import FILE as MAP_FILE
from p2l_engine.backbone.theta_map import MonotoneStep, ThetaMap
from p2l_engine.backbone.uncertainty import FILE as UNCERTAINTY_FILE
from p2l_engine.backbone.uncertainty import Uncertainty
from p2l_engine.batch.worker import Route
from p2l_engine.checkpoint.export import export
from p2l_engine.decision import why_with
from p2l_engine.engine.batcher import Batcher
from p2l_engine.errors import CheckpointError
from p2l_engine.evaluation import features
from p2l_engine.feedback import FeedbackModel, Outcome, feedback_model
from p2l_engine.learning import hidden, write
from p2l_engine.learning import shrinkage as learned
from p2l_engine.routing import BudgetPacer, win_rates
from p2l_engine.votes import Votes
from tests.support import tiny
from tests.support.catalogs import catalog
from tests.support.command import p2l_engine
from tests.support.serving import FixedEngine, config_for, serving

PROMPTS = ["one", "two words", "", "three more words " * 20]
D = 48  # of the tiny checkpoint


def shrinkage(width=D, rank=5, kinds=7, middle=0.0, slope=2.0, seed=0, at=None, beside=0):
    rng = np.random.default_rng(seed)
    arrays = (
        rng.normal(size=width + beside) if at is None else at, rng.normal(size=(width, rank)) / width**0.5,
        rng.normal(size=rank), rng.exponential(size=rank), rng.normal(size=(kinds, rank)),
    )  # fmt: skip
    return Shrinkage(*(torch.from_numpy(np.ascontiguousarray(each)).float() for each in arrays), middle, slope)


def oracle(of, states):
    """d and s [N] by log-densities of normal distributions in float64: of each kind, and of new ones."""
    directions, offset, between, centres = (
        each.double().numpy() for each in (of.directions, of.offset, of.between, of.centres)
    )
    y = states[:, : len(directions)].astype(np.float64) @ directions - offset
    known = np.max([norm.logpdf(y, centre).sum(1) for centre in centres], 0)
    new = norm.logpdf(y, 0, np.sqrt(1 + between)).sum(1)
    distance = 2 * (new - known) + np.log1p(between).sum()
    return distance, expit((of.middle - distance) / of.width)


@pytest.mark.slow
@given(
    st.integers(1, 9), st.integers(1, 8), st.integers(1, 6), st.integers(0, 6), st.floats(-20, 20),
    st.sampled_from([0.1, 1.0, 10.0]), st.integers(0, 2**32 - 1), st.sampled_from([0.0, 1e-3, 1.0, 30.0]), st.integers(0, 3),
)  # fmt: skip
def test_what_the_head_reads_is_the_definition(width, rank, kinds, n, middle, slope, seed, scale, beside):
    of = shrinkage(width, rank, kinds, middle, slope, seed, beside=beside)
    states = (np.random.default_rng(seed + 1).normal(size=(n, width + beside)) * scale).astype(np.float32)
    read, kept = of(torch.from_numpy(states))
    distance, share = oracle(of, states)
    size = np.square(states[:, :width].astype(np.float64) @ of.directions.double().numpy()).sum(1).max(initial=0) + 100
    np.testing.assert_allclose(of.distance(torch.from_numpy(states)), distance, atol=3e-6 * size)
    np.testing.assert_allclose(kept, share, atol=1e-6 * size / slope)
    anchor = of.anchor.double().numpy()
    expected = anchor + kept.double().numpy()[:, None] * (states.astype(np.float64) - anchor)
    np.testing.assert_allclose(read, expected, rtol=1e-5, atol=1e-5 * max(1.0, np.abs(states).max(initial=0)))
    assert ((kept >= 0) & (kept <= 1)).all()
    assert read.dtype == kept.dtype == torch.float32
    whole = kept == 1
    assert torch.equal(read[whole], torch.from_numpy(states)[whole])


@pytest.mark.slow
@given(st.integers(0, 2**32 - 1), st.floats(0.2, 5))
def test_far_from_all_kinds_nothing_is_kept(seed, slope):
    of = shrinkage(8, 3, 4, middle=1.0, slope=slope, seed=seed)
    ray = torch.from_numpy(np.random.default_rng(seed).normal(size=8)).float() * torch.tensor([[1e3], [1e4], [1e5]])
    distance, kept = of.distance(ray), of(ray)[1]
    assert (distance.diff() > 0).all()
    assert kept[-1] == 0
    torch.testing.assert_close(of(ray)[0][-1], of.anchor)


def test_a_state_at_a_kinds_centre_is_kept():
    of = shrinkage(rank=5, kinds=7, middle=10.0, slope=0.5)
    at = torch.linalg.lstsq(of.directions.T.double(), (of.centres + of.offset).double().T).solution.T.float()
    read, kept = of(at)
    assert (kept == 1).all()
    assert torch.equal(read, at)


def test_file_reads_back_and_is_the_same_each_time(tmp_path):
    before = shrinkage(middle=-1.7, slope=4.0, beside=3)
    before.write(tmp_path / FILE)
    again, states = Shrinkage.read(tmp_path / FILE, D, D + 3), torch.randn(7, D + 3)
    again.write(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / FILE).read_bytes()
    third = Shrinkage.read(tmp_path / "again", D, D + 3)
    assert all(torch.equal(*both) for both in zip(again(states), third(states), strict=True))
    for one, other in zip(before(states), again(states), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {k: v for k, v in t.items() if k != "middle"}, "expected the tensors anchor, between, .* found anchor"),
        (lambda t: t | {"more": t["middle"] * 2}, "expected the tensors .* found .*more"),
        (lambda t: t | {"anchor": t["anchor"][:-1]}, r"anchor: expected \[48\], found \[47\]"),
        (lambda t: t | {"directions": t["directions"][:, :0]}, r"directions: expected \[D, r\], found \[48, 0\]"),
        (lambda t: t | {"directions": t["directions"][:, 0]}, r"directions: expected \[D, r\], found \[48\]"),
        (lambda t: t | {"directions": torch.randn(49, 5)}, r"directions: expected 48 rows, found \[49, 5\]"),
        (lambda t: t | {"directions": torch.randn(12, 5)}, r"directions: expected 48 rows, found \[12, 5\]"),
        (lambda t: t | {"centres": t["centres"].to(torch.int64)}, "centres: expected float32, found torch.int64"),
        (lambda t: t | {"offset": t["offset"].half()}, "offset: expected float32, found torch.float16"),
        (lambda t: t | {"centres": t["centres"] + 1e30}, "centres: expected numbers whose squares are finite"),
        (lambda t: t | {"offset": t["offset"][:-1]}, r"offset: expected \[5\], found \[4\]"),
        (lambda t: t | {"centres": t["centres"][:, :-1]}, r"centres: expected \[7, 5\], found \[7, 4\]"),
        (lambda t: t | {"centres": t["centres"][:0]}, r"centres: expected \[1, 5\], found \[0, 5\]"),
        (lambda t: t | {"between": t["between"][:-1]}, r"between: expected \[5\], found \[4\]"),
        (lambda t: t | {"between": -t["between"]}, "between: expected numbers from 0 up"),
        (lambda t: t | {"anchor": t["anchor"] * torch.nan}, "anchor: expected finite numbers"),
        (lambda t: t | {"width": t["width"] * 0}, "width: expected a finite number above 0, got 0.0"),
        (lambda t: t | {"middle": t["width"] * torch.inf}, "middle: expected a finite number, got inf"),
        (lambda t: t | {"middle": t["anchor"] * 2}, r"middle: expected one number, found \[48\]"),
    ],
)
def test_wrong_tensors_are_named(tmp_path, change, message):
    shrinkage().write(tmp_path / FILE)
    save_file({name: tensor.contiguous() for name, tensor in change(load_file(tmp_path / FILE)).items()}, tmp_path / FILE)
    with pytest.raises(CheckpointError, match=message):
        Shrinkage.read(tmp_path / FILE, D, D)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("shrinks") / "plain")


def with_shrinkage(plain, folder, of):
    of.write(shutil.copytree(plain, folder) / FILE)
    return folder


@pytest.fixture(scope="module")
def states(plain):
    return features.hidden_states(Engine.from_pretrained(plain, "cpu", "float32"), PROMPTS)[0]


@pytest.fixture(scope="module")
def some(states):
    """Keeps most of one prompt and less of the others."""
    of = shrinkage()
    far = of.distance(torch.from_numpy(states)).sort().values.tolist()
    return replace(of, middle=(far[0] + far[1]) / 2, width=(far[-1] - far[0]) / 12)


@pytest.fixture(scope="module")
def shrinking(plain, some, tmp_path_factory):
    return Engine.from_pretrained(with_shrinkage(plain, tmp_path_factory.mktemp("s") / "some", some), "cpu", "float32")


def test_every_path_of_the_engine_shrinks(shrinking, some, states, plain):
    head = checkpoint.load(plain).head
    _, share = oracle(some, states)
    assert share.min() < 0.1 < 0.6 < share.max()
    own, at = (torch.nn.functional.linear(x, head.weight, head.bias).numpy() for x in (torch.from_numpy(states), some.anchor))
    expected = at + share[:, None] * (own - at)
    together, (read, evaluated) = shrinking.coefficients(PROMPTS), features.hidden_states(shrinking, PROMPTS)
    batcher = Batcher(shrinking)
    alone = [batcher.submit(prompt, lambda found: found).result() for prompt in PROMPTS]
    batcher.close()
    for found in (together, evaluated):
        np.testing.assert_allclose(found.theta, expected[:, :5], rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(found.eta, expected[:, 5], rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(found.kept, share, rtol=1e-3)
    np.testing.assert_allclose(np.concatenate([one.theta for one in alone]), expected[:, :5], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(np.concatenate([one.kept for one in alone]), share, rtol=1e-3)
    np.testing.assert_allclose(together.row(2).kept, share[2:3], rtol=1e-3)
    assert together.of_first(3).kept is together.kept
    again, kept = hidden.states_and_kept(shrinking, PROMPTS)
    np.testing.assert_allclose(again, read, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(kept, share, rtol=1e-3)
    assert shrinking.coefficients([]).kept.shape == (0,)


def test_the_cache_of_hidden_states_serves_both(shrinking, some, plain, states, tmp_path):
    plainly = Engine.from_pretrained(plain, "cpu", "float32")
    assert hidden.fingerprint(plainly) == hidden.fingerprint(shrinking)
    hidden.hidden_states(shrinking, PROMPTS, tmp_path)
    np.testing.assert_allclose(hidden.hidden_states(plainly, PROMPTS, tmp_path), states, rtol=1e-3, atol=1e-5)
    found = hidden.hidden_states(shrinking, PROMPTS, tmp_path)
    np.testing.assert_allclose(found, some(torch.from_numpy(states))[0], rtol=1e-3, atol=1e-4)


def test_where_all_is_kept_the_numbers_are_the_same(plain, some, tmp_path):
    """Bit by bit."""
    wide = Engine.from_pretrained(with_shrinkage(plain, tmp_path / "wide", replace(some, middle=1e6)), "cpu", "float32")
    plainly = Engine.from_pretrained(plain, "cpu", "float32")
    assert plainly.shrinkage is None
    assert plainly.width == plainly.head.width == wide.width - 1
    before, after = plainly.coefficients(PROMPTS), wide.coefficients(PROMPTS)
    assert before.kept is None
    assert before.rows(slice(1, 3)).kept is None
    np.testing.assert_array_equal(after.kept, np.ones(4))
    np.testing.assert_array_equal(after.theta, before.theta)
    np.testing.assert_array_equal(after.eta, before.eta)
    routers = [Router(engine, catalog()) for engine in (plainly, wide)]
    decisions = [router.route_batch(PROMPTS, budget=2.5) for router in routers]
    assert [replace(one, kept=None) for one in decisions[1]] == decisions[0]


def test_far_prompts_have_the_marginals_order(plain, states, tmp_path):
    loaded, marginal = checkpoint.load(plain), np.array([0.3, -1.0, 2.0, 0.1, -0.2, 1.5])
    at = learned.anchor(loaded.head, marginal, np.random.default_rng(0).normal(size=(200, D)))
    of = shrinkage(at=at, middle=-1e6)
    far = Engine.from_pretrained(with_shrinkage(plain, tmp_path / "far", of), "cpu", "float32")
    found = far.coefficients(PROMPTS)
    np.testing.assert_allclose(found.theta, np.tile(marginal[:5], (4, 1)), atol=1e-4)
    np.testing.assert_allclose(found.eta, marginal[5], atol=1e-4)
    assert (found.theta.argsort(1) == marginal[:5].argsort()).all()
    rates = win_rates(found.theta.astype(np.float64), np.full(5, 0.2))
    assert np.isfinite(rates).all()
    assert ((rates >= 0) & (rates <= 1)).all()


@pytest.mark.slow
@given(st.integers(1, 6), st.integers(1, 12), st.integers(0, 2**32 - 1))
def test_the_anchor_has_the_outputs_that_are_asked_for(models, width, seed):
    rng = np.random.default_rng(seed)
    head = Head(
        torch.from_numpy(rng.normal(size=(models, width))).float(), torch.from_numpy(rng.normal(size=models)).float(), models
    )
    known, outputs = rng.normal(size=(30, width)), rng.normal(size=models)
    at = learned.anchor(head, outputs, known)
    weight, bias = head.weight.double().numpy(), head.bias.double().numpy()
    nearest = np.linalg.lstsq(weight, outputs - bias, rcond=1e-10)[0]
    least = np.abs(weight @ nearest + bias - outputs).max()
    scale = 1 / np.linalg.svd(weight, compute_uv=False).min()
    assert np.abs(weight @ at + bias - outputs).max() <= 3 * models * least + 1e-6 * max(1.0, scale)


def test_deviations_and_maps_come_behind_it(plain, some, states, tmp_path):
    folder = with_shrinkage(plain, tmp_path / "both", some)
    generator = torch.Generator().manual_seed(1)
    posterior = Uncertainty(
        torch.randn(D + 1, 3, generator=generator), torch.eye(3)[None] * 0.1, ("alpha",), tuple(tiny.MODELS)
    )
    posterior.write(folder / UNCERTAINTY_FILE)
    uncertain = Engine.from_pretrained(folder, "cpu", "float32").coefficients(PROMPTS)
    read, kept = some(torch.from_numpy(states))
    np.testing.assert_allclose(uncertain.deviation, posterior.deviation(read), rtol=1e-3)
    np.testing.assert_allclose(uncertain.kept, kept, rtol=1e-3)
    (folder / MAP_FILE).write_bytes(ThetaMap(tuple(tiny.MODELS), (MonotoneStep((-1.0, 1.0), (0.0, 4.0)),)).contents())
    mapped = Engine.from_pretrained(folder, "cpu", "float32").coefficients(PROMPTS)
    np.testing.assert_allclose(mapped.theta, 2 * (uncertain.theta + 1), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(mapped.deviation, 2 * uncertain.deviation, rtol=1e-3)
    np.testing.assert_array_equal(mapped.kept, uncertain.kept)


def test_a_decision_says_how_much_is_kept(shrinking):
    router = Router(shrinking, catalog())
    found = shrinking.coefficients(PROMPTS).kept
    for decision, kept in zip(router.route_batch(PROMPTS, budget=2.5), found.tolist(), strict=True):
        assert decision.kept == pytest.approx(kept)
        assert ("far from the training prompts: " in decision.why) == (kept < 0.5)
        if kept < 0.5:
            assert decision.why.endswith(
                f"; far from the training prompts: {kept:.0%} of the differences between models are kept"
            )
    paced = router.route(PROMPTS[int(found.argmin())], pacer=BudgetPacer(2.5))
    assert paced.kept == pytest.approx(float(found.min()), rel=1e-4)
    assert "far from the training prompts" in paced.why
    router.close()


@pytest.mark.parametrize(("kept", "said"), [(None, False), (1.0, False), (0.5, False), (0.49, True), (0.0, True)])
def test_half_and_more_is_not_worth_a_word(kept, said):
    assert (why_with("why", kept) != "why") == said


def test_the_command_counts_far_prompts(shrinking, plain):
    prompts = [prompt for prompt in PROMPTS if prompt]
    rates = "models:\n" + "".join(f"  {name}: {{cost: {i + 1}}}\n" for i, name in enumerate(tiny.MODELS))
    for engine in (shrinking, Engine.from_pretrained(plain, "cpu", "float32")):
        (engine.folder / "catalog.yaml").write_text(rates)
        kept = engine.coefficients(prompts).kept
        options = ("--checkpoint", str(engine.folder), "--device", "cpu", "--dtype", "float32")
        done = p2l_engine("route", *prompts, *options)
        assert done.status == 0, done.err
        said = "" if kept is None else f"{(kept < 0.5).sum()} of {len(prompts)} far from the training prompts"
        assert said in done.out
        assert ("far from the training prompts" in done.out) == (kept is not None)


@pytest.mark.slow
@pytest.mark.parametrize("explore", [None, "thompson"])
def test_files_say_how_much_is_kept(shrinking, plain, some, tmp_path, explore):
    folder = with_shrinkage(plain, tmp_path / "again", some)
    Uncertainty(torch.zeros(D + 1, 3), torch.eye(3)[None] * 0.1, ("alpha",), tuple(tiny.MODELS)).write(
        folder / UNCERTAINTY_FILE
    )
    rates = "models:\n" + "".join(f"  {name}: {{cost: {i + 1}}}\n" for i, name in enumerate(tiny.MODELS))
    (folder / "catalog.yaml").write_text(rates)
    (plain / "catalog.yaml").write_text(rates)
    source = tmp_path / "prompts.jsonl"
    source.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in (*PROMPTS, None)))
    options = ("--device", "cpu", "--dtype", "float32", *(("--explore", explore) if explore else ()))
    done = p2l_engine("batch", source, "-o", tmp_path / "out", "--checkpoint", folder, *options)
    assert done.status in (0, 3), done.err
    found = pq.read_table(tmp_path / "out")["kept"].to_pylist()
    np.testing.assert_allclose(found[:-1], shrinking.coefficients(PROMPTS).kept, rtol=1e-3)
    assert found[-1] is None
    batch = Route(str(folder), device="cpu", dtype="float32", explore=explore)({"prompt": np.array([*PROMPTS, ""], object)})
    np.testing.assert_allclose(batch["kept"][:4], found[:4], rtol=1e-3)
    if explore is None:
        done = p2l_engine("batch", source, "-o", tmp_path / "plain", "--checkpoint", plain, *options)
        assert "kept" not in pq.read_table(tmp_path / "plain").column_names


class FarEngine(FixedEngine):
    """Keeps 0.32 of every prompt."""

    def coefficients(self, prompts):
        found = super().coefficients(prompts)
        return replace(found, kept=np.full(len(found), 0.32, np.float32))


def test_a_server_explains_it():
    async def ask() -> None:
        async with serving(config_for("http://127.0.0.1:1/v1"), FarEngine()) as server, aiohttp.ClientSession() as http:
            body = {"messages": [{"role": "user", "content": "hello"}]}
            async with http.post(f"{server.url}/v1/route", json=body) as response:
                decision = await response.json()
            async with http.post(f"{server.url}/v1/coefficients", json={"prompts": ["hello", "you"]}) as response:
                coefficients = await response.json()
        assert decision["kept"] == pytest.approx(0.32)
        assert decision["why"].endswith("far from the training prompts: 32% of the differences between models are kept")
        assert coefficients["kept"] == pytest.approx([0.32, 0.32])

    asyncio.run(ask())


def test_an_export_is_refused(shrinking, tmp_path):
    with pytest.raises(
        CheckpointError, match=r"shrinkage.safetensors: .*lmarena/p2l's code cannot read: export the checkpoint"
    ):
        export(shrinking.folder, tmp_path / "exported")


def test_a_checkpoint_that_learned_keeps_it(shrinking, plain, tmp_path):
    loaded = checkpoint.load(shrinking.folder)
    write.write(loaded, tmp_path / "new", loaded.head, loaded.models, None, drop=["beta"])
    again = Engine.from_pretrained(tmp_path / "new", "cpu", "float32").coefficients(PROMPTS)
    kept = [i for i, name in enumerate(tiny.MODELS) if name != "beta"]
    before = shrinking.coefficients(PROMPTS)
    np.testing.assert_allclose(again.theta, before.theta[:, kept], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(again.kept, before.kept)


def test_a_damaged_file_is_a_damaged_checkpoint(plain, tmp_path):
    copied = shutil.copytree(plain, tmp_path / "copy")
    (copied / FILE).write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="damaged, truncated or no safetensors file"):
        checkpoint.load(copied)


# What votes ask for


def prompt_votes(rng, feedback: FeedbackModel, theta, eta):
    """A vote of each pair of models on each prompt, drawn at these coefficients [P, M]."""
    m = theta.shape[1]
    i, j = np.triu_indices(m, 1)
    tie = None if eta is None else torch.from_numpy(np.repeat(eta[:, None], len(i), 1))
    p = feedback.probabilities(torch.from_numpy(theta[:, i]), torch.from_numpy(theta[:, j]), tie).numpy()
    outcome = (p.cumsum(-1) < rng.random((*p.shape[:2], 1))).sum(-1).clip(max=Outcome.BOTH_BAD)
    n = len(theta)
    of = np.repeat(np.arange(n), len(i))
    pair = (np.tile(i, n).astype(np.int64), np.tile(j, n).astype(np.int64))
    return Votes.make(
        [(f"prompt {k}",) for k in range(n)], [f"m{k}" for k in range(m)], of, *pair, outcome.ravel().astype(np.int64)
    )


def simulated(rng, far_truth):
    """A head of three models in 12 dimensions; 400 training prompts; and votes on 150 near prompts, by the head, and 150 far
    ones, by ``far_truth``(the head's theta)."""
    feedback = feedback_model("bt")
    head = Head(torch.from_numpy(rng.normal(size=(3, 12))).float(), torch.zeros(3), 3)
    training = rng.normal(size=(400, 12)).astype(np.float32)
    states = np.concatenate([rng.normal(size=(150, 12)), 6 * rng.normal(size=(150, 12))]).astype(np.float32)
    theta = states.astype(np.float64) @ head.weight.double().numpy().T
    theta[150:] = far_truth(theta[150:])
    outputs = np.array([0.5, 0.0, -0.5])
    start, away = learned.of_training(head, outputs, training, 12)
    return start, away, head, feedback, prompt_votes(rng, feedback, theta, None), states


@pytest.mark.slow
def test_votes_that_ask_for_it_shrink_far_prompts_alone(rng):
    *given_, votes, states = simulated(rng, lambda theta: np.tile([0.5, 0.0, -0.5], (len(theta), 1)))
    source = np.repeat(["near", "far"], 150)
    found, report = learned.fit(*given_, votes, states)
    _, kept = found(torch.from_numpy(states))
    assert kept[:150].mean() > 0.85
    assert kept[150:].mean() < 0.1
    assert report.gain > 5 * report.gain_error > 0
    assert report.after < report.before - 0.2
    assert (report.middle, report.width) == (found.middle, found.width)
    _, apart = learned.fit(*given_, votes, states, source)
    assert apart.by_part["near"][0] == apart.by_part["far"][0] == 150
    assert abs(apart.by_part["far"][2]) < 1e-9  # near prompts alone ask for nothing


@pytest.mark.slow
def test_votes_that_come_true_ask_for_nothing(rng):
    found, report = learned.fit(*simulated(rng, lambda theta: theta))
    assert found is None
    assert report.middle is None
    assert report.kept == 1
    assert report.gain == pytest.approx(0, abs=2 * report.gain_error + 1e-12)


def test_distances_of_training_prompts_are_of_the_others(rng):
    head = Head(torch.randn(2, 6), torch.zeros(2), 2)
    training = (rng.normal(size=(300, 6)) * [3, 2, 1, 1, 0.5, 0]).astype(np.float32)  # one dimension does not vary
    of, away = learned.of_training(head, np.zeros(2), training, 6)
    assert away.shape == (300,)
    own = of.distance(torch.from_numpy(training)).double().numpy()
    assert away.mean() > own.mean()  # no prompt is in the kind that it is compared with
    assert (of(torch.from_numpy(training))[1] == 1).all()
    assert np.isfinite(of.distance(torch.from_numpy(training + 5)).numpy()).all()


@pytest.mark.parametrize("beside", [0, 3])
def test_prompts_of_new_kinds_are_told_from_those_of_known_ones(rng, beside):
    """And the distance is the likelihood ratio of the kinds' true distribution, but for what is lost by learning it."""
    d, kinds = 12, 40
    mixing = np.linalg.qr(rng.normal(size=(d, d)))[0] * rng.uniform(0.5, 2, d)
    centres = rng.normal(size=(kinds + 40, d)) * np.repeat([3.0, 0.0], [4, d - 4])  # apart in four directions
    label = np.repeat(np.arange(kinds + 40), 200)
    states = (rng.normal(size=(len(label), d)) + centres[label]) @ mixing
    read = np.concatenate([states, rng.normal(size=(len(label), beside))], 1).astype(np.float32)
    known, split = label < kinds, np.arange(len(label)) % 2 == 0
    head = Head(torch.randn(2, d + beside), torch.zeros(2), 2)
    names = [f"kind {k}" for k in label[known & split]]
    of, away = learned.of_training(head, np.zeros(2), read[known & split], d, names)
    assert of.directions.shape == (d, d)
    found = {seen: of.distance(torch.from_numpy(read[(known == seen) & ~split])).double().numpy() for seen in (True, False)}
    y = states @ np.linalg.inv(mixing)
    nearest = -0.5 * np.square(y[:, None] - centres[:kinds]).sum(2).min(1)
    truth = 2 * (norm.logpdf(y, 0, np.where(np.arange(d) < 4, 10**0.5, 1)).sum(1) + 0.5 * d * np.log(2 * np.pi) - nearest)
    expected = {seen: truth[(known == seen) & ~split] for seen in (True, False)}
    for seen in (True, False):
        assert np.corrcoef(found[seen], expected[seen])[0, 1] > 0.85

    def told(of: dict[bool, np.ndarray]) -> float:
        return float((of[False][:, None] > of[True]).mean())

    assert told(found) > told(expected) - 0.03 > 0.8
    assert np.median(away) == pytest.approx(np.median(found[True]), abs=1.0)  # others' prompts are as far as unseen ones
    half = learned.at_quantile(of, away, 0.9, 0.3)
    assert (half(torch.from_numpy(read[known & ~split]))[1] > 0.5).double().mean() == pytest.approx(0.9, abs=0.03)


def test_kinds_are_categories_of_enough_prompts_or_clusters(rng):
    centres = rng.normal(size=(5, 8)) * 20
    truth = np.repeat(np.arange(5), 40)
    states = centres[truth] + rng.normal(size=(200, 8))
    names = np.array(["a", "b", "c", "d", "e"])[truth]
    names[:3] = "rare"
    label = learned.kinds_of(states, names.tolist())
    assert (label[:3] == -1).all()
    assert [set(label[names == name]) for name in "abcde"] == [{k} for k in range(5)]
    for none in (None, ["all"] * 200):
        clusters = learned.kinds_of(states, none)
        assert len(set(clusters.tolist())) > 1
        for k in set(clusters.tolist()):
            assert len(set(truth[clusters == k].tolist())) <= 2
        np.testing.assert_array_equal(clusters, learned.kinds_of(states, none))
    of, away = learned.of_training(Head(torch.randn(2, 8), torch.zeros(2), 2), np.zeros(2), states.astype(np.float32), 8, names)
    assert len(of.centres) == 5
    assert np.isfinite(away).all()


@pytest.mark.parametrize("kinds", [None, ["a"] * 60 + ["b"] * 60, [str(i) for i in range(120)]])
@pytest.mark.parametrize("states", [np.ones((120, 6)), np.zeros((120, 6)), np.repeat(np.eye(2, 6), 60, 0)])
def test_states_that_are_alike_are_kept(states, kinds):
    of, away = learned.of_training(Head(torch.randn(2, 6), torch.zeros(2), 2), np.zeros(2), states.astype(np.float32), 6, kinds)
    assert np.isfinite(away).all()
    assert (of(torch.from_numpy(states))[1] == 1).all()


def test_too_few_prompts_and_sources_are_refused(rng):
    head = Head(torch.randn(2, 6), torch.zeros(2), 2)
    with pytest.raises(ValueError, match="training: expected at least 100 prompts for a shrinkage, got 99"):
        learned.of_training(head, np.zeros(2), rng.normal(size=(99, 6)).astype(np.float32), 6)
    start, away = learned.of_training(head, np.zeros(2), rng.normal(size=(100, 6)).astype(np.float32), 6)
    theta = rng.normal(size=(100, 2))
    votes, states = prompt_votes(rng, feedback_model("bt"), theta, None), rng.normal(size=(100, 6)).astype(np.float32)
    with pytest.raises(ValueError, match="source: expected two sources at least, got 'a' alone"):
        learned.fit(start, away, head, feedback_model("bt"), votes, states, np.full(100, "a"))
    few = votes.of(range(99))
    with pytest.raises(ValueError, match="votes: expected at least 100 prompts, got 99"):
        learned.fit(start, away, head, feedback_model("bt"), few, states[:99])


def scores_table(path, prompts, scores, **more):
    rows = [
        {"prompt": prompt, "model": name, "score": float(score), **{key: of[i] for key, of in more.items()}}
        for i, (prompt, row) in enumerate(zip(prompts, scores, strict=True))
        for name, score in zip(tiny.MODELS, row, strict=True)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.slow
def test_the_command_fits_and_writes_it(plain, rng, tmp_path, monkeypatch):
    monkeypatch.setenv("P2L_ENGINE_CACHE", str(tmp_path / "cache"))
    trained = [f"a{i} b{i}" for i in range(120)]
    far = [f"{'Ω' * 30} {i}" for i in range(60)]
    near = [f"a{i} b{i}" for i in range(200, 260)]
    theta = Engine.from_pretrained(plain, "cpu", "float32").coefficients([*trained, *near]).theta
    level = np.array([0.9, 0.7, 0.5, 0.3, 0.1])
    own = 1 / (1 + np.exp(-theta)) + rng.normal(size=theta.shape) * 0.01
    table = scores_table(tmp_path / "trained.jsonl", trained, level + rng.normal(size=(120, 5)) * 0.3)
    votes = scores_table(
        tmp_path / "votes.jsonl", [*near, *far], [*own[120:], *(level + rng.normal(size=(60, 5)) * 0.05)],
        source=["near"] * 60 + ["far"] * 60,
    )  # fmt: skip
    arguments = ("shrink", str(plain), "--trained-on", table, "--votes", votes, "--device", "cpu", "--dtype", "float32")
    ended = p2l_engine(*arguments, "-o", str(tmp_path / "new"), "--json", str(tmp_path / "figures.json"))
    assert ended.status == 0, ended.err
    report = json.loads((tmp_path / "figures.json").read_text())
    assert report["prompts"] == 120
    assert report["after"] < report["before"]
    loaded = checkpoint.load(tmp_path / "new")
    assert loaded.shrinkage.middle == pytest.approx(report["middle"])
    record = json.loads((tmp_path / "new" / "training_config.json").read_text())["shrinkage"]
    assert (record["prompts"], record["width"]) == (120, report["width"])
    found = Engine(loaded, "cpu", "float32").coefficients([*near, *far])
    assert found.kept[60:].mean() < found.kept[:60].mean()
    by = p2l_engine(*arguments, "--by", "source", "-o", str(tmp_path / "by"))
    assert by.status in (0, 1), by.err
    assert (tmp_path / "by").exists() == (by.status == 0)
    assert "near" in by.out
    # Votes on a checkpoint that shrinks are learned from what its head reads.
    adapted = p2l_engine("adapt", str(tmp_path / "new"), "--votes", votes, "-o", str(tmp_path / "adapted"), "--device", "cpu")
    assert adapted.status == 0, adapted.err
    again = checkpoint.load(tmp_path / "adapted").shrinkage
    assert torch.equal(again.anchor, loaded.shrinkage.anchor)


@pytest.mark.slow
def test_the_command_writes_nothing_where_nothing_is_gained(tmp_path, monkeypatch):
    monkeypatch.setenv("P2L_ENGINE_CACHE", str(tmp_path / "cache"))
    plain = tiny.write(tmp_path / "plain", loss_type="bt", head_type="bt")
    prompts = [f"a{i} b{i}" for i in range(220)]
    theta = Engine.from_pretrained(plain, "cpu", "float32").coefficients(prompts).theta
    scores = 1 / (1 + np.exp(-theta))
    tables = [
        scores_table(tmp_path / "trained.jsonl", prompts[:110], 1 - scores[:110]),  # whose leaderboard is the wrong way round
        scores_table(tmp_path / "votes.jsonl", prompts[100:], scores[100:]),
    ]
    ended = p2l_engine(
        "shrink", str(plain), "--trained-on", tables[0], "--votes", tables[1], "-o", str(tmp_path / "new"), "--device", "cpu"
    )
    assert ended.status == 1
    assert "left 10 prompts out of --trained-on" in ended.message
    assert "nothing was written" in ended.message
    assert not (tmp_path / "new").exists()


def test_a_monotone_map_is_refused(plain, tmp_path):
    mapped = shutil.copytree(plain, tmp_path / "mapped")
    (mapped / MAP_FILE).write_bytes(ThetaMap(tuple(tiny.MODELS), (MonotoneStep((-1.0, 1.0), (0.0, 4.0)),)).contents())
    ended = p2l_engine("shrink", str(mapped), "--trained-on", "a.csv", "--votes", "b.csv", "-o", str(tmp_path / "new"))
    assert ended.status == 2
    assert "calibrated by a monotone map (calibration.json), which comes behind a shrinkage" in ended.message
