"""The benchmarks: their prompts and counts of operations, and that each one runs to the end at tiny sizes."""

from __future__ import annotations

import csv
import importlib
import json
import os
import sys
from dataclasses import astuple
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from rich.console import Console
from transformers import AutoModel, AutoTokenizer

from bench import (
    adapting,
    adapting_rows,
    answer_cache,
    attention,
    batch,
    batch_budgets,
    conversation_costs,
    conversations,
    coverage,
    decided_again,
    demo,
    dtypes,
    exploration,
    kernels,
    latency,
    leaderboards,
    learner,
    learning_curve,
    lengths,
    loading,
    online,
    overload,
    products,
    propensities,
    reading,
    real_budgets,
    replay_coverage,
    router_rows,
    routers,
    serving,
    serving_faults,
    setting,
    simple_routers,
    solvers,
    spend_limits,
    spilled,
    streams,
    subjects,
    throughput,
    traffic,
    training,
    ways_to_join,
)
from bench.adapting_rows import Row
from bench.conversation_costs import ROUTERS
from bench.load import callers, generator, request, servers
from bench.mirror_descent import mirror_descent
from bench.mock_provider import FAULTS, Rule
from p2l_engine import Engine, checkpoint
from p2l_engine.backbone.families import DecoderConfig
from p2l_engine.backbone.weights import expected_shapes
from p2l_engine.engine import natural_dtype
from p2l_engine.feedback import feedback_model
from p2l_engine.learning.answers import LoggedAnswers
from p2l_engine.prompts.encode import PromptEncoder
from p2l_engine.prompts.tokenizer import TransformersTokenizer
from tests.support import tiny
from tests.support.scored import scored_world
from tests.support.training import settings as training_settings
from tests.support.training import skill_votes

pytestmark = pytest.mark.slow  # all benchmarks are imported, with what they compare to


def test_random_prompts_have_the_documented_lengths():
    encoder = PromptEncoder(TransformersTokenizer(subjects.tokenizer()))
    around = len(encoder.encode(["a"])[0]) - 1  # the template's tokens and the CLS token
    own = np.array([len(ids) for ids in encoder.encode(subjects.prompts(4000))]) - around
    found = np.percentile(own, [5, 25, 50, 75, 95])
    np.testing.assert_allclose(found, [7, 21, 48, 108, 345], rtol=0.2)
    assert 85 < own.mean() < 130
    assert len(encoder.prefix()) >= 16


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_operations_are_counted_one_by_one(family):
    config = DecoderConfig.read(tiny.config(family).to_dict())
    lengths, shared = [3, 1, 7], [0, 5, 5]
    shapes = expected_shapes(config)
    count = 0
    for layer in range(config.num_hidden_layers):
        last = layer == config.num_hidden_layers - 1
        for own, before in zip(lengths, shared, strict=True):
            for name, shape in shapes.items():
                if name.startswith(f"layers.{layer}.") and name.endswith("proj.weight"):
                    rows = 1 if last and not name.endswith(("k_proj.weight", "v_proj.weight")) else own
                    count += 2 * rows * shape[0] * shape[1]
            for position in range(own) if not last else [own - 1]:  # two products with every key so far, for every head
                count += 2 * 2 * config.hidden_size * (before + position + 1)
    assert subjects.flops(config, lengths, shared) == count


def test_the_architectures_are_those_that_they_are_named_after():
    sizes = {"smollm2-135m": 134.5e6, "qwen2.5-0.5b": 494e6, "qwen2.5-1.5b": 1543e6, "qwen2.5-7b": 7070e6}
    for name, size in sizes.items():
        shapes = expected_shapes(DecoderConfig.read(subjects.ARCHITECTURES[name]().to_dict()))
        assert sum(int(np.prod(shape)) for shape in shapes.values()) == pytest.approx(size, rel=0.01)


def run(monkeypatch, module, *arguments):
    monkeypatch.setattr(sys, "argv", ["bench", *map(str, arguments)])
    module.main()


def test_throughput_runs_to_the_end(tmp_path, monkeypatch, capsys):
    folder, table = tiny.write(tmp_path / "checkpoint"), tmp_path / "rows.csv"
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join('{"prompt": "%s"}\n' % ("ab" * n) for n in range(1, 9)))
    sizes = ("--count", 6, "--reference-count", 2, "--rounds", 1)
    run(monkeypatch, throughput, "--checkpoint", folder, "--prompts", prompts, "--device", "cpu", *sizes, "--csv", table)
    rows = {row["path"]: row for row in csv.DictReader(table.open())}
    assert list(rows) == ["engine", "hf-batched", "reference"]
    assert [int(row["prompts"]) for row in rows.values()] == [6, 6, 2]
    assert float(rows["reference"]["times_reference"]) == 1.0
    assert 0 < float(rows["engine"]["largest_difference"]) < 0.2
    assert rows["engine"]["precision"] == rows["reference"]["precision"]
    assert float(rows["engine"]["times_engine"]) == 1.0
    assert all(0 < float(row["utilisation"]) < 1 for row in rows.values())
    assert 0 < float(rows["engine"]["elsewhere"]) < 1
    assert "torch" in rows["engine"]["setting"]
    if not torch.cuda.is_available():
        assert "no GPU here" in capsys.readouterr().out


