"""Where files have their prompts: nested columns, and the layouts that are recognised, each as the tools write it."""

from __future__ import annotations

import json
import logging

import datasets
import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2l_engine.batch import BatchConfig, run
from p2l_engine.batch.blocks import Unroutable, blocks
from p2l_engine.cli.prompts import PromptFile
from p2l_engine.learning.answers import read_answers
from p2l_engine.learning.traffic import read_traffic
from p2l_engine.prompts.parse import user_turns
from p2l_engine.tables.find import find
from p2l_engine.tables.layouts import PromptColumn, prompt_column
from p2l_engine.votes import read
from tests.support.batch_files import output
from tests.support.cases import slow_but
from tests.support.layouts import (
    LAYOUTS,
    TALK,
    TALKS,
    TURNS,
    WRITERS,
    arena,
    chat,
    openai_chat,
    sharegpt,
    write_csv,
    write_jsonl,
)


def turns_in(path, column=None, **more):
    return [turns for block in blocks(find([str(path)]), column, **more) for turns in block.prompts]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", slow_but(("in.jsonl", "in.csv", "arrow.parquet", "pandas.jsonl"), WRITERS))
def test_a_file_of_each_layout_is_recognised_as_each_tool_writes_it(name, layout, tmp_path, caplog):
    row_of, said = LAYOUTS[layout]
    rows = [row_of(talk, i) for i, talk in enumerate(TALKS)]
    datasets.disable_progress_bars()
    WRITERS[name](tmp_path / name, rows)
    with caplog.at_level(logging.INFO, "p2l_engine.tables.layouts"):
        found = list(blocks(find([str(tmp_path / name)]), None))
        assert [turns for block in found for turns in block.prompts] == TURNS
        assert [record.getMessage() for record in caplog.records] == [f"{tmp_path / name}: reading the user turns of {said}"]
        caplog.clear()
        given_ = PromptFile.read(tmp_path / name)
        assert [tuple(user_turns(prompt)) for prompt in given_.prompts] == TURNS
        assert [record.getMessage() for record in caplog.records] == [f"{tmp_path / name}: reading the user turns of {said}"]
    column = said.split(" ")[0]
    assert column.partition(".")[0] not in found[0].kept.column_names
    identifier = "custom_id" if "custom_id" in rows[0] else "id"
    assert found[0].kept.column(identifier).to_pylist() == ["r0", "r1", "r2"]
    assert turns_in(tmp_path / name, column) == TURNS


@pytest.mark.slow
@given(talks=st.lists(TALK, min_size=1, max_size=5), data=st.data())
@settings(max_examples=25, deadline=None)
def test_the_same_turns_come_from_files_of_each_layout(tmp_path_factory, talks, data):
    folder = tmp_path_factory.mktemp("layouts")
    name = data.draw(st.sampled_from(["in.jsonl", "in.csv", "arrow.parquet", "text.parquet"]))
    row_of, _ = LAYOUTS[data.draw(st.sampled_from(sorted(LAYOUTS)))]
    WRITERS[name](folder / name, [row_of(talk) for talk in talks])
    assert turns_in(folder / name) == [tuple(text for role, text in talk if role == "user") for talk in talks]


