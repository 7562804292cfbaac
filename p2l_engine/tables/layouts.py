"""Where a table has its prompts: in a column that the user names, in ``prompt``, or where files of a known layout have them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from p2l_engine.strict_json import DuplicateKeyError
from p2l_engine.tables.chunked import AT_THE_SAME_TIME, has_rows
from p2l_engine.tables.nested import MISSING, as_object, object_of, split_column, value_at
from p2l_engine.tables.rows import InvalidRow, listed, missing_columns, readable
from p2l_engine.tables.samples import has_content, sample_cells, sample_names
from p2l_engine.tables.storage import File
from p2l_engine.tables.turns import CHATS, OF_REQUESTS, URL, cell_turns, is_chat, listed_in, not_a_chat
from p2l_engine.tables.whole import Table, read_table

logger = logging.getLogger(__name__)

Cells = Literal["prompts", "requests", "messages"]
PROMPT = "prompt"
OTHER_PROMPTS = "take them out, or name the column of the prompts with --column"


class FileLayout(NamedTuple):
    """A kind of files that has the prompts in a column of its own. requests: whether its cells are requests' bodies, else they
    are lists of messages."""

    column: str
    what: str
    requests: bool = False


LAYOUTS = (
    FileLayout("body", "an OpenAI batch file", requests=True),
    FileLayout("params", "an Anthropic batch file", requests=True),
    FileLayout("messages", "lists of messages"),
    FileLayout("conversations", "lists of messages, as ShareGPT's"),
    FileLayout("conversation", "lists of messages, as LMSYS-Chat's"),
    FileLayout("conversation_a", "lists of messages, as the Arena's"),
)


@dataclass(frozen=True, slots=True)
class PromptColumn:
    """The column of a table that has the prompts, and the path within its cells ("": the cells themselves). cells: what they
    are: prompts as users write them, requests' bodies, or lists of messages; text holds the last two as JSON."""

    column: str = PROMPT
    path: str = ""
    cells: Cells = "prompts"

    @property
    def name(self) -> str:
        """As ``--column`` names it."""
        return f"{self.column}.{self.path}" if self.path else self.column

    @property
    def of_requests(self) -> bool:
        """Whether the cells of ``column`` are requests' bodies: also where a path within them was named."""
        return self.cells == "requests" or (self.path in OF_REQUESTS and bool(_layouts_of((self.column,), requests=True)))

    def value(self, cell: Any) -> Any:
        """What a cell of ``column`` has as its prompt: text, a list, or a request's body. Raises ValueError."""
        if cell is None or (self.cells == "prompts" and not self.path):
            return cell
        try:
            if self.path:
                return value_at(cell, self.path)
            return _request(cell) if self.cells == "requests" else _conversation(cell)
        except DuplicateKeyError as error:
            raise ValueError(f"{self.column}: expected each key of an object once, {error}") from None
        except ValueError as error:
            raise ValueError(f"{self.column}: {error}") from None

    def turns(self, cell: Any, plain_text: bool = False) -> tuple[str, ...]:
        """The user's turns of a cell of ``column``. Raises ValueError."""
        return cell_turns(self.value(cell), plain_text, as_served=True)


