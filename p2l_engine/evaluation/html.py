"""The report as one HTML page that needs no other file: tables, and plots as inline SVG."""

from __future__ import annotations

import json
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from p2l_engine.evaluation import plots
from p2l_engine.jsonable import to_json
from p2l_engine.plotting import TOP
from p2l_engine.reports import BaseReport, Evaluation, Figure, Survey
from p2l_engine.tables.atomic import write_file


def write(report: BaseReport, path: Path, top: int | None = TOP) -> None:
    """Writes the page of an evaluation or a survey. top: models in its plots (None: all); its tables have all of them."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {"interval": _interval, "percent": _percent, "words": lambda name: name.replace("_", " ")}
    swaps = [
        plots.svg(lambda figure, swap=swap: plots.replacement(figure, swap), f"replacement-{i}")  # type: ignore[misc]
        for i, swap in enumerate(report.replacements or ())
    ]
    page = environment.get_template("report.html.j2").render(
        r=report,
        evaluation=report if isinstance(report, Evaluation) else None,
        survey=report if isinstance(report, Survey) else None,
        plots={name: plots.svg(draw, name) for name, draw in plots.plots_of(report, top).items()},
        swaps=swaps,
        raw=json.dumps(to_json(report), ensure_ascii=False),
    )
    write_file(path, page)


def _interval(figure: Figure | None) -> str:
    return "" if figure is None else f"{figure.value:.4f} ({figure.low:.3f} to {figure.high:.3f})"


def _percent(figure: Figure) -> str:
    return f"{100 * figure.value:.0f} ({100 * figure.low:.0f} to {100 * figure.high:.0f})"
