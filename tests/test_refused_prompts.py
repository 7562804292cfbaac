"""Prompts that a chat template refuses: they fail alone, in files, in batches of callers and in pipelines."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from p2l_engine import Engine, PromptError, Router
from p2l_engine.batch import BatchConfig, Route, run
from p2l_engine.engine.batcher import Batcher
from tests.support import tiny
from tests.support.batch_files import assert_routed_as, output, write
from tests.support.catalogs import catalog

TEMPLATE = "{% for m in messages %}{{ raise_exception('no sums') if 'sum' in m['content'] }}{% endfor %}" + tiny.TEMPLATE
WHY = "the tokenizer's chat template cannot be rendered: no sums"
PROMPTS = ["a poem", "a sum", "another poem", "a sum", "sum", "prose"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("refusing") / "checkpoint", template=TEMPLATE)


@pytest.fixture(scope="module")
def refusing(folder):
    return Router(Engine.from_pretrained(folder, device="cpu", dtype=torch.float32), catalog(), seed=3)


@pytest.mark.parametrize("scope", ["prompt", "batch"])
def test_rows_of_files_say_why_and_fail_no_other(scope, refusing, tmp_path):
    given = write(tmp_path / "in.parquet", PROMPTS)
    config = BatchConfig([given], str(tmp_path / "out"), budget=2.0, budget_scope=scope, rows_per_part=2)
    report = run(refusing, config)
    rows = output(tmp_path / "out").to_pylist()
    assert [row["error"] for row in rows] == [None, WHY, None, WHY, WHY, None]
    assert_routed_as(rows[::2][:2] + rows[5:], refusing.route_batch(PROMPTS[::2][:2] + PROMPTS[5:], 2.0, scope))
    assert (report.rows, report.routed) == (6, 3)
    with pytest.raises(ValueError, match=r"in.parquet: row 1: the tokenizer's chat template cannot be rendered: no sums"):
        run(refusing, BatchConfig([given], str(tmp_path / "strict"), budget=2.0, budget_scope=scope, strict=True))


def test_a_file_of_refused_prompts_alone(refusing, tmp_path):
    given = write(tmp_path / "in.jsonl", ["sum"] * 3)
    assert run(refusing, BatchConfig([given], str(tmp_path / "out"))).routed == 0
    assert [row["error"] for row in output(tmp_path / "out").to_pylist()] == [WHY] * 3


def test_callers_fail_alone(refusing):
    batcher = Batcher(refusing.engine)
    futures = [batcher.submit(prompt, lambda c: c.theta[0]) for prompt in PROMPTS]
    for prompt, future in zip(PROMPTS, futures, strict=True):
        if "sum" in prompt:
            with pytest.raises(PromptError, match="no sums"):
                future.result()
        else:
            assert np.isfinite(future.result()).all()
    batcher.close()


def test_a_list_of_prompts_names_the_first(refusing, monkeypatch):
    monkeypatch.setattr("p2l_engine.engine.engine.PROMPTS_PER_CHUNK", 2)
    with pytest.raises(PromptError, match=r"prompts\[3\]: .*no sums") as caught:
        refusing.engine.coefficients(["a poem", "prose", "a poem", "a sum", "sum"])
    assert caught.value.index == 3
    with pytest.raises(PromptError, match=r"prompts\[0\]"):
        refusing.engine.coefficients(["a sum"])


def test_pipelines_keep_their_rows(folder):
    step = Route(str(folder), catalog(), device="cpu", dtype="float32")
    found = step({"prompt": np.array(PROMPTS, object)})
    assert found["error"].tolist() == [None, WHY, None, WHY, WHY, None]
    assert np.isnan(found["score"]).tolist() == [False, True, False, True, True, False]
