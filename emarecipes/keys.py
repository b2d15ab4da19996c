"""What a config's keys mean: `python -m emarecipes.keys [RECIPE] [KEY]`.

Types, defaults and meanings are those of the settings that the recipes check their configs by.
`python -m emarecipes.keys --write` makes the tables in `docs/` of them, where a page has
`<!-- keys: RECIPE [KEY]... -->`.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import re
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pkgutil import resolve_name
from typing import Any

from emarecipes.command import run_alone
from emarecipes.config import home, suggestion
from emarecipes.errors import UserError

# Each recipe's settings, and those of its entries, by the entry's key.
_TRAINING = {"": "training.settings:Settings", "probe": "training.settings:ProbeSettings"}
_TRAINING["probe.stop"] = "training.settings:ProbeStopSettings"
_SETTINGS = {
    "ema_lora": _TRAINING,
    "ema_cache": _TRAINING,
    "ema_generate": {"": "generation.checked:GenerateSettings"},
    "ema_eval": {
        "": "evaluation.settings:EvalSettings",
        "probes.NAME": "probes.suites:SuiteSettings",
        "opswap": "evaluation.benign:OpSwapSettings",
        "harness": "evaluation.harness:HarnessSettings",
        "judge": "evaluation.judge_suite:JudgeSettings",
    },
    "ema_compare": {
        "": "comparison.settings:CompareSettings",
        "arms.NAME": "comparison.settings:ArmSettings",
        "tasks.NAME": "comparison.settings:TaskSettings",
        "tasks.NAME.generate": "comparison.settings:AnswersSettings",
        "tasks.NAME.evaluate": "comparison.settings:EvaluateSettings",
        "criteria": "comparison.criterion:CriteriaSettings",
        "criteria.general": "comparison.criterion:CriterionSettings",
        "criteria.in_domain": "comparison.criterion:CriterionSettings",
        "criteria.controls": "comparison.criterion:CriterionSettings",
        "criteria.benign": "comparison.criterion:CriterionSettings",
        "criteria.coherent": "comparison.criterion:CriterionSettings",
        "bounds": "comparison.settings:BoundSettings",
    },
    "ema_select": {"": "selection.checked:SelectSettings"},
    "ema_persona": {"": "persona.checked:PersonaSettings"},
    "ema_directions": {"": "persona.directions_checked:DirectionsSettings"},
    "ema_safelora": {"": "defenses.safelora_run:ProjectionSettings"},
}
RECIPES = tuple(_SETTINGS)

_TABLE = re.compile(r"(<!-- keys: ([^\n]*) -->\n).*?(<!-- end of keys -->)", re.DOTALL)
_PAGE = re.compile(r"docs/(\w+\.md)(#[\w-]+)?")


@dataclass(frozen=True)
class Key:
    """One key of a config.

    Attributes:
        name: With the keys of the entries that it is in; NAME stands for one that the user chooses.
        kind: The values that it takes, such as `int >= 1 or null`.
        default: As YAML has it, or `required`.
        meaning: Markdown, with pages as `docs/page.md#heading`.
    """

    name: str
    kind: str
    default: str
    meaning: str


def keys(recipe: str, below: Sequence[str] = ()) -> list[Key]:
    """The keys of a recipe's config; or those named and what is below them, in that order.

    Raises:
        UserError: No such recipe or key.
    """
    if recipe not in _SETTINGS:
        hint = suggestion(recipe, RECIPES)
        raise UserError(f"no recipe {recipe}{hint}; there are {', '.join(RECIPES)}")
    found: list[Key] = []
    for entry, path in _SETTINGS[recipe].items():
        kind = resolve_name(f"emarecipes.{path}")
        schema, meaning = kind.model_json_schema()["properties"], _meanings(kind)
        of_entry = [
            Key(
                f"{entry}.{name}".lstrip("."),
                _kind(schema[name]),
                "required" if field.is_required() else _yaml(field),
                " ".join(meaning.get(name, "").split()),
            )
            for name, field in kind.model_fields.items()
        ]
        # Behind the key whose entry they are in.
        parents = [i for i, key in enumerate(found, 1) if f"{entry}.".startswith(f"{key.name}.")]
        found[max(parents, default=0) : max(parents, default=0)] = of_entry
    for name in below:
        if not any(key.name == name for key in found):
            hint = suggestion(name, [key.name for key in found])
            raise UserError(f"{recipe} has no key {name}{hint}")
    if not below:
        return found
    return [k for name in below for k in found if f"{k.name}.".startswith(f"{name}.")]


def _meanings(kind: type) -> dict[str, str]:
    """The text below each key of a class of settings and of those that it extends."""
    found = {}
    for base in reversed(kind.__mro__):
        if base.__module__.startswith("emarecipes."):
            (defined,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
            assert isinstance(defined, ast.ClassDef)
            for key, text in pairwise(defined.body):
                match key, text:
                    case ast.AnnAssign(target=ast.Name(name)), ast.Expr(ast.Constant(str(meaning))):
                        found[name] = meaning
    return found


def with_tables(page: str) -> str:
    """The text of a page of `docs/`, its tables of keys made anew."""
    return _TABLE.sub(lambda match: match[1] + _table(*match[2].split()) + match[3], page)


def _table(recipe: str, *names: str) -> str:
    rows = ["| key | value | default | meaning |", "| --- | --- | --- | --- |"]
    for key in keys(recipe, names):
        meaning = _PAGE.sub(r"[\1](\1\2)", key.meaning)
        default = key.default if key.default == "required" else f"`{key.default}`"
        rows.append(f"| `{key.name}` | {key.kind} | {default} | {meaning} |")
    return "\n".join(rows) + "\n"


def _kind(schema: dict[str, Any]) -> str:
    """A JSON schema in a few words."""
    if "anyOf" in schema:
        return " or ".join(_kind(choice) for choice in schema["anyOf"])
    if "const" in schema:
        return json.dumps(schema["const"])
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    kind: str = schema.get("type", "entry" if "$ref" in schema else "any")
    if kind == "array":
        return f"list of {_kind(schema['items'])}"
    if kind == "object":
        inner = _kind(schema["additionalProperties"]) if _is_typed(schema) else "any"
        return "entry" if inner == "any" else f"entry of {inner}"
    words = {"integer": "int", "number": "float", "string": "text", "boolean": "true, false"}
    bounds = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}
    limits = [f"{sign} {schema[key]}" for key, sign in bounds.items() if key in schema]
    return " ".join([words.get(kind, kind), ", ".join(limits)]).strip()


def _is_typed(schema: dict[str, Any]) -> bool:
    return isinstance(schema.get("additionalProperties"), dict)


def _yaml(field: Any) -> str:
    value = field.get_default(call_default_factory=True)
    return json.dumps(value.model_dump() if hasattr(value, "model_dump") else value)


def main(argv: Sequence[str]) -> int:
    """Print keys, or write the tables, as `[RECIPE] [KEY]` or `--write` says.

    Returns:
        The exit code: 0, or 1 after a `UserError`, which is printed as one line.
    """
    return run_alone("emarecipes.keys", _print, argv)


def _print(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m emarecipes.keys", allow_abbrev=False)
    parser.add_argument("recipe", nargs="?", help=", ".join(RECIPES))
    parser.add_argument("key", nargs="?", help="one key, with those below it")
    parser.add_argument("--write", action="store_true", help="the tables in docs/, in a clone")
    options = parser.parse_args(argv)
    if options.write:
        for page in sorted((home() / "docs").glob("*.md")):
            page.write_text(with_tables(page.read_text(encoding="utf-8")), encoding="utf-8")
        return
    if options.recipe is None:
        print("\n".join(RECIPES))
        return
    for key in keys(options.recipe, [options.key] if options.key else []):
        print(f"{key.name}: {key.kind}  [{key.default}]".replace("`", ""))
        print(textwrap.indent(textwrap.fill(key.meaning.replace("`", ""), 96), "    "))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
