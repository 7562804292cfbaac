"""The plot of replay: every judged policy has a point and a name that can be read."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2l_engine.replay.plot import LONGEST, drawn
from p2l_engine.replay.report import PolicyReplay, ReplayReport
from p2l_engine.reports import Figure


def report(points):
    """Policies by name, with (cost, value)."""
    found = [
        PolicyReplay(name, "judged", {"dr": Figure(v, v - 0.02, v + 0.02)}, {"dr": Figure(c, 0.9 * c, 1.1 * c)})
        for name, (c, v) in points.items()
    ]
    return ReplayReport(100, 90, 90, 90, 100, "score", 0.95, tuple(found))


def names(drawing):
    drawing.draw_without_rendering()
    (axes,) = drawing.axes
    return {text.get_text(): text.get_window_extent() for text in axes.texts if text.get_text()}


NAMES = st.text("abcdefghij ._$", min_size=1, max_size=60).filter(str.strip)
PLACES = st.tuples(st.floats(1e-4, 1e-2), st.floats(0.4, 0.8)) | st.just((0.005, 0.6))


@pytest.mark.slow
@settings(max_examples=5)
@given(st.dictionaries(NAMES, PLACES, min_size=1, max_size=12))
def test_names_cover_no_other_name(points):
    shown = names(drawn(report(points)))
    assert set(shown) == {name if len(name) <= LONGEST else name[: LONGEST - 1] + "…" for name in points}
    for one, other in combinations(shown.values(), 2):
        assert not one.padded(-1).overlaps(other.padded(-1))


@pytest.mark.slow
def test_names_of_a_few_near_policies_stay_at_their_points():
    points = {"as it was": (0.003, 0.71), "tighter": (0.002, 0.705), "on average": (0.00205, 0.708), "small": (0.00195, 0.703)}
    drawing = drawn(report(points))
    shown = names(drawing)
    for name, place in points.items():
        x, y = drawing.axes[0].transData.transform(place)
        box = shown[name].padded(8)
        assert box.x0 <= x <= box.x1
        assert box.y0 <= y <= box.y1


@pytest.mark.slow
def test_what_has_no_cost_or_was_refused_is_named_above():
    of = [PolicyReplay("x", "refused", reasons=("why",)), PolicyReplay("y", "judged", {"dr": Figure(0.5, 0.4, 0.6)})]
    drawing = drawn(ReplayReport(100, 90, 0, 0, 100, "score", 0.95, tuple(of)))
    assert drawing.get_suptitle().endswith("not drawn: x (refused), y (cost unknown)")
    assert not names(drawing)


@pytest.mark.slow
def test_costs_of_different_kinds_are_not_compared():
    def policy(name, unit, cost=None):
        spent = {} if cost is None else {"dr": Figure(cost, cost, cost)}
        return PolicyReplay(name, "judged", {"dr": Figure(0.5, 0.4, 0.6)}, spent, 1.0, unit=unit)

    def drawing(*policies):
        return drawn(ReplayReport(100, 90, 0, 0, 100, "score", 0.95, policies))

    mixed = drawing(policy("x", "USD per request", 0.5), policy("y", "USD per request"))
    assert (list(names(mixed)), mixed.axes[0].get_xlabel()) == (["x"], "mean cost of a decision")
    expected = drawing(policy("x", "USD per request"), policy("y", "cents"), policy("z", "USD per request"))
    assert list(names(expected)) == ["x", "z"]
    assert expected.axes[0].get_xlabel() == "mean expected cost of a decision, USD per request"
    assert "not drawn: y (cost unknown)" in expected.get_suptitle()
