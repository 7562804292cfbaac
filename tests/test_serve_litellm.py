"""The LiteLLM plugin: what it asks the router, what it does when that fails, and the whole of it in a real LiteLLM proxy."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import re
import shutil
import socket
import subprocess
import sys
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace

import aiohttp
import openai
import pytest
import yaml

from bench.mock_provider import MockProvider
from p2l_engine.serve import litellm as plugin
from p2l_engine.serve.gate import Gate
from p2l_engine.serve.litellm import ModelChoice, Refusal
from p2l_engine.serve.litellm_in_process import RouterChoice
from p2l_engine.serve.settings import Key
from tests.support.serving import PRICES, FixedEngine, config_for, serving

pytestmark = pytest.mark.slow  # many cases: all together take longer than the fast tests may

HELLO = [{"role": "user", "content": "Hello, who are you?"}]
RELEASE = "1.108.7"  # never 1.82.7 or 1.82.8, which were compromised
SECRET = "sk-p2l-test"
KEYS = [{"id": "litellm", "sha256": hashlib.sha256(SECRET.encode()).hexdigest()}]


def chosen(data, own=(), call_type="acompletion", key=None, url=None, engine=None, serve=None, **settings):
    """A request after the plugin has seen it, and the server's records."""

    async def run():
        async with MockProvider(PRICES) as provider, serving(config_for(provider, **(serve or {})), engine) as server:
            choice = ModelChoice(url or server.url, key, **settings)
            try:
                await choice.set_model(data, call_type, own)
            finally:
                await choice.close()
            return data, server.records

    return asyncio.run(run())


def test_the_alias_becomes_the_model_that_the_router_chose():
    data = {"model": "auto", "messages": HELLO, "temperature": 0, "metadata": {"user_api_key": object()}}
    found, (record,) = chosen(data)
    assert found["model"] == record.chosen == "large"
    assert found["fallbacks"] == ["medium", "small"]
    assert found["messages"] is HELLO
    assert found["metadata"]["p2l"]["id"] == record.id
    assert found["metadata"]["p2l"]["policy"] == {"large": 1.0}
    assert (found["metadata"]["p2l"]["propensity"], found["metadata"]["p2l"]["propensity_error"]) == (1.0, 0.0)
    assert (record.api, record.outcome) == ("route", "decision")


def test_other_models_and_other_calls_are_left_alone():
    for data, call_type in (
        ({"model": "small", "messages": HELLO}, "acompletion"),
        ({"model": "auto", "input": "x"}, "aembedding"),
    ):
        before = dict(data)
        assert chosen(data, call_type=call_type) == (before, [])


@pytest.mark.parametrize(
    ("body", "call_type"),
    [
        ({"input": [{"type": "message", "role": "user", "content": "Hello"}], "instructions": "Be kind."}, "aresponses"),
        ({"messages": HELLO, "system": [{"type": "text", "text": "Be kind."}], "max_tokens": 9}, "anthropic_messages"),
        ({"messages": HELLO, "tools": [{"type": "function", "function": {"name": "f"}}]}, "acompletion"),
    ],
)
def test_requests_of_all_three_apis_are_routed(body, call_type):
    found, records = chosen({"model": "auto", **body}, call_type=call_type)
    assert found["model"] == "large"
    assert len(records) == 1


def test_what_a_request_needs_decides_who_may_take_it():
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]}]

    async def run():
        config = config_for("http://127.0.0.1:1/v1", {"large": {"accepts": ["text"]}})
        async with serving(config) as server:
            choice, data = ModelChoice(server.url), {"model": "auto", "messages": image}
            await choice.set_model(data, "acompletion")
            await choice.close()
            return data["model"]

    assert asyncio.run(run()) == "medium"


def test_the_callers_wishes_reach_the_router_and_no_provider():
    data = {"model": "auto", "messages": HELLO, "p2l": {"budget": 0.0002}, "fallbacks": ["mine"]}
    data["proxy_server_request"] = {"headers": {"X-P2L-Models": "small,medium", "Authorization": "Bearer sk-1", "X-Other": "1"}}
    data["litellm_session_id"] = "session 1"
    found, (record,) = chosen(data)
    assert "p2l" not in found
    assert found["fallbacks"] == ["mine"]
    assert record.budget == 0.0002
    assert set(record.candidates) == {"small", "medium"}
    _, (other,) = chosen({"model": "auto", "messages": [*HELLO, *HELLO], "litellm_session_id": "session 1"})
    assert other.session == record.session


