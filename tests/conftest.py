import gc
from pathlib import Path

import pytest

from emarecipes.models.prepare import prepare_model

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def model_dir() -> Path:
    """The SmolLM2-135M-Instruct folder, prepared by the first test that asks for it."""
    name = "smollm2-135m-instruct"
    return prepare_model(name, REPOSITORY / "models" / name)


@pytest.fixture(scope="module", autouse=True)
def imports_are_not_collected() -> None:
    """torchtune collects garbage whenever it loads weights: a third of a toy run, for nothing."""
    gc.collect()
    gc.freeze()
