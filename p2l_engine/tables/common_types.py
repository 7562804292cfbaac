"""One type for a column whose type differs among files: the narrowest that holds every value of each as it is."""

from __future__ import annotations

from collections.abc import Callable

import pyarrow as pa

MAX_DIGITS = 38  # of a decimal that other tools than Arrow read
UNITS = ("s", "ms", "us", "ns")
UTC = ("UTC", "Etc/UTC", "+00:00", "Z", "GMT")
TEXTS = (pa.string(), pa.string_view(), pa.large_string())
BYTES = (pa.binary(), pa.binary_view(), pa.large_binary())
SIGNED, UNSIGNED = (pa.int8(), pa.int16(), pa.int32(), pa.int64()), (pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64())
FLOATS = (pa.float16(), pa.float32(), pa.float64())


def common_type(first: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    """The type of both, or None where there is none that holds all values of both. Of 64-bit integers beside floats, of
    integers with a sign beside those of 64 bits without, and of times in other units, it holds all but some: see
    ``always_exact``. Nulls may be anywhere in it."""
    first, other = as_nullable(first), as_nullable(other)
    if first.equals(other) or pa.types.is_null(other):
        return first
    if pa.types.is_null(first):
        return other
    for one, two in ((first, other), (other, first)):
        if pa.types.is_dictionary(one):
            return common_type(one.value_type, two)
    for one, two in ((first, other), (other, first)):
        if isinstance(one, pa.BaseExtensionType):
            return common_type(one.storage_type, two)
    if pa.types.is_struct(first) and pa.types.is_struct(other):
        return _struct(first, other)
    if _is_list(first) and _is_list(other):
        items = common_type(first.value_type, other.value_type)
        large = pa.types.is_large_list(first) or pa.types.is_large_list(other)
        return None if items is None else (pa.large_list if large else pa.list_)(items)
    if pa.types.is_map(first) and pa.types.is_map(other):
        keys, values = common_type(first.key_type, other.key_type), common_type(first.item_type, other.item_type)
        return None if keys is None or values is None else pa.map_(keys, values)
    return _scalar(first, other)


def conflict(first: pa.DataType, other: pa.DataType, place: str) -> tuple[str, pa.DataType, pa.DataType]:
    """The innermost place at which two types have no common one, and the types there."""
    if pa.types.is_struct(first) and pa.types.is_struct(other):
        names = [field.name for field in other]
        for field in first:
            if names.count(field.name) == 1 and common_type(field.type, other.field(field.name).type) is None:
                return conflict(field.type, other.field(field.name).type, f"{place}.{field.name}")
    if _is_list(first) and _is_list(other):
        return conflict(first.value_type, other.value_type, f"{place}[]")
    if pa.types.is_map(first) and pa.types.is_map(other):
        if common_type(first.key_type, other.key_type) is None:
            return conflict(first.key_type, other.key_type, f"{place}.key")
        return conflict(first.item_type, other.item_type, f"{place}.value")
    return place, first, other


def with_inner(kind: pa.DataType, change: Callable[[pa.Field], pa.Field]) -> pa.DataType:
    """A list, struct or map with other fields within it, keys of maps aside from their types; any other type as it is."""
    if pa.types.is_struct(kind):
        return pa.struct([change(field) for field in kind])
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(change(kind.value_field), kind.list_size)
    if pa.types.is_large_list(kind):
        return pa.large_list(change(kind.value_field))
    if pa.types.is_map(kind):
        return pa.map_(kind.key_field.with_type(change(kind.key_field).type), change(kind.item_field))
    return pa.list_(change(kind.value_field)) if pa.types.is_list(kind) else kind


def as_nullable(kind: pa.DataType) -> pa.DataType:
    """The type, with nulls allowed everywhere in it."""
    return with_inner(kind, lambda field: pa.field(field.name, as_nullable(field.type)))


def with_text_for_nulls(kind: pa.DataType) -> pa.DataType:
    """The type, with text where no value said which one: readers know no type of nulls alone."""
    if pa.types.is_null(kind):
        return pa.string()
    return with_inner(kind, lambda field: field.with_type(with_text_for_nulls(field.type)))


def in_unit(kind: pa.DataType, unit: str) -> pa.DataType:
    """The type with this unit of all timestamps."""
    if pa.types.is_timestamp(kind):
        return pa.timestamp(unit, kind.tz)
    return with_inner(kind, lambda field: field.with_type(in_unit(field.type, unit)))


def always_exact(kind: pa.DataType, common: pa.DataType) -> bool:
    """Whether every value of a type is one of a ``common_type`` of it: integers beyond 2**53 are no floats, those below 0 need
    a sign, and the range of times in a fine unit is short."""
    if pa.types.is_dictionary(kind):
        return pa.types.is_dictionary(common) or always_exact(kind.value_type, common)
    if isinstance(kind, pa.BaseExtensionType):
        return isinstance(common, pa.BaseExtensionType) or always_exact(kind.storage_type, common)
    if pa.types.is_struct(kind) and pa.types.is_struct(common):
        return all(always_exact(field.type, common.field(field.name).type) for field in kind)
    if _is_list(kind) and _is_list(common):
        return always_exact(kind.value_type, common.value_type)
    if pa.types.is_map(kind) and pa.types.is_map(common):
        return always_exact(kind.key_type, common.key_type) and always_exact(kind.item_type, common.item_type)
    if pa.types.is_timestamp(kind) or pa.types.is_duration(kind):
        return bool(kind.unit == common.unit)
    if common == pa.uint64():
        return kind not in SIGNED
    return not (pa.types.is_floating(common) and kind in (pa.int64(), pa.uint64()))


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _struct(first: pa.StructType, other: pa.StructType) -> pa.DataType | None:
    fields = dict[str, pa.DataType]()
    for struct in (first, other):
        names = [field.name for field in struct]
        if len(set(names)) < len(names):
            return None
        for field in struct:
            found = common_type(fields.get(field.name, pa.null()), field.type)
            if found is None:
                return None
            fields[field.name] = found
    return pa.struct(list(fields.items()))


def _scalar(first: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    for same in (TEXTS, BYTES):
        if first in same and other in same:
            return same[-1]
    for kinds in (SIGNED, UNSIGNED, FLOATS):
        if first in kinds and other in kinds:
            return kinds[max(kinds.index(first), kinds.index(other))]
    if {first, other} <= {*SIGNED, *UNSIGNED}:
        signed, unsigned = (first, other) if first in SIGNED else (other, first)
        needed = max(SIGNED.index(signed), UNSIGNED.index(unsigned) + 1)
        return SIGNED[needed] if needed < len(SIGNED) else pa.uint64()
    if {first, other} <= {*SIGNED, *UNSIGNED, *FLOATS}:
        return pa.float64()
    if all(kind in BYTES or pa.types.is_fixed_size_binary(kind) for kind in (first, other)):
        return pa.large_binary() if pa.large_binary() in (first, other) else pa.binary()
    digits = [_digits(kind) for kind in (first, other)]
    if None not in digits:
        large = pa.types.is_decimal256(first) or pa.types.is_decimal256(other)
        return _decimal(*(each for each in digits if each is not None), large=large)
    if pa.types.is_timestamp(first) and pa.types.is_timestamp(other):
        zones = {"UTC" if each.tz in UTC else each.tz for each in (first, other)}
        return pa.timestamp(_finer(first, other), *zones) if len(zones) == 1 else None
    if pa.types.is_duration(first) and pa.types.is_duration(other):
        return pa.duration(_finer(first, other))
    if pa.types.is_time(first) and pa.types.is_time(other):
        unit = _finer(first, other)
        return pa.time64(unit) if unit in ("us", "ns") else pa.time32(unit)
    return None


def _finer(first: pa.DataType, other: pa.DataType) -> str:
    return UNITS[max(UNITS.index(first.unit), UNITS.index(other.unit))]


def _digits(kind: pa.DataType) -> tuple[int, int] | None:
    """The digits before and after the point of a decimal, or an integer."""
    if pa.types.is_decimal(kind):
        return kind.precision - kind.scale, kind.scale
    return (len(str(2**kind.bit_width)), 0) if pa.types.is_integer(kind) else None


def _decimal(*digits: tuple[int, int], large: bool) -> pa.DataType | None:
    before, after = (max(each) for each in zip(*digits, strict=True))
    if before + after > (76 if large else MAX_DIGITS):
        return None
    return (pa.decimal256 if large else pa.decimal128)(before + after, after)
