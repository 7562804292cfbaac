"""Files to files: every format against the router itself, rows that cannot be routed, runs that are cut short."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from itertools import islice

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from p2l_engine import Router
from p2l_engine.batch import Asked, run
from p2l_engine.batch.distinct import Distinct
from p2l_engine.batch.manifest import read_manifest
from p2l_engine.batch.places import Place, find
from p2l_engine.batch.readers import Unroutable
from p2l_engine.batch.rows import blocks
from tests.test_router import COSTS, catalog
from tests.tiny import MODELS

PROMPTS = [f"question {i % 60} " + "so " * (i % 11) for i in range(150)]  # some come again
KINDS = [".parquet", ".csv", ".jsonl", ".jsonl.gz", ".jsonl.zst"]


def write(path, prompts=PROMPTS, **more):
    """A file of the kind that its name says, with a column id."""
    columns = {"id": [f"row {i}" for i in range(len(prompts))], "prompt": prompts} | more
    table, name = pa.table(columns), str(path)
    if name.endswith(".parquet"):
        pq.write_table(table, path, row_group_size=40)
    elif name.endswith(".csv"):
        pa.csv.write_csv(table, path)
    else:
        lines = "".join(json.dumps(row) + "\n" for row in table.to_pylist()).encode()
        squeeze = {"gz": gzip.compress, "zst": lambda data: pa.compress(data, "zstd", asbytes=True)}
        path.write_bytes(squeeze.get(name.rsplit(".", 1)[1], bytes)(lines))
    return str(path)


def output(folder):
    parts = sorted(folder.glob("part-*.parquet"))
    return pa.concat_tables([pq.read_table(part) for part in parts]) if parts else None


def contents(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def agrees(rows, decisions):
    assert len(rows) == len(decisions)
    for row, d in zip(rows, decisions, strict=True):
        assert row["model"] == d.model
        assert {part["model"]: part["probability"] for part in row["policy"]} == pytest.approx(d.policy, abs=1e-4)
        for name in ("expected_cost", "win_rate", "score"):
            assert row[name] == pytest.approx(getattr(d, name), abs=1e-4)
        assert row["error"] is None


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


@pytest.mark.parametrize("kind", [".parquet", ".csv", ".jsonl"])
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


def test_what_a_type_would_lose_is_refused(router, tmp_path):
    for name, first, last in (
        ("number", {"m": 1}, {"m": 2.5}),
        ("list", {"m": [1]}, {"m": [2, 3.7]}),
        ("key", {"m": {"a": 1}}, {"m": {"a": 1, "b": 7}}),
    ):
        lines = [json.dumps({"prompt": "p"} | values) for values in (*[first] * 600, last)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
        with pytest.raises(
            ValueError, match=rf"{name}.jsonl: row 600: column 'm': expected .* as in the first rows, got .*--keep"
        ):
            run(router, Asked([str(tmp_path / f"{name}.jsonl")], str(tmp_path / f"{name}-out")))
        run(router, Asked([str(tmp_path / f"{name}.jsonl")], str(tmp_path / f"{name}-out"), keep=[]))
    (tmp_path / "empty.jsonl").write_text('{"prompt": "p", "m": {}}')
    with pytest.raises(
        ValueError, match="empty.jsonl: a column cannot be written to parquet: .*'m'.*; leave it out with --keep"
    ):
        run(router, Asked([str(tmp_path / "empty.jsonl")], str(tmp_path / "empty-out")))


def test_one_run_at_a_time(router, tmp_path):
    asked = Asked([write(tmp_path / "in.parquet")], str(tmp_path / "out"), rows_per_part=32)
    said = []

    def again(report):
        for restart in (False, True):
            with pytest.raises(RuntimeError, match="out: another run is writing here") as refused:
                run(router, asked, restart)
            said.append(refused)

    run(router, asked, progress=again)
    assert len(said) >= 2
    assert run(router, asked).rows == 150


def test_finished_runs_are_what_they_were(router, tmp_path, caplog):
    given, out = write(tmp_path / "in.parquet", ["a", None, "b"]), tmp_path / "out"
    asked = Asked([given], str(out), rows_per_part=1)
    run(router, asked)
    before = contents(out)
    with pytest.raises(ValueError, match="1 of its 3 rows have an error"):
        run(router, Asked([given], str(out), rows_per_part=1, strict=True))
    (out / "part-000001.parquet").unlink()
    assert run(router, asked).rows == 3
    assert "1 parts of the finished run are gone" in caplog.text
    assert contents(out) == before
    (out / "part-000007.parquet").write_bytes(b"another's")
    with pytest.raises(ValueError, match="part-000007.parquet: expected parts of this run alone"):
        run(router, asked)


def test_a_state_is_found_wherever_it_was(router, tmp_path):
    given, asked = write(tmp_path / "in.parquet"), {"budget": 1.5, "budget_scope": "batch", "rows_per_part": 32}

    def stop(report):
        if report.rows >= 64:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        run(router, Asked([given], str(tmp_path / "out"), state=str(tmp_path / "a"), **asked), progress=stop)
    with pytest.raises(ValueError, match="budget: was 1.5, is 2.0"):
        run(router, Asked([given], str(tmp_path / "out"), state=str(tmp_path / "b"), **asked | {"budget": 2.0}))
    run(router, Asked([given], str(tmp_path / "out"), state=str(tmp_path / "b"), **asked | {"budget": 2.0}), restart=True)
    assert not any((tmp_path / "a").iterdir())
    with pytest.raises(InterruptedError):
        run(router, Asked([given], str(tmp_path / "here"), **asked), progress=stop)
    (tmp_path / "here").rename(tmp_path / "there")
    assert run(router, Asked([given], str(tmp_path / "there"), **asked)).resumed >= 30
    assert not (tmp_path / "there" / "_state").exists()


def test_what_stands_in_the_way_is_named(router, tmp_path):
    given = write(tmp_path / "in.parquet")
    out = str(tmp_path / "out")
    with pytest.raises(ValueError, match=r"in.parquet: expected the columns question; it has id, prompt"):
        run(router, Asked([given], out, column="question"))
    for name in ("in.txt", "none.parquet"):
        (tmp_path / "in.txt").touch()
        with pytest.raises(ValueError, match=f"{name}: "):
            run(router, Asked([str(tmp_path / name)], out))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: expected files in this folder"):
        run(router, Asked([str(tmp_path / "empty")], out))
    with pytest.raises(ValueError, match="that match"):
        run(router, Asked([str(tmp_path / "*.csv")], out))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    for restart in (False, True):
        with pytest.raises(ValueError, match=r"mine: expected an empty folder or the output .*, found thesis.txt"):
            run(router, Asked([given], str(tmp_path / "mine")), restart=restart)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"
    with pytest.raises(ValueError, match="columns of its own named model, score"):
        run(router, Asked([write(tmp_path / "clash.csv", model=["m"] * 150, score=[1] * 150)], str(tmp_path / "clash")))
    (tmp_path / "b.csv").write_text("other,prompt\nx,y\n")
    with pytest.raises(ValueError, match=r"b.csv: column id is missing, was string; other is string"):
        run(router, Asked([given, str(tmp_path / "b.csv")], str(tmp_path / "two")))
    for inputs, where in (
        (str(tmp_path), "out"),
        (f"{tmp_path}/**/*.parquet", "."),
        (given, "in.parquet"),
        (str(tmp_path), "."),
    ):
        with pytest.raises(ValueError, match="lie in one another"):
            run(router, Asked([inputs], str(tmp_path / where)))
    # What cannot be is refused before anything is written.
    for more, message in (
        ({"budget": 0.5}, "budget 0.5 is infeasible"),
        ({"budget": 0.5, "budget_scope": "batch"}, "budget 0.5 is infeasible"),
        ({"max_share": {"nobody": 0.5}}, "max_share: expected models of the catalog, got nobody"),
        ({"max_share": {name: 0.1 for name in MODELS}}, "cannot hold"),
    ):
        with pytest.raises(ValueError, match=message):
            run(router, Asked([given], str(tmp_path / "never"), **more))
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize("kind", [".parquet", ".jsonl.gz", ".jsonl.zst", ".csv"])
def test_files_that_are_cut_short_or_mixed_are_named(kind, router, tmp_path):
    rng = np.random.default_rng(0)
    given = tmp_path / f"in{kind}"
    write(given, [" ".join(map(str, rng.integers(1e9, size=9))) for _ in range(3000)])
    if kind == ".csv":
        given.write_bytes(given.read_bytes() + b'"\xff\xfe","prompt"\n')
    else:
        given.write_bytes(given.read_bytes()[:-4000])
    with pytest.raises(ValueError, match=rf"in{kind}: cannot be read( after row \d+)?: "):
        run(router, Asked([str(given)], str(tmp_path / "out"), rows_per_part=500))
    assert not read_manifest(Place.of(str(tmp_path / "out")))["complete"]


def test_types_that_change_within_a_file_are_named(router, tmp_path, caplog):
    lines = [json.dumps({"prompt": "p", "id": i}) for i in range(900)] + [json.dumps({"prompt": "p", "id": "later text"})]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=r"in.jsonl: row 900: column 'id': expected int64 .*, got 'later text'"):
        run(router, Asked([str(tmp_path / "in.jsonl")], str(tmp_path / "out")))
    (tmp_path / "odd.jsonl").write_text('{"prompt": "p", "id": "a"}\n' * 600 + '{"prompt": "p", "id": "\\ud800"}')
    with pytest.raises(ValueError, match=r"odd.jsonl: row 600: column 'id': expected string .*, got '.ud800'"):
        run(router, Asked([str(tmp_path / "odd.jsonl")], str(tmp_path / "odd")))
    (tmp_path / "late.jsonl").write_text('{"prompt": "p"}\n' * 600 + '{"prompt": "p", "id": 1}\n' * 600)
    assert run(router, Asked([str(tmp_path / "late.jsonl")], str(tmp_path / "late"))).routed == 1200
    assert [record.message.partition(": ")[2] for record in caplog.records] == [
        "'id': not in the first rows, and so not in the output"
    ]
    (tmp_path / "mixed.jsonl").write_text('{"prompt": "p", "id": 1}\n{"prompt": "p", "id": [1]}')
    with pytest.raises(ValueError, match=r"mixed.jsonl: column 'id': values of different types"):
        run(router, Asked([str(tmp_path / "mixed.jsonl")], str(tmp_path / "mixed")))


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


def test_a_run_of_something_else_is_refused_with_what_changed(router, tmp_path):
    given, out = write(tmp_path / "in.parquet"), str(tmp_path / "out")
    run(router, Asked([given], out, budget=1.5, rows_per_part=32))
    before = contents(tmp_path / "out")
    for changed, message in (
        (Asked([given], out, budget=2.0, rows_per_part=32), "budget: was 1.5, is 2.0"),
        (Asked([given], out, budget=1.5, rows_per_part=32, keep=["id"]), r"keep: was None, is \['id'\]"),
    ):
        with pytest.raises(ValueError, match=f"asked for something else: {message}; undo that"):
            run(router, changed)
    other = Router(router.engine, catalog(costs=[1.0, 2.0, 3.0, 4.0, 6.0]), seed=4)
    with pytest.raises(ValueError, match="catalog: epsilon; seed: was 3, is 4"):
        run(other, Asked([given], out, budget=1.5, rows_per_part=32))
    assert contents(tmp_path / "out") == before
    os.utime(given, ns=(0, 0))
    with pytest.raises(ValueError, match=rf"inputs: {given}"):
        run(router, Asked([given], out, budget=1.5, rows_per_part=32))
    report = run(router, Asked([given], out, budget=2.0, rows_per_part=64), restart=True)
    assert report.parts == 3 == len(list((tmp_path / "out").glob("part-*")))
    (tmp_path / "out" / "part-000001.parquet").unlink()
    assert run(router, Asked([given], out, budget=2.0, rows_per_part=64)).computed == len(set(PROMPTS))
    assert len(list((tmp_path / "out").glob("part-*"))) == 3


def test_what_was_spoiled_meanwhile_is_named(router, tmp_path, monkeypatch):
    given, asked = write(tmp_path / "in.parquet"), {"budget": 1.5, "rows_per_part": 32}
    run(router, Asked([given], str(tmp_path / "whole"), **asked))

    def stop(report):
        if report.rows >= 64:
            raise InterruptedError

    def cut(name):
        with pytest.raises(InterruptedError):
            run(router, Asked([given], str(tmp_path / name), **asked), progress=stop)
        return tmp_path / name

    spilled = next((cut("spill") / "_state").glob("run-*/*"))
    data = spilled.read_bytes()
    np.save(spilled, np.load(spilled)[:3])
    for message in (
        f"{spilled.name}: expected more than .* rows, got 3; remove it",
        f"{spilled.name}: cannot be read.*; remove it",
    ):
        with pytest.raises(ValueError, match=message):
            run(router, Asked([given], str(tmp_path / "spill"), **asked))
        spilled.write_bytes(data[:100])
    spilled.unlink()
    run(router, Asked([given], str(tmp_path / "spill"), **asked))
    assert contents(tmp_path / "spill") == contents(tmp_path / "whole")
    manifest = cut("manifest") / "_manifest.json"
    for text in (
        manifest.read_text()[:50],
        "[]",
        "{}",
        "null",
        '{"asked": 5, "complete": true}',
        '{"asked": {}, "complete": true}',
    ):
        manifest.write_text(text)
        for restart in (False, True):
            with pytest.raises(ValueError, match="_manifest.json: expected the manifest of a batch run; remove it"):
                run(router, Asked([given], str(manifest.parent), **asked), restart=restart)
    # What an input was when the run began is not what it is at its end.
    changing = write(tmp_path / "changing.parquet")
    with pytest.raises(ValueError, match=r"inputs: .*changing.parquet: changed while it was read; run again with --restart"):
        run(router, Asked([changing], str(tmp_path / "changing"), **asked), progress=lambda _: os.utime(changing, ns=(0, 0)))
    # A run that came to nothing stands in no other's way.
    with pytest.raises(ValueError, match="expected the columns nonsense"):
        run(router, Asked([given], str(tmp_path / "again"), column="nonsense", **asked))
    run(router, Asked([given], str(tmp_path / "again"), **asked))
    assert contents(tmp_path / "again") == contents(tmp_path / "whole")


@pytest.mark.parametrize("scope", ["prompt", "batch"])
def test_a_full_disk_loses_nothing(scope, router, tmp_path, monkeypatch):
    """Writing fails at every place in turn; what goes on from there ends with the same bytes."""
    given = write(tmp_path / "in.parquet")
    asked = {"budget": 1.5, "budget_scope": scope, "rows_per_part": 32}
    run(router, Asked([given], str(tmp_path / "whole"), **asked))
    from p2l_engine.batch import places

    real, left = places.write_local, [0]

    def failing(path, data):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device", str(path))
        real(path, data)

    for module in ("places", "spill"):
        monkeypatch.setattr(f"p2l_engine.batch.{module}.write_local", failing)
    failures = 0
    for _ in range(50):
        left[0] = 2
        try:
            run(router, Asked([given], str(tmp_path / "out"), **asked))
            break
        except OSError as error:
            assert "No space left" in str(error)
            failures += 1
    assert failures > 3
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_state_folder_keeps_what_is_not_the_runs(router, tmp_path, monkeypatch):
    given, kept = write(tmp_path / "in.parquet"), tmp_path / "kept"
    kept.mkdir()
    (kept / "thesis.txt").write_text("precious")
    (kept / "coefficients-000000.npy").write_text("another's")
    asked = {"budget": 1.5, "rows_per_part": 32}
    run(router, Asked([given], str(tmp_path / "whole"), **asked))
    # Two runs that are cut short share the folder, and nothing in it.
    real = router.engine.outputs_of

    def cut_short(chunks):
        yield from islice(real(chunks), 2)
        raise InterruptedError

    monkeypatch.setattr(router.engine, "outputs_of", cut_short)
    for more in ({}, {"column": "id"}):
        with pytest.raises(InterruptedError):
            run(router, Asked([given], str(tmp_path / f"out{len(more)}"), state=str(kept), **asked, **more))
    assert len(list(kept.glob("run-*"))) == 2
    monkeypatch.undo()
    run(router, Asked([given], str(tmp_path / "out"), state=str(kept), **asked))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert len(list(kept.glob("run-*"))) == 2
    run(router, Asked([given], str(tmp_path / "out0"), state=str(kept), **asked), restart=True)
    assert contents(tmp_path / "out0") == contents(tmp_path / "whole")
    assert len(list(kept.glob("run-*"))) == 1
    assert (kept / "thesis.txt").read_text() == "precious"
    assert (kept / "coefficients-000000.npy").read_text() == "another's"


def test_prompts_beyond_what_is_remembered_are_computed_again():
    table = pa.table({"prompt": ["a", "b", "c", "a", "b", "c"]})
    from p2l_engine.batch.rows import Block

    distinct = Distinct(remembered=2)
    turns = [(prompt,) for prompt in table["prompt"].to_pylist()]
    first = distinct.unit(Block(0, 0, turns[:3], table[:3]))
    second = distinct.unit(Block(1, 3, [*turns[3:], Unroutable("no")], table[3:]))
    assert (first.new, second.new) == ([["a"], ["b"], ["c"]], [["c"]])
    assert second.references[:2].tolist() == first.references[:2].tolist()
    assert second.references[3] == -1


def test_blocks_are_bounded_by_rows_and_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr("p2l_engine.batch.rows.BYTES", 1000)
    prompts = ["x" * 5000 if i == 7 else "short" for i in range(20)]
    found = list(blocks(find([write(tmp_path / "in.parquet", prompts)]), "prompt", rows=6))
    assert [len(block.prompts) for block in found] == [6, 2, 6, 6]
    assert [block.first for block in found] == [0, 6, 8, 14]
    assert [turns[0] for block in found for turns in block.prompts] == prompts


ALONE = {"capture_output": True, "text": True, "timeout": 600, "env": os.environ | {"PYTHONPATH": os.getcwd()}}


def command(engine, folder, given, scope):
    """Arguments of the command line, but for the output, and the catalog that they name."""
    costs = "".join(f"  {name}: {{cost: {cost}}}\n" for name, cost in zip(MODELS, COSTS, strict=True))
    (folder / "catalog.yaml").write_text(f"models:\n{costs}")
    return [
        given, "--checkpoint", str(engine.folder), "--device", "cpu", "--dtype", "float32", "--catalog", "catalog.yaml",
        "--budget", "1.5", "--budget-scope", scope, "--rows-per-part", "64",
    ]  # fmt: skip


FULL = """
import os, subprocess, sys
from pathlib import Path
import p2l_engine.batch, p2l_engine.cli, p2l_engine.cli.batch
import torch
torch.set_num_threads(1)  # threads do not outlive a fork

