"""Tokens in the server: counted by P2L's tokenizer or the provider's own, and never fewer than a provider may count."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import threading
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.mock_provider import MockProvider
from p2l_engine.apis.registry import APIS
from p2l_engine.serve.encodings import counters
from p2l_engine.serve.model_entry import Model
from p2l_engine.serve.tokens import as_text
from tests.support.serving import PRICES, config_for, serving

SPECIAL = ("<|endoftext|>", "<|im_start|>")
BODY = {"model": "auto", "max_tokens": 10, "messages": [{"role": "user", "content": "count these tokens, please"}]}


class Pieces:
    """A tokenizer of words, to which some texts are one token each."""

    added_tokens = SPECIAL

    def ids(self, texts: Any) -> list[list[int]]:
        found = []
        for text in texts:
            for token in SPECIAL:
                text = text.replace(token, " \x00 ")
            found.append([0] * len(text.split()))
        return found


@pytest.mark.slow
@given(st.lists(st.sampled_from(["word", " ", "<|im_start|>", "<|endoftext|>", "<|im_", "é"]), max_size=30).map("".join))
def test_special_tokens_of_a_prompt_are_text_to_a_provider(text):
    specials = sum(text.count(token) * len(token) for token in SPECIAL)
    assert as_text(Pieces())(text) >= specials
    if not specials:
        assert as_text(Pieces())(text) == len(text.split())


def encoding(name: str = "o200k_base") -> Any:
    tiktoken = pytest.importorskip("tiktoken")
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"th": 256, b"the": 257}
    return tiktoken.Encoding(name, pat_str=r"\w+|\W", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 258})


def models(**names: Any) -> dict[str, Model]:
    """Models by name, each with deployments whose provider knows them by these names."""
    priced = {"usd_per_m_in": 1, "usd_per_m_out": 1, "tokens_in": 1, "tokens_out": 1}
    return {
        name: Model(**priced, provider=[{"base_url": "http://127.0.0.1:9/v1", "model": model} for model in deployments])
        for name, deployments in names.items()
    }


@pytest.fixture
def loads(monkeypatch):
    """The names of the encodings that were asked for, and the threads that asked."""
    tiktoken, found = pytest.importorskip("tiktoken"), []

    def get_encoding(name: str) -> Any:
        found.append((name, threading.current_thread().name))
        return encoding(name)

    monkeypatch.setattr(tiktoken, "get_encoding", get_encoding)
    return found


def test_models_that_tiktoken_knows_are_counted_by_it(loads):
    found, lines = counters(
        models(a=["gpt-4o-mini"], b=["gpt-4o-2024-08-06", "gpt-4o"], c=["gpt-4"], d=["other"], e=["gpt-4", "gpt-4o"], f=[])
    )
    assert set(found) == {"a", "b", "c"}
    assert found["a"] is found["b"]
    assert [name for name, _ in loads] == ["o200k_base", "cl100k_base"]
    assert lines == ["tokens of a, b: counted by tiktoken's o200k_base", "tokens of c: counted by tiktoken's cl100k_base"]


@pytest.mark.parametrize("there", [True, False])
def test_files_in_tiktokens_cache_need_no_network(there, tmp_path, monkeypatch):
    tiktoken = pytest.importorskip("tiktoken")
    from tiktoken import load, registry

    address = "https://nowhere.invalid/small.tiktoken"
    if there:
        ranks = encoding()._mergeable_ranks.items()
        lines = [base64.b64encode(token) + b" %d" % rank for token, rank in ranks]
        (tmp_path / hashlib.sha1(address.encode()).hexdigest()).write_bytes(b"\n".join(lines))
    asked = []

    def get(url: str, *_: Any, **__: Any) -> Any:
        asked.append(url)
        raise ConnectionError(url)

    monkeypatch.setattr("requests.get", get)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(registry, "ENCODINGS", {})
    made = {"name": "o200k_base", "pat_str": r"\w+|\W", "special_tokens": {}}
    constructors = {"o200k_base": lambda: made | {"mergeable_ranks": load.load_tiktoken_bpe(address)}}
    monkeypatch.setattr(registry, "ENCODING_CONSTRUCTORS", constructors)
    found, (line,) = counters(models(a=["gpt-4o"]))
    assert set(found) == ({"a"} if there else set())
    assert ("counted by tiktoken" in line) == there
    assert asked == ([] if there else [address])
    if there:
        assert asyncio.run(found["a"].counted([b"the"])).total == len(tiktoken.get_encoding("o200k_base").encode("the")) + 4


@pytest.mark.parametrize("kind", [ConnectionError, ValueError, SystemExit])
def test_an_encoding_that_cannot_be_read_is_a_line(kind, monkeypatch):
    def fails(name: str) -> Any:
        raise kind("no way to it")

    monkeypatch.setattr(pytest.importorskip("tiktoken"), "get_encoding", fails)
    found, (line,) = counters(models(a=["gpt-4o"]))
    assert not found
    assert "tokens of a: counted by the P2L tokenizer, with its margin" in line
    assert "TIKTOKEN_CACHE_DIR" in line


def test_a_network_that_is_silent_does_not_hold_up_the_start(monkeypatch):
    silent = threading.Event()
    monkeypatch.setattr(pytest.importorskip("tiktoken"), "get_encoding", lambda name: silent.wait(10))
    found, (line,) = counters(models(a=["gpt-4o"]), seconds=0.05)
    silent.set()
    assert not found
    assert "TimeoutError" in line


def test_without_tiktoken_nothing_changes(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tiktoken", None)
    assert counters(models(a=["gpt-4o"])) == ({}, [])


TEXTS = st.text(max_size=60) | st.lists(st.sampled_from(["the", " ", "<|endoftext|>", "🙂", "\ud800"]), max_size=9).map("".join)


@pytest.mark.slow
@given(st.lists(TEXTS, max_size=5), st.integers(0, 3))
def test_any_text_is_counted_as_text(texts, long):
    tiktoken = pytest.importorskip("tiktoken")
    own, load = encoding(), tiktoken.get_encoding
    tiktoken.get_encoding = lambda name: own
    try:
        counter = counters(models(a=["gpt-4o"]))[0]["a"]
    finally:
        tiktoken.get_encoding = load
    sent = [(text + "x" * (long * 3_000)).encode("utf-8", "replace") for text in texts]
    ends = asyncio.run(counter.counted(sent)).ends
    counts = [end - before - 4 for before, end in zip((0, *ends), ends, strict=False)]
    for count, text in zip(counts, sent, strict=True):
        assert count >= len(own.encode(text.decode(), disallowed_special=()))
        assert count <= len(text)


def test_each_model_has_its_own_count_in_costs_windows_and_worst_cases(loads):
    async def one() -> Any:
        async with MockProvider({**PRICES, "gpt-4o": (3.0, 15.0, 0.3)}) as provider:
            config = config_for(provider, {"large": {"provider": {"base_url": f"{provider.url}/v1", "model": "gpt-4o"}}})
            async with serving(config) as server:
                began = len(loads)
                call = await server.service.call(APIS["chat"], BODY, {}, None, "chat")
                await server.service.decide(call)
                again = await server.service.call(APIS["chat"], BODY, {}, None, "chat")
                server.service.sessions.remember(again.session, "large", again.bill.counted)
                await server.service.decide(again)
                return call, again, began, len(loads), server.runtime.notes

    call, again, began, ended, notes = asyncio.run(one())
    own = len(encoding().encode("user\n" + BODY["messages"][0]["content"])) + 4
    others = -(-len("user\n" + BODY["messages"][0]["content"]) // 4) + 4
    assert (call.bill.tokens_in(0), call.bill.tokens_in(1), call.bill.tokens_in()) == (own, others, others)
    assert call.bill.most_tokens_in(0) == -(-own * 105 // 100) + 16
    assert call.bill.most_tokens_in(1) == -(-others * 125 // 100) + 16
    assert call.costs[0] == pytest.approx((own * 3 + 10 * 15) / 1e6)
    assert again.cached[0] == own
    assert again.costs[0] == pytest.approx((own * 0.3 + 10 * 15) / 1e6)
    assert began == ended == 1  # nothing is read within a request
    assert notes == ["tokens of large: counted by tiktoken's o200k_base"]
    assert all(name == "tiktoken" for _, name in loads)
