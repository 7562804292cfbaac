"""Chat templates: Jinja2 in the sandbox that transformers renders them in, with its filters, functions and tags."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import date as Date
from datetime import datetime
from functools import cached_property
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes, pass_eval_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace


class ChatTemplate:
    """A chat template over user turns, without a generation prompt.

    variables: what it may read besides the messages: the tokenizer's special tokens by name (``bos_token``, ...). date: what
    the clock shows to a template that reads it (``strftime_now``): a date or time, or its text in ISO 8601; None: such a
    template cannot be rendered, because coefficients would change from day to day. Raises ValueError for other text.
    """

    def __init__(self, source: str, variables: Mapping[str, Any], date: str | Date | None = None) -> None:
        self.source, self.variables = source, dict(variables)
        shown = None if date is None else _moment(date)
        self.date = shown if "strftime_now" in source else None

    def render(self, turns: Sequence[str]) -> str:
        """The text of user turns, one message each, or joined to one by blank lines where the template ``joins``.

        Raises jinja2's TemplateError, and whatever else a template can raise, where it cannot be rendered.
        """
        return self._render(["\n\n".join(turns)] if len(turns) > 1 and self.joins else turns)

    @cached_property
    def joins(self) -> bool:
        """Whether the template refuses consecutive user messages, as those do that demand alternating roles."""
        try:
            self._render(["a"])
        except Exception:  # refuses any message: nothing would be gained
            return False
        try:
            self._render(["a", "b"])
        except TemplateError:
            return True
        return False

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled: a compiled template cannot be, and is made again."""
        return {name: value for name, value in self.__dict__.items() if name != "_compiled"}

    @cached_property
    def _compiled(self) -> Template:
        return _environment(self.date).from_string(self.source)

    def _render(self, turns: Sequence[str]) -> str:
        messages = [{"role": "user", "content": str.__str__(turn)} for turn in turns]  # never a subclass with own methods
        return self._compiled.render(
            messages=messages, tools=None, documents=None, add_generation_prompt=False, **self.variables
        )


def _environment(date: datetime | None) -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": lambda form: _strftime(date, form),
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    return environment


class _Generation(Extension):
    """``{% generation %}`` marks an assistant's tokens for training; here its body is rendered unchanged."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    @pass_eval_context
    def _body(self, context: nodes.EvalContext, caller: Any) -> Any:
        return caller()


class _Dict:
    """``dict`` without its other attributes, through which a template could leave the sandbox."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """``namespace`` without attributes that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # so that a template may set an attribute named self
        self, given = args[0], dict(*args[1:], **kwargs)
        for name in given:
            _check_attribute(name)
        Namespace.__init__(self, given)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)


def _check_attribute(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a chat template cannot set the attribute {name!r} of a namespace")


def _moment(date: str | Date) -> datetime:
    """Midnight, where no time is given."""
    try:
        return datetime.fromisoformat(str(date))
    except ValueError:
        raise ValueError(f"date: expected a date like 2026-01-31, got {date!r}") from None


def _strftime(date: datetime | None, form: str) -> str:
    if date is None:
        raise TemplateError(
            "it reads the clock (strftime_now), so that coefficients would change from day to day: give the date that it shall "
            "write (date='2026-01-31', --date 2026-01-31, or date: in the training config)"
        )
    return date.strftime(form)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Unlike Jinja2's own filter it does not escape HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