def ended(output):
    pid = os.fork()
    if not pid:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open("log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        sys.argv = ["p2l-engine", "batch", *sys.argv[1:], "-o", output]
        try:
            p2l_engine.cli.main()
        except SystemExit as error:
            os._exit(error.code or 0)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def contents(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(Path(folder).rglob("*")) if file.is_file()}

assert ended("whole") == 0, Path("log").read_text()
whole, failures, size = contents("whole"), 0, 16
os.mkdir("disk")
subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "none", "disk"], check=True)
while (code := ended("disk/out")) != 0:
    assert code == 2 and "No space left on device" in Path("log").read_text(), (code, Path("log").read_text())
    assert "Traceback" not in Path("log").read_text()
    found = contents("disk/out") if os.path.isdir("disk/out") else {}
    for name in found:
        if name.startswith("part-"):
            assert found[name] == whole[name], f"{name} is not whole"
        assert name.startswith(("part-", "_manifest.json", "_state/")), name
    failures, size = failures + 1, size + 24
    subprocess.run(["mount", "-o", f"remount,size={size}k", "disk"], check=True)
assert contents("disk/out") == whole, "other bytes"
print(f"{failures} times full, at last {size} KiB")
assert failures >= 3
"""

MOUNTS = ["unshare", "--user", "--map-root-user", "--mount"]


def may_mount():
    try:
        return subprocess.run([*MOUNTS, "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True).returncode == 0
    except OSError:
        return False


@pytest.mark.skipif(not may_mount(), reason="needs a file system of its own: unshare --user --mount is not permitted here")
@pytest.mark.parametrize("scope", ["prompt", "batch"])
def test_a_disk_that_really_fills_up_loses_nothing(scope, engine, tmp_path):
    write(tmp_path / "in.jsonl.gz", [f"question {i}" for i in range(1500)])
    arguments = command(engine, tmp_path, "in.jsonl.gz", scope)
    done = subprocess.run([*MOUNTS, sys.executable, "-c", FULL, *arguments], cwd=tmp_path, **ALONE)
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)


KILLED = """
import os, random, shutil, signal, sys, time
from pathlib import Path
import p2l_engine.batch, p2l_engine.cli, p2l_engine.cli.batch  # before the first fork: seconds, once

