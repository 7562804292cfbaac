"""The page, in Debian's Chromium: what it shows is what the server said, and its budgets are those of the LP."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import queue
import re
import threading
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from playwright import sync_api as playwright

from bench.mock_provider import MockProvider
from p2l_engine import routing
from p2l_engine.serve.page import page as page_file
from tests.support.serving import PRICES, config_for, serving
from tests.support.stub_page_server import HOSTILE, NINE, Candidate, Stub, many, serve

# The headless shell draws the same pages in half the CPU time, as it has no windows.
BROWSERS = [Path("/usr/bin/chromium-headless-shell"), Path("/usr/bin/chromium")]
CHROMIUM = next((path for path in BROWSERS if path.exists()), None)
ARGUMENTS = ["--no-sandbox", "--renderer-process-limit=1", "--disable-site-isolation-trials"]  # one renderer for all pages
WIDE = {"width": 1200, "height": 900}
NARROW = {"width": 360, "height": 740}
LONG_COSTS = tuple(
    replace(model, cost=cost)
    for model, cost in zip(NINE, (1.23e-7, 7.71e-6, 1.23e-4, 9.87e-8, 0, 12.5, 888_888.88, 8.88e9, 3e-5), strict=True)
)
PROMPT = "Prove that there are infinitely many primes of the form 4k + 3."

browser_test = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install --no-install-recommends chromium-headless-shell"),
]


# ---- Scripts that look at a page ----

TEXTS_OF_CHART = """
[[...document.querySelectorAll("#chart text")].map((e) => {
  const { x, y, width, height } = e.getBBox();
  return [e.textContent, x, y, width, height];
}), document.getElementById("chart").clientWidth]
"""
PLACES_OF_VERTICES = """
[...document.querySelectorAll("#chart .vertex")].map((e) => [Number(e.getAttribute("cx")), Number(e.getAttribute("cy"))])
"""
HIDE = """
(hidden) => {
  Object.defineProperty(document, "hidden", { configurable: true, get: () => hidden });
  document.dispatchEvent(new Event("visibilitychange"));
}
"""
SHOW_PROBLEMS = """
() => {
  $("key-form").hidden = $("problem").hidden = false;
  $("problem").textContent = $("key-problem").textContent = $("amount-problem").textContent = "A problem";
}
"""
FOCUS = """
(() => {
  const e = document.activeElement;
  return [e.id || e.textContent, getComputedStyle(e).outlineStyle];
})()
"""
UNNAMED = """
[...document.querySelectorAll("input, textarea, select, button, [role=meter], svg")].filter((e) => {
  const text = e.tagName === "BUTTON" && (e.hidden || e.textContent.trim());
  return !(e.labels?.length || e.getAttribute("aria-label") || text);
}).map((e) => e.outerHTML)
"""
DANGLING = """
["aria-labelledby", "aria-describedby", "aria-controls", "for"].flatMap((name) =>
  [...document.querySelectorAll(`[${name}]`)].flatMap((e) => e.getAttribute(name).split(" "))
).filter((id) => !document.getElementById(id))
"""
OUTSIDE = """
[...document.querySelectorAll("body *")].filter((e) =>
  e.checkVisibility() && !e.closest("svg > *") && e.getBoundingClientRect().right > document.documentElement.clientWidth + 0.5
).map((e) => e.outerHTML.slice(0, 100))
"""
WIDE_COSTS = """
[...document.querySelectorAll("#board td.cost")].filter((e) => e.scrollWidth > e.clientWidth).map((e) => e.textContent)
"""
CONTRAST = """
() => {
  const linear = (c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const luminance = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
  const ground = (e) => {
    for (; e; e = e.parentElement) {
      const color = parse(getComputedStyle(e).backgroundColor);
      if (color[3] !== 0) return color;
    }
    return [255, 255, 255];
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const e = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !e.checkVisibility() || e.closest("script, title, .skip")) continue;
    const style = getComputedStyle(e);
    const [a, b] = [luminance(parse(e.closest("svg") ? style.fill : style.color)), luminance(ground(e))];
    found.push([(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), walker.currentNode.data.trim().slice(0, 40)]);
  }
  return found;
}
"""


@pytest.fixture(scope="module")
def chromium():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def windows(chromium):
    """A browser context for each set of options. An empty page keeps its window open: a window costs half a second of CPU, and
    a tab in it a tenth. Pages share nothing: the stubs' ports are their origins, and what a page keeps is its tab's."""
    kept = {}

    def window(**options):
        key = repr(sorted(options.items()))
        if key not in kept:
            kept[key] = chromium.new_context(**options)
            kept[key].new_page()
        return kept[key]

    yield window
    for context in kept.values():
        context.close()


class Opened:
    """A page, the stub that answers it, and what it must not do."""

    def __init__(self, page, stub, clock):
        self.page, self.stub, self.complaints, self.hosts = page, stub, [], set()
        page.on("console", lambda message: message.type in ("error", "warning") and self.complaints.append(message.text))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", lambda request: self.hosts.add(re.sub(r"^(\w+:/*[^/]*/?).*", r"\1", request.url)))
        page.add_init_script(
            "window.violations = [];"
            "document.addEventListener('securitypolicyviolation', (e) => window.violations.push(e.violatedDirective));"
        )
        if clock:
            page.clock.install()
            page.clock.pause_at("2100-01-01")
        page.goto(stub.url)

    def rank(self, text=PROMPT):
        self.page.fill("#prompt", text)
        self.page.press("#prompt", "Control+Enter")
        self.settled()

    def settled(self):
        self.page.locator("#results[aria-busy=false]").wait_for()

    def text(self, selector):
        return self.page.locator(selector).inner_text()

    def texts(self, selector):
        return self.page.locator(selector).all_inner_texts()

    def names(self):
        return self.page.locator("#board tbody .name").all_text_contents()

    def run(self, script, argument=None):
        return self.page.evaluate(script, argument)

    def mixture(self):
        """{model: probability}, cost and win rate as the page computed them, to all digits."""
        found = self.run("state.mixture")
        return {part["model"]: part["probability"] for part in found["parts"]}, found["cost"], found["winRate"]

    def check(self):
        """It did what no page may do: never."""
        assert self.complaints == []
        assert self.run("window.violations") == []
        assert self.hosts <= {self.stub.url, "data:image/"}
        assert self.run("document.documentElement.scrollWidth <= innerWidth")


@pytest.fixture
def opened(chromium, windows):
    """Opens the page of a stub, and checks at the end what holds for every page.

    faults: the test makes some on purpose. clock: the page's timers stand still, and the test moves them on; all pages of a
    window have one clock, so it gets a window of its own.
    """
    with contextlib.ExitStack() as stack:
        pages = []

        def open_page(stub=None, faults=False, clock=False, **options):
            stub = stack.enter_context(serve(stub or Stub()))
            context = (chromium.new_context if clock else windows)(**{"viewport": WIDE, "reduced_motion": "reduce", **options})
            page = context.new_page()
            stack.callback(context.close if clock else page.close)
            stack.callback(context.set_offline, False)  # a test that fails may leave it so
            page.set_default_timeout(20_000)
            pages.append((Opened(page, stub, clock), faults))
            return pages[-1][0]

        yield open_page
        for page, faults in pages:
            if not faults:  # browsers write refused requests into the console themselves
                page.check()


# ---- The file ----


def test_the_policy_allows_the_files_own_script_and_style_and_nothing_else():
    body, headers = page_file()
    policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
    for tag, directive in [(b"script", "script-src"), (b"style", "style-src")]:
        (text,) = re.findall(rb"<%b[^>]*>(.*?)</%b>" % (tag, tag), body, re.DOTALL)
        assert policy[directive] == f"'sha256-{base64.b64encode(hashlib.sha256(text).digest()).decode()}'"
    assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == policy["frame-ancestors"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert headers["content-type"] == "text/html; charset=utf-8"
    assert headers["cache-control"] == "no-cache"
    assert re.fullmatch(r'"[0-9a-f]{32}"', headers["etag"])
    assert page_file()[0] is body  # read once


def test_the_file_makes_no_markup_from_text_and_names_no_other_host():
    text = page_file()[0].decode()
    for banned in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "new Function",
        " style=",
        "@import",
    ):
        assert banned not in text, banned
    assert re.findall(r"\son\w+=", text) == []
    assert {*re.findall(r"https?://[^\"' )]+", text)} == {"http://www.w3.org/2000/svg"}  # a name, not an address


def test_its_colours_are_those_of_the_plots():
    from p2l_engine import plotting

    text = page_file()[0].decode().upper()
    assert f"--BLUE: LIGHT-DARK({plotting.BLUE.upper()}," in text
    assert f"--ORANGE: LIGHT-DARK({plotting.ORANGE.upper()}," in text


# ---- A ranking ----


class TestRanking:
    pytestmark = browser_test

    def test_shows_what_the_server_said_of_every_model(self, opened):
        opened = opened()
        opened.rank()
        answer = opened.stub.ranking()
        assert opened.names() == [candidate["model"] for candidate in answer["candidates"]]
        for row, candidate in zip(opened.page.locator("#board tbody tr").all(), answer["candidates"], strict=True):
            rate, coefficient, cost = (row.locator(f".{kind}").inner_text() for kind in ("rate", "coefficient", "cost"))
            assert rate.strip() == f"{100 * candidate['win_rate']:.1f}%"
            assert coefficient == f"{candidate['coefficient']:.2f}"
            assert float(cost.split()[0].removeprefix("$")) == pytest.approx(candidate["expected_cost"], rel=0.005)
            share = row.locator(".bar > span").evaluate("e => e.getBoundingClientRect().width / e.parentNode.clientWidth")
            assert share == pytest.approx(candidate["win_rate"], abs=0.01)
            reasons = row.locator(".reason").all_inner_texts()
            assert reasons == ([] if candidate["allowed"] else [f"Not possible: {candidate['why_not']}"])
        assert opened.text("#chosen") == answer["model"]
        assert opened.text("#why") == answer["why"]
        assert "1,312 tokens" in opened.text("#facts")
        assert opened.text("#board .cost >> nth=1").split("\n") == ["$0.0138", "610 out", "1,024 cached"]

    def test_asks_once_for_a_decision_and_keeps_the_prompt_out_of_addresses(self, opened):
        opened = opened(clock=True)
        opened.rank("sesame street")
        (body,) = opened.stub.asked
        assert body == {"model": "auto", "messages": [{"role": "user", "content": "sesame street"}], "p2l": {"explain": True}}
        assert not any("sesame" in request["address"] for request in opened.stub.headers)

    def test_typing_asks_once_after_a_pause(self, opened):
        opened = opened(clock=True)
        opened.page.locator("#prompt").press_sequentially("twelve")
        opened.page.clock.run_for(500)
        opened.page.locator("#prompt").press_sequentially(" keys.")
        opened.page.clock.run_for(500)
        opened.page.wait_for_timeout(300)
        assert opened.stub.asked == []
        opened.page.clock.run_for(200)
        opened.page.locator("#results").wait_for()
        opened.settled()
        assert [body["messages"][0]["content"] for body in opened.stub.asked] == ["twelve keys."]

    def test_an_example_and_the_button_ask_too(self, opened):
        opened = opened(clock=True)
        opened.page.get_by_role("button", name="What is the capital of France?").click()
        opened.settled()
        opened.page.fill("#prompt", "another one")
        opened.page.get_by_role("button", name="Rank the models").click()
        opened.settled()
        assert [body["messages"][0]["content"] for body in opened.stub.asked] == [
            "What is the capital of France?",
            "another one",
        ]

    @pytest.mark.parametrize("aborts", [True, False])
    def test_an_older_answer_never_overwrites_a_newer_one(self, opened, aborts):
        one, two = (Candidate("old", 0.0, 0.001),), (Candidate("new", 0.0, 0.001),)
        opened = opened(Stub(others={"slow": one, "fast": two}, held={"slow"}), clock=True)
        if not aborts:  # as if the answer had arrived just before
            opened.run("() => { const real = fetch; window.fetch = (path, o) => real(path, { ...o, signal: undefined }); }")
        opened.page.fill("#prompt", "slow")
        opened.page.press("#prompt", "Control+Enter")
        while not opened.stub.asked:
            opened.page.wait_for_timeout(10)
        opened.rank("fast")
        assert opened.names() == ["new"]
        opened.stub.held.clear()
        opened.page.wait_for_timeout(300)
        assert opened.names() == ["new"]
        assert [body["messages"][0]["content"] for body in opened.stub.asked] == ["slow", "fast"]

    def test_says_that_it_waits(self, opened):
        opened = opened(Stub(held={"slow"}))
        opened.rank()
        opened.page.fill("#prompt", "slow")
        opened.page.press("#prompt", "Control+Enter")
        assert opened.text("#progress") == "Ranking the models"
        assert opened.page.get_attribute("#results", "aria-busy") == "true"
        opened.stub.held.clear()
        opened.settled()
        assert re.fullmatch(r"9 models ranked in [\d,]+ ms", opened.text("#progress"))

    @pytest.mark.parametrize(
        ("unit", "short", "long"),
        [
            ("USD", "$0.0138", "$0.004"),
            ("USD per million output tokens", "$0.0138", "$0.004 per million output tokens"),
            ("EUR", "0.0138", "0.004 EUR"),
        ],
    )
    def test_other_units(self, opened, unit, short, long):
        opened = opened(Stub(unit=unit))
        opened.rank()
        assert opened.text("#board .cost >> nth=1").split()[0] == short
        assert opened.text("#mixture-cost") == long
        assert opened.text("#unit") == opened.text("#cost-unit") == unit

    def test_an_empty_prompt_shows_nothing_and_asks_nothing(self, opened):
        opened = opened(clock=True)
        opened.page.press("#prompt", "Control+Enter")
        opened.page.fill("#prompt", "  \n ")
        opened.page.clock.run_for(5000)
        opened.page.wait_for_timeout(300)
        assert opened.stub.asked == []
        opened.rank()
        opened.page.fill("#prompt", "")
        assert opened.page.locator("#results").is_hidden()

    def test_sorts_and_filters(self, opened):
        opened = opened()
        opened.rank()
        names = opened.names()
        opened.page.locator("#board thead").get_by_role("button", name="Cost").click()
        by_cost = sorted(NINE, key=lambda candidate: candidate.cost)
        assert opened.names() == [candidate.model for candidate in by_cost]
        assert opened.texts("#board tbody .rank") == [str(names.index(candidate.model) + 1) for candidate in by_cost]
        assert opened.page.get_attribute("#board th[aria-sort] >> nth=0", "aria-sort") == "ascending"
        opened.page.locator("#board thead").get_by_role("button", name="Model").click()
        assert opened.names() == sorted(names)
        opened.page.locator("#board thead").get_by_role("button", name="Win rate").click()
        assert opened.names() == names
        opened.page.fill("#filter", "GPT")
        assert opened.names() == ["gpt-5.2", "gpt-5-mini"]
        assert opened.texts("#board tbody .rank") == ["2", "6"]
        opened.page.fill("#filter", "no such model")
        assert opened.names() == []
        assert opened.page.locator("#board-empty").is_visible()

    def test_130_models_stay_usable(self, opened):
        opened = opened(Stub(candidates=many()))
        opened.rank()
        assert len(opened.names()) == 20
        button = opened.page.locator("#all")
        assert button.inner_text() == "Show all 130"
        button.click()
        assert len(opened.names()) == 130
        assert button.get_attribute("aria-expanded") == "true"
        assert button.inner_text() == "Show the first 20"
        opened.page.fill("#filter", "claude-1")
        assert {name[:8] for name in opened.names()} == {"claude-1"}
        assert opened.page.locator("#chart circle").count() == len(opened.stub.allowed())


# ---- Budgets ----

ODD = {
    "one": (Candidate("a", 0.3, 0.002),),
    "one may": (Candidate("a", 0.3, 0.002), Candidate("b", 0.9, 0.001, "it is asleep")),
    "none may": (Candidate("a", 0.3, 0.002, "it is asleep"), Candidate("b", 0.9, 0.001, "it is asleep")),
    "equal costs": tuple(Candidate(name, x, 0.002) for name, x in [("a", 0.1), ("b", 0.4), ("c", -0.2)]),
    "all free": tuple(Candidate(name, x, 0.0) for name, x in [("a", 0.1), ("b", 0.4), ("c", -0.2)]),
    "some free": tuple(Candidate(name, x, c) for name, x, c in [("a", 0.1, 0.0), ("b", 0.4, 0.002), ("c", -0.2, 0.0)]),
    "one positive": tuple(Candidate(name, x, c) for name, x, c in [("a", 0.1, 0.0), ("b", -0.4, 3e-5), ("c", -0.2, 0.0)]),
    "equal models": tuple(Candidate(name, 0.5, 0.002) for name in "abc"),
    "equal rates": tuple(Candidate(name, 0.5, c) for name, c in [("a", 0.1), ("b", 0.01), ("c", 1e-4)]),
    "near costs": tuple(Candidate(name, x, 0.01 + c) for name, x, c in [("a", 0.1, 0), ("b", 0.2, 1e-15), ("c", 0.3, 2e-12)]),
    "fourteen orders": tuple(Candidate(name, x, c) for name, x, c in [("a", -1, 1e-12), ("b", 0.2, 1e-5), ("c", 0.3, 150.0)]),
    "far apart": tuple(Candidate(name, x, c) for name, x, c in [("a", -40, 1e-5), ("b", 0, 1e-4), ("c", 40, 1e-3)]),
    "huge": tuple(Candidate(name, x, c) for name, x, c in [("a", 0, 1e10), ("b", 1, 3e13)]),
}


def assert_optimal(opened, budget):
    """The page's mixture against the LP's best policy, by HiGHS, for the models that may take the prompt."""
    policy, cost, rate = opened.mixture()
    best, best_rate, _ = opened.stub.best(budget)
    assert sum(policy.values()) == pytest.approx(1, abs=1e-12)
    assert rate == pytest.approx(best_rate, rel=1e-9, abs=1e-12)
    assert cost <= budget * (1 + 1e-12)
    rates = {candidate.model: r for candidate, r in zip(opened.stub.candidates, opened.stub.win_rates(), strict=True)}
    costs = {candidate.model: candidate.cost for candidate in opened.stub.candidates}
    assert sum(p * rates[name] for name, p in policy.items()) == pytest.approx(rate, rel=1e-9)
    assert sum(p * costs[name] for name, p in policy.items()) == pytest.approx(cost, rel=1e-9, abs=1e-300)
    return policy, best


class TestBudget:
    pytestmark = browser_test

    def test_the_slider_moves_the_mixture_by_keyboard(self, opened):
        opened = opened()
        opened.rank()
        slider = opened.page.locator("#budget")
        slider.focus()
        seen = []
        for key in (
            "Home",
            "End",
            "ArrowLeft",
            "PageDown",
            "PageDown",
            "PageDown",
            "PageDown",
            "ArrowRight",
            "PageDown",
            "Home",
            "ArrowUp",
        ):
            slider.press(key)
            budget = opened.run("state.budget")
            policy, best = assert_optimal(opened, budget)
            assert policy == pytest.approx(best, abs=1e-9)
            assert dict(zip(opened.texts("#parts li > span:first-child"), opened.texts("#parts .number"), strict=True)) == {
                name: "100%" if p == 1 else f"{100 * p:.1f}%" for name, p in policy.items()
            }
            spoken = slider.get_attribute("aria-valuetext")
            assert all(name in spoken for name in policy)
            seen.append(budget)
        allowed = [candidate.cost for candidate in NINE if candidate.why_not is None]
        assert seen[0] == min(allowed)  # to the last digit: the ends are models' costs
        assert seen[1] == max(allowed)
        assert seen[1] > seen[2] > seen[3] > seen[6]
        assert seen[-1] > seen[0]

    def test_shows_the_mixtures_cost_win_rate_and_shares(self, opened):
        opened = opened()
        opened.rank()
        opened.page.fill("#amount", "0.002")
        policy, rate, cost = opened.stub.best(0.002)
        assert opened.text("#mixture-cost") == f"${cost:g}"
        assert opened.text("#mixture-rate") == f"{100 * rate:.1f}%"
        badges = opened.run(
            "[...document.querySelectorAll('#board .share')].map((e) => [e.closest('tr').dataset.model, e.textContent])"
        )
        assert dict(badges) == {name: f"{100 * p:.1f}%" for name, p in policy.items()}
        best = max(opened.stub.win_rates())
        assert (
            f"{100 * (best - rate):.1f} points below the best model, claude-sonnet-5, at {100 * cost / 0.0138:.1f}% of its cost"
            in opened.text("#summary")
        )
        at = float(opened.page.input_value("#budget")) / 1000
        assert opened.run(f"state.scale.cost({at})") == pytest.approx(0.002, rel=0.01)

    def test_begins_with_the_servers_own_decision_and_keeps_the_users_budget(self, opened):
        opened = opened(Stub(budget=0.0031))
        opened.rank()
        assert opened.run("state.budget") == pytest.approx(0.0031)
        assert opened.mixture()[0] == pytest.approx(opened.stub.ranking()["policy"])
        opened.page.fill("#amount", "0.0007")
        opened.rank("another prompt")
        assert opened.run("state.budget") == 0.0007
        assert opened.page.input_value("#amount") == "0.0007"

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("", "a number"),
            ("-1", "a number"),
            ("1e999", "a number"),
            ("cheap", "a number"),
            ("0,002", "a number"),
            ("0", "the cheapest costs $0.000054"),
        ],
    )
    def test_refuses_what_is_no_budget(self, opened, text, said):
        opened = opened()
        opened.rank()
        opened.page.fill("#amount", text)
        assert said in opened.text("#amount-problem")
        assert opened.page.get_attribute("#amount", "aria-invalid") == "true"
        opened.page.press("#amount", "Tab")
        assert opened.page.get_attribute("#amount", "aria-invalid") == "false"  # back to the budget that holds
        assert float(opened.page.input_value("#amount")) > 0

    @pytest.mark.parametrize("name", ODD)
    def test_odd_costs_break_nothing(self, opened, name):
        opened = opened(Stub(candidates=ODD[name], budget=None))
        opened.rank()
        allowed = [candidate.cost for candidate in ODD[name] if candidate.why_not is None]
        if not allowed:
            assert opened.page.locator("#chart").is_hidden()
            return
        assert opened.page.locator("#budget").is_disabled() == (min(allowed) == max(allowed))
        for position in (0, 1, 250, 500, 999, 1000):
            opened.run("(position) => { $('budget').value = position; slid(); }", position)
            assert_optimal(opened, opened.run("state.budget"))
            assert "NaN" not in opened.run("$('results').outerHTML")
            assert "Infinity" not in opened.run("$('results').outerHTML")
        assert opened.text("#summary") != ""

    def test_any_costs_and_any_budget(self, opened, rng):
        opened = opened()
        for k in range(12):
            count = int(rng.integers(2, 40))
            coefficients = rng.normal(0, rng.choice([0.01, 1, 8]), count)
            costs = 10 ** rng.uniform(-6, rng.choice([-5.5, -1]), count) * (rng.random(count) > 0.1)
            if k % 3 == 0:
                costs, coefficients = np.round(costs, 4), np.round(coefficients, 1)  # many are equal
            models = tuple(
                Candidate(f"m{i}", float(x), float(c)) for i, (x, c) in enumerate(zip(coefficients, costs, strict=True))
            )
            opened.stub.candidates = models
            opened.rank(f"prompt {k}")
            for budget in [*rng.uniform(0, costs.max(), 3), *rng.choice(costs, 3), costs.max() * 2]:
                opened.run("(budget) => setBudget(budget)", float(budget))
                assert_optimal(opened, max(float(budget), float(costs.min())))

    @pytest.mark.parametrize(("factor", "logarithmic"), [(20, False), (21, True)])
    def test_costs_that_span_orders_of_magnitude_are_logarithmic(self, opened, factor, logarithmic):
        opened = opened(Stub(candidates=(Candidate("a", 0.0, 0.001), Candidate("b", 1.0, 0.001 * factor)), budget=None))
        opened.rank()
        assert ("(logarithmic)" in opened.text("#chart")) == logarithmic
        middle = opened.run("state.scale.cost(0.5)")
        assert (middle < 0.4 * 0.001 * factor) == logarithmic
        assert opened.run("(cost) => state.scale.at(cost)", middle) == pytest.approx(0.5)

    def test_the_chart_is_the_frontier(self, opened):
        opened = opened()
        opened.rank()
        frontier = opened.stub.frontier()
        assert opened.page.locator("#chart .vertex").count() == len(frontier)
        assert opened.page.locator("#chart .other").count() == len(opened.stub.allowed()) - len(frontier)
        places = opened.run(PLACES_OF_VERTICES)
        assert all(a[0] < b[0] and a[1] > b[1] for a, b in pairwise(places))
        described = opened.page.get_attribute("#chart svg", "aria-label")
        assert f"{len(frontier)} models: {frontier[0]['model']}" in described
        assert frontier[-1]["model"] in described
        titles = opened.page.locator("#chart .vertex title").all_text_contents()
        assert [title.split(":")[0] for title in titles] == [vertex["model"] for vertex in frontier]

    def test_the_chart_follows_the_width(self, opened):
        opened = opened()
        opened.rank()
        opened.page.set_viewport_size(NARROW)
        opened.page.wait_for_function("() => document.querySelector('#chart svg').viewBox.baseVal.width < 330")
        opened.check()

    @pytest.mark.parametrize("models", [NINE, many(), HOSTILE, *ODD.values()])
    def test_no_text_in_the_chart_covers_another(self, opened, models):
        opened = opened(Stub(candidates=models, budget=None))
        opened.rank()
        for viewport in (WIDE, NARROW):
            opened.page.set_viewport_size(viewport)
            opened.run("drawChart(state.budget)") if opened.stub.allowed() else None
            boxes, width = opened.run(TEXTS_OF_CHART)
            assert opened.stub.allowed() == [] or len(boxes) > 3
            for i, (text, x, y, w, h) in enumerate(boxes):
                assert x >= 0, text
                assert x + w <= width + 1, text
                for other, x2, y2, w2, h2 in boxes[:i]:
                    assert x >= x2 + w2 or x2 >= x + w or y >= y2 + h2 - 3 or y2 >= y + h - 3, (text, other)


# ---- When things fail ----


class TestFailures:
    pytestmark = browser_test

    @pytest.mark.parametrize(
        ("failure", "said"),
        [
            ((400, {"error": {"message": "messages: expected a turn"}}, {}), "messages: expected a turn"),
            ((503, {"error": {"message": "The queue is full."}}, {"retry-after": "7"}), "The queue is full. Try again in 7 s."),
            ((502, "<html><b>Bad gateway</b></html>", {}), "The server answered 502."),
            ((500, {"error": {"message": 7}}, {}), "The server answered 500."),
            ((500, {"error": "broken"}, {}), "The server answered 500."),
            ((200, "<html>hello</html>", {}), "The server's answer is not JSON."),
            ((200, {"id": "dec_0"}, {}), "The server's answer has no leaderboard."),
            ((200, "null", {}), "The server's answer is not JSON."),
        ],
    )  # fmt: skip
    def test_says_what_went_wrong_and_goes_on(self, opened, failure, said):
        opened = opened(faults=True)
        opened.rank()
        opened.stub.failures["/v1/route"] = failure
        opened.page.fill("#prompt", "again")
        opened.page.press("#prompt", "Control+Enter")
        opened.page.locator("#problem").wait_for()
        assert opened.text("#problem") == said
        assert opened.page.get_attribute("#problem", "role") == "alert"
        assert opened.page.locator("#results").is_hidden()  # they were another prompt's
        opened.stub.failures.clear()
        opened.rank()
        assert opened.page.locator("#problem").is_hidden()
        assert len(opened.names()) == 9

    def test_says_that_the_server_is_away_and_that_it_is_back(self, opened):
        opened = opened(faults=True)
        opened.page.locator("#connection[data-state=live]").wait_for()
        opened.page.context.set_offline(True)
        opened.page.locator("#connection[data-state=away]").wait_for()
        assert re.search(
            r"The server does not answer\. What is below is of \d\d:\d\d:\d\d\. Trying again\.", opened.text("#connection")
        )
        assert opened.page.locator("#recent tbody tr").count() == 12
        opened.page.fill("#prompt", "anybody?")
        opened.page.press("#prompt", "Control+Enter")
        opened.page.locator("#problem").wait_for()
        assert opened.text("#problem") == "The server does not answer."
        opened.page.context.set_offline(False)
        opened.page.locator("#connection[data-state=live]").wait_for()
        assert opened.text("#connection") == "Connected"

    def test_a_status_that_cannot_be_read_is_said(self, opened):
        opened = opened(Stub(failures={"/v1/status": (200, {"version": "1", "started": 0}, {})}), faults=True)
        opened.page.locator("#connection[data-state=away]").wait_for()
        assert "status could not be read" in opened.text("#connection")
        polls = len(opened.stub.polls)
        while len(opened.stub.polls) < polls + 2:  # nor the next time
            opened.page.wait_for_timeout(100)
        assert "status could not be read" in opened.text("#connection")

    def test_asks_for_a_key_and_keeps_it_in_the_tab_alone(self, opened):
        opened = opened(Stub(key="secret-7"), faults=True)
        page = opened.page
        page.locator("#key-form").wait_for()
        assert page.evaluate("document.activeElement.id") == "key"
        page.fill("#key", "wrong")
        page.press("#key", "Enter")
        page.get_by_text("The server refused this key.").wait_for()
        page.fill("#key", "with space")
        page.press("#key", "Enter")
        assert "A key has no spaces" in opened.text("#key-problem")
        page.fill("#key", "secret-7")
        page.press("#key", "Enter")
        page.locator("#connection[data-state=live]").wait_for()
        assert page.locator("#key-form").is_hidden()
        opened.rank()
        assert len(opened.names()) == 9
        assert page.evaluate("Object.values(sessionStorage)") == ["secret-7"]
        assert page.evaluate("Object.values(localStorage)") == []
        assert page.evaluate("document.cookie") == ""
        assert page.url == opened.stub.url
        assert not any("secret-7" in request["address"] for request in opened.stub.headers)
        assert "secret-7" not in page.content()
        page.reload()
        page.locator("#connection[data-state=live]").wait_for()
        page.locator("#forget").click()
        page.locator("#key-form").wait_for()
        assert page.evaluate("Object.values(sessionStorage)") == []
        polls = len(opened.stub.polls)
        page.wait_for_timeout(2500)
        assert len(opened.stub.polls) == polls  # without a key it does not knock again and again

    @pytest.mark.parametrize("how", ["forgotten", "revoked", "forgotten while the server is away"])
    def test_what_a_key_was_told_goes_with_it(self, opened, how):
        opened = opened(Stub(key="secret-7"), faults=True)
        page, stub = opened.page, opened.stub
        page.fill("#key", "secret-7")
        page.press("#key", "Enter")
        page.locator("#connection[data-state=live]").wait_for()
        opened.rank()
        assert stub.candidates[0].model in opened.text("main")
        if how == "revoked":
            stub.key = "other"
        else:
            if "away" in how:
                page.context.set_offline(True)
            page.locator("#forget").click()
        page.locator("#live-empty").wait_for()
        if "away" not in how:
            page.locator("#key-form").wait_for()
        for selector in ("#live-view", "#results"):
            assert page.locator(selector).is_hidden()
        shown = page.locator("body").evaluate("e => [...e.querySelectorAll('main, footer')].map((e) => e.textContent).join()")
        assert not any(candidate.model in shown for candidate in stub.candidates)
        assert "$" not in opened.text("main")
        page.context.set_offline(False)
        page.locator("#key-form").wait_for()
        page.fill("#key", stub.key)
        page.press("#key", "Enter")
        page.locator("#live-view").wait_for()
        page.locator("#results").wait_for()  # the prompt is still there
        assert stub.candidates[0].model in opened.text("main")

    def test_an_answer_to_an_earlier_key_is_dropped(self, opened):
        opened = opened(Stub(key="secret-7"), faults=True)
        page, stub = opened.page, opened.stub
        page.locator("#key-form").wait_for()
        page.fill("#key", "secret-6")
        stub.slow = True
        page.press("#key", "Enter")  # its refusal comes after the next key
        while len(stub.polls) < 2:
            page.wait_for_timeout(10)
        page.evaluate("key => { $('key').value = key; useKey(new Event('submit')); }", "secret-7")
        stub.slow = False
        page.locator("#connection[data-state=live]").wait_for()
        page.wait_for_timeout(100)
        assert page.locator("#key-form").is_hidden()
        assert page.locator("#live-view").is_visible()

    def test_hostile_names_are_text(self, opened):
        for viewport in (WIDE, NARROW):
            page = opened(Stub(candidates=HOSTILE), viewport=viewport)
            page.rank()
            page.page.locator("#live-view").wait_for()
            assert page.names() == [candidate.model.replace("\u202e", "\ufffd") for candidate in HOSTILE]
            assert page.run("window.hacked === undefined")
            assert page.page.locator("main :is(img, iframe, script, object, embed), main a[href^=javascript]").count() == 0
            assert page.texts("#health > li > div")[0].endswith(HOSTILE[0].model)

    def test_markup_and_handlers_from_text_are_blocked(self, opened):
        opened = opened(faults=True)
        for script in ("document.body.innerHTML = '<b>x</b>'", "document.body.setAttribute('onclick', 'window.hacked = 1')"):
            with pytest.raises(playwright.Error, match="Trusted"):
                opened.run(f"() => {{ {script}; }}")
        opened.run("() => { fetch('https://example.com/').catch(() => 0); }")
        opened.page.wait_for_function("() => window.violations.includes('connect-src')")
        assert opened.hosts <= {opened.stub.url, "data:image/"}


# ---- Live view ----


class TestLive:
    pytestmark = browser_test

    def test_shows_spending_health_and_decisions(self, opened):
        opened = opened()
        opened.page.locator("#live-view").wait_for()
        meters = opened.page.get_by_role("meter")
        for meter, limit in zip(meters.all(), opened.stub.limits, strict=False):
            assert meter.get_attribute("aria-label") == limit["limit"]
            assert float(meter.get_attribute("aria-valuenow")) == limit["spent"]
            assert float(meter.get_attribute("aria-valuemax")) == limit["amount"]
            spent, reserved = (
                meter.locator(".bar > span").nth(i).evaluate("e => e.getBoundingClientRect().width / e.parentNode.clientWidth")
                for i in (0, 1)
            )
            assert spent == pytest.approx(limit["spent"] / limit["amount"], abs=0.01)
            assert reserved == pytest.approx(limit["reserved"] / limit["amount"], abs=0.01)
        assert meters.count() == 4
        assert "$14.20 of $20.00" in opened.text("#spending")
        assert "$4.70 left, $1.10 reserved until" in opened.text("#spending")
        assert "used up" in opened.text("#spending .meter >> nth=2")
        assert "$0.00371 of $0.004" in opened.text("#spending")
        assert "us: cooling for 12 s, 3 failures" in opened.text("#health")
        assert opened.text("#healthy summary") == "7 models without trouble"
        first = opened.stub.status()["recent"][0]
        row = " ".join(opened.text("#recent tbody tr >> nth=0").split())
        assert first["model"] in row
        assert f"{100 * first['win_rate']:.1f}%" in row
        assert "failed (503)" in opened.text("#recent")
        assert "about $" in opened.text("#recent")  # an estimate says so
        opened.page.get_by_role("button", name="Show the last 50").click()
        assert opened.page.locator("#recent tbody tr").count() == 50
        assert "up 3 h" in opened.text("footer")
        assert "76.0% of the time" in opened.text("footer")

    def test_an_idle_server_without_limits(self, opened):
        opened = opened(Stub(limits=[], pacer=None, recent=[], health={}))
        opened.page.locator("#live-view").wait_for()
        assert opened.text("#recent-empty") == "None yet."
        assert opened.text("#spending") == "No limit and no mean budget is set."
        assert opened.text("#healthy summary") == "9 models without trouble"

    def test_a_request_that_no_model_took_and_a_single_vote(self, opened):
        stub = Stub()
        stub.recent = [{**stub.status()["recent"][0], "model": "", "outcome": "refused", "status": 400, "win_rate": None}]
        stub.learning = {"learned": 1, "waiting": 0, "failures": 1}
        opened = opened(stub)
        opened.page.locator("#live-view").wait_for()
        assert opened.text("#recent .name") == "none"
        assert "Learned from 1 vote, 1 failure." in opened.text("footer")

    def test_unusual_amounts(self, opened):
        limit = {"limit": "none at all", "amount": 0.0, "spent": 0.0, "reserved": 0.0, "left": 0.0, "ends": None}
        over = {"limit": "over", "amount": 1.0, "spent": 1.5, "reserved": 0.2, "left": 0.0, "ends": None}
        unbounded = {"limit": "a day", "amount": None, "spent": 3.5, "reserved": 0.0, "left": None, "ends": None}
        pacer = {"budget": 0.002, "mean_cost": None, "count": 0}
        opened = opened(Stub(limits=[limit, over, unbounded], pacer=pacer))
        opened.page.locator("#live-view").wait_for()
        assert opened.text("#spending .meter >> nth=2").split("\n")[:2] == ["a day", "$3.50"]
        assert "$0 of $0.002" in opened.text("#spending .meter >> nth=3")
        assert opened.page.get_by_role("meter").count() == 3
        assert "NaN" not in opened.run("$('spending').outerHTML")
        assert [meter.get_attribute("aria-valuenow") for meter in opened.page.get_by_role("meter").all()][:2] == ["0", "1"]
        assert opened.text("#spending").count("used up") == 2

    def test_follows_the_server_and_leaves_the_focus_alone(self, opened):
        opened = opened()
        opened.page.locator("#live-view").wait_for()
        summary = opened.page.locator("#healthy summary")
        summary.click()
        summary.focus()
        opened.stub.health = {}
        opened.page.get_by_text("9 models without trouble").wait_for()
        assert opened.page.locator("#healthy li").first.is_visible()  # still open
        assert opened.run("document.activeElement.tagName") == "SUMMARY"

    def test_looks_every_two_seconds_and_not_while_hidden(self, opened):
        opened = opened(clock=True)
        self.polled(opened, 1)
        for count in (2, 3):
            opened.page.clock.run_for(1900)
            opened.page.wait_for_timeout(200)
            self.polled(opened, count - 1)
            opened.page.clock.run_for(100)
            self.polled(opened, count)
        opened.run(HIDE, True)
        opened.page.clock.run_for(20_000)
        opened.page.wait_for_timeout(200)
        self.polled(opened, 3)
        opened.run(HIDE, False)
        self.polled(opened, 4)

    def test_leaves_what_has_not_changed_as_it_is(self, opened):
        opened = opened(Stub(recent=Stub().status()["recent"]), clock=True)
        self.polled(opened, 1)
        opened.run("() => { window.row = document.querySelector('#recent tbody tr'); }")  # a user selects text in it
        opened.page.clock.run_for(2000)
        self.polled(opened, 2)
        assert opened.run("window.row.isConnected")

    @staticmethod
    def polled(opened, count):
        """Waits until the page has read the status this often, and no more."""
        deadline = time.monotonic() + 20
        while len(opened.stub.polls) < count or opened.run("live.asking !== null"):
            assert time.monotonic() < deadline
            opened.page.wait_for_timeout(10)
        assert len(opened.stub.polls) == count


# ---- The real server ----


class TestServer:
    """The page in front of the server itself, with a mock provider behind it."""

    pytestmark = browser_test

    @pytest.fixture
    def server(self):
        """Its address, and its engine; a thread runs it. It asks for the key k1, and one of its models is down."""
        ready, stop = queue.Queue(), asyncio.Event()

        async def run():
            loop = asyncio.get_running_loop()
            async with MockProvider({name: price[:2] for name, price in PRICES.items()}) as provider:
                provider.fail("status", model="medium", status=503)
                keys = [{"id": "team", "sha256": hashlib.sha256(b"k1").hexdigest()}]
                async with serving(config_for(provider, budget=0.0002, keys=keys)) as running:
                    ready.put((running.url, loop))
                    await stop.wait()

        thread = threading.Thread(target=asyncio.run, args=(run(),))
        thread.start()
        url, loop = ready.get(timeout=60)
        yield url
        loop.call_soon_threadsafe(stop.set)
        thread.join()

    def test_a_key_a_request_a_ranking_and_a_budget(self, chromium, server):
        context = chromium.new_context(viewport=WIDE, reduced_motion="reduce")
        page = context.new_page()
        answers = []
        page.on("response", lambda response: response.url.endswith("/v1/route") and answers.append(response))
        page.on("pageerror", lambda error: answers.append(error))
        page.goto(server)
        page.fill("#key", "k1")
        page.press("#key", "Enter")
        page.locator("#connection[data-state=live]").wait_for()
        sent = context.request.post(
            f"{server}/v1/chat/completions",
            headers={"authorization": "Bearer k1"},
            data={"model": "medium", "messages": [{"role": "user", "content": "hello"}]},
        )
        assert sent.status == 503
        page.get_by_text("failed (503)").wait_for()
        page.fill("#prompt", PROMPT)
        page.press("#prompt", "Control+Enter")
        page.locator("#results[aria-busy=false]").wait_for()
        answer = answers[-1].json()
        assert page.locator("#board tbody .name").all_text_contents() == [row["model"] for row in answer["candidates"]]
        assert [row["model"] for row in answer["candidates"]] == ["large", "medium", "small"]
        assert page.locator("#chosen").inner_text() == answer["model"]
        assert page.locator(".reason").count() == sum(not row["allowed"] for row in answer["candidates"]) == 1
        allowed = [row for row in answer["candidates"] if row["allowed"]]
        v, costs = (np.array([row[name] for row in allowed]) for name in ("win_rate", "expected_cost"))
        for budget in (costs.min(), costs.mean(), costs.max()):
            page.evaluate("(budget) => setBudget(budget)", float(budget))
            best = routing.solve_budget(v[None], costs, float(budget), solver="highs")
            assert page.evaluate("state.mixture.winRate") == pytest.approx(float(best.value[0]), rel=1e-9)
        assert not any(isinstance(answer, Exception) for answer in answers)
        context.close()


# ---- Accessibility ----


class TestAccessibility:
    pytestmark = browser_test

    @pytest.mark.parametrize("scheme", ["light", "dark"])
    @pytest.mark.parametrize("viewport", [WIDE, NARROW], ids=["wide", "narrow"])
    def test_all_text_has_contrast(self, opened, scheme, viewport):
        opened = opened(color_scheme=scheme, viewport=viewport)
        opened.rank()
        opened.page.locator("#live-view").wait_for()
        opened.run(SHOW_PROBLEMS)
        found = opened.run(CONTRAST)
        assert len(found) > 100
        assert [(round(ratio, 2), text) for ratio, text in found if ratio < 4.5] == []

    def test_dark_and_light(self, opened):
        opened = opened(color_scheme="dark")
        ground = "getComputedStyle(document.body).backgroundColor"
        assert opened.run(ground) == "rgb(19, 22, 26)"
        opened.page.get_by_role("button", name="Light theme").click()
        assert opened.run(ground) == "rgb(245, 246, 248)"
        opened.page.reload()
        assert opened.run(ground) == "rgb(245, 246, 248)"
        opened.page.get_by_role("button", name="Dark theme").click()
        assert opened.run(ground) == "rgb(19, 22, 26)"

    def test_follows_the_systems_theme(self, opened):
        opened = opened(color_scheme="light")
        assert opened.page.get_by_role("button", name="Dark theme").is_visible()
        opened.page.emulate_media(color_scheme="dark")
        opened.page.get_by_role("button", name="Light theme").wait_for()

    def test_every_control_has_a_name_and_every_reference_a_target(self, opened):
        opened = opened(Stub(candidates=many()))
        opened.rank()
        opened.page.locator("#live-view").wait_for()
        assert opened.run(UNNAMED) == []
        assert opened.run(DANGLING) == []
        ids = opened.run("[...document.querySelectorAll('[id]')].map((e) => e.id)")
        assert len(ids) == len(set(ids))
        levels = opened.run("[...document.querySelectorAll('h1, h2, h3, h4')].map((e) => Number(e.tagName[1]))")
        assert levels[0] == 1
        assert levels.count(1) == 1
        assert all(b - a <= 1 for a, b in pairwise(levels))
        assert opened.run("document.documentElement.lang") == "en"
        assert opened.page.get_by_role("table", name="Leaderboard of this prompt").count() == 1
        assert opened.page.get_by_role("rowheader").count() == 20

    def test_the_keyboard_alone_is_enough_and_shows_where_it_is(self, opened):
        opened = opened()
        keyboard, reached = opened.page.keyboard, []
        opened.page.locator("#live-view").wait_for()

        def on(name):
            """Tabs to this control; every one on the way shows that it has the focus."""
            for _ in range(30):
                keyboard.press("Tab")
                name_here, outline = opened.run(FOCUS)
                assert outline != "none", name_here
                reached.append(name_here)
                if name_here == name:
                    return
            raise AssertionError(f"no {name} after {reached}")

        on("prompt")
        assert reached == ["Skip to the prompt", "Prompt", "Live", "theme", "prompt"]
        keyboard.type("by keyboard")
        keyboard.press("Control+Enter")
        opened.settled()
        on("filter")
        on("budget")
        before = opened.run("state.budget")
        keyboard.press("ArrowRight")
        assert opened.run("state.budget") > before
        on("amount")
        on("recent-all")
        keyboard.press("Enter")
        assert opened.page.locator("#recent tbody tr").count() == 50
        on("7 models without trouble")
        keyboard.press("Enter")
        assert opened.page.locator("#healthy li").first.is_visible()

    def test_the_skip_link_leads_to_the_prompt(self, opened):
        opened = opened()
        opened.page.keyboard.press("Tab")
        assert opened.page.get_by_text("Skip to the prompt").bounding_box()["x"] >= 0
        opened.page.keyboard.press("Enter")
        assert opened.run("document.activeElement.id") == "prompt"

    def test_less_motion_where_it_is_asked_for(self, opened):
        opened = opened()
        behaviour = "getComputedStyle(document.documentElement).scrollBehavior"
        assert opened.run(behaviour) == "auto"
        opened.page.emulate_media(reduced_motion="no-preference")
        assert opened.run(behaviour) == "smooth"

    @pytest.mark.parametrize("models", [NINE, many(), HOSTILE, LONG_COSTS])
    def test_no_width_needs_sideways_scrolling_and_no_cost_leaves_its_column(self, opened, models):
        opened = opened(Stub(candidates=models))
        opened.rank()
        opened.page.locator("#live-view").wait_for()
        for width in (320, 360, 560, 561, 768, 920, 921, 1920):
            opened.page.set_viewport_size({"width": width, "height": 700})
            opened.page.wait_for_timeout(100)
            assert opened.run(OUTSIDE) == [], width
            assert opened.run(WIDE_COSTS) == [], width

    def test_an_unchanged_page_is_not_sent_twice(self, opened):
        import urllib.error
        import urllib.request

        opened = opened()
        request = urllib.request.Request(opened.stub.url, headers={"if-none-match": page_file()[1]["etag"]})
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request)
        assert refused.value.code == 304
