"""Terminal tables and plots that people can read: at 80 columns, and with 130 models in 30 categories."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from rich.console import Console

from p2l_engine import checkpoint, routing
from p2l_engine.cli import figures, plots
from p2l_engine.cli.route import decisions_table
from p2l_engine.cli.table import print_table
from p2l_engine.cli.top import cut
from p2l_engine.decision import Decision
from p2l_engine.evaluation import html
from p2l_engine.evaluation import plots as report_plots
from p2l_engine.jsonable import from_json
from p2l_engine.leaderboard import Leaderboard
from p2l_engine.plotting import BLUE, ORANGE, TOP, YELLOW
from p2l_engine.reports import (
    CategoryStrengths,
    Evaluation,
    Figure,
    Leaderboards,
    Preference,
    Replacement,
    Strengths,
    Subject,
    Survey,
)


def survey(models: int, categories: int) -> Survey:
    """Long names; the model of each rank wins most often."""
    names = tuple(f"vendor-{i:03d}-llama-3.3-nemotron-super-49b-v1" for i in range(models))
    kinds = [f"abstract algebra, integral, proof, theorem ({i})" for i in range(categories)]
    theta = np.linspace(2, -2, models)
    board = Leaderboard.ranked(names, theta, ends=(theta - 0.1, theta + 0.1)).standings
    rates = {name: Figure(float(rate), 0.0, 1.0) for name, rate in zip(names, np.linspace(1, 0, models), strict=True)}
    of = Strengths(names[models // 2], {kind: CategoryStrengths(10, rates, rates) for kind in kinds})
    worse = [Preference(kind, 10, 0.25, 0.2, 0.3, "worse") for kind in kinds]
    return Survey(
        checkpoint=Subject(names, "grk", "float32", "abc"),
        bootstrap=20,
        leaderboards=Leaderboards(board, {kind: board for kind in kinds}),
        strengths=of,
        choices={kind: tuple(np.full(models, 1 / models).tolist()) for kind in kinds},
        replacements=(Replacement(names[0], names[1], worse[0], tuple(worse)),),
        prompts=10 * categories,
        weighted=False,
    )


def printed(report, top: int | None = TOP, width: int = 80) -> list[str]:
    """The lines of the tables."""
    console = Console(width=width, file=io.StringIO())
    figures.show_strengths(report, console, top)
    figures.show_replacements(report.replacements, console)
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize(("models", "categories"), [(130, 30), (9, 14), (2, 1)])
def test_tables_fit_80_columns_and_no_cell_has_a_second_line(models, categories):
    lines = printed(survey(models, categories))
    assert max(map(len, lines)) <= 80
    shown = min(models, TOP)
    of_models = [line for line in lines if line.startswith(" vendor-") or line.startswith("  vendor-")]
    numbers = [line.split()[1:] for line in of_models]
    assert all(cells for cells in numbers)  # no name and no number is on a line of its own
    assert sum(map(len, numbers)) == 2 * shown * categories  # win rates and reliability
    assert not any("…" in cell for cells in numbers for cell in cells)
    legend = [line for line in lines if line.strip()[:1].isdigit() and "vendor" in line]
    assert len(legend) == categories


@pytest.mark.slow
def test_titles_say_what_is_left_out_and_all_shows_all():
    report = survey(130, 30)
    text = " ".join(" ".join(printed(report)).split())
    assert "20 of 130 models, --all shows all; intervals: --json, --html" in text
    assert "130 models" not in " ".join(printed(report, None))
    assert sum("vendor-129" in line or "vendor-12…" in line for line in printed(report, None)) > 0
    assert cut(20, 130) == "; 20 of 130 models, --all shows all"
    assert cut(9, 9) == ""


@pytest.mark.parametrize("width", [80, 100, 160])
def test_decisions_fit_the_terminal_and_no_cell_has_more_than_four_lines(width):
    names = [f"vendor-{i:03d}-llama-3.3-nemotron-super-49b-v1" for i in range(3)]
    mixed = Decision(names[0], {names[0]: 0.857, names[1]: 0.143}, 0.2857, 0.663, -1.25, "", 0.857)
    decisions = [mixed, Decision(names[2], {names[2]: 1.0}, 123.4, 1.0, 0.5, "", 1.0)]
    console = Console(width=width, file=io.StringIO())
    prompts = ["Prove that the square root of 2 is irrational. " * 3, ["two", "[bold]turns"]]
    console.print(decisions_table(prompts, decisions, "USD per million output tokens", width))
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    rows = [i for i, line in enumerate(lines) if line.rstrip().endswith(("-1.25", "0.50"))]
    assert rows[1] - rows[0] <= 4
    text = console.file.getvalue()
    assert "[bold]turns" in text
    assert "86% vendor-0" in text
    assert (f"14% {names[1]}" in text) == (width >= 100)


def test_tables_shorten_both_columns_of_names_alike():
    rows = [("1", "a" * 60, "b" * 30, "0.5"), ("2", "c" * 10, "d" * 30, "0.25")]
    for width in (80, 90, 110):
        console = Console(width=width, file=io.StringIO())
        print_table("a [title]", ("no.", "category", "best model", "wins, %"), rows, console)
        first, *_, last = console.file.getvalue().rstrip().splitlines()
        assert first.rstrip() == "a [title]"
        assert last.split() == ["2", "c" * 10, "d" * 30, "0.25"] if width > 80 else len(last) <= 80


@pytest.mark.parametrize(("models", "categories"), [pytest.param(130, 30, marks=pytest.mark.slow), (9, 14), (2, 1)])
def test_names_are_shortened_only_where_there_is_no_room(models, categories):
    report = survey(models, categories)
    assert not any("…" in line for line in printed(report, width=240))
    for width in (100, 120, 139, 160):
        lines = printed(report, width=width)
        assert max(map(len, lines)) <= width
        assert max(map(len, lines)) > width - 8 or not any("…" in line for line in lines)


def test_few_categories_have_their_names_in_the_table():
    report = survey(5, 2)
    short = dict(zip(("sums", "poems"), report.strengths.categories.values(), strict=True))
    report = Survey(
        checkpoint=report.checkpoint, bootstrap=20, leaderboards=report.leaderboards, prompts=20, weighted=False,
        strengths=Strengths(report.strengths.reference, short), replacements=(),
    )  # fmt: skip
    lines = printed(report)
    assert any(line.split() == ["model", "sums", "(10)", "poems", "(10)"] for line in lines)
    assert not any("no." in line for line in lines)


def test_an_evaluations_tables_fit_80_columns():
    report = from_json(
        Evaluation, json.loads((checkpoint.find("builtin/llmrouter-9") / "evaluation.json").read_text(encoding="utf-8"))
    )
    console = Console(width=80, file=io.StringIO())
    figures.show(report, console, strengths=True, top=TOP)
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    figure = report.votes.overall["p2l"]["log_loss"]
    assert any(line.split()[:5] == ["log", "loss", f"{figure.value:.4f}", f"{figure.low:.3f}", "to"] for line in lines)
    row = next(line.split() for line in lines if line.startswith(" 0.11"))
    assert row[-1] == "gemma-2-9b-it"
    assert len(row) == 9  # the budget, six routers, the best single model and its name


@pytest.mark.slow
def test_plots_and_pages_show_the_first_models_and_tables_all(tmp_path):
    report = survey(130, 3)
    for name in report_plots.plots_of(report):
        report_plots.save(name, report, tmp_path / f"{name}.svg", top=5)
    heights = {path.stem: float(path.read_text().split('height="')[1].split("pt")[0]) for path in tmp_path.glob("*.svg")}
    assert set(heights) == {"leaderboards", "ranks", "strengths", "reliability", "choices"}
    assert all(height < 72 * 6 for height in heights.values())  # inches: of 5 rows, not of 130
    html.write(report, tmp_path / "page.html", top=5)
    page = (tmp_path / "page.html").read_text().split("<script")[0]
    assert "the first 5 of 130 models" in page
    assert page.count("<td>vendor-129-llama-3.3-nemotron-super-49b-v1</td>") == 3  # leaderboard, win rates, reliability
    for colour in ("#5a9a68", "#b0413e", "green", "red;"):
        assert colour not in page


def test_colours_differ_for_colour_blind_readers():
    """In the simulation of red-green blindness by Viénot et al. (1999) any two colours stay far apart."""
    to_lms = np.array([[17.8824, 43.5161, 4.11935], [3.45565, 27.1554, 3.86714], [0.0299566, 0.184309, 1.46709]])
    protanope = np.array([[0, 2.02344, -2.52581], [0, 1, 0], [0, 0, 1]])
    deuteranope = np.array([[1, 0, 0], [0.494207, 0, 1.24827], [0, 0, 1]])
    rgb = np.array([[int(colour[i : i + 2], 16) for i in (1, 3, 5)] for colour in (BLUE, ORANGE, YELLOW)])
    for kind in (protanope, deuteranope):
        seen = (np.linalg.inv(to_lms) @ kind @ to_lms @ (255 * (rgb / 255) ** 2.2).T).T
        for i in range(3):
            for j in range(i):
                assert np.abs(seen[i] - seen[j]).max() > 50, (i, j)


@pytest.mark.slow
def test_a_frontier_of_many_models_labels_some(tmp_path, rng):
    v, costs = rng.random((8, 130)), rng.random(130) + 0.1
    names = [f"model-{i}" for i in range(130)]
    curve = routing.frontier(v, costs)
    best = {names[i] for i in np.argsort(-curve.model_value)[:TOP]}
    plots.frontier(curve, v, costs, names, "USD", "a title", tmp_path / "f.svg", best)
    assert (tmp_path / "f.svg").stat().st_size > 1000
