"""Computes the reports: ``evaluate`` on held-out votes, ``survey`` on prompts without votes. See ``p2l_engine.reports``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import kendalltau, spearmanr

from p2l_engine import routing
from p2l_engine.checkpoint import fingerprint
from p2l_engine.coefficients import Coefficients
from p2l_engine.engine import Engine
from p2l_engine.evaluation import clusters, dtypes, features, predictors, routed, strengths
from p2l_engine.evaluation.categories import rows_by_category
from p2l_engine.evaluation.features import Advance
from p2l_engine.evaluation.growth import growth
from p2l_engine.leaderboard import Fit, Leaderboard
from p2l_engine.prompts.parse import Prompt, user_turns
from p2l_engine.reports import (
    Budgets,
    Counts,
    Evaluation,
    Leaderboards,
    Replacement,
    RoutingFigures,
    Strengths,
    Subject,
    Survey,
)
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
        """Mean costs from the cheapest model's to the most expensive one's, at equal ratios."""
        if self.costs is None:
            return []
        low, high = np.log(max(self.costs.min(), 1e-12) * 1.1), np.log(max(self.costs.max(), 1e-12))
        return [float(f"{budget:.3g}") for budget in np.exp(np.linspace(low, high, count))]


@dataclass(frozen=True, slots=True)
class ReportOptions:
    """bootstrap: samples for each interval; seed: of the bootstrap and of random prompts; budgets: mean costs of the routing
    table (None: ``Scores.budgets``); reference: the model that strengths are measured against (None: the middle one of the
    aggregated leaderboard); shown: models whose strengths are measured (None: all); replacements: (old, new) pairs; probes:
    scores [N, M] that other predictors give; cluster: find categories by clustering the prompts' hidden states."""

    bootstrap: int = 200
    seed: int = 0
    budgets: Sequence[float] | None = None
    reference: str | None = None
    shown: Sequence[str] | None = None
    replacements: Sequence[tuple[str, str]] = ()
    probes: Mapping[str, Float64] | None = None
    cluster: bool = False


def evaluate(
    engine: Engine,
    held_out: Votes,
    training: Votes | None = None,
    scores: Scores | None = None,
    options: ReportOptions | None = None,
    advance: Advance | None = None,
    others: Iterable[Engine] = (),
) -> Evaluation:
    """Every figure that the data allow. ``advance`` is called with the number of prompts of each forward pass. others: engines
    of the same checkpoint in other dtypes, to be compared with float32, which is one of theirs or ``engine``'s. Raises
    ValueError where the votes' models are not the checkpoint's, and where there are others but none in float32."""
    options = options or ReportOptions()
    for name, votes in (("held-out", held_out), ("training", training)):
        if votes is not None and votes.models != engine.models:
            raise ValueError(f"{name} votes: expected the checkpoint's models {list(engine.models)}, got {list(votes.models)}")
    c, found = _coefficients(engine, held_out.prompts, options, advance)
    if found is not None:
        held_out = replace(held_out, category=found)
    boards = leaderboards(c, held_out.category, None, options)
    report = Evaluation(
        checkpoint=_subject(engine),
        bootstrap=options.bootstrap,
        clusters=found,
        leaderboards=boards,
        held_out=Counts(len(held_out.prompts), len(held_out)),
        training=None if training is None else Counts(len(training.prompts), len(training)),
        dtypes=dtypes.figures(engine, c, others, held_out, None if scores is None else scores.held_out, advance),
    )
    if engine.feedback.of_values:
        return replace(report, value_figures=predictors.value_figures(c, training, held_out, options.bootstrap, options.seed))
    marginal = None if training is None else marginal_fit(engine.feedback, training)
    fits = None if found is not None else _category_fits(engine, held_out, training, marginal)
    of = predictors.predictions(c, marginal, held_out, fits)
    return replace(
        report,
        votes=predictors.compare(of, held_out, options.bootstrap, options.seed),
        leaderboards=with_marginal(boards, c, held_out, options),
        growth=growth(c, held_out, training, seed=options.seed),
        strengths=_strengths(c, held_out.category, None, boards.middle, options),
        choices=_choices(c, held_out.category, None),
        replacements=_replacements(c, held_out.category, None, options),
        routing=None if scores is None else routing_figures(c, held_out, training, scores, options),
    )


def survey(
    engine: Engine,
    prompts: Sequence[Prompt],
    categories: Sequence[str] | None = None,
    weights: npt.ArrayLike | None = None,
    options: ReportOptions | None = None,
    advance: Advance | None = None,
) -> Survey:
    """All figures that need no votes (the paper's 3.4): leaderboards over the prompts, strengths, choices and replacements; by
    category where there are categories [N]. weights [N] >= 0: of the prompts. Raises ValueError for ols and poisson models."""
    options = options or ReportOptions()
    if engine.feedback.of_values:
        raise ValueError(f"checkpoint: expected a feedback model that compares models, got {engine.feedback.name!r}")
    c, found = _coefficients(engine, prompts, options, advance)
    categories = categories if found is None else found
    boards = leaderboards(c, categories, weights, options)
    return Survey(
        checkpoint=_subject(engine),
        bootstrap=options.bootstrap,
        clusters=found,
        leaderboards=boards,
        strengths=_strengths(c, categories, weights, boards.middle, options),
        choices=_choices(c, categories, weights),
        replacements=_replacements(c, categories, weights, options),
        prompts=len(prompts),
        weighted=weights is not None,
    )


