"""Agents and chat interfaces, by the requests that they send: accepted, routed, passed on unchanged, one session, and the
user's turns alone are what is ranked."""

from __future__ import annotations

import asyncio
import json
import os
import re
import tomllib
from pathlib import Path

import aiohttp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.mock_provider import MockProvider
from p2l_engine.apis.ask import AGENTS_OWN, Contents, without
from p2l_engine.serve.sessions import BRANCHES, SessionMemory
from p2l_engine.serve.tokens import TokenCounter
from tests.support import agents
from tests.support.serving import PRICES, FixedEngine, config_for, serving

TOUCHED = {"model", "p2l", "stream_options"}
ENDS = {"chat": b"data: [DONE]\n\n", "responses": b"event: response.completed", "messages": b"event: message_stop"}
LARGE = {name: {"max_output": 64_000} for name in PRICES}


def sent(*requests, engine=None):
    """(path, headers, body) each: the answers, what the provider got, and the records."""

    async def run():
        async with MockProvider(PRICES) as provider, serving(config_for(provider, LARGE), engine, log_prompts=True) as server:
            found = []
            async with aiohttp.ClientSession(skip_auto_headers=["user-agent"]) as client:
                for path, headers, body in requests:
                    async with client.post(server.url + path, json=body, headers=headers) as answer:
                        found.append((answer.status, dict(answer.headers), await answer.read()))
            return found, list(provider.requests), server.records

    return asyncio.run(run())


@pytest.mark.parametrize("shape", [make() for make in agents.SHAPES], ids=[make.__name__ for make in agents.SHAPES])
def test_requests_of_agents_are_routed_and_passed_on_unchanged(shape):
    answers, received, records = sent(
        *((shape.path, shape.headers, body) for body in shape.steps), engine=FixedEngine(theta=None)
    )
    for (status, headers, data), request, record, body in zip(answers, received, records, shape.steps, strict=True):
        assert status == 200, data
        assert headers["x-p2l-model"] == record.model == request.body["model"]
        assert {k: v for k, v in request.body.items() if k not in TOUCHED} == {
            k: v for k, v in body.items() if k not in TOUCHED
        }
        assert ENDS[record.api] in data
        assert record.turns == tuple(shape.turns)
        assert record.outcome == "answered"
        if record.api == "messages":
            assert request.headers.get("anthropic-beta") == shape.headers.get("anthropic-beta")
            assert request.headers["anthropic-version"] == shape.headers["anthropic-version"]
    # A loop of tools is one session, ranked once.
    assert len({record.session for record in records}) == len({record.turns_hash for record in records}) == 1
    assert len({record.model for record in records}) == 1


def test_the_prompt_cache_of_a_tool_loop_is_priced_in():
    """The provider's count of cached tokens and the server's expectation agree that most of the second request is cached."""
    for make in (agents.claude_code, agents.codex_cli):
        shape = make()
        _, _, records = sent(*((shape.path, shape.headers, body) for body in shape.steps[1:]))
        first, second = records
        assert second.tokens_cached == pytest.approx(first.tokens_in, rel=0.2)
        assert second.expected_cost < first.expected_cost


def test_sessions_differ_between_conversations_and_are_one_whatever_names_them():
    shape, old_shape = agents.claude_code(), agents.claude_code_before_its_header()
    other = {**shape.headers, "x-claude-code-session-id": "another"}
    nameless = {k: v for k, v in old_shape.steps[0].items() if k != "metadata"}
    follow = {k: v for k, v in old_shape.steps[2].items() if k != "metadata"}
    _, _, records = sent(
        (shape.path, shape.headers, shape.steps[0]),
        (shape.path, other, shape.steps[0]),
        (shape.path, {}, nameless),
        (shape.path, {}, follow),
    )
    sessions = [record.session for record in records]
    assert len(set(sessions[:3])) == 3
    assert sessions[2] == sessions[3]  # by what the conversation began with, whatever systems say later


def test_a_users_id_alone_is_no_session():
    """LibreChat's user, or Anthropic's user_id, has many conversations."""
    body = {"model": "auto", "max_tokens": 9, "metadata": {"user_id": "ada"}}
    bodies = [{**body, "messages": [{"role": "user", "content": text}]} for text in ("One?", "Two?")]
    _, _, records = sent(*(("/v1/messages", {}, body) for body in bodies))
    assert records[0].session != records[1].session


