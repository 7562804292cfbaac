"""A server to look at: the default checkpoint, a mock provider that answers, and a little traffic for the page.

    python -m bench.serve_demo [--port 8000]

Writes its configuration to build/serve-demo/serve.yaml, which is an example to copy. The mock provider answers in made-up
sentences.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import yaml

from bench.demo import PROMPTS
from p2l_engine import Catalog, Engine
from p2l_engine.apis.registry import APIS
from p2l_engine.serve import settings
from p2l_engine.serve.listener import run
from p2l_engine.serve.runtime import Runtime

FOLDER = Path("build/serve-demo")
FREE = "llama-3.1-8b-instruct"  # one model costs nothing here, as if it ran on one's own machine


def configuration(catalog: Catalog, provider: str) -> dict[str, Any]:
    """serve.yaml for the models of a catalog with prices for tokens."""
    models = {
        model.name: {
            "usd_per_m_in": 0.0 if model.name == FREE else model.usd_per_m_in,
            "usd_per_m_out": 0.0 if model.name == FREE else model.usd_per_m_out,
            "tokens_in": 100,
            "tokens_out": 60,
            "context": model.context,
            "max_output": 2048,
            "accepts": ["text", "tools", "json_schema"],
            "provider": [
                {"base_url": f"{provider}/v1", "model": model.name, "api": api, "name": f"{model.name}-{api}"} for api in APIS
            ],
        }
        for model in catalog.models
    }
    limits = [{"amount": 0.05, "window": "day"}, {"amount": 1.0, "window": "month"}]
    return {"models": models, "serve": {"budget": 0.0005, "limits": limits, "store": str(FOLDER / "serve.sqlite")}}


def ask(url: str) -> None:
    """Sends the demo's prompts once the server is up."""
    for _ in range(600):
        try:
            urllib.request.urlopen(f"{url}/readyz", timeout=1).close()
            break
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    for prompt in PROMPTS:
        turns = [prompt] if isinstance(prompt, str) else prompt
        messages = [{"role": "user", "content": turn} for turn in turns]
        body = json.dumps({"model": "auto", "messages": messages, "max_tokens": 200}).encode()
        request = urllib.request.Request(f"{url}/v1/chat/completions", body, {"content-type": "application/json"})
        try:
            urllib.request.urlopen(request, timeout=60).close()
        except urllib.error.HTTPError:
            raise
        except OSError:  # the server was stopped meanwhile
            return


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.serve_demo", description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, default=8000)
    port = parser.parse_args().port
    FOLDER.mkdir(parents=True, exist_ok=True)
    engine = Engine.from_pretrained(prefix_cache_bytes="auto")
    engine.warmup()
    command = [sys.executable, "-m", "bench.mock_provider", "--port", "0", "--per-token", "0.01"]
    provider = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert provider.stdout is not None
        address = provider.stdout.readline().split()[-1]
        file = FOLDER / "serve.yaml"
        values = configuration(Catalog.from_yaml(engine.folder / "catalog.yaml"), address)
        file.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
        url = f"http://127.0.0.1:{port}"
        threading.Thread(target=ask, args=(url,), daemon=True).start()
        print(f"open {url}  (Ctrl-C stops it; the configuration: {file})\n")
        print(f"curl {url}/v1/chat/completions -H 'content-type: application/json' \\")
        print("""  -d '{"model": "auto", "messages": [{"role": "user", "content": "Prove that 2 is prime."}]}'""", flush=True)
        run(Runtime(settings.load(file), engine, file), "127.0.0.1", port, grace=2)
    finally:
        provider.terminate()
        provider.wait()


if __name__ == "__main__":
    main()
