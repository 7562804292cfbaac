"""Expected lengths on real answers, against each model's mean: python -m bench.lengths.

    python -m bench.lengths --csv bench/results/lengths.csv

Prompts of ../shared/data/scores/medical_mcq_2025.parquet with answers of all its models: completion tokens, latency, prices and
whether the answer was right. Hidden states are those of builtin/llmrouter-9, kept in the user's cache.

Errors: of the predicted mean and of each model's mean, by cross-validation over prompts, with 95% intervals over prompts, as
``p2l-engine lengths`` prints them; of all models, and of those that write 100 tokens or more on average.

Money: on each of --splits halves of the prompts, lengths, means and a ridge regression of the scores are learned; the others
are routed by the predicted scores under a budget, once with costs that depend on the prompt and once with each model's mean
cost, whose input and output tokens are those of the first half's answers; over the batch also with the budget divided by
``routing.overspending`` of the first half, each half of which is predicted from the other (``factor``). A row says, of a budget
and of these costs: what was really spent over the limit (1: all of it, on average over the splits), how far from 1 that was on
average, and the share of right answers; the gain in this share over the mean costs'. In brackets, and as low and high: what 95%
of the splits lie between. ``prompt``: the budget holds for each prompt's expected cost; ``batch``: for their mean.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.linear_model import RidgeCV

from bench.setting import positive, run, setting
from p2l_engine import routing
from p2l_engine.backbone.lengths import LengthHead
from p2l_engine.engine import Engine
from p2l_engine.learning.answers import LoggedAnswers
from p2l_engine.learning.hidden import cache_folder, hidden_states
from p2l_engine.learning.length_report import LengthReport, fitted, length_report
from p2l_engine.reports import Figure
from p2l_engine.tables.whole import read_table

Float64 = npt.NDArray[np.float64]
Float32 = npt.NDArray[np.float32]
Row = tuple[str, str, str, str, str, float, float, float, int]  # HEADER without the setting

DATA = Path("../shared/data/scores/medical_mcq_2025.parquet")
LONGEST = 1_500  # characters of a prompt, which 95% of them have at most
LONG = 100.0  # tokens that a model writes on average, to be called long
BUDGETS = (0.0003, 0.0006, 0.0012)  # USD a prompt
SCOPES = ("prompt", "batch")
HEADER = ("what", "scope", "budget", "costs", "figure", "value", "low", "high", "prompts", "setting")


@dataclass(frozen=True)
class Matrix:
    """P prompts and the M models that all answered and have prices: hidden [P, D]; tokens_in [P], the checkpoint's; tokens_out,
    score and paid [P, M], in USD; prices [2, M], of a token."""

    models: tuple[str, ...]
    hidden: Float32
    tokens_in: Float64
    tokens_out: Float64
    score: Float64
    paid: Float64
    prices: Float64


def errors(hidden: Float32, answers: LoggedAnswers, bootstrap: int) -> Iterable[tuple[str, LengthReport]]:
    """Reports of tokens and seconds; and of the tokens of models that write much."""
    tokens = answers.observed("tokens")
    yield "all models", length_report("tokens", hidden, tokens, bootstrap)
    mean = np.bincount(tokens.a, tokens.outcome) / np.maximum(np.bincount(tokens.a), 1)
    long = [name for name, each in zip(tokens.models, mean, strict=False) if each >= LONG]
    yield f"{len(long)} models of {LONG:g} tokens or more", length_report("tokens", hidden, tokens.among(long), bootstrap)
    yield "all models", length_report("seconds", hidden, answers.observed("seconds"), bootstrap)


def costs_of(
    data: Matrix, answers: LoggedAnswers, known: npt.NDArray[np.intp], new: npt.NDArray[np.intp]
) -> dict[str, Float64]:
    """Expected costs [n, M] of the prompts ``new``, learned from those that are ``known``."""
    observed = answers.without(set(range(len(data.hidden))) - set(known.tolist())).observed("tokens")
    head = LengthHead(data.models, fitted(data.hidden[np.sort(known)], observed).rows())
    tokens_out = head(torch.from_numpy(data.hidden[new])).double().numpy()
    per_in, per_out = data.prices
    return {
        "each prompt's": data.tokens_in[new, None] * per_in + tokens_out * per_out,
        "each model's mean": np.tile(data.paid[known].mean(0), (len(new), 1)),
    }


def predicted(
    data: Matrix, answers: LoggedAnswers, known: npt.NDArray[np.intp], new: npt.NDArray[np.intp]
) -> tuple[Float64, dict[str, Float64]]:
    """Scores [n, M] and expected costs of the prompts ``new``, learned from those that are ``known``."""
    ridge = RidgeCV(np.logspace(1, 5, 9)).fit(data.hidden[known], data.score[known])
    return np.ascontiguousarray(ridge.predict(data.hidden[new]), np.float64), costs_of(data, answers, known, new)


def spent(data: Matrix, answers: LoggedAnswers, splits: int, seed: int) -> dict[tuple[str, float, str], dict[str, Float64]]:
    """Of each scope, budget and kind of costs: figures [splits]."""
    found: dict[tuple[str, float, str], dict[str, list[float]]] = {}
    for split in track(range(splits), "splits"):
        order = np.random.default_rng([seed, split]).permutation(len(data.hidden))
        known, new = np.sort(order[: len(order) // 2]), order[len(order) // 2 :]
        halves = np.array_split(np.random.default_rng([seed, split]).permutation(known), 2)
        crossed = [predicted(data, answers, half, other) for half, other in (halves, halves[::-1])]
        values, paid = np.concatenate([each for each, _ in crossed]), data.paid[np.concatenate(halves[::-1])]
        value, every = predicted(data, answers, known, new)
        for costs, expected in every.items():
            others = np.concatenate([of[costs] for _, of in crossed])
            factor = {budget: routing.overspending(values, others, paid, budget) for budget in BUDGETS}
            for scope, name in (("prompt", costs), ("batch", costs), ("batch", f"{costs}, factor")):
                for budget in BUDGETS:
                    # A prompt whose cheapest model costs more than the budget gets that model.
                    limit = np.maximum(budget, expected.min(1)) if scope == "prompt" else budget
                    if name != costs:
                        limit = max(budget / factor[budget], float(expected.min(1).mean()) * (1 + 1e-9))
                    chosen = routing.solve(routing.Problem(value, expected, limit, "prompt" if scope == "prompt" else "batch"))
                    real, right = (
                        float((chosen.probabilities * np.take_along_axis(of[new], chosen.indices, 1)).sum(1).mean())
                        for of in (data.paid, data.score)
                    )
                    of = found.setdefault((scope, budget, name), {"spent": [], "away": [], "right": []})
                    of["spent"].append(real / budget)
                    of["away"].append(abs(real - float(chosen.cost.mean())) / budget)
                    of["right"].append(right)
    figures = {key: {name: np.array(values) for name, values in each.items()} for key, each in found.items()}
    for (scope, budget, costs), figure in figures.items():
        if costs != "each model's mean":
            figure["gain"] = figure["right"] - figures[scope, budget, "each model's mean"]["right"]
    return figures


def rows_of(
    reports: Iterable[tuple[str, LengthReport]], figures: Mapping[tuple[str, float, str], Mapping[str, Float64]], prompts: int
) -> list[Row]:
    """The rows of HEADER but the setting."""

    def row(what: str, scope: str, budget: str, costs: str, figure: str, of: Figure, count: int) -> Row:
        return what, scope, budget, costs, figure, of.value, of.low, of.high, count

    found = []
    for which, report in reports:
        for costs, each in (("each model's mean", report.before), ("each prompt's", report.after), ("gain", report.gain)):
            found += [row(report.quantity, which, "", costs, name, of, report.prompts) for name, of in each.items()]
    for (scope, budget, costs), of in figures.items():
        for name, values in of.items():
            low, high = np.quantile(values, [0.025, 0.975]).tolist()
            found.append(row("money", scope, f"{budget:g}", costs, name, Figure(float(values.mean()), low, high), prompts))
    return found


def read(count: int, seed: int) -> tuple[LoggedAnswers, Matrix, LoggedAnswers]:
    """``count`` prompts with all answers, by chance; the matrix of models with prices, and their answers alone."""
    names = ("prompt", "model", "completion_tokens", "latency_s", "prompt_tokens", "score", "usd_per_m_in", "usd_per_m_out")
    table = read_table(DATA, names)
    columns = [table.columns[name] for name in names]
    short = sorted({prompt for prompt in columns[0] if len(prompt) <= LONGEST})
    chosen = [short[i] for i in np.random.default_rng(seed).permutation(len(short))[:count]]
    models = sorted(set(columns[1]))
    place, index = {prompt: i for i, prompt in enumerate(chosen)}, {name: k for k, name in enumerate(models)}
    values = np.full((6, len(chosen), len(models)), np.nan)
    for prompt, model, *numbers in zip(*columns, strict=True):
        if prompt in place:
            values[:, place[prompt], index[model]] = [np.nan if number is None else number for number in numbers]
    complete = ~np.isnan(values[:4]).any(axis=(0, 2))
    values, chosen = values[:, complete], [prompt for prompt, whole in zip(chosen, complete, strict=True) if whole]
    tokens, seconds, tokens_in, score, usd_in, usd_out = values
    priced = np.flatnonzero(~np.isnan(usd_in).any(0))
    turns = tuple(tuple(json.loads(prompt)) for prompt in chosen)
    engine = Engine.from_pretrained("builtin/llmrouter-9")
    hidden = hidden_states(engine, [list(each) for each in turns], cache_folder())
    around = len(engine.encoder.encode(["a"])[0]) - 1
    own = np.array([len(ids) - around for ids in engine.encoder.encode([list(each) for each in turns])], np.float64)

    def answers(which: npt.NDArray[np.intp]) -> LoggedAnswers:
        p, m = len(turns), len(which)
        of = [values[:, which].ravel() for values in (tokens, seconds)]
        return LoggedAnswers(turns, tuple(models[k] for k in which), np.repeat(np.arange(p), m), np.tile(np.arange(m), p), *of)

    prices = np.stack([usd_in[0, priced], usd_out[0, priced]]) / 1e6
    paid = tokens_in[:, priced] * prices[0] + tokens[:, priced] * prices[1]
    matrix = Matrix(answers(priced).models, hidden, own, tokens[:, priced], score[:, priced], paid, prices)
    return answers(np.arange(len(models))), matrix, answers(priced)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=positive, default=1_200)
    parser.add_argument("--splits", type=positive, default=20)
    parser.add_argument("--bootstrap", type=positive, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--csv", type=Path, help="also write the rows here")
    arguments = parser.parse_args()
    answers, matrix, priced = read(arguments.prompts, arguments.seed)
    figures = spent(matrix, priced, arguments.splits, arguments.seed)
    rows = rows_of(errors(matrix.hidden, answers, arguments.bootstrap), figures, len(matrix.hidden))
    table = Table(*HEADER[:6], box=None)
    for row in rows:
        table.add_row(*row[:5], f"{row[5]:.4g} ({row[6]:.4g} to {row[7]:.4g})")
    Console().print(table)
    if arguments.csv is not None:
        write(rows, arguments.csv)


def write(rows: Iterable[Row], path: Path) -> None:
    """As CSV."""
    where = setting(torch.device("cpu"))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(HEADER)
        for row in rows:
            writer.writerow([f"{value:.6g}" if isinstance(value, float) else value for value in row] + [where])


if __name__ == "__main__":
    run(main)
