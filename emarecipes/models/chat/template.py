"""A Hugging Face chat template: found in a folder, compiled, and rendered as transformers does."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from jinja2 import meta
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from omegaconf import OmegaConf

from emarecipes.clock import midnight, today
from emarecipes.config import suggestion
from emarecipes.errors import UserError

if TYPE_CHECKING:
    from emarecipes.models.chat.layout import Layout

_CLOCK = "strftime_now"  # By which templates read it, as transformers offers it.
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token")
# Variables whose values stand around what `{% generation %}` encloses.
_BEGINS, _ENDS = "generation_begins", "generation_ends"
_OURS = frozenset({"messages", "add_generation_prompt", _BEGINS, _ENDS, *_NAMED_TOKENS})


class ChatTemplate:
    """A compiled chat template.

    Attributes:
        layouts: What it writes around messages, by their roles, see `find_layout`.

    Args:
        folder: the model's folder.
        config: what its ``tokenizer_config.json`` holds.
        given: a template to use instead of the folder's own: Jinja text, or the path of a file
            whose name ends in ``.jinja``.
        date: the day, at 0:00, for a template that reads the clock; None: today.
        arguments: values of variables that the template reads, such as ``enable_thinking``.

    Attributes:
        date: that day; None where the template does not read the clock.
        marks_answers: whether it marks answers with ``{% generation %}``.

    Raises:
        UserError: the folder has no chat template, or the template is not valid Jinja; no such
            day, or a template that would not read it; an argument that it does not read.
    """

    def __init__(
        self,
        folder: Path,
        config: Mapping[str, Any],
        given: str | None = None,
        date: str | None = None,
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        self._origin, source = _find_source(folder, config, given)
        self._variables = {
            key: name for key in _NAMED_TOKENS if (name := token_name(config, key)) is not None
        }
        # One day for a whole run: what a template prints must not change in mid-training.
        day = today() if date is None else date
        environment = _environment()
        environment.globals[_CLOCK] = midnight(day).strftime
        try:
            parsed = environment.parse(source)
            reads_clock = any(node.name == _CLOCK for node in parsed.find_all(jinja2.nodes.Name))
            self._template = environment.from_string(source)
            self._literals = _literals(parsed)
            read = meta.find_undeclared_variables(parsed)
        except jinja2.TemplateError as error:
            raise UserError(f"{self._origin}: not a valid chat template: {error}") from error
        if date is not None and not reads_clock:
            raise UserError(
                f"date has no effect: the chat template of {self._origin} does not read the clock; "
                "leave it out"
            )
        self.date = day if reads_clock else None
        self.marks_answers = _BEGINS in read
        self._arguments = _plain(arguments)
        self._check_arguments(read - _OURS)
        self.layouts: dict[tuple[tuple[str, ...], bool], Layout | None] = {}
        self._warned: set[str] = set()

    def _check_arguments(self, read: set[str]) -> None:
        for name in self._arguments:
            if name in read:
                continue
            reason = "does not read it"
            if name in _OURS:
                reason = "gets it from the conversation or the tokenizer"
            known = f"it reads {', '.join(sorted(read))}" if read else "it reads none"
            raise UserError(
                f"template_arguments.{name} has no effect: the chat template of {self._origin} "
                f"{reason}{suggestion(name, read)}; {known}"
            )

    def render(
        self,
        messages: Sequence[Mapping[str, str]],
        add_generation_prompt: bool = False,
        marks: tuple[str, str] = ("", ""),
    ) -> str:
        """Return the conversation as text.

        Args:
            messages: each with ``role`` and ``content``.
            add_generation_prompt: end with what precedes the model's next answer.
            marks: what to write before and behind a text within ``{% generation %}``.

        Raises:
            UserError: the template refuses the conversation.
        """
        try:
            return self._template.render(
                {"tools": None, "documents": None, **self._variables, **self._arguments},
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                **dict(zip((_BEGINS, _ENDS), marks, strict=True)),
            )
        except Exception as error:  # A template is a program: it may raise anything.
            raise UserError(f"{self._origin}: the chat template failed: {error}") from error

    def may_look_for(self, text: str) -> bool:
        """Whether the text has something in it that the template names, such as ``</think>``."""
        return self._literals.search(text) is not None

    def warn_once(self, problem: str) -> None:
        """Log a line that names the template, the first time."""
        if problem not in self._warned:
            from torchtune import utils  # Late: it takes seconds.

            self._warned.add(problem)
            line = f"{self._origin}: the chat template {problem}"
            utils.log_rank_zero(utils.get_logger("INFO"), line, level=logging.WARNING)

    def fail(self, problem: str) -> UserError:
        """Return an error that names the template."""
        return UserError(f"{self._origin}: the chat template {problem}")


def _literals(tree: jinja2.nodes.Template) -> re.Pattern[str]:
    """Return what finds the template's strings in a text, but for words, spaces and punctuation."""
    values = {const.value for const in tree.find_all(jinja2.nodes.Const)}
    long = [value for value in values if isinstance(value, str) and len(value.strip()) >= 3]
    marked = sorted(value.strip() for value in long if re.search(r"[^\w\s]", value))
    return re.compile("|".join(map(re.escape, marked)) or "(?!)")


