"""A catalog of a pool's models with prices: python -m p2l_engine.train.prices POOL.parquet --prices TABLE -o CATALOG.yaml ...

The price table has the columns provider, model_id, usd_per_m_in, usd_per_m_out and source. A model's price is its maker's where
the maker lists it, else the median of its hosts' prices, for input and output each. Models of the pool without a price are left
out of the catalog, so that a router leaves them out of the choice; its head names them.

Tokens that a request is expected to take are the same for all: those of the pool's mean prompt, and of an ordinary answer.
Models that think first also write the mean number of tokens of their answers in a table of answers, or, where that has none of
theirs, the mean of all models there that think.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Annotated

import typer
import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from p2l_engine.apis.ask import Capability
from p2l_engine.tables.atomic import write_file
from p2l_engine.tables.turns import cell_turns
from p2l_engine.tables.whole import read_table
from p2l_engine.train.definition import Definition
from p2l_engine.votes.cells import number

CHARACTERS = 4  # to a token, about


class ModelOptions(BaseModel):
    """A model: what each provider calls it in the price table. maker: the provider whose price counts; None: all, as hosts.
    context, in tokens, and accepts: as in a catalog."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    listed: Annotated[dict[str, str], Field(min_length=1)]
    maker: str | None = None
    thinks: bool = False
    context: Annotated[int, Field(ge=1)] | None = None
    accepts: list[Capability] | None = None

    @model_validator(mode="after")
    def _maker_lists_it(self) -> ModelOptions:
        if self.maker is not None and self.maker not in self.listed:
            raise ValueError(f"maker: expected one of {', '.join(self.listed)}")
        return self


class Models(Definition):
    """All models. answer_tokens: of an ordinary answer."""

    answer_tokens: Annotated[int, Field(ge=1)]
    models: Annotated[dict[str, ModelOptions], Field(min_length=1)]


@dataclass(frozen=True, slots=True)
class Price:
    """Of a model in USD per million tokens. of: its maker, or None for the median of ``hosts``."""

    usd_per_m_in: float
    usd_per_m_out: float
    of: str | None
    hosts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PriceTable:
    """Prices for input and output tokens by provider and model, and where they come from."""

    prices: Mapping[tuple[str, str], tuple[float, float]]
    sources: tuple[str, ...]

    @classmethod
    def read(cls, path: Path) -> PriceTable:
        """Raises ValueError for a price that is no number of at least 0, and for two prices of a model at a provider. Rows
        without a price for output, as of embeddings, are left out."""
        columns = ("provider", "model_id", "usd_per_m_in", "usd_per_m_out", "source")
        table = read_table(path, set(columns))
        if missing := [name for name in columns if name not in table.columns]:
            raise ValueError(f"{table.shown}: expected the columns {', '.join(columns)}; missing {', '.join(missing)}")
        found: dict[tuple[str, str], tuple[float, float]] = {}
        for provider, model, usd_in, usd_out, _ in zip(*(table.columns[name] for name in columns), strict=True):
            if usd_out in (None, ""):
                continue
            per_in, per_out = number(usd_in), number(usd_out)
            if per_in is None or per_out is None or per_in < 0 or per_out < 0:
                raise ValueError(f"{table.shown}: {provider}, {model}: expected prices >= 0, got {usd_in!r} and {usd_out!r}")
            if found.setdefault((provider, model), (per_in, per_out)) != (per_in, per_out):
                raise ValueError(f"{table.shown}: {provider}, {model}: expected one price, got two")
        return cls(found, tuple(sorted(set(table.columns["source"]))))

    def of(self, models: Mapping[str, ModelOptions]) -> dict[str, Price]:
        """The price of each model. Raises ValueError that names all names which the table does not have."""
        missing = [
            f"{name}: {provider}: {listed}"
            for name, model in models.items()
            for provider, listed in model.listed.items()
            if (provider, listed) not in self.prices
        ]
        if missing:
            raise ValueError(f"models: expected names of the price table, found none of {'; '.join(missing)}; correct them")
        found = {}
        for name, model in models.items():
            hosts = (model.maker,) if model.maker is not None else tuple(model.listed)
            usd_in, usd_out = zip(*(self.prices[host, model.listed[host]] for host in hosts), strict=True)
            found[name] = Price(median(usd_in), median(usd_out), model.maker, hosts)
        return found


