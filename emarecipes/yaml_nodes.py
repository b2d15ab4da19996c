"""YAML whose mistakes are named with their line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from emarecipes.errors import UserError, first_line


def yaml_error(error: Exception, where: str) -> UserError:
    """What PyYAML says of a text, with the line where it says one."""
    mark = getattr(error, "problem_mark", None)
    line = f"{where}:{mark.line + 1}" if mark else where
    problem = getattr(error, "problem", None) or first_line(error)
    return UserError(f"{line}: not valid YAML: {problem}")


def parse_yaml(path: Path, text: str) -> tuple[yaml.Node | None, Any]:
    """A text's nodes, which know their lines, and its value.

    Args:
        path: Where the text is from.
        text: A YAML document.

    Raises:
        UserError: It is no YAML, or a mapping has a key twice, of which PyYAML takes the last.
    """
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        _check_keys_once(node, path, set())
        return node, yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise yaml_error(error, str(path)) from None
    except RecursionError:
        raise UserError(f"{path}: not valid YAML: nested too deeply") from None


def line_of(node: yaml.Node | None, keys: Sequence[str | int], *, of_key: bool = False) -> int:
    """The line, from 1, of what lies below a node; of the last part of the way that is there.

    Args:
        node: The document's.
        keys: Keys of mappings and places in lists, as a pydantic error's `loc` has them.
        of_key: The line of the last key in place of its value's.
    """
    line = node.start_mark.line if node else 0
    for key in keys:
        named = None
        if isinstance(node, yaml.SequenceNode) and isinstance(key, int):
            node = node.value[key]
        elif isinstance(node, yaml.MappingNode):
            pairs = [pair for pair in node.value if pair[0].value == str(key)]
            if not pairs:
                break
            named, node = pairs[0]
        else:
            break
        line = (named if of_key and named else node).start_mark.line
    return int(line) + 1


def _check_keys_once(node: yaml.Node | None, path: Path, seen: set[int]) -> None:
    if node is None or isinstance(node, yaml.ScalarNode) or id(node) in seen:
        return
    seen.add(id(node))  # An anchor may be met again, inside itself too.
    if isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _check_keys_once(value, path, seen)
        return
    known: set[str] = set()
    for key, value in node.value:
        if isinstance(key, yaml.ScalarNode):
            if key.value in known:
                where = f"{path}:{key.start_mark.line + 1}"
                raise UserError(f"{where}: the key {key.value} is there twice")
            known.add(key.value)
        _check_keys_once(value, path, seen)
