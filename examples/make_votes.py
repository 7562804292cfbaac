"""Makes examples/votes.jsonl: three models, of which one is good at sums, one at poems, and one at neither."""

import json
import random
from pathlib import Path

random.seed(0)
target = Path(__file__).parent / "votes.jsonl"
with target.open("w", encoding="utf-8") as file:
    for i in range(80):
        a, b = random.randint(10, 99), random.randint(10, 99)
        if i % 2:
            prompt, good, bad = f"What is the sum of {a} and {b}?", "calculator", "poet"
        else:
            prompt, good, bad = f"Write a poem about the number {a}, in {b % 7 + 2} lines.", "poet", "calculator"
        votes = [(good, bad, "model_a"), (bad, "novice", "tie (bothbad)"), ("novice", good, "model_b")]
        for model_a, model_b, winner in votes:
            file.write(json.dumps({"prompt": prompt, "model_a": model_a, "model_b": model_b, "winner": winner}) + "\n")
print(f"wrote {target}")
