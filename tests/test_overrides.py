"""What is written as an override is what is read of it, and ordinary values look as they did."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from emarecipes.config import load_config
from emarecipes.errors import UserError
from emarecipes.overrides import as_override


def read(folder: Path, override: str) -> Any:
    """What `load_config` makes of it."""
    path = folder / "c.yaml"
    path.write_text("other: 1\n")
    cfg, _ = load_config(["--config", str(path), override])
    return OmegaConf.to_container(cfg)["x"]  # type: ignore[call-overload, index]


AWKWARD = [
    "Answer badly. # rule 1", "/runs/a # b/c", "#", "a: b", "a:", "- a", "[Be bad.]", "[", "{a: 1}",
    "{", "Off", "yes", "no", "true", "null", "None", "~", "", " ", " a", "a ", "100", "2024",
    "1e-3", "1_000", "0x1f", "12:30", ".5", ".inf", "nan", "2024-01-01", "=", "<<", "!!int 3", "!x",
    "&a", "*a", "@a", "`a", "%a", "| a", "> a", "? a", '"', "'", "it's", '"quoted"', "'quoted'",
    '"a" b', "a\nb", "a\n\n b\n", "\ta", "0\t0", "a\tb", "a\\nb", "\\", "a=b", "$", "é", "漢字",
    "\U0001f600", "\x85", "\u2028", "\ufeff", "\x7f", "long words " * 40 + "# and more",
    1, -3, 10**20, 0.1, 1e-05, 1e20, 2.0, -0.0, float("inf"), float("nan"), True, False, None,
    [], {}, [None, True, 1, 1.0, "1"], ["Off", "a # b", "it's", "a\nb"], [[1], ["[1]"]],
    {"a": {"b": [None, "no"]}, "c: d": "1e-3", "yes": ""}, [1e-07, "1e-07"],
]  # fmt: skip


@pytest.mark.parametrize("value", AWKWARD, ids=repr)
def test_awkward_values_are_read_back(value: Any, tmp_path: Path) -> None:
    assert repr(read(tmp_path, as_override("x", value))) == repr(value)


# NUL and halves of a pair are refused, `${` begins an interpolation, and `???` is a missing value.
whole = st.characters(exclude_categories=["Cs"], exclude_characters="\0")
texts = st.text(whole, max_size=20).filter(lambda text: "${" not in text and text != "???")
shown = st.text(st.sampled_from("ab0 .:#,[]{}'\"\\-?!&*|>%@`~=\n\t"), max_size=12).filter(
    lambda text: text != "???"
)
scalars = texts | shown | st.integers() | st.floats() | st.booleans() | st.none()
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3)
)


@pytest.mark.early
@settings(
    deadline=None,
    max_examples=200,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(value=values)
@example(value=["a", {"b": "- c"}])
def test_any_value_is_read_back(value: Any, tmp_path: Path) -> None:
    assert repr(read(tmp_path, as_override("x", value))) == repr(value)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (Path("/runs/out/kl_1/narrow_seed0"), "/runs/out/kl_1/narrow_seed0"),
        ("models/a b/c-d_e.f", "models/a b/c-d_e.f"),
        (Path("it's"), "it's"),
        ("2026-12-04", "2026-12-04"),
        (5, "5"),
        (2.0e-5, "2e-05"),
        (1.0, "1.0"),
        (True, "True"),
        (None, "None"),
        ([0.5, 2.0], "[0.5, 2.0]"),
        (["a", "b"], "['a', 'b']"),
        ("${oc.env:HOME}/a", "${oc.env:HOME}/a"),
        ("${", '"${"'),  # No interpolation: refused when it is read, as before.
    ],
)
def test_ordinary_values_are_written_as_before(value: Any, text: str) -> None:
    assert as_override("x", value) == f"x={text}"


def test_a_path_is_read_as_text(tmp_path: Path) -> None:
    assert read(tmp_path, as_override("x", Path("2024"))) == "2024"
    assert read(tmp_path, as_override("x", Path("/a # b"))) == "/a # b"


def test_interpolations_are_resolved_as_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HERE", "there")
    assert read(tmp_path, as_override("x", "${oc.env:HERE}/a")) == "there/a"
    assert read(tmp_path, as_override("x", "${oc.env:HERE} # a")) == "there # a"
    with pytest.raises(UserError, match="command line: x="):
        read(tmp_path, as_override("x", "${"))


def test_what_torchtune_takes_as_it_stands_is_not_quoted() -> None:
    assert as_override("max_filename", "00004") == "max_filename=00004"
