"""What dtypes cost in quality, the limits of that, and the dtype "auto", which reads both."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import asdict, replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from p2l_engine import Engine, checkpoint
from p2l_engine.batch import Route
from p2l_engine.batch.identity import compute_signature
from p2l_engine.checkpoint import card
from p2l_engine.coefficients import Coefficients
from p2l_engine.engine import as_dtype
from p2l_engine.engine.auto_dtype import auto_dtype
from p2l_engine.errors import CheckpointError
from p2l_engine.evaluation import dtypes
from p2l_engine.feedback import feedback_model
from p2l_engine.jsonable import from_json, to_json
from p2l_engine.reports import DtypeFigures, Evaluation
from p2l_engine.reports.dtypes import too_much
from p2l_engine.train.config import TrainConfig
from p2l_engine.votes import Votes
from tests.support import tiny
from tests.support.catalogs import catalog
from tests.support.command import p2l_engine

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
EXACT = DtypeFigures("float32", 500, 0.0, 0.0, 0.9, 0.7, 0.0, 0.0, 0.0)
INT8 = DtypeFigures("int8", 500, 0.05, 0.4, 0.9, 0.7, 0.01, 0.0, 0.0)


# Figures


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.tuples(st.integers(1, 12), st.integers(2, 6)),
    feedback=st.sampled_from(["bt", "bt-tie", "rk", "grk", "rk-reparam"]),
    scored=st.booleans(),
)
def test_figures_are_those_of_loops_over_prompts_and_votes(seed, shape, feedback, scored):
    rng, (n, m), model = np.random.default_rng(seed), shape, feedback_model(feedback)
    theta, off = rng.normal(size=(n, m)).astype(np.float32), rng.normal(size=(n, m)).astype(np.float32)
    eta = rng.normal(size=n).astype(np.float32) if model.has_eta else None
    names = tuple(f"m{i}" for i in range(m))
    exact, found = Coefficients(theta, eta, names, model), Coefficients(theta + off, eta, names, model)
    a = rng.integers(m, size=30)
    votes = Votes.make(
        [(str(i),) for i in range(n)], names, rng.integers(n, size=30), a, (a + rng.integers(1, m, size=30)) % m,
        rng.integers(2, size=30), rng.random(30) + 0.1,
    )  # fmt: skip
    scores = rng.random((n, m)) if scored else None
    of = dtypes.of(torch.bfloat16, found, exact, votes, scores)
    moved = found.theta.astype(float) - theta
    if not model.grounded:
        moved = np.array([row - sum(row) / m for row in moved])
    assert of.deviation == pytest.approx(np.sqrt(sum(x * x for x in moved.flat) / moved.size), rel=1e-9)
    assert of.largest == pytest.approx(max(abs(x) for x in moved.flat), rel=1e-9)
    losses = []
    for p, one, other, y in zip(votes.prompt, votes.a, votes.b, votes.outcome, strict=True):
        wide = torch.from_numpy(found.theta[p].astype(np.float64))
        tie = None if eta is None else torch.tensor(float(eta[p]), dtype=torch.float64)
        losses.append(-float(torch.log(model.probabilities(wide[one], wide[other], tie)[int(y)])))
    assert of.log_loss == pytest.approx(np.average(losses, weights=votes.weight), rel=1e-6)
    other, lost, got = 0, [], []
    for row in range(n):
        best, now = int(theta[row].argmax()), int(found.theta[row].argmax())
        other += best != now
        wins = [np.mean([1 / (1 + np.exp(float(c) - float(theta[row, k]))) for c in theta[row]]) for k in (best, now)]
        lost.append(100 * (wins[0] - wins[1]))
        got.append(0.0 if scores is None else scores[row, now])
    assert of.other_choice == pytest.approx(other / n)
    assert of.win_rate_lost == pytest.approx(np.mean(lost), abs=1e-6)
    assert of.most_lost == pytest.approx(max(lost), abs=1e-6)
    assert of.mean_score == (pytest.approx(np.mean(got)) if scored else None)


def test_a_shift_of_all_coefficients_counts_only_where_it_means_something():
    theta = np.zeros((3, 4), np.float32)
    for feedback, off in (("bt", 0.0), ("grk", 0.5), ("ols", 0.5)):
        exact = Coefficients(theta, None, tuple("abcd"), feedback_model(feedback))
        assert dtypes.of(torch.bfloat16, replace(exact, theta=theta + 0.5), exact, None).deviation == off


def test_models_of_values_have_no_choices():
    exact = Coefficients(np.eye(3, dtype=np.float32), None, tuple("abc"), feedback_model("ols"))
    of = dtypes.of(torch.bfloat16, exact, exact, None, np.ones((3, 3)))
    assert (of.mean_score, of.other_choice, of.win_rate_lost, of.most_lost, of.log_loss) == (None,) * 5
    assert from_json(DtypeFigures, json.loads(json.dumps(to_json(of)))) == of


@pytest.mark.parametrize("name", ["ols", "poisson"])
def test_values_of_one_model_and_of_two_have_a_loss(name):
    rng, feedback = np.random.default_rng(3), feedback_model(name)
    theta = rng.normal(size=(6, 3)).astype(np.float32)
    exact = Coefficients(theta, None, tuple("abc"), feedback)
    prompt, a, b = np.arange(12) % 6, rng.integers(3, size=12), rng.integers(-1, 3, size=12)
    value, weight = rng.poisson(2.0, 12).astype(float), rng.random(12) + 0.1
    votes = Votes.make([(str(i),) for i in range(6)], "abc", prompt, a, b, value, weight)
    losses = []
    for p, one, other, y in zip(prompt, a, b, value, strict=True):
        x = float(theta[p, one]) - (0.0 if other < 0 else float(theta[p, other]))
        losses.append(
            np.exp(x) - y * x + math.lgamma(y + 1) if name == "poisson" else (y - x) ** 2 / 2 + math.log(2 * math.pi) / 2
        )
    found = dtypes.of(torch.float32, exact, exact, votes)
    assert found.log_loss == pytest.approx(np.average(losses, weights=weight), rel=1e-9)


def test_engines_are_compared_with_float32_whatever_their_order(tmp_path):
    loaded, prompts = checkpoint.load(tiny.write(tmp_path)), [("hello",), ("you",), ("x" * 50,)]
    votes = Votes.make(prompts, tiny.MODELS, np.arange(3), np.zeros(3, int), np.ones(3, int), np.zeros(3, int))
    first, second, third = (Engine(loaded, "cpu", dtype) for dtype in ("int8", "float32", "bfloat16"))
    found = dtypes.figures(first, first.coefficients(prompts), [second, third, second], votes, None, None)
    assert [of.dtype for of in found] == ["float32", "int8", "bfloat16"]
    assert (found[0].deviation, found[0].other_choice) == (0, 0)
    exact, rounded = second.coefficients(prompts).theta, first.coefficients(prompts).theta
    assert found[1].largest == pytest.approx(np.abs(rounded.astype(float) - exact).max())
    assert dtypes.figures(second, second.coefficients(prompts), [], votes, None, None) is None
    with pytest.raises(ValueError, match="others: expected one in float32, .* got torch.int8, torch.bfloat16"):
        dtypes.figures(first, first.coefficients(prompts), [third], votes, None, None)
    stranger = Engine(checkpoint.load(tiny.write(tmp_path / "other")), "cpu", "float32")
    with pytest.raises(ValueError, match="others: expected engines of "):
        dtypes.figures(first, first.coefficients(prompts), [stranger], votes, None, None)


# Limits


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, ""),
        ({"log_loss": 0.9029}, ""),
        ({"log_loss": 0.9031}, "log-loss +0.0031, acceptable +0.003"),
        ({"log_loss": 0.5}, ""),  # no loss
        ({"log_loss": float("nan")}, "log-loss +nan"),
        ({"log_loss": None}, "its log-loss is not known"),
        ({"mean_score": 0.6971}, ""),
        ({"mean_score": 0.6969}, "routed score -0.31 points, acceptable -0.3"),
        ({"mean_score": float("nan")}, "routed score +nan"),
        ({"mean_score": 0.9}, ""),
        ({"mean_score": None}, ""),
        ({"other_choice": 0.2, "win_rate_lost": 0.49}, ""),
        ({"other_choice": 0.03, "win_rate_lost": 5.0}, ""),
        (
            {"other_choice": 0.031, "win_rate_lost": 0.51},
            "another model on 3.1% of prompts, which costs 0.51 points of win rate",
        ),
        ({"other_choice": None, "win_rate_lost": None}, ""),
        ({"prompts": 99}, "99 prompts, at least 100 would be needed"),
        ({"prompts": 5, "log_loss": 2.0}, "5 prompts, at least 100 would be needed; log-loss"),
    ],
)
def test_limits(change, expected):
    found = "; ".join(too_much(replace(INT8, **change), EXACT))
    assert found.startswith(expected)
    assert bool(found) == bool(expected)


# auto


@pytest.fixture
def ours(tmp_path, monkeypatch):
    """A checkpoint whose own figures say that int8 loses little, on a CPU without AMX."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    folder = tiny.write(tmp_path / "ours")
    state(folder)
    return folder


