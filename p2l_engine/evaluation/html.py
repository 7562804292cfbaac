"""The report as one HTML page that needs nothing else: tables, and plots as SVG within it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from p2l_engine.evaluation import plots
from p2l_engine.evaluation.routed import BESIDE


def write(report: dict[str, Any], path: Path) -> None:
    """Writes the page. report: of ``report.evaluate`` or ``report.survey``."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {"interval": _interval, "words": lambda name: name.replace("_", " ")}
    drawn = {name: plots.svg(draw, report, name) for name, draw in plots.PLOTS.items() if plots.has(report, name)}
    swaps = [plots.svg(plots.replacement, swap, f"replacement-{i}") for i, swap in enumerate(report.get("replacements", []))]
    page = environment.get_template("report.html.j2").render(
        r=report, plots=drawn, swaps=swaps, beside=BESIDE, raw=json.dumps(report, ensure_ascii=False)
    )
    path.write_text(page, encoding="utf-8")


def _interval(figure: dict[str, float] | None) -> str:
    return "" if figure is None else f"{figure['value']:.4f} ({figure['low']:.3f} to {figure['high']:.3f})"
