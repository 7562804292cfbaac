"""docs/architecture.md's table of rooms: it names every module, and nothing imports a room that it may not."""

from __future__ import annotations

import ast
import graphlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "p2l_engine"
BESIDE = {"kernels": ROOT / "kernels", "train": ROOT / "train"}  # they install as p2l_engine.kernels and p2l_engine.train
FILES = {
    **{file.relative_to(PACKAGE): file for file in PACKAGE.rglob("*.py") if file.relative_to(PACKAGE).parts[0] not in BESIDE},
    **{Path(name) / file.relative_to(folder): file for name, folder in BESIDE.items() for file in folder.rglob("*.py")},
}
MODULES = {
    ".".join(["p2l_engine", *path.with_suffix("").parts]).removesuffix(".__init__"): file for path, file in FILES.items()
}


def table():
    """Rooms in order, each with the modules that its line names and the text of what it may import."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = [line.strip("|").split("|") for line in page.splitlines() if re.match(r"\| `\w+(\.py|/)`", line)]
    found = {}
    for rooms, _question, modules, may_import in (row for row in rows if len(row) == 4):
        for room in re.findall(r"`(\w+)(?:\.py|/)`", rooms):
            found[room] = (re.findall(r"`(\w+)`", modules), may_import)
    return found


def room_of(module):
    return module.split(".")[1]


def imports(file, types=True):
    """The project's modules that a file imports, on first use too. types: also those that are imported for types alone."""
    found, queue = set(), [ast.parse(file.read_text(encoding="utf-8"))]
    while queue:
        node = queue.pop()
        if not types and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
            found.add(str(node.module))
        queue += ast.iter_child_nodes(node)
    return {name for name in found if name in MODULES and name != "p2l_engine"}


@pytest.mark.parametrize("room", [room for room in table() if (PACKAGE / room).is_dir() and any((PACKAGE / room).glob("*.py"))])
def test_every_module_is_in_the_table(room):
    modules = {file.stem for file in (PACKAGE / room).glob("*.py")} - {"__init__", "__main__"}
    if room != "cli":  # one module for each command
        assert set(table()[room][0]) == modules


def test_every_room_is_in_the_table():
    rooms = {room_of(module) for module in MODULES if module not in ("p2l_engine", "p2l_engine.__main__")}
    assert rooms - set(BESIDE) == {room for room in table() if room != "builtin"}


@pytest.mark.slow
def test_nothing_imports_a_room_that_it_may_not():
    rooms = table()
    order = list(rooms)

    def may(room, other):
        allowed = set(re.findall(r"\w+", rooms[room][1]))
        return order.index(other) < order.index(room) and bool({other, "everything", "all"} & allowed)

    for module, file in MODULES.items():
        room = room_of(module) if "." in module else ""
        others = {room_of(name) for name in imports(file)} - {room, *BESIDE}
        assert room not in rooms or [other for other in sorted(others) if not may(room, other)] == [], module


@pytest.mark.slow
def test_no_modules_import_each_other():
    graph = {name: imports(file, types=False) - {name} for name, file in MODULES.items() if name != "p2l_engine"}
    graph = {name: {other for other in found if not name.startswith(f"{other}.")} for name, found in graph.items()}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


@pytest.mark.slow
def test_every_class_has_a_name_of_its_own():
    names = [
        node.name
        for file in MODULES.values()
        for node in ast.parse(file.read_text("utf-8")).body
        if isinstance(node, ast.ClassDef)
    ]
    assert {name for name in names if names.count(name) > 1} == set()


def test_no_test_imports_another():
    for file in (ROOT / "tests").rglob("test_*.py"):
        found = re.findall(r"^\s*(?:from|import) tests\.(\w+)", file.read_text(encoding="utf-8"), re.M)
        assert set(found) <= {"support"}, file.name
