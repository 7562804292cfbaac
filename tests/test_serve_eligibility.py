"""What a server keeps between requests gives the answers that it would work out anew."""

from __future__ import annotations

from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from p2l_engine.apis.api import Usage
from p2l_engine.coefficients import Coefficients
from p2l_engine.feedback import feedback_model
from p2l_engine.serve import plan as plans
from p2l_engine.serve import settings
from p2l_engine.serve.eligibility import DOWN, NOT_ALLOWED, NOT_OF_KEY, OTHER, Kind, in_words
from p2l_engine.serve.metrics import Metrics
from p2l_engine.serve.model_entry import Model
from p2l_engine.serve.prices import Prices
from p2l_engine.serve.runtime import decisions_only
from tests.support.records import record

APIS = ("chat", "responses")
NEEDS = ("text", "image", "tools")


def entry(accepts, context, max_output, apis):
    provider = [{"base_url": "http://127.0.0.1:1/v1", "model": "m", "api": api} for api in apis]
    return {
        "usd_per_m_in": 1, "usd_per_m_out": 1, "tokens_in": 1, "tokens_out": 1, "accepts": list(accepts), "context": context,
        "max_output": max_output, "provider": provider,
    }  # fmt: skip


entries = st.builds(
    entry,
    st.sets(st.sampled_from(NEEDS), min_size=1),
    st.sampled_from([None, 10, 100]),
    st.sampled_from([5, 50]),
    st.lists(st.sampled_from(APIS), max_size=2, unique=True),
)
names = st.sets(st.sampled_from("abcd"))
requests = st.tuples(
    st.builds(
        Kind, st.sampled_from(APIS), st.frozensets(st.sampled_from(NEEDS)), st.booleans(), st.none() | st.sampled_from("abcd"),
        st.none() | names.map(sorted).map(tuple), st.none() | names.map(frozenset), st.none(), st.none(),
    ),
    st.integers(1, 200),
    st.none() | st.integers(1, 80),
    st.sets(st.integers(0, 7)),  # deployments that are down
)  # fmt: skip


def may_take(plan, k, kind, tokens, max_tokens):
    """By the documentation alone."""
    name, model = plan.names[k], plan.models[k]
    group = [d for d in plan.deployments[k] if d.provider.api == kind.api]
    return (
        kind.named in (None, name)
        and (kind.of_key is None or name in kind.of_key)
        and (kind.allowed is None or name in kind.allowed)
        and (kind.named is not None or name != "d")  # the checkpoint does not know it
        and (bool(group) or (kind.decision_only and not plan.deployments[k]))
        and kind.needs <= set(model.accepts)
        and (model.context is None or tokens <= model.context)
        and (max_tokens is None or max_tokens <= model.max_output)
        and (not group or any(not d.until for d in group))
    )


@given(
    st.integers(0, 30), st.lists(st.sampled_from(["does not accept image", "writes at most 5 tokens", DOWN]), max_size=30),
    st.sampled_from([OTHER, NOT_OF_KEY, NOT_ALLOWED]),
)  # fmt: skip
def test_the_reasons_that_are_told_are_those_of_models_that_the_caller_wants(others, wanted, why):
    """They were the first eight: with nine models, a named one's was not among them."""
    reasons = {f"other {i}": why for i in range(others)} | {f"wanted {i}": reason for i, reason in enumerate(wanted)}
    told = in_words(reasons)
    assert told.count(": ") == min(len(wanted or reasons), 9 if len(wanted or reasons) == 9 else 8)
    assert (why in told) == (bool(others) and not wanted)
    assert not wanted or told.startswith(f"wanted 0: {wanted[0]}")


@pytest.mark.slow
@hypothesis_settings(deadline=None)
@given(models=st.tuples(entries, entries, entries, entries), asked=st.lists(requests, min_size=1, max_size=8))
def test_who_may_take_a_request_does_not_depend_on_earlier_ones(models, asked):
    plan = plans.make(settings.parse({"models": dict(zip("abcd", models, strict=True))}), ("a", "b", "c"), feedback_model("bt"))
    every = [d for group in plan.deployments for d in group]
    for kind, tokens, max_tokens, down in asked:
        for i, deployment in enumerate(every):
            deployment.until = 1.0 if i in down else 0.0

        def group(k, api=kind.api):
            return [d for d in plan.deployments[k] if d.provider.api == api]

        mask, reasons = plan.eligibility.of(kind, tokens, max_tokens, group, lambda d: not d.until)
        expected = [may_take(plan, k, kind, tokens, max_tokens) for k in range(4)]
        assert mask.tolist() == expected
        assert set(reasons) == {name for name, allowed in zip("abcd", expected, strict=True) if not allowed}
        for name, why in reasons.items():
            if why == DOWN:
                assert all(d.until for d in group("abcd".index(name)))


