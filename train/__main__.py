"""python -m p2l_engine.train: the same as ``p2l-engine train``, for torchrun."""

import sys

from p2l_engine.cli import run


def main() -> int:
    """Returns the exit status."""
    return run(["train", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
