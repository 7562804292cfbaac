"""Batch runs compared with ``Router.route_batch``, in every file format, and rows that cannot be routed."""

from __future__ import annotations

import json
import sys
import threading
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from p2l_engine.batch import BatchConfig, run
from p2l_engine.batch.blocks import Block, Unroutable, blocks
from p2l_engine.batch.deduplicator import NO_REFERENCE, Deduplicator
from p2l_engine.batch.report import Recorder
from p2l_engine.tables.chunked import read_rows
from p2l_engine.tables.find import find
from tests.support.batch_files import PROMPTS, assert_routed_as, contents, manifest, output, write
from tests.support.cases import slow_but

KINDS = [".parquet", ".csv", ".csv.gz", ".csv.zst", ".jsonl", ".jsonl.gz", ".jsonl.zst"]


@pytest.mark.parametrize("kind", slow_but((".parquet", ".csv", ".jsonl.gz"), KINDS))
def test_every_format_gives_the_routers_decisions(kind, router, tmp_path):
    config = BatchConfig([write(tmp_path / f"in{kind}")], str(tmp_path / "out"), budget=1.5, rows_per_part=32)
    report = run(router, config)
    found = output(tmp_path / "out")
    own = ["model", "policy", "expected_cost", "win_rate", "score", "error"]
    assert found.column_names == ["id", "source_file", "source_row", *own]
    assert found["id"].to_pylist() == [f"row {i}" for i in range(150)]
    assert_routed_as(found.to_pylist(), router.route_batch(PROMPTS, 1.5))
    assert (report.rows, report.routed, report.parts) == (150, 150, 5)
    assert report.repeated == 150 - len(set(PROMPTS)) == 150 - report.computed
    assert report.spend == pytest.approx(sum(found["expected_cost"].to_pylist()))
    before = contents(tmp_path / "out")
    assert run(router, config).rows == 150  # complete: nothing to do
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("more", [{}, {"max_share": {"beta": 0.05}}])
def test_a_batch_budget_gives_the_routers_decisions(more, router, tmp_path):
    config = BatchConfig(
        [write(tmp_path / "in.parquet")], str(tmp_path / "out"), budget=1.5, budget_scope="batch", rows_per_part=32, **more
    )
    report = run(router, config)
    found = output(tmp_path / "out")
    decisions = router.route_batch(PROMPTS, 1.5, "batch", **more)
    costs = [np.mean([d.expected_cost for d in decisions]), np.mean(found["expected_cost"].to_pylist())]
    assert costs[0] == pytest.approx(costs[1], abs=1e-6)
    rates = [np.mean([d.win_rate for d in decisions]), np.mean(found["win_rate"].to_pylist())]
    assert rates[0] == pytest.approx(rates[1], abs=1e-6)
    assert report.prices["budget"] >= 0
    metadata = pq.read_schema(tmp_path / "out" / "part-000000.parquet").metadata
    assert float(metadata[b"p2l.price.budget"]) == report.prices["budget"]
    assert manifest(tmp_path / "out")["report"]["prices"] == report.prices


@pytest.mark.slow
def test_the_price_of_a_batch_budget_spends_that_budget(router, tmp_path):
    given = write(tmp_path / "in.parquet")
    before = run(router, BatchConfig([given], str(tmp_path / "out"), budget=1.5, budget_scope="batch", rows_per_part=32))
    price = before.prices["budget"]
    after = run(router, BatchConfig([given], str(tmp_path / "again"), price=price, rows_per_part=32))
    assert price > 0
    assert after.spend / 150 == pytest.approx(1.5, abs=5 / 150 * 4)  # a few prompts are indifferent at this price
    v = router.win_rates(router.engine.coefficients(PROMPTS))
    best = (v - price * router.costs).max(1)
    rows = output(tmp_path / "again").to_pylist()
    gains = [row["win_rate"] - price * row["expected_cost"] for row in rows]
    np.testing.assert_allclose(gains, best, atol=1e-5)
    with pytest.raises(ValueError, match="price: cannot be combined with a budget"):
        BatchConfig([given], "x", price=1.0, budget=1.0)


