"""Which type of Arrow's fits JSON values: counted over all rows, since the first ones may be null, or odd."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import pyarrow as pa

MAX_DEPTH = 48  # lists and objects within each other that parquet files may hold
MAX_PLACES = 10_000  # in a file's kept columns: objects whose keys are data would make a column for each
MAX_SPARSE, LEAST_FILLED = 1_000, 0.05  # different keys of objects that have a smaller share of them in the mean
EXACT = 1 << 53  # the integers up to which are floats
NUMBER = "number"
NAMES: dict[type, str] = {str: "text", bool: "true or false", int: NUMBER, float: NUMBER, list: "list", dict: "object"}


@dataclass(slots=True)
class Shape:
    """What is at one place of a column's values: how many values, nulls among them, and how many of each kind; of the numbers
    how many are floats, integers that are exact as floats, and integers that fit in signed and in unsigned 64 bits; the items
    of the lists; and the fields of the objects."""

    depth: int = 0
    values: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    floats: int = 0
    exact: int = 0
    signed: int = 0
    unsigned: int = 0
    items: Shape | None = None
    fields: dict[str, Shape] = field(default_factory=dict)

    def add(self, values: Sequence[Any]) -> None:
        """More values, as JSON has them."""
        self.values += len(values)
        for kind, count in Counter(map(type, values)).items():
            if kind is int:
                self._add_integers([value for value in values if type(value) is int])
            elif kind is float:
                self.floats += count
            elif kind in (list, dict):
                if self.depth == MAX_DEPTH:
                    continue
                self._add_nested([value for value in values if type(value) is kind])
            if kind in NAMES:
                self.kinds[NAMES[kind]] += count

    def type(self) -> pa.DataType:
        """The type of the most common kind, the first among equals; of numbers, the one that holds the most. Null without
        values, and where no value can be stored."""
        if not self.kinds:
            return pa.null()
        kind = max(self.kinds, key=self.kinds.__getitem__)
        if kind == "list":
            assert self.items is not None
            return pa.list_(self.items.type())
        if kind == "object":
            return pa.struct([(name, each.type()) for name, each in self.fields.items()])
        return self._number() if kind == NUMBER else pa.string() if kind == "text" else pa.bool_()

    def places(self) -> int:
        """How many places there are in it."""
        below = sum(each.places() for each in self.fields.values())
        return 1 + below + (0 if self.items is None else self.items.places())

    def sparse(self, name: str) -> Iterator[str]:
        """The places with objects of very many keys, of which each object has few."""
        yield from sparse_keys(name, self.kinds["object"], self.fields)
        inner = [(f"{name}[]", self.items)] if self.items is not None else []
        for place, each in (*inner, *((f"{name}.{key}", each) for key, each in self.fields.items())):
            yield from each.sparse(place)

    def mixed(self, name: str) -> Iterator[str]:
        """The places with values of several kinds, and how many of each; of numbers, those that have no common type."""
        if len(self.kinds) > 1:
            yield f"{name}: {', '.join(f'{kind} ({count:,})' for kind, count in self.kinds.most_common())}"
        numbers, held = self.kinds[NUMBER], self._held()
        if held < numbers:
            yield f"{name}: numbers of which {numbers - held:,} of {numbers:,} are not exact as {self._number()}"
        if self.items is not None:
            yield from self.items.mixed(f"{name}[]")
        for key, each in self.fields.items():
            yield from each.mixed(f"{name}.{key}")

    def _add_integers(self, values: list[int]) -> None:
        least, most = min(values), max(values)
        self.exact += len(values) if least >= -EXACT and most <= EXACT else sum(-EXACT <= value <= EXACT for value in values)
        fit = least >= -(1 << 63) and most < 1 << 63
        self.signed += len(values) if fit else sum(-(1 << 63) <= value < 1 << 63 for value in values)
        fit = least >= 0 and most < 1 << 64
        self.unsigned += len(values) if fit else sum(0 <= value < 1 << 64 for value in values)

    def _add_nested(self, values: list[Any]) -> None:
        if isinstance(values[0], list):
            self.items = self.items or Shape(self.depth + 1)
            self.items.add(list(chain.from_iterable(values)))
            return
        for name, found in by_key(values).items():
            self.fields.setdefault(name, Shape(self.depth + 1)).add(found)

    def _held_by(self) -> dict[pa.DataType, int]:
        held = {pa.int64(): self.signed, pa.uint64(): self.unsigned}
        return held | ({pa.float64(): self.exact + self.floats} if self.floats else {})

    def _held(self) -> int:
        return max(self._held_by().values())

    def _number(self) -> pa.DataType:
        held = self._held_by()
        return max(held, key=held.__getitem__) if self._held() else pa.null()


def sparse_keys(place: str, objects: int, fields: Mapping[str, Shape]) -> Iterator[str]:
    """The place, where so many objects have fields of very many keys, and each object few of them: stored, each has all."""
    values = sum(each.values for each in fields.values())
    if len(fields) > MAX_SPARSE and values < LEAST_FILLED * objects * len(fields):
        yield f"{place} ({len(fields):,} different keys, {values / objects:.3g} in the mean object)"


def by_key(objects: Iterable[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The values of each key that can be a column's name, in one pass: objects may have more keys together than there are
    objects."""
    found = defaultdict[str, list[Any]](list)
    for each in objects:
        for key, value in each.items():
            found[key].append(value)
    return {key: values for key, values in found.items() if is_name(key)}


def is_name(text: str) -> bool:
    """Whether a key can be a column's name: JSON may hold half a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
