"""How many prompts a model needs before its scores can be predicted: python -m bench.prompts_needed POOL.parquet [--csv FILE].

Of each source of a pool (``p2l_engine.train.sources``), a model's score less the mean of all models on the prompt is predicted
from N random prompts, by their mean and by ridge regression on word features (TF-IDF, 128 components; its penalty chosen by
five-fold cross-validation), on a fifth of the prompts that is the same for all N. The gain is the share of the mean's squared
error that the regression removes; below 0 it predicts worse than the mean. Means over models and draws, with their standard
error.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from bench.pooled import read_pool
from bench.setting import run as run_main
from bench.simple_routers import Float64

SIZES = (50, 100, 200, 350, 500, 800, 1500, 3000)
PENALTIES = (30.0, 100.0, 300.0, 1e3, 3e3, 1e4, 1e9)
FOLDS, COMPONENTS, LEAST = 5, 128, 1000  # LEAST: prompts of a source that is measured


@dataclass(frozen=True, slots=True)
class Row:
    """Gain in percent of the mean's squared error, and its standard error, from ``prompts`` of each of ``models``."""

    source: str
    prompts: int
    models: int
    gain: float
    error: float


def word_features(prompts: Sequence[Sequence[str]]) -> Float64:
    """[N, D] with variance 1, from the first 3,000 characters of each."""
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer

    words = TfidfVectorizer(max_features=20_000, sublinear_tf=True, ngram_range=(1, 2), min_df=5)
    counts = words.fit_transform(["\n".join(turns)[:3000] for turns in prompts])
    found = TruncatedSVD(COMPONENTS, random_state=0).fit_transform(counts)
    return np.asarray(found / found.std(0))


def ridge(x: Float64, y: Float64, penalties: Sequence[float]) -> list[tuple[Float64, float]]:
    """Weights and intercept for each penalty. x [N, D], y [N]."""
    centre, mean = x.mean(0), float(y.mean())
    values, vectors = np.linalg.eigh((x - centre).T @ (x - centre))
    moment = vectors.T @ ((x - centre).T @ (y - mean))
    weights = [vectors @ (moment / (values + penalty)) for penalty in penalties]
    return [(weight, mean - float(centre @ weight)) for weight in weights]


def fitted(x: Float64, y: Float64) -> tuple[Float64, float]:
    """Weights and intercept, with the penalty that predicts best in cross-validation."""
    fold, errors = np.arange(len(x)) % FOLDS, np.zeros(len(PENALTIES))
    for k in range(FOLDS):
        for i, (weight, intercept) in enumerate(ridge(x[fold != k], y[fold != k], PENALTIES)):
            errors[i] += ((x[fold == k] @ weight + intercept - y[fold == k]) ** 2).sum()
    return ridge(x, y, [PENALTIES[int(errors.argmin())]])[0]


def measured(source: str, x: Float64, scores: Float64, sizes: Sequence[int], draws: int) -> list[Row]:
    """The rows of one source. x [N, D], scores [N, M], NaN where there is none."""
    rng, rows = np.random.default_rng(0), []
    relative = scores - np.nanmean(scores, 1, keepdims=True)
    tested = np.arange(len(x)) % 5 == 0
    for size in sizes:
        gains, base, models = [], [], 0
        for m in range(scores.shape[1]):
            known = np.isfinite(relative[:, m])
            learned, new = np.flatnonzero(known & ~tested), np.flatnonzero(known & tested)
            if len(learned) < size:
                continue
            models += 1
            for _ in range(draws):
                some = rng.permutation(learned)[:size]
                weight, intercept = fitted(x[some], relative[some, m])
                by_mean = ((relative[some, m].mean() - relative[new, m]) ** 2).mean()
                gains.append(by_mean - ((x[new] @ weight + intercept - relative[new, m]) ** 2).mean())
                base.append(by_mean)
        if len(gains) > 1:
            scale = 100 / np.mean(base)
            error = np.std(gains, ddof=1) / np.sqrt(len(gains))
            rows.append(Row(source, size, models, float(scale * np.mean(gains)), float(scale * error)))
    return rows


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pool", type=Path, help="a table of p2l_engine.train.sources")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="numbers of prompts")
    parser.add_argument("--draws", type=int, default=3, help="of prompts, for each model and number")
    parser.add_argument("--csv", type=Path, help="also write the rows here")
    args = parser.parse_args()
    console, pool = Console(), read_pool(args.pool)
    x = word_features(pool.prompts)
    rows: list[Row] = []
    for source in np.unique(pool.source).tolist():
        of = pool.source == source
        if of.sum() >= LEAST:
            scores = pool.scores[of]
            rows += measured(source, x[of], scores[:, np.isfinite(scores).any(0)], args.sizes, args.draws)
    table = Table(
        "source", *(f"{size:,}" for size in args.sizes), title="Gain over a model's mean, % of its squared error (s.e.)"
    )
    for source in dict.fromkeys(row.source for row in rows):
        found = {row.prompts: f"{row.gain:.1f} ({row.error:.1f})" for row in rows if row.source == source}
        table.add_row(source, *(found.get(size, "") for size in args.sizes))
    console.print(table)
    if args.csv:
        with args.csv.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(asdict(rows[0])))
            writer.writeheader()
            writer.writerows({**asdict(row), "gain": f"{row.gain:.3f}", "error": f"{row.error:.3f}"} for row in rows)


if __name__ == "__main__":
    run_main(main)