def state(folder, *figures, **subject):
    """Writes figures of float32 and int8 to the checkpoint's evaluation.json."""
    own = {"models": tiny.MODELS, "feedback": "grk", "dtype": "float32"}
    own["head"] = checkpoint.fingerprint.of_head(checkpoint.load(folder).head)
    of = figures or (EXACT, INT8)
    content = {"checkpoint": own | subject, "dtypes": [asdict(each) for each in of]}
    (folder / "evaluation.json").write_text(json.dumps(content))


def chosen(folder, caplog, device=CPU, packed=True):
    """The dtype that "auto" is, and the line in the log, which is the only one."""
    caplog.clear()
    with caplog.at_level(logging.INFO, "p2l_engine.engine.auto_dtype"):
        found = auto_dtype(folder, checkpoint.load(folder).head, packed, device)
    (line,) = [record.getMessage() for record in caplog.records if record.name == "p2l_engine.engine.auto_dtype"]
    assert line.startswith(f"dtype auto: {str(found).removeprefix('torch.')}; ")
    return found, line


def test_auto_is_int8_where_the_figures_allow_it(ours, caplog):
    found, line = chosen(ours, caplog)
    assert found == torch.int8
    assert f"its loss is within the limits, by {ours / 'evaluation.json'}" in line
    caplog.clear()
    with caplog.at_level(logging.INFO, "p2l_engine.engine.auto_dtype"):
        engine = Engine.from_pretrained(ours, device="cpu", dtype="Auto")
    assert [r.getMessage() for r in caplog.records if r.name.endswith("auto_dtype")] == [line]
    assert engine.dtype == torch.int8
    exactly = Engine.from_pretrained(ours, device="cpu", dtype="int8").coefficients(["hello"]).theta
    np.testing.assert_array_equal(engine.coefficients(["hello"]).theta, exactly)