def prompt_column(files: Sequence[File], column: str | PromptColumn | None, plain_text: bool = False) -> PromptColumn:
    """Where these files have their prompts, which is the same for all. column: as the user names it, also one within another
    (``body.messages``), or as it was found before; None: ``prompt``, or what the layout says, which is logged in one line.
    Raises ValueError where several columns may be meant, and where files differ."""
    if isinstance(column, PromptColumn):
        return column
    if column is not None and "." not in column and not _layouts_of((column,), requests=True):
        return PromptColumn(column)

    def look(file: File) -> tuple[PromptColumn, str] | None:
        """None: the file has no rows that could tell."""
        with readable(file):
            names = sample_names(file, lambda names: _has_prompts(names, column))
            if not names:
                return None
            try:
                return recognise(names, lambda name: sample_cells(file, name), file.shown, column, plain_text)
            except ValueError:
                if has_rows(file):
                    raise
                return None

    place, first = next(((i, found) for i, found in enumerate(map(look, files)) if found), (0, None))
    if first is None or first[0] == PromptColumn():
        return PromptColumn(PROMPT if column is None else column)  # the readers name the files without it
    with ThreadPoolExecutor(AT_THE_SAME_TIME) as pool:  # stores answer slowly
        others = files[place + 1 :]
        for file, found in zip(others, pool.map(look, others), strict=True):
            if found and found[0] != first[0]:
                raise ValueError(
                    f"{file.shown}: expected its prompts in {first[0].name}, as {files[place].shown} has them: name the column "
                    "with --column, or read the files one by one"
                )
    if first[1]:
        logger.info("%s: %s", files[place].shown, first[1])
    return first[0]


def read_prompts(
    path: str | Path,
    column: str | None,
    also: Collection[str] = (),
    bare: bool = False,
    csv_escape: str | None = None,
) -> tuple[Table, PromptColumn]:
    """A table (see ``whole.read_table``) with the column of its prompts, see ``prompt_column``, and those of ``also`` that it
    has. bare: whether lines of jsonl may be prompts themselves. A column that the user names may be missing."""
    wanted = PROMPT if column is None else column
    table = read_table(path, (wanted, *also), wanted if bare else None, csv_escape=csv_escape)
    where = PromptColumn(wanted)
    if table.names and (wanted not in table.columns or _layouts_of((wanted,), requests=True)):
        names = {split_column(wanted, table.names)[0], URL, *(layout.column for layout in LAYOUTS)}
        head = read_table(path, names, wanted if bare else None, heads=True, csv_escape=csv_escape, again=True)

        def cells(name: str) -> Sequence[Any]:
            first = head.columns.get(name, [])
            if has_content(first):
                return first
            return read_table(path, (name,), csv_escape=csv_escape, again=True).columns.get(name, [])

        where, line = recognise(table.names, cells, table.shown, column)
        also = (*also, URL) if where.cells == "requests" else also
        if {where.column, *also} & set(table.names) - set(table.columns):
            table = read_table(path, (where.column, *also), where.column if bare else None, csv_escape=csv_escape, again=True)
        if line:
            logger.info("%s: %s", table.shown, line)
        for i, url in enumerate(table.columns.get(URL, []) if where.cells == "requests" else []):
            if not is_chat(url):
                raise ValueError(f"{table.located(i)}: {not_a_chat(url)}; {OTHER_PROMPTS}")
    return table, where


def recognise(
    names: Sequence[str],
    cells: Callable[[str], Sequence[Any]],
    shown: str,
    column: str | None = None,
    plain_text: bool = False,
) -> tuple[PromptColumn, str]:
    """Where a table has its prompts, and what there is to say of it. names: its columns; cells: the first of a column, up to
    some that are not empty. See ``prompt_column``."""
    if column is not None:
        return _named(column, names, cells, shown), ""
    if PROMPT in names:
        return PromptColumn(), ""
    here = {layout: [cell for cell in cells(layout.column) if cell is not None] for layout in _layouts_of(names)}
    fitting = {layout: fits for layout, some in here.items() if (fits := [c for c in some if _fits(layout, c, plain_text)])}
    if len(fitting) > 1:
        choices = " and ".join(f"{layout.column} ({layout.what})" for layout in fitting)
        raise ValueError(f"{shown}: expected one column of prompts, found {choices}: name one with --column")
    if "body" in names and URL in names and not {layout.column for layout in fitting} - {"body"}:
        _check_chats(shown, cells(URL))
    if not fitting:
        _check_no_python(shown, here)
        raise ValueError(f"{missing_columns(shown, [PROMPT], names)}; --column names another column of prompts")
    (layout, found), *_ = fitting.items()
    if layout.requests:
        keys = {key for cell in found for key in _request_keys(cell)}
        read = f"{layout.column}.{keys.pop()}" if len(keys) == 1 else layout.column
        return PromptColumn(layout.column, cells="requests"), f"reading the user turns of {read} ({layout.what})"
    return PromptColumn(layout.column, cells="messages"), f"reading the user turns of {layout.column} ({layout.what})"


