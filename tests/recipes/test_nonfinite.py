"""Numbers that go wrong: named, and skipped as far as the config allows."""

import json

import pytest
import toy_run
from toy_resume import EPOCHS, STEPS, Run, same


def broken(run: Run, kind: str, *steps: int) -> None:
    entry = {"_component_": "toy_mishaps.Broken", "steps": list(steps), "kind": kind}
    run.config["defenses"] = {"broken": entry, "kl": run.config["defenses"]["kl"]}


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("nan", "step 3: the loss is not finite (broken nan); rows "),
        ("inf", "step 3: the loss is not finite (broken inf); rows "),
        ("gradient", "step 3: the gradient of broken is not finite; rows "),
    ],
)
def test_numbers_that_go_wrong_are_named(
    run: Run, kind: str, expected: str, capfd: pytest.CaptureFixture[str]
) -> None:
    broken(run, kind, 3)
    run.config["shuffle"] = False
    run.config["dataset"] = run.config["dataset"]["task"]
    assert run("out") == 1
    error = capfd.readouterr().err
    assert f"{expected}8, 9, 10, 11. Lower the learning rate" in error
    assert "Resume from step 2 with: tune run" in error
    assert run.steps("out") == [2]
    assert not (run.folder / "out/adapter").exists()


def test_the_search_for_what_broke_a_gradient_changes_no_later_step(run: Run) -> None:
    """A loss that is not finite takes no further forwards, a gradient one for each term."""
    figures = {}
    for kind in ("nan", "gradient"):
        broken(run, kind, 2)
        assert run(kind, "skip_nonfinite=1", "model.lora_dropout=0.2") == 0
        rows = toy_run.metrics(run.folder / kind)
        assert [row["step"] for row in rows if row.get("skipped")] == [2]
        figures[kind] = [(row["ce"], row["kl"]) for row in rows if row["step"] != 2]
    assert len(figures["nan"]) == EPOCHS * STEPS - 1
    assert figures["gradient"] == figures["nan"]


def test_so_many_steps_are_skipped_and_no_more(
    run: Run, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken(run, "nan", 2, 5)
    run.config["defenses"]["signal"] = {"_component_": "toy_mishaps.SignalAfter"}
    assert run("whole", "skip_nonfinite=2") == 0
    rows = [json.loads(line) for line in (run.folder / "whole/metrics.jsonl").open()]
    assert [row["step"] for row in rows if row.get("skipped")] == [2, 5]
    assert "broken" not in rows[1]
    assert all(isinstance(value, int | float) for row in rows for value in row.values())
    # The count of skipped steps and the defense's own state go through a resume.
    monkeypatch.setenv("SIGNAL_AFTER", "3")
    assert run("out", "skip_nonfinite=2") == 0
    assert run("out", "skip_nonfinite=2", "resume=auto") == 0
    assert same(run.result("out"), run.result("whole"))
    capfd.readouterr()
    assert run("one", "skip_nonfinite=1") == 0
    assert run("one", "skip_nonfinite=1", "resume=auto") == 1
    assert "step 5: the loss is not finite (broken nan)" in capfd.readouterr().err