def test_auto_is_the_natural_dtype_elsewhere(ours, caplog, monkeypatch):
    natural = as_dtype(None, CPU)

    def against(expected, **options):
        found, line = chosen(ours, caplog, **options)
        assert found == natural
        assert f"not int8: {expected}" in line

    against("the backbone goes through transformers", packed=False)
    found, line = chosen(ours, caplog, device=CUDA)
    assert (found, "computed on CPUs alone" in line) == (torch.bfloat16, True)
    file = ours / "evaluation.json"
    state(ours, EXACT, replace(INT8, log_loss=0.91))
    against(f"{file} states a loss beyond the limits: log-loss +0.0100, acceptable +0.003")
    state(ours, EXACT, replace(INT8, dtype="bfloat16"))
    against(f"{file} has no figures of float32 and of int8; measure it here with")
    state(ours, INT8)
    against(f"{file} has no figures of float32")
    state(ours, head="0" * 64)
    against(f"{file}: the figures of another head; measure it here with p2l-engine eval")
    state(ours, head=None)
    against(f"{file}: the figures of another head")
    for text, problem in (
        ("{", "expected JSON"),
        ("[]", "expected a JSON dict"),
        ("{}", "expected the JSON that 'p2l-engine eval' writes: checkpoint: expected an object, got None"),
        (file.read_text().replace('"largest": 0.4', '"largest": "much"'), "dtypes[1].largest: expected float, got 'much'"),
        (file.read_text().replace('"largest": 0.4', '"big": 0.4'), "dtypes[1].largest"),
        (json.dumps(json.loads(file.read_text()) | {"dtypes": 7}), "dtypes: expected a list, got 7"),
    ):
        file.write_text(text)
        found, line = chosen(ours, caplog)
        assert (found, problem in line) == (natural, True), line
        state(ours)
    file.unlink()
    against(f"{ours}: expected the file evaluation.json, found none; measure it here with")
    state(ours)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    against("this CPU has AMX")


def test_auto_of_other_engines_and_commands(ours, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("p2l_engine.engine.auto_dtype"), "level", logging.NOTSET)  # as commands find it
    assert Route(str(ours), catalog(), device="cpu", dtype="auto").router.engine.dtype == torch.int8
    caplog.clear()
    ended = p2l_engine("info", "--checkpoint", str(ours), "--device", "cpu", "--dtype", "auto")
    assert ended.status == 0, ended.err
    assert [record.getMessage()[:16] for record in caplog.records if record.name.endswith("auto_dtype")] == ["dtype auto: int8"]
    assert any("dtype" in line and "int8" in line for line in ended.out.splitlines())


