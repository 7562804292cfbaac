"""A mock provider for the length of a test, and clients of it: the official ones, aiohttp, and a bare socket."""

from __future__ import annotations

import asyncio
import json
import re
from contextlib import asynccontextmanager

import aiohttp
import anthropic
import openai

from bench.mock_provider import MockProvider

PRICES = {"small": (0.1, 0.4, 0.025), "large": (3, 15, 0.3)}
TOOL = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}, "required": ["city", "days"]}
HELLO = [{"role": "user", "content": "Hello, who are you?"}]  # 19 bytes: 9 tokens
APIS = {"chat": "/v1/chat/completions", "responses": "/v1/responses", "messages": "/v1/messages"}


def served(test, loop=None, **settings):
    """Runs a coroutine function with a provider."""

    async def run():
        async with MockProvider(**{"prices": PRICES, **settings}) as provider:
            return await asyncio.wait_for(test(provider), 60)

    with asyncio.Runner(loop_factory=loop) as runner:
        return runner.run(run())


def openai_client(provider):
    return openai.AsyncOpenAI(base_url=f"{provider.url}/v1", api_key="sk-client", max_retries=0)


def anthropic_client(provider):
    return anthropic.AsyncAnthropic(base_url=provider.url, api_key="sk-client", max_retries=0)


@asynccontextmanager
async def official(provider, api):
    """The function of an official client that asks an API."""
    async with anthropic_client(provider) if api == "messages" else openai_client(provider) as client:
        if api == "chat":
            yield client.chat.completions.create
        else:
            yield getattr(client, api).create


def body(api, model="small", stream=False, **fields):
    asked = {"model": model, "stream": stream, **fields}
    if api == "chat" and stream:
        asked.setdefault("stream_options", {"include_usage": True})
    if api == "messages":
        asked.setdefault("max_tokens", 1000)
    asked.setdefault("input" if api == "responses" else "messages", HELLO)
    return asked


async def post(provider, api, headers=None, **fields):
    """Status, headers, body of an answer."""
    async with (
        aiohttp.ClientSession(auto_decompress=False, headers=headers) as session,
        session.post(provider.url + APIS[api], json=body(api, **fields)) as answer,
    ):
        return answer.status, answer.headers, await answer.read()


async def wire(provider, api, **fields):
    """All bytes that come until the connection ends, and whether a reset ended it."""
    reader, writer = await asyncio.open_connection(provider.host, provider.port)
    data = json.dumps(body(api, **fields)).encode()
    received, reset = b"", False
    try:
        writer.write(
            b"POST %b HTTP/1.1\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % (APIS[api].encode(), len(data)) + data
        )
        while part := await reader.read(65536):
            received += part
    except ConnectionError:
        reset = True
    writer.close()
    return received, reset


def parsed(received):
    """Status, headers, chunks of the body, and whether the body has its end."""
    head, _, rest = received.partition(b"\r\n\r\n")
    first, *lines = head.split(b"\r\n")
    headers = dict(line.decode().split(": ", 1) for line in lines)
    status = int(first.split()[1])
    if "transfer-encoding" not in headers:
        return status, headers, [rest], len(rest) == int(headers.get("content-length", len(rest)))
    chunks, ended = [], False
    while rest and not ended:
        size, _, rest = rest.partition(b"\r\n")
        ended = int(size, 16) == 0
        chunks.append(rest[: int(size, 16)])
        rest = rest[int(size, 16) + 2 :]
    return status, headers, [chunk for chunk in chunks if chunk], ended


def text(api, chunks):
    """The words of a stream."""
    found = []
    for event in b"".join(chunks).replace(b"\r\n", b"\n").split(b"\n\n")[:-1]:
        lines = [line[5:].strip() for line in event.split(b"\n") if line.startswith(b"data:")]
        data = {} if not lines or lines[0] == b"[DONE]" else json.loads(lines[0])
        if api == "chat":
            found += [choice["delta"].get("content") or "" for choice in data.get("choices", [])]
        elif str(data.get("type")).endswith("delta"):
            delta = data["delta"]
            found.append(delta if api == "responses" else delta.get("text", ""))
    return "".join(found)


def usual(api, **fields):
    """The chunks of the body without a fault."""

    async def test(provider):
        return parsed((await wire(provider, api, **fields))[0])[2]

    return served(test)


def same(chunks):
    """A body without what differs from request to request."""
    return re.sub(rb'"created(_at)?":\d+', b"", b"".join(chunks))
