"""The posterior of the head's rows: its file, and the deviation of theta that it gives each prompt."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from p2l_engine import Engine, Router, checkpoint
from p2l_engine.backbone import uncertainty
from p2l_engine.backbone.uncertainty import FILE, Uncertainty
from p2l_engine.batch import BatchConfig, Route, run
from p2l_engine.checkpoint.export import export
from p2l_engine.engine.batcher import Batcher
from p2l_engine.errors import CheckpointError
from p2l_engine.evaluation.features import hidden_states
from tests.support import tiny
from tests.support.catalogs import catalog

PROMPTS = ["one", "two words", "", "three more words " * 20]
KNOWN = ("delta", "alpha")  # in another order than the checkpoint's


def posterior(hidden=48, rank=6, models=KNOWN, order=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(hidden + 1, rank, generator=generator)
    factors = torch.randn(len(models), rank, rank, generator=generator).tril()
    return Uncertainty(basis, factors, tuple(models), order)


def oracle(posterior, hidden, order):
    """The definition, in float64: sqrt(x' S_m x)."""
    x = np.concatenate([hidden, np.ones((len(hidden), 1))], 1).astype(np.float64)
    basis, out = posterior.basis.double().numpy(), np.zeros((len(x), len(order)))
    for name, factor in zip(posterior.models, posterior.factors.double().numpy(), strict=True):
        half = basis @ factor
        out[:, order.index(name)] = np.sqrt(np.einsum("nd,de,ne->n", x, half @ half.T, x))
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny checkpoint that is uncertain of two of its five models."""
    found = tiny.write(tmp_path_factory.mktemp("uncertain"))
    posterior().write(found / FILE)
    return found


@pytest.fixture(scope="module")
def uncertain(folder):
    return Engine.from_pretrained(folder, device="cpu", dtype="float32")


@pytest.mark.slow
@given(
    st.integers(1, 9), st.integers(1, 7), st.integers(1, 4), st.integers(0, 5), st.integers(0, 3), st.integers(0, 2**32 - 1),
    st.sampled_from([0.0, 1e-12, 1.0, 1e6]),
)  # fmt: skip
def test_deviation_is_the_posteriors(hidden, rank, k, n, others, seed, scale):
    rng = np.random.default_rng(seed)
    order = [f"m{i}" for i in rng.permutation(k + others)]
    names = rng.permutation([f"m{i}" for i in range(k)]).tolist()
    of = posterior(hidden, rank, names, tuple(order), seed)
    states = rng.normal(size=(n, hidden)).astype(np.float32) * np.float32(scale)
    found = of.deviation(torch.from_numpy(states))
    assert found.dtype == torch.float32
    expected = oracle(of, states, order)
    largest = np.abs(expected).max(initial=1.0)
    np.testing.assert_allclose(found.numpy(), expected, rtol=2e-4, atol=1e-5 * largest)
    assert (found[:, [order.index(name) for name in order if name not in names]] == 0).all()


def test_many_prompts_take_several_passes(monkeypatch):
    monkeypatch.setattr(uncertainty, "PRODUCTS", 30)  # two prompts a pass
    of, states = posterior(order=tuple(tiny.MODELS)), torch.randn(7, 48)
    np.testing.assert_allclose(of.deviation(states).numpy(), oracle(of, states.numpy(), tiny.MODELS), rtol=1e-4)


def test_file_reads_back_and_is_the_same_each_time(tmp_path):
    before = posterior()
    before.write(tmp_path / FILE)
    again = Uncertainty.read(tmp_path / FILE, 48, tuple(tiny.MODELS))
    torch.testing.assert_close(again.basis, before.basis, rtol=0, atol=0)
    torch.testing.assert_close(again.factors, before.factors, rtol=0, atol=0)
    assert (again.models, again.order) == (KNOWN, tuple(tiny.MODELS))
    again.write(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / FILE).read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {"basis": t["basis"]}, "expected the tensors basis and factors, found basis"),
        (lambda t: t | {"more": t["basis"]}, "expected the tensors basis and factors, found basis, factors, more"),
        (lambda t: t | {"basis": t["basis"][:-1]}, r"basis: expected 49 rows, the hidden states' 48 and one, found 48"),
        (lambda t: t | {"basis": t["basis"][:, :5]}, r"factors: expected \[2, 15\].* found \[2, 21\]"),
        (lambda t: t | {"factors": t["factors"][:1]}, r"factors: expected \[2, 21\].* found \[1, 21\]"),
        (lambda t: t | {"factors": t["factors"] * torch.nan}, "factors: expected two dimensions of finite numbers"),
        (lambda t: t | {"basis": t["basis"].double() * 1e300}, "basis: expected two dimensions of finite numbers"),
        (lambda t: t | {"basis": t["basis"].int()}, "basis: expected two dimensions of finite numbers.* torch.int32"),
        (lambda t: t | {"basis": t["basis"][:, 0]}, "basis: expected two dimensions"),
        (lambda t: t | {"trained": torch.ones(2)}, r"trained: expected \[2\] of torch.bool, found \[2\] torch.float32"),
        (lambda t: t | {"trained": torch.ones(3, dtype=torch.bool)}, r"trained: expected \[2\] of torch.bool, found \[3\]"),
        (lambda t: {"basis": t["basis"][:, :0], "factors": t["factors"][:, :0]}, r"basis: expected \[D \+ 1, r\] with r >= 1"),
    ],
)
def test_wrong_tensors_are_named(tmp_path, change, message):
    posterior().write(tmp_path / FILE)
    changed = {name: tensor.clone().contiguous() for name, tensor in change(load_file(tmp_path / FILE)).items()}
    save_file(changed, tmp_path / FILE, metadata={"models": json.dumps(KNOWN)})
    with pytest.raises(CheckpointError, match=message):
        Uncertainty.read(tmp_path / FILE, 48, tuple(tiny.MODELS))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (None, "expected a JSON list of names under 'models'"),
        ("no JSON", "expected a JSON list of names under 'models'"),
        ('{"a": 1}', "expected a JSON list of names"),
        ("[1, 2]", "expected a JSON list of names"),
        ('["alpha", "alpha"]', "expected different names, found alpha twice"),
        ('["alpha", "Delta"]', "expected models of the checkpoint, found Delta"),
        ("[]", r"factors: expected \[0, 21\]"),
    ],
)
def test_wrong_names_are_named(tmp_path, names, message):
    posterior().write(tmp_path / FILE)
    save_file(load_file(tmp_path / FILE), tmp_path / FILE, metadata=None if names is None else {"models": names})
    with pytest.raises(CheckpointError, match=message):
        Uncertainty.read(tmp_path / FILE, 48, tuple(tiny.MODELS))


def test_which_rows_training_fixed_is_kept(tmp_path):
    given = replace(posterior(), trained=tuple(KNOWN[:1]))
    given.write(tmp_path / FILE)
    assert Uncertainty.read(tmp_path / FILE, 48, tuple(tiny.MODELS)).trained == given.trained
    with pytest.raises(ValueError, match="trained: expected models of the posterior, found beta"):
        replace(given, trained=("beta",))


@pytest.mark.slow
@given(st.data())
def test_damaged_files_are_refused_or_read(tmp_path, data):
    """A file with a changed byte, or without its end, is either refused with its name or a posterior of finite numbers."""
    posterior(hidden=3, rank=2).write(tmp_path / FILE)
    content = bytearray((tmp_path / FILE).read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content[place] = data.draw(st.integers(0, 255))
    else:
        del content[place:]
    (tmp_path / FILE).write_bytes(content)
    try:
        found = Uncertainty.read(tmp_path / FILE, 3, tuple(tiny.MODELS))
    except CheckpointError as error:
        assert str(tmp_path / FILE) in str(error)
    else:
        assert all(torch.isfinite(part).all() for part in (found.basis, found.factors))


def test_an_export_keeps_it(folder, tmp_path):
    export(folder, tmp_path / "exported")
    assert (tmp_path / "exported" / FILE).read_bytes() == (folder / FILE).read_bytes()


def test_a_damaged_file_is_a_damaged_checkpoint(folder, tmp_path):
    copied = shutil.copytree(folder, tmp_path / "copy")
    (copied / FILE).write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="damaged, truncated or no safetensors file"):
        checkpoint.load(copied)


def test_without_a_file_there_is_no_deviation(engine):
    assert engine.uncertainty is None
    assert engine.width == engine.head.width
    found = engine.coefficients(PROMPTS)
    assert found.deviation is None
    assert found.rows(slice(1, 3)).deviation is None


def test_every_path_of_the_engine_has_the_deviation(uncertain):
    together = uncertain.coefficients(PROMPTS)
    states, evaluated = hidden_states(uncertain, PROMPTS)
    expected = oracle(posterior(), states, tiny.MODELS)
    np.testing.assert_allclose(together.deviation, expected, rtol=1e-4)
    np.testing.assert_allclose(evaluated.deviation, expected, rtol=1e-4)
    assert together.deviation.dtype == np.float32
    np.testing.assert_allclose(uncertain.coefficients(PROMPTS[1:2]).deviation, expected[1:2], rtol=1e-4)
    np.testing.assert_allclose(together.row(3).deviation, expected[3:], rtol=1e-4)
    batcher = Batcher(uncertain)
    alone = batcher.submit(PROMPTS[1], lambda coefficients: coefficients).result()
    batcher.close()
    np.testing.assert_allclose(alone.deviation, expected[1:2], rtol=1e-4)
    np.testing.assert_array_equal(together.theta, _certain(uncertain).coefficients(PROMPTS).theta)
    assert uncertain.coefficients([]).deviation.shape == (0, 5)


def _certain(engine):
    """The same engine without its uncertainty."""
    return Engine(replace(checkpoint.load(engine.folder), uncertainty=None), "cpu", "float32")


def test_batches_keep_and_write_the_deviation(uncertain, folder, tmp_path):
    prompts = [*PROMPTS, PROMPTS[0], "another"]
    expected = uncertain.coefficients(prompts).deviation
    source = tmp_path / "prompts.jsonl"
    source.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    for name, bounds in (("each", {}), ("over", {"budget": 1.5, "budget_scope": "batch"})):
        config = BatchConfig([source], tmp_path / name, coefficients="float32", **bounds)
        run(Router(uncertain, catalog()), config)
        table = pq.read_table(tmp_path / name)
        np.testing.assert_allclose(np.array(table.column("deviation").to_pylist()), expected, rtol=1e-5)
    rows = Route(str(folder), catalog(), device="cpu", dtype="float32", coefficients="float32")({"prompt": np.array(prompts)})
    np.testing.assert_allclose(rows["deviation"], expected, rtol=1e-5)


def test_numbers_beyond_float32_are_no_coefficients(uncertain):
    out = np.ones((2, uncertain.width), np.float32)
    out[1, -1] = np.inf
    with pytest.raises(FloatingPointError, match=r"prompts\[1\]"):
        uncertain.coefficients_of(out)