def test_fewer_prompts_have_the_lengths_of_all(tmp_path):
    engine = Engine(checkpoint.load(str(tiny.write(tmp_path / "checkpoint"))), device="cpu")
    texts = ["ab" * int(n) for n in np.random.default_rng(0).permutation(np.arange(1, 101))]
    for count in (1, 7, 10, 33, 100, 1000):
        some = throughput.of_all_lengths(texts, engine, count)
        assert len(set(some)) == min(count, 100)
        assert [text for text in texts if text in some] == some
        assert np.mean([len(text) for text in some]) == pytest.approx(np.mean([len(text) for text in texts]), abs=2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_products_and_attention_are_timed_in_the_same_forward_pass(tmp_path, dtype):
    loaded = checkpoint.load(str(tiny.write(tmp_path / "checkpoint")))
    engine, seen = Engine(loaded, "cpu", dtype), []
    kept = engine.backbone
    tokens = engine.encoder.encode(["one two", "three " * 20])
    spent = products.measured(loaded, engine, lambda: seen.append(engine.forward(tokens)))
    assert spent.products > 0
    assert spent.attention > 0
    assert 0 < spent.elsewhere < 1
    assert all(np.array_equal(theta, engine.forward(tokens)) for theta in seen)
    assert len(seen) == 2
    assert products.measured(loaded, engine, lambda: None).products == 0
    with pytest.raises(ZeroDivisionError):
        products.measured(loaded, engine, lambda: 1 / 0)
    assert engine.backbone is kept


def test_latency_runs_to_the_end(tmp_path, monkeypatch):
    folder, table = tiny.write(tmp_path / "checkpoint"), tmp_path / "rows.csv"
    sizes = ("--tokens", 24, "--calls", 5, "--callers", 1, 3)
    run(monkeypatch, latency, "--checkpoint", folder, "--device", "cpu", *sizes, "--csv", table)
    rows = {row["what"]: row for row in csv.DictReader(table.open())}
    assert {row["dtype"] for row in rows.values()} == {str(natural_dtype(torch.device("cpu"))).removeprefix("torch.")}
    alone = ["whole", "tokenise", "forward", "decide", "reference", "products", "attention", "weights"]
    assert list(rows) == [*alone, "1 callers", "3 callers"]
    assert all(float(row["p50"]) <= float(row["p95"]) <= float(row["p99"]) for row in rows.values())
    assert [int(rows[f"{n} callers"]["calls"]) for n in (1, 3)] == [5, 5]


def test_loading_runs_to_the_end(tmp_path, monkeypatch):
    folder, table = tiny.write(tmp_path / "checkpoint"), tmp_path / "rows.csv"
    monkeypatch.setenv("P2L_ENGINE_WEIGHT_CACHE", "off")  # which the benchmark changes
    run(monkeypatch, loading, "--checkpoint", folder, "--dtype", "float32", "--rounds", 1, "--csv", table)
    rows = {row["path"]: row for row in csv.DictReader(table.open())}
    assert list(rows) == ["without", "first", "later"]
    assert all(float(row["seconds"]) > 0 and float(row["cpu_s"]) > 0 for row in rows.values())
    assert all(float(row[name]) > 0 for row in rows.values() for name in ("private_mib", "private_batch_mib", "mapped_mib"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_kernels_say_that_there_is_no_gpu(monkeypatch, capsys):
    run(monkeypatch, kernels)
    assert "no GPU here" in capsys.readouterr().out


@pytest.mark.parametrize(
    "content", ["", '{"text": "x"}\n', "no json\n", '{"prompt": ["a", "b"]}\n'], ids=["empty", "column", "json", "turns"]
)
def test_prompts_that_cannot_be_read(content, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text(content)
    with pytest.raises(ValueError, match="expected|Expecting"):
        subjects.read_prompts(file, 3)


def test_mistakes_are_errors_of_one_line(monkeypatch, capsys, tmp_path):
    for module, wrong in ((throughput, ("--count", "0")), (latency, ("--calls", "-1")), (latency, ("--callers", "0"))):
        with pytest.raises(SystemExit):
            run(monkeypatch, module, *wrong)
        assert "expected one at least" in capsys.readouterr().err
    folder = tiny.write(tmp_path / "checkpoint")
    few = ("--checkpoint", folder, "--device", "cpu")
    for module, wrong in ((latency, ("--tokens", 3)), (throughput, ("--prompts", tmp_path / "missing.jsonl"))):
        with pytest.raises(SystemExit, match="2"):
            setting.run(lambda module=module, wrong=wrong: run(monkeypatch, module, *few, *wrong))
        assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize(
    "name",
    [
        "adapting", "answer_cache", "attention", "away", "batch", "conversation_costs", "conversations", "coverage",
        "decided_again", "demo", "dtypes", "exploration", "kernels", "latency", "leaderboards", "learner", "learning_curve",
        "lengths", "loading", "online", "overload", "prompts_needed", "propensities", "published_server", "reading",
        "real_budgets", "replay_coverage", "routers", "screenshots", "seeds", "serve_demo", "serving", "serving_faults",
        "solvers", "spend_limits", "startup", "streams", "throughput", "training",
    ],
)  # fmt: skip
def test_every_benchmark_has_help(name, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="0"):
        run(monkeypatch, importlib.import_module(f"bench.{name}"), "--help")
    assert "--help" in capsys.readouterr().out


def test_no_benchmark_is_left_out():
    folder = Path(kernels.__file__).parent
    found = {file.stem for file in folder.glob("*.py") if "def main()" in file.read_text()}
    assert found == set(test_every_benchmark_has_help.pytestmark[0].args[1])


def test_attention_runs_to_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(attention, "SECONDS", 0)
    monkeypatch.setattr(attention, "TOKENS", 400)
    before = torch.get_num_threads()
    try:
        run(monkeypatch, attention, "--lengths", 8, 500, "--threads", 1, "--csv", tmp_path / "rows.csv")
    finally:
        torch.set_num_threads(before)
    with (tmp_path / "rows.csv").open() as file:
        rows = list(csv.DictReader(file))
    cases = [("1", "8"), ("50", "8"), ("1", "500")]
    assert [(row["dtype"], row["prompts"], row["length"]) for row in rows] == [
        (dtype, *case) for dtype in ("float32", "float32 rounded", "bfloat16") for case in cases
    ]
    assert all(float(row["milliseconds"]) > 0 for row in rows)


def test_reading_runs_to_the_end(monkeypatch, capsys):
    run(monkeypatch, reading, "--rows", "20", "--rounds", "1")
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["jsonl", "csv", "parquet"]


def test_solvers_run_to_the_end(tmp_path, monkeypatch):
    table = tmp_path / "rows.csv"
    sizes = ("--models", 9, 34, "--prompts", 30, "--slow-prompts", 3, "--batch-prompts", 40, "--decisions", 5, "--threads", 1)
    run(monkeypatch, solvers, *sizes, "--csv", table)
    head, *lines = table.read_text().splitlines()
    assert head.startswith("# ")
    rows = list(csv.DictReader(lines))
    assert {row["models"] for row in rows} == {"9", "34"}
    stages = {row["stage"] for row in rows}
    assert {"win rates", "budget LP", "BT score", "one decision", "two rows for each prompt", "frontier, all budgets"} <= stages
    exact = [row for row in rows if row["largest_difference"] and not row["stage"].startswith("stream")]
    assert all(float(row["largest_difference"]) < 1e-6 for row in exact)


@pytest.mark.parametrize("shares", [False, True])
def test_a_budget_is_solved_from_coefficients_on_disk(shares):
    figures = spilled.solve_spilled(20_000, shares)
    assert figures["gap"] < 1e-9
    assert figures["GiB of coefficients on disk"] == pytest.approx(20_000 * 11 * 4 / 2**30)


@pytest.mark.parametrize("stage", ["per_prompt", "batch_budget", "share_caps", "streamed"])
def test_stages_over_many_prompts_add_up(stage):
    figures = getattr(batch_budgets, stage)(50, 4)
    parts = [seconds for part, seconds in figures.items() if part not in ("end to end", "gap")]
    assert sum(parts) == pytest.approx(figures["end to end"])


def test_the_cache_of_answers_runs_to_the_end(monkeypatch, tmp_path):
    run(monkeypatch, answer_cache, "--requests", 20, "--rate", 40, "--csv", tmp_path / "rows.csv")
    rows = list(csv.DictReader((tmp_path / "rows.csv").open()))
    assert [(row["store"], row["stream"]) for row in rows] == [
        (store, stream) for store in ("none", "memory", "SQLite") for stream in ("False", "True")
    ]
    assert [float(row["hits"]) for row in rows[:4]] == [0, 0, 1, 1]


def test_conversations_cost_less_where_the_cache_is_priced(monkeypatch, tmp_path):
    run(monkeypatch, conversation_costs, "--conversations", 4, "--prices", 0, 10, "--csv", tmp_path / "rows.csv")
    rows = {(row["setting"], row["price"], row["router"]): row for row in csv.DictReader((tmp_path / "rows.csv").open())}
    assert len(rows) == 2 * 2 * 3
    for (_, price, router), row in rows.items():
        assert (float(row["switches"]) == 0) == (router == "never switches")
        assert float(row["objective"]) == pytest.approx(
            float(row["win_rate"]) - float(price) * float(row["usd"]) / 20, abs=1e-5
        )
    priced, others = ([rows["large and small", "10", name] for name in names] for names in (ROUTERS[:1], ROUTERS[1:]))
    assert all(float(priced[0]["objective"]) > float(row["objective"]) for row in others)
    # Where money has no price, the cache changes nothing.
    assert rows["two alike", "0", "priced"]["usd"] == rows["two alike", "0", "not priced"]["usd"]


def test_a_long_chat_runs_to_the_end(monkeypatch, tmp_path):
    arguments = ("--model", "tiny", "--dtype", "float32", "--turns", 6, "--tokens", 300, "--at", 1, 6, "--rounds", 2)
    run(monkeypatch, conversations, *arguments, "--csv", tmp_path / "rows.csv")
    first, last = csv.DictReader((tmp_path / "rows.csv").open())
    assert [first["turn"], last["turn"]] == ["1", "6"]
    assert int(last["tokens"]) == pytest.approx(300, abs=10)
    assert int(last["computed"]) == pytest.approx(50, abs=12)
    assert all(float(row["difference"]) < 1e-4 < float(row["spread"]) for row in (first, last))
    assert float(last["mib"]) > float(first["mib"]) > 0


def test_streams_run_to_the_end(monkeypatch, capsys, tmp_path):
    run(monkeypatch, streams, "--streams", 2, "--prompts", 60, "--csv", tmp_path / "rows.csv")
    assert "2 streams of 60 prompts" in capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "rows.csv").open()))
    assert len(rows) == len(traffic.KINDS) * 2 * 2 * 3  # streams, first prices, routers
    peer = [row for row in rows if row["router"] not in ("pacer", "open")]
    assert all(float(row["off_percent"]) < 1e-9 for row in peer if row["kind"] not in ("Pareto", "spikes of costs"))
    assert all(float(row["lost_points"]) > -1e-9 for row in peer)


def test_mirror_descent_follows_its_paper():
    v, costs = np.array([[0.5, 0.9]] * 4), np.array([[0.1, 1.5]] * 4)
    # 0.4 against 1.4 at prices 0.2, 0.2 + 0.5 / 2 = 0.45, 0.45 - 0.9 / 2 = 0; at last 4 - 1.5 - 0.1 - 1.5 are left.
    assert mirror_descent(v, costs, 1.0, 0.2, 1.0, "Euclidean").tolist() == [1, 0, 1, 0]
    # At 0.2 and 0.2 exp(0.5 / 2) = 0.257; then 4 - 2 * 1.5 are left.
    assert mirror_descent(v, costs, 1.0, 0.2, 1.0, "entropy").tolist() == [1, 1, 0, 0]


def test_leaderboards_run_to_the_end(tmp_path, monkeypatch):
    table = tmp_path / "rows.csv"
    run(monkeypatch, leaderboards, "--models", 4, "--prompts", 30, "--bootstrap", 3, "--csv", table)
    rows = list(csv.DictReader(table.open()))
    assert [(row["feedback"], row["bootstrap"]) for row in rows] == [("bt", "0"), ("bt", "3"), ("grk", "0"), ("grk", "3")]


def test_batch_runs_to_the_end(tmp_path, monkeypatch):
    table = tmp_path / "rows.csv"
    run(monkeypatch, batch, "--short", 40, "--csv", table)
    rows = dict(csv.reader(table.open()))
    assert rows["rows"] == "40"
    assert int(rows["prompts computed"]) <= 40


def test_another_budget_needs_no_forward_pass(tmp_path):
    first, *others = decided_again.decided(60, tmp_path)
    assert (first.rows, first.found) == (60, 0)
    assert {(row.computed, row.found) for row in others} == {(0, first.computed)}


def routable(folder):
    """A tiny checkpoint with a catalog."""
    costs = "".join(f"  {name}: {{cost: {0.1 * (i + 1):.1f}}}\n" for i, name in enumerate(tiny.MODELS))
    tiny.write(folder)
    (folder / "catalog.yaml").write_text(f"models:\n{costs}")
    return folder


def test_demo_runs_to_the_end(tmp_path, monkeypatch, capsys):
    run(monkeypatch, demo, "--checkpoint", routable(tmp_path / "checkpoint"), "--budget", 0.25)
    out = capsys.readouterr().out
    assert "budget 0.25: mean expected cost" in out
    assert "The leaderboard's top of 5 models for" in out


def test_real_budgets_run_to_the_end(tmp_path, monkeypatch):
    rng, table = np.random.default_rng(), tmp_path / "rows.csv"
    cells = [(f"prompt {i}", name, float(rng.random())) for i in range(40) for name in tiny.MODELS]
    names = ("prompt", "model", "score")
    pq.write_table(pa.table(dict(zip(names, map(list, zip(*cells, strict=True)), strict=True))), tmp_path / "scores.parquet")
    config = {
        "proj_name": "x", "pretrain_model_name": "x", "train_data_path": str(tmp_path / "scores.parquet"), "held_out": 0.25,
        "head_type": "rk", "loss_type": "grk", "learning_rate": 1e-3,
    }  # fmt: skip
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    arguments = ("--checkpoint", routable(tmp_path / "checkpoint"), "--config", tmp_path / "config.yaml", "--budgets", 0.2, 0.3)
    run(monkeypatch, real_budgets, *arguments, "--csv", table)
    rows = list(csv.DictReader(table.open()))
    assert len(rows) == 10
    assert {row["budget"] for row in rows} == {"0.2", "0.3"}
    assert all(float(row["mean_cost"]) <= float(row["budget"]) + 1e-9 for row in rows if not row["router"].startswith("pacer"))


def test_training_runs_to_the_end(tmp_path, monkeypatch):
    votes, table = skill_votes(tmp_path / "votes.parquet", 12), tmp_path / "rows.csv"
    arguments = ("--votes", votes, "--backbone", tiny.write(tmp_path / "base"), "--prompts", 4, "--rounds", 1)
    run(monkeypatch, training, *arguments, "--csv", table)
    rows = list(csv.DictReader(table.open()))
    assert [row["row"].split(", ")[-1] for row in rows] == ["fused layers", "transformers' layers", "fused layers"]
    assert all(float(row["votes_per_second"]) > 0 for row in rows)


def test_spend_limits_are_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(spend_limits, "READY", 0.1)
    run(monkeypatch, spend_limits, "--requests", 64, "--csv", tmp_path / "rows.csv")
    rows = list(csv.DictReader((tmp_path / "rows.csv").open()))
    assert [(row["processes"], row["threads"]) for row in rows] == 2 * [("1", "1"), ("1", "16"), ("4", "16")]
    assert all(float(row["requests_per_second"]) > 0 for row in rows)


def test_serving_runs_to_the_end(tmp_path, monkeypatch):
    cpus = os.sched_getaffinity(0)
    sizes = ("--rates", 20, "--seconds", 0.5, "--turns", 1)
    try:
        run(monkeypatch, serving, *sizes, "--only", "p2l-engine", "published design", "--csv", tmp_path / "rows.csv")
    finally:
        os.sched_setaffinity(0, cpus)
    head, *lines = (tmp_path / "rows.csv").read_text().splitlines()
    assert head.startswith("# ")
    rows = list(csv.DictReader(lines))
    assert [(row["subject"], row["streamed"]) for row in rows[:2]] == [("direct", "False"), ("p2l-engine", "False")]
    assert all(row["answered"] == row["requests"] == "10" for row in rows if row["subject"] == "p2l-engine")
    assert {row["subject"] for row in rows} == {"direct", "p2l-engine", "published design"}


def test_a_server_under_faults(monkeypatch, capsys):
    monkeypatch.setattr(serving_faults, "WARM", 300)
    run(monkeypatch, serving_faults, "--requests", 600, "--settle", 0)
    out = capsys.readouterr().out
    assert "600 requests: " in out
    assert "nothing was wrong" in out


def test_overload_runs_to_the_end(tmp_path, monkeypatch, capsys):
    cpus = os.sched_getaffinity(0)
    try:
        run(monkeypatch, overload, "--rated", 20, "--times", 2, "--seconds", 1, "--queue", 1, "--csv", tmp_path / "rows.csv")
    finally:
        os.sched_setaffinity(0, cpus)
    assert "times its value at the rated load" in capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "rows.csv").read_text().splitlines()[1:]))
    assert [int(row["requests"]) for row in rows] == [20, 40, 20]
    assert all(int(row["served"]) + int(row["refused"]) == int(row["requests"]) for row in rows)
    assert {row["without_retry_after"] for row in rows} == {"0"}


