"""One prompt, then a batch under one budget, with the default checkpoint."""

from p2l_engine import Catalog, Engine, InfeasibleBudget, Leaderboard, Router

engine = Engine.from_pretrained()
catalog = Catalog.from_yaml(engine.folder / "catalog.yaml")
router = Router(engine, catalog, seed=0)

decision = router.route("Prove that the square root of 2 is irrational.", budget=0.0005)
print(f"{decision.model}: {decision.why}")

prompts = ["What is 17 * 23?", "Write a haiku about rain.", ["Name a river.", "And one in Africa?"]]
for prompt, decision in zip(prompts, router.route_batch(prompts, budget=0.0005, budget_scope="batch"), strict=True):
    print(f"{decision.model:35} {decision.expected_cost:.5f} {catalog.unit}  {prompt}")

for entry in list(Leaderboard.of(engine.coefficients(["Write a haiku about rain."])))[:3]:
    print(entry.rank, entry.model, f"{entry.coefficient:.2f}")

try:
    router.route("What is 17 * 23?", budget=0.00001)
except InfeasibleBudget as error:
    print(f"the smallest feasible budget is {error.smallest}")
