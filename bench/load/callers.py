"""A number of callers, each of which sends its next request after the answer to the last; some leave, some send rubbish."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass

import orjson
import uvloop

from bench.load.client import Pool
from bench.load.request import PATHS, Answer, body_of, wire

APIS = ("chat", "responses", "messages")
CONTENT = {"chat": "choices", "responses": "output", "messages": "content"}
RUBBISH = (
    b"",
    b"{",
    b"[]",
    b"\xff\xfe",
    b'{"model": "auto"}',
    b'{"model": 3}',
    b"[" * 5000,
    b'{"model": "auto", "messages": 7}',
)


@dataclass(frozen=True)
class Crowd:
    """count requests from the one numbered ``first`` on, of ``callers`` at a time. leave, rubbish: shares of those whose client
    leaves within ``patience`` seconds, and of those that are no requests. wait: seconds after which an answer has not come."""

    host: str
    port: int
    first: int
    count: int
    callers: int = 48
    prompts: tuple[str, ...] = ("Hello",)
    seed: int = 0
    leave: float = 0.0
    patience: float = 0.06
    rubbish: float = 0.0
    wait: float = 30.0
    max_tokens: int = 200
    model: str = "auto"


@dataclass(frozen=True)
class Ended:
    """A request and how it ended.

    end: "answered", "cut" (an error within the stream), "error STATUS", "left", "refused" (rubbish that was), "broken: WHY" for
    what no client could understand, and "closed: WHY after END" for a connection not made, or closed without an answer;
    END is that of the caller's request before. seconds: that it took.
    """

    number: int
    api: str
    stream: bool
    end: str
    seconds: float


def run(crowd: Crowd) -> tuple[list[Ended], float]:
    """How each request ended, and the CPU seconds of the process."""
    cpu = time.process_time()
    found = uvloop.run(_run(crowd))
    return found, time.process_time() - cpu


async def _run(crowd: Crowd) -> list[Ended]:
    numbers = iter(range(crowd.first, crowd.first + crowd.count))
    found = list[Ended]()
    await asyncio.gather(*(_caller(crowd, numbers, found) for _ in range(min(crowd.callers, crowd.count))))
    return found


async def _caller(crowd: Crowd, numbers: Iterator[int], found: list[Ended]) -> None:
    pool, before = Pool(crowd.host, crowd.port), "nothing"
    for number in numbers:
        draw = random.Random(f"{crowd.seed}.{number}")
        api, stream, kind = draw.choice(APIS), draw.random() < 0.5, draw.random()
        rubbish = kind < crowd.rubbish
        data = _rubbish(crowd, api, draw) if rubbish else _request(crowd, api, stream, number)
        leaves = draw.uniform(0, crowd.patience) if crowd.rubbish <= kind < crowd.rubbish + crowd.leave else None
        start, ended = time.perf_counter(), asyncio.get_running_loop().create_future()
        answer = Answer(start, lambda answer, ended=ended: ended.done() or ended.set_result(None), whole=True)  # type: ignore[misc]
        pool.send(data, answer)
        done, _ = await asyncio.wait([ended], timeout=crowd.wait if leaves is None else leaves)
        if not done:
            pool.close()
            pool = Pool(crowd.host, crowd.port)
            end = "broken: no answer in time" if leaves is None else "left"
        else:
            end = how_it_ended(answer, api, stream, rubbish)
        if end.startswith("closed"):
            end += f" after {before}"
        before = end
        found.append(Ended(number, api, stream, end, time.perf_counter() - start))
    pool.close()


def how_it_ended(answer: Answer, api: str, stream: bool, rubbish: bool = False) -> str:
    """As a client of this API understands it."""
    if not answer.status:
        return f"closed: {answer.error}"
    body = b"".join(answer.parts)
    if stream and answer.status == 200:
        return _stream(body, api)
    try:
        parsed = orjson.loads(body)
    except orjson.JSONDecodeError:
        return f"broken: status {answer.status} without JSON: {body[:80]!r}"
    if answer.status == 200:
        return "answered" if CONTENT[api] in parsed and not rubbish else f"broken: 200 with {body[:80]!r}"
    error = parsed.get("error") if isinstance(parsed, dict) else None
    if not isinstance(error, dict) or not isinstance(error.get("message"), str) or (api == "messages") != ("type" in parsed):
        return f"broken: status {answer.status} with {body[:80]!r}"
    if rubbish:
        return "refused" if 400 <= answer.status < 500 else f"broken: {answer.status} for rubbish"
    return f"error {answer.status}"


def _stream(body: bytes, api: str) -> str:
    last = body.replace(b"\r\n", b"\n").rstrip(b"\n").rsplit(b"\n\n", 1)[-1]
    fields = [line.split(b":", 1) for line in last.split(b"\n") if b":" in line]
    data = b"\n".join(value.strip() for name, value in fields if name == b"data")
    if api == "chat" and data == b"[DONE]":
        return "answered"
    try:
        event = orjson.loads(data)
    except orjson.JSONDecodeError:
        event = None
    if not isinstance(event, dict):
        return f"broken: a stream ends with {last[-80:]!r}"
    if event.get("error") or event.get("type") in ("error", "response.failed"):
        return "cut"
    if event.get("type") in ("response.completed", "response.incomplete", "message_stop"):
        return "answered"
    # There are providers that send no [DONE].
    ends = event.get("usage") or any(choice.get("finish_reason") for choice in event.get("choices", []))
    return "answered" if ends else f"broken: a stream ends with {last[-80:]!r}"


def _request(crowd: Crowd, api: str, stream: bool, number: int) -> bytes:
    body = body_of(api, crowd.model, crowd.prompts[number % len(crowd.prompts)], stream, crowd.max_tokens)
    body |= {"metadata": {"user_id": f"u{number}"}} if api == "messages" else {"user": f"u{number}"}
    body |= {"p2l": {"session": str(number)}}
    return wire(f"{crowd.host}:{crowd.port}", api, body)


def _rubbish(crowd: Crowd, api: str, draw: random.Random) -> bytes:
    data = draw.choice(RUBBISH)
    head = f"POST {PATHS[api]} HTTP/1.1\r\nhost: {crowd.host}\r\ncontent-type: application/json\r\ncontent-length: {len(data)}"
    return head.encode() + b"\r\n\r\n" + data