def test_the_rules_of_a_run_with_faults_meet_the_share_that_is_asked_for():
    rules = list(serving_faults.rules(0.25))
    passed = 1.0
    for rule in rules:
        assert Rule.read(rule).probability == rule["probability"]
        passed *= 1 if rule["fault"] == "refuse" else 1 - rule["probability"]
    weights = [weight for weight, rule in serving_faults.FAULTS if rule["fault"] != "refuse"]
    assert 1 - passed == pytest.approx(0.25 * sum(weights) / sum(weight for weight, _ in serving_faults.FAULTS))
    assert {rule["fault"] for _, rule in serving_faults.FAULTS} == {*FAULTS, "refuse"}


@pytest.mark.parametrize(
    ("api", "body", "end"),
    [
        ("chat", b'data: {"choices": []}\n\ndata: [DONE]\n\n', "answered"),
        ("chat", b'data:{"choices": []}\r\n\r\ndata:[DONE]\r\n\r\n', "answered"),
        ("chat", b'data: {"choices": [{"finish_reason": "stop"}]}\n\n', "answered"),
        ("chat", b'data: {"choices": [{"finish_reason": null}]}\n\n', "broken"),
        ("chat", b'data: {"error": {"message": "x"}}\n\n', "cut"),
        ("chat", b'data: {"choices": [{"fin', "broken"),
        ("responses", b'event: response.completed\ndata: {"type": "response.completed"}\n\n', "answered"),
        ("responses", b'event: response.created\ndata: {"type": "response.created"}\n\n', "broken"),
        ("messages", b'event: message_stop\ndata: {"type": "message_stop"}\n\n', "answered"),
        ("messages", b'event: error\ndata: {"type": "error", "error": {"message": "x"}}\n\n', "cut"),
    ],
)
def test_how_a_stream_ended(api, body, end):
    answer = request.Answer(0.0, lambda answer: None, whole=True)
    answer.came(body)
    answer.ended(200)
    assert callers.how_it_ended(answer, api, stream=True).split(":")[0] == end


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_requests_are_timed_from_when_they_are_due(tmp_path, stream):
    with servers.provider(tmp_path, ["small"], first_byte=0.05) as mock:
        job = generator.Job("127.0.0.1", mock.port, "small", ("a", "b"), 200.0, 40, stream)
        timed = generator.run(job)
        missing = generator.run(generator.Job("127.0.0.1", mock.port, "other", ("a",), 200.0, 3, stream))
    assert timed.statuses == {"200": 40}
    assert len(timed.first) == len(timed.end) == timed.sent == 40
    assert (timed.first >= 0.048).all()  # however busy the machine is; the provider's timers count milliseconds
    assert (timed.end >= timed.first).all()
    assert (timed.late >= 0).all()
    assert missing.statuses == {"404": 3}


