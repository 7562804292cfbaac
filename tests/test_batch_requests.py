"""Decisions as files of OpenAI's batch API: bodies, ids, one model in a file, and the API's limits."""

from __future__ import annotations

import json
from collections import defaultdict

import fsspec
import hypothesis.strategies as st
import pytest
from hypothesis import given

from p2l_engine import Catalog, Router
from p2l_engine.batch import BatchConfig, request_files, run
from p2l_engine.batch.request_ids import DistinctIds
from p2l_engine.batch.requests import endpoint, request_body
from p2l_engine.catalog import CatalogModel
from tests.support.batch_files import PROMPTS, contents, output, write
from tests.support.cases import slow_but
from tests.support.catalogs import catalog
from tests.support.layouts import LAYOUTS, TALKS, WRITERS, chat

OPTIONS = {"split_by": "model", "write_as": "openai-batch", "rows_per_part": 32}


@pytest.fixture(scope="module")
def provided(router):
    """The router's models, of which two have other names at their providers."""
    names = {"beta": "vendor/beta-2", "gamma": "gamma:latest"}
    models = [
        CatalogModel(model.name, model.cost, {"model": names[model.name]} if model.name in names else {})
        for model in catalog().models
    ]
    return Router(router.engine, Catalog(tuple(models)), seed=router.seed), names


def requests(folder):
    """The lines of each file, by its name."""
    found = {path.name: [json.loads(line) for line in path.open()] for path in sorted(folder.glob("*.jsonl"))}
    assert {path.name for path in folder.iterdir()} <= {*found, "_SUCCESS"}
    return found


@pytest.mark.slow
def test_each_model_has_files_of_its_requests_within_the_limits(provided, tmp_path, monkeypatch):
    router, names = provided
    monkeypatch.setattr(request_files, "MAX_REQUESTS", 20)
    prompts = [*PROMPTS[:40], None, *PROMPTS[41:]]
    given = write(tmp_path / "in.jsonl", prompts)
    run(router, BatchConfig([given], str(tmp_path / "rows"), budget=1.5, budget_scope="batch", rows_per_part=32))
    report = run(router, BatchConfig([given], str(tmp_path / "out"), budget=1.5, budget_scope="batch", **OPTIONS))
    rows = output(tmp_path / "rows").to_pylist()
    files = requests(tmp_path / "out")
    assert report.parts == len(files)
    assert files.pop("errors-000000.jsonl") == [
        {"custom_id": "in.jsonl:40", "source_file": "in.jsonl", "source_row": 40, "error": rows[40]["error"]}
    ]
    lengths, lines = defaultdict(list), defaultdict(list)
    for name, found in files.items():
        model = name.removeprefix("part-").rsplit("-", 1)[0]
        assert name == f"part-{model}-{len(lengths[model]):06d}.jsonl"
        lengths[model].append(len(found))
        lines[model] += found
    for counts in lengths.values():
        assert set(counts[:-1]) <= {20}
        assert 1 <= counts[-1] <= 20
    assert max(map(len, lengths.values())) > 1
    for model, found in lines.items():
        assert [line["custom_id"] for line in found] == [f"in.jsonl:{i}" for i, row in enumerate(rows) if row["model"] == model]
        for line in found:
            text = prompts[int(line["custom_id"].rpartition(":")[2])]
            body = {"messages": [{"role": "user", "content": text}], "model": names.get(model, model)}
            assert line == {"custom_id": line["custom_id"], "method": "POST", "url": "/v1/chat/completions", "body": body}


@pytest.mark.slow
def test_a_file_ends_before_it_has_too_many_bytes_and_no_request_is_larger(router, tmp_path, monkeypatch):
    given = write(tmp_path / "in.jsonl")
    monkeypatch.setattr(request_files, "MAX_BYTES", 1000)
    run(router, BatchConfig([given], str(tmp_path / "out"), **OPTIONS))
    sizes = [path.stat().st_size for path in (tmp_path / "out").glob("part-*")]
    assert max(sizes) <= 1000 < max(sizes) + 250
    monkeypatch.setattr(request_files, "MAX_BYTES", 100)
    with pytest.raises(ValueError, match=r"in.jsonl: row 0: its request has \d+ bytes, expected at most 100"):
        run(router, BatchConfig([given], str(tmp_path / "small"), **OPTIONS))


@pytest.mark.slow
def test_a_stopped_run_goes_on_and_a_second_one_changes_nothing(router, tmp_path):
    given = write(tmp_path / "in.parquet", [*PROMPTS[:40], None, *PROMPTS[41:]])
    run(router, BatchConfig([given], str(tmp_path / "whole"), **OPTIONS))

    def stop(report):
        if report.rows >= 64:
            raise InterruptedError

    config = BatchConfig([given], str(tmp_path / "out"), **OPTIONS)
    with pytest.raises(InterruptedError):
        run(router, config, progress=stop)
    assert not any(path.suffix == ".jsonl" for path in (tmp_path / "out").iterdir())
    for _ in range(2):
        run(router, config)
        assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.slow
