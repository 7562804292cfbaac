"""Leaderboards: of one prompt, of a set of prompts, and of votes."""

from p2l_engine.leaderboard.fit import Fit, fit
from p2l_engine.leaderboard.outcomes import OutcomeSums, pair_count, pairs
from p2l_engine.leaderboard.places import Leaderboard, Place

__all__ = ["Fit", "Leaderboard", "OutcomeSums", "Place", "fit", "pair_count", "pairs"]
