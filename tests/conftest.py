import gc
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import warm

from emarecipes.models.prepare import prepare_model

# Beside its threads torch.compile would start a process for each, which imports torch for nothing.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def model_dir() -> Path:
    """The SmolLM2-135M-Instruct folder, prepared by the first test that asks for it."""
    name = "smollm2-135m-instruct"
    return prepare_model(name, REPOSITORY / "models" / name)


@pytest.fixture(scope="module")
def toy_model_dir(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Path:
    """A random Llama of two layers with that folder's tokenizer."""
    import toy_run  # And with it torch, which many tests do without.

    return toy_run.write_toy_model(tmp_path_factory.mktemp("toy") / "toy-model", model_dir)


@pytest.fixture(scope="module", autouse=True)
def imports_are_not_collected() -> None:
    """torchtune collects garbage whenever it loads weights: a third of a toy run, for nothing."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums in one order."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """pytest-xdist's, before it starts a worker: all share the server that runs are forked from."""
    if "unit" not in (node.config.option.markexpr or ""):  # Those start none.
        node.workerinput["server"] = warm.shared()


def pytest_configure(config: pytest.Config) -> None:
    """In such a worker. No garbage is looked for among what tests import: that takes seconds."""
    gc.disable()
    state = getattr(config, "workerinput", {}).get("server")
    if state is not None:
        warm.join(state)


# What a test module uses says what kind its tests are; `long` is marked by hand.
RUNS = re.compile(
    r"run_(lora|eval|generate|select|persona|compare|alone)|toy_run|write_defended|subprocess"
)
SEVERAL = {"run_ranks", "tune_run", "warm"}


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test `unit`, `recipe` (a model, a run or a process) or `distributed`.

    What is marked `early` goes first: begun last, it would leave the other worker without work.
    """
    for item in items:
        names = set(vars(item.module))
        if names & SEVERAL:
            kind = "distributed"
        elif any(map(RUNS.fullmatch, names)) or "model_dir" in item.fixturenames:
            kind = "recipe"
        else:
            kind = "unit"
        item.add_marker(kind)
    items.sort(key=lambda item: item.get_closest_marker("early") is None)
