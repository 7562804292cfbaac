"""Progress of a training run: a bar with loss, speed and time left on a terminal, log lines elsewhere."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback

logger = logging.getLogger(__name__)

SECONDS_PER_LINE = 10.0


@dataclass(slots=True)
class TrainedCounts:
    """Counts of what this process has trained on since it started."""

    prompts: int = 0
    votes: int = 0
    tokens: int = 0


class EpochSetter(TrainerCallback):
    """Sets the data set's epoch, on which its order and token dropout depend."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.dataset.epoch = int(state.epoch + 1e-9)


class ProgressBar(TrainerCallback):
    """The bar or the log lines, on standard error of the first process."""

    def __init__(self, counts: TrainedCounts) -> None:
        self.counts, self.loss = counts, ""
        self.bar = Progress(
            TextColumn("step"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeElapsedColumn(),
            TextColumn("left"), TimeRemainingColumn(), console=Console(stderr=True),
        )  # fmt: skip
        self.started = self.last_line = time.monotonic()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.started = self.last_line = time.monotonic()
        self.task = self.bar.add_task("", total=state.max_steps, completed=state.global_step)
        if state.is_world_process_zero and self.bar.console.is_terminal:
            self.bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        now = time.monotonic()
        # Every process gets the same share of each step, so that this one's speed times their number is the total.
        spent = max(now - self.started, 1e-9) / args.world_size
        speed = f"{self.loss}{self.counts.tokens / spent:,.0f} tokens/s {self.counts.votes / spent:,.0f} votes/s"
        self.bar.update(self.task, completed=state.global_step, description=speed)
        if state.is_world_process_zero and not self.bar.console.is_terminal and now - self.last_line > SECONDS_PER_LINE:
            self.last_line = now
            remaining = self.bar.tasks[self.task].time_remaining
            left = "" if remaining is None else f", {remaining / 60:,.1f} min left"
            logger.info("step %d of %d: %s%s", state.global_step, state.max_steps, speed, left)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self.loss = f"loss {logs['loss']:.4f} "
        if logs and "eval_loss" in logs and state.is_world_process_zero:
            logger.info("epoch %.2f: validation loss %.4f", state.epoch, logs["eval_loss"])

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.stop()
