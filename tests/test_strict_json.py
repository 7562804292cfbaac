"""JSON whose objects name each key once, against Python's own module."""

from __future__ import annotations

import json
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2l_engine import strict_json
from p2l_engine.strict_json import DuplicateKeyError


def objects(inner):
    return st.lists(st.tuples(keys, inner), max_size=4).map(lambda pairs: Written(tuple(pairs)))


class Written(NamedTuple):
    """An object as its pairs, which may name a key twice."""

    pairs: tuple


def as_text(value):
    if isinstance(value, Written):
        return "{" + ",".join(f"{json.dumps(key)}: {as_text(of)}" for key, of in value.pairs) + "}"
    return "[" + ", ".join(map(as_text, value)) + "]" if isinstance(value, list) else json.dumps(value)


def names_twice(value):
    if isinstance(value, Written):
        return len(dict(value.pairs)) < len(value.pairs) or any(names_twice(of) for _, of in value.pairs)
    return isinstance(value, list) and any(map(names_twice, value))


keys = st.text('ab\u00e9\\"', max_size=2)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4), lambda inner: st.lists(inner, max_size=3) | objects(inner)
)


@pytest.mark.slow
@given(value=values)
def test_json_is_pythons_or_names_a_key_twice(value):
    if names_twice(value):
        with pytest.raises(DuplicateKeyError, match="got .* twice"):
            strict_json.parsed(as_text(value))
    else:
        assert strict_json.parsed(as_text(value)) == json.loads(as_text(value))
