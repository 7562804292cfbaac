"""Processes of many threads that spend under one limit and are killed at random, for tests/test_spend_limit.py.

    python -m tests.support.spenders STORE BILLS LIMIT KILLS SEED

BILLS gets a line for each request that was made, as its provider would bill it: the token and billionths.
"""

from __future__ import annotations

import importlib
import os
import random
import signal
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal

from p2l_engine.routing import Limit, SpendLimit, SpendLimitReached

PROCESSES, THREADS = 8, 64
LEAST, MOST = 500_000, 2_000_000  # billionths: the worst cases of requests


def units(billionths):
    return Decimal(billionths).scaleb(-9)


def tell(notice):
    os.write(1, f"notice {notice.limit} {notice.level}\n".encode())


def spend(store, bills, limit, seed):
    """Spends in 64 threads until nothing fits."""
    limits = [Limit(Decimal(limit)), Limit(Decimal(limit), each_key=True)]
    spending = SpendLimit(limits, store, lifetime=None, timeout=300, on_notice=tell)

    def requests(thread):
        rng = random.Random(f"{seed} {thread}")
        while True:
            worst = rng.randint(LEAST, MOST)
            try:
                token = spending.reserve(units(worst), "key")
            except SpendLimitReached as refused:
                if refused.left < units(LEAST):
                    return
                continue
            if rng.random() < 0.1:
                spending.release(token)  # the provider did not answer
                continue
            actual = rng.choice([worst, rng.randint(0, worst)])
            os.write(bills, f"{token} {actual}\n".encode())
            spending.settle(token, units(actual))

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(requests, range(THREADS)))


def main(store, bills, limit, kills, seed):
    for name in ("p2l_engine.spending.ledger", *(["psycopg"] if "://" in store else [])):
        importlib.import_module(name)  # once, before the forks
    rng = random.Random(seed)
    file = os.open(bills, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    alive, started, next_kill = set(), 0, 0

    def start():
        nonlocal started
        started += 1
        pid = os.fork()
        if pid == 0:
            try:
                spend(store, file, limit, f"{seed} {started}")
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        alive.add(pid)

    for _ in range(PROCESSES):
        start()
    for _ in range(int(kills)):
        next_kill += rng.randint(500, 3500)  # bytes of bills: by progress, however fast the machine is
        while os.path.getsize(bills) < next_kill:
            assert not os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT), "a process ended before the last kill"
            time.sleep(0.001)
        victim = rng.choice(sorted(alive))
        os.kill(victim, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(victim, 0)[1]) == -signal.SIGKILL
        alive.remove(victim)
        start()
    for pid in alive:
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


if __name__ == "__main__":
    main(*sys.argv[1:])
