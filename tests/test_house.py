"""The rooms of the package: no circle, no import of a room that is not below."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks/arrows.py"
spec = importlib.util.spec_from_file_location("arrows", SCRIPT)
assert spec is not None and spec.loader is not None
arrows: Any = importlib.util.module_from_spec(spec)
sys.modules["arrows"] = arrows
spec.loader.exec_module(arrows)


@pytest.fixture(scope="module")
def house() -> Any:
    return arrows.House(SCRIPT.parents[1])


def test_every_room_has_its_level(house: Any) -> None:
    found = {house.room(module) for module in house.files}
    assert sorted(found) == sorted(room for rooms in arrows.ROOMS for room in rooms)


def test_a_room_imports_from_rooms_below(house: Any) -> None:
    assert house.upward() == sorted(arrows.UPWARD), "see ROOMS in benchmarks/arrows.py"
    assert all(arrows.UPWARD.values()), "an arrow upwards needs its reason"


def test_there_is_no_circle(house: Any) -> None:
    assert house.circles_of_rooms() == []
    assert house.circles_of_modules() == []


def write(tree: Path, **modules: str) -> Any:
    for name, text in modules.items():
        path = tree / "emarecipes" / f"{name.replace('__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return arrows.House(tree)


def test_circles_and_upward_arrows_are_seen(tmp_path: Path) -> None:
    house = write(
        tmp_path,
        errors="def f():\n    from emarecipes.models import batch\n",
        models__batch="import emarecipes.errors\n",
        models__load="from emarecipes.models.batch import X\n",
    )
    assert house.arrows() == {(".", "models"): 1, ("models", "."): 1}
    assert house.circles_of_rooms() == [[".", "models"]]
    assert house.circles_of_modules() == [["emarecipes.errors", "emarecipes.models.batch"]]
    assert house.upward() == [("emarecipes.errors", "models")]


def test_rooms_side_by_side_do_not_import_each_other(tmp_path: Path) -> None:
    guarded = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    "
    house = write(
        tmp_path,
        training__step=f"{guarded}from emarecipes.persona.run import R\n",
        persona__run="",
    )
    assert house.upward() == [("emarecipes.training.step", "persona")]
    assert house.circles_of_modules(types=True) == []