def test_a_compromised_release_is_refused(tmp_path):
    packages = tmp_path / "lib" / "python3.11" / "site-packages"
    packages.mkdir(parents=True)
    with pytest.raises(ValueError, match="expected an environment"):
        servers.litellm_version(tmp_path)
    (packages / "litellm-1.82.7.dist-info").mkdir()
    with pytest.raises(ValueError, match="compromised"):
        servers.litellm_version(tmp_path)


@pytest.mark.parametrize("feedback", ["grk", "bt-tie"])
def test_a_left_out_model_is_added_in_every_way(feedback, tmp_path):
    rng = np.random.default_rng(0)
    states, scores = rng.normal(size=(60, 6)), rng.integers(0, 2, (60, 4)).astype(float)
    task = ways_to_join.task_of(feedback_model(feedback), ["a", "b", "c", "d"], states, scores, 1, None)
    assert task.models == ("a", "c", "d", "b")
    rows = []
    for n in (0, 20, 1000):
        for name, found in ways_to_join.compared(task, n, 0, retrain=True, residual=True).items():
            assert np.isfinite(found).all()
            rows.append(Row("scores", "frozen", "b", 0, n, name, *found))
    assert {row.method for row in rows} == set(adapting_rows.NAMED)
    adapting_rows.write(rows, tmp_path / "rows.csv")
    again = adapting_rows.read(tmp_path / "rows.csv")
    assert [astuple(row)[:6] for row in again] == [astuple(row)[:6] for row in rows]
    assert len(adapting_rows.summary(again)) == len(rows)
    adapting_rows.draw(again, tmp_path / "curve.svg")
    assert "<svg" in (tmp_path / "curve.svg").read_text()