def test_nested_columns_of_every_format(tmp_path):
    rows = [{"a.b": f"own {i}", "a": {"b": f"in {i}", "c": {"d.e": [f"list {i}"]}}} for i in range(3)]
    for name in ("in.jsonl", "in.csv", "arrow.parquet", "polars.parquet", "text.parquet"):
        WRITERS[name](tmp_path / name, rows)
        file = tmp_path / name
        assert turns_in(file, "a.b") == [("own 0",), ("own 1",), ("own 2",)]
        assert turns_in(file, "a.c.d.e") == [("list 0",), ("list 1",), ("list 2",)]
        assert PromptFile.read(file, "a.c.d.e").prompts == ["list 0", "list 1", "list 2"]
        assert PromptFile.read(file, "a.b").prompts == ["own 0", "own 1", "own 2"]
        kept = next(blocks(find([str(file)]), "a.c.d.e", ["a", "a.b"])).kept
        assert kept.column_names == ["a", "a.b"]
        for column, message in (
            ("a.x", "expected 'x' within the column 'a', which has b, c"),
            ("a.b.c", "expected 'c' within the column 'a.b', whose cells are no objects"),
            ("x.y", "expected the columns x.y; it has a.b, a"),
        ):
            with pytest.raises(ValueError, match=f"{name}: {message}"):
                turns_in(file, column)
            with pytest.raises(ValueError, match=f"{name}: {message}"):
                PromptFile.read(file, column)
    write_jsonl(tmp_path / "odd.jsonl", [{"a": {"b": "x"}}, {"a": 3}, {"a": None}, {"a": {"c": 1}}, {"a": '{"b": "y"}'}, {}])
    found = turns_in(tmp_path / "odd.jsonl", "a.b")
    assert [turns if not isinstance(turns, Unroutable) else turns.why for turns in found] == [
        ("x",), "a: expected an object, got int", *["prompt: expected a prompt, got nothing"] * 2, ("y",),
        "prompt: expected a prompt, got nothing",
    ]  # fmt: skip
    assert found[1].where == f"{tmp_path / 'odd.jsonl'}: row 1"
    with pytest.raises(ValueError, match=r"odd.jsonl: row 1: expected an object, got int"):
        PromptFile.read(tmp_path / "odd.jsonl", "a.b")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"messages": chat(TALKS[0]), "conversations": sharegpt(TALKS[0])["conversations"]}],
            r"expected one column of prompts, found messages \(lists of messages\) and conversations \(.*\): name one with --",
        ),
        (
            [openai_chat(TALKS[0]) | {"messages": chat(TALKS[0])}],
            r"expected one column of .*, found body \(an OpenAI batch file\) and messages",
        ),
        (
            [{"custom_id": "e", "url": "/v1/embeddings", "body": {"input": "text", "model": "e"}}],
            "expected requests to a chat model .*, got some to /v1/embeddings: take them out",
        ),
        ([{"messages": str(chat(TALKS[0]))}], "column 'messages': expected JSON, got .*, as Python shows objects: write them"),
        ([{"body": "a text", "messages": 3, "conversation": ["a", "b"]}], "expected the columns prompt; it has body, messages"),
        (
            [{"custom_id": "c", "url": "/v1/completions", "body": {"prompt": "text"}}],
            "expected requests to a chat .* /v1/completions",
        ),
        ([{"text": "a"}], "expected the columns prompt; it has text; --column names another column of prompts"),
    ],
)
@pytest.mark.parametrize("name", ["in.jsonl", "arrow.parquet"])
def test_what_is_not_clear_is_refused(name, rows, message, tmp_path):
    WRITERS[name](tmp_path / name, rows)
    for read_it in (turns_in, PromptFile.read):
        with pytest.raises(ValueError, match=f"{name}: {message}"):
            read_it(tmp_path / name)


def test_a_column_prompt_comes_first_and_text_stays_text(tmp_path, caplog):
    body = openai_chat(TALKS[1])
    for name in ("in.jsonl", "in.csv", "arrow.parquet"):
        with caplog.at_level(logging.INFO, "p2l_engine.tables.layouts"):
            WRITERS[name](tmp_path / name, [{**body, "prompt": "said"}, {**body, "prompt": json.dumps(body["body"])}])
            assert turns_in(tmp_path / name) == [("said",), (json.dumps(body["body"]),)]
            assert turns_in(tmp_path / name, "body") == turns_in(tmp_path / name, "body.messages") == [TURNS[1]] * 2
            assert not caplog.records
        WRITERS[name](tmp_path / name, [{"messages": ["first", "second"]}])
        assert turns_in(tmp_path / name, "messages") == [("first", "second")]
    write_csv(tmp_path / "plain.csv", [{"messages": chat(TALKS[1])}])
    text = json.dumps(chat(TALKS[1]))
    assert turns_in(tmp_path / "plain.csv", "messages", plain_text=True) == [(text,)]
    with pytest.raises(ValueError, match="expected the columns prompt; it has messages"):
        turns_in(tmp_path / "plain.csv", plain_text=True)


@pytest.mark.parametrize("name", ["in.jsonl", "arrow.parquet", "in.csv"])
def test_a_layout_is_recognised_where_the_first_rows_are_empty(name, tmp_path):
    empty = [{"id": i, "messages": [None, []][i % 2], "body": None} for i in range(600)]
    WRITERS[name](tmp_path / name, [*empty, {"id": 600, "messages": chat(TALKS[0]), "body": None}])
    found = turns_in(tmp_path / name)
    assert found[600] == TURNS[0]
    assert all(isinstance(turns, Unroutable) for turns in found[:600])
    with pytest.raises(ValueError, match=f"{name}: row 0: prompt: expected a prompt, got nothing"):
        PromptFile.read(tmp_path / name)


