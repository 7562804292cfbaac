"""make demo: a dozen very different real prompts, routed by the default checkpoint without and with a budget."""

from __future__ import annotations

import time

from rich.console import Console
from rich.table import Table

from p2l_engine import Catalog, Engine, Leaderboard, Router

PROMPTS = [
    "What is the capital of Australia?",
    "A train leaves at 9:40 and arrives at 13:05. How many minutes does the journey take?",
    "Prove that the square root of 2 is irrational.",
    "Write a Python function that returns the longest palindromic substring of a string.",
    "Schreibe ein kurzes Gedicht über den Herbst in Hamburg.",
    "Who sang 'It Takes Two' with Marvin Gaye?",
    "Find the roots of $x^3 - 6x^2 + 11x - 6$.",
    "Write one sentence that uses the words: dog, frisbee, catch, park, sunset.",
    "Which of these conducts electricity best? A. rubber B. copper C. glass D. wood",
    "请用三句话解释什么是通货膨胀。",
    "Explain the measurement problem in quantum mechanics to a physicist.",
    ["I have flour, eggs and milk. What can I cook?", "And without an oven?"],
]
BUDGET = 0.3


def main() -> None:
    console, start = Console(), time.perf_counter()
    with console.status("loading the default checkpoint (the first time it is converted: half a minute)"):
        engine = Engine.from_pretrained()
        catalog = Catalog.from_yaml(engine.folder / "catalog.yaml")
    router = Router(engine, catalog)
    free = router.route_batch(PROMPTS)
    bounded = router.route_batch(PROMPTS, budget=BUDGET)
    table = Table(title="The best model for each prompt, and the best mix for a budget", title_justify="left", show_lines=True)
    table.add_column("prompt", max_width=44)
    table.add_column("no budget")
    table.add_column("win rate", justify="right")
    table.add_column(f"expected cost <= {BUDGET}")
    table.add_column("win rate", justify="right")
    for prompt, best, mixed in zip(PROMPTS, free, bounded, strict=True):
        policy = "\n".join(f"{p:4.0%} {name}" for name, p in mixed.policy.items())
        text = prompt if isinstance(prompt, str) else " / ".join(prompt)
        table.add_row(text.replace("[", "\\["), best.model, f"{best.win_rate:.1%}", policy, f"{mixed.win_rate:.1%}")
    console.print(table)
    for name, decisions in (("no budget", free), (f"budget {BUDGET}", bounded)):
        cost = sum(d.expected_cost for d in decisions) / len(decisions)
        rate = sum(d.win_rate for d in decisions) / len(decisions)
        console.print(f"{name}: mean expected cost {cost:.3f} {catalog.unit}, mean win rate {rate:.1%}")
    board = Leaderboard.of(engine.coefficients([PROMPTS[3]]))
    console.print(f"\nThe leaderboard of: {PROMPTS[3]}")
    for place in board:
        console.print(f"{place.rank:3}  {place.coefficient:7.2f}  {place.win_rate:6.1%}  {place.model}", highlight=False)
    console.print(f"\n{time.perf_counter() - start:.1f} s from start to end", style="dim")


if __name__ == "__main__":
    main()