@pytest.mark.parametrize(
    ("own", "model"),
    [
        (["auto", "small"], "small"),
        (["auto", "cheap-*", "small"], "cheap-medium"),
        (["auto"], "large"),
        (["all-proxy-models"], "large"),
        ([], "large"),
    ],
)
def test_a_key_of_litellms_never_gets_a_model_that_it_may_not_use(own, model):
    found, _ = chosen({"model": "auto", "messages": HELLO}, own, names={"medium": "cheap-medium"})
    assert found["model"] == model
    if "small" in own:
        assert set(found.get("fallbacks", [])) <= {"small", "cheap-medium"}


def test_a_key_that_may_use_no_model_of_the_router_is_refused():
    with pytest.raises(Refusal, match="none of the models that this key may use") as caught:
        chosen({"model": "auto", "messages": HELLO}, ["auto", "gpt-9"])
    assert caught.value.status == 400
    with pytest.raises(Refusal, match="p2l.models"):
        chosen({"model": "auto", "messages": HELLO, "p2l": {"models": ["large"]}}, ["auto", "small"])


def test_what_the_router_refuses_is_the_callers_error():
    with pytest.raises(Refusal, match="budget") as caught:
        chosen({"model": "auto", "messages": HELLO, "p2l": {"budget": 1e-12}}, fallback="small")
    assert caught.value.status == 402
    for status, match, body in (
        (400, "messages", {"messages": []}),
        (404, "previous_response_id", {"input": "x", "previous_response_id": "r"}),
    ):
        with pytest.raises(Refusal, match=match) as caught:
            chosen({"model": "auto", **body}, fallback="small", call_type="aresponses")
        assert caught.value.status == status


def nested(depth):
    found = 1
    for _ in range(depth):
        found = [found]
    return found


@pytest.mark.parametrize(
    ("more", "status", "match"),
    [
        ({"messages": [{"role": "user", "content": "x" * 2**20}]}, 413, "at most 1048576 bytes"),
        ({"tools": nested(300)}, 400, "nested at most 250"),
        ({"tools": nested(100_000)}, 400, "JSON .RecursionError"),
        ({"tools": [object()]}, 400, "JSON .TypeError"),
        ({"max_tokens": float("nan")}, 400, "JSON .ValueError"),
        ({"p2l": "budget"}, 400, "p2l: expected an object, got str"),
        ({"p2l": {"models": "small"}}, 400, "p2l.models: expected a list"),
        ({"p2l": {"models": ["small", "smalll"]}}, 400, "p2l.models: expected models that the router knows"),
        ({"p2l": {"budget": "0.01"}}, 400, "p2l.budget"),
        ({"p2l": {"dry_run": True}}, 400, "p2l.dry_run: LiteLLM sends what it routes"),
        ({"proxy_server_request": {"headers": {"X-P2L-Explain": "1"}}}, 400, "p2l.explain"),
        ({"proxy_server_request": {"headers": {"x-p2l-session": "a\r\nb"}}}, 400, "x-p2l-session"),
        ({"litellm_session_id": "a\r\nx-p2l-models: small"}, None, ""),
        ({"litellm_session_id": "a\ud800\0" * 50_000}, None, ""),
        ({"proxy_server_request": {"headers": {"x-p2l-models": " medium , "}}}, None, ""),
    ],
)
def test_what_one_client_sends_leaves_the_router_to_the_others(more, status, match):
    async def run():
        async with MockProvider(PRICES) as provider, serving(config_for(provider, body_mb=1)) as server:
            choice = ModelChoice(server.url, fallback="small")
            refusal, data = None, {"model": "auto", "messages": HELLO, **more}
            try:
                await choice.set_model(data, "acompletion")
            except Refusal as found:
                refusal = found
            other = {"model": "auto", "messages": HELLO}
            await choice.set_model(other, "acompletion")
            await choice.close()
            return refusal, data["model"], other["model"]

    refusal, own, other = asyncio.run(run())
    assert other == "large"
    if status is None:
        assert refusal is None
        assert own == ("medium" if "proxy_server_request" in more else "large")
    else:
        assert refusal.status == status
        assert re.search(match, str(refusal))


