"""Expected output tokens and seconds in a checkpoint: the file, and what each path of the engine says of a prompt."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from p2l_engine import Engine, checkpoint
from p2l_engine.backbone.head import Head
from p2l_engine.backbone.lengths import FILE, LengthHead, LengthRows
from p2l_engine.checkpoint.export import export
from p2l_engine.engine.batcher import Batcher
from p2l_engine.errors import CheckpointError
from p2l_engine.evaluation.features import hidden_states
from p2l_engine.learning import write
from p2l_engine.learning.lengths import fit_lengths
from tests.support import tiny
from tests.support.lengths import OBSERVED, length_head, length_rows

PROMPTS = ["one", "two words", "", "three more words " * 20]
PER_PROMPT = 2 * len(tiny.MODELS) + 1  # tokens and seconds of each model, and the prompt's own tokens


def oracle(rows, hidden, order):
    """The definition, in float64."""
    parts = [part.double().numpy() for part in (rows.weight, rows.bias, rows.least, rows.most)]
    out = np.empty((len(hidden), len(order)))
    for m, name in enumerate(order):
        i = rows.models.index(name) if name in rows.models else len(rows.models)
        weight, bias, least, most = (part[i] for part in parts)
        out[:, m] = np.exp(np.clip(hidden.astype(np.float64) @ weight + bias, np.log(least), np.log(most)))
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny checkpoint that has seen answers of two of its five models."""
    found = tiny.write(tmp_path_factory.mktemp("lengths"))
    length_head().write(found / FILE)
    return found


@pytest.fixture(scope="module")
def knowing(folder):
    return Engine.from_pretrained(folder, device="cpu", dtype="float32")


@pytest.mark.slow
@given(
    st.integers(1, 9), st.integers(0, 4), st.integers(0, 5), st.integers(1, 3), st.booleans(), st.integers(0, 2**32 - 1),
    st.sampled_from([0.0, 1e-6, 1.0, 1e3]),
)  # fmt: skip
def test_expected_amounts_are_those_of_the_rows(hidden, k, n, others, seconds, seed, scale):
    rng = np.random.default_rng(seed)
    order = tuple(f"m{i}" for i in rng.permutation(k + others))
    names = tuple(rng.permutation(order)[:k].tolist())
    rows = {name: length_rows(hidden, names, seed + i) for i, name in enumerate(("tokens", "seconds")[: 1 + seconds])}
    head = LengthHead(order, **rows)
    states = rng.normal(size=(n, hidden)).astype(np.float32) * np.float32(scale)
    found = head(torch.from_numpy(states))
    assert found.dtype == torch.float32
    assert found.shape == (n, head.outputs) == (n, len(order) * (1 + seconds))
    expected = np.concatenate([oracle(of, states, order) for of in rows.values()], 1)
    np.testing.assert_allclose(found.numpy(), expected, rtol=2e-3)


def test_file_reads_back_and_is_the_same_each_time(tmp_path):
    before = length_head()
    before.write(tmp_path / FILE)
    again = LengthHead.read(tmp_path / FILE, 48, tuple(tiny.MODELS))
    assert (again.tokens.models, again.order) == (OBSERVED, tuple(tiny.MODELS))
    states = torch.randn(7, 48)
    assert torch.equal(again(states), before(states))
    again.write(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / FILE).read_bytes()


