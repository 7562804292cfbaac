"""``p2l-engine leaderboard --period``: leaderboards of logged prompts over time, and what changed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from p2l_engine.cli.progress import progress
from p2l_engine.cli.table import print_table
from p2l_engine.cli.terminal import note, out
from p2l_engine.cli.top import cut
from p2l_engine.engine import Engine
from p2l_engine.jsonable import to_json
from p2l_engine.leaderboard import Leaderboard
from p2l_engine.learning import drift
from p2l_engine.learning.calibration import among_known
from p2l_engine.learning.traffic import Period, consecutive, period_of, read_traffic, rows_of
from p2l_engine.votes import read

EXPORTED_VOTES = "votes.parquet"
LEVEL = 0.05  # of tests
GROUPS = 12  # that a plot has space for

Key = tuple[str, str]  # group and period


def over_time(
    engine: Engine,
    path: str,
    column: str | None,
    csv_escape: str | None,
    by: str | None,
    period: Period,
    votes: str | None,
    bootstrap: int,
    top: int | None,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Prints, for each group, its leaderboards by period, the changes between consecutive periods, and, where there are votes,
    whether the checkpoint is still calibrated."""
    if plot is not None:  # now: a missing package must not fail a command whose work is done
        from p2l_engine.cli.plots import over_time as draw
    traffic = read_traffic(path, by, period, column, csv_escape)
    for why, count in traffic.skipped.items():
        note(f"skipped {count:,} rows with {why}", warning=True)
    with progress(len(traffic.prompts)) as advance:
        c = engine.coefficients(traffic.prompts, advance)
    rows = rows_of(traffic)
    boards = {key: Leaderboard.over(c.rows(some), bootstrap=bootstrap) for key, some in rows.items()}
    changes: dict[tuple[Key, Key], drift.Change] = {}
    for one, other in consecutive(list(rows)):
        sessions = traffic.session[rows[one]], traffic.session[rows[other]]
        try:
            changes[one, other] = drift.change(c.rows(rows[one]), c.rows(rows[other]), sessions)
        except ValueError as error:
            note(f"{_name(one)} to {_name(other)}: not tested: {error}", warning=True)
    adjusted = dict(zip(changes, drift.holm([found.p for found in changes.values()]), strict=True))
    found_votes = votes or (str(Path(path) / EXPORTED_VOTES) if (Path(path) / EXPORTED_VOTES).is_file() else None)
    calibrated = {} if found_votes is None else _still_calibrated(engine, found_votes, csv_escape, period, votes is not None)
    if as_json:
        _print_json(boards, rows, changes, adjusted, calibrated)
    else:
        for group in dict.fromkeys(group for group, _ in rows):
            _show(group, {key: board for key, board in boards.items() if key[0] == group}, rows, top)
        _show_changes(changes, adjusted)
        _show_calibrated(calibrated)
    if plot is not None:
        shown = list(dict.fromkeys(group for group, _ in rows))[:GROUPS]
        if len(shown) < len({group for group, _ in rows}):
            note(f"the plot shows the {GROUPS} groups with the most prompts")
        draw({group: {key[1]: board for key, board in boards.items() if key[0] == group} for group in shown}, top, plot)
        note(f"wrote {plot}")


def _still_calibrated(
    engine: Engine, path: str, csv_escape: str | None, period: Period, must: bool
) -> dict[str, drift.StillCalibrated]:
    """By period. must: whether the user asked for it, so that votes without times are an error."""
    try:
        given, _ = read(path, None, engine.feedback, csv_escape=csv_escape)
        known, others = among_known(given, engine.models)
    except ValueError as error:
        if must:
            raise
        note(f"calibration is not tested: {error}", warning=True)  # an export without usable votes is a usual one
        return {}
    if known.timestamp is None:
        raise ValueError(f"{path}: expected votes with the column timestamp")
    if others:
        note(f"skipped {others:,} votes on models that the checkpoint does not know", warning=True)
    with progress(len(known.prompts)) as advance:
        c = engine.coefficients(known.prompts, advance)
    names = np.array([period_of(seconds, period) for seconds in known.timestamp.tolist()])
    found = {}
    for name in sorted(set(names.tolist())):
        of_period = (names == name) & (known.weight > 0)
        some = np.unique(known.prompt[of_period])
        try:
            found[name] = drift.still_calibrated(c.rows(some), known.where(of_period))
        except ValueError as error:
            note(f"{name}: calibration is not tested: {error}", warning=True)
    return found


