"""Events of a provider's stream: split wherever its bytes are cut, and read as what their JSON says."""

from __future__ import annotations

import re

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2l_engine.apis.api import error_text, mapping, sequence, size
from p2l_engine.apis.chat import ChatStream, usage_of
from p2l_engine.apis.events import Splitter, data_of

# Two line ends, of which "\r\n" is one: an event ends with the second.
BOUNDARY = re.compile(rb"(?>\r\n|\n|\r)(?>\r\n|\n|\r)")
TEXTS = st.text(st.sampled_from("aß€😀\n "), max_size=4)
JUNK = st.none() | st.booleans() | st.integers(-3, 3) | TEXTS
CALL = st.none() | JUNK | st.fixed_dictionaries({}, optional={"arguments": JUNK, "function": JUNK})
DELTA = st.fixed_dictionaries(
    {},
    optional={
        "content": JUNK, "role": JUNK, "refusal": JUNK, "reasoning": JUNK, "reasoning_content": JUNK, "function_call": CALL,
        "tool_calls": JUNK | st.lists(CALL, max_size=2), "audio": JUNK | st.fixed_dictionaries({}, optional={"id": JUNK}),
    },
)  # fmt: skip
CHUNK = st.fixed_dictionaries(
    {},
    optional={
        "choices": JUNK | st.lists(JUNK | st.fixed_dictionaries({}, optional={"delta": JUNK | DELTA}), max_size=2),
        "usage": JUNK | st.fixed_dictionaries({}, optional={"prompt_tokens": JUNK, "completion_tokens": JUNK}),
        "error": st.none() | TEXTS | st.fixed_dictionaries({}, optional={"message": JUNK}),
    },
)


@given(st.lists(st.lists(st.sampled_from([b"a", b":", b"\n", b"\n\n"]), max_size=6).map(b"".join), max_size=6))
def test_events_are_split_wherever_pieces_end(pieces):
    whole = b"".join(pieces)
    ends = [found.end() for found in BOUNDARY.finditer(whole)]
    expected = [whole[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    splitter = Splitter()
    events = [event for piece in pieces for event in splitter.feed(piece)]
    assert events == expected
    assert splitter.rest == whole[ends[-1] if ends else 0 :]


@given(st.lists(st.sampled_from([b"a\r\n\r\n", b"b\n\n", b"c\n\r\n", b"d\r\r", b"e", b"\n"]), max_size=6), st.integers(1, 5))
def test_line_ends_of_all_kinds(parts, size):
    """In pieces of any size; where "\\r" ends a piece, "\\n" may still belong to it."""
    whole, splitter = b"".join(parts), Splitter()
    events = [event for start in range(0, len(whole), size) for event in splitter.feed(whole[start : start + size])]
    assert b"".join(events) + splitter.rest == whole
    assert all(re.search(rb"(\r\n|\n|\r)(\r\n|\n|\r)\Z", event) for event in events)


def read_in_full(chunk, wanted):
    """The reference implementation: every field of every choice. -> whether it is seen, error, bytes, ids of audio, usage"""
    if (error := error_text(chunk)) is not None:
        return False, error, 0, [], None
    chunk, written, kept = mapping(chunk), 0, []
    for choice in sequence(chunk.get("choices")):
        delta = mapping(mapping(choice).get("delta"))
        audio = mapping(delta.get("audio")).get("id")
        kept += [audio] if isinstance(audio, str) else []
        written += size(delta.get("content")) + size(delta.get("refusal"))
        written += size(delta.get("reasoning_content")) or size(delta.get("reasoning"))
        for call in (delta.get("function_call"), *sequence(delta.get("tool_calls"))):
            written += size(mapping(mapping(call).get("function", call)).get("arguments"))
    usage = usage_of(chunk)
    return not (usage and not chunk.get("choices")) or wanted, None, written, kept, usage


@given(JUNK | CHUNK, st.booleans())
def test_chunks_of_chat_are_read_as_their_fields_say(chunk, wanted):
    stream = ChatStream(wanted)
    seen = stream.read(b"data: " + orjson.dumps(chunk) + b"\n\n")
    assert (seen, stream.error, stream.written, stream.kept, stream.usage) == read_in_full(chunk, wanted)
    assert not stream.ended


@pytest.mark.parametrize("event", [b"data: [DONE]\n\n", b"data:[DONE]\n\n", b"data:  [DONE] \r\n\r\n", b"data: \t[DONE]\n\n"])
def test_the_end_of_chat(event):
    stream = ChatStream(True)
    assert stream.read(event)
    assert stream.ended
    assert data_of(event).strip() == b"[DONE]"


@pytest.mark.parametrize("data", [b"{", b"[DONE", b"x[DONE]", b"[DONE]]"])
def test_what_is_no_json_is_an_error(data):
    stream = ChatStream(True)
    assert not stream.read(b"data: " + data + b"\n\n")
    assert stream.error is not None
    assert not stream.ended
