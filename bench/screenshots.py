"""python -m bench.screenshots: the pictures of the page in docs/, of a server with the default checkpoint and a mock provider.

Needs the extras serve and test, and Debian's chromium (or --chromium PATH).
"""

from __future__ import annotations

import argparse
import asyncio
import io
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import uvicorn
from PIL import Image
from playwright.async_api import Browser, async_playwright

from bench.demo import PROMPTS
from bench.mock_provider import MockProvider
from p2l_engine import Engine
from p2l_engine.serve import settings
from p2l_engine.serve.runtime import Runtime
from p2l_engine.tables.atomic import write_file

# USD per million tokens, of input and output, and expected tokens of an answer: made up, of the usual orders of magnitude.
PRICES = {
    "codegemma-7b": (0.10, 0.20, 300),
    "gemma-2-9b-it": (0.05, 0.10, 420),
    "llama-3.1-8b-instruct": (0.03, 0.06, 380),
    "llama-3.1-nemotron-51b-instruct": (0.90, 1.80, 520),
    "llama-3.3-nemotron-super-49b-v1": (1.30, 3.90, 780),
    "llama3-chatqa-1.5-70b": (0.70, 0.90, 260),
    "llama3-chatqa-1.5-8b": (0.04, 0.08, 210),
    "mistral-7b-instruct-v0.3": (0.03, 0.05, 340),
    "qwen2.5-7b-instruct": (0.04, 0.10, 450),
}
BUDGET = 0.0004
PROMPT = PROMPTS[2]
ROUNDS = 4  # times that all prompts are asked, so that there is something to see
SIZE: Any = {"width": 1200, "height": 900}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.screenshots", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder of the pictures")
    parser.add_argument("--chromium", default="/usr/bin/chromium", help="the browser")
    arguments = parser.parse_args()
    asyncio.run(_draw(arguments.out, arguments.chromium))


async def _draw(out: Path, chromium: str) -> None:
    async with served() as url, async_playwright() as driver:
        await _traffic(url)
        browser = await driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for scheme in ("light", "dark"):
            picture = await _picture(browser, url, scheme)
            write_file(out / f"serve-{scheme}.png", picture)
            print(f"{out}/serve-{scheme}.png: {len(picture) / 1000:.0f} kB")
        await browser.close()


@asynccontextmanager
async def served() -> AsyncIterator[str]:
    """The address of a server before a mock provider, one of whose models is down."""
    tokens = {name: expected for name, (_, _, expected) in PRICES.items()}
    prices = {name: price[:2] for name, price in PRICES.items()}
    with tempfile.TemporaryDirectory() as folder:
        async with MockProvider(prices, tokens_out=tokens, first_byte=0.05) as provider:
            provider.fail("status", model="codegemma-7b", status=503)
            runtime = Runtime(settings.parse(_config(f"{provider.url}/v1", folder)), Engine.from_pretrained())
            web = uvicorn.Server(uvicorn.Config(runtime.application(), port=0, log_level="warning", lifespan="on"))
            task = asyncio.create_task(web.serve())
            while not web.started:
                if task.done():
                    task.result()
                    raise RuntimeError("the server did not start; its log says why")
                await asyncio.sleep(0.01)
            yield f"http://127.0.0.1:{web.servers[0].sockets[0].getsockname()[1]}"
            web.should_exit = True
            await task


def _config(provider: str, folder: str) -> dict[str, Any]:
    models = {
        name: {
            "usd_per_m_in": usd_in,
            "usd_per_m_out": usd_out,
            "tokens_in": 100,
            "tokens_out": expected,
            "max_output": 2000,
            "context": 32_000,
            "provider": {"base_url": provider, "model": name, "name": f"{name}-eu"},
        }
        for name, (usd_in, usd_out, expected) in PRICES.items()
    }
    limits = [{"amount": 0.5, "window": "total"}, {"amount": 0.02, "window": "day"}]
    return {"models": models, "serve": {"budget": BUDGET, "limits": limits, "store": f"{folder}/serve.sqlite"}}


async def _traffic(url: str) -> None:
    """Each prompt some times, now and then for a model by its name."""
    names = list(PRICES)
    async with aiohttp.ClientSession() as session:
        for k, prompt in enumerate(PROMPTS * ROUNDS):
            turns = [prompt] if isinstance(prompt, str) else prompt
            messages = [{"role": "user", "content": turn} for turn in turns]
            model = names[k % len(names)] if k % 7 == 6 else "auto"
            async with session.post(f"{url}/v1/chat/completions", json={"model": model, "messages": messages}) as answer:
                await answer.read()


async def _picture(browser: Browser, url: str, scheme: Any) -> bytes:
    page = await browser.new_page(viewport=SIZE, color_scheme=scheme)
    await page.goto(url)
    await page.fill("#prompt", str(PROMPT))
    await page.press("#prompt", "Control+Enter")
    await page.locator("#results[aria-busy=false]").wait_for()
    await page.locator("#live-view").wait_for()
    await page.fill("#amount", str(BUDGET))
    await page.locator("#amount").blur()
    drawn = Image.open(io.BytesIO(await page.screenshot(full_page=True)))
    await page.close()
    buffer = io.BytesIO()
    drawn.convert("RGB").quantize(96, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


if __name__ == "__main__":
    main()
