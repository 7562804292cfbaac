"""The pictures of the page in docs/: of the server that `make serve` starts, in light and in dark colours.

make serve                      # in another terminal
python -m bench.screenshots     # with the extra test, and Debian's chromium
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path
from typing import Literal

from PIL import Image
from playwright.sync_api import Browser, sync_playwright

from bench.demo import PROMPTS
from p2l_engine.tables.atomic import write_file

PROMPT = str(PROMPTS[2])
STEPS = 300  # of the slider's 1000, from the left


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.screenshots", description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of the server")
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder of the pictures")
    parser.add_argument("--chromium", default="/usr/bin/chromium", help="the browser")
    arguments = parser.parse_args()
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=arguments.chromium, args=["--no-sandbox"])
        for scheme in ("light", "dark"):
            drawn = picture(browser, arguments.url, scheme)
            write_file(arguments.out / f"serve-{scheme}.png", drawn)
            print(f"{arguments.out}/serve-{scheme}.png: {len(drawn) / 1000:.0f} kB")
        browser.close()


def picture(browser: Browser, url: str, scheme: Literal["light", "dark"]) -> bytes:
    """The whole page with a ranked prompt, as a PNG of few colours."""
    page = browser.new_page(viewport={"width": 1200, "height": 900}, color_scheme=scheme)
    page.goto(url)
    page.fill("#prompt", PROMPT)
    page.press("#prompt", "Control+Enter")
    page.locator("#results[aria-busy=false]").wait_for()
    page.locator("#live-view").wait_for()
    page.fill("#budget", str(STEPS))
    page.locator("#budget").blur()
    shot = Image.open(io.BytesIO(page.screenshot(full_page=True)))
    page.close()
    buffer = io.BytesIO()
    shot.convert("RGB").quantize(96, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


if __name__ == "__main__":
    main()
