"""Everything that can be said of a checkpoint on held-out votes, as one nested mapping."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import kendalltau, spearmanr

from p2l_engine.checkpoint import fingerprint
from p2l_engine.coefficients import Coefficients
from p2l_engine.engine import Engine
from p2l_engine.evaluation import clusters, features, predictors, routed, strengths
from p2l_engine.evaluation.categories import rows_by_category
from p2l_engine.evaluation.growth import growth
from p2l_engine.leaderboard import Leaderboard
from p2l_engine.prompts.parse import Prompt, user_turns
from p2l_engine.votes import Votes
from p2l_engine.votes.marginal import category_fits, marginal_fit, marginal_leaderboard

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Scores:
    """True scores of every model on the held-out prompts [N, M] and on the training prompts [T, M], in the checkpoint's order
    of models; costs [M] and their unit, or None."""

    held_out: Float64
    training: Float64
    costs: Float64 | None = None
    unit: str = ""

    def budgets(self, count: int = 8) -> list[float]:
        """Mean costs worth asking for: between the cheapest and the dearest model's, evenly in their logarithms."""
        if self.costs is None:
            return []
        low, high = np.log(max(self.costs.min(), 1e-12) * 1.1), np.log(max(self.costs.max(), 1e-12))
        return [float(f"{budget:.3g}") for budget in np.exp(np.linspace(low, high, count))]


@dataclass(frozen=True, slots=True)
class Asked:
    """What to compute beside the figures on votes. budgets: mean costs (None: some are chosen); reference: the model of the
    strengths table (None: the aggregated leaderboard's middle one); shown: the models in that table (None: all); replacements:
    (old, new) pairs; probes: scores [N, M] that other predictors give; cluster: take the categories that are found among the
    prompts' hidden states, not their own."""

    bootstrap: int = 200
    seed: int = 0
    budgets: Sequence[float] | None = None
    reference: str | None = None
    shown: Sequence[str] | None = None
    replacements: Sequence[tuple[str, str]] = ()
    probes: dict[str, Float64] | None = None
    cluster: bool = False


def evaluate(
    engine: Engine,
    held_out: Votes,
    training: Votes | None = None,
    scores: Scores | None = None,
    asked: Asked | None = None,
    advance: Callable[[int], object] | None = None,
) -> dict[str, Any]:
    """Every figure that the data allow. Raises ValueError where the checkpoint's models are not those of the votes."""
    asked = asked or Asked()
    for name, votes in (("held-out", held_out), ("training", training)):
        if votes is not None and votes.models != engine.models:
            raise ValueError(f"{name} votes: expected the checkpoint's models {list(engine.models)}, got {list(votes.models)}")
    c, found = _read(engine, held_out.prompts, asked, advance)
    report = _head(engine, asked) | {"held_out": {"prompts": len(held_out.prompts), "votes": len(held_out)}}
    if found is not None:
        held_out, report["clusters"] = replace(held_out, category=tuple(found)), found
    if training is not None:
        report["training"] = {"prompts": len(training.prompts), "votes": len(training)}
    if engine.feedback.of_values:
        report["value_figures"] = predictors.value_figures(c, training, held_out, asked.bootstrap, asked.seed)
        return report | {"leaderboards": leaderboards(c, held_out.category, None, asked)}
    marginal = None if training is None else marginal_fit(engine.feedback, training)
    fits = None
    known = None if training is None or found is not None else training.category  # clusters are none of its categories
    if marginal is not None and training is not None and known is not None and held_out.category is not None:
        fits = category_fits(engine.feedback, training, marginal)
    of = predictors.predictions(c, marginal, held_out, fits)
    report["votes"] = predictors.compare(of, held_out, asked.bootstrap, asked.seed)
    report["leaderboards"] = leaderboards(c, held_out.category, None, asked)
    report["leaderboards"] |= marginal_beside(report["leaderboards"]["aggregated"], c, held_out, asked)
    report["growth"] = growth(c, held_out, training, seed=asked.seed)
    report |= _by_category(c, held_out.category, None, _middle(report["leaderboards"]["aggregated"]), asked)
    if scores is not None:
        report["routing"] = routing(c, held_out, training, scores, asked)
    return report


def survey(
    engine: Engine,
    prompts: Sequence[Prompt],
    categories: Sequence[str] | None = None,
    weights: npt.ArrayLike | None = None,
    asked: Asked | None = None,
    advance: Callable[[int], object] | None = None,
) -> dict[str, Any]:
    """What can be said of prompts without votes (the paper's 3.4): the leaderboard over them, and by category [N] that of
    each, strengths, choices and replacements. weights [N] >= 0: of the prompts."""
    asked = asked or Asked()
    if engine.feedback.of_values:
        raise ValueError(f"checkpoint: expected a feedback model that compares models, got {engine.feedback.name!r}")
    c, found = _read(engine, prompts, asked, advance)
    report = _head(engine, asked) | {"prompts": len(prompts), "weighted": weights is not None}
    if found is not None:
        categories = report["clusters"] = found
    report["leaderboards"] = leaderboards(c, categories, weights, asked)
    return report | _by_category(c, categories, weights, _middle(report["leaderboards"]["aggregated"]), asked)


