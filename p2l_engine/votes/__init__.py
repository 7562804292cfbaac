"""Votes: which of two models' answers to a prompt people or judges preferred, or the values that they gave to one.

Needs the extra ``train`` (pyarrow; datasets for hub names).
"""

from p2l_engine.votes.read import Dropped, read
from p2l_engine.votes.scores import from_scores, score_matrix
from p2l_engine.votes.splits import Splits, check_apart, conversations, folds, prompts_hash, split
from p2l_engine.votes.summary import Summary
from p2l_engine.votes.votes import Votes

__all__ = [
    "Dropped",
    "Splits",
    "Summary",
    "Votes",
    "check_apart",
    "conversations",
    "folds",
    "from_scores",
    "prompts_hash",
    "read",
    "score_matrix",
    "split",
]