def test_draws_and_models_of_several_sources_are_summed_up():
    def row(source, model, seed, method, loss, score):
        return Row(source, "default", model, seed, 30, method, loss, 0.1, score)

    rows = [
        row("s", "a", seed, method, loss + seed, 0.5) for seed in (0, 1) for method, loss in (("adapt", 1.0), ("offset", 1.25))
    ]
    rows += [row("t", "a", 0, "adapt", 1.0, 0.75), row("t", "a", 0, "offset", 2.0, 0.25)]
    assert list(adapting_rows.panels(rows)) == ["s, default backbone", "t, default backbone", "all sources"]
    adapted, offset = adapting_rows.summary(rows)
    assert (adapted.method, adapted.models, adapted.log_loss, adapted.above) == ("adapt", 2, 1.25, 0.0)
    assert (offset.log_loss, offset.above, offset.above_error) == pytest.approx((1.875, 0.625, 0.375))
    assert (offset.score, offset.below, offset.below_error) == pytest.approx((0.375, 0.25, 0.25))


def test_short_prompts_and_well_covered_models_are_taken():
    rng = np.random.default_rng(0)
    table = rng.random((100, 20))
    table[:10, 3], table[0, 4:8] = np.nan, np.nan
    every = [("long " * 200,) if i % 4 == 0 else (f"prompt {i}",) for i in range(100)]
    kept, columns, scores = adapting.part_of(every, table, 50)
    assert len(columns) == 12
    assert 3 not in columns
    assert np.isfinite(scores).all()
    assert np.array_equal(scores, table[kept][:, columns])
    assert len(kept) == 50
    assert not (kept % 4 == 0).any()


