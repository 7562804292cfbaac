"""The package's public names, and what importing them loads."""

from __future__ import annotations

import subprocess
import sys

import pytest

import p2l_engine


@pytest.mark.parametrize("name", p2l_engine.__all__)
def test_every_public_name_resolves(name):
    assert getattr(p2l_engine, name) is not None
    assert name in dir(p2l_engine)


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="module 'p2l_engine' has no attribute 'Rooter'"):
        _ = p2l_engine.Rooter


@pytest.mark.slow
def test_routing_loads_neither_torch_nor_transformers():
    code = """
import sys
from p2l_engine import Catalog, Chooser, Coefficients, Constraints, Decision, FeedbackModel, Prompt, SolverError, routing
import numpy as np
v = routing.win_rates(np.zeros((2, 3)), np.full(3, 1 / 3))
p = routing.solve_budget(v, np.ones(3), 1.0)
routing.bt_score(np.zeros((2, 3)), np.full(3, 1 / 3), p.value)
routing.win_rates(np.zeros((2, 3)), np.full(3, 1 / 3), "not-bad")
assert not {"torch", "transformers", "highspy", "yaml", "scipy"} & set(sys.modules), sorted(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