def test_the_routers_models_may_change_while_the_proxy_runs():
    async def run():
        found = []
        async with MockProvider(PRICES) as provider:
            before, after = (config_for(provider, {name: None}) for name in ("large", "small"))
            choice = ModelChoice("http://127.0.0.1:1")
            for config in (before, after):
                async with serving(config) as server:
                    choice.url = server.url
                    data = {"model": "auto", "messages": HELLO}
                    await choice.set_model(data, "acompletion", ["auto", "large", "medium", "small"])
                    found.append((data["model"], data["fallbacks"]))
                    await choice.close()
        return found

    assert asyncio.run(run()) == [("medium", ["small"]), ("large", ["medium"])]


def test_models_that_the_router_refuses_are_asked_for_once_more_only():
    asked = []

    class Contradicting(ModelChoice):
        async def _ask(self, method, path, body=None, headers=None):
            asked.append(path)
            if path == "/v1/models":
                return {"data": [{"id": "small"}]}
            raise Refusal(400, "p2l.models: expected models of the catalog", "p2l.models")

    choice = Contradicting("http://127.0.0.1:1")
    for _ in range(2):
        with pytest.raises(Refusal, match="catalog"):
            asyncio.run(choice.set_model({"model": "auto", "messages": HELLO}, "acompletion", ["auto", "small"]))
    assert asked == ["/v1/models", "/v1/route", *["/v1/route", "/v1/models", "/v1/route"]]


@pytest.mark.parametrize("failure", ["closed", "key", "slow", "other"])
def test_a_router_that_fails_is_said_once_and_the_fallback_takes_over(failure, caplog):
    settings = {
        "closed": {"url": "http://127.0.0.1:1"},
        "key": {"key": "sk-wrong", "serve": {"keys": KEYS}},
        "slow": {"engine": FixedEngine(seconds=0.5), "timeout": 0.1},
        "other": {},  # a server of another kind
    }[failure]

    async def run(engine=None, serve=None, url=None, **more):
        async with MockProvider(PRICES) as provider, serving(config_for(provider, **(serve or {})), engine) as server:
            at = provider.url if failure == "other" else url or server.url
            choice = ModelChoice(at, fallback="small", pause=0.0, **more)
            found = [{"model": "auto", "messages": HELLO} for _ in range(3)]
            for data in found:
                await choice.set_model(data, "acompletion")
            choice.url, choice.key, choice.timeout = server.url, SECRET, 30.0
            await choice.close()  # the timeout is the connections'
            found.append({"model": "auto", "messages": HELLO})
            await choice.set_model(found[-1], "acompletion")
            await choice.close()
            return found

    with caplog.at_level(logging.WARNING, "p2l_engine.litellm"):
        found = asyncio.run(run(**settings))
    assert [data["model"] for data in found] == ["small"] * 3 + ["large"]
    assert ["failed" in message for message in caplog.messages] == [True, False]
    assert "small" in caplog.messages[0]
    assert SECRET not in caplog.text


def test_a_router_that_failed_is_left_alone_for_a_while():
    async def run():
        choice = ModelChoice("http://127.0.0.1:1", fallback="small", pause=0.3)
        async with MockProvider(PRICES) as provider, serving(config_for(provider)) as server:
            found = []
            for wait in (0.0, 0.0, 0.4):
                await asyncio.sleep(wait)
                data = {"model": "auto", "messages": HELLO}
                await choice.set_model(data, "acompletion")
                found.append(data["model"])
                choice.url = server.url
            await choice.close()
            return found

    assert asyncio.run(run()) == ["small", "small", "large"]


def test_without_a_fallback_or_with_one_that_the_key_or_the_caller_does_not_allow_requests_are_refused():
    headers = {"proxy_server_request": {"headers": {"x-p2l-models": "medium,small"}}}
    for settings, own, more in (
        ({}, (), {}),
        ({"fallback": "large"}, ["auto", "small"], {}),
        ({"fallback": "large"}, (), {"p2l": {"models": ["small"]}}),
        ({"fallback": "large"}, (), headers),
    ):
        with pytest.raises(Refusal, match="not available") as caught:
            chosen({"model": "auto", "messages": HELLO, **more}, own, url="http://127.0.0.1:1", **settings)
        assert caught.value.status == 503


