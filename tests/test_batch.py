"""Files to files: every format against the router itself, and rows that cannot be routed."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from p2l_engine.batch import Asked, run
from p2l_engine.batch.blocks import blocks
from p2l_engine.batch.deduplicator import Distinct
from p2l_engine.batch.manifest import read_manifest
from p2l_engine.tables.rows import Unroutable
from p2l_engine.tables.storage import Place, find
from tests.support.batch_files import PROMPTS, agrees, contents, output, write

KINDS = [".parquet", ".csv", ".csv.gz", ".csv.zst", ".jsonl", ".jsonl.gz", ".jsonl.zst"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_is_routed_as_the_router_routes(kind, router, tmp_path):
    asked = Asked([write(tmp_path / f"in{kind}")], str(tmp_path / "out"), budget=1.5, rows_per_part=32)
    report = run(router, asked)
    found = output(tmp_path / "out")
    assert found.column_names == ["id", "model", "policy", "expected_cost", "win_rate", "score", "error"]
    assert found["id"].to_pylist() == [f"row {i}" for i in range(150)]
    agrees(found.to_pylist(), router.route_batch(PROMPTS, 1.5))
    assert (report.rows, report.routed, report.parts) == (150, 150, 5)
    assert report.repeated == 150 - len(set(PROMPTS)) == 150 - report.computed
    assert report.spend == pytest.approx(sum(found["expected_cost"].to_pylist()))
    assert not (tmp_path / "out" / "_state").exists()
    before = contents(tmp_path / "out")
    assert run(router, asked).rows == 150  # finished: nothing to do
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("more", [{}, {"max_share": {"beta": 0.05}}])
def test_a_budget_over_the_batch_is_the_routers_own(more, router, tmp_path):
    asked = Asked(
        [write(tmp_path / "in.parquet")], str(tmp_path / "out"), budget=1.5, budget_scope="batch", rows_per_part=32, **more
    )
    report = run(router, asked)
    found = output(tmp_path / "out")
    decisions = router.route_batch(PROMPTS, 1.5, "batch", **more)
    costs = [np.mean([d.expected_cost for d in decisions]), np.mean(found["expected_cost"].to_pylist())]
    assert costs[0] == pytest.approx(costs[1], abs=1e-6)
    rates = [np.mean([d.win_rate for d in decisions]), np.mean(found["win_rate"].to_pylist())]
    assert rates[0] == pytest.approx(rates[1], abs=1e-6)
    assert report.prices["budget"] >= 0
    metadata = pq.read_schema(tmp_path / "out" / "part-000000.parquet").metadata
    assert float(metadata[b"p2l.price.budget"]) == report.prices["budget"]
    assert read_manifest(Place.of(str(tmp_path / "out")))["report"]["prices"] == report.prices


def test_an_earlier_price_spends_what_its_budget_did(router, tmp_path):
    given = write(tmp_path / "in.parquet")
    before = run(router, Asked([given], str(tmp_path / "out"), budget=1.5, budget_scope="batch", rows_per_part=32))
    price = before.prices["budget"]
    after = run(router, Asked([given], str(tmp_path / "again"), price=price, rows_per_part=32))
    assert price > 0
    assert after.spend / 150 == pytest.approx(1.5, abs=5 / 150 * 4)  # the prompts whose step has the price itself
    v = router.win_rates(router.engine.coefficients(PROMPTS))
    best = (v - price * router.costs).max(1)
    rows = output(tmp_path / "again").to_pylist()
    worth = [row["win_rate"] - price * row["expected_cost"] for row in rows]
    np.testing.assert_allclose(worth, best, atol=1e-5)
    with pytest.raises(ValueError, match="price: expected no budget"):
        Asked([given], "x", price=1.0, budget=1.0)


def test_coefficients_and_kept_columns_are_written_where_asked_for(router, tmp_path):
    given = write(tmp_path / "in.parquet", note=list(range(150)), other=["x"] * 150)
    run(router, Asked([given], str(tmp_path / "out"), keep=["note"], coefficients="float32"))
    found = output(tmp_path / "out")
    assert found.column_names[0] == "note"
    assert "id" not in found.column_names
    c = router.engine.coefficients(PROMPTS)
    np.testing.assert_allclose(np.array(found["theta"].to_pylist()), c.theta, atol=1e-5)
    np.testing.assert_allclose(found["eta"].to_pylist(), c.eta, atol=1e-5)
    run(router, Asked([given], str(tmp_path / "half"), keep=[], coefficients="float16"))
    half = output(tmp_path / "half")
    assert half.column_names[0] == "model"
    np.testing.assert_allclose(np.array(half["theta"].to_pylist(), float), c.theta, rtol=1e-3)


def test_rows_that_cannot_be_routed_are_named_in_their_place(router, tmp_path):
    prompts = ["one", None, '["two", "turns"]', '[{"role": "assistant", "content": "no user"}]', "", "\U0001f600"]
    given = write(tmp_path / "in.parquet", prompts)
    report = run(router, Asked([given], str(tmp_path / "out")))
    rows = output(tmp_path / "out").to_pylist()
    assert [row["id"] for row in rows] == [f"row {i}" for i in range(6)]
    assert [row["error"] for row in rows[:1] + rows[2:3] + rows[5:]] == [None] * 3
    assert "expected a prompt, got nothing" in rows[1]["error"]
    assert "at least one user turn" in rows[3]["error"]
    assert rows[1]["model"] is rows[1]["policy"] is rows[1]["score"] is None
    agrees([rows[2]], [router.route(["two", "turns"])])
    assert report.rows - report.routed == sum(row["error"] is not None for row in rows)
    with pytest.raises(ValueError, match=r"in.parquet: row 1: prompt: expected a prompt, got nothing"):
        run(router, Asked([given], str(tmp_path / "strict"), strict=True))
    assert run(router, Asked([given], str(tmp_path / "strict"))).rows == 6  # what was begun goes on


def test_text_that_looks_like_json_is_text_where_asked_for(router, tmp_path):
    prompts = ['["two", "turns"]', "[" * 100_000, f"[{'9' * 5000}]"]
    given = write(tmp_path / "in.jsonl", prompts)
    for plain, first in ((False, ["two", "turns"]), (True, ['["two", "turns"]'])):
        run(router, Asked([given], str(tmp_path / f"out{plain}"), plain_text=plain))
        rows = output(tmp_path / f"out{plain}").to_pylist()
        agrees(rows, router.route_batch([first, *([text] for text in prompts[1:])]))


@pytest.mark.parametrize("kind", [".parquet", ".csv", ".csv.gz", ".jsonl"])
def test_a_giant_among_short_prompts(kind, router, tmp_path):
    prompts = ["word " * 2_400_000 if i == 700 else f"question {i}" for i in range(1500)]
    given = write(tmp_path / f"in{kind}", prompts, note=[i / 2 for i in range(1500)])
    run(router, Asked([given], str(tmp_path / "out"), rows_per_part=512))
    found = output(tmp_path / "out")
    assert found["id"].to_pylist() == [f"row {i}" for i in range(1500)]
    assert [float(note) for note in found["note"].to_pylist()] == [i / 2 for i in range(1500)]  # in csv all is text
    some = [0, 699, 700, 701, 1499]
    agrees(found.take(some).to_pylist(), router.route_batch([prompts[i] for i in some]))


def test_bad_lines_and_bytes_are_errors_of_their_rows(router, tmp_path):
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
    run(router, Asked([str(tmp_path / "in.jsonl")], str(tmp_path / "out")))
    rows = output(tmp_path / "out").to_pylist()
    assert [row["k"] for row in rows] == [1, None, None, None, 2, 3, None]
    assert rows[0]["error"] is None
    for row, message in zip(
        rows[1:], ("a line of JSON", "UTF-8", "a JSON object", "got nothing", "got int", "a line of JSON"), strict=True
    ):
        assert message in row["error"]
    binary = pa.array([b"fine", b"\xff\xfe"], pa.binary()).view(pa.string()) if hasattr(pa.Array, "view") else None
    pq.write_table(pa.table({"prompt": binary}), tmp_path / "bytes.parquet")
    run(router, Asked([str(tmp_path / "bytes.parquet")], str(tmp_path / "bytes")))
    rows = output(tmp_path / "bytes").to_pylist()
    assert rows[0]["error"] is None
    assert "UTF-8" in rows[1]["error"]


def test_what_stands_in_a_csv_file_is_what_comes_out(router, tmp_path):
    lines = [b"id,name,prompt", b"007,NA,NULL", b'1.10,"",nan', b"12345678901234567891,,", b'x,null,""', b'y,true,"\xff"']
    (tmp_path / "in.csv").write_bytes(b"\n".join(lines))
    run(router, Asked([str(tmp_path / "in.csv")], str(tmp_path / "out")))
    rows = output(tmp_path / "out").to_pylist()
    assert [row["id"] for row in rows] == ["007", "1.10", "12345678901234567891", "x", "y"]
    assert [row["name"] for row in rows] == ["NA", "", None, "null", "true"]
    agrees([rows[0], rows[1], rows[3]], router.route_batch(["NULL", "nan", ""]))
    assert "got nothing" in rows[2]["error"]
    assert "UTF-8" in rows[4]["error"]


def test_no_rows_make_no_parts(router, tmp_path):
    for name, text in (("in.jsonl", ""), ("in.csv", "prompt\n")):
        (tmp_path / name).write_text(text)
        report = run(router, Asked([str(tmp_path / name)], str(tmp_path / f"{name}-out")))
        assert (report.rows, report.parts) == (0, 0)
        assert read_manifest(Place.of(str(tmp_path / f"{name}-out")))["complete"]
    (tmp_path / "void.csv").write_text("")
    with pytest.raises(ValueError, match="void.csv: "):
        run(router, Asked([str(tmp_path / "void.csv")], str(tmp_path / "void")))
    (tmp_path / "void.parquet").write_text("")
    with pytest.raises(ValueError, match="void.parquet: "):
        run(router, Asked([str(tmp_path / "void.parquet")], str(tmp_path / "voidp")))


def test_prompts_beyond_what_is_remembered_are_computed_again():
    table = pa.table({"prompt": ["a", "b", "c", "a", "b", "c"]})
    from p2l_engine.batch.blocks import Block

    distinct = Distinct(remembered=2)
    turns = [(prompt,) for prompt in table["prompt"].to_pylist()]
    first = distinct.unit(Block(0, 0, turns[:3], table[:3]))
    second = distinct.unit(Block(1, 3, [*turns[3:], Unroutable("no")], table[3:]))
    assert (first.new, second.new) == ([["a"], ["b"], ["c"]], [["c"]])
    assert second.references[:2].tolist() == first.references[:2].tolist()
    assert second.references[3] == -1


def test_blocks_are_bounded_by_rows_and_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr("p2l_engine.batch.blocks.BYTES", 1000)
    prompts = ["x" * 5000 if i == 7 else "short" for i in range(20)]
    found = list(blocks(find([write(tmp_path / "in.parquet", prompts)]), "prompt", rows=6))
    assert [len(block.prompts) for block in found] == [6, 2, 6, 6]
    assert [block.first for block in found] == [0, 6, 8, 14]
    assert [turns[0] for block in found for turns in block.prompts] == prompts