@pytest.mark.parametrize("column", ["prompt", "messages", "body"])
def test_a_map_that_has_a_key_twice_is_an_error_of_its_row(column, tmp_path):
    """Parquet's maps, as Spark stores objects, may have one twice; a dict would keep the last."""
    maps = pa.list_(pa.map_(pa.string(), pa.string()))
    fine, twice = [[("role", "user"), ("content", "a")]], [[("role", "user"), ("content", "a"), ("content", "b")]]
    cells = pa.array([fine, twice], maps)
    if column == "body":
        cells = pa.array([[("messages", fine)], [("messages", twice)]], pa.map_(pa.string(), maps))
    pq.write_table(pa.table({column: cells}), tmp_path / "in.parquet")
    found, problem = turns_in(tmp_path / "in.parquet")
    assert found == ("a",)
    assert (
        problem.why
        == f"{column if column == 'messages' else 'prompt'}: expected each key of an object once, got 'content' twice"
    )
    with pytest.raises(ValueError, match="in.parquet: row 1: .*: expected each key of an object once, got 'content' twice"):
        PromptFile.read(tmp_path / "in.parquet")


@pytest.mark.parametrize("ending", slow_but(("jsonl",), ["jsonl", "parquet", "csv"]))
def test_a_request_for_no_chat_model_after_many_others_is_an_error_of_its_row(ending, tmp_path):
    rows = [openai_chat(TALKS[0], i) for i in range(600)]
    rows[550] = {"custom_id": "e", "method": "POST", "url": "/v1/embeddings", "body": {"model": "m", "input": "text"}}
    rows[551]["url"] = None
    writer = {"jsonl": write_jsonl, "csv": write_csv, "parquet": WRITERS["arrow.parquet"]}[ending]
    writer(tmp_path / f"in.{ending}", rows)
    for keep in (None, ["url"], [], ["custom_id"]):
        problems = {}
        for block in blocks(find([str(tmp_path / f"in.{ending}")]), None, keep):
            problems |= {block.first + row: problem.why for row, problem in block.problems.items()}
            assert block.kept.column_names == [name for name in ("custom_id", "method", "url") if keep is None or name in keep]
        assert list(problems) == [550]
        assert problems[550].startswith("url: expected a request to a chat model (")
        assert problems[550].endswith("got '/v1/embeddings'")
    said = {"csv": "expected requests"}.get(ending, "row 550: url: expected a request")  # csv: all 600 are its first ones
    for read_it in (PromptFile.read, lambda path: read_traffic(path, None, "day")):
        with pytest.raises(ValueError, match=rf"in.{ending}: {said} to a chat .* '?/v1/embeddings'?[:;] take them out"):
            read_it(tmp_path / f"in.{ending}")
    assert len(PromptFile.read(tmp_path / f"in.{ending}", "custom_id").prompts) == 600


@pytest.mark.parametrize("url", [{"a": 1}, ["/v1/embeddings"], None])
def test_a_url_that_is_no_text_fails_no_row_where_it_is_not_kept(url, tmp_path):
    rows = [openai_chat(TALKS[0], i) | {"url": url} for i in range(3)]
    for name in ("in.jsonl", "arrow.parquet"):
        WRITERS[name](tmp_path / name, rows)
        (block,) = blocks(find([str(tmp_path / name)]), None, ["custom_id"])
        assert (block.prompts, block.problems) == ([TURNS[0]] * 3, {})
        assert block.kept.to_pylist() == [{"custom_id": f"r{i}"} for i in range(3)]


LATE = {  # each with the name of its column, and a row without it
    "prompt": (None, lambda talk: {"prompt": chat(talk)}),
    "text": ("text", lambda talk: {"text": chat(talk)}),
    "body.messages": ("body.messages", openai_chat),
    "messages": (None, lambda talk: {"messages": chat(talk)}),
    "batch file": (None, openai_chat),
}


@pytest.mark.parametrize("name", LATE)
@pytest.mark.parametrize("keep", [None, [], ["id"]])
@pytest.mark.parametrize("before", slow_but((1, 512), [1, 511, 512, 1100]))
def test_a_column_of_prompts_that_the_first_rows_of_jsonl_lack_is_found(name, keep, before, tmp_path):
    """Spark leaves out what is null."""
    column, row_of = LATE[name]
    rows = [{"id": i} for i in range(before)] + [{"id": 7} | row_of(talk) for talk in TALKS] + [{"id": 8}]
    write_jsonl(tmp_path / "in.jsonl", rows)
    found = turns_in(tmp_path / "in.jsonl", column, keep=keep)
    assert found[before:-1] == TURNS
    assert {each.why for each in found[:before] + found[-1:]} == {"prompt: expected a prompt, got nothing"}
    with pytest.raises(ValueError, match="in.jsonl: expected the columns nothing; it has "):
        turns_in(tmp_path / "in.jsonl", "nothing", keep=keep)


