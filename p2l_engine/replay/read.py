"""Finds out what a log is, and reads it."""

from __future__ import annotations

from pathlib import Path

from p2l_engine.replay.columns import PROMPT, column_names
from p2l_engine.replay.decisions import read_decisions
from p2l_engine.replay.logged import LoggedDecisions, ScoreMatrix
from p2l_engine.replay.matrix import read_matrix, wide_models
from p2l_engine.replay.rewards import Reward
from p2l_engine.tables.rows import listed

DECISIONS, FEEDBACK = "decisions.parquet", "feedback.parquet"  # of an export


def read_log(
    path: str | Path,
    feedback: str | Path | None = None,
    scores: str | Path | None = None,
    reward: Reward | None = None,
    csv_escape: str | None = None,
    column: str | None = None,
) -> LoggedDecisions | ScoreMatrix:
    """The folder of a log's export (with its feedback), the output of a batch run, a table of choices with propensities, or a
    matrix of scores. feedback, scores: files with the rewards; reward: which kind of feedback counts (None: scores where there
    are any). csv_escape: see ``tables.find.find_each``. column: of the prompts, in the log and in ``scores``; None: prompt.
    Raises ValueError for anything else, naming what is missing."""
    folder = Path(path)
    if (folder / DECISIONS).is_file():
        if feedback is None and scores is None and _has_rows(folder / FEEDBACK):
            feedback = folder / FEEDBACK
        return read_decisions(folder / DECISIONS, feedback, scores, reward, csv_escape, column)
    names = column_names(path, csv_escape)
    names = names if column is None or PROMPT in names else [*names, PROMPT]
    chose = "chosen" in names or "model" in names
    if chose and ("propensity" in names or "policy" in names):
        return read_decisions(path, feedback, scores, reward, csv_escape, column)
    if wide_models(names) or ({"prompt", "model", "score"} <= set(names) and "chosen" not in names):
        if feedback is not None or scores is not None or reward is not None:
            raise ValueError(f"{path}: a matrix of scores, which are its rewards: expected no feedback or scores beside it")
        return read_matrix(path, names, csv_escape, column)
    if chose:
        return read_decisions(path, feedback, scores, reward, csv_escape, column)  # which says what is missing
    raise ValueError(
        f"{path}: expected a log's export, a batch run's output, a table with the columns model and propensity, or a matrix of "
        f"scores (prompt, model, score); it has the columns {listed(names)}"
    )


def _has_rows(path: Path) -> bool:
    """Whether an export has any feedback."""
    import pyarrow.parquet as pq

    return path.is_file() and pq.read_metadata(path).num_rows > 0