@pytest.mark.slow
def test_coefficients_and_kept_columns(router, tmp_path):
    given = write(tmp_path / "in.parquet", note=list(range(150)), other=["x"] * 150)
    run(router, BatchConfig([given], str(tmp_path / "out"), keep=["note"], coefficients="float32"))
    found = output(tmp_path / "out")
    assert found.column_names[0] == "note"
    assert "id" not in found.column_names
    c = router.engine.coefficients(PROMPTS)
    np.testing.assert_allclose(np.array(found["theta"].to_pylist()), c.theta, atol=1e-5)
    np.testing.assert_allclose(found["eta"].to_pylist(), c.eta, atol=1e-5)
    run(router, BatchConfig([given], str(tmp_path / "half"), keep=[], coefficients="float16"))
    half = output(tmp_path / "half")
    assert half.column_names[0] == "source_file"
    assert half["eta"].type == pa.float32()  # Spark reads no float16
    np.testing.assert_allclose(np.array(half["theta"].to_pylist(), float), c.theta, rtol=1e-3)


def test_rows_that_cannot_be_routed_keep_their_place_and_say_why(router, tmp_path):
    prompts = ["one", None, '["two", "turns"]', '[{"role": "assistant", "content": "no user"}]', "", "\U0001f600"]
    given = write(tmp_path / "in.parquet", prompts)
    report = run(router, BatchConfig([given], str(tmp_path / "out")))
    rows = output(tmp_path / "out").to_pylist()
    assert [row["id"] for row in rows] == [f"row {i}" for i in range(6)]
    assert [row["error"] for row in rows[:1] + rows[2:3] + rows[5:]] == [None] * 3
    assert "expected a prompt, got nothing" in rows[1]["error"]
    assert "at least one user turn" in rows[3]["error"]
    assert rows[1]["model"] is rows[1]["policy"] is rows[1]["score"] is None
    assert_routed_as([rows[2]], [router.route(["two", "turns"])])
    assert report.rows - report.routed == sum(row["error"] is not None for row in rows)
    with pytest.raises(ValueError, match=r"in.parquet: row 1: prompt: expected a prompt, got nothing"):
        run(router, BatchConfig([given], str(tmp_path / "strict"), strict=True))
    assert run(router, BatchConfig([given], str(tmp_path / "strict"))).rows == 6  # resumes


@pytest.fixture
def short_window(router, monkeypatch):
    """Truncates prompts to 256 tokens, so that very long ones take little time."""
    monkeypatch.setattr(router.engine.encoder, "max_tokens", 256)


def test_json_lists_are_turns_unless_plain_text(router, short_window, tmp_path):
    prompts = ['["two", "turns"]', "[" * 100_000, f"[{'9' * 5000}]"]
    given = write(tmp_path / "in.jsonl", prompts)
    for plain, first in ((False, ["two", "turns"]), (True, ['["two", "turns"]'])):
        run(router, BatchConfig([given], str(tmp_path / f"out{plain}"), plain_text=plain))
        rows = output(tmp_path / f"out{plain}").to_pylist()
        assert_routed_as(rows, router.route_batch([first, *([text] for text in prompts[1:])]))


@pytest.mark.slow
@pytest.mark.parametrize("kind", slow_but((".csv",), [".parquet", ".csv", ".csv.gz", ".jsonl"]))
def test_a_prompt_of_12_mb_among_short_ones(kind, router, short_window, tmp_path):
    prompts = ["word " * 2_400_000 if i == 700 else f"question {i}" for i in range(1500)]
    given = write(tmp_path / f"in{kind}", prompts, note=[i / 2 for i in range(1500)])
    run(router, BatchConfig([given], str(tmp_path / "out"), rows_per_part=512))
    found = output(tmp_path / "out")
    assert found["id"].to_pylist() == [f"row {i}" for i in range(1500)]
    assert [float(note) for note in found["note"].to_pylist()] == [i / 2 for i in range(1500)]  # CSV values are strings
    some = [0, 699, 700, 701, 1499]
    assert_routed_as(found.take(some).to_pylist(), router.route_batch([prompts[i] for i in some]))


