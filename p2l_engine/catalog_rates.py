"""Win rates of a catalog's models against opponents over all models of a checkpoint, and the scores of policies over them."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from p2l_engine.feedback import FeedbackModel
from p2l_engine.native import routing as native
from p2l_engine.routing import Objective, Policies, arrays
from p2l_engine.routing.arrays import Float64
from p2l_engine.routing.problem import expected
from p2l_engine.routing.values import compute, contending

Eta = npt.NDArray[np.float32] | None


class CatalogRates:
    """q [M]: the opponents' weights over the checkpoint's models. columns [K]: where the catalog's models are among them.
    objective: what is maximised, as in ``routing.win_rates``. Arguments of the methods: theta [N, M] float64, and eta [N] or
    [1] (for all), None where the feedback model has none."""

    def __init__(self, q: Float64, columns: npt.NDArray[np.intp], objective: Objective, feedback: FeedbackModel) -> None:
        self.q, self.columns, self.objective, self.feedback = q, columns, objective, feedback

    def of(self, theta: Float64, eta: Eta) -> Float64:
        """What is maximised, [N, K]."""
        return compute(theta, self.q, self.objective, _ties(eta, len(theta)), self.feedback.name)[:, self.columns]

    def contending(self, theta: Float64, eta: Eta, usable: npt.NDArray[np.intp], costs: Float64) -> Float64:
        """``of``, but 0 for models beside the ``usable`` ones, and for those that no policy with one bound on these costs [K],
        and no price of them, would choose: a cheaper one is better."""
        ties, models = _ties(eta, len(theta)), self.columns[usable]
        own = contending(theta, self.q, self.objective, ties, self.feedback.name, models, costs[usable])
        if len(usable) == len(self.columns):
            return own
        found = np.zeros((len(theta), len(self.columns)))
        found[:, usable] = own
        return found

    def scores(self, theta: Float64, policies: Policies, v: Float64) -> Float64:
        """The Bradley-Terry score [N] of each prompt's policy; v: ``of`` the same theta."""
        return self._score(theta, v, policies.indices, policies.probabilities, policies.value)

    def score_of_model(self, theta: Float64, v: Float64, k: int) -> float:
        """The Bradley-Terry score of the catalog's model k on one prompt; v [1, K]: ``of`` the same theta [1, M]."""
        return float(self._score(theta, v, np.array([[k]]), np.ones((1, 1)))[0])

    def _score(self, theta: Float64, v: Float64, indices: Any, probabilities: Float64, value: Float64 | None = None) -> Float64:
        """Of policies, by their Bradley-Terry win rates; value [N]: what they are worth by the objective, where it is known."""
        if self.objective != "bt" or value is None:
            rates = v if self.objective == "bt" else native.win_rates(theta, self.q)[:, self.columns]
            value = expected(rates, indices, probabilities)
        return native.bt_score(theta, self.q, np.asarray(value.clip(0.0, 1.0)))


def _ties(eta: Eta, n: int) -> Float64 | None:
    return None if eta is None else np.array(np.broadcast_to(arrays.to_float64("eta", eta), n))
