"""The speed benchmarks: their prompts, their count of operations, and that they run to the end on a small checkpoint."""

from __future__ import annotations

import csv
import sys

import numpy as np
import pytest
import torch

from bench import kernels, latency, setting, subjects, throughput
from p2l_engine.backbone.families import DecoderConfig
from p2l_engine.backbone.weights import expected_shapes
from p2l_engine.prompts.encode import PromptEncoder
from p2l_engine.prompts.tokenizer import TransformersTokenizer
from tests.support import tiny


def test_random_prompts_have_the_lengths_that_are_claimed():
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
    assert all(0 < float(row["utilisation"]) < 1 for row in rows.values())
    assert "torch" in rows["engine"]["setting"]
    if not torch.cuda.is_available():
        assert "no GPU here" in capsys.readouterr().out


def test_latency_runs_to_the_end(tmp_path, monkeypatch):
    folder, table = tiny.write(tmp_path / "checkpoint"), tmp_path / "rows.csv"
    sizes = ("--tokens", 24, "--calls", 5, "--callers", 1, 3)
    run(monkeypatch, latency, "--checkpoint", folder, "--device", "cpu", *sizes, "--csv", table)
    rows = {row["what"]: row for row in csv.DictReader(table.open())}
    whats = ["whole", "tokenise", "forward", "decide", "reference", "weights", "1 callers", "3 callers"]
    assert list(rows) == whats
    assert all(float(row["p50"]) <= float(row["p95"]) <= float(row["p99"]) for row in rows.values())
    assert [int(rows[f"{n} callers"]["calls"]) for n in (1, 3)] == [5, 5]


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


def test_mistakes_are_told_in_a_line(monkeypatch, capsys, tmp_path):
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
