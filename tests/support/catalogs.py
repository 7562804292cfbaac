"""A catalog of the tiny checkpoint's models, and when two decisions count as the same."""

from __future__ import annotations

import pytest

from p2l_engine import Catalog
from p2l_engine.catalog import CatalogModel
from tests.support.tiny import MODELS

COSTS = [1.0, 2.0, 3.0, 4.0, 5.0]


def catalog(names=MODELS, costs=COSTS):
    return Catalog(tuple(CatalogModel(n, c) for n, c in zip(names, costs, strict=True)))


def same(one, other):
    assert (one.model, set(one.policy)) == (other.model, set(other.policy))
    for name in one.policy:
        assert one.policy[name] == pytest.approx(other.policy[name], abs=1e-4)
    for field in ("expected_cost", "win_rate", "score"):
        assert getattr(one, field) == pytest.approx(getattr(other, field), abs=1e-4)
