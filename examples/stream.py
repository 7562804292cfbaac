"""A mean budget over a stream of prompts that are seen one by one."""

import tempfile
from pathlib import Path

import numpy as np

from p2l_engine import routing

rng = np.random.default_rng(0)
costs, q = np.array([0.1, 0.2, 0.4, 0.8, 1.6]), np.full(5, 0.2)
strength = np.array([0.0, 0.3, 0.6, 0.9, 1.2])
yesterday = routing.win_rates(rng.normal(size=(3000, 5)) + strength, q)
today = routing.win_rates(rng.normal(size=(3000, 5)) + 1.2 * strength, q)  # the traffic has changed

pacer = routing.BudgetPacer.learned(yesterday, costs, budget=0.4)
won = [v[pacer.choose(v, costs)] for v in today]
print(f"mean cost {pacer.mean_cost:.3f} of 0.4, mean win rate {np.mean(won):.4f}")
print(f"in hindsight, at best: {routing.solve_batch_budget(today, costs, budget=0.4).value.mean():.4f}")

state = Path(tempfile.mkdtemp()) / "pacer.json"
pacer.save(state)  # before the service stops
print(f"{routing.BudgetPacer.load(state).count} prompts so far")