def test_settings_come_from_the_environment_and_are_checked():
    environment = {
        "P2L_URL": "http://p2l:8000/",
        "P2L_KEY": "k",
        "P2L_FALLBACK": "small",
        "P2L_TIMEOUT": "0.5",
        "P2L_ALIAS": "",
    }
    choice = ModelChoice(**plugin.from_environment(environment))
    assert (choice.url, choice.key, choice.fallback, choice.timeout) == ("http://p2l:8000", "k", "small", 0.5)
    assert choice.alias == "auto"
    with pytest.raises(ValueError, match="P2L_TIMEOUT: expected seconds, got 'soon'"):
        plugin.from_environment({"P2L_TIMEOUT": "soon"})
    with pytest.raises(ValueError, match="expected the url"):
        ModelChoice()
    with pytest.raises(ValueError, match="the alias 'auto' itself"):
        ModelChoice("http://p2l", fallback="auto")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        plugin.nothing  # noqa: B018


def test_the_pages_server_decides_without_providers():
    async def run():
        choices = []
        async with serving(yaml.safe_load(blocks()[1])) as server:
            choice = ModelChoice(server.url)
            tools = [{"type": "function", "function": {"name": "f"}}]
            for more in ({}, {"tools": tools}, {"messages": HELLO * 3, "n": 2}):
                data = {"model": "auto", "messages": HELLO, **more}
                await choice.set_model(data, "acompletion")
                choices.append((data["model"], data.get("fallbacks")))
            await choice.close()
        return choices

    assert asyncio.run(run()) == [
        ("large", ["medium", "small"]), ("large", ["medium"]), ("large", ["medium", "small"]),
    ]  # fmt: skip


def test_the_file_stands_alone():
    """It can be copied into an environment without p2l_engine, and loads no litellm before it is asked for a callback."""
    program = (
        "import importlib.util, sys; sys.modules['p2l_engine'] = sys.modules['litellm'] = None;"
        f"spec = importlib.util.spec_from_file_location('p2l_router', {plugin.__file__!r});"
        "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module);"
        "module.ModelChoice('http://127.0.0.1:1')"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


# in process


def in_process(router, data, own=(), **settings):
    choice = RouterChoice(router, timeout=30, **settings)
    asyncio.run(choice.set_model(data, "acompletion", own))
    return data


def test_a_router_in_this_process_decides(router):
    parts = [{"type": "text", "text": "Hello"}, {"type": "image_url", "image_url": {"url": "x"}}]
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": None},
    ]
    found = in_process(router, {"model": "auto", "messages": messages})
    expected = router.route(["Hello\n[image_url]"])
    assert found["model"] == expected.model
    kept = found["metadata"]["p2l"]
    assert kept["policy"] == expected.policy
    assert (kept["propensity"], kept["propensity_error"]) == (expected.propensity, expected.propensity_error)
    assert in_process(router, {"model": "auto", "messages": messages[:1]})["model"] == router.route("Be kind.").model
    for name in router.names:
        assert in_process(router, {"model": "auto", "messages": messages}, ["auto", name])["model"] == name


def test_a_router_in_this_process_keeps_budgets(router):
    cheapest = min(router.costs)
    decision = in_process(router, {"model": "auto", "messages": HELLO, "p2l": {"budget": cheapest * 1.5}})["metadata"]["p2l"]
    assert decision["expected_cost"] <= cheapest * 1.5 * (1 + 1e-9)
    with pytest.raises(Refusal, match="budget") as caught:
        in_process(router, {"model": "auto", "messages": HELLO, "p2l": {"budget": cheapest / 2}})
    assert caught.value.status == 402


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({"p2l": {"budget": "0.01"}}, "p2l.budget: expected USD >= 0, got '0.01'"),
        ({"p2l": {"budget": True}}, "p2l.budget"),
        ({"p2l": {"budget": float("nan")}}, "p2l.budget"),
        ({"proxy_server_request": {"headers": {"x-p2l-budget": "much"}}}, "p2l.budget"),
        ({"p2l": {"objective": "bt"}}, "p2l.objective: expected only budget, models, session here"),
        ({"proxy_server_request": {"headers": {"x-p2l-objective": "bt"}}}, "p2l.objective"),
        ({"p2l": {"bugdet": 1}}, "p2l.bugdet"),
        ({"messages": 5}, "messages: expected a list, got int"),
    ],
)
def test_wishes_that_a_router_in_this_process_cannot_meet_are_refused(router, more, match):
    with pytest.raises(Refusal, match=match) as caught:
        in_process(router, {"model": "auto", "messages": HELLO, **more}, fallback="small")
    assert caught.value.status == 400


