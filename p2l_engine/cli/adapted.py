"""What p2l-engine adapt writes and prints once rows of the head were learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from p2l_engine.cli.terminal import note, out, status

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from p2l_engine.backbone.uncertainty import Uncertainty
    from p2l_engine.checkpoint import Checkpoint
    from p2l_engine.learning.adapt import Adapted
    from p2l_engine.votes import Votes


def note_written(uncertainty: Uncertainty | None, target: Path) -> None:
    if uncertainty is not None:
        rank = uncertainty.factors.shape[1]
        note(
            f"posterior of {len(uncertainty.models)} models: {2 * rank * (rank + 1):,} bytes for each, and "
            f"{4 * uncertainty.basis.numel():,} for all"
        )
    note(f"wrote {target}")


def write_learned(loaded: Checkpoint, target: Path, state: Path, drop: list[str]) -> None:
    """What a service has learned, as a checkpoint."""
    from p2l_engine.learning import write
    from p2l_engine.learning.learner import FILE, Learner

    path = state / FILE if state.is_dir() else state
    if not path.is_file():
        raise typer.BadParameter(f"{path}: no such file", param_hint="--learned")
    learner = Learner.load(path, loaded.head, loaded.feedback, loaded.uncertainty)
    if learner.pending:
        with status("finding the optimum over all votes"):
            learner.refine()
    head, uncertainty = learner.head()
    new = learner.models[len(loaded.models) :]
    last = [learner.notes.get("number", 0), learner.notes.get("decision")]
    record = {"votes": learner.votes, "new": list(new), write.FEEDBACK: last}
    file = loaded.folder / "catalog.yaml"
    catalog = catalog_with(file, {}, learner.models, new, drop) if file.is_file() else None
    write.write(loaded, target, head, learner.models, uncertainty, drop, record, catalog)
    note(f"{learner.votes:,} votes of a service" + (f"; new: {', '.join(new)}" if new else ""))
    note_written(uncertainty, target)


def with_votes(votes: Votes) -> set[str]:
    import numpy as np

    used = votes.weight > 0
    sides = np.concatenate([votes.a[used], votes.b[used]])
    return {votes.models[i] for i in np.unique(sides[sides >= 0])}


def catalog_with(
    file: Path, costs: Mapping[str, float], models: Sequence[str], new: Sequence[str], drop: Sequence[str]
) -> bytes | None:
    """The catalog with those of the new models whose costs are given, without the dropped ones; None where nothing changes."""
    import yaml

    from p2l_engine.unique_keys import UniqueKeys

    before = yaml.load(file.read_text(encoding="utf-8"), UniqueKeys)
    values = dict(before)
    key = "model_configs" if "model_configs" in values else "models"
    entries = {name: entry for name, entry in values[key].items() if name not in drop}
    entries |= {name: {"cost": cost} for name, cost in costs.items() if name not in entries}
    lacking = [name for name in new if name not in [*entries, *drop]]
    if lacking:
        note(
            f"catalog.yaml has no cost of {', '.join(lacking)}: add it there, or give it in --models; until then route with "
            "--leave-out",
            warning=True,
        )
    if not entries and set(models) - set(drop):
        raise ValueError(f"{file}: without {', '.join(drop)} it has no model: expected the cost of another one, in --models")
    if "left_out" in values:
        values["left_out"] = [name for name in values["left_out"] if name not in [*entries, *drop]]
    changed = values | {key: entries}
    return None if changed == before else yaml.safe_dump(changed, sort_keys=False, allow_unicode=True).encode()


def show(adapted: Adapted, votes: Votes, states: npt.NDArray[np.float32], feedback: Any, tensor: Any) -> None:
    """The models that learned: their votes, mean theta over the votes' prompts, rank and win rate among all."""
    import numpy as np

    from p2l_engine.cli.table import print_table
    from p2l_engine.coefficients import Coefficients
    from p2l_engine.leaderboard import Leaderboard

    head = adapted.head
    out_ = states @ head.weight.numpy().T + head.bias.numpy()
    theta, eta = head.split(out_.astype(np.float32))
    middle = tensor(states.mean(0, dtype=np.float64).astype(np.float32))[None]
    deviation = (
        np.zeros(len(adapted.models)) if adapted.uncertainty is None else adapted.uncertainty.deviation(middle)[0].numpy()
    )
    used = votes.weight > 0
    sides = np.concatenate([votes.a[used], votes.b[used]])
    count = {votes.models[i]: int((sides == i).sum()) for i in range(len(votes.models))}
    means = theta.mean(0)
    rank = {adapted.models[i]: str(place) for place, i in enumerate(np.argsort(-means, kind="stable"), 1)}
    rate = dict.fromkeys(adapted.models, "")
    if not feedback.of_values:
        for standing in Leaderboard.over(Coefficients(theta, eta, adapted.models, feedback)):
            rank[standing.model] = str(standing.rank)
            rate[standing.model] = "" if standing.win_rate is None else f"{standing.win_rate:.1%}"
    rows = []
    for name in (*adapted.new, *adapted.moved):
        i = adapted.models.index(name)
        kind = "new" if name in adapted.new else "updated"
        rows.append((name, kind, f"{count.get(name, 0):,}", f"{means[i]:.3f} ± {deviation[i]:.3f}", rank[name], rate[name]))
    title = f"{len(votes):,} votes on {len(votes.prompts):,} prompts"
    print_table(title, ("model", "row", "votes", "mean theta", "rank", "win rate"), rows, out())
