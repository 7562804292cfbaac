"""python -m p2l_engine.train --config FILE: trains a P2L checkpoint."""

from __future__ import annotations

import argparse
import logging
import sys

from p2l_engine.train.config import TrainConfig
from p2l_engine.train.run import train


def main() -> int:
    """Exit status 0, or 2 with one line on what is wrong with the config or the data."""
    parser = argparse.ArgumentParser(prog="python -m p2l_engine.train", description="Fine-tune a P2L model on votes.")
    parser.add_argument("--config", required=True, help="YAML file; see train/configs/")
    parser.add_argument("--max-steps", type=int, default=-1, help="end after so many optimiser steps (a trial)")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        folder = train(TrainConfig.load(arguments.config), arguments.max_steps)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
