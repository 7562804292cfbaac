"""Serves until it is stopped: python -m bench.mock_provider --port 9000."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import signal
from pathlib import Path

import uvloop

from bench.mock_provider import MockProvider


async def serve(options: argparse.Namespace) -> None:
    """Until SIGINT or SIGTERM."""
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    prices = None if options.prices is None else json.loads(options.prices.read_text(encoding="utf-8"))
    async with MockProvider(
        prices,
        tokens_out=options.tokens_out,
        first_byte=options.first_byte,
        per_token=options.per_token,
        seed=options.seed,
        key=options.key,
        keep=options.keep,
        host=options.host,
        port=options.port,
    ) as provider:
        print(f"mock provider at {provider.url}", flush=True)
        await stop.wait()


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m bench.mock_provider", description="A stand-in for providers of LLMs.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=9000, help="0: any free one, which the first line of the output names")
    parser.add_argument("--prices", type=Path, help='JSON: {"model": [in, out, cached]}, USD for a million tokens')
    parser.add_argument("--tokens-out", type=int, default=50, help="words of each answer")
    parser.add_argument("--first-byte", type=float, default=0.0, help="seconds before each answer")
    parser.add_argument("--per-token", type=float, default=0.0, help="seconds before each token of a stream; 0: all at once")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--key", help="the key that clients must send")
    parser.add_argument("--keep", type=int, default=100, help="requests that are remembered")
    options = parser.parse_args()
    with contextlib.suppress(KeyboardInterrupt):
        uvloop.run(serve(options))


if __name__ == "__main__":
    main()