def test_unread_parts_of_a_request_fail_no_row(tmp_path):
    body = {"messages": [*chat(TALKS[1]), {"role": "assistant", "content": "\ud800", "tool_calls": [{"n": 10**30}]}]}
    write_jsonl(tmp_path / "in.jsonl", [{"custom_id": "r", "body": body | {"seed": 10**40}, "note": "\udfff"}])
    assert turns_in(tmp_path / "in.jsonl") == [TURNS[1]]
    assert PromptFile.read(tmp_path / "in.jsonl").prompts == [TURNS[1][0]]


def test_a_cell_of_a_layout_that_is_cut_short_is_an_error_of_its_row(tmp_path):
    """Elsewhere text that is no JSON is a prompt."""
    text, request = json.dumps(chat(TALKS[1])), json.dumps(openai_chat(TALKS[1])["body"])
    write_csv(tmp_path / "m.csv", [{"messages": cell} for cell in (text, text[:-5], "hello", "", f" {text}", '["a", "b"]')])
    write_csv(tmp_path / "b.csv", [{"body": cell} for cell in (request, request[:-5], "hello", "", f" {request}", "[]")])
    texts_, bodies = turns_in(tmp_path / "m.csv"), turns_in(tmp_path / "b.csv")
    assert texts_[0] == texts_[4] == bodies[0] == bodies[4] == TURNS[1]
    for found, expected in (
        (texts_[1], "messages: expected a list of messages, got '"),
        (bodies[1], "body: expected an object"),
    ):
        assert isinstance(found, Unroutable)
        assert found.why.startswith(expected)
        assert found.where.endswith(".csv: row 1")
    assert [i for i, found in enumerate(texts_) if isinstance(found, Unroutable)] == [1, 2, 3, 5]
    assert [i for i, found in enumerate(bodies) if isinstance(found, Unroutable)] == [1, 2, 3, 5]
    assert turns_in(tmp_path / "m.csv", "messages")[1:3] == [(text[:-5],), ("hello",)]
    for name in ("m.csv", "b.csv"):
        with pytest.raises(ValueError, match=rf"{name}: row 1: (messages|body): expected"):
            PromptFile.read(tmp_path / name)


def test_files_of_a_run_have_their_prompts_in_one_place(tmp_path):
    for i, talk in enumerate(TALKS):
        write_jsonl(tmp_path / f"{i}.jsonl", [openai_chat(talk, i)])
    (tmp_path / "empty.jsonl").write_text("\n")
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "none.parquet")
    pq.write_table(pa.table({"body": pa.array([], pa.string())}), tmp_path / "no_rows.parquet")
    assert prompt_column(find([str(tmp_path)]), None) == PromptColumn("body", cells="requests")
    files = find([str(tmp_path / f"{i}.jsonl") for i in range(3)])
    assert [turns for block in blocks(files, None) for turns in block.prompts] == TURNS
    write_jsonl(tmp_path / "other.jsonl", [sharegpt(TALKS[0])])
    with pytest.raises(ValueError, match=r"other.jsonl: expected its prompts in body, as .*0.jsonl has them: name the column"):
        list(blocks([*files, *find([str(tmp_path / "other.jsonl")])], None))
    write_jsonl(tmp_path / "dots.jsonl", [{"body.messages": "x"}])
    with pytest.raises(ValueError, match=r"dots.jsonl: expected its prompts in body.messages, as .*0.jsonl has them"):
        list(blocks([*files, *find([str(tmp_path / "dots.jsonl")])], "body.messages"))


def test_a_batch_file_is_routed_as_its_prompts_are(router, tmp_path):
    write_jsonl(
        tmp_path / "in.jsonl", [openai_chat(talk, i) for i, talk in enumerate(TALKS)] + [{"custom_id": "x", "body": {}}]
    )
    write_jsonl(tmp_path / "plain.jsonl", [{"prompt": list(turns)} for turns in TURNS])
    report = run(router, BatchConfig([tmp_path / "in.jsonl"], tmp_path / "out"))
    run(router, BatchConfig([tmp_path / "plain.jsonl"], tmp_path / "plain"))
    assert (report.rows, report.routed) == (4, 3)
    found, plain = output(tmp_path / "out").to_pylist(), output(tmp_path / "plain").to_pylist()
    for row, expected in zip(found[:3], plain, strict=True):
        assert {name: row[name] for name in expected} == expected | {"source_file": "in.jsonl"}
    assert [row["custom_id"] for row in found] == ["r0", "r1", "r2", "x"]
    assert found[3]["error"] == "body: expected a request with messages or input, got one with none"


