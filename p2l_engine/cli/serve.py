"""p2l-engine serve."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from p2l_engine.cli.inputs import Checkpoint, Date, Device, Dtype, load_engine
from p2l_engine.cli.terminal import LogLines, note, status

if TYPE_CHECKING:
    from p2l_engine.serve.settings import Config


CLUSTER = "Ray"  # the heading in the help


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
    ray: Annotated[
        str | None,
        typer.Option(
            help="Run on a Ray cluster: auto, HOST:PORT, or local to start one on this machine.",
            show_default=False,
            rich_help_panel=CLUSTER,
        ),
    ] = None,
    ray_engines: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Replicas of the engine. Default: one for each GPU, or one for each node if there is no GPU.",
            show_default=False,
            rich_help_panel=CLUSTER,
        ),
    ] = None,
    ray_fronts: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Replicas of the server in front of them. Default: one for each node.",
            show_default=False,
            rich_help_panel=CLUSTER,
        ),
    ] = None,
    checkpoint: Checkpoint = None,
    device: Device = None,
    dtype: Dtype = None,
    date: Date = None,
) -> None:
    """Serve chat models at one address that OpenAI and Anthropic clients use; each request goes to the best for its money."""
    # Before numpy is loaded: its products are small here, and threads of its own would spin while requests need the CPU.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from p2l_engine.serve import settings

    found = None if config is None else settings.load(config)
    if found is not None and found.checkpoint is not None and checkpoint is not None:
        raise typer.BadParameter(f"{config} names one too; give it in one place", param_hint="--checkpoint")
    if log_prompts and (found is None or found.serve.store is None):
        raise typer.BadParameter("needs serve.store in the configuration, which keeps the log", param_hint="--log-prompts")
    if ray is None and (ray_engines or ray_fronts):
        raise typer.BadParameter("needs --ray", param_hint="--ray-engines" if ray_engines else "--ray-fronts")
    if ray is not None:
        try:
            import p2l_engine.serve.cluster  # noqa: F401 (fails before the checkpoint is loaded)
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(f"--ray: needs {error.name}: pip install 'p2l-engine[serve-ray]'") from None
    checkpoint = checkpoint or (found.checkpoint if found else None)
    if ray is None:
        remembered = (settings.Serve() if found is None else found.serve).prefix_cache_bytes
        engine = load_engine(checkpoint, device, dtype, date, prefix_cache_bytes=remembered)
    else:
        engine = load_engine(checkpoint, "cpu", dtype, date)
    from p2l_engine.serve.listener import run
    from p2l_engine.serve.runtime import Runtime, decisions_only

    found = found or decisions_only(engine)
    runtime = Runtime(found, engine, config, log_prompts=log_prompts)
    if check:
        print("\n".join([*runtime.plan.lines(), *runtime.notes]))
        return
    if ray is None:
        with status("warming up"):
            engine.warmup()
    logging.basicConfig(level=logging.WARNING, handlers=[LogLines()])
    for line in (*runtime.plan.notes, *runtime.notes):
        note(line)
    _say_how_open(found, host)
    if ray is None:
        note(f"http://{host}:{port}  (Ctrl-C stops it)")
        run(runtime, host, port, grace)
        return
    from p2l_engine.serve.cluster import ServeCluster, signals_answered, until_stopped

    cluster = ServeCluster(
        runtime.plan.config, engine, checkpoint, ray, host, port,
        engines=ray_engines, fronts=ray_fronts, device=device, dtype=dtype, grace=grace,
    )  # fmt: skip
    with cluster, signals_answered() as hangups:
        with status("starting on the cluster"):
            cluster.start()
        note(f"http://{host}:{port}, {cluster.engines} engines, {cluster.fronts} fronts  (Ctrl-C stops it)")
        until_stopped(cluster, runtime, hangups)


def _say_how_open(config: Config, host: str) -> None:
    if not config.serve.keys and host not in ("127.0.0.1", "localhost", "::1"):
        note("serve.keys names no keys: anyone who can reach this address may spend", warning=True)