def test_a_router_in_this_process_reads_headers_too(router):
    cheapest = min(router.costs)
    request = {"headers": {"X-P2L-Budget": str(cheapest * 1.5), "x-p2l-session": "s", "x-session-id": "t"}}
    data = in_process(router, {"model": "auto", "messages": HELLO, "proxy_server_request": request})
    assert data["metadata"]["p2l"]["expected_cost"] <= cheapest * 1.5 * (1 + 1e-9)
    request = {"headers": {"x-p2l-models": router.names[1]}}
    data = in_process(router, {"model": "auto", "messages": HELLO, "proxy_server_request": request})
    assert data["model"] == router.names[1]


def test_a_router_in_this_process_that_breaks_falls_back(caplog):
    async def broken(prompt, budget=None):
        raise RuntimeError("the engine is gone")

    router = SimpleNamespace(names=("a",), aroute=broken)
    assert in_process(router, {"model": "auto", "messages": HELLO}, fallback="small")["model"] == "small"
    assert "RuntimeError: the engine is gone" in caplog.text


# a real LiteLLM proxy


@pytest.fixture(scope="session")
def litellm_python():
    """The Python of an environment with LiteLLM's proxy.

    P2L_LITELLM names the environment's folder; without it, pip makes one, once, in the user's cache. Skips where that cannot
    be done.
    """
    given = os.environ.get("P2L_LITELLM")
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    folder = Path(given) if given else cache / "p2l-engine" / f"litellm-{RELEASE}"
    python = folder / "bin" / "python"
    if not (folder / "bin" / "litellm").exists():
        if given:
            pytest.skip(f"P2L_LITELLM: {given} has no bin/litellm")
        make_environment(folder)
    return python


