"""Limits of what a table of votes may hold."""

MAX_DROPPED = 0.01  # the share of its rows that may be invalid
