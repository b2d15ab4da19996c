"""What becomes of an evaluation that ended well, failed in part, or was killed."""

import json
from dataclasses import replace
from pathlib import Path
from shutil import rmtree

import pytest
import toy_compare
import toy_run

from emarecipes.comparison.arms import expand_arms, make_jobs
from emarecipes.comparison.execute import Runner
from emarecipes.comparison.settings import AnswersSettings, check_compare_settings
from emarecipes.comparison.steps import Slot, Step
from emarecipes.config import load_config


class Evaluated(Runner):
    """A runner whose evaluations write known scores and end as told."""

    ends_well = True
    calls = 0
    shift = 0.5

    def run_step(self, step: Step, command: list[str], slot: Slot) -> bool:
        self.calls += 1
        shared = Path([part for part in command if part.startswith("output_dir=")][-1][11:])
        rmtree(shared, ignore_errors=True)
        toy_compare.evaluation(shared, {"seed_0": (1.0, self.shift)})
        return self.ends_well


@pytest.fixture
def runner(tmp_path: Path, model_dir: Path) -> Evaluated:
    rows = toy_run.write_rows(tmp_path / "rows.jsonl", 16)
    training = toy_run.toy_config(model_dir, rows, tmp_path / "unused")
    path = str(toy_run.write_config(tmp_path / "train.yaml", training))
    evaluate = {"config": str(toy_run.REPO / "configs/smollm2_135m_eval.yaml")}
    config = toy_run.write_config(
        tmp_path / "compare.yaml",
        {
            "output_dir": str(tmp_path / "out"),
            "seeds": [0],
            "tasks": {"narrow": {"evaluate": evaluate}},
            "arms": {"undefended": {"config": path, "role": "undefended"}},
        },
    )
    raw, origin = load_config(["--config", str(config)])
    plan = check_compare_settings(raw, origin)
    found = Evaluated(plan, slots=[{}])
    found.arms = expand_arms(plan, origin)  # type: ignore[attr-defined]
    found.jobs = make_jobs(plan, found.arms, origin)  # type: ignore[attr-defined]
    return found


def shift(runner: Evaluated) -> float:
    arms, jobs = runner.arms, runner.jobs  # type: ignore[attr-defined]
    found = runner.evaluate(arms, jobs, "narrow", "select")
    return float(found["undefended"].probes["general"].values_SQ.mean())


def test_what_failed_in_part_counts_and_is_tried_again(runner: Evaluated) -> None:
    runner.ends_well = False
    assert shift(runner) == pytest.approx(0.5)
    runner.ends_well = True
    assert shift(runner) == pytest.approx(0.5) and runner.calls == 2
    assert shift(runner) == pytest.approx(0.5) and runner.calls == 2  # Done now.


def test_older_scores_do_not_look_done_after_a_kill(
    runner: Evaluated, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner.ends_well = False
    shift(runner)
    runner.ends_well, runner.shift = True, 0.25
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", _kill)  # Where results are moved.
        with pytest.raises(KeyboardInterrupt):
            shift(runner)
    assert shift(runner) == pytest.approx(0.25)


def _kill(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_an_average_is_what_is_waited_for_sampled_and_scored(
    runner: Evaluated, monkeypatch: pytest.MonkeyPatch
) -> None:
    (job,) = runner.jobs  # type: ignore[attr-defined]
    job = replace(job, arm=replace(job.arm, adapter="adapter_avg"))
    config = str(toy_run.REPO / "configs/smollm2_135m_generate.yaml")
    runner.plan.tasks["narrow"].generate = AnswersSettings(config=config)
    asked: list[str] = []

    def run_step(step: Step, command: list[str], slot: Slot) -> bool:
        asked.extend(part for part in command if part.startswith("adapter="))
        (job.folder / "adapter").mkdir(parents=True, exist_ok=True)
        (job.folder / "adapter/adapter_model.safetensors").touch()
        return True

    monkeypatch.setattr(runner, "run_step", run_step)
    assert runner.train([job]) == []
    job.adapter.mkdir()
    (job.adapter / "adapter_model.safetensors").touch()
    assert runner.train([job]) == [job]
    runner.answer([job], "narrow")
    assert asked == [f"adapter={job.folder}/adapter_avg"]


def test_another_adapter_is_scored_where_the_evaluations_own_folder_holds_the_runs(
    runner: Evaluated, tmp_path: Path
) -> None:
    """What is below the folder that results go to is left out of what they depend on."""
    runner.plan.tasks["narrow"].evaluate.overrides = [f"output_dir={tmp_path}"]
    (job,) = runner.jobs  # type: ignore[attr-defined]
    weights = job.adapter / "adapter_model.safetensors"
    weights.parent.mkdir(parents=True)
    for calls, content in ((1, b"one"), (1, b"one"), (2, b"two")):
        weights.write_bytes(content)
        shift(runner)
        assert runner.calls == calls


def test_answers_are_those_of_the_settings_that_hold_and_all_of_them(
    runner: Evaluated, monkeypatch: pytest.MonkeyPatch
) -> None:
    (job,) = runner.jobs  # type: ignore[attr-defined]
    config = str(toy_run.REPO / "configs/smollm2_135m_generate.yaml")
    folder, told, ends_well = job.folder / "answers", [], True

    def run_step(step: Step, command: list[str], slot: Slot) -> bool:
        told.append(sorted(path.name for path in folder.glob("*")))
        step.mark.unlink(missing_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"general{len(told)}.jsonl").touch()
        return ends_well

    def answer(*overrides: str) -> None:
        settings = AnswersSettings(config=config, overrides=[*overrides])
        runner.plan.tasks["narrow"].generate = settings
        runner.answer([job], "narrow")

    monkeypatch.setattr(runner, "run_step", run_step)
    answer()
    answer()
    assert told == [[]]  # Once.
    answer("max_new_tokens=8")  # Of other settings none is left beside the new.
    assert told == [[], []]
    (folder / "general2.jsonl").unlink()
    answer("max_new_tokens=8")  # What is missing is sampled again.
    assert told == [[], [], []]
    mark = job.folder / "answers.compare.json"
    older = {"fingerprint": json.loads(mark.read_text())["fingerprint"]}  # Without their names.
    mark.write_text(json.dumps(older))
    answer("max_new_tokens=8")
    assert len(told) == 3
    rmtree(folder)
    answer("max_new_tokens=8")
    assert told.pop() == [] and len(told) == 3
    ends_well = False
    answer("max_new_tokens=9")
    ends_well = True
    answer("max_new_tokens=9")  # Goes on from what the interruption left,
    assert told[3:] == [[], ["general4.jsonl"]]
    ends_well = False
    answer("max_new_tokens=10")
    answer("max_new_tokens=11")  # but not with other settings.
    assert told[5:] == [[], []]