def _nan(tensor):
    return torch.full_like(tensor, torch.nan)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {}, r"expected the tensors tokens\.bias, .*, found none"),
        (lambda t: {k: v for k, v in t.items() if "tokens" not in k}, "expected the tensors .* tokens among them"),
        (lambda t: {k: v for k, v in t.items() if k != "seconds.most"}, r"expected the tensors .*seconds\.most.*, found"),
        (lambda t: t | {"hours.bias": t["tokens.bias"]}, r"found hours\.bias"),
        (lambda t: t | {"tokens.weight": t["tokens.weight"][:, :-1]}, "tokens.weight: expected rows of 48, .* found 47"),
        (lambda t: t | {"seconds.weight": t["seconds.weight"][:, :-1]}, "seconds.weight: expected rows of 48, as tokens"),
        (lambda t: t | {"tokens.weight": t["tokens.weight"][:-1]}, r"tokens.weight: expected \[3, 'D'\].* found \[2, 48\]"),
        (lambda t: t | {"tokens.bias": t["tokens.bias"][:-1]}, r"tokens.bias: expected \[3\].* found \[2\]"),
        (lambda t: t | {"tokens.weight": t["tokens.weight"][:, 0]}, "tokens.weight: expected"),
        (lambda t: t | {"tokens.weight": _nan(t["tokens.weight"])}, "tokens.weight: expected finite numbers"),
        (lambda t: t | {"seconds.bias": t["seconds.bias"] / 0}, "seconds.bias: expected finite numbers"),
        (lambda t: t | {"tokens.least": t["tokens.least"] * 0}, "tokens.least, most: expected 0 < least <= most"),
        (lambda t: t | {"tokens.most": t["tokens.least"] / 2}, "tokens.least, most: expected 0 < least <= most"),
    ],
)
def test_wrong_tensors_are_named(tmp_path, change, message):
    length_head().write(tmp_path / FILE)
    changed = {name: tensor.clone().contiguous() for name, tensor in change(load_file(tmp_path / FILE)).items()}
    save_file(changed, tmp_path / FILE, metadata={"models": json.dumps({"tokens": OBSERVED, "seconds": OBSERVED})})
    with pytest.raises(CheckpointError, match=message):
        LengthHead.read(tmp_path / FILE, 48, tuple(tiny.MODELS))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (None, "tokens.models: expected the list of their names in the metadata, found None"),
        ("no JSON", "expected the list of their names"),
        ("[1, 2]", "expected the list of their names"),
        ('{"tokens": "alpha"}', "expected the list of their names"),
        ('{"tokens": [1, 2]}', "expected the list of their names"),
        ('{"tokens": ["delta", "alpha"]}', "seconds.models: expected the list of their names"),
        ('{"tokens": ["alpha", "alpha"]}', "expected different names, found alpha twice"),
        ('{"tokens": ["alpha", "Delta"], "seconds": ["alpha", "delta"]}', "tokens: expected models of the checkpoint"),
        ('{"tokens": []}', r"tokens.weight: expected \[1, 'D'\]"),
    ],
)
def test_wrong_names_are_named(tmp_path, names, message):
    length_head().write(tmp_path / FILE)
    save_file(load_file(tmp_path / FILE), tmp_path / FILE, metadata=None if names is None else {"models": names})
    with pytest.raises(CheckpointError, match=message):
        LengthHead.read(tmp_path / FILE, 48, tuple(tiny.MODELS))


@pytest.mark.slow
@given(st.data())
def test_damaged_files_are_refused_or_read(tmp_path, data):
    """A file with a changed byte, or without its end, is either refused with its name or gives finite amounts."""
    order = tuple(tiny.MODELS)
    LengthHead(order, length_rows(3, OBSERVED, 0)).write(tmp_path / FILE)
    content = bytearray((tmp_path / FILE).read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content[place] = data.draw(st.integers(0, 255))
    else:
        del content[place:]
    (tmp_path / FILE).write_bytes(content)
    try:
        found = LengthHead.read(tmp_path / FILE, 3, order)
    except CheckpointError as error:
        assert str(tmp_path / FILE) in str(error)
    else:
        assert found(torch.zeros(1, 3)).isfinite().all()


def test_a_damaged_file_is_a_damaged_checkpoint(folder, tmp_path):
    copied = shutil.copytree(folder, tmp_path / "copy")
    (copied / FILE).write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="lengths.safetensors: damaged, truncated or no safetensors file"):
        checkpoint.load(copied)


def test_exports_and_adapted_checkpoints_keep_it_without_dropped_models(folder, tmp_path):
    export(folder, tmp_path / "exported")
    assert (tmp_path / "exported" / FILE).read_bytes() == (folder / FILE).read_bytes()
    loaded = checkpoint.load(folder)
    write.write(loaded, tmp_path / "kept", loaded.head, loaded.models, None)
    assert (tmp_path / "kept" / FILE).read_bytes() == (folder / FILE).read_bytes()
    write.write(loaded, tmp_path / "dropped", loaded.head, loaded.models, None, drop=["alpha", "beta"])
    found, states = checkpoint.load(tmp_path / "dropped").lengths, torch.randn(3, 48)
    assert (found.tokens.models, found.seconds.models) == (("delta",), ("delta",))
    kept = [tiny.MODELS.index(name) for name in ("gamma", "delta", "epsilon")]
    both = [*kept, *(len(tiny.MODELS) + k for k in kept)]
    torch.testing.assert_close(found(states), loaded.lengths(states)[:, both])
    write.write(loaded, tmp_path / "none", loaded.head, loaded.models, None, drop=OBSERVED)
    assert checkpoint.load(tmp_path / "none").lengths.tokens.models == ()