def test_votes_have_the_prompts_of_conversations_and_nested_columns(tmp_path):
    for name in ("in.jsonl", "in.csv", "arrow.parquet", "polars.parquet", "datasets.parquet"):
        WRITERS[name](tmp_path / name, [arena(talk, i) for i, talk in enumerate(TALKS)])
        votes, dropped = read(str(tmp_path / name))
        assert set(votes.prompts) == set(TURNS)
        assert not len(dropped)
        rows = [{**arena(talk), "request": openai_chat(talk)} for talk in TALKS]
        WRITERS[name](tmp_path / name, rows)
        votes, dropped = read(str(tmp_path / name), columns={"prompt": "request.body.messages"})
        assert set(votes.prompts) == set(TURNS)
        assert not len(dropped)
    write_jsonl(tmp_path / "odd.jsonl", [*rows, {**arena(TALKS[0]), "request": 7}])
    votes, dropped = read(str(tmp_path / "odd.jsonl"), columns={"prompt": "request.body.messages"}, max_dropped=0.5)
    assert dropped.counts == {"row: expected an object, got int": 1}
    with pytest.raises(ValueError, match=r"columns: expected one of .* for 'prompt', got 'request.x'"):
        read(str(tmp_path / "in.jsonl"), columns={"prompt": "request.x"})


def test_a_vote_between_conversations_of_other_user_turns_is_skipped_and_counted(tmp_path):
    rows = [arena(talk, i) for i, talk in enumerate(TALKS)]
    rows[1]["conversation_b"] = arena(TALKS[2])["conversation_a"]
    rows[2]["conversation_b"] = None
    for name in ("in.jsonl", "in.csv", "arrow.parquet"):
        WRITERS[name](tmp_path / name, rows)
        votes, dropped = read(str(tmp_path / name), max_dropped=0.5)
        assert set(votes.prompts) == {TURNS[0], TURNS[2]}
        assert dropped.counts == {"conversation_b: expected the user's turns of conversation_a, got others": 1}


def test_logs_of_answers_and_of_traffic_have_nested_columns(tmp_path):
    rows = [{**openai_chat(talk, i), "model": "x", "completion_tokens": 5, "time": 1e9 + i} for i, talk in enumerate(TALKS)]
    for name in ("in.jsonl", "in.csv", "polars.parquet"):
        WRITERS[name](tmp_path / name, rows)
        assert read_answers(tmp_path / name, ("x",), "body.messages")[0].prompts == tuple(TURNS)
        assert read_traffic(tmp_path / name, None, "month", "body.messages").prompts == tuple(TURNS)
        assert read_traffic(tmp_path / name, None, "month").prompts == tuple(TURNS)
        for read_it in (
            lambda file: read_answers(file, ("x",), "body.m"),
            lambda file: read_traffic(file, None, "month", "body.m"),
        ):
            with pytest.raises(
                ValueError, match=f"{name}: expected .*(body.m; it has|'m' within the column 'body', which has)"
            ):
                read_it(tmp_path / name)


def test_votes_nested_without_end_are_invalid_rows(tmp_path):
    """Python reads JSON to a depth at which other readers of it, which call themselves more often, give up."""
    inner = "x"
    for depth in range(0, 480, 40):
        nested = [{"role": "user", "content": inner}]
        rows = [arena(TALKS[0]), arena(TALKS[1]) | {"conversation_a": nested, "conversation_b": nested}]
        write_jsonl(tmp_path / "in.jsonl", rows)
        votes, dropped = read(str(tmp_path / "in.jsonl"), max_dropped=0.5)
        assert set(votes.prompts) == {TURNS[0], *([("x",)] if not depth else [])}
        assert len(dropped) == bool(depth)
        for _ in range(40):
            inner = [{"type": "tool_result", "content": inner}]


@pytest.mark.parametrize("rows", [1, 2])
def test_a_list_that_duckdb_writes_is_refused_also_of_one_object(rows, tmp_path):
    duckdb.sql(f"copy (select 'hello' prompt from range({rows})) to '{tmp_path}/in.json' (format json, array true)")
    for read_it in (lambda: turns_in(tmp_path / "in.json"), lambda: PromptFile.read(tmp_path / "in.json")):
        with pytest.raises(
            ValueError, match="in.json: expected a JSON object on each line, got one document over many lines; wr"
        ):
            read_it()
