"""Budgets, shares and a second resource on arrays: no checkpoint needed."""

import numpy as np

from p2l_engine import routing
from p2l_engine.routing import Infeasible, Problem, Resource, Share, solve

rng = np.random.default_rng(0)
theta = rng.normal(size=(2000, 5)) + np.array([0.0, 0.3, 0.6, 0.9, 1.2])  # coefficients [prompts, models]
costs = np.array([0.1, 0.2, 0.4, 0.8, 1.6])
seconds = np.array([0.5, 1.0, 1.0, 2.0, 4.0])
v = routing.win_rates(theta, np.full(5, 0.2))

each = routing.solve_budget(v, costs, budget=0.4)
batch = routing.solve_batch_budget(v, costs, budget=0.4)
print(f"mean win rate: {each.value.mean():.4f} with 0.4 for each prompt, {batch.value.mean():.4f} with a mean of 0.4")

problem = Problem(
    v,
    costs,
    budget=0.4,
    budget_scope="batch",
    resources=[Resource("seconds", seconds, bound=1.2, scope="batch")],
    shares=[Share(4, at_most=0.05), Share(0, at_least=0.1)],
)
solution = solve(problem)
print(f"{solution.value.mean():.4f} with more limits; solved by {solution.solver}: {solution.why}")
print("dual prices:", {name: round(float(price), 4) for name, price in solution.prices.items()})

try:
    solve(Problem(v, costs, budget=0.15, budget_scope="batch", shares=[Share(4, at_least=0.2)]))
except Infeasible as error:
    print(error)
