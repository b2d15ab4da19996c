"""The meaning of every key stands at its setting, and the pages have it from there."""

import json
import re
from pathlib import Path

import pytest

from emarecipes import keys

REPOSITORY = Path(__file__).resolve().parents[1]
PAGES = sorted((REPOSITORY / "docs").glob("*.md"))


@pytest.mark.parametrize("recipe", keys.RECIPES)
def test_every_key_has_a_meaning_and_a_place_in_the_pages(recipe: str) -> None:
    found = keys.keys(recipe)
    assert [key.name for key in found if not key.meaning.endswith((".", ")"))] == []
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    shown = {
        key.name
        for of, names in re.findall(r"<!-- keys: (\S+) ?(.*?) -->", text)
        if of == recipe.replace("ema_cache", "ema_lora")  # The same config.
        for key in keys.keys(of, names.split())
    }
    assert shown == {key.name for key in found}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.name))
def test_tables_are_those_of_the_settings(page: Path) -> None:
    """Else run `python -m emarecipes.keys --write`."""
    text = page.read_text(encoding="utf-8")
    assert keys.with_tables(text) == text


def test_a_table_is_made_anew_and_the_rest_of_its_page_is_left() -> None:
    page = "A\n<!-- keys: ema_lora keep_last -->\nold\n<!-- end of keys -->\nB\n"
    row = "| `keep_last` | int >= 1 | `2` | How many checkpoints are kept. |"
    made = keys.with_tables(page)
    assert made.splitlines()[0] == "A"
    assert made.splitlines()[-3:] == [row, "<!-- end of keys -->", "B"]
    assert "old" not in made


def test_values_defaults_and_entries_are_as_the_settings_check_them() -> None:
    by_name = {key.name: key for key in keys.keys("ema_eval")}
    names = list(by_name)
    expected = {
        "judge.alignment": ("float >= 0, <= 100", 30.0),
        "judge.top_logprobs": ("int >= 1, <= 20 or null", 20),
        "judge.comparison": ("`<`, `<=`", "<"),
        "judge.prices": ("entry of list of float >= 0", {}),
        "opswap.tiers": ("list of int", [1, 2, 3, 4]),
        "overwrite": ("true, false", False),
    }
    for name, (kind, default) in expected.items():
        assert (by_name[name].kind, json.loads(by_name[name].default)) == (kind, default)
    assert by_name["judge.models"].default == "required"
    # An entry's keys come behind it.
    assert names.index("judge.models") == names.index("judge") + 1
    assert names.index("probes.NAME.pairs") == names.index("probes") + 1


def test_the_command_prints_a_key_and_those_below(capsys: pytest.CaptureFixture[str]) -> None:
    assert keys.main(["ema_compare", "bounds"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines if not line.startswith(" ")] == [
        "bounds",
        "bounds.effect_share",
        "bounds.learned",
        "bounds.benign",
        "bounds.coherent",
    ]
    assert lines[2] == "bounds.effect_share: float > 0, < 1  [0.25]"
    assert lines[3] == "    Of an excess: this share of what undefended training does."


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["ema_lara"], "error: no recipe ema_lara (did you mean ema_lora?)"),
        (["ema_lora", "batch_sice"], "error: ema_lora has no key batch_sice (did you mean batch_s"),
    ],
)
def test_what_is_not_there_is_named(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert keys.main(arguments) == 1
    assert said in capsys.readouterr().err
