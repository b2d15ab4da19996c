"""What several tests of recipes begin with."""

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def run(tmp_path: Path, toy_model_dir: Path) -> Any:
    """A `toy_resume.Run` in a folder of the test's own."""
    from toy_resume import Run

    return Run(tmp_path, toy_model_dir)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, toy_model_dir: Path) -> Any:
    """A finished `toy_resume.Run`, to be copied."""
    from toy_resume import Run

    finished = Run(tmp_path_factory.mktemp("whole"), toy_model_dir)
    assert finished("out") == 0
    return finished


@pytest.fixture
def case(tmp_path: Path, toy_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A `toy_mistakes.Case` that must not come to its weights."""
    from toy_mistakes import Case

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were loaded before the mistake was found")

    monkeypatch.setattr("emarecipes.models._torchtune_recipe.StockRecipe.build_model", never)
    return Case(tmp_path, toy_model_dir)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> dict[bool, Path]:
    """Toy models' folders, by whether their output is tied to the embeddings."""
    import toy_run

    folder = tmp_path_factory.mktemp("models")
    return {
        tied: toy_run.write_toy_model(folder / str(tied), model_dir, tied=tied)
        for tied in (True, False)
    }


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory, toy_model_dir: Path) -> list[Path]:
    from toy_select import write_adapter

    folder = tmp_path_factory.mktemp("adapters")
    return [write_adapter(folder / f"a{seed}", toy_model_dir, seed=seed) for seed in (1, 2)]