def test_a_store_gets_the_same_files(router, tmp_path):
    given, store = write(tmp_path / "in.jsonl"), fsspec.filesystem("memory")
    run(router, BatchConfig([given], str(tmp_path / "out"), **OPTIONS))
    run(router, BatchConfig([given], "memory://requests/out", state=str(tmp_path / "state"), **OPTIONS))
    found = {path.rpartition("/")[2]: store.cat(path) for path in store.ls("/requests/out", detail=False)}
    assert found == contents(tmp_path / "out")


@pytest.mark.slow
def test_ids_are_the_inputs_own_and_must_differ(router, tmp_path):
    ids = [f"mine-{i}" for i in range(150)]
    given = write(tmp_path / "in.jsonl", custom_id=[*ids[:7], None, *ids[8:]])
    run(router, BatchConfig([given], str(tmp_path / "out"), **OPTIONS))
    found = {line["custom_id"] for lines in requests(tmp_path / "out").values() for line in lines}
    assert found == {*ids[:7], "in.jsonl:7", *ids[8:]}
    odd = write(tmp_path / "odd.jsonl", custom_id=[{"a": [True, None], "i": i} for i in range(150)])
    run(router, BatchConfig([odd], str(tmp_path / "objects"), **OPTIONS))
    found = {line["custom_id"] for lines in requests(tmp_path / "objects").values() for line in lines}
    assert found == {json.dumps({"a": [True, None], "i": i}) for i in range(150)}
    again = write(tmp_path / "again.jsonl", custom_id=[*ids[:100], ids[3], *ids[101:]])
    with pytest.raises(ValueError, match=r"again.jsonl: row 100: custom_id: 'mine-3' is also an earlier row's, .*--keep ''"):
        run(router, BatchConfig([again], str(tmp_path / "twice"), **OPTIONS))
    assert not (tmp_path / "twice").exists()  # nothing was computed
    run(router, BatchConfig([again], str(tmp_path / "made"), keep=[], **OPTIONS))
    assert len({line["custom_id"] for lines in requests(tmp_path / "made").values() for line in lines}) == 150


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"split_by": None}, "write_as: expected split_by 'model' with it"),
        ({"format": "csv"}, "write_as: requests are jsonl"),
        ({"coefficients": "float32"}, "write_as: requests are jsonl and have no coefficients"),
        ({"write_as": "anthropic"}, "write_as: expected 'openai-batch' or None, got 'anthropic'"),
    ],
)
def test_options_that_do_not_go_together_are_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        BatchConfig(["in"], "out", **OPTIONS | changed)


def test_messages_that_the_api_does_not_have_cost_their_rows(router, tmp_path):
    messages = [{"role": "user", "content": "hello"}]
    prompts = [messages, [*messages, {"role": "narrator", "content": "so"}, *messages], messages]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    report = run(router, BatchConfig([str(tmp_path / "in.jsonl")], str(tmp_path / "out"), **OPTIONS))
    assert (report.rows, report.routed, report.computed) == (3, 2, 2)  # its coefficients may serve another run
    (error,) = requests(tmp_path / "out")["errors-000000.jsonl"]
    assert "message 1: expected a role of system, developer, user" in error["error"]
    with pytest.raises(ValueError, match=r"in.jsonl: row 1: prompt: message 1: expected a role"):
        run(router, BatchConfig([str(tmp_path / "in.jsonl")], str(tmp_path / "strict"), strict=True, **OPTIONS))


USER, SYSTEM, ANSWER = ({"role": role, "content": role[0]} for role in ("user", "system", "assistant"))
IMAGE = {"type": "image_url", "image_url": {"url": "x"}}


def anthropic(**more):
    return {"model": "m", "max_tokens": 9, "system": "s", "messages": [USER], "stop_sequences": ["x"], **more}


def of_user(*parts):
    return [{"role": "user", "content": list(parts)}]


@pytest.mark.parametrize(
    ("prompt", "messages"),
    [
        ("u", [USER]),
        (["u", "v"], [USER, {"role": "user", "content": "v"}]),
        ('["u"]', [{"role": "user", "content": '["u"]'}]),  # text that is no list for its reader
        ('{"messages": 1}', [{"role": "user", "content": '{"messages": 1}'}]),
        ([SYSTEM, USER], [SYSTEM, USER]),
        ([USER, ANSWER, USER, ANSWER], [USER, ANSWER, USER]),
        ([{"role": "user", "content": "u", "num_tokens": 3}], [USER]),
        ([{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}], [USER]),
        ([{"from": "system", "value": "s"}, {"from": "human", "value": "u"}], [SYSTEM, USER]),
        (of_user({"type": "text", "text": "u", "image": None, "mimeType": ""}), of_user({"type": "text", "text": "u"})),
        (of_user({"type": "input_text", "text": "u"}, IMAGE), of_user({"type": "text", "text": "u"}, IMAGE)),
        ([{"type": "text", "text": "u"}], of_user({"type": "text", "text": "u"})),
    ],
)
def test_a_body_is_made_of_the_conversation(prompt, messages):
    turns = [prompt] if isinstance(prompt, str) else [item for item in prompt if isinstance(item, str)]
    body = request_body(prompt, turns)
    assert body == {"messages": messages}
    assert endpoint(body) == "/v1/chat/completions"


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([{"role": "user", "content": [{"type": "tool_result", "content": "x"}]}], "message 0: part 0: .* got 'tool_result'"),
        ([{"from": "narrator", "value": "x"}], "message 0: expected a role of human, gpt"),
        (anthropic(tools=[]), "Anthropic's API: expected model, system, .* got tools, which OpenAI's has not"),
        (anthropic(messages=[USER, ANSWER]), "expected the user's message at its end"),
    ],
)
def test_what_is_no_request_says_why(prompt, message):
    with pytest.raises(ValueError, match=message):
        request_body(prompt, ["x"])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.slow