def prompt_tokens(prompts: Iterable[str]) -> int:
    """Of the mean of different prompts, about. prompts: cells of a table."""
    return max(1, round(fmean(sum(map(len, cell_turns(prompt))) for prompt in set(prompts)) / CHARACTERS))


def thinking_tokens(path: Path, models: Mapping[str, ModelOptions]) -> dict[str, int]:
    """The tokens that each model which thinks first is expected to think: the mean of its answers' ``completion_tokens`` in a
    table, else the mean of those found. Raises ValueError where no such model has any."""
    table = read_table(path, {"model", "completion_tokens"})
    if missing := [name for name in ("model", "completion_tokens") if name not in table.columns]:
        raise ValueError(f"{table.shown}: expected the columns model and completion_tokens; missing {', '.join(missing)}")
    thinking = [name for name, model in models.items() if model.thinks]
    taken: defaultdict[str, list[float]] = defaultdict(list)
    for model, tokens in zip(table.columns["model"], table.columns["completion_tokens"], strict=True):
        if model in thinking and (count := number(tokens)) is not None:
            taken[model].append(count)
    means = {name: fmean(of) for name, of in taken.items()}
    if thinking and not means:
        raise ValueError(f"{table.shown}: expected answers of {', '.join(thinking)}, found none")
    return {name: round(means.get(name, fmean(means.values()))) for name in thinking}


def catalog(
    options: Models,
    prices: Mapping[str, Price],
    tokens_in: int,
    thinking: Mapping[str, int],
    without: Sequence[str],
    head: Iterable[str],
) -> str:
    """The catalog in YAML. without: models that have no price; head: lines of its first comment."""
    lines = [*(f"# {line}" for line in head), "unit: USD per request"]
    lines += ["left_out:  # which have no price", *(f"  - {_scalar(name)}" for name in without)] if without else []
    lines += ["models:"]
    for name, price in sorted(prices.items()):
        model = options.models[name]
        entry: dict[str, object] = {
            "usd_per_m_in": round(price.usd_per_m_in, 6),
            "usd_per_m_out": round(price.usd_per_m_out, 6),
            "tokens_in": tokens_in,
            "tokens_out": options.answer_tokens + thinking.get(name, 0),
        }
        entry |= {"context": model.context} if model.context is not None else {}
        entry |= {"accepts": model.accepts} if model.accepts is not None else {}
        whose = price.of or ("median of " + ", ".join(price.hosts) if len(price.hosts) > 1 else price.hosts[0])
        text = yaml.safe_dump(entry, default_flow_style=True, sort_keys=False, width=10_000).rstrip()
        lines += [f"  # {whose}", f"  {_scalar(name)}: {text}"]
    return "\n".join([*lines, ""])


def _scalar(name: str) -> str:
    return str(yaml.safe_dump(name, width=10_000).splitlines()[0])


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    pool: Annotated[Path, typer.Argument(metavar="POOL.parquet", help="A table of p2l_engine.train.sources.")],
    prices: Annotated[Path, typer.Option(help="The price table.")],
    models: Annotated[Path, typer.Option(help="YAML file with the models' names in the price table.")],
    answers: Annotated[Path, typer.Option(help="A table with the columns model and completion_tokens.")],
    date: Annotated[str, typer.Option(help="When the prices were listed, for the catalog's head.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The catalog to write.")],
) -> None:
    """Writes a catalog of the pool's models with the prices of a table."""
    try:
        options, table = Models.load(models), PriceTable.read(prices)
        pooled = read_table(pool, {"prompt", "model"})
        known = set(pooled.columns["model"])
        others = sorted(set(options.models) - known)
        found = table.of({name: model for name, model in options.models.items() if name in known})
        if not found:
            raise ValueError(f"{models}: expected models of the pool, found none")
        without = sorted(known - set(found))
        head = [
            f"Prices in USD per million tokens, as listed in {date} by {', '.join(table.sources)}.",
            "Made by p2l_engine.train.prices. Above each model: whose price it is, its maker's or the median of its hosts'.",
        ]
        tokens, thinking = prompt_tokens(pooled.columns["prompt"]), thinking_tokens(answers, options.models)
        text = catalog(options, found, tokens, thinking, without, head)
        write_file(output, text)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    if others:
        print(f"not in the pool: {', '.join(others)}")
    print(f"wrote {output}: {len(found)} models; {len(without)} without a price")


if __name__ == "__main__":
    app()
