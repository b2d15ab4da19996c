"""Mistakes in YAML are one line with a place, whatever PyYAML makes of them."""

from pathlib import Path

import pytest

from emarecipes.errors import UserError, first_line
from emarecipes.yaml_nodes import line_of, parse_yaml

TEXT = "a:\n- b: 1\n  c:\n    - x\n    - y\nd: &d {e: 1}\n"


@pytest.mark.parametrize(
    ("keys", "of_key", "line"),
    [
        ((), False, 1),
        (("a",), False, 2),
        (("a",), True, 1),
        (("a", 0, "c"), False, 4),
        (("a", 0, "c"), True, 3),
        (("a", 0, "c", 1), False, 5),
        (("d", "e"), False, 6),
        (("a", 0, "none", "further"), False, 2),  # Of what is there.
        (("d", "e", "f"), False, 6),
    ],
)
def test_lines(keys: tuple[str | int, ...], of_key: bool, line: int) -> None:
    node, _ = parse_yaml(Path("t.yaml"), TEXT)
    assert line_of(node, keys, of_key=of_key) == line


def test_the_value_is_pyyamls() -> None:
    _, value = parse_yaml(Path("t.yaml"), TEXT)
    assert value == {"a": [{"b": 1, "c": ["x", "y"]}], "d": {"e": 1}}
    assert parse_yaml(Path("t.yaml"), "# nothing") == (None, None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: [1\nb: 2", "t.yaml:2: not valid YAML: expected"),
        ("- {a: 1}\n- b:\n  - {c: 1}\n  - d: 1\n    d: 2\n", "t.yaml:5: the key d is there twice"),
        ("day: 2024-13-45", "t.yaml: not valid YAML: month must be in 1..12"),
        ("? [a]\n: 1", "t.yaml:1: not valid YAML: found unhashable key"),
        ("[" * 1000, "t.yaml: not valid YAML: nested too deeply"),
    ],
)
def test_what_is_no_yaml(text: str, expected: str) -> None:
    with pytest.raises(UserError) as error:
        parse_yaml(Path("t.yaml"), text)
    assert str(error.value).startswith(expected)


def test_a_list_inside_itself() -> None:
    _, value = parse_yaml(Path("t.yaml"), "a: &a [1, *a]")
    assert value["a"][1] is value["a"]


@pytest.mark.parametrize(
    ("said", "expected"),
    [("one\ntwo", "one"), ("", "KeyError"), ("\n \n", "KeyError"), ("\n one ", "one")],
)
def test_the_first_line_of_an_error(said: str, expected: str) -> None:
    """An error that says nothing was an IndexError of ours."""

    class KeyError(Exception):
        pass

    assert first_line(KeyError(said)) == expected
