"""What a training run shows: a bar with loss, speed and the time that remains; lines where there is no terminal."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 30.0


@dataclass(slots=True)
class Seen:
    """What this process has been trained on since it started."""

    prompts: int = 0
    votes: int = 0
    tokens: int = 0


class Epochs(TrainerCallback):
    """Tells the training data which epoch it is: their order and what is dropped depend on it."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.dataset.epoch = int(state.epoch + 1e-9)


class Show(TrainerCallback):
    """The bar, on standard error."""

    def __init__(self, seen: Seen) -> None:
        self.seen, self.loss = seen, ""
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
        # Each process has its share of every step's prompts, so that this one stands for all.
        spent = max(now - self.started, 1e-9) / args.world_size
        speed = f"{self.loss}{self.seen.tokens / spent:,.0f} tokens/s {self.seen.votes / spent:,.0f} votes/s"
        self.bar.update(self.task, completed=state.global_step, description=speed)
        if state.is_world_process_zero and not self.bar.console.is_terminal and now - self.last_line > SECONDS_BETWEEN_LINES:
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
