"""make demo: a dozen very different real prompts, routed by the default checkpoint without and with a budget."""

from __future__ import annotations

import argparse
import time

from rich.console import Console
from rich.markup import escape
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
BUDGET = 0.0005
TOP = 10


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.demo", description=__doc__)
    parser.add_argument("--checkpoint", help="folder or name of a checkpoint with a catalog.yaml")
    parser.add_argument("--budget", type=float, default=BUDGET, help="mean cost allowed, in the catalog's unit")
    arguments = parser.parse_args()
    console, start, budget = Console(), time.perf_counter(), arguments.budget
    with console.status("loading the default checkpoint (the first time it is converted: half a minute)"):
        engine = Engine.from_pretrained(arguments.checkpoint)
        catalog = Catalog.from_yaml(engine.folder / "catalog.yaml")
    router = Router(engine, catalog)
    free = router.route_batch(PROMPTS)
    bounded = router.route_batch(PROMPTS, budget=budget)
    table = Table(title=f"The best model for each prompt; below it the best mix at {budget:g}", title_justify="left", box=None)
    table.add_column("prompt", min_width=20)
    table.add_column("choice", no_wrap=True)
    table.add_column("win rate", justify="right")
    for prompt, best, mixed in zip(PROMPTS, free, bounded, strict=True):
        text = prompt if isinstance(prompt, str) else " / ".join(prompt)
        mix = "\n".join(f"{p:4.0%} {name}" for name, p in mixed.policy.items())
        rates = f"{best.win_rate:.1%}\n{mixed.win_rate:.1%}"
        table.add_row(escape(text), f"     {best.model}\n{mix}", rates)
        table.add_row()
    console.print(table)
    for name, decisions in (("no budget", free), (f"budget {budget:g}", bounded)):
        cost = sum(d.expected_cost for d in decisions) / len(decisions)
        rate = sum(d.win_rate for d in decisions) / len(decisions)
        console.print(f"{name}: mean expected cost {cost:.3g} {catalog.unit}, mean win rate {rate:.1%}")
    board = Leaderboard.of(engine.coefficients([PROMPTS[3]]))
    console.print(f"\nThe leaderboard's top of {len(engine.models)} models for: {PROMPTS[3]}")
    for place in list(board)[:TOP]:
        console.print(f"{place.rank:3}  {place.coefficient:7.2f}  {place.win_rate:6.1%}  {place.model}", highlight=False)
    console.print(f"\n{time.perf_counter() - start:.1f} s from start to end", style="dim")


if __name__ == "__main__":
    main()