def test_tokens_are_counted_for_claude_code():
    shape = agents.claude_code()
    counted = {name: shape.steps[0][name] for name in ("model", "messages", "system", "tools", "thinking")}

    async def run():
        async with (
            serving(config_for("http://127.0.0.1:1/v1")) as server,
            aiohttp.ClientSession(headers=shape.headers) as client,
            client.post(f"{server.url}/v1/messages/count_tokens?beta=true", json=counted) as answer,
        ):
            return answer.status, await answer.json()

    status, found = asyncio.run(run())
    assert (status, set(found)) == (200, {"input_tokens"})
    assert found["input_tokens"] > 100


def test_a_helpers_requests_do_not_forget_what_the_agents_own_conversation_has_in_the_cache():
    """A subagent and a title belong to the session, and share nothing with it but the session's name."""
    main, title = agents.claude_code(), agents.claude_code_title()
    helper = {**main.steps[0], "system": "You help.", "messages": [{"role": "user", "content": "Find it."}]}
    _, _, records = sent(
        (main.path, main.headers, main.steps[1]),
        (main.path, main.headers, helper),
        (title.path, title.headers, title.steps[0]),
        (main.path, main.headers, main.steps[2]),
    )
    assert len({record.session for record in records}) == 1
    assert records[3].tokens_cached > 0
    assert records[3].expected_cost < records[0].expected_cost


@pytest.mark.parametrize("make", [agents.codex_cli, agents.claude_code])
def test_encrypted_reasoning_goes_back_to_the_provider_that_wrote_it(make):
    """No other provider can read it: OpenAI refuses it with 400, and the agent stops."""
    shape = make()
    name = "input" if "input" in shape.steps[0] else "messages"

    async def run():
        async with MockProvider(PRICES) as one, MockProvider(PRICES) as other:
            config = config_for(one, LARGE)
            for model in ("medium", "small"):
                for provider in config["models"][model]["provider"]:
                    provider["base_url"] = f"{other.url}/v1"
            async with (
                serving(config, FixedEngine(theta=None)) as server,
                aiohttp.ClientSession(headers=shape.headers) as client,
            ):
                for i in range(8):  # as many turns as it takes to want another model
                    body = shape.steps[min(i, 1)]
                    said = [*body[name], *({"role": "user", "content": f"And {k}?"} for k in range(1, i))]
                    async with client.post(server.url + shape.path, json={**body, name: said}) as answer:
                        await answer.read()
                return [record.model == "large" for record in server.records]

    assert len(set(asyncio.run(run()))) == 1


def test_a_session_remembers_the_last_branches():
    counter, memory = TokenCounter(lambda text: 10), SessionMemory(300, 10)

    async def chain(*texts):
        return await counter.counted([text.encode() for text in texts])

    async def run():
        for i in range(BRANCHES + 1):
            memory.remember("s", "large", await chain(f"system {i}", "user"))
            memory.remember("s", "large", await chain(f"system {i}", "user", "answer", "user"))  # replaces it
        return [
            memory.cached("s", await chain(f"system {i}", "user", "answer"), ["large", "small"]) for i in range(BRANCHES + 1)
        ]

    found = asyncio.run(run())
    assert found[0] == [0, 0]
    assert all(large > 0 and small == 0 for large, small in found[1:])


@pytest.mark.slow
@given(
    st.lists(st.sampled_from([*(mark for pair in AGENTS_OWN for mark in pair), "Hello", " ", "\n", "<", ">", "é"]), max_size=12)
)
def test_text_of_agents_is_taken_out_and_nothing_else(pieces):
    text = "".join(pieces)
    found = without(text, AGENTS_OWN)
    assert found is text or len(found) < len(text)
    if not any(begin in text and end in text for begin, end in AGENTS_OWN):
        assert found is text
    kept = iter(text)
    assert all(letter in kept for letter in found)  # what is left is in the order in which it was
    contents = Contents()
    contents.turn(text)
    assert contents.turns in ([], [text], [found.strip()])


@pytest.mark.parametrize(
    ("text", "turns"),
    [
        ("Hello", ["Hello"]),
        (" Hello\n", [" Hello\n"]),
        ("", [""]),
        (agents.REMINDER, []),
        (f"{agents.REMINDER}Hello", ["Hello"]),
        (f"Hello\n{agents.REMINDER}{agents.REMINDER}", ["Hello"]),
        ("What is <system-reminder>?", ["What is <system-reminder>?"]),
        ("</system-reminder>What is <system-reminder>?", ["</system-reminder>What is <system-reminder>?"]),
        ("# AGENTS.md instructions for /work\n\n<INSTRUCTIONS>\nUse tabs.\n</INSTRUCTIONS>", []),
    ],
)
def test_a_turn_is_what_the_user_said(text, turns):
    contents = Contents()
    contents.turn(text)
    assert contents.turns == turns


