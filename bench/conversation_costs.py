"""What sessions cost when a switch of model loses the prompt cache: python -m bench.conversation_costs.

Conversations of twenty turns on two models: a large and a small one, of which the large one is better on nine turns of ten; and
two alike, of which each is better on half of the turns. Three routers maximise the same: win rate less a price of money times
cost.

- priced: it knows the cached price, and what each model has in its cache; the server with ``usd_per_m_cached``.
- not priced: it takes all input for new, as if there was no ``usd_per_m_cached``.
- never switches: it stays with its first choice.

The provider bills all three alike: what a model read within the conversation is cached. The choice is the server's own code:
its prices, its memory of sessions, its choice. A session begins with instructions and tools, and each turn adds a question and
an answer; coefficients of the two models differ by a normal variable. The last column is what the priced router spends for the
win rate of a row, at another price of money.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from bench.mock_provider.prompt_cache import PromptCache
from bench.setting import positive
from p2l_engine import routing
from p2l_engine.apis.api import Usage
from p2l_engine.serve.choice import choose
from p2l_engine.serve.model_entry import Model
from p2l_engine.serve.prices import Prices
from p2l_engine.serve.sessions import SessionMemory
from p2l_engine.serve.tokens import Counted, TokenCounter

ROUTERS = ("priced", "not priced", "never switches")
# Two models' USD for a million tokens (input, output, cached input), and the mean of the difference of their coefficients.
SETTINGS = {
    "large and small": ({"a": (3.0, 15.0, 0.3), "b": (1.0, 5.0, 0.1)}, 1.0),
    "two alike": ({"a": (3.0, 15.0, 0.3), "b": (2.5, 12.0, 0.25)}, 0.0),
}
PRICES = (0.0, 1.0, 2.0, 5.0, 7.0, 10.0, 14.0, 20.0, 30.0, 50.0, 100.0)  # win rate for a USD
SPREAD = 0.75  # standard deviation of the difference of coefficients
OPENING, QUESTION, ANSWER = 2_000, 100, 400  # tokens


class Row(NamedTuple):
    """Means over conversations: USD and switches of one; win rate and objective of a turn; the cached share of the input.
    usd_priced: what the priced router spends for the same win rate."""

    setting: str
    price: float
    router: str
    usd: float
    win_rate: float
    objective: float
    switches: float
    cached: float
    usd_priced: float = 0.0


def conversation(
    models: Mapping[str, tuple[float, ...]], router: str, price: float, rates: Sequence[Any], messages: Sequence[Counted]
) -> tuple[float, ...]:
    """USD, mean win rate, switches, and the cached and all input tokens of one conversation. rates: of each turn [2];
    messages: of each turn's request."""
    billed = Prices(_models(models, cached=True))
    expected = billed if router != "not priced" else Prices(_models(models, cached=False))
    memory, cache = SessionMemory(300.0, 10, lambda: 0.0), PromptCache(300.0, lambda: 0.0)
    names, chosen, usd, won, switches, read = list(models), -1, 0.0, 0.0, 0, 0
    for v, counted in zip(rates, messages, strict=True):
        held = memory.cached("session", counted, names)
        costs = expected.expected(counted.total, np.array(held, float), np.full(2, float(ANSWER)))
        allowed = np.array([router != "never switches" or chosen in (-1, k) for k in range(2)])
        k = choose(v, costs, allowed, lambda indices, _: indices[0], price=price).model
        switches += chosen not in (-1, k)
        chosen = k
        memory.remember("session", names[k], counted)
        count = cache.use(names[k], [hash(part) for part in counted.chain])
        cached = counted.ends[count - 1] if count else 0
        read += cached
        usd += float(billed.cost(k, Usage(counted.total, ANSWER, cached)))
        won += float(v[k])
    return usd, won / len(rates), switches, read, sum(counted.total for counted in messages)


def measure(conversations: int, turns: int, prices: Sequence[float], seed: int = 0) -> list[Row]:
    """All routers at all prices in both settings, each on the same conversations."""
    messages, rows = asyncio.run(_messages(turns)), list[Row]()
    for setting, (models, edge) in SETTINGS.items():
        theta = np.zeros((conversations, turns, 2))
        theta[..., 0] = edge + SPREAD * np.random.default_rng(seed).normal(size=(conversations, turns))
        rates = routing.win_rates(theta.reshape(-1, 2), np.full(2, 0.5)).reshape(theta.shape)
        found = list[Row]()
        for price in prices:
            for router in ROUTERS:
                means = np.mean([conversation(models, router, price, one, messages) for one in rates], 0).tolist()
                usd, won, switches, read, total = means
                found.append(Row(setting, price, router, usd, won, won - price * usd / turns, switches, read / total))
        curve = np.array(sorted((row.win_rate, row.usd) for row in found if row.router == "priced"))
        rows += [row._replace(usd_priced=float(np.interp(row.win_rate, curve[:, 0], curve[:, 1]))) for row in found]
    return rows


async def _messages(turns: int) -> list[Counted]:
    """The messages of each turn's request, counted: all before, and one more question."""
    counter = TokenCounter(lambda text: int(text.split()[-1]))
    texts, found = [b"instructions %d" % OPENING], []
    for turn in range(turns):
        texts.append(b"question %d: %d" % (turn, QUESTION))
        found.append(await counter.counted(texts))
        texts.append(b"answer %d: %d" % (turn, ANSWER))
    return found


def _models(prices: Mapping[str, tuple[float, ...]], cached: bool) -> dict[str, Model]:
    models = {}
    for name, (usd_in, usd_out, usd_cached) in prices.items():
        models[name] = Model(
            usd_per_m_in=usd_in,
            usd_per_m_out=usd_out,
            usd_per_m_cached=usd_cached if cached else None,
            tokens_in=1,
            tokens_out=ANSWER,
        )
    return models


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.conversation_costs", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--conversations", type=positive, default=100, help="of each row (default 100)")
    parser.add_argument("--turns", type=positive, default=20, help="of a conversation (default 20)")
    parser.add_argument("--prices", type=float, nargs="+", default=PRICES, help="win rate for a USD")
    parser.add_argument("--csv", type=Path, help="also write the rows here")
    arguments = parser.parse_args()
    rows = measure(arguments.conversations, arguments.turns, arguments.prices)
    table = Table(title=f"{arguments.conversations} conversations of {arguments.turns} turns", title_justify="left")
    for column in Row._fields:
        table.add_column(column, justify="left" if column in ("setting", "router") else "right")
    for row in rows:
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else value for value in row))
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    if arguments.csv:
        with arguments.csv.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(Row._fields)
            writer.writerows([f"{value:.6g}" if isinstance(value, float) else value for value in row] for row in rows)


if __name__ == "__main__":
    main()
