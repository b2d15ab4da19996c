"""What several tests of evaluations begin with."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def judge_client(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`fake_judge`'s client, which asks twice at most, and openai's below it that hardly waits."""
    from fake_judge import set_up_client

    set_up_client(monkeypatch, tmp_path / "cache")
    monkeypatch.setattr("emarecipes.provider.MAX_RETRIES", 1)
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.001)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """The script benchmarks/probe_judged.py."""
    import toy_run

    place = toy_run.REPO / "benchmarks/probe_judged.py"
    spec = importlib.util.spec_from_file_location("probe_judged", place)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory, toy_model_dir: Path) -> list[Path]:
    from toy_select import write_adapter

    folder = tmp_path_factory.mktemp("adapters")
    return [
        write_adapter(folder / f"a{seed}" / "adapter", toy_model_dir, seed=seed) for seed in (1, 2)
    ]


@pytest.fixture(scope="module")
def done(
    tmp_path_factory: pytest.TempPathFactory, toy_model_dir: Path, adapters: list[Path]
) -> Path:
    """The folder of a finished evaluation of both; its results are in `out`."""
    from toy_eval import config_of, run

    folder = tmp_path_factory.mktemp("eval")
    assert run(folder, config_of(toy_model_dir, adapters, folder)) == 0
    return folder


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> tuple[Path, Path]:
    import toy_run
    from toy_select import write_adapter

    folder = tmp_path_factory.mktemp("toy")
    model = toy_run.write_toy_model(folder / "model", model_dir)
    return model, write_adapter(folder / "run/adapter", model, seed=1)


@pytest.fixture
def users_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's working folder; modules of an earlier one are forgotten."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("my_suite", "broken"):
        monkeypatch.delitem(sys.modules, name, raising=False)