# What int8 is refused for, and the alternative that the error names


@pytest.mark.parametrize("dtype", ["int8", "INT8", "torch.int8", torch.int8])
def test_int8_on_cuda(dtype):
    with pytest.raises(ValueError, match="dtype: int8 is computed on CPUs alone, got the device 'cuda': use bfloat16, or"):
        as_dtype(dtype, CUDA)
    assert as_dtype(dtype, CPU) == torch.int8


@pytest.mark.parametrize("wrong", [np.int8, np.dtype("int8"), np.dtype("float32"), torch.uint8, torch.qint8, b"int8", " int8"])
@pytest.mark.parametrize("device", [CPU, CUDA])
def test_what_only_resembles_a_dtype_is_refused(wrong, device):
    with pytest.raises(ValueError, match=r"dtype: expected one of .*int8, or a floating-point torch.dtype, got "):
        as_dtype(wrong, device)


def test_int8_of_a_backbone_that_goes_through_transformers(tmp_path):
    with pytest.raises(ValueError, match="dtype: int8 is for decoders .*got 'gpt2'.*: use bfloat16 or float32"):
        Engine.from_pretrained(tiny.write(tmp_path, tiny.config("gpt2")), device="cpu", dtype="int8")


def test_int8_of_adapters(tmp_path):
    """What can be merged is merged before it is rounded; the rest is refused, with what to do."""
    base = tiny.write(tmp_path / "base")
    folder = tiny.adapter_of(tmp_path / "adapter", base, str(base))
    weights, changed = load_file(base / "model.safetensors"), load_file(folder / "adapter_model.safetensors")
    name = "model.layers.1.self_attn.q_proj"
    down, up = (changed[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
    merged = weights[f"{name}.weight"] + 2 * up @ down
    rounded = Engine.from_pretrained(folder, device="cpu", dtype="int8").backbone.layers[1].qkv.part(0, len(merged))
    assert ((rounded.plain() - merged).abs() <= 0.501 * rounded.scale[:, None]).all()
    assert ((rounded.plain() - weights[f"{name}.weight"]).abs() > rounded.scale[:, None]).any()
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"use_dora": True}))
    with pytest.raises(
        CheckpointError, match="use_dora: .*not supported; merge the adapter into the backbone with what made it"
    ):
        Engine.from_pretrained(folder, device="cpu", dtype="int8")


def test_int8_of_weights_that_are_quantised_already(tmp_path):
    file = tiny.write(tmp_path) / "model.safetensors"
    name, weights = "model.layers.1.mlp.up_proj.weight", load_file(file)
    save_file(weights | {name: weights[name].to(torch.int8)}, file)
    with pytest.raises(
        CheckpointError, match="up_proj.weight: expected floating point, found torch.int8: take the weights before"
    ):
        Engine.from_pretrained(tmp_path, device="cpu", dtype="int8")
    halves = weights | {name: weights[name].to(torch.float8_e4m3fn), f"{name}_scale_inv": torch.ones(1, 1)}
    save_file(halves, file)
    with pytest.raises(CheckpointError, match=r"up_proj.weight_scale_inv: unexpected weight .*quantised"):
        Engine.from_pretrained(tmp_path, device="cpu", dtype="int8")


def test_training_has_no_int8():
    given = {"proj_name": "p", "pretrain_model_name": "x", "train_data_path": "y", "output_dir": "z", "learning_rate": 1e-4,
             "head_type": "rk", "loss_type": "grk"}  # fmt: skip
    assert TrainConfig(**given, dtype="bfloat16").dtype == "bfloat16"
    with pytest.raises(ValueError, match="dtype: int8 is for weights that do not change: expected bfloat16 or float32"):
        TrainConfig(**given, dtype="int8")


def test_runs_and_kept_states_say_in_which_dtype_they_compute(monkeypatch):
    assert compute_signature("cpu", torch.bfloat16, 4096) == "cpu bfloat16, 4096 tokens per batch"
    for name in ("x86-64-v3 (AVX2)", "x86-64-v4 (AVX-512)"):  # int8 of both differs by more than last bits
        monkeypatch.setattr("p2l_engine.engine.device.isa", lambda name=name: name)
        assert compute_signature("cpu", torch.int8, 4096) == f"cpu int8 on {name}, 4096 tokens per batch"