def begin(output):
    pid = os.fork()
    if not pid:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(f"{output}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        sys.argv = ["p2l-engine", "batch", *arguments, "-o", output]
        try:
            p2l_engine.cli.main()
        except SystemExit as error:
            os._exit(error.code or 0)
        os._exit(0)
    return pid

def ended(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def contents(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(Path(folder).rglob("*")) if file.is_file()}

seed, *arguments = sys.argv[1:]
random.seed(int(seed))
start = time.monotonic()
assert ended(begin("whole")) == 0
took = time.monotonic() - start
whole, kills, finished = contents("whole"), 0, 0
while kills < 20:
    pid = begin("out")
    time.sleep(random.uniform(0, took))
    os.kill(pid, signal.SIGKILL)
    if ended(pid) == 0 or random.random() < 0.2:
        assert ended(begin("out")) == 0
        assert contents("out") == whole, "other bytes"
        shutil.rmtree("out")
        finished += 1
    else:
        kills += 1
assert ended(begin("out")) == 0
assert contents("out") == whole, "other bytes"
print(f"{kills} kills, {finished + 1} times to the end, {len(whole)} files, {took:.1f} s uninterrupted")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("scope", ["prompt", "batch"])
def test_killed_at_any_moment_it_ends_with_the_same_bytes(scope, engine, tmp_path):
    rng = np.random.default_rng()
    prompts = [f"question {rng.integers(1500)} " + "so " * int(rng.integers(11)) for _ in range(2000)]
    write(tmp_path / "in.jsonl.gz", prompts)
    arguments = command(engine, tmp_path, "in.jsonl.gz", scope)
    done = subprocess.run([sys.executable, "-c", KILLED, str(rng.integers(1 << 30)), *arguments], cwd=tmp_path, **ALONE)
    assert done.returncode == 0, done.stdout + done.stderr + (tmp_path / "out.log").read_text()
    print(done.stdout)
