"""A prompt's cell to the user's turns: the same from every layout, and what the server reads."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2l_engine.apis.registry import APIS
from p2l_engine.batch.worker import _without_arrays
from p2l_engine.tables.layouts import PromptColumn
from p2l_engine.tables.nested import split_column, value_at
from p2l_engine.tables.turns import HUMAN, PARTS, cell_turns
from tests.support.layouts import (
    LAYOUTS,
    TALK,
    TALKS,
    TURNS,
    openai_chat,
)


@pytest.mark.slow
@given(talk=TALK)
@settings(max_examples=60, deadline=None)
def test_the_same_turns_come_from_each_layout(talk):
    expected = tuple(text for role, text in talk if role == "user")
    columns = ("body", "params", "conversations", "messages", "conversation", "conversation_a")
    for row_of, _ in LAYOUTS.values():
        row = row_of(talk)
        cell = next(row[name] for name in columns if name in row)
        assert cell_turns(cell, as_served=True) == expected
        inner = cell.get("messages", cell.get("input")) if isinstance(cell, dict) else cell
        assert cell_turns(inner, as_served=True) == expected
        assert cell_turns(json.dumps(inner), as_served=True) == expected
        # A column's common type puts nulls where an object lacks a key; Spark's maps are pairs.
        stored = pa.array([cell, *([row_of([("user", "other")])[name] for name in columns if name in row])])
        assert cell_turns(stored[0].as_py(), as_served=True) == expected


PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
BODIES = [
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "look"}, PICTURE]}]},
    {"messages": [{"role": "user", "content": [PICTURE]}]},
    {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "AA", "format": "wav"}}]}]},
    {"messages": [{"role": "user", "content": [{"type": "file", "file": {"file_id": "f"}}, {"type": "text", "text": "sum"}]}]},
    {"messages": [{"role": "system", "content": "only instructions"}]},
    {"messages": [{"role": "assistant", "content": "only an answer"}]},
    {"messages": [{"role": "user", "content": "<system-reminder>x</system-reminder>"}, {"role": "user", "content": "so?"}]},
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": None, "tool_calls": [{"id": "c"}]},
                  {"role": "tool", "tool_call_id": "c", "content": "42"}]},
    {"input": "as text", "instructions": "s"},
    {"input": [{"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "input_image", "image_url": "x"}]}]},
    {"input": [{"type": "reasoning", "encrypted_content": "e"}, {"role": "user", "content": "b"}]},
    {"max_tokens": 5, "system": [{"type": "text", "text": "s"}], "messages": [{"role": "user", "content": "c"}]},
    {"max_tokens": 5, "messages": [{"role": "user", "content": [
        {"type": "tool_result", "tool_use_id": "t", "content": [{"type": "text", "text": "r"}]},
        {"type": "text", "text": "d"}]}]},
    {"max_tokens": 5, "messages": [{"role": "user", "content": [{"type": "text", "text": "e"}]}, {"role": "user", "content": [
        {"type": "tool_result", "tool_use_id": "t", "content": "r"}]}]},
    {"max_tokens": 5, "messages": [{"role": "user", "content": [
        {"type": "document", "source": {"type": "text", "data": "of a document"}},
        {"type": "image", "source": {"type": "base64", "data": "AAAA"}}]}]},
]  # fmt: skip


@pytest.mark.parametrize("body", BODIES)
def test_requests_are_read_as_the_server_reads_them(body):
    api = APIS["responses" if "input" in body else "messages" if "max_tokens" in body else "chat"]
    asked = tuple(api.ask({"model": "m", **body}).turns)
    assert cell_turns(body, as_served=True) == asked
    stored = pa.array([body, {**body, "temperature": 1.0}])[0].as_py()
    assert cell_turns(stored, as_served=True) == asked


def test_parts_of_messages_are_read_as_the_server_reads_them():
    for body in BODIES:
        messages = body.get("messages", body.get("input"))
        if isinstance(messages, list) and not any(word in str(body) for word in ("only", "reminder")):
            assert cell_turns(messages, as_served=True) == cell_turns(body, as_served=True)
    assert cell_turns([{"type": "text", "text": "a"}, {"type": "image", "source": {}}], as_served=True) == ("a\n[image]",)
    assert cell_turns([[("role", "user"), ("content", "of a map")]]) == ("of a map",)
    call = [{"type": "function_call", "name": "f"}, {"role": "user", "content": "x"}]
    for cell in ([{"role": "user", "content": [PICTURE]}], {"messages": [{"role": "user", "content": "x"}]}, call):
        with pytest.raises(ValueError, match="images are not read|got dict|expected a 'role'"):  # votes compare texts
            cell_turns(cell)


@pytest.mark.parametrize(
    ("cell", "why"),
    [
        ({"messages": []}, "messages: expected at least one message, got none"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, r"messages\[0\].role: expected one of system, .*, got 'wizard'"),
        (
            {"messages": [{"role": "user", "content": [{"text": "x"}]}]},
            r"messages\[0\].content\[0\]: expected a part with a 'type'",
        ),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "invalid Unicode"),
        ({"input": [], "model": "m"}, "input: expected at least one message, got none"),
        ({"input": "x", "messages": [{"role": "user", "content": "y"}]}, "expected a request with messages or input, got both"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "expected at least one user turn, got none"),
        ({"input": "x", "conversation": "c"}, "conversation: is kept by one provider alone"),
        ({"input": "x", "prompt": {"id": "p"}}, "prompt: is kept by one provider alone"),
        ({"prompt": "x"}, "expected a string, a list of user turns or a list of messages, got dict"),
        ([{"from": "gpt", "value": "x"}], "expected at least one user turn, got none"),
        ([{"from": "human", "value": None}], "message 0: expected a 'content' of type str or a list of text parts, got None"),
        ([{"from": ["human"], "value": "x"}], r"message 0: expected a 'role' of type str, got \['human'\]"),
        ([{"role": "user", "content": [PICTURE, 3]}], r"message 0: content\[1\]: expected a part with a 'type'"),
        ([{"type": "function_call", "name": "f"}], "expected at least one user turn, got none"),
        ([{"type": "human", "content": "x"}, {"role": "user", "content": "y"}], "message 0: expected a 'role' of type str"),
    ],
)
def test_a_cell_that_is_no_prompt_says_why(cell, why):
    with pytest.raises(ValueError, match=f"^prompt: .*{why}"):
        cell_turns(cell, as_served=True)


def deep(levels):
    found = [{"type": "text", "text": "x"}]
    for _ in range(levels):
        found = [{"type": "tool_result", "tool_use_id": "t", "content": found}]
    return {"max_tokens": 1, "messages": [{"role": "user", "content": found}]}


@pytest.mark.slow
def test_a_request_without_end_is_an_error_of_its_row():
    assert cell_turns(deep(3) | {"system": "s"}, as_served=True) == ("s",)
    for cell in (deep(20_000), deep(20_000)["messages"]):
        with pytest.raises(ValueError, match="prompt: nested too deeply"):
            cell_turns(cell, as_served=True)


LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.sampled_from([*sorted(PARTS), *HUMAN, "", "\ud800"])
)
KEYS = [
    "role",
    "content",
    "type",
    "text",
    "messages",
    "input",
    "from",
    "value",
    "system",
    "instructions",
    "source",
    "max_tokens",
]
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(KEYS), inner, max_size=5)
        | st.lists(st.tuples(st.sampled_from(KEYS), inner), max_size=3)
    ),
    max_leaves=20,
)
MESSAGES = st.fixed_dictionaries(
    {"role": st.sampled_from(HUMAN), "content": VALUES}, optional={"type": VALUES, "value": VALUES}
)
CELLS = (
    VALUES | st.lists(MESSAGES, max_size=3) | st.dictionaries(st.sampled_from(KEYS), VALUES | st.lists(MESSAGES, max_size=3))
)


@pytest.mark.slow
@given(cell=CELLS, as_served=st.booleans())
@settings(max_examples=150, deadline=None)
def test_any_cell_is_turns_or_says_why(cell, as_served):
    for read_it in (
        lambda: cell_turns(cell, as_served=as_served),
        lambda: PromptColumn("body", cells="requests").turns(cell),
        lambda: PromptColumn("messages", cells="messages").turns(cell),
        lambda: PromptColumn("body", "messages").turns(cell),
    ):
        try:
            turns = read_it()
        except ValueError as error:
            assert str(error).startswith(("prompt: ", "body: ", "messages: "))
        else:
            assert turns
            assert all(isinstance(turn, str) and turn.encode() is not None for turn in turns)


NAMES = st.text("ab.", min_size=1, max_size=5)
OBJECTS = st.recursive(st.integers(), lambda inner: st.dictionaries(NAMES, inner, max_size=4), max_leaves=12)


def every(value, begun=""):
    """All paths of an object, and whether a shorter key came before."""
    for key, inner in value.items() if isinstance(value, dict) else ():
        yield begun + key, inner
        yield from every(inner, f"{begun}{key}.")


@pytest.mark.slow
@given(value=st.dictionaries(NAMES, OBJECTS, min_size=1, max_size=5), as_text=st.booleans())
@settings(max_examples=100, deadline=None)
def test_a_path_finds_what_some_reading_of_it_finds_and_whole_names_first(value, as_text):
    paths = list(every(value))
    for path, _ in paths:
        readings = [inner for other, inner in paths if other == path]
        assert value_at(json.dumps(value) if as_text else value, path) in readings
        if path in value:
            assert value_at(value, path) == value[path]
        begun = [name for name in value if path.startswith(f"{name}.") and len(name) < len(path) - 1]
        column = path if path in value else max(begun, key=len, default=path)
        assert split_column(path, list(value)) == (column, path[len(column) + 1 :])
    assert value_at(value, "c.c") is None


def test_arrays_of_pandas_are_lists(tmp_path):
    pd.DataFrame([openai_chat(talk, parts=True) for talk in TALKS]).to_parquet(tmp_path / "in.parquet")
    cells = pd.read_parquet(tmp_path / "in.parquet")["body"]
    assert isinstance(cells[0]["messages"], np.ndarray)
    assert [cell_turns(_without_arrays(cell), as_served=True) for cell in cells] == TURNS
