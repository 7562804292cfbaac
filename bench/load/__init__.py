"""Load for HTTP servers of chat models, and the servers: what ``bench.serving`` and ``bench.serving_faults`` are made of.

``generator`` sends requests at a fixed rate and times them, ``closed`` keeps a number of clients busy; both run in a process of
their own. ``servers`` starts the subjects, ``process`` reads what each costs.
"""
