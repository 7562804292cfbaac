"""What requests are expected to take at each model of a catalog: money, output tokens, seconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from p2l_engine.catalog import Catalog
from p2l_engine.coefficients import Coefficients
from p2l_engine.decision import Decision
from p2l_engine.routing.arrays import Float64
from p2l_engine.routing.problem import expected


class ExpectedCosts:
    """Of the K models of a catalog, whose own costs are ``given`` [K]. columns [K]: where they are among the M models of the
    coefficients.

    Where the checkpoint has learned how long answers are, and the catalog has prices for tokens: the prompt's tokens at the
    price of input, and the expected output tokens at that of output. What the catalog says is the cost of models without such
    prices, and of those without observed answers.
    """

    def __init__(self, catalog: Catalog, columns: npt.NDArray[np.intp]) -> None:
        self.given, self._columns = catalog.costs, columns
        self._per_in, self._per_out = catalog.prices

    def costs(self, coefficients: Coefficients) -> Float64:
        """[K] where all prompts cost the same, or [N, K], in the catalog's unit."""
        usage = coefficients.usage
        if usage is None:
            return self.given
        own = ~np.isnan(self._per_in) & usage.observed[self._columns]
        if not own.any():
            return self.given
        tokens_in, tokens_out = usage.tokens_in[:, None].astype(np.float64), usage.tokens_out[:, self._columns]
        return np.where(own, tokens_in * self._per_in + tokens_out * self._per_out, self.given)

    def costs_of_one(self, coefficients: Coefficients) -> Float64:
        """[K]: of the one prompt of these coefficients."""
        costs = self.costs(coefficients)
        return costs if costs.ndim == 1 else costs[0]

    def seconds(self, coefficients: Coefficients) -> Float64:
        """[N, K]. Raises ValueError where the checkpoint has not learned it."""
        if coefficients.usage is None or coefficients.usage.seconds is None:
            raise ValueError(
                "coefficients: expected those of a checkpoint that has learned how long answers take, got one without seconds; "
                "'p2l-engine lengths' learns them from a log with latencies"
            )
        return coefficients.usage.seconds[:, self._columns].astype(np.float64)

    def usage(
        self, coefficients: Coefficients, indices: npt.NDArray[np.int32], probabilities: Float64
    ) -> tuple[Float64 | None, Float64 | None]:
        """The output tokens and seconds [N] that policies over the K models take, None where unknown."""
        usage = coefficients.usage
        known = (None, None) if usage is None else (usage.tokens_out, usage.seconds)
        tokens, seconds = (None if of is None else expected(of[:, self._columns], indices, probabilities) for of in known)
        return tokens, seconds

    def on(
        self,
        decisions: Sequence[Decision],
        coefficients: Coefficients,
        indices: npt.NDArray[np.int32],
        probabilities: Float64,
    ) -> list[Decision]:
        """The decisions of these policies, which say what is expected."""
        tokens, seconds = self.usage(coefficients, indices, probabilities)
        columns = ([None] * len(decisions) if of is None else of.tolist() for of in (tokens, seconds))
        rows = zip(decisions, *columns, strict=True)
        return [replace(decision, expected_tokens=tokens, expected_seconds=seconds) for decision, tokens, seconds in rows]
