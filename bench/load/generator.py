"""Sends requests at a fixed rate, whatever becomes of those before, and times them from when they were due."""

from __future__ import annotations

import asyncio
import gc
import time
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import uvloop

from bench.load.client import Pool
from bench.load.request import ENDS, Answer, body_of, wire
from bench.load.ticks import Ticks

PATIENCE = 3.0  # seconds after the last request, within which answers count
Seconds = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Job:
    """rate: requests per second; count: how many. prompts: taken in turns. warm: send each once, a few at a time, before."""

    host: str
    port: int
    model: str
    prompts: tuple[str, ...]
    rate: float
    count: int
    stream: bool
    api: str = "chat"
    max_tokens: int = 200
    warm: int = 0


@dataclass(frozen=True)
class Timed:
    """What came of a job. first, end: seconds from when a request was due to the first byte of the body and to its end, of the
    requests that were answered with 200; refused: seconds to the end of answers with 503. late: seconds by which requests were
    sent too late. statuses: answers by status, or by what failed. without_retry: 503s without Retry-After. cpu, wall: seconds
    of the generator's process."""

    first: Seconds
    end: Seconds
    refused: Seconds
    late: Seconds
    statuses: dict[str, int] = field(default_factory=dict)
    without_retry: int = 0
    cpu: float = 0.0
    wall: float = 0.0

    @property
    def sent(self) -> int:
        """Requests."""
        return len(self.late)


def run(job: Job) -> Timed:
    """Does a job; to be called in a process of its own."""
    return uvloop.run(_run(job))


async def _run(job: Job) -> Timed:
    host = f"{job.host}:{job.port}"
    requests = [wire(host, job.api, body_of(job.api, job.model, prompt, job.stream, job.max_tokens)) for prompt in job.prompts]
    pool, answers, left = Pool(job.host, job.port), list[Answer](), asyncio.Event()
    await _warm(pool, requests, job.warm)
    open_answers = 0

    def done(answer: Answer) -> None:
        nonlocal open_answers
        open_answers -= 1
        if not open_answers:
            left.set()

    def due(when: float) -> None:
        nonlocal open_answers
        open_answers += 1
        answer = Answer(when, done)
        pool.send(requests[len(answers) % len(requests)], answer)
        answers.append(answer)

    gc.collect()
    gc.disable()
    wall, cpu = time.perf_counter(), time.process_time()
    await Ticks(job.rate, job.count, due).ended
    left.clear()
    if open_answers:
        try:
            await asyncio.wait_for(left.wait(), PATIENCE)
        except TimeoutError:
            pool.close()
            await asyncio.sleep(0)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    gc.enable()
    pool.close()
    return _timed(job, answers, cpu, wall)


async def _warm(pool: Pool, requests: list[bytes], at_once: int) -> None:
    """Sends each request once, ``at_once`` at a time."""
    for start in range(0, len(requests) if at_once else 0, at_once or 1):
        part = requests[start : start + at_once]
        left, ended = len(part), asyncio.get_running_loop().create_future()

        def done(answer: Answer, ended: asyncio.Future[None] = ended) -> None:
            nonlocal left
            left -= 1
            if not left:
                ended.set_result(None)

        for data in part:
            pool.send(data, Answer(time.perf_counter(), done))
        await ended


def _timed(job: Job, answers: list[Answer], cpu: float, wall: float) -> Timed:
    statuses = Counter[str]()
    good, refused = list[Answer](), list[Answer]()
    for answer in answers:
        status = str(answer.status) if answer.status else answer.error or "no answer in time"
        if answer.status == 200 and job.stream and not (answer.parts and ENDS[job.api] in answer.parts[-1]):
            status = "200, cut off"
        statuses[status] += 1
        if status == "200":
            good.append(answer)
        elif status == "503":
            refused.append(answer)
    return Timed(
        np.array([answer.first - answer.due for answer in good]),
        np.array([answer.end - answer.due for answer in good]),
        np.array([answer.end - answer.due for answer in refused]),
        np.array([(answer.sent or answer.end) - answer.due for answer in answers]),
        dict(statuses),
        sum(answer.retry_after is None for answer in refused),
        cpu,
        wall,
    )
