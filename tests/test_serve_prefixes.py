"""A server whose engine remembers the turns of chats."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import aiohttp
import numpy as np
import pytest
import yaml

from p2l_engine import Engine, checkpoint
from p2l_engine.serve import settings
from tests.support import families, tiny
from tests.support.command import p2l_engine
from tests.support.serving import serving

CONFIG: dict[str, Any] = {"models": {name: {"cost": 1.0} for name in tiny.MODELS}, "unit": "points"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("served") / "tiny")


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.slow
def test_concurrent_chats_profit_and_metrics_say_so(folder, together):
    loaded = checkpoint.load(folder)
    cached, plain = (
        Engine(loaded, "cpu", "float32", prefix_cache_bytes=most) for most in (settings.Serve().prefix_cache_bytes, 0)
    )
    chats = [[f"This is the turn {t} of the chat {i}, number {i}{i}{i}." for t in range(4)] for i in range(6)]

    async def one() -> tuple[list[Any], dict[str, float]]:
        async with serving(CONFIG, cached) as server, aiohttp.ClientSession() as client:

            async def theta(prompts: list[list[str]]) -> Any:
                async with client.post(f"{server.url}/v1/coefficients", json={"prompts": prompts}) as response:
                    return (await response.json())["theta"]

            found = list[Any]()
            for n in range(1, 5):
                if together:
                    found = await theta([chat[:n] for chat in chats])
                else:
                    found = [row for (row,) in await asyncio.gather(*(theta([chat[:n]]) for chat in chats))]
            text = await (await client.get(f"{server.url}/metrics")).text()
            return found, {name: float(value) for name, value in re.findall(r"^p2l_prefix_cache_(\w+) (\S+)$", text, re.M)}

    found, told = asyncio.run(one())
    np.testing.assert_allclose(found, plain.coefficients(chats).theta, atol=1e-4)
    lengths = [[len(ids) - 1 for ids in cached.encoder.encode([chat[:n] for chat in chats])] for n in range(1, 5)]
    assert told["hits"] + told["misses"] == 24
    assert told["hits"] >= 18
    assert told["saved_tokens"] >= sum(map(sum, lengths[:-1]))
    assert told["bytes"] == cached.prefix_cache.bytes > 0
    assert told["evictions"] == 0


@pytest.mark.slow
def test_a_server_without_it_tells_nothing_of_it(folder):
    async def one() -> str:
        async with serving(CONFIG, Engine.from_pretrained(folder, "cpu")) as server, aiohttp.ClientSession() as client:
            return await (await client.get(f"{server.url}/metrics")).text()

    assert "prefix_cache" not in asyncio.run(one())


def test_mebibytes_or_auto():
    assert settings.parse(CONFIG).serve.prefix_cache_bytes == "auto"
    for given, expected in ((0, 0), (0.5, 2**19), (64, 2**26)):
        assert settings.parse({**CONFIG, "serve": {"prefix_cache_mb": given}}).serve.prefix_cache_bytes == expected
    for wrong in (-1, "much", [1]):
        with pytest.raises(settings.ConfigError, match="serve.prefix_cache_mb"):
            settings.parse({**CONFIG, "serve": {"prefix_cache_mb": wrong}})


@pytest.mark.slow
def test_the_command_refuses_what_the_backbone_cannot(folder, tmp_path):
    other = tiny.write(tmp_path / "gpt2", families.config("gpt2"))
    file = tmp_path / "serve.yaml"
    for most, of, status in ((64, other, 1), (0, other, 0), ("auto", other, 0), (64, folder, 0)):
        file.write_text(yaml.safe_dump({**CONFIG, "serve": {"prefix_cache_mb": most}}))
        done = p2l_engine("serve", "--config", str(file), "--checkpoint", str(of), "--device", "cpu", "--check")
        assert (done.status != 0) == status, done.err
        if status:
            assert "prefix_cache_bytes: expected 0 for the backbone 'transformers gpt2'" in " ".join(done.err.split())
