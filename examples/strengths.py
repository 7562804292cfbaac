"""What each model is good at, by category of your prompts. Needs no votes, and the extra train."""

from p2l_engine import Engine
from p2l_engine.evaluation import strengths

PROMPTS = {
    "arithmetic": ["What is 17 * 23?", "What is 15% of 80?", "Find the roots of x^2 - 5x + 6.", "Convert 3/8 to a decimal."],
    "facts": ["Who wrote Dracula?", "What is the capital of Australia?", "When did Rome fall?", "Which planet is largest?"],
}
categories = [category for category, prompts in PROMPTS.items() for _ in prompts]
engine = Engine.from_pretrained()
coefficients = engine.coefficients([prompt for prompts in PROMPTS.values() for prompt in prompts])
found = strengths.by_category(coefficients, categories, reference="gpt-4o")
for category, entry in found.categories.items():
    best = sorted(entry.win_rate.items(), key=lambda item: -item[1].value)[:5]
    rates = ", ".join(f"{model} {rate.value:.0%}" for model, rate in best)
    print(f"{category} ({entry.prompts} prompts), the highest win rates against {found.reference}: {rates}")
