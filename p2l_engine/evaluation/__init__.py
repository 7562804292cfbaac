"""How good a P2L model is, on votes and on scores: figures with intervals, next to baselines. Needs the extra ``train``."""
