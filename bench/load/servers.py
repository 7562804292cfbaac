"""The servers that are compared: the provider itself, this project's, LiteLLM's proxy, the published P2L server's design."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from bench.load.process import Process, free_port

PRICES = (0.5, 1.5, 0.05)  # USD for a million tokens: input, output, cached input


@dataclass(frozen=True)
class Subject:
    """A running server. model: what a request asks it for. processes: whose CPU time is its own."""

    name: str
    port: int
    model: str
    processes: tuple[Process, ...] = ()

    def cpu(self) -> float:
        """CPU seconds so far."""
        return sum(process.cpu() for process in self.processes)

    def memory(self) -> float:
        """Resident MiB."""
        return sum(process.memory() for process in self.processes)


def prices(models: Sequence[str]) -> dict[str, tuple[float, float, float]]:
    """USD for a million tokens of each model, each a little dearer than the one before."""
    usd_in, usd_out, usd_cached = PRICES
    return {  # rounded: a ledger counts in billionths
        name: (round(usd_in * times, 3), round(usd_out * times, 3), round(usd_cached * times, 3))
        for times, name in enumerate(models, 1)
    }


@contextlib.contextmanager
def provider(
    folder: Path, models: Sequence[str], tokens_out: int = 50, per_token: float = 0.0, first_byte: float = 0.0
) -> Iterator[Process]:
    """The mock provider."""
    file, port = folder / "prices.json", free_port()
    file.write_text(json.dumps(prices(models)), encoding="utf-8")
    command = [sys.executable, "-m", "bench.mock_provider", "--port", str(port), "--prices", str(file), "--keep", "1"]
    command += ["--tokens-out", str(tokens_out), "--per-token", str(per_token), "--first-byte", str(first_byte)]
    with Process(command, port, "/_requests?last=1") as process:
        yield process


def config(port: int, models: Sequence[str], apis: Sequence[str] = ("chat",), **serve: Any) -> dict[str, Any]:
    """Our configuration of these models at a mock provider on a port."""
    entries = {}
    for name, (usd_in, usd_out, usd_cached) in prices(models).items():
        entries[name] = {
            "usd_per_m_in": usd_in, "usd_per_m_out": usd_out, "usd_per_m_cached": usd_cached,
            "tokens_in": 100, "tokens_out": 50, "max_output": 1000, "cached_from": 1,
            "provider": [
                {"base_url": f"http://127.0.0.1:{port}/v1", "model": name, "api": api, "name": f"{name}-{api}"} for api in apis
            ],
        }  # fmt: skip
    return {"models": entries, "serve": serve}


@contextlib.contextmanager
def ours(
    name: str, folder: Path, settings: Mapping[str, Any], checkpoint: str | None, options: Sequence[str] = ()
) -> Iterator[Subject]:
    """``p2l-engine serve``."""
    file, port = folder / f"{name.replace(' ', '-').replace(',', '')}.yaml", free_port()
    file.write_text(yaml.safe_dump(dict(settings)), encoding="utf-8")
    command = [sys.executable, "-m", "p2l_engine", "serve", "--config", str(file), "--port", str(port), *options]
    command += [] if checkpoint is None else ["--checkpoint", checkpoint]
    with Process(command, port, "/readyz") as process:
        yield Subject(name, port, "auto", (process,))


@contextlib.contextmanager
def litellm(folder: Path, environment: Path, mock_port: int, models: Sequence[str]) -> Iterator[Subject]:
    """LiteLLM's proxy in an environment of its own, without database, keys or callbacks; one worker, its default."""
    file, port = folder / "litellm.yaml", free_port()
    entries = [
        {
            "model_name": name,
            "litellm_params": {"model": f"openai/{name}", "api_base": f"http://127.0.0.1:{mock_port}/v1", "api_key": "-"},
        }
        for name in models
    ]
    file.write_text(yaml.safe_dump({"model_list": entries, "litellm_settings": {"telemetry": False}}), encoding="utf-8")
    command = [str(environment / "bin" / "litellm"), "--config", str(file), "--host", "127.0.0.1", "--port", str(port)]
    alone = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR", "PYTHONPATH": ""}
    with Process(command, port, "/health/readiness", alone, folder=folder) as process:
        yield Subject("LiteLLM proxy", port, models[0], (process,))


@contextlib.contextmanager
def published(folder: Path, checkpoint: str | None, mock_port: int, models: Sequence[str]) -> Iterator[Subject]:
    """The published design, see ``bench.published_server``."""
    file, engine_port, port = folder / "published.json", free_port(), free_port()
    settings = {
        "engine": f"http://127.0.0.1:{engine_port}", "provider": f"http://127.0.0.1:{mock_port}/v1",
        "costs": {name: usd_out for name, (_, usd_out, _) in prices(models).items()},
    }  # fmt: skip
    file.write_text(json.dumps(settings), encoding="utf-8")
    command = [sys.executable, "-m", "bench.published_server"]
    engine_command = [*command, "engine", "--port", str(engine_port)]
    engine_command += [] if checkpoint is None else ["--checkpoint", checkpoint]
    with (
        Process(engine_command, engine_port, "/models", headers={"api-key": "-"}) as engine,
        Process(
            [*command, "router", "--port", str(port), "--settings", str(file)],
            port,
            "/v1/models",
            headers={"authorization": "Bearer -"},
        ) as router,
    ):
        yield Subject("published design", port, "auto", (router, engine))


def direct(mock: Process, models: Sequence[str]) -> Subject:
    """The provider, without a server in between."""
    return Subject("direct", mock.port, models[0], (mock,))


def litellm_version(environment: Path) -> str:
    """Raises ValueError for a release that was compromised, and where there is none."""
    found = sorted(environment.glob("lib/python*/site-packages/litellm-*.dist-info"))
    if not found:
        raise ValueError(f"--litellm: expected an environment with litellm, found none in {environment}")
    version = found[0].name.removeprefix("litellm-").removesuffix(".dist-info")
    if version in ("1.82.7", "1.82.8"):
        raise ValueError(f"--litellm: {version} was compromised; install another release, such as 1.81.16")
    return version