def _name(key: Key) -> str:
    return f"{key[0]}, {key[1]}"


def _show(group: str, boards: Mapping[Key, Leaderboard], rows: Mapping[Key, npt.NDArray[np.int64]], top: int | None) -> None:
    last = list(boards.values())[-1]
    models = [standing.model for standing in last][:top]
    of = {key: {standing.model: standing for standing in board} for key, board in boards.items()}
    cells = [
        (model, *(f"{of[key][model].coefficient:.2f} ({of[key][model].interval})" for key in list(boards)[-6:]))
        for model in models
    ]
    headings = [f"{period} ({len(rows[group, period])} prompts)" for _, period in list(boards)[-6:]]
    print_table(f"{group}: coefficients{cut(len(models), len(last))}", ("model", *headings), cells, out(), dense=True)


def _show_changes(changes: Mapping[tuple[Key, Key], drift.Change], adjusted: Mapping[tuple[Key, Key], float]) -> None:
    if not changes:
        return
    rows = [
        (
            *one,
            other[1],
            f"{found.p:.4f}",
            f"{adjusted[one, other]:.4f}",
            "changed" if adjusted[one, other] <= LEVEL else "unclear",
        )
        for (one, other), found in changes.items()
    ]
    title = "has this traffic changed? Permutation tests by sessions"
    print_table(title, ("group", "from", "to", "p", "p of all (Holm)", "verdict"), rows, out())
    moved = [
        (
            gain.model,
            one[0],
            f"{one[1]} to {other[1]}",
            f"{gain.gain:+.4f}",
            f"{gain.low:+.4f} to {gain.high:+.4f}",
            f"{gain.p:.4f}",
        )
        for (one, other), found in changes.items()
        for gain in found.gains
        if gain.p <= LEVEL
    ]
    if moved:
        title = "models whose win rate against the others changed (p: for all models of a comparison together, at most 0.05)"
        print_table(title, ("model", "group", "periods", "change", "95% interval", "p"), moved, out())


def _show_calibrated(found: Mapping[str, drift.StillCalibrated]) -> None:
    if not found:
        return
    adjusted = drift.holm([of.p for of in found.values()])
    rows = [
        (
            period, f"{of.votes:,}", f"{of.log_loss:.4f}", "" if of.expected is None else f"{of.expected:.4f}", f"{of.p:.4f}",
            f"{p:.4f}", "not calibrated" if p <= LEVEL else "no evidence against it",
        )
        for (period, of), p in zip(found.items(), adjusted, strict=True)
    ]  # fmt: skip
    columns = ("period", "votes", "log-loss", "expected", "p", "p of all (Holm)", "verdict")
    print_table("is the checkpoint still calibrated on the votes?", columns, rows, out())


def _print_json(
    boards: Mapping[Key, Leaderboard],
    rows: Mapping[Key, npt.NDArray[np.int64]],
    changes: Mapping[tuple[Key, Key], drift.Change],
    adjusted: Mapping[tuple[Key, Key], float],
    calibrated: Mapping[str, drift.StillCalibrated],
) -> None:
    for key, board in boards.items():
        for standing in board:
            print(json.dumps({"group": key[0], "period": key[1], "prompts": len(rows[key]), **to_json(standing)}))
    for (one, other), found in changes.items():
        print(json.dumps({"group": one[0], "from": one[1], "to": other[1], **to_json(found), "p_of_all": adjusted[one, other]}))
    for (period, of), p in zip(calibrated.items(), drift.holm([of.p for of in calibrated.values()]), strict=True):
        print(json.dumps({"period": period, **to_json(of), "p_of_all": p}))
