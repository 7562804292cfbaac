"""Everything that can go wrong between the server and a provider: the client gets an answer, or an error of its API."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import aiohttp
import orjson
import pytest

from bench.mock_provider import MockProvider
from tests.support.cases import slow_but
from tests.support.serving import APIS, PRICES, config_for, serving

PATHS = {"chat": "/v1/chat/completions", "responses": "/v1/responses", "messages": "/v1/messages"}
ENDS = {"chat": b"data: [DONE]", "responses": b"event: response.completed", "messages": b"event: message_stop"}
# The other APIs share all code but their readers.
ALL = [APIS[0], *(pytest.param(api, marks=pytest.mark.slow) for api in APIS[1:])]
QUICK = {
    "timeouts": {"connect": 1, "first_byte": 0.25, "whole": 0.25, "idle": 0.25, "total": 5},
    "retries": {"backoff": 0.01},
    "answer_mb": 1,
}


def body_for(api: str, stream: bool, model: str = "auto", text: str = "What is 17 * 23?") -> dict[str, Any]:
    body: dict[str, Any] = {"model": model, "stream": stream}
    if api == "responses":
        return body | {"input": text, "max_output_tokens": 60}
    return body | {"messages": [{"role": "user", "content": text}], "max_tokens": 60}


async def ask(url: str, api: str, body: dict[str, Any], **headers: str) -> tuple[int, dict[str, str], bytes]:
    async with aiohttp.ClientSession() as client, client.post(url + PATHS[api], json=body, headers=headers) as response:
        return response.status, {k.lower(): v for k, v in response.headers.items()}, await response.read()


def run(api: str, stream: bool, faults: list[dict[str, Any]], model: str = "auto", **serve: Any):
    """Status, headers, body, the record and the provider of one request under these faults."""

    async def one():
        async with MockProvider(PRICES) as provider, serving(config_for(provider, **{**QUICK, **serve})) as server:
            for fault in faults:
                provider.fail(**fault)
            found = await ask(server.url, api, body_for(api, stream, model))
            return *found, server.records[-1], provider, server.service.health, server.runtime.plan

    return asyncio.run(one())


def events(body: bytes) -> list[Any]:
    lines = [line[6:] for line in body.replace(b"\r\n", b"\n").split(b"\n") if line.startswith(b"data: ")]
    return [orjson.loads(line) for line in lines if line != b"[DONE]"]


def error_in(api: str, body: bytes) -> dict[str, Any]:
    found = orjson.loads(body)
    if api == "messages":
        assert found["type"] == "error"
    assert set(found["error"]) >= {"message", "type"}
    return found["error"]


FAST = [{"fault": "status", "status": 500}, {"fault": "close"}, {"fault": "html"}]
NO_ANSWER = [
    *({"fault": "status", "status": status} for status in (401, 403, 404, 408, 429, 500, 502, 503, 529)),
    *({"fault": name} for name in ("close", "reset", "silent", "headers_only", "html", "invalid_json", "error_body")),
    *({"fault": name} for name in ("first_event_error", "large_headers", "empty_choices", "endless")),
    {"fault": "html", "status": 502},
    {"fault": "slow_first_byte", "seconds": 0.6},
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("api", ALL)
@pytest.mark.parametrize(
    "fault",
    slow_but(FAST, NO_ANSWER),
    ids=lambda fault: "-".join(map(str, fault.values())),
)
def test_a_model_that_does_not_answer_is_replaced_by_the_next_best(fault, api, stream):
    if fault["fault"] == "empty_choices" and (stream or api != "chat"):
        return  # legal there
    status, headers, body, record, _, health, plan = run(api, stream, [{**fault, "model": "large"}])
    assert (status, headers["x-p2l-model"], headers["x-p2l-attempts"]) == (200, "medium", "2")
    assert (record.chosen, record.model, record.outcome) == ("large", "medium", "answered")
    assert record.attempts[0].error is not None
    assert record.attempts[1].error is None
    assert b"medium" in body
    assert ENDS[api] in body if stream else orjson.loads(body)["model"] == "medium"
    assert not health.is_up(plan.deployments[0][APIS.index(api)])  # it cools down
    assert health.is_up(plan.deployments[1][APIS.index(api)])


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("api", ALL)
@pytest.mark.parametrize(
    "fault", slow_but({"cut", "stall"}, ["cut", "cut_close", "cut_reset", "stall", "error_event", "endless_events"])
)
def test_a_stream_that_breaks_off_ends_in_an_error_event(fault, api, half):
    status, headers, body, record, *_, plan = run(api, True, [{"fault": fault, "model": "large", "tokens": 5, "half": half}])
    assert (status, headers["x-p2l-model"], record.outcome) == (200, "large", "cut")
    if fault == "stall":  # its provider may have written on
        assert record.cost > plan.prices.worst(0, 0, 60, 1)  # body_for's bound
    assert ENDS[api] not in body
    last = events(body)[-1]  # every event is whole: half of one is never passed on
    assert "error" in last or last["type"] == "error"
    assert record.estimated
    assert record.cost > 0
    assert record.attempts[-1].error in ("cut", "idle", "error", "size", "unreadable")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("api", ALL)
@pytest.mark.parametrize(
    "fault",
    [
        "split",
        "burst",
        "crlf",
        "comments",
        "gzip",
        "chunked",
        "content_length",
        "until_close",
        "usage_with_choices",
        "no_usage",
    ],
)
def test_unusual_answers_are_answers(fault, api, stream):
    patient = {"connect": 30, "first_byte": 30, "whole": 30, "idle": 30, "total": 60}  # of a busy machine, byte by byte
    status, headers, body, record, provider, *_ = run(api, stream, [{"fault": fault}], timeouts=patient)
    assert (status, headers["x-p2l-model"], record.outcome) == (200, "large", "answered")
    assert ENDS[api] in body if stream else orjson.loads(body)["model"] == "large"
    assert record.estimated == (fault == "no_usage")
    if fault != "no_usage":
        assert record.cost == pytest.approx(float(provider.bill.total), abs=1e-12)


@pytest.mark.parametrize("api", ALL)
@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_request_that_the_provider_refuses_is_no_failure_of_the_provider(status, api):
    found, headers, body, record, _, health, plan = run(api, False, [{"fault": "status", "status": status}])
    assert (found, headers["x-p2l-attempts"], record.outcome) == (status, "1", "refused")
    assert error_in(api, body)
    assert record.cost == 0
    assert all(health.is_up(d) for group in plan.deployments for d in group)


@pytest.mark.parametrize("api", ALL)
def test_a_context_that_is_too_short_is_answered_by_a_larger_one_once(api):
    async def one():
        async with MockProvider(PRICES) as provider:
            config = config_for(
                provider, {"large": {"context": 9_000}, "medium": {"context": 8_000}, "small": {"context": 10_000}}, **QUICK
            )
            async with serving(config) as server:
                provider.fail("context_length", model="large")
                first = await ask(server.url, api, body_for(api, False))
                provider.fail("context_length", model="small")
                return first, await ask(server.url, api, body_for(api, False)), server.records

    (status, headers, _), (again, _, body), records = asyncio.run(one())
    assert (status, headers["x-p2l-model"]) == (200, "small")  # the only one with a larger window
    assert again == 400
    assert error_in(api, body)
    assert [attempt.model for attempt in records[-1].attempts] == ["large", "small"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("api", ALL)
def test_all_down_is_said_at_once_the_second_time(api, stream):
    async def one():
        async with MockProvider(PRICES) as provider, serving(config_for(provider, **QUICK)) as server:
            provider.fail("status", status=503)
            return [await ask(server.url, api, body_for(api, stream)) for _ in range(2)], len(provider.requests)

    answers, sent = asyncio.run(one())
    for status, headers, body in answers:
        assert status == 503
        assert int(headers["retry-after"]) >= 1
        assert error_in(api, body)
    assert sent <= 4  # the second request reached no provider that cools down


def test_a_named_model_is_tried_again_and_never_replaced():
    status, headers, *_ = run("chat", False, [{"fault": "status", "status": 500, "times": 2}], model="large")
    assert (status, headers["x-p2l-model"], headers["x-p2l-attempts"]) == (200, "large", "3")


def test_retry_after_is_waited_for_where_it_is_short_and_passed_on_where_it_is_long():
    short = run("chat", False, [{"fault": "status", "status": 429, "retry_after": 0.2, "times": 1}], model="large")
    assert short[0] == 200
    long = run("chat", False, [{"fault": "status", "status": 429, "retry_after": 30}], model="large")
    assert (long[0], long[1]["x-p2l-attempts"]) == (503, "1")
    assert 29 <= int(long[1]["retry-after"]) <= 30
    date = run("chat", False, [{"fault": "status", "status": 429, "retry_after": 40, "retry_date": True}], model="large")
    assert 37 <= int(date[1]["retry-after"]) <= 41


def test_a_refused_connection_and_a_port_without_a_server_are_failures():
    async def one():
        async with MockProvider(PRICES) as provider:
            config = config_for(provider, **QUICK)
            for deployment in config["models"]["large"]["provider"]:
                deployment["base_url"] = "http://127.0.0.1:1/v1"
            async with serving(config) as server:
                return await ask(server.url, "chat", body_for("chat", False)), server.records

    (status, headers, _), records = asyncio.run(one())
    assert (status, headers["x-p2l-model"], records[0].attempts[0].error) == (200, "medium", "connect")


@pytest.mark.parametrize(
    ("fault", "stream", "api"),
    [
        *((fault, stream, "chat") for fault in ("silent", "stall") for stream in (False, True)),
        *(("silent", False, api) for api in ("responses", "messages")),
        *(("slow_tokens", True, api) for api in APIS),
    ],
)
def test_a_client_that_leaves_ends_the_request_upstream_within_a_second(fault, stream, api):
    async def one():
        async with MockProvider(PRICES) as provider:
            patient = {"timeouts": {"connect": 1, "first_byte": 30, "whole": 30, "idle": 30, "total": 60}}
            async with serving(config_for(provider, **patient)) as server, aiohttp.ClientSession() as client:
                provider.fail(fault, seconds=0.2)
                with pytest.raises(TimeoutError):
                    async with client.post(
                        server.url + PATHS[api], json=body_for(api, stream), timeout=aiohttp.ClientTimeout(total=0.5)
                    ) as response:
                        await response.read()
                for _ in range(100):
                    if server.records and not provider.connections:
                        break
                    await asyncio.sleep(0.01)
                return server.records, len(provider.connections)

    records, open_connections = asyncio.run(one())
    assert open_connections == 0
    assert [(record.outcome, record.estimated) for record in records] == [("left", True)]
    assert records[0].cost > 0


@pytest.mark.slow
def test_a_client_that_does_not_read_holds_its_provider_back():
    """Of a stream without an end, the server takes what the sockets' buffers hold, and no more."""
    event = b'data: {"choices":[{"index":0,"delta":{"content":"' + b"x" * 50_000 + b'"}}]}\n\n'
    sent, ended = [0], asyncio.Event()

    async def provide(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            while True:
                writer.write(event)
                await writer.drain()
                sent[0] += len(event)
        writer.close()
        ended.set()

    async def one():
        async with await asyncio.start_server(provide, "127.0.0.1", 0) as provider:
            url = f"http://127.0.0.1:{provider.sockets[0].getsockname()[1]}/v1"
            patient = {"connect": 5, "first_byte": 30, "whole": 30, "idle": 30, "total": 60}
            async with serving(config_for(url, timeouts=patient, answer_mb=4000)) as server:
                body = orjson.dumps(body_for("chat", True))
                head = f"POST {PATHS['chat']} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
                reader, writer = await asyncio.open_connection("127.0.0.1", int(server.url.rsplit(":", 1)[1]), limit=4096)
                writer.write(head.encode() + body)
                assert (await reader.readline()).startswith(b"HTTP/1.1 200")
                before = -1
                while sent[0] != before:  # until nothing more is taken
                    before = sent[0]
                    await asyncio.sleep(0.5)
                writer.close()
                await asyncio.wait_for(ended.wait(), 30)
                return before

    assert asyncio.run(one()) < 64e6  # the loopback's buffers are 10 MB


def test_several_deployments_share_a_model_by_weight_and_stand_in_for_each_other():
    async def one():
        async with MockProvider(PRICES) as good, MockProvider(PRICES) as bad:
            config = config_for(good, {"medium": None, "small": None}, **QUICK)
            config["models"]["large"]["provider"] = [
                {"base_url": f"{good.url}/v1", "model": "large", "name": "good", "weight": 1},
                {"base_url": f"{bad.url}/v1", "model": "large", "name": "bad", "weight": 3},
            ]
            async with serving(config) as server:
                for _ in range(60):
                    await ask(server.url, "chat", body_for("chat", False))
                shares = len(good.requests), len(bad.requests)
                bad.fail("status", status=500)
                answers = [await ask(server.url, "chat", body_for("chat", False)) for _ in range(10)]
                return shares, answers

    (to_good, to_bad), answers = asyncio.run(one())
    assert to_bad > to_good > 3
    assert {(status, headers["x-p2l-model"]) for status, headers, _ in answers} == {(200, "large")}
    assert sum(int(headers["x-p2l-attempts"]) for _, headers, _ in answers) == 11  # the bad one is tried once, then cools down


PROBLEMS = {401: "key", 402: "credit", 403: "key", 404: "model or the path"}


@pytest.mark.parametrize("status", PROBLEMS)
def test_a_deployment_that_is_configured_wrongly_is_named_once_and_left_out(status, caplog):
    async def one():
        async with MockProvider(PRICES) as provider, serving(config_for(provider, **QUICK)) as server:
            rule = provider.fail("status", model="large", status=status)
            deployment = server.runtime.plan.deployments[0][0]
            answers = []
            for i in range(4):
                answers.append(await ask(server.url, "chat", body_for("chat", i % 2 == 0)))
                deployment.until = 0.0  # it is tried again
            named = await ask(server.url, "chat", body_for("chat", False, "large"))
            async with aiohttp.ClientSession() as client, client.get(server.url + "/v1/status") as response:
                shown = await response.json()
            provider.rules.rules.remove(rule)
            deployment.until = 0.0
            healed = await ask(server.url, "chat", body_for("chat", False))
            return answers, named, shown, healed, deployment

    answers, named, shown, healed, deployment = asyncio.run(one())
    assert {(found, headers["x-p2l-model"], headers["x-p2l-attempts"]) for found, headers, _ in answers} == {
        (200, "medium", "2")
    }
    assert (named[0], named[1]["x-p2l-attempts"]) == (503, "1")  # to try again changes nothing
    assert PROBLEMS[status].encode() in named[2]
    assert PROBLEMS[status] in shown["models"][0]["deployments"][0]["problem"]
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert "large-chat" in line
    assert PROBLEMS[status] in line
    assert (healed[0], healed[1]["x-p2l-model"], deployment.problem) == (200, "large", None)


def test_what_a_provider_says_of_its_key_is_not_passed_on(caplog):
    async def one():
        async with MockProvider(PRICES) as provider, serving(config_for(provider, **QUICK)) as server:
            provider.fail("status", status=401)
            return await ask(server.url, "chat", body_for("chat", False, "large"))

    _, _, body = asyncio.run(one())
    assert b"sk-" not in body
    assert "sk-" not in caplog.text


@pytest.mark.parametrize("status", [401, 402, 403, 429])
def test_a_clients_own_key_leaves_no_deployment_out(status):
    async def one():
        async with MockProvider(PRICES) as provider:
            config = config_for(provider, **QUICK)
            for entry in config["models"].values():
                for deployment in entry["provider"]:
                    deployment["forward_client_key"] = True
            async with serving(config) as server:
                provider.fail("status", status=status, times=1, retry_after=7)
                refused = await ask(server.url, "chat", body_for("chat", False), authorization="Bearer sk-bad")
                health, plan = server.service.health, server.runtime.plan
                up = all(health.is_up(deployment) for group in plan.deployments for deployment in group)
                return refused, up, await ask(server.url, "chat", body_for("chat", False), authorization="Bearer sk-good")

    (found, headers, body), up, good = asyncio.run(one())
    assert (found, headers["x-p2l-attempts"], headers.get("retry-after", "7")) == (status, "1", "7")
    assert error_in("chat", body)
    assert up
    assert (good[0], good[1]["x-p2l-model"]) == (200, "large")


def test_a_stored_answer_that_is_gone_leaves_no_deployment_out():
    async def one():
        async with MockProvider(PRICES) as provider, serving(config_for(provider, **QUICK)) as server:
            provider.fail("status", status=404, code="previous_response_not_found")
            bodies = [
                body_for("responses", False, "large") | {"previous_response_id": "resp_0"},
                body_for("responses", False, "large") | {"input": [{"type": "item_reference", "id": "msg_0"}]},
                body_for("responses", False, "large")
                | {"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "file-0"}]}]},
            ]
            found = [await ask(server.url, "responses", body) for body in bodies]
            health, plan = server.service.health, server.runtime.plan
            return found, all(health.is_up(deployment) for group in plan.deployments for deployment in group)

    found, up = asyncio.run(one())
    assert [status for status, *_ in found] == [404] * 3
    assert up


def test_a_long_answer_that_is_no_stream_begins_late():
    """A provider writes its status when the whole answer is there."""

    async def one():
        timeouts = {"timeouts": {"connect": 1, "first_byte": 0.2, "whole": 3, "idle": 1, "total": 10}}
        async with MockProvider(PRICES) as provider, serving(config_for(provider, **{**QUICK, **timeouts})) as server:
            provider.fail("slow_first_byte", model="large", seconds=0.5)
            return [await ask(server.url, "chat", body_for("chat", stream)) for stream in (False, True)]

    found = asyncio.run(one())
    assert [(status, headers["x-p2l-model"]) for status, headers, _ in found] == [(200, "large"), (200, "medium")]


def test_a_body_that_stalls_is_ended():
    async def one():
        async with MockProvider(PRICES) as provider, serving(config_for(provider, **QUICK)) as server:
            host, port = server.url.removeprefix("http://").split(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 100\r\n\r\n{")
            async with asyncio.timeout(5):
                head = await reader.readuntil(b"\r\n\r\n")
            writer.close()
            return head, server.runtime.server.running

    head, running = asyncio.run(one())
    assert head.startswith(b"HTTP/1.1 408 ")
    assert running == 0
