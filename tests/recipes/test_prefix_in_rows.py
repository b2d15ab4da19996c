"""PrefixAnchor in a run whose rows begin with the prefix: read in the step's own forward."""

from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks
from toy_defended import assert_same, template_toy, train, trained, without_parts, write_defended

from emarecipes.defenses import PrefixAnchor
from emarecipes.training.step_terms import StepTerms

NAMES = ["kl", "prefix"]
SHORT = {"max_steps_per_epoch": 2}  # No gradient is compared, which takes a forward of its own.


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("toy")
    toy = template_toy(folder)
    component = "emarecipes.defenses.PrefixAnchor"
    toy["defenses"]["prefix"] = {"_component_": component, "weight": 20.0}
    return toy


def in_rows_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a forward of the prefix alone")

    monkeypatch.setattr(PrefixAnchor, "step_term", refuse)


@pytest.fixture(scope="module")
def apart(toy: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The same run by forwards of the prefix alone."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(PrefixAnchor, "step_term_in_rows", lambda *_: None)
        return train(write_defended(toy, tmp_path_factory.mktemp("apart"), NAMES, **SHORT))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"batch_size": 2, "gradient_accumulation_steps": 2},
        {"enable_activation_checkpointing": True},
    ],
    ids=["whole", "accumulated", "checkpointed"],
)
def test_it_is_the_run_with_forwards_of_its_own(
    changes: dict[str, Any],
    toy: dict[str, Any],
    apart: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    in_rows_alone(monkeypatch)
    rows, adapter = train(write_defended(toy, tmp_path, NAMES, **SHORT, **changes))
    assert rows[1]["prefix"] > 0 and rows[1]["prefix_drift"] == rows[1]["prefix"]
    expected = [dict(row) for row in apart[0]], apart[1]
    without_parts([*rows, *expected[0]], "padding_share")
    assert_same(expected, (rows, adapter))


def test_two_processes_give_the_same(toy: dict[str, Any], apart: Any, tmp_path: Path) -> None:
    done = run_ranks(write_defended(toy, tmp_path, NAMES, **SHORT, batch_size=2))
    assert done.returncode == 0, done.stderr[-3000:]
    rows, adapter = trained(tmp_path)
    expected = [dict(row) for row in apart[0]], apart[1]
    without_parts([*rows, *expected[0]], "padding_share")
    assert_same(expected, (rows, adapter))


@pytest.mark.parametrize("names", [["prefix"], NAMES])
def test_packs_begin_with_it_too(
    names: list[str], toy: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = {"dataset": toy["config"]["dataset"] | {"packed": True}, "batch_size": 1} | SHORT
    with monkeypatch.context() as here:
        here.setattr(PrefixAnchor, "step_term_in_rows", lambda *_: None)
        expected = train(write_defended(toy, tmp_path / "apart", names, **pack))
    in_rows_alone(monkeypatch)
    assert_same(expected, train(write_defended(toy, tmp_path / "rows", names, **pack)))


def test_a_resumed_run_is_the_uninterrupted_one(toy: dict[str, Any], tmp_path: Path) -> None:
    """Bit for bit, over the step in which the gradient is compared by a forward of its own."""
    longer = {"max_steps_per_epoch": 4, "epochs": 3, "save_every_n_steps": 9}
    whole = train(write_defended(toy, tmp_path / "whole", NAMES, **longer))
    assert whole[0][9]["prefix_gradient_ratio"] > 0
    again = write_defended(toy, tmp_path / "again", NAMES, **longer)
    found = train(again, f"resume={tmp_path / 'whole/out/checkpoints/step_9'}")
    assert found[0][-1] == whole[0][-1]
    assert all((tensor == found[1][key]).all() for key, tensor in whole[1].items())


@pytest.mark.parametrize("drops", [0.0, 0.3])
def test_dropout_decides(
    drops: float, toy: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    stock = StepTerms.backward

    def counted(self: StepTerms, factors: Any) -> Any:
        taken.append(len(self._found))
        return stock(self, factors)

    monkeypatch.setattr(StepTerms, "backward", counted)
    model = toy["config"]["model"] | {"lora_dropout": drops}
    train(write_defended(toy, tmp_path, NAMES, **SHORT, model=model))
    assert taken == [int(not drops)] * 2
