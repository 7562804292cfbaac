"""p2l-engine serve."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from p2l_engine.cli.inputs import Checkpoint, Date, Device, Dtype, load_engine
from p2l_engine.cli.terminal import LogLines, note, status

if TYPE_CHECKING:
    from p2l_engine.serve.settings import Config


def serve(
    config: Annotated[
        Path | None,
        typer.Option(
            help="YAML file with models, prices and providers. Default: decisions and the page only.", show_default=False
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=0, max=65535)] = 8000,
    check: Annotated[bool, typer.Option("--check", help="Check the configuration, print what it says, and exit.")] = False,
    log_prompts: Annotated[
        bool, typer.Option("--log-prompts", help="Keep the text of prompts in the log of decisions.")
    ] = False,
    grace: Annotated[int, typer.Option(help="Seconds that running requests get when the server stops.", min=0)] = 30,
    checkpoint: Checkpoint = None,
    device: Device = None,
    dtype: Dtype = None,
    date: Date = None,
) -> None:
    """Serve chat models at one address that OpenAI and Anthropic clients use; each request goes to the best for its money."""
    from p2l_engine.serve import settings

    found = None if config is None else settings.load(config)
    if found is not None and found.checkpoint is not None and checkpoint is not None:
        raise typer.BadParameter(f"{config} names one too; give it in one place", param_hint="--checkpoint")
    engine = load_engine(checkpoint or (found.checkpoint if found else None), device, dtype, date)
    from p2l_engine.serve.runtime import Runtime, decisions_only, run

    found = found or decisions_only(engine)
    if log_prompts:
        found = found.model_copy(update={"serve": found.serve.model_copy(update={"log_prompts": True})})
    runtime = Runtime(found, engine, config)
    if check:
        print("\n".join(runtime.plan.lines()))
        return
    with status("warming up"):
        engine.warmup()
    logging.basicConfig(level=logging.WARNING, handlers=[LogLines()])
    for line in runtime.plan.notes:
        note(line)
    _say_how_open(found, host)
    note(f"http://{host}:{port}  (Ctrl-C stops it)")
    run(runtime, host, port, grace)


def _say_how_open(config: Config, host: str) -> None:
    if not config.serve.keys and host not in ("127.0.0.1", "localhost", "::1"):
        note("serve.keys names no keys: everybody who reaches this address may spend", warning=True)