# The command


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """A checkpoint, and scores on 120 prompts and on 30 others."""
    folder, rng = tmp_path_factory.mktemp("dtypes"), np.random.default_rng(0)
    tiny.write(folder / "c")
    for name, count in (("known", 30), ("held-out", 120)):
        rows = [(f"{name} {i}", model, rng.random()) for i in range(count) for model in tiny.MODELS]
        columns = {key: [row[i] for row in rows] for i, key in enumerate(("prompt", "model", "score"))}
        pq.write_table(pa.table(columns), folder / f"{name}.parquet")
    return folder


def evaluated(folder, *more):
    votes = ("--votes", str(folder / "held-out.parquet"), "--training", str(folder / "known.parquet"))
    return p2l_engine("eval", "--checkpoint", str(folder / "c"), "--device", "cpu", *votes, "--bootstrap", "2", *more)


@pytest.mark.slow
def test_eval_compares_dtypes_and_auto_reads_what_it_wrote(scored, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    page = scored / "page.html"
    ended = evaluated(scored, "--dtype", "bf16", "--dtype", "INT8", "--dtype", "bfloat16", "--card", "--html", str(page))
    assert ended.status == 0, ended.err
    written = json.loads((scored / "c" / "evaluation.json").read_text())
    report = from_json(Evaluation, written)
    assert to_json(report)["dtypes"] == written["dtypes"]
    assert [of.dtype for of in report.dtypes] == ["float32", "bfloat16", "int8"]
    exact, halves, whole = report.dtypes
    # The report is in the first dtype that was named: two ways to the same figures.
    assert report.checkpoint.dtype == "bfloat16"
    assert halves.log_loss == pytest.approx(report.votes.overall["p2l"]["log_loss"].value, abs=1e-12)
    assert halves.mean_score == pytest.approx(report.routing.choices["routed"].mean_score, abs=1e-12)
    assert 0 == exact.deviation < halves.deviation
    assert exact.prompts == whole.prompts == 120
    out = " ".join(ended.out.split())
    assert f"int8 {whole.deviation:.4f} {whole.largest:.4f} {whole.log_loss:.4f}" in out
    problems = too_much(whole, exact)
    assert f"{whole.dtype}: {'; '.join(problems) or 'within the limits'}" in out
    readme = (scored / "c" / "README.md").read_text()
    assert f"| {whole.dtype} | {whole.deviation:.4f} ({whole.largest:.3f}) | {whole.log_loss:.4f} |" in readme
    assert f"<td>{whole.dtype}</td><td>{whole.deviation:.4f}</td>" in page.read_text()
    dtype = Engine.from_pretrained(scored / "c", device="cpu", dtype="auto").dtype
    assert dtype == (as_dtype(None, CPU) if problems else torch.int8)


@pytest.mark.slow
def test_eval_in_one_dtype_has_no_table(scored, tmp_path):
    ended = evaluated(scored, "--dtype", "float32", "--dtype", "fp32", "--json", str(tmp_path / "r.json"))
    assert ended.status == 0, ended.err
    assert "dtypes" not in json.loads((tmp_path / "r.json").read_text())
    assert "what a dtype costs" not in ended.out


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("float32", "int4"), "dtype: expected one of float32"),
        (("float32", "half"), "dtype: expected float32, bfloat16 or int8 on a CPU, got torch.float16"),
        (("float32", "auto"), "auto is one of the others: leave it out, or give it alone"),
    ],
)
def test_eval_refuses_dtypes_before_it_computes(scored, monkeypatch, given, message):
    monkeypatch.setattr(Engine, "coefficients", lambda *_: pytest.fail("computed"))
    ended = evaluated(scored, *(part for one in given for part in ("--dtype", one)))
    assert ended.status == 2
    assert message in ended.message


def test_eval_by_source_takes_one_dtype(scored):
    votes = str(scored / "held-out.parquet")
    ended = p2l_engine("eval", "--votes", votes, "--adapt", "--by", "file", "--dtype", "float32", "--dtype", "int8")
    assert (ended.status, "prints learning curves alone" in ended.message) == (2, True)


def test_a_card_says_what_is_acceptable():
    lines = card._dtype_lines((EXACT, INT8, replace(INT8, dtype="bfloat16", log_loss=0.91)))
    assert "| float32 |  | 0.9000 | 0.7000 |  |  |  |" in lines
    assert "| int8 | 0.0500 (0.400) | 0.9000 | 0.7000 | 1.0% | 0.000 (0.00) | yes |" in lines
    assert lines[-1].endswith("| log-loss +0.0100, acceptable +0.003 |")