def _coefficients(
    engine: Engine, prompts: Sequence[Prompt], options: ReportOptions, advance: Advance | None
) -> tuple[Coefficients, tuple[str, ...] | None]:
    """The prompts' coefficients and, with ``options.cluster``, each prompt's cluster."""
    if not options.cluster:
        return engine.coefficients(prompts, advance), None
    hidden, c = features.hidden_states(engine, prompts, advance)
    return c, tuple(clusters.cluster(hidden, [" ".join(user_turns(prompt)) for prompt in prompts]))


def _subject(engine: Engine) -> Subject:
    dtype = str(engine.dtype).removeprefix("torch.")
    return Subject(tuple(engine.models), engine.feedback.name, dtype, fingerprint.of_head(engine.head))


def _category_fits(engine: Engine, held_out: Votes, training: Votes | None, marginal: Fit | None) -> dict[str, Fit] | None:
    if training is None or marginal is None or training.category is None or held_out.category is None:
        return None
    return category_fits(engine.feedback, training, marginal)


def _strengths(
    c: Coefficients, categories: Sequence[str] | None, weights: npt.ArrayLike | None, middle: str, options: ReportOptions
) -> Strengths | None:
    if categories is None:
        return None
    reference = options.reference or middle
    return strengths.by_category(c, categories, reference, options.bootstrap, options.seed, weights, options.shown)


def _choices(
    c: Coefficients, categories: Sequence[str] | None, weights: npt.ArrayLike | None
) -> dict[str, tuple[float, ...]] | None:
    if categories is None:
        return None
    return routed.distribution(c.theta.argmax(1), len(c.models), categories, weights)


def _replacements(
    c: Coefficients, categories: Sequence[str] | None, weights: npt.ArrayLike | None, options: ReportOptions
) -> tuple[Replacement, ...]:
    return tuple(
        strengths.replacement(c, categories, old, new, options.bootstrap, options.seed, weights)
        for old, new in options.replacements
    )


def leaderboards(
    c: Coefficients, categories: Sequence[str] | None, weights: npt.ArrayLike | None, options: ReportOptions
) -> Leaderboards:
    """The aggregated leaderboard with intervals, and by category, without, where there are categories [N]."""
    aggregated = Leaderboard.over(c, weights, bootstrap=options.bootstrap, seed=options.seed).standings
    if categories is None:
        return Leaderboards(aggregated)
    weight = None if weights is None else np.asarray(weights, np.float64)
    by_category = {
        name: Leaderboard.over(c.rows(rows), None if weight is None else weight[rows]).standings
        for name, rows in rows_by_category(categories, len(c), weights).items()
    }
    return Leaderboards(aggregated, by_category)


def with_marginal(boards: Leaderboards, c: Coefficients, votes: Votes, options: ReportOptions) -> Leaderboards:
    """With the marginal leaderboard of the prompts' votes, and how well its order agrees with the aggregated one's."""
    counted = marginal_leaderboard(c.feedback, votes, options.bootstrap, options.seed)
    of = {standing.model: standing.coefficient for standing in boards.aggregated}
    x, y = [of[model] for model in c.models], counted.coefficients(c.models)
    return replace(
        boards,
        marginal=counted.standings,
        spearman=_finite(spearmanr(x, y).statistic) if len(x) > 2 else None,
        kendall=_finite(kendalltau(x, y).statistic),
    )


def routing_figures(
    c: Coefficients, held_out: Votes, training: Votes | None, scores: Scores, options: ReportOptions
) -> RoutingFigures:
    """Table 1 and Figure 11."""
    theta = c.theta.astype(np.float64)
    known_tasks = None if training is None else training.category
    chosen = routed.choices(theta, scores.training, known_tasks, held_out.category)
    probed = options.probes or {}
    chosen |= {name: predicted.argmax(1) for name, predicted in probed.items()}
    found = routed.table(chosen, scores.held_out, c.models, held_out.category)
    if scores.costs is None:
        return found
    v = routing.win_rates(theta, np.full(len(c.models), 1 / len(c.models)))
    budgets = scores.budgets() if options.budgets is None else options.budgets
    shared = (scores.held_out, scores.training, scores.costs, budgets, c.models)
    rows = list(routed.under_budgets(v, *shared, held_out.category))
    for name, predicted in probed.items():
        of_probe = routed.under_budgets(predicted, *shared)
        rows = [
            replace(row, routers={**row.routers, name: other.routers["batch"]})
            for row, other in zip(rows, of_probe, strict=True)
        ]
    return replace(found, budgets=Budgets(scores.unit, tuple(rows)))


def probes(
    base: str, config: Mapping[str, Any], training: Votes, held_out: Votes, scores: Scores, advance: Advance | None
) -> dict[str, Float64]:
    """Scores [N, M] that ridge regression, nearest neighbours and a perceptron predict from the untrained backbone's features
    (see ``features.probes``). base: the backbone; config: the keys of the training config, whose max_length is kept."""
    engine = Engine(features.frozen(base, config), max_tokens=config.get("max_length") or None)
    known, new = (
        features.hidden_states(engine, votes.prompts, advance)[0].astype(np.float64) for votes in (training, held_out)
    )
    return features.probes(known, scores.training, new)


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
