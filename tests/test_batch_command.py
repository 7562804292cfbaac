"""The command ``batch``: its exit status, and what it says at its end."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2l_engine.batch.report import MAX_REASONS, Recorder, Report
from p2l_engine.cli.batch_summary import status_of
from tests.support import tiny
from tests.support.command import p2l_engine

CATALOG = "models:\n" + "".join(f"  {name}: {{cost: {i + 1}}}\n" for i, name in enumerate(tiny.MODELS))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tiny.write(tmp_path_factory.mktemp("batch-command") / "p2l")
    (folder / "catalog.yaml").write_text(CATALOG)
    return str(folder)


@pytest.fixture
def batch(checkpoint, tmp_path):
    """Runs the command on prompts."""

    def ended(prompts, *options, name="in"):
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
        more = ["-o", str(tmp_path / "out"), "--checkpoint", checkpoint, "--device", "cpu", *options]
        return p2l_engine("batch", str(file), *more)

    return ended


@pytest.mark.slow
def test_the_exit_status_says_whether_all_some_or_no_rows_were_routed(batch, tmp_path):
    for prompts, status, said in (
        (["a", "b"], 0, ""),
        ([], 0, ""),
        (["a", None, 7, None, 8, 9], 3, "5 of 6 rows were not routed, as the column error says; the reasons:\n"),
        ([None], 4, "no row was routed, as the column error says; the reasons:\n  1: prompt: expected a prompt, got nothing"),
    ):
        for again in ("--restart", "--column=prompt"):  # the second time it is complete
            found = batch(prompts, again)
            assert found.status == status, found.err
            assert found.err.startswith(said)
            assert bool(found.err) == bool(said)
    lines = batch(["a", None, 7, None, 8, "b"], "--restart").err.splitlines()
    assert lines[1:] == [
        f"  2: prompt: expected a prompt, got nothing (first in {tmp_path}/in.jsonl: row 1)",
        "  2: prompt: expected a string, a list of user turns or a list of messages, got int "
        f"(first in {tmp_path}/in.jsonl: row 2)",
    ]


@pytest.mark.slow
def test_errors_stop_and_strict_are_one(batch, tmp_path):
    for option in (["--strict"], ["--errors", "stop"], ["--strict", "--errors", "stop"]):
        found = batch(["a", None], *option)
        assert found.status == 2
        assert f"{tmp_path}/in.jsonl: row 1: prompt: expected a prompt, got nothing" in found.err
    assert batch(["a", None], "--errors", "row").status == 3
    found = batch(["a", None], "--strict")
    assert found.status == 2
    assert f"out: 1 of its 2 rows have an error: {tmp_path}/in.jsonl: row 1: prompt: expected a prompt" in found.err
    found = batch(["a"], "--strict", "--errors", "row")
    assert found.status == 2
    assert "row cannot be combined with --strict" in found.err


@pytest.mark.slow
def test_a_changed_budget_says_that_there_was_no_forward_pass(batch):
    prompts = [f"question {i}" for i in range(30)]
    assert batch(prompts).status == 0
    found = batch(prompts, "--budget", "2")
    assert (found.status, found.err) == (
        0, "decided again (budget: was None, is 2.0) from the coefficients of 30 prompts; no forward pass\n"
    )  # fmt: skip
    found = batch(prompts, "--budget", "2", "--no-keep-coefficients")
    assert "coefficients kept for other decisions │ none" in " ".join(found.out.split())
    found = batch(prompts, "--budget", "3")
    assert found.status == 2
    assert "budget: was 2.0, is 3.0; its coefficients, from which it could be decided again, are not in" in found.err


@pytest.mark.slow
@given(st.lists(st.tuples(st.sampled_from(["no text", "cost #", "got # values"]), st.integers(0, 10**6)), max_size=300))
def test_reasons_that_differ_in_numbers_alone_are_one(rows):
    recorder = Recorder()
    for first in range(0, len(rows), 7):
        part = rows[first : first + 7]
        recorder.add_errors((why.replace("#", str(number)), f"row {first + i}") for i, (why, number) in enumerate(part))
    kinds = {why: [i for i, (each, _) in enumerate(rows) if each == why] for why, _ in rows}
    expected = sorted(kinds.items(), key=lambda kind: (-len(kind[1]), kind[1][0]))
    found = recorder.report.reasons
    assert [(reason.rows, reason.where) for reason in found] == [(len(of), f"row {of[0]}") for _, of in expected]
    assert [reason.why for reason in found] == [why.replace("#", str(rows[of[0]][1])) for why, of in expected]
    assert Report.of(json.loads(json.dumps(recorder.report.recorded()))).reasons == found


def test_reasons_without_end_take_bounded_memory():
    recorder = Recorder()
    letters = "abcdefghijklmnopqrstuvwxyz"
    recorder.add_errors((f"why {a}{b}", f"row {a}{b}") for a in letters for b in letters)
    found = recorder.report.reasons
    assert len(found) == MAX_REASONS + 1
    assert sum(reason.rows for reason in found) == 26 * 26
    assert found[0].why == "other reasons"


@given(st.integers(0, 9), st.integers(0, 9))
def test_every_count_has_one_status(routed, errors):
    status = status_of(Report(rows=routed + errors, routed=routed))
    assert status == (0 if not errors else 3 if routed else 4)


@pytest.mark.slow
def test_decisions_are_written_as_requests(batch, tmp_path):
    requests = ("--split-by", "model", "--as", "openai-batch")
    found = batch(["a", "b", None], *requests)
    assert found.status == 3
    lines = [json.loads(line) for part in sorted((tmp_path / "out").glob("part-*.jsonl")) for line in part.open()]
    assert sorted(line["custom_id"] for line in lines) == ["in.jsonl:0", "in.jsonl:1"]
    assert "1 of 3 rows were not routed, as the files errors-* say" in found.err
    for options, said in (
        (("--as", "openai-batch"), "--as: needs --split-by model"),
        ((*requests, "--format", "csv"), "--format: requests are jsonl, got csv"),
    ):
        refused = batch(["a"], *options)
        assert refused.status == 2
        assert said in refused.err
    assert batch(["a", "b", None], *requests, "--format", "jsonl").status == 3
