"""python -m p2l_engine: the same as the command p2l-engine."""

from p2l_engine.cli import main

main()
