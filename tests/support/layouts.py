"""Conversations as files of each layout have them, and files as the tools write them."""

from __future__ import annotations

import csv
import json

import datasets
import duckdb
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

TALKS = [
    [("system", "be brief"), ("user", "one"), ("assistant", "x"), ("user", "two\nlines")],
    [("user", "three, “quoted” 'twice' \"so\"")],
    [("user", "[1] is a list"), ("assistant", ""), ("user", '{"messages": 1}')],
]
TURNS = [tuple(text for role, text in talk if role == "user") for talk in TALKS]


def chat(talk, parts=False):
    content = (lambda text: [{"type": "text", "text": text}]) if parts else (lambda text: text)
    return [{"role": role, "content": content(text)} for role, text in talk]


def openai_chat(talk, i=0, parts=False):
    body = {"model": "m", "messages": chat(talk, parts)} | ({"temperature": 0.5} if i % 2 else {})
    return {"custom_id": f"r{i}", "method": "POST", "url": "/v1/chat/completions", "body": body}


def responses_body(talk):
    """The input with a tool's call between the messages."""
    kinds = {"user": "input_text", "assistant": "output_text"}
    items = [
        {"type": "message", "role": role, "content": [{"type": kinds[role], "text": text}]}
        for role, text in talk
        if role != "system"
    ]
    items[1:1] = [
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "of a tool"},
    ]
    return {"model": "m", "instructions": "be brief", "input": items}


def openai_responses(talk, i=0):
    return {"custom_id": f"r{i}", "method": "POST", "url": "/v1/responses", "body": responses_body(talk)}


def anthropic_batch(talk, i=0):
    """Blocks, and a tool's result, which is no turn."""
    messages = [m for m in chat(talk, parts=True) if m["role"] != "system"]
    messages[1:1] = [
        {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "f", "input": {"a": 1}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": "of a tool"}]},
    ]
    return {"custom_id": f"r{i}", "params": {"model": "m", "max_tokens": 9, "system": "be brief", "messages": messages}}


def sharegpt(talk, i=0):
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return {"id": f"r{i}", "conversations": [{"from": names[role], "value": text} for role, text in talk]}


def arena(talk, i=0):
    """As arena-human-preference-140k: the parts of contents have keys for images."""
    one, other = (
        [
            {"role": role, "content": [{"type": "text", "text": text, "image": None, "mimeType": None}], "num_tokens": 3}
            for role, text in talk
        ]
        for _ in range(2)
    )
    votes = {"model_a": "x", "model_b": "y", "winner": ("model_a", "tie", "both_bad")[i % 3]}
    return {"id": f"r{i}", **votes, "conversation_a": one, "conversation_b": other}


LAYOUTS = {
    "chat": (openai_chat, "body.messages (an OpenAI batch file)"),
    "chat in parts": (lambda talk, i=0: openai_chat(talk, i, True), "body.messages (an OpenAI batch file)"),
    "responses": (openai_responses, "body.input (an OpenAI batch file)"),
    "anthropic": (anthropic_batch, "params.messages (an Anthropic batch file)"),
    "sharegpt": (sharegpt, "conversations (lists of messages, as ShareGPT's)"),
    "messages": (lambda talk, i=0: {"id": f"r{i}", "messages": chat(talk)}, "messages (lists of messages)"),
    "blocks": (lambda talk, i=0: {"id": f"r{i}", "messages": chat(talk, True)}, "messages (lists of messages)"),
    "lmsys": (
        lambda talk, i=0: {"id": f"r{i}", "conversation": chat(talk)},
        "conversation (lists of messages, as LMSYS-Chat's)",
    ),
    "arena": (arena, "conversation_a (lists of messages, as the Arena's)"),
}


def texts(rows):
    """Rows whose lists and objects are JSON, as a csv file has them."""
    return [{name: json.dumps(v) if isinstance(v, dict | list) else v for name, v in row.items()} for row in rows]


def write_csv(path, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(texts(rows))


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_duckdb(path, rows):
    """What duckdb makes of jsonl."""
    given = path.with_name(f"{path.name}.in")
    write_jsonl(given, rows)
    duckdb.sql(f"COPY (SELECT * FROM read_json('{given}', format='newline_delimited')) TO '{path}'")
    given.unlink()


WRITERS = {
    "in.jsonl": write_jsonl,
    "in.csv": write_csv,
    "arrow.parquet": lambda path, rows: pq.write_table(pa.Table.from_pylist(rows), path),
    "text.parquet": lambda path, rows: pq.write_table(pa.Table.from_pylist(texts(rows)), path),
    "pandas.parquet": lambda path, rows: pd.DataFrame(rows).to_parquet(path),
    "pandas.jsonl": lambda path, rows: pd.DataFrame(rows).to_json(path, orient="records", lines=True),
    "polars.parquet": lambda path, rows: pl.DataFrame(rows).write_parquet(path),
    "polars.ndjson": lambda path, rows: pl.DataFrame(rows).write_ndjson(path),
    "duckdb.parquet": write_duckdb,
    "datasets.parquet": lambda path, rows: datasets.Dataset.from_list(rows).to_parquet(str(path)),
}


TEXT = st.text(st.characters(codec="utf-8"), max_size=20)
TALK = st.lists(st.tuples(st.sampled_from(["user", "assistant"]), TEXT), min_size=1, max_size=6).filter(
    lambda talk: any(role == "user" for role, _ in talk)
)
