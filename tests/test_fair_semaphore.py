"""FairSemaphore: first come, first served."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from p2l_engine.spending.fair_semaphore import FairSemaphore


def test_threads_get_it_in_the_order_in_which_they_came():
    turns, order, threads = FairSemaphore(1), [], []
    assert turns.acquire(0)

    def take(i):
        assert turns.acquire(60)
        order.append(i)
        turns.release()

    for i in range(20):
        threads.append(threading.Thread(target=take, args=(i,)))
        threads[-1].start()
        while len(turns._waiting) <= i:
            time.sleep(0.001)
    assert not turns.acquire(0)  # gives up, and leaves the queue
    turns.release()
    for thread in threads:
        thread.join()
    assert order == list(range(20))
    assert turns.acquire(0)


@pytest.mark.parametrize("places", [1, 3])
def test_so_many_threads_have_it_at_a_time(places):
    turns, inside, seen = FairSemaphore(places), [], []

    def work(i):
        for _ in range(50):
            if not turns.acquire(0.001 * (i % 3)):
                continue
            inside.append(i)
            seen.append(len(inside))
            inside.remove(i)
            turns.release()

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(work, range(16)))
    assert set(seen) <= set(range(1, places + 1))
    assert [turns.acquire(0) for _ in range(places + 1)] == [True] * places + [False]