def make_environment(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    commands = (
        [sys.executable, "-m", "venv", str(folder)],
        [str(folder / "bin" / "python"), "-m", "pip", "install", "-q", f"litellm[proxy]=={RELEASE}"],
    )
    for command in commands:
        try:
            ended = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            shutil.rmtree(folder, ignore_errors=True)
            pytest.skip(f"no environment with LiteLLM could be made: {error}")
        if ended.returncode:
            shutil.rmtree(folder, ignore_errors=True)
            pytest.skip(f"no environment with LiteLLM could be made: {ended.stderr.strip()[-300:]}")


def blocks():
    """The configurations that docs/gateways.md shows."""
    page = Path(__file__).resolve().parents[1] / "docs" / "gateways.md"
    return re.findall(r"^```yaml\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S)


class Proxy:
    """A LiteLLM proxy in a process of its own, with the configuration of docs/gateways.md.

    provider, router: addresses, without /v1. url: the proxy's. log: what it printed.
    """

    def __init__(self, python: Path, folder: Path, provider: str, router: str) -> None:
        self.python, self.folder = python, folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        shutil.copy(plugin.__file__, folder / "p2l_router.py")
        text = blocks()[0].replace("http://127.0.0.1:9000", provider).replace("http://127.0.0.1:8000", router)
        (folder / "config.yaml").write_text(text.replace("sk-p2l", SECRET), encoding="utf-8")

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text(encoding="utf-8", errors="replace")

    async def __aenter__(self) -> Proxy:
        outside = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_TELEMETRY": "False", "NO_PROXY": "127.0.0.1"}
        command = ["-m", "litellm.proxy.proxy_cli", "--config", "config.yaml", "--port", str(self.port), "--host", "127.0.0.1"]
        with (self.folder / "log").open("wb") as log:
            self._process = await asyncio.create_subprocess_exec(
                str(self.python), *command, cwd=self.folder, stdout=log, stderr=log, env={**os.environ, **outside}
            )
        async with aiohttp.ClientSession() as client:
            while True:
                assert self._process.returncode is None, self.log
                try:
                    async with client.get(f"{self.url}/health/liveliness") as answer:
                        if answer.status == 200:
                            return self
                except aiohttp.ClientError:
                    await asyncio.sleep(0.2)

    async def __aexit__(self, *_: object) -> None:
        self._process.terminate()
        await self._process.wait()


@asynccontextmanager
async def proxied(python, folder, engine=None):
    """A client of LiteLLM's proxy, the proxy, the router that it asks, and the provider that it sends requests to."""
    async with (
        MockProvider(PRICES) as provider,
        serving(config_for(provider, keys=KEYS), engine) as server,
        Proxy(python, folder, provider.url, server.url) as proxy,
        openai.AsyncOpenAI(base_url=f"{proxy.url}/v1", api_key="sk-litellm", max_retries=0) as client,
    ):
        yield client, proxy, server, provider


def sent(provider) -> list[str]:
    """The models of the requests that the provider got."""
    return [request.body["model"] for request in provider.requests if request.path.endswith(("/completions", "/responses"))]


@pytest.mark.slow
def test_a_litellm_proxy_goes_where_the_router_says_and_on_without_it(litellm_python, tmp_path):
    """One proxy, since it takes half a minute to start: decisions, wishes, refusals, fallbacks, and a router that fails."""

    async def run():
        async with proxied(litellm_python, tmp_path, FixedEngine(theta=None)) as (client, proxy, server, provider):
            found, create, raw_create = [], client.chat.completions.create, client.chat.completions.with_raw_response.create
            for i in range(12):
                messages = [{"role": "user", "content": f"Question {i}?"}]
                raw = await raw_create(model="auto", messages=messages, stream=i % 2 == 1)
                if i % 2:
                    text = "".join([c.choices[0].delta.content or "" async for c in raw.parse() if c.choices])
                else:
                    text = raw.parse().choices[0].message.content
                found.append((raw.headers.get("x-p2l-model"), raw.headers.get("x-p2l-decision"), len(text.split())))
            written = {"metadata": {"p2l": {"model": "mine", "id": "dec_1"}}}
            raw = await raw_create(model="medium", messages=HELLO, extra_body=written)
            assert "x-p2l-model" not in raw.headers
            await create(model="auto", messages=HELLO, extra_body={"p2l": {"models": ["small"]}})
            with pytest.raises(openai.APIStatusError) as caught:
                await create(model="auto", messages=HELLO, extra_body={"p2l": {"budget": 1e-12}})
            models = {model.id async for model in client.models.list()}
            records, to = list(server.records), sent(provider)

            raw = await raw_create(model="auto", messages=HELLO, extra_body={"litellm_session_id": "line 1\nline 2"})
            assert raw.headers["x-p2l-decision"] == server.records[-1].id
            limited = {"models": ["large", "medium"]}
            await create(model="auto", messages=HELLO, extra_body={"p2l": limited})
            best = server.records[-1].chosen
            provider.fail("status", model=best, status=500)
            raw = await raw_create(model="auto", messages=HELLO, extra_body={"p2l": limited})
            fallen = raw.headers["x-p2l-model"], sent(provider)[-1], best
            provider.rules.rules.clear()

            server.service.gate = Gate([Key(id="other", sha256="0" * 64)])
            without = []
            for _ in range(3):
                raw = await raw_create(model="auto", messages=HELLO)
                without.append((raw.headers["x-p2l-model"], sent(provider)[-1]))
            await client.responses.create(model="auto", input="Hello")
            bodies = [request.body for request in provider.requests if isinstance(request.body, dict)]
            return found, caught.value, models, records, to, fallen, without, provider.requests[-1], bodies, proxy.log

    found, error, models, records, to, fallen, without, last, bodies, log = asyncio.run(run())
    assert found == [(record.chosen, record.id, 50) for record in records[:12]], log
    assert to == [record.chosen for record in records[:12]] + ["medium", "small"]
    assert len(set(to[:12])) > 1
    assert len(records) == 14  # none for the model that was named
    assert records[-1].outcome == "refused"  # the budget
    assert error.status_code == 402
    assert models == {"auto", *PRICES}
    chosen_one, answered, best = fallen
    assert chosen_one == best
    assert {best, answered} == {"large", "medium"}  # the router's next one
    assert without == [("small", "small")] * 3
    assert (last.path, last.body["model"]) == ("/v1/responses", "small")
    assert log.count("the router failed (/v1/route answered 401") == 1
    assert not any({"p2l", "fallbacks"} & set(body) for body in bodies)
    assert SECRET not in log
