"""Win rates of the prompts that were asked for lately, kept like their coefficients."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from p2l_engine.chooser import Chooser
from p2l_engine.coefficients import Coefficients
from p2l_engine.routing import Objective

Float64 = npt.NDArray[np.float64]


class WinRates:
    """choosers: of a plan's models, by objective; columns: their indices among its K models; kept: prompts remembered."""

    def __init__(self, choosers: Mapping[Objective, Chooser], columns: npt.NDArray[np.intp], models: int, kept: int) -> None:
        self._choosers, self._columns, self._models, self._kept = choosers, columns, models, kept
        self._known: OrderedDict[tuple[str, Objective], tuple[Coefficients, Float64]] = OrderedDict()

    def of(self, prompt: str, coefficients: Coefficients, objective: Objective) -> Float64:
        """The win rates [K] of one prompt, 0 for models that the checkpoint does not know; they may not be changed.

        prompt: a hash of it.
        """
        found = self._known.get((prompt, objective))
        if found is not None and found[0] is coefficients:  # computed anew, they may differ in the last digits
            self._known.move_to_end((prompt, objective))
            return found[1]
        rates = np.zeros(self._models)
        rates[self._columns] = self._choosers[objective].win_rates(coefficients)[0]
        rates.setflags(write=False)
        self._known[prompt, objective] = coefficients, rates
        while len(self._known) > self._kept:
            self._known.popitem(last=False)
        return rates
