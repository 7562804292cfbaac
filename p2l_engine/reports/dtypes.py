"""What a dtype costs in quality, beside float32, and how much of that is acceptable."""

from __future__ import annotations

from dataclasses import dataclass, field

from p2l_engine.jsonable import NULL

LOG_LOSS = 0.003  # nats a vote that a dtype may lose
POINTS = 0.3  # hundredths of a true score
OTHER_CHOICE = 0.03  # share of prompts whose chosen model may be another one, or else ...
WIN_RATE = 0.5  # ... points of win rate that the other choices may cost
LEAST_PROMPTS = 100  # on fewer, no other choice at all would not show that there are less than OTHER_CHOICE


@dataclass(frozen=True, slots=True)
class DtypeFigures:
    """A dtype on held-out prompts; float32 on the same prompts is what it is compared with.

    deviation, largest: of theta, root mean square and largest; where a shift of all of a prompt's coefficients means nothing,
    it does not count. log_loss: mean of a vote, or of a value, None without votes. mean_score: mean true score of the chosen
    models, None without true scores. other_choice: the share of prompts whose chosen model is not float32's. win_rate_lost,
    most_lost: what that costs against all models, in points, by float32's win rates: mean over all prompts, and largest. These
    three are None for models of values (ols, poisson), which compare no models.
    """

    dtype: str
    prompts: int
    deviation: float
    largest: float
    log_loss: float | None = field(metadata=NULL)
    mean_score: float | None = field(metadata=NULL)
    other_choice: float | None = field(metadata=NULL)
    win_rate_lost: float | None = field(metadata=NULL)
    most_lost: float | None = field(metadata=NULL)


def too_much(figures: DtypeFigures, exact: DtypeFigures) -> tuple[str, ...]:
    """What of a dtype's loss is not acceptable, in words; none: all of it is. exact: the figures of float32.

    The limits are one-sided: where a dtype scores higher than float32, by chance, it has lost nothing.
    """
    found = []
    if figures.prompts < LEAST_PROMPTS:
        found.append(f"{figures.prompts} prompts, at least {LEAST_PROMPTS} would be needed")
    if figures.log_loss is None or exact.log_loss is None:
        found.append("its log-loss is not known")
    elif not (loss := figures.log_loss - exact.log_loss) <= LOG_LOSS:
        found.append(f"log-loss {loss:+.4f}, acceptable {LOG_LOSS:+}")
    if figures.mean_score is not None and exact.mean_score is not None:
        points = 100 * (figures.mean_score - exact.mean_score)
        if not points >= -POINTS:
            found.append(f"routed score {points:+.2f} points, acceptable {-POINTS:+}")
    choice, lost = figures.other_choice, figures.win_rate_lost
    if choice is not None and lost is not None and not (choice <= OTHER_CHOICE or lost <= WIN_RATE):
        limits = f"acceptable {OTHER_CHOICE:.0%} or {WIN_RATE} points"
        found.append(f"another model on {choice:.1%} of prompts, which costs {lost:.2f} points of win rate, {limits}")
    return tuple(found)
