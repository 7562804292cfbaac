"""Processes of many threads that spend under one limit and are killed at random, for tests/test_spend_limit.py.

    python -m tests.support.spenders STORE BILLS LIMIT SEED

BILLS gets a line for each request that was made, as its provider would bill it: the token and billionths.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal

from p2l_engine.routing import Limit, SpendLimit, SpendLimitReached

PROCESSES, THREADS, KILLS = 8, 64, 25
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


def main(store, bills, limit, seed):
    rng = random.Random(seed)
    file = os.open(bills, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    kills, alive, started = 0, set(), 0

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
    while alive:
        time.sleep(rng.uniform(0, 0.2))
        while alive and (ended := os.waitpid(-1, os.WNOHANG))[0]:
            alive.remove(ended[0])
            assert os.waitstatus_to_exitcode(ended[1]) == 0, ended
        if kills < KILLS and alive:
            victim = rng.choice(sorted(alive))
            os.kill(victim, signal.SIGKILL)
            status = os.waitstatus_to_exitcode(os.waitpid(victim, 0)[1])
            assert status in (0, -signal.SIGKILL), status
            alive.remove(victim)
            kills += 1
            start()
    print("kills", kills)


if __name__ == "__main__":
    main(*sys.argv[1:])
