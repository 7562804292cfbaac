"""Training steps on two cores: votes sharing a forward against one forward a vote, and the fused layers against transformers'.

Each row trains the backbone by LoRA on the same votes; rows take turns, round by round, and medians are printed.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from bench.machine import machine
from p2l_engine.prompts.encode import PromptEncoder
from p2l_engine.prompts.tokenizer import TransformersTokenizer
from p2l_engine.train.batches import PromptVotes, collate
from p2l_engine.train.config import TrainConfig
from p2l_engine.train.model import P2LModel, build
from p2l_engine.votes import Votes, read

TEMPLATE = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"


def step(model: P2LModel, optimiser: torch.optim.Optimizer, batch: dict[str, Any]) -> tuple[float, int, int]:
    """Seconds, votes and tokens of one optimiser step."""
    start = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch)["loss"] / batch["weight"].sum()
    loss.backward()
    optimiser.step()
    optimiser.zero_grad()
    return time.perf_counter() - start, len(batch["weight"]), len(batch["packed"].tokens)


def alone(items: list[dict[str, Any]], rng: np.random.Generator, count: int) -> dict[str, Any]:
    """``count`` of these prompts' votes, each with a forward of its own."""
    single = [
        item | {"votes": tuple(column[i : i + 1] for column in item["votes"])}
        for item in items
        for i in range(len(item["votes"][0]))
    ]
    return collate([single[i] for i in rng.choice(len(single), min(count, len(single)), replace=False)])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.training", description=__doc__.splitlines()[0])
    parser.add_argument("--votes", default="../shared/data/votes_llm_judge.parquet", help="votes to train on")
    parser.add_argument("--backbone", default="builtin/smollm2-135m-instruct", help="the backbone to train")
    parser.add_argument("--prompts", type=int, default=32, help="prompts a step, and votes a step without sharing")
    parser.add_argument("--rounds", type=int, default=7, help="measured steps a row, after one that is not")
    parser.add_argument("--csv", type=Path, help="also write the rows here")
    arguments = parser.parse_args()
    votes, _ = read(arguments.votes)
    models = {name: _model(votes, arguments.backbone, fuse) for name, fuse in (("fused", True), ("transformers", False))}
    tokenizer = models["fused"][1]
    rng, data = np.random.default_rng(0), PromptVotes(votes, PromptEncoder(TransformersTokenizer(tokenizer), 512))
    seconds: dict[str, list[float]] = {}
    speeds: dict[str, list[tuple[float, float]]] = {}
    rows: dict[str, tuple[str, Callable[[list[dict[str, Any]]], dict[str, Any]]]] = {
        "votes share a forward, fused layers": ("fused", collate),
        "votes share a forward, transformers' layers": ("transformers", collate),
        "one forward a vote, fused layers": ("fused", lambda items: alone(items, rng, arguments.prompts)),
    }
    for turn in range(arguments.rounds + 1):
        items = [data[int(i)] for i in rng.choice(len(data), arguments.prompts, replace=False)]
        for name, (which, batch_of) in rows.items():
            model, _, optimiser = models[which]
            spent, n_votes, n_tokens = step(model, optimiser, batch_of(items))
            if turn:
                seconds.setdefault(name, []).append(spent)
                speeds.setdefault(name, []).append((n_votes / spent, n_tokens / spent))
    first = next(iter(rows))
    mean = np.bincount(votes.prompt).mean()
    title = f"{len(votes):,} votes on {len(votes.prompts):,} prompts, {mean:.1f} a prompt; {arguments.prompts} prompts a step"
    table = Table(title=title, title_justify="left")
    for column in ("training step", "votes/s", "tokens/s", "the first row's votes/s over it"):
        table.add_column(column, justify="left" if column == "training step" else "right")
    found = []
    for name in rows:
        by_vote, by_token = (statistics.median(column) for column in zip(*speeds[name], strict=True))
        ratio = statistics.median(a[0] / b[0] for a, b in zip(speeds[first], speeds[name], strict=True))
        found.append((name, by_vote, by_token, ratio))
        table.add_row(name, f"{by_vote:,.0f}", f"{by_token:,.0f}", f"{ratio:.2f}")
    Console().print(table)
    if arguments.csv:
        with arguments.csv.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["row", "votes_per_second", "tokens_per_second", "first_row_over_it", "votes_a_prompt", "machine"])
            writer.writerows([*row, mean, machine()] for row in found)


def _model(votes: Votes, backbone: str, fuse: bool) -> tuple[P2LModel, Any, torch.optim.Optimizer]:
    config = TrainConfig.model_validate(
        {
            "proj_name": "bench", "pretrain_model_name": backbone, "train_data_path": "",
            "learning_rate": 1e-4, "head_type": "rk", "loss_type": "grk", "lora": {"r": 16}, "chat_template": TEMPLATE,
        }
    )  # fmt: skip
    model, tokenizer = build(config, len(votes.models), fuse)
    return model, tokenizer, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)


if __name__ == "__main__":
    main()