def test_models_that_are_added_get_what_the_others_have_in_common(folder, tmp_path):
    loaded = checkpoint.load(folder)
    old, m = loaded.head, len(loaded.models)
    head = Head(torch.cat([old.weight[:1], old.weight]), torch.cat([old.bias[:1], old.bias]), m + 1)
    write.write(loaded, tmp_path / "grown", head, ("new", *loaded.models), None)
    states = torch.randn(3, 48)
    found = checkpoint.load(tmp_path / "grown").lengths(states)
    gamma = loaded.lengths(states)[:, tiny.MODELS.index("gamma")]  # which was not observed either
    torch.testing.assert_close(found[:, 0], gamma)
    torch.testing.assert_close(found[:, 1 : m + 1], loaded.lengths(states)[:, :m])


def test_without_a_file_there_is_no_usage(engine):
    assert engine.lengths is None
    assert engine.width == engine.head.width
    assert engine.coefficients(PROMPTS).usage is None
    assert engine.coefficients(PROMPTS).row(1).usage is None


def test_every_path_of_the_engine_has_the_usage(knowing):
    together = knowing.coefficients(PROMPTS)
    states, evaluated = hidden_states(knowing, PROMPTS)
    assert evaluated.usage is None
    tokens, seconds = (oracle(rows, states, tiny.MODELS) for rows in (knowing.lengths.tokens, knowing.lengths.seconds))
    np.testing.assert_allclose(together.usage.tokens_out, tokens, rtol=1e-4)
    np.testing.assert_allclose(together.usage.seconds, seconds, rtol=1e-4)
    np.testing.assert_array_equal(together.usage.tokens_in, [len(prompt) for prompt in PROMPTS])  # its tokens are bytes
    assert together.usage.observed.tolist() == [name in OBSERVED for name in tiny.MODELS]
    assert together.deviation is None
    batcher = Batcher(knowing)
    alone = batcher.submit(PROMPTS[3], lambda coefficients: coefficients).result()
    batcher.close()
    streamed = knowing.split(np.concatenate([chunk.outputs for chunk in knowing.outputs_of([PROMPTS])]))
    some = (knowing.coefficients(PROMPTS[3:]), together.row(3), together.rows(np.array([3])), alone, streamed.row(3))
    for one in some:
        np.testing.assert_allclose(one.usage.tokens_out, tokens[3:], rtol=1e-4)
        np.testing.assert_allclose(one.usage.seconds, seconds[3:], rtol=1e-4)
        np.testing.assert_array_equal(one.usage.tokens_in, [len(PROMPTS[3])])
    empty = knowing.coefficients([]).usage
    assert (empty.tokens_out.shape, empty.tokens_in.shape) == ((0, 5), (0,))
    assert knowing.width == knowing.head.width + PER_PROMPT


def test_rows_that_were_fitted_are_the_fits(rng):
    """float32 rows in a checkpoint say what the fit says; the shared row predicts the mean of the models' mean lengths."""
    hidden = rng.normal(0, 1, (300, 12)) * np.geomspace(3, 0.1, 12)
    pattern = rng.normal(0, 0.15, 12)
    mean = np.exp(hidden @ pattern)[:, None] * [30.0, 100.0, 500.0]
    fitted = fit_lengths(hidden, mean * rng.gamma(4, 0.25, mean.shape), ["a", "b", "c"])
    head = LengthHead(("c", "new", "a", "b"), fitted.rows())
    found = head(torch.from_numpy(hidden.astype(np.float32))).numpy()
    np.testing.assert_allclose(found[:, [2, 3, 0]], fitted.expected(hidden), rtol=1e-4)
    assert found[:, 1].mean() == pytest.approx(mean.mean(), rel=0.15)
    assert np.corrcoef(np.log(found[:, 1]), hidden @ pattern)[0, 1] > 0.9


def test_bounds_of_one_number_are_a_constant():
    one = torch.ones(1)
    rows = LengthRows((), torch.ones(1, 4) * 1e9, one, one * 7, one * 7)
    np.testing.assert_allclose(LengthHead(("a",), rows)(torch.randn(5, 4)), 7, rtol=1e-6)