def test_a_learning_curve_is_drawn(tmp_path):
    rows = [(0.5, 10, 30, "p2l", "log_loss", 1.2, 1.1, 1.3), (1.0, 20, 60, "p2l", "log_loss", 1.0, 0.9, 1.1)]
    learning_curve.draw(rows, tmp_path / "curve.svg")
    assert "<svg" in (tmp_path / "curve.svg").read_text()


def test_exploration_runs_to_the_end(tmp_path, monkeypatch):
    few = ("--prompts", 600, "--worlds", 2, "--known", 100)
    run(monkeypatch, exploration, *few, "--csv", tmp_path / "rows.csv", "--plot", tmp_path / "regret.svg")
    rows = list(csv.DictReader((tmp_path / "rows.csv").open()))
    assert [row["router"] for row in rows[::50]] == ["thompson", "greedy", "epsilon", "share"]
    regret = [float(row["regret"]) for row in rows[:50]]
    assert regret == sorted(regret)  # no policy beats the best one
    assert regret[0] > 0
    assert "<svg" in (tmp_path / "regret.svg").read_text()


def test_propensities_run_to_the_end(monkeypatch, capsys):
    run(monkeypatch, propensities, "--models", 3, "--repeats", 1)
    assert capsys.readouterr().out.count("pacer") == 2


def test_a_server_that_learns_runs_to_the_end(monkeypatch, tmp_path):
    run(monkeypatch, online, "--rounds", 1, "--requests", 10, "--every", 5, "--csv", tmp_path / "rows.csv")
    off, on = csv.DictReader((tmp_path / "rows.csv").open())
    assert (off["votes"], on["votes"]) == ("0", "2")


def test_the_learners_stream_runs_to_the_end(tmp_path, monkeypatch):
    run(monkeypatch, learner, "--votes", 60, "--batch", 20, "--dimensions", 16, "--csv", tmp_path / "rows.csv")
    (row,) = csv.DictReader((tmp_path / "rows.csv").open())
    assert max(float(row["known_sd"]), float(row["new_sd"])) < 1


def test_lengths_run_to_the_end(tmp_path, rng):
    prompts, models = tuple((f"prompt {i}",) for i in range(80)), ("a", "b", "c")
    hidden = rng.normal(size=(80, 6)).astype(np.float32)
    long = np.exp(0.5 * hidden[:, :1]) * [100, 300, 900]
    tokens = np.maximum(long * rng.gamma(8, 1 / 8, (80, 3)), 1)
    known = (np.repeat(np.arange(80), 3), np.tile(np.arange(3), 80), tokens.ravel(), tokens.ravel() / 50)
    answers = LoggedAnswers(prompts, models, *known)
    prices = np.array([[1e-7, 2e-7, 4e-7], [1e-6, 1e-6, 2e-6]])
    paid, score = 20 * prices[0] + tokens * prices[1], (rng.random((80, 3)) < [0.5, 0.7, 0.9]).astype(float)
    data = lengths.Matrix(models, hidden, np.full(80, 20.0), tokens, score, paid, prices)
    figures = lengths.spent(data, answers, splits=2, seed=0)
    assert len(figures) == (len(lengths.SCOPES) + 1) * len(lengths.BUDGETS) * 2
    rows = lengths.rows_of(lengths.errors(hidden, answers, 20), figures, 80)
    lengths.write(rows, tmp_path / "rows.csv")
    read = list(csv.DictReader((tmp_path / "rows.csv").open()))
    assert tuple(read[0]) == lengths.HEADER
    of = {(row["what"], row["costs"], row["figure"]): float(row["value"]) for row in read if row["scope"] == "all models"}
    assert of["tokens", "each prompt's", "absolute_error"] < of["tokens", "each model's mean", "absolute_error"]


def test_coverage_runs_to_the_end(tmp_path, monkeypatch):
    run(monkeypatch, coverage, "--prompts", 5, 6, "--repeats", 2, "--population", 500, "--csv", tmp_path / "rows.csv")
    rows = list(csv.DictReader((tmp_path / "rows.csv").open()))
    assert len({row["what"] for row in rows}) == len(rows) / 2 == 9
    assert all(0 <= float(row["covered"]) <= 1 for row in rows)


def test_coverage_of_replay_runs_to_the_end(tmp_path, monkeypatch):
    sizes = ("--decisions", 200, "--repeats", 2, "--population", 500)
    run(monkeypatch, replay_coverage, *sizes, "--csv", tmp_path / "rows.csv")
    rows = list(csv.DictReader((tmp_path / "rows.csv").open()))
    assert len(rows) == 3 * len(replay_coverage.PAIRS)
    assert {row["estimator"] for row in rows} == {"dr", "snips", "ips"}
    assert {row["refused"] for row in rows if "softmax" in row["pair"]} == {"1"}


def test_dtypes_run_to_the_end(tmp_path, monkeypatch):
    run(monkeypatch, dtypes, "--model", "tiny", "--count", 5, "--csv", tmp_path / "rows.csv")
    rows = list(csv.DictReader((tmp_path / "rows.csv").open()))
    assert [row["dtype"] for row in rows] == ["float32", "bfloat16", "int8"]
    assert float(rows[0]["deviation"]) == 0
    assert all(0 < float(row["deviation"]) < 0.1 for row in rows[1:])


