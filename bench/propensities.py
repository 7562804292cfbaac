"""CPU time of a decision that explores among many models, beside one that does not.

OMP_NUM_THREADS=1 python -m bench.propensities
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np

from bench.setting import positive
from p2l_engine.catalog import Catalog, CatalogModel
from p2l_engine.chooser import Chooser
from p2l_engine.coefficients import Coefficients
from p2l_engine.constraints import Constraints
from p2l_engine.feedback import feedback_model
from p2l_engine.routing import BudgetPacer, Objective


def microseconds(work: Callable[[], object], repeats: int) -> float:
    """CPU time of one call, the least of five runs."""
    work()
    found = []
    for _ in range(5):
        began = time.process_time()
        for _ in range(repeats):
            work()
        found.append((time.process_time() - began) / repeats)
    return 1e6 * min(found)


def measured(models: int, objective: Objective, repeats: int) -> dict[str, float]:
    """By bound, µs for a decision among so many models, whose strength rises with their cost; all of them are uncertain."""
    rng = np.random.default_rng(0)
    costs = np.exp(rng.normal(size=models))
    theta = rng.normal(size=(1, models)) + 0.5 * np.log(costs)
    deviation = np.abs(rng.normal(0.3, 0.1, (1, models)))
    names, feedback = tuple(f"model-{i}" for i in range(models)), feedback_model("grk")
    believed = Coefficients(
        theta.astype(np.float32), np.array([0.3], np.float32), names, feedback, deviation.astype(np.float32)
    )
    catalog = Catalog(tuple(CatalogModel(name, float(cost)) for name, cost in zip(names, costs, strict=True)))
    explorer = Chooser(names, feedback, catalog, objective=objective, explore="thompson")
    certain, pacer = Chooser(names, feedback, catalog, objective=objective), BudgetPacer(1.0)
    prompt, bound = [["hello"]], Constraints(1.0)
    return {
        "no budget": microseconds(lambda: explorer.decide(believed, prompt), repeats),
        "budget": microseconds(lambda: explorer.decide(believed, prompt, bound), repeats),
        "pacer": microseconds(lambda: explorer.pace(believed, pacer, ["hello"]), repeats),
        "budget, not exploring": microseconds(lambda: certain.decide(believed, prompt, bound), repeats),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=positive, nargs="+", default=[9, 130])
    parser.add_argument("--repeats", type=positive, default=50)
    given = parser.parse_args()
    objectives: tuple[Objective, ...] = ("bt", "half-ties")
    for models in given.models:
        for objective in objectives:
            found = measured(models, objective, given.repeats)
            print(f"{models} models, {objective}: " + ", ".join(f"{name} {value:.0f}" for name, value in found.items()) + " µs")


if __name__ == "__main__":
    main()