@given(st.dictionaries(st.text(max_size=6), JSON, max_size=3), st.sampled_from(["messages", "input"]), JSON)
def test_a_request_stays_as_it_is(more, key, value):
    body = {**more, key: value}
    assert json.dumps(request_body(body, ["u"])) == json.dumps(body)
    if value is not None:
        assert request_body(body, ["u"], with_nulls=False) == without_nulls(body)


def test_what_utf_8_has_not_stays_escaped(router, tmp_path):
    """The body's other texts may have it, its user turns may not."""
    body = '{"messages": [{"role": "system", "content": "\\ud800 é"}, {"role": "user", "content": "é"}], "seed": 1}'
    line = '{"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": BODY}\n'.replace("BODY", body)
    (tmp_path / "in.jsonl").write_text(line, encoding="utf-8")
    run(router, BatchConfig([str(tmp_path / "in.jsonl")], str(tmp_path / "out"), **OPTIONS))
    ((found,),) = requests(tmp_path / "out").values()
    assert found["body"] == json.loads(body) | {"model": found["body"]["model"]}


def test_a_request_of_anthropics_is_one_of_openais():
    parts = of_user({"type": "text", "text": "u", "cache_control": {"type": "ephemeral"}})
    assert request_body(anthropic(temperature=0.5, messages=parts), ["u"]) == {
        "messages": [{"role": "system", "content": "s"}, *of_user({"type": "text", "text": "u"})],
        "max_tokens": 9,
        "stop": ["x"],
        "temperature": 0.5,
    }


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
@pytest.mark.parametrize(
    "name", slow_but(("in.jsonl", "text.parquet"), ["in.jsonl", "in.csv", "arrow.parquet", "text.parquet", "polars.parquet"])
)
def test_a_file_of_each_layout_becomes_requests_of_its_conversations(name, layout, router, tmp_path):
    row_of, _ = LAYOUTS[layout]
    rows = [row_of(talk, i) for i, talk in enumerate(TALKS)]
    WRITERS[name](tmp_path / name, rows)
    run(router, BatchConfig([str(tmp_path / name)], str(tmp_path / "out"), **OPTIONS))
    files = requests(tmp_path / "out")
    errors = files.pop("errors-000000.jsonl", [])
    found = {line["custom_id"]: line for lines in files.values() for line in lines}
    if layout == "anthropic":
        assert ["'tool_use'" in line["error"] for line in errors] == [True] * 3
        return
    assert not errors
    for i, (row, talk) in enumerate(zip(rows, TALKS, strict=True)):
        line = found[f"r{i}" if "custom_id" in row else f"{name}:{i}"]
        model = line["body"].pop("model")
        if "custom_id" in row:
            assert line["url"] == row["url"]
            assert line["body"] == {key: value for key, value in row["body"].items() if key != "model"}
        else:
            parted = layout in ("blocks", "arena")
            assert line["body"] == {"messages": chat(talk, parted)}
        assert any(model in name for name in files)


def without_nulls(value):
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return {key: without_nulls(item) for key, item in value.items() if item is not None} if isinstance(value, dict) else value


def test_the_url_of_the_input_is_used_where_it_is_that_of_the_body():
    chat, responses = {"messages": []}, {"input": "x"}
    assert endpoint(responses) == endpoint(responses, None) == endpoint(responses, "/v1/chat/completions") == "/v1/responses"
    assert endpoint(chat, "/chat/completions") == "/chat/completions"
    assert endpoint(chat, "https://example.com/chat/completions") == endpoint(chat, "") == "/v1/chat/completions"


@pytest.mark.slow
@given(st.lists(st.lists(st.text("ab", max_size=3), max_size=6), max_size=12))
def test_repeated_ids_are_found_wherever_they_are(calls):
    ids, seen = DistinctIds(), set()
    for call in calls:
        first = next((i for i, each in enumerate(call) if each in seen or each in call[:i]), None)
        assert ids.add(call) == first
        seen.update(call)
