"""Blocks of rows: where they end depends on the prompts alone; kept columns of any size take bounded memory."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2l_engine.batch import BatchConfig, run
from p2l_engine.batch.blocks import blocks
from p2l_engine.batch.kept import KeptColumns, pieces
from p2l_engine.tables.find import find
from tests.support.batch_files import output, write

PROMPTS = st.lists(st.one_of(st.none(), st.text(max_size=30), st.just("x" * 500)), min_size=1, max_size=60)


@pytest.mark.slow
@settings(max_examples=25)
@given(PROMPTS, st.integers(1, 20), st.integers(1, 2000), st.sampled_from([0, 50, 3000]), st.data())
def test_blocks_end_where_the_prompts_say_whatever_is_kept(prompts, rows, letters, most, data):
    notes = ["n" * data.draw(st.integers(0, most)) for _ in prompts]
    with tempfile.TemporaryDirectory(dir=_memory()) as here, patch("p2l_engine.batch.blocks.LETTERS", letters):
        found = []
        for folder, keep in (("a", None), ("a", []), ("a folder of a long name", ["note"])):
            (Path(here) / folder).mkdir(exist_ok=True)
            file = Path(here) / folder / "in.parquet"
            pq.write_table(pa.table({"prompt": pa.array(prompts, pa.string()), "note": notes}), file)
            with patch("p2l_engine.batch.kept.BYTES", 1000):
                read = list(blocks(find([file]), "prompt", keep, rows, folder=Path(here)))
            found.append([(block.number, block.first, len(block.prompts)) for block in read])
            if keep != []:
                assert pa.concat_tables([block.kept for block in read])["note"].to_pylist() == notes
        assert found[0] == found[1] == found[2]


def _memory():
    """A folder that needs no disk, where the system has one."""
    return "/dev/shm" if os.path.isdir("/dev/shm") else None


def test_large_kept_columns_go_to_disk_and_come_back_unchanged(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    nested = [[{"a": int(rng.integers(9)), "b": "é" * int(rng.integers(9))}] * int(rng.integers(4)) for _ in range(4000)]
    table = pa.table(
        {"text": ["t" * int(n) for n in rng.integers(0, 999, 4000)], "nested": nested, "none": pa.nulls(4000),
         "number": pa.array(rng.random(4000), mask=rng.random(4000) < 0.1), "word": pa.array(["w"] * 4000).dictionary_encode()}
    )  # fmt: skip
    monkeypatch.setattr("p2l_engine.batch.kept.BYTES", 100_000)
    kept = KeptColumns(tmp_path)
    for first in range(0, 4000, 37):
        kept.add(table[first : first + 37])
    before = pa.total_allocated_bytes()
    found = kept.table()
    assert pa.total_allocated_bytes() - before < 200_000  # the rest is mapped
    assert found.equals(table)
    assert not list(tmp_path.iterdir())
    slices = list(pieces(4000, found))
    assert [piece.start for piece in slices[1:]] == [piece.stop for piece in slices[:-1]]
    assert all(found[piece].nbytes < 130_000 for piece in slices)


@pytest.mark.slow
def test_rows_with_large_kept_columns_are_several_parts(router, tmp_path, monkeypatch):
    note = ["n" * 1000] * 150
    given = write(tmp_path / "in.parquet", note=note)
    run(router, BatchConfig([given], tmp_path / "one", rows_per_part=100))
    monkeypatch.setattr("p2l_engine.batch.kept.BYTES", 40_000)
    assert run(router, BatchConfig([given], tmp_path / "several", rows_per_part=100)).parts == 5
    assert output(tmp_path / "several").equals(output(tmp_path / "one"))
    assert run(router, BatchConfig([given], tmp_path / "several", rows_per_part=100)).parts == 5
