"""python -m p2l_engine.train --config FILE: trains a P2L checkpoint."""

from __future__ import annotations

import argparse
import logging
import os
import sys

from rich.console import Console
from rich.logging import RichHandler

from p2l_engine.train.config import TrainConfig
from p2l_engine.train.resumption import IfPresent
from p2l_engine.train.run import train


def main() -> int:
    """Exit status 0, or 2 with one line on what is wrong with the config or the data."""
    parser = argparse.ArgumentParser(prog="python -m p2l_engine.train", description="Fine-tune a P2L model on votes.")
    parser.add_argument("--config", required=True, help="YAML file; see train/configs/")
    parser.add_argument("--max-steps", type=int, default=-1, help="end after so many optimiser steps (a trial)")
    present = parser.add_mutually_exclusive_group()
    present.add_argument("--resume", action="store_true", help="go on with this run where it was killed")
    present.add_argument("--restart", action="store_true", help="throw away what is there of this run, and start again")
    arguments = parser.parse_args()
    first = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(
        level=logging.INFO if first else logging.ERROR,
        format="%(message)s",
        handlers=[RichHandler(console=Console(stderr=True), show_path=False, show_time=False, show_level=False)],
    )
    if_present: IfPresent = "resume" if arguments.resume else "restart" if arguments.restart else "refuse"
    try:
        folder = train(TrainConfig.load(arguments.config), arguments.max_steps, if_present)
    except KeyboardInterrupt:
        print("interrupted; --resume goes on from the last state that was saved", file=sys.stderr)
        return 130
    except (ValueError, OSError, FloatingPointError, ImportError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