def test_simple_routers_learn_from_scores_with_gaps(rng, monkeypatch):
    monkeypatch.setattr(simple_routers, "PATIENCE", 2)
    world, chance = scored_world(rng)
    parts = [np.arange(k, 240, 3) for k in range(3)]
    predicted = simple_routers.predictions(*(world.of(rows) for rows in parts))
    test = world.of(parts[2])
    assert all(np.isfinite(values).all() and values.shape == (80, 6) for values in predicted.values())
    train, of = world.of(parts[0]), world.source[parts[0]] == "one"
    assert predicted["source"][np.flatnonzero(test.source == "one")[0], 1] == pytest.approx(train.scores[of, 1].mean())
    assert simple_routers.error(predicted["ridge"], test.scores) < simple_routers.error(predicted["source"], test.scores)
    rows = {(row.router, row.source): row for row in router_rows.compare(predicted | {"truth": chance[parts[2]]}, test)}
    assert rows["source", "all"].points == 0
    assert rows["ridge", "all"].points > 0
    assert rows["oracle", "all"].score == pytest.approx(np.nanmax(test.scores, 1).mean())
    assert {source for _, source in rows} == {"all", "one", "two"}
    total = sum(rows["knn", s].score * rows["knn", s].prompts for s in ("one", "two"))
    assert rows["knn", "all"].score == pytest.approx(total / 80)


def test_hulls_and_areas(rng):
    points = rng.random((40, 2))
    found = router_rows.hull(points)
    assert (np.diff(found, axis=0) > 0).all()
    assert (np.diff(np.diff(found[:, 1]) / np.diff(found[:, 0])) < 0).all()
    on = np.interp(points[:, 0], found[:, 0], found[:, 1])
    assert (points[:, 1] <= on + 1e-12).all()
    assert router_rows.area(np.array([[0.5, 0.25], [1.0, 0.75]]), 2.0) == pytest.approx((0.25 + 0.75) / 2)
    vertices = np.array([[0.5, 0.25], [1.0, 0.75], [2.0, 0.85]])
    assert [router_rows.score_at(vertices, cost) for cost in (0.5, 0.75, 9.0)] == pytest.approx([0.25, 0.5, 0.85])
    assert [router_rows.cost_of(vertices, score) for score in (0.1, 0.25, 0.5, 0.8, 0.85)] == pytest.approx(
        [0.5, 0.5, 0.75, 1.5, 2]
    )
    assert np.isnan([router_rows.score_at(vertices, 0.4), router_rows.cost_of(vertices, 0.86)]).all()
    assert router_rows.arena(0.7, 0.0044) == pytest.approx(1.1 * 0.7 / (0.1 * 0.7 + 1))
    assert router_rows.arena(0.7, 200) == 0


def test_a_router_that_knows_none_of_the_models_is_refused():
    """Models that it does not know are never chosen, and do not change how a curve's prices are spread."""
    scores = np.array([[1.0, 0.0, np.nan], [0.0, np.nan, 1.0]])
    partly = np.array([[0.5, 0.2, -np.inf], [0.1, 0.3, -np.inf]])
    np.testing.assert_array_equal(router_rows.chosen(partly, scores), [0, 0])
    costs = np.tile([2.0, 1.0, 3.0], (2, 1))
    np.testing.assert_allclose(router_rows.curve(partly, scores, costs), [[1.5, 0.0], [2.0, 0.5]])
    with pytest.raises(ValueError, match="1 of 2 prompts have no score of a model that the router knows"):
        router_rows.chosen(np.array([[-np.inf, 0.2, -np.inf], [-np.inf, 0.3, -np.inf]]), scores)


def test_the_score_without_a_price_is_not_the_best_of_all_prices(rng):
    scores = rng.integers(0, 2, (60, 4)).astype(float)
    test = simple_routers.Scored(np.zeros((60, 1)), scores, np.array(["s"] * 60), np.array(["t"] * 60))
    predicted = {"source": np.tile(scores.mean(0), (60, 1)), "noise": rng.random((60, 4))}
    costs = np.tile([1.0, 2.0, 3.0, 4.0], (60, 1))
    rows, hulls = router_rows.curves(predicted, test, costs)
    noise = next(row for row in rows if row.router == "noise")
    taken = predicted["noise"].argmax(1)
    assert noise.score == scores[np.arange(60), taken].mean() < hulls["noise"][-1, 1]
    assert noise.cost == pytest.approx(costs[0][taken].mean())
    assert noise.arena == pytest.approx(router_rows.arena(noise.score, 1000 * noise.cost))


def test_a_curve_reaches_the_cheapest_and_the_best_choice(rng):
    world, chance = scored_world(rng)
    costs = np.tile(np.geomspace(1e-4, 1e-2, 6), (240, 1))
    rows, hulls = router_rows.curves({"source": chance.mean(0) + 0 * chance, "truth": chance}, world, costs)
    cheapest = np.where(np.isfinite(world.scores), costs, np.inf).min(1).mean()
    assert hulls["truth"][0, 0] == pytest.approx(cheapest)
    assert {row.router for row in rows} == {"truth", "mixture"}
    assert rows[0].reaches < 1  # the best single model's score, for less
    assert rows[0].aiq > rows[1].aiq


def test_simple_routers_read_what_training_starts_from(tmp_path, monkeypatch):
    monkeypatch.setenv("P2L_ENGINE_CACHE", str(tmp_path / "cache"))
    config = training_settings(tmp_path, dtype="float32")
    states, words = routers.backbone_states(config, [("sum 1",), ("poem", "2"), ("sum 1",)], Console(quiet=True))
    tokenizer, decoder = AutoTokenizer.from_pretrained(tmp_path / "base"), AutoModel.from_pretrained(tmp_path / "base")
    for row, word, turns in zip(states, words, (["sum 1"], ["poem", "2"], ["sum 1"]), strict=True):
        messages = [{"role": "user", "content": turn} for turn in turns]
        text = tokenizer.apply_chat_template(messages, tokenize=False) + tokenizer.cls_token
        tokens = tokenizer(text, return_tensors="pt", add_special_tokens=False)
        with torch.inference_mode():
            expected = decoder.float()(input_ids=tokens.input_ids).last_hidden_state[0, -1]
        np.testing.assert_allclose(row, expected, atol=1e-4)
        different = decoder.get_input_embeddings().weight[sorted(set(tokens.input_ids[0].tolist()))]
        np.testing.assert_allclose(word, different.double().mean(0).detach(), atol=1e-6)


