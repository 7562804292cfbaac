"""Compressed files: several members and frames, padding, and those that are cut short or go on with something else."""

from __future__ import annotations

import gzip
import json
import sys
import zlib
from itertools import pairwise

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2l_engine.cli.prompts import PromptFile
from p2l_engine.tables.chunked import read_rows
from p2l_engine.tables.find import find
from p2l_engine.tables.whole import read_table

SKIPPABLE = b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd"  # a zstd frame without data, as pzstd writes


def zstd(data):
    return pa.compress(data, "zstd", asbytes=True)


def text(ending, prompts):
    lines = ["prompt", *prompts] if ending == "csv" else [json.dumps({"prompt": prompt}) for prompt in prompts]
    return "".join(f"{line}\n" for line in lines).encode()


def by_rows(path):
    return [cell for rows in read_rows(find([path]), "prompt") for cell in rows.prompts]


def by_table(path):
    return read_table(path, ["prompt"]).columns["prompt"]


@pytest.mark.slow
@given(cuts=st.lists(st.integers(0, 400), max_size=4), padding=st.sampled_from([0, 1, 511, 10_240]), squeezed=st.booleans())
@settings(deadline=None, max_examples=40)
@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_members_frames_and_padding_are_read(ending, cuts, padding, squeezed, tmp_path):
    prompts = [f"prompt {i}" for i in range(30)]
    data = text(ending, prompts)
    places = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    pieces = [data[start:end] for start, end in pairwise(places)]
    (tmp_path / f"in.{ending}.gz").write_bytes(b"".join(map(gzip.compress, pieces)) + bytes(padding))
    (tmp_path / f"in.{ending}.zst").write_bytes(SKIPPABLE * squeezed + b"".join(zstd(piece) + SKIPPABLE for piece in pieces))
    for kind in ("gz", "zst"):
        assert by_rows(tmp_path / f"in.{ending}.{kind}") == by_table(tmp_path / f"in.{ending}.{kind}") == prompts


@pytest.mark.parametrize("reader", [by_rows, by_table])
@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_streams_that_are_cut_short_or_damaged_are_refused(reader, ending, tmp_path):
    data = text(ending, [f"prompt {i}" for i in range(2000)])
    whole, frame = gzip.compress(data), zstd(data)
    flipped = whole[:-8] + bytes([whole[-8] ^ 1]) + whole[-7:]  # a bit of its checksum
    cases = {
        "gz": [*(whole[:size] for size in (1, 5, 18, len(whole) // 2, len(whole) - 1)), whole + whole[:20], flipped, bytes(512),
               whole + b"more", whole + bytes(5) + b"more", zlib.compress(data), b""],
        "zst": [*(frame[:size] for size in (1, 5, len(frame) // 2, len(frame) - 1)), frame + frame[:20], frame + b"more", b""],
    }  # fmt: skip
    for kind, some in cases.items():
        for stream in some:
            (tmp_path / f"in.{ending}.{kind}").write_bytes(stream)
            with pytest.raises(ValueError, match=rf"in.{ending}.{kind}: cannot be read( after row \d+)?: "):
                reader(tmp_path / f"in.{ending}.{kind}")


def test_gzip_on_this_machine_needs_no_pyarrow(tmp_path, monkeypatch):
    (tmp_path / "in.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "one"}\n'))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert PromptFile.read(tmp_path / "in.jsonl.gz").prompts == ["one"]


def test_gzip_of_a_store_is_read_alike():
    import fsspec

    memory = fsspec.filesystem("memory")
    try:
        memory.pipe("/squeezed/in.jsonl.gz", gzip.compress(text("jsonl", ["one"])) * 2 + bytes(100))
        assert by_rows("memory://squeezed/in.jsonl.gz") == by_table("memory://squeezed/in.jsonl.gz") == ["one"] * 2
    finally:
        memory.rm("/squeezed", recursive=True)
