"""Whether a log can judge a policy: does it hold enough of the choices that the policy would make?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from p2l_engine.bootstrap import effective, student
from p2l_engine.replay.estimators import Int64, freedom, standard_error
from p2l_engine.replay.mixture import Float64, Mixture

MASS = 0.01  # share of the policy's choices that may be of models that the log (almost) never chose there
EFFECTIVE = 30.0  # effective rows at least
CLUSTERS = 10.0  # effective prompts and sessions at least
HEAVIEST = 0.05  # of all weight, what one row may carry: more, and the log chose that model there almost never
ERRORS = 4.0  # standard errors that the mean weight may be away from what it should be, where there are many rows
SURELY = math.erf(ERRORS / math.sqrt(2))  # the probability of being nearer


@dataclass(frozen=True, slots=True)
class Support:
    """taken: the mean probability of the logged choices under the policy. effective: (sum w)^2 / sum w^2 of the weights of rows
    with a reward. heaviest: the largest share of all weight that one of them has. largest: the largest weight. mean_weight:
    over all rows. unsupported: models that the log (almost) never chose where the policy would: their share of its choices."""

    taken: float
    effective: float
    heaviest: float
    largest: float
    mean_weight: float
    unsupported: Mapping[str, float]
    reasons: tuple[str, ...]
    warnings: tuple[str, ...]


def judge(
    target: Mixture,
    weight: Float64,
    probability: Float64,
    judged: npt.NDArray[np.bool_],
    chosen: npt.NDArray[np.int32],
    logged: Mixture | None,
    known: npt.NDArray[np.bool_],
    names: Sequence[str],
    clusters: Sequence[Int64],
) -> Support:
    """weight, probability [N]: of the logged choices, the latter under the target. judged [N]: rows with a reward. chosen [N].
    logged: the logging policy, where known [N] says that it is that of the draw. clusters: of all rows."""
    of = weight[judged]
    lacking = _unsupported(target, chosen, logged, known, len(names), HEAVIEST * len(of))
    missing = {names[k]: float(lacking[k]) for k in np.argsort(-lacking, kind="stable") if lacking[k] > 0}
    share = float(lacking.sum())
    total = float(of.sum())
    size, heaviest = (effective(of), float(of.max() / total)) if total > 0 else (0.0, 0.0)
    mean = float(weight.mean())
    reasons = []
    if share > MASS:
        some = ", ".join(f"{name} ({part:.1%})" for name, part in list(missing.items())[:5])
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        reasons.append(
            f"{share:.1%} of its choices are of models that the log never chose on those rows, or so rarely that one such row "
            f"would carry more than {HEAVIEST:.0%} of all weight: {some}{more}; log with exploration, or leave them out "
            "(models)"
        )
    elif (away := _away(weight, 1 - share, 1.0, clusters)) is not None:
        reasons.append(
            f"the weights' mean is {mean:.3g} where 1 is expected, {away}: the propensities are not those of the "
            "draws, or the log (almost) never chose models that the policy needs"
        )
    few = min((effective(np.bincount(labels[judged], of)) for labels in clusters), default=math.inf) if total > 0 else math.inf
    if few < CLUSTERS:
        reasons.append(
            f"the rows with feedback are of {few:.1f} effective prompts or sessions, expected {CLUSTERS:g} at least: rows of "
            "one may depend on each other, so that no interval could be trusted"
        )
    if size < EFFECTIVE:
        reasons.append(
            f"effective sample size {size:.1f} of {len(of):,} rows with feedback, expected {EFFECTIVE:g} at least: the log "
            f"chose too rarely as the policy would ({_most(target, weight, chosen, names)})"
        )
    elif heaviest > HEAVIEST and not (logged is not None and known.all()):  # else what could be drawn has been looked at
        worst = names[int(chosen[judged][int(of.argmax())])]
        reasons.append(
            f"one row of {worst} carries {heaviest:.0%} of all weight (its own is {float(of.max()):.3g}), expected at most "
            f"{HEAVIEST:.0%}"
        )
    warnings = []
    if not reasons and (uneven := depends_on_choice(weight, judged, clusters)) is not None:
        warnings.append(f"{uneven}: whether feedback came depends on the model, and the value may be wrong by that")
    largest = float(of.max(initial=0.0))
    return Support(float(probability.mean()), size, heaviest, largest, mean, missing, tuple(reasons), tuple(warnings))


def depends_on_choice(weight: Float64, known: npt.NDArray[np.bool_], clusters: Sequence[Int64]) -> str | None:
    """Whether it depends on the choice on which rows something is known [N]: then the weights' mean differs among them."""
    if known.all() or not known.any():
        return None
    of, mean = weight[known], float(weight.mean())
    away = _away(of, mean, mean, [labels[known] for labels in clusters])
    return (
        None if away is None else f"among those rows the weights' mean is {float(of.mean()):.3g}, among all {mean:.3g}, {away}"
    )


def _unsupported(
    target: Mixture,
    chosen: npt.NDArray[np.int32],
    logged: Mixture | None,
    known: npt.NDArray[np.bool_],
    models: int,
    most: float,
) -> Float64:
    """The share of the target's choices, by model [U], that the log (almost) never chose there: those of weights above ``most``
    by the logging policy where it is known, which depends on no draw; elsewhere those of models that were chosen nowhere."""
    ever = np.bincount(chosen, minlength=models) > 0
    lacks = ~ever[target.indices]
    if logged is not None:
        lacks = np.where(known[:, None], target.probabilities > most * logged.of(target.indices), lacks)
    weights = np.where(lacks, target.probabilities, 0.0)
    return np.bincount(target.indices.ravel(), weights.ravel(), models) / max(len(target), 1)


def _away(weight: Float64, low: float, high: float, clusters: Sequence[Int64]) -> str | None:
    """By how many standard errors the weights' mean is below ``low`` or above ``high``, if that is too many: by Student's
    distribution, since few clusters say little about the error."""
    mean = float(weight.mean())
    relabelled = [np.unique(labels, return_inverse=True)[1] for labels in clusters]
    known = freedom(np.ones(len(weight)), relabelled)
    if known < CLUSTERS - 1:  # which is refused for itself
        return None
    error = standard_error(weight - mean, relabelled)
    beyond = max(low - mean, mean - high)
    if beyond <= MASS + float(student(SURELY, known)) * error:
        return None
    return f"{beyond / error:.1f} standard errors away" if error > 0 else "in every row"


def _most(target: Mixture, weight: Float64, chosen: npt.NDArray[np.int32], names: Sequence[str]) -> str:
    """What the target chooses most, and how many rows of it the log has."""
    shares = target.shares(len(names))
    k = int(shares.argmax())
    return (
        f"{names[k]} is {shares[k]:.0%} of its choices, and was chosen on {int((chosen == k).sum()):,} of {len(chosen):,} rows"
    )