def _read(
    engine: Engine, prompts: Sequence[Prompt], asked: Asked, advance: Callable[[int], object] | None
) -> tuple[Coefficients, list[str] | None]:
    """The prompts' coefficients, and where they were asked for the categories that were found."""
    if not asked.cluster:
        return engine.coefficients(prompts, advance), None
    hidden, c = features.hidden_states(engine, prompts, advance)
    return c, clusters.cluster(hidden, [" ".join(user_turns(prompt)) for prompt in prompts])


def _head(engine: Engine, asked: Asked) -> dict[str, Any]:
    checkpoint = {
        "models": list(engine.models),
        "feedback": engine.feedback.name,
        "dtype": _plain(engine.dtype),
        "head": fingerprint.of_head(engine.head),
    }
    return {"checkpoint": checkpoint, "bootstrap": asked.bootstrap}


def _by_category(
    c: Coefficients, categories: Sequence[str] | None, weights: npt.ArrayLike | None, middle: str, asked: Asked
) -> dict[str, Any]:
    report: dict[str, Any] = {}
    size, seed = asked.bootstrap, asked.seed
    if categories is not None:
        reference = asked.reference or middle
        report["strengths"] = strengths.by_category(c, categories, reference, size, seed, weights, asked.shown)
        report["choices"] = routed.distribution(c.theta.argmax(1), len(c.models), categories, weights)
    report["replacements"] = [
        strengths.replacement(c, categories, old, new, size, seed, weights) for old, new in asked.replacements
    ]
    return report


def leaderboards(
    c: Coefficients, categories: Sequence[str] | None, weights: npt.ArrayLike | None, asked: Asked
) -> dict[str, Any]:
    """The aggregated leaderboard of the prompts, with intervals, and of each category of them, without."""
    report: dict[str, Any] = {"aggregated": _places(Leaderboard.over(c, weights, bootstrap=asked.bootstrap, seed=asked.seed))}
    if categories is not None:
        report["categories"] = {
            name: _places(Leaderboard.over(c.rows(rows), None if weights is None else np.asarray(weights)[rows]))
            for name, rows in rows_by_category(categories, len(c), weights).items()
        }
    return report


def marginal_beside(aggregated: list[dict[str, Any]], c: Coefficients, votes: Votes, asked: Asked) -> dict[str, Any]:
    """The marginal leaderboard of the prompts' votes, with intervals, and how well its order agrees with the aggregated one's
    (Spearman's and Kendall's rank correlations)."""
    counted = marginal_leaderboard(c.feedback, votes, asked.bootstrap, asked.seed)
    of = {place["model"]: place["coefficient"] for place in aggregated}
    x, y = [of[model] for model in c.models], counted.coefficients(c.models)
    return {
        "marginal": _places(counted),
        "spearman": _number(spearmanr(x, y).statistic) if len(x) > 2 else None,
        "kendall": _number(kendalltau(x, y).statistic),
    }


def routing(c: Coefficients, held_out: Votes, training: Votes | None, scores: Scores, asked: Asked) -> dict[str, Any]:
    """Table 1 and Figure 11."""
    from p2l_engine import routing as stages

    theta = c.theta.astype(np.float64)
    known_tasks = None if training is None else training.category
    chosen = routed.choices(theta, scores.training, known_tasks, held_out.category)
    for name, predicted in (asked.probes or {}).items():
        chosen[name] = predicted.argmax(1)
    report: dict[str, Any] = routed.table(chosen, scores.held_out, c.models, held_out.category)
    if scores.costs is None:
        return report
    v = stages.win_rates(theta, np.full(len(c.models), 1 / len(c.models)))
    budgets = scores.budgets() if asked.budgets is None else asked.budgets
    report["budgets"] = {
        "unit": scores.unit,
        "rows": routed.under_budgets(v, scores.held_out, scores.training, scores.costs, budgets, c.models, held_out.category),
    }
    for name, predicted in (asked.probes or {}).items():
        rows = routed.under_budgets(predicted, scores.held_out, scores.training, scores.costs, budgets, c.models)
        for row, of_probe in zip(report["budgets"]["rows"], rows, strict=True):
            row[name] = of_probe["batch"]
    return report


def probes(
    base: str, config: dict[str, Any], training: Votes, held_out: Votes, scores: Scores, advance: Callable[[int], object] | None
) -> dict[str, Float64]:
    """What ridge regression, neighbours and a perceptron on the untrained backbone's features predict; see ``features``."""
    engine = Engine(features.frozen(base, config))
    engine.encoder.max_tokens = config.get("max_length") or engine.encoder.max_tokens
    known, asked = (
        features.hidden_states(engine, votes.prompts, advance)[0].astype(np.float64) for votes in (training, held_out)
    )
    return features.probes(known, scores.training, asked)


def _places(board: Leaderboard) -> list[dict[str, Any]]:
    return [
        {"rank": p.rank, "model": p.model, "coefficient": p.coefficient, "win_rate": p.win_rate, "low": p.low, "high": p.high}
        for p in board
    ]


def _number(value: float) -> float | None:
    """None where there is none, as for the rank correlation of equal coefficients."""
    return float(value) if np.isfinite(value) else None


def _middle(places: list[dict[str, Any]]) -> str:
    return str(places[len(places) // 2]["model"])


def _plain(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")