def test_taking_out_takes_time_in_proportion_to_the_text():
    """Marks that are never closed, a hundred thousand of them."""
    hostile = "<system-reminder>" * 100_000
    assert without(hostile, AGENTS_OWN) is hostile
    assert without((agents.REMINDER + "a") * 20_000, AGENTS_OWN) == "\n\na" * 20_000


def test_the_shapes_are_json():
    for make in agents.SHAPES:
        for body in make().steps:
            assert json.loads(json.dumps(body)) == body


# the programs themselves, with the settings of docs/clients.md


def block(language, marker):
    """The page's block that contains the marker."""
    page = Path(__file__).resolve().parents[1] / "docs" / "clients.md"
    found = re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S)
    return next(text for text in found if marker in text)


def run_program(variable, home, command, environment, faults=()):
    """Runs a program that an environment variable names, in a home of its own: what it printed, and the server's records.

    command and environment: functions of the server's address.
    """
    program = os.environ.get(variable)
    if program is None:
        pytest.skip(f"{variable}: names no program")
    work = home / "work"
    work.mkdir()

    async def run():
        patient = {"connect": 1, "first_byte": 10, "whole": 10, "idle": 2, "total": 60}
        async with (
            MockProvider(PRICES) as provider,
            serving(config_for(provider, LARGE, timeouts=patient), log_prompts=True) as server,
        ):
            for fault in faults:
                provider.fail(**fault)
            base = {"PATH": os.environ["PATH"], "HOME": str(home), "LANG": "C.UTF-8", "TERM": "xterm"}
            process = await asyncio.create_subprocess_exec(
                program, *command, cwd=work, env={**base, **environment(server.url)}, stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
            )  # fmt: skip
            try:
                printed, _ = await asyncio.wait_for(process.communicate(), 300)
            finally:
                if process.returncode is None:
                    process.kill()
            return process.returncode, printed.decode(), server.records

    return asyncio.run(run())


BROKEN = [(), ({"fault": "cut_reset", "tokens": 5, "times": 1},), ({"fault": "status", "status": 500, "times": 2},)]


@pytest.mark.slow
@pytest.mark.parametrize("faults", BROKEN, ids=["calm", "cut", "errors"])
def test_claude_code(tmp_path, faults):
    """P2L_CLAUDE_CODE is its program, of the npm package @anthropic-ai/claude-code."""

    def environment(url):
        lines = re.findall(r"^export (\w+)=('.*?'|\S+)", block("sh", "ANTHROPIC_BASE_URL"), re.M)
        return {name: value.strip("'").replace("http://localhost:8000", url) for name, value in lines}

    command = ["-p", "What is in a.txt?", "--max-turns", "3", "--disallowedTools", "Agent", "Task"]
    status, printed, records = run_program("P2L_CLAUDE_CODE", tmp_path, command, environment, faults)
    assert status == 0, printed
    answered = [record for record in records if record.outcome == "answered"]
    assert len(answered) >= 2  # the call of a tool, and the answer
    assert {record.turns for record in records} == {("What is in a.txt?",)}
    assert len({record.session for record in records}) == len({record.turns_hash for record in records}) == 1
    assert {record.budget for record in records} == {0.05}
    assert answered[-1].tokens_cached > 0


@pytest.mark.slow
@pytest.mark.parametrize("faults", BROKEN, ids=["calm", "cut", "errors"])
def test_codex_cli(tmp_path, faults):
    """P2L_CODEX is its program, of the npm package @openai/codex."""

    def environment(url):
        (tmp_path / ".codex").mkdir()
        text = block("toml", "model_provider").replace("http://localhost:8000", url)
        (tmp_path / ".codex" / "config.toml").write_text(text, encoding="utf-8")
        return {tomllib.loads(text)["model_providers"]["p2l"]["env_key"]: "sk-p2l"}

    command = ["exec", "--skip-git-repo-check", "-s", "read-only", "What is in a.txt?"]
    status, printed, records = run_program("P2L_CODEX", tmp_path, command, environment, faults)
    assert status == 0, printed
    answered = [record for record in records if record.outcome == "answered"]
    assert len(answered) >= 2
    assert {record.turns for record in records} == {("What is in a.txt?",)}
    assert len({record.session for record in records}) == 1
    assert {record.budget for record in records} == {0.05}
    assert answered[-1].tokens_cached > 0