def test_invalid_lines_and_bytes_are_errors_of_their_rows(router, tmp_path):
    lines = [
        b'{"prompt": "a", "k": 1}',
        b"not json",
        b'{"prompt": "\xff"}',
        b"[1]",
        b'{"k": 2}',
        b'{"prompt": 7, "k": 3}',
        b'{"k": ' + b"9" * 5000 + b"}",
    ]
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(lines) + b"\n\n")
    run(router, BatchConfig([str(tmp_path / "in.jsonl")], str(tmp_path / "out")))
    rows = output(tmp_path / "out").to_pylist()
    assert [row["k"] for row in rows] == [1, None, None, None, 2, 3, None]
    assert rows[0]["error"] is None
    for row, message in zip(
        rows[1:], ("a line of JSON", "UTF-8", "a JSON object", "got nothing", "got int", "a line of JSON"), strict=True
    ):
        assert message in row["error"]
    binary = pa.array([b"fine", b"\xff\xfe"], pa.binary()).view(pa.string()) if hasattr(pa.Array, "view") else None
    pq.write_table(pa.table({"prompt": binary}), tmp_path / "bytes.parquet")
    run(router, BatchConfig([str(tmp_path / "bytes.parquet")], str(tmp_path / "bytes")))
    rows = output(tmp_path / "bytes").to_pylist()
    assert rows[0]["error"] is None
    assert "UTF-8" in rows[1]["error"]


def test_csv_values_are_written_back_unchanged(router, tmp_path):
    lines = [b"id,name,prompt", b"007,NA,NULL", b'1.10,"",nan', b"12345678901234567891,,", b'x,null,""', b'y,true,"\xff"']
    (tmp_path / "in.csv").write_bytes(b"\n".join(lines))
    run(router, BatchConfig([str(tmp_path / "in.csv")], str(tmp_path / "out")))
    rows = output(tmp_path / "out").to_pylist()
    assert [row["id"] for row in rows] == ["007", "1.10", "12345678901234567891", "x", "y"]
    assert [row["name"] for row in rows] == ["NA", "", None, "null", "true"]
    assert_routed_as([rows[0], rows[1], rows[3]], router.route_batch(["NULL", "nan", ""]))
    assert "got nothing" in rows[2]["error"]
    assert "UTF-8" in rows[4]["error"]


def test_files_without_rows_give_a_part_without_rows(router, tmp_path):
    for name, text in (("in.jsonl", ""), ("in.csv", "prompt\n")):
        (tmp_path / name).write_text(text)
        report = run(router, BatchConfig([str(tmp_path / name)], str(tmp_path / f"{name}-out")))
        assert (report.rows, report.parts) == (0, 1)
        assert manifest(tmp_path / f"{name}-out")["complete"]
    (tmp_path / "void.csv").write_text("")
    with pytest.raises(ValueError, match="void.csv: "):
        run(router, BatchConfig([str(tmp_path / "void.csv")], str(tmp_path / "void")))
    (tmp_path / "void.parquet").write_text("")
    with pytest.raises(ValueError, match="void.parquet: "):
        run(router, BatchConfig([str(tmp_path / "void.parquet")], str(tmp_path / "voidp")))


def test_prompts_beyond_the_deduplicators_limit_are_computed_again():
    table = pa.table({"prompt": ["a", "b", "c", "a", "b", "c"]})
    deduplicator = Deduplicator(max_prompts=2)
    turns = [(prompt,) for prompt in table["prompt"].to_pylist()]
    first = deduplicator.add(Block(0, 0, turns[:3], table[:3]))
    second = deduplicator.add(Block(1, 3, [*turns[3:], Unroutable("no")], table[3:]))
    assert (first.new_prompts, second.new_prompts) == ([["a"], ["b"], ["c"]], [["c"]])
    assert second.references[:2].tolist() == first.references[:2].tolist()
    assert second.references[3] == NO_REFERENCE