def test_routers_run_to_the_end(tmp_path, monkeypatch, capsys):
    rows = [
        {
            "prompt": f'["Question {i} of {source}?"]',
            "task": f"{source} {i % 3}",
            "model": model,
            "score": float((i + m) % 2),
            "source": source,
        }
        for i in range(150)
        for source in ("one", "two")
        for m, model in enumerate(("x", "y", "z"))
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pool.parquet")
    monkeypatch.setattr(
        routers,
        "backbone_states",
        lambda _, prompts, *__: tuple(np.random.default_rng(i).normal(size=(len(prompts), 4)) for i in (0, 1)),
    )
    monkeypatch.setattr(routers, "theta_of", lambda name, models, prompts, _: np.zeros((len(prompts), len(models))))
    models = {name: {"cost": cost} for name, cost in zip("xyz", (1e-4, 1e-3, 1e-2), strict=True)}
    (tmp_path / "catalog.yaml").write_text(yaml.safe_dump({"models": models}))
    arguments = ["pool.parquet", "--catalog", "catalog.yaml", "--csv", "rows.csv", "--plot", "curves.svg"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["routers", *arguments])
    routers.main()
    with open("rows.csv", newline="") as file:
        found = list(csv.DictReader(file))
    assert {row["router"] for row in found} >= {"source", "task", "ridge", "knn", "mlp", "mf", "default", "oracle", "mixture"}
    assert (tmp_path / "curves.svg").stat().st_size > 1000
    assert "3 of 3 models have a cost" in capsys.readouterr().out
    monkeypatch.setattr(
        sys, "argv", ["routers", "pool.parquet", "--leave-out", "source", "--min-prompts", "20", "--csv", "rows.csv"]
    )
    routers.main()
    with open("rows.csv", newline="") as file:
        found = list(csv.DictReader(file))
    heads = {"head", "shrunk", "configured", "leaderboard"}
    assert {row["router"] for row in found} == {"single", "ridge", "knn", "mlp", "mf", "oracle", *heads}
    left = ("known, without one", "known, without two", "one", "two")
    assert {row["source"] for row in found} == {"all", *left}
    losses = [row for row in found if row["log_loss"]]
    assert sorted((row["source"], row["router"]) for row in losses) == [(s, name) for s in left for name in sorted(heads)]
    assert {row["kept"] for row in losses if row["router"] in ("head", "leaderboard")} == {"0", "1"}
    for alone in (["--leave-out", "source"], ["--folds", "3"]):
        for more in (["--catalog", "catalog.yaml"], ["--checkpoint", "default"]):
            monkeypatch.setattr(sys, "argv", ["routers", "pool.parquet", *alone, *more])
            with pytest.raises(ValueError, match="--leave-out, --folds: expected no --checkpoint"):
                routers.main()


@pytest.mark.slow
@pytest.mark.parametrize("words", [True, False])
def test_routers_in_folds_know_what_the_words_tell(tmp_path, monkeypatch, words):
    """Three models, of which another one is right on each task; hidden states know nothing, words know the task."""
    rng, rows, about = np.random.default_rng(0), [], {}
    for i in range(360):
        task, prompt = f"task {i % 3}", json.dumps([f"Question {i}?"])
        about[f"Question {i}?"] = i % 3
        for m, model in enumerate("xyz"):
            score = float(rng.random() < (0.9 if m == i % 3 else 0.2))
            rows.append({"prompt": prompt, "task": task, "model": model, "score": score, "source": f"source {i // 3 % 2}"})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pool.parquet")

    def states(_, prompts, *__):
        know = np.eye(3)[[about[turns[0]] for turns in prompts]] * 4 + rng.normal(size=(len(prompts), 3))
        return rng.normal(size=(len(prompts), 4)), know

    monkeypatch.setattr(routers, "backbone_states", states)
    training = yaml.safe_load(routers.CONFIG.read_text(encoding="utf-8"))
    training["head_optimum"] = {"deviations": [1.0, 0.1], "topics": {"words": words}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(training))
    monkeypatch.chdir(tmp_path)
    arguments = ["pool.parquet", "--folds", "3", "--shares", "0.5", "1", "--config", "config.yaml", "--csv", "rows.csv"]
    monkeypatch.setattr(sys, "argv", ["routers", *arguments, *(["--words"] if words else [])])
    routers.main()
    with open("rows.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["source"] == "all"]
    assert {row["share"] for row in rows} == {"0.5", "1"}
    rows = [row for row in rows if row["share"] == "1"]
    found = {row["router"]: row for row in rows if row["score"]}
    losses = {row["router"]: float(row["log_loss"]) for row in rows if row["log_loss"]}
    assert set(losses) == {"head", "leaderboard"}
    assert (losses["head"] < 0.9 * losses["leaderboard"]) == words
    assert float(found["head"]["behind"]) == 0
    assert float(found["source"]["behind"]) == pytest.approx(float(found["head"]["points"]))
    assert set(found) == {"source", "task", "ridge", "knn", "mlp", "mf", "task predicted", "head", "ensemble", "oracle"}
    assert 300 < int(found["head"]["prompts"]) < 360  # those that are not held out
    task, of = float(found["task"]["score"]), {name: float(row["score"]) for name, row in found.items()}
    assert task > of["source"] + 0.3
    for name in ("ridge", "knn", "task predicted", "head", "ensemble"):
        assert (of[name] > task - 0.1) == words
