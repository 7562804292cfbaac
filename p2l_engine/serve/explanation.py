"""A decision as JSON: what was chosen, why, and what every other model would have cost."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from p2l_engine import routing
from p2l_engine.serve.call import Call


def decision(call: Call) -> dict[str, Any]:
    """The decision as JSON."""
    first, names = call.first, call.plan.names
    assert first is not None, "decide() comes first"
    score = call.bradley_terry_score(first)
    found = {
        "id": call.id,
        "model": names[first.model],
        "fallbacks": call.fallbacks(),
        "policy": {names[k]: p for k, p in first.policy.items()},
        "propensity": first.propensity,
        "propensity_error": first.propensity_error,
        "expected_cost": first.cost,
        "win_rate": first.rate,
        "score": score if score is not None and math.isfinite(score) else None,
        "why": call.why(first),
        "tokens_in": call.bill.tokens_in(first.model),
        "unit": call.plan.config.unit,
    }
    if call.coefficients is not None and call.coefficients.kept is not None:
        found["kept"] = float(call.coefficients.kept[0])
    return found | (_explained(call) if call.options.explain else {})


def _explained(call: Call) -> dict[str, Any]:
    """Every model of the catalog, and the frontier of this prompt."""
    names, theta = call.plan.names, call.coefficients
    columns = {int(k): names[k] for k in call.plan.columns}
    coefficient = {}
    if theta is not None:
        coefficient = {k: float(theta.theta[0, theta.models.index(name)]) for k, name in columns.items()}
    rows = [
        {
            "model": name,
            "win_rate": float(call.rates[k]) if k in columns else None,
            "expected_cost": float(call.costs[k]),
            "tokens_cached": call.cached[k],
            "tokens_out": float(call.tokens_out[k]),
            "coefficient": coefficient.get(k),
            "allowed": bool(call.mask[k]),
            "why_not": call.reasons.get(name),
        }
        for k, name in enumerate(names)
    ]
    rows.sort(key=lambda row: -1.0 if row["win_rate"] is None else row["win_rate"], reverse=True)
    return {"candidates": rows, "frontier": _frontier(call)}


def _frontier(call: Call) -> list[dict[str, Any]]:
    """The best policies of this prompt at every budget: models at the vertices, mixes of two neighbours between them."""
    models = np.flatnonzero(call.mask)
    curve = routing.frontier(call.rates[None, models], call.costs[models])
    found = []
    for cost, rate in zip(curve.cost.tolist(), curve.value.tolist(), strict=True):
        k = int(models[np.argmin(np.abs(call.costs[models] - cost) + np.abs(call.rates[models] - rate))])
        found.append({"model": call.plan.names[k], "cost": float(call.costs[k]), "win_rate": float(call.rates[k])})
    return found