def _named(column: str, names: Sequence[str], cells: Callable[[str], Sequence[Any]], shown: str) -> PromptColumn:
    name, path = split_column(column, names)
    if not path:
        of_requests = _layouts_of((name,), requests=True) and name in names
        fits = bool(of_requests) and any(_fits(LAYOUTS[0], cell, False) for cell in cells(name))
        return PromptColumn(name, cells="requests" if fits else "prompts")
    found = [cell for cell in cells(name) if cell is not None and not isinstance(cell, InvalidRow)]
    keys: dict[str, None] = {}
    for cell in found:
        try:
            keys |= dict.fromkeys(object_of(cell))
            if value_at(cell, path, MISSING) is not MISSING:
                return PromptColumn(name, path)
        except ValueError:  # an error of its row, and of the run where no row is another
            continue
    if found:
        within = f"which has {listed(list(keys))}" if keys else "whose cells are no objects"
        raise ValueError(f"{shown}: expected {path!r} within the column {name!r}, {within}")
    return PromptColumn(name, path)


def _has_prompts(names: Collection[str], column: str | None) -> bool:
    """Whether one of these names is that of the prompts' column, or of one that a layout has them in."""
    if column is None:
        return PROMPT in names or bool(_layouts_of(names))
    return split_column(column, list(names))[0] in names


def _layouts_of(names: Iterable[str], requests: bool = False) -> list[FileLayout]:
    """The layouts whose column is among these names. requests: those of requests alone."""
    found = set(names)
    return [layout for layout in LAYOUTS if layout.column in found and (layout.requests or not requests)]


def _fits(layout: FileLayout, cell: Any, plain_text: bool) -> bool:
    """Whether a cell is a request's body or a list of messages, or text that is one."""
    if isinstance(cell, str) and not layout.requests and plain_text:
        return False
    try:
        return bool(_request_keys(cell) if layout.requests else _conversation(cell))
    except ValueError:
        return False


def _request(cell: Any) -> Mapping[str, Any]:
    body = object_of(cell)
    if not any(body.get(key) is not None for key in OF_REQUESTS):
        raise ValueError(f"expected a request with {' or '.join(OF_REQUESTS)}, got one with {listed(list(body))}")
    return body


def _request_keys(cell: Any) -> list[str]:
    """Where a request's body, or text that is one, has the conversation."""
    body = object_of(cell)
    return [key for key in OF_REQUESTS if isinstance(body.get(key), list | str)]


def _conversation(cell: Any) -> list[Any]:
    items = listed_in(cell.strip()) if isinstance(cell, str) else cell
    if not isinstance(items, list):
        raise ValueError(f"expected a list of messages, got {cell!r:.60}")
    for item in items:
        message = as_object(item)
        if not isinstance(message, Mapping) or not (message.get("role") or message.get("from")):
            raise ValueError(f"expected messages with a role (or from), got {item!r:.60}")
    return items


def _check_no_python(shown: str, cells: Mapping[FileLayout, Sequence[Any]]) -> None:
    """Refuses lists and objects that pandas wrote into a csv file."""
    for layout, some in cells.items():
        for cell in some:
            if isinstance(cell, str) and cell.startswith(("[{'", "{'")):
                raise ValueError(
                    f"{shown}: column {layout.column!r}: expected JSON, got {cell!r:.60}, as Python shows objects: write them "
                    "with json.dumps, or the table as jsonl or parquet"
                )


def _check_chats(shown: str, urls: Iterable[Any]) -> None:
    others = {url for url in urls if not is_chat(url)}
    if others:
        raise ValueError(
            f"{shown}: expected requests to a chat model ({', '.join(CHATS)}), got some to {listed(sorted(others))}: "
            f"{OTHER_PROMPTS}"
        )