amounts = st.decimals(0, 10**4, places=6, allow_nan=False)


@pytest.mark.slow
@given(
    prices=st.lists(st.tuples(amounts, amounts, amounts, amounts), min_size=1, max_size=6),
    tokens=st.tuples(*[st.integers(0, 10**8)] * 4),
    data=st.data(),
)
def test_costs_of_several_models_are_exact(prices, tokens, data):
    """A price of one model changes no other's cost, however many decimals it has."""
    keys = ("usd_per_m_in", "usd_per_m_out", "usd_per_m_cached", "usd_per_m_cache_write")
    models = {
        str(k): Model(**dict(zip(keys, map(float, row), strict=True)), tokens_in=1, tokens_out=1, max_output=7)
        for k, row in enumerate(prices)
    }
    k = data.draw(st.integers(0, len(prices) - 1))
    per_in, per_out, per_cached, per_written = (Fraction(repr(float(price))) / 10**6 for price in prices[k])
    plain, out, cached, written = tokens
    found = Prices(models)
    usage = Usage(plain + cached + written, out, cached, written)
    assert found.cost(k, usage) == plain * per_in + out * per_out + cached * per_cached + written * per_written
    worst = plain * max(per_in, per_cached, per_written) + 3 * min(out, 7) * per_out
    assert found.worst(k, plain, out, 3) == worst
    assert found.is_free(k) == (not any(prices[k]))


@pytest.mark.parametrize("objective", ["bt", "half-ties", "not-bad"])
def test_win_rates_are_kept_for_their_coefficients_alone(objective):
    feedback = feedback_model("grk")
    config = settings.parse({"models": {name: {"cost": 1.0} for name in "cab"}, "serve": {"queue": {"cached": 2}}})
    plan = plans.make(config, ("a", "b", "unnamed"), feedback)

    def coefficients(seed):
        theta = np.random.default_rng(seed).normal(size=(1, 3)).astype(np.float32)
        return Coefficients(theta, np.array([1.2], np.float32), ("a", "b", "unnamed"), feedback)

    def anew(given):
        rates = plan.choosers[objective].win_rates(given)[0]
        return [0.0, *rates.tolist()]  # c is not known

    prompts = {name: coefficients(seed) for seed, name in enumerate("xyz")}
    for name in "xyzzyxxz":
        found = plan.win_rates.of(name, prompts[name], objective)
        assert found.tolist() == anew(prompts[name])
        assert plan.win_rates.of(name, prompts[name], objective) is found
        with pytest.raises(ValueError, match="read-only"):
            found[0] = 1.0
    again = coefficients(7)  # of a prompt that was forgotten, and computed once more
    assert plan.win_rates.of("z", again, objective).tolist() == anew(again)
    assert plan.win_rates.of("z", prompts["z"], "bt").tolist() != anew(again)


def test_kept_parts_of_counters_are_those_of_their_labels():
    class Scorer:
        hits = misses = waiting = 0

    metrics = Metrics(Scorer(), ["a", "b"])
    for model, status in (("a", 200), ("b", 200), ("a", 200), ("unknown", 503), ("a", 200)):
        metrics.add(record(api="chat", chosen=model, model=model, status=status, outcome="answered", tokens_in=10))
    text = metrics.text().decode()
    assert 'p2l_requests_total{api="chat",model="a",outcome="answered",status="200"} 3.0' in text
    assert 'p2l_requests_total{api="chat",model="b",outcome="answered",status="200"} 1.0' in text
    assert 'p2l_requests_total{api="chat",model="other",outcome="answered",status="503"} 1.0' in text
    assert 'p2l_tokens_total{kind="in",model="a"} 30.0' in text


def test_a_checkpoints_catalog_says_what_its_models_take(tmp_path):
    """Those that do not say take everything, as nothing is sent."""
    text = "models: {a: {cost: 1, context: 100, accepts: [tools, text]}, b: {cost: 2}}"
    (tmp_path / "catalog.yaml").write_text(text)
    models = decisions_only(SimpleNamespace(folder=tmp_path)).models
    assert (models["a"].context, models["a"].accepts) == (100, ("text", "tools"))
    assert (models["b"].context, set(models["b"].accepts)) == (None, {"text", "image", "audio", "tools", "json_schema"})
