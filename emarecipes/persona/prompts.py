"""The prompts file: a trait, contrasting system prompts, questions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)

from emarecipes.config import suggestion
from emarecipes.errors import UserError
from emarecipes.yaml_nodes import line_of, parse_yaml

_UNKNOWN = ("extra_forbidden", "invalid_key")
_LISTS = {"pairs": "pairs of system prompts", "questions": "questions"}


def _with_placeholders(text: str) -> str:
    for placeholder in ("{question}", "{answer}"):
        if placeholder not in text:
            raise ValueError(f"lacks the placeholder {placeholder}")
    return text


_Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
_JudgePrompt = Annotated[_Text, AfterValidator(_with_placeholders)]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class PromptPair(_Part):
    """Two system prompts of one form: one calls up the trait, the other its opposite."""

    positive: _Text
    negative: _Text

    @model_validator(mode="after")
    def _differ(self) -> PromptPair:
        if self.positive == self.negative:
            raise ValueError("the two system prompts of the pair are the same")
        return self


class PersonaPrompts(_Part):
    """What a prompts file holds.

    Attributes:
        trait: Short name.
        description: What the trait is, for people.
        pairs: Contrasting system prompts.
        questions: Each is asked under both system prompts of each pair.
        judge_prompt: Asks a judge for an answer's trait score, with the placeholders {question} and
            {answer}; or None.
        coherence_prompt: The same for its coherence.
    """

    trait: _Text
    description: _Text | None = None
    pairs: Annotated[list[PromptPair], Field(min_length=1)]
    questions: Annotated[list[_Text], Field(min_length=1)]
    judge_prompt: _JudgePrompt | None = None
    coherence_prompt: _JudgePrompt | None = None


def load_prompts(path: Path) -> PersonaPrompts:
    """Read and check a prompts file.

    Raises:
        UserError: With `file:line`: it cannot be read or is no YAML; an unknown, doubled or missing
            key; no pairs, a pair that lacks a side or is there twice, a prompt on both sides; no
            questions; a text that is empty or twice there; a judge prompt without its placeholders.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot read the prompts file: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: the prompts file is not UTF-8 text: {error.reason}") from None
    node, value = parse_yaml(path, text)
    if node is None:
        raise UserError(f"{path}: the prompts file is empty")
    try:
        prompts = PersonaPrompts.model_validate(value)
    except ValidationError as error:
        # An unknown key first: where a key is misspelt, another one is missing.
        first = min(error.errors(), key=lambda found: found["type"] not in _UNKNOWN)
        raise _explained(first, node, path) from None
    for index, pair in enumerate(prompts.pairs):
        line = line_of(node, ("pairs", index))
        for other in prompts.pairs[:index]:
            if pair == other:
                raise UserError(f"{path}:{line}: this pair is there twice")
            if pair.positive == other.negative or pair.negative == other.positive:
                raise UserError(
                    f"{path}:{line}: a system prompt of this pair calls up the trait in one pair "
                    "and its opposite in another"
                )
    for index, question in enumerate(prompts.questions):
        if question in prompts.questions[:index]:
            line = line_of(node, ("questions", index))
            raise UserError(f"{path}:{line}: this question is there twice")
    return prompts


def _explained(found: Any, node: yaml.Node, path: Path) -> UserError:
    """One of pydantic's errors, with its line."""
    keys, kind = found["loc"], found["type"]
    inside = len(keys) > 1 and keys[0] == "pairs"
    fields = list((PromptPair if inside else PersonaPrompts).model_fields)
    place = f"{path}:{line_of(node, keys)}" if keys else str(path)
    last = keys[-1] if keys else ""
    what = f"the {last} system prompt" if inside else last
    if kind == "missing" and inside:
        problem = f"the pair has no {last} system prompt"
    elif kind == "missing":
        place, problem = str(path), f"the prompts file needs the key {last}"
    elif kind in _UNKNOWN:
        place = f"{path}:{line_of(node, keys, of_key=True)}"
        hint = suggestion(str(last), fields)
        problem = f"unknown key {last}{hint}; known: {', '.join(fields)}"
    elif kind == "model_type":
        problem = f"must be a mapping with the keys {', '.join(fields)}"
    elif kind in ("list_type", "too_short"):
        problem = f"the file has no {_LISTS[str(last)]}; give a list of them"
    elif kind == "value_error":
        said = str(found["ctx"]["error"])
        problem = said if inside else f"{last} {said}"
    else:
        problem = f"{'a question' if keys[0] == 'questions' else what} must be text"
    return UserError(f"{place}: {problem}")
