"""Leaderboards of one prompt, of a set of prompts, and of votes."""

from p2l_engine.leaderboard.fit import Fit, fit
from p2l_engine.leaderboard.leaderboard import Leaderboard
from p2l_engine.leaderboard.outcomes import OutcomeSums, pair_count, pairs
from p2l_engine.reports import Standing

__all__ = ["Fit", "Leaderboard", "OutcomeSums", "Standing", "fit", "pair_count", "pairs"]