def test_a_recorder_counts_all_of_many_threads():
    recorder, reports = Recorder(), []

    def work():
        for _ in range(500):
            with recorder.timed("stage"):
                recorder.add(rows=2, routed=1, parts=1, spend=0.5)
            reports.append(recorder.report)

    threads = [threading.Thread(target=work) for _ in range(8)]
    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(switch)
    report = recorder.report
    assert (report.rows, report.routed, report.parts, report.spend) == (8000, 4000, 4000, 2000.0)
    assert report.seconds["stage"] > 0
    assert all(r.rows == 2 * r.routed == 2 * r.parts == 4 * r.spend for r in reports)  # none is half updated


@pytest.mark.slow
def test_reports_of_a_run_only_grow(router, tmp_path):
    config = BatchConfig([write(tmp_path / "in.parquet")], str(tmp_path / "out"), budget=1.5, rows_per_part=8)
    reports = []
    run(router, config, progress=reports.append)
    assert [report.rows for report in reports] == [min(8 * (i + 1), 150) for i in range(19)]
    for before, after in pairwise(reports):
        assert before is not after
        for name in ("routed", "computed", "repeated", "tokens", "parts", "read", "spend"):
            assert getattr(before, name) <= getattr(after, name)
    assert {"reading", "deduplicating", "spilling", "deciding", "writing"} <= set(reports[-1].seconds)


def test_what_is_read_before_the_first_block_is_told(router, tmp_path):
    rows = "".join(json.dumps({"prompt": prompt, "custom_id": f"{i}"}) + "\n" for i, prompt in enumerate(PROMPTS * 8))
    (tmp_path / "in").mkdir()
    for name in ("a", "b"):
        (tmp_path / "in" / f"{name}.jsonl").write_text(rows.replace('id": "', f'id": "{name}'))
    told = {}
    config = BatchConfig([str(tmp_path / "in")], str(tmp_path / "out"), split_by="model", write_as="openai-batch")
    run(router, config, reading=lambda what, share: told.setdefault(what, []).append(share))
    assert list(told) == ["hashing inputs", "finding the types of kept columns", "checking that each custom_id is another"]
    assert all(len(shares) >= 4 and shares[-1] == max(shares) == 1.0 for shares in told.values())
    run(router, config, reading=lambda what, _: told.setdefault(f"{what} again", []))
    assert list(told)[3:] == ["hashing inputs again"]


def test_blocks_are_bounded_by_rows_and_letters(tmp_path, monkeypatch):
    monkeypatch.setattr("p2l_engine.batch.blocks.LETTERS", 1000)
    prompts = ["x" * 5000 if i == 7 else "short" for i in range(20)]
    found = list(blocks(find([write(tmp_path / "in.parquet", prompts)]), "prompt", rows=6))
    assert [len(block.prompts) for block in found] == [6, 2, 6, 6]
    assert [block.first for block in found] == [0, 6, 8, 14]
    assert [turns[0] for block in found for turns in block.prompts] == prompts


def test_a_cell_that_cannot_be_kept_costs_its_row_but_not_its_prompt(tmp_path, monkeypatch):
    """Coefficients do not depend on what is kept."""
    (file,) = find([write(tmp_path / "in.parquet", ["a", "b", "c", "d"])])
    odd = [each._replace(problems={1: "too odd", 3: "odd too"}) for each in read_rows([file], "prompt")]
    monkeypatch.setattr("p2l_engine.batch.blocks.read_rows", lambda *_: odd)
    found = list(blocks([file], "prompt", rows=2))
    where = f"{file.shown}: row "
    assert [block.problems for block in found] == [{1: ("too odd", where + "1")}, {1: ("odd too", where + "3")}]
    deduplicator = Deduplicator()
    assert [deduplicator.add(block).new_prompts for block in found] == [[["a"], ["b"]], [["c"], ["d"]]]