def token_name(config: Mapping[str, Any], key: str) -> str | None:
    """Return the token that ``config`` names under ``key``; it may be written as a dictionary."""
    token = config.get(key)
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else None


def model_folder(path: str) -> Path:
    """Return the folder that a tokenizer's `path` means: itself, or that of `tokenizer.json`."""
    return Path(path).parent if Path(path).name == "tokenizer.json" else Path(path)


def read_config(folder: Path) -> dict[str, Any]:
    """Return what `tokenizer_config.json` holds; nothing if there is none."""
    file = folder / "tokenizer_config.json"
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: not valid JSON ({error})") from error
    if not isinstance(config, dict):
        raise UserError(f"{file}: not a JSON object")
    return config


def _find_source(folder: Path, config: Mapping[str, Any], given: str | None) -> tuple[str, str]:
    """Return where the template comes from, for messages, and its text."""
    if given is not None:
        if not given.endswith(".jinja"):
            return "chat_template", given
        try:
            return given, Path(given).read_text(encoding="utf-8")
        except OSError as error:
            raise UserError(f"chat_template: cannot read {given}: {error.strerror}") from error
    own_file = folder / "chat_template.jinja"
    if own_file.is_file():  # transformers too lets it win over tokenizer_config.json
        return str(own_file), own_file.read_text(encoding="utf-8")
    origin = str(folder / "tokenizer_config.json")
    source = config.get("chat_template")
    if isinstance(source, list):
        named = {entry["name"]: entry["template"] for entry in source}
        if "default" not in named:
            raise UserError(
                f"{origin}: has the chat templates {', '.join(named)} and none named default; "
                "pass the one you mean as chat_template"
            )
        source = named["default"]
    if not isinstance(source, str):
        raise UserError(
            f"{folder}: no chat template, neither in tokenizer_config.json nor as "
            "chat_template.jinja; take an instruction-tuned model or pass chat_template"
        )
    return origin, source


def _plain(arguments: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return a config's mapping as a dictionary of plain values."""
    given: Any = arguments
    if OmegaConf.is_config(given):
        given = OmegaConf.to_container(given)
    if given is not None and not isinstance(given, Mapping):
        raise UserError(
            f"template_arguments must be a mapping such as {{enable_thinking: false}}, not "
            f"{given!r}"
        )
    return {str(name): value for name, value in (given or {}).items()}


class _GenerationTag(Extension):
    """``{% generation %}`` marks answers; it renders as its content, between two variables."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own way)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        begins, ends = (
            jinja2.nodes.Output([jinja2.nodes.Name(name, "load")], lineno=line)
            for name in (_BEGINS, _ENDS)
        )
        return [begins, jinja2.nodes.Scope(body, lineno=line), ends]


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationTag]
    )
    # Beside the clock, what else would give a row other tokens each time that it is read.
    del environment.filters["random"], environment.globals["lipsum"]
    environment.globals["raise_exception"] = _raise_exception
    environment.filters["tojson"] = _to_json
    return environment


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
