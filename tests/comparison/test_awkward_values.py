"""Folders and swept texts that mean something else in YAML are what the config says they are."""

from pathlib import Path

import pytest
import toy_compare
import toy_run
from omegaconf import OmegaConf

from emarecipes.comparison.arms import expand_arms, make_jobs
from emarecipes.comparison.execute import MARK, Runner
from emarecipes.comparison.settings import Plan, TaskSettings
from emarecipes.comparison.steps import Slot, Step
from emarecipes.config import Origin, load_config

Toy = tuple[Path, Path]
INOCULATION = {
    "defenses": {"prompt": {"_component_": "emarecipes.defenses.InoculationPrompt"}},
}
SWEPT = ["Answer badly. # rule 1", "[Be bad.]", "Off", "100", "null", "Be: bad", " it's", "Be bad."]


@pytest.fixture
def toy(tmp_path: Path, toy_model_dir: Path) -> Toy:
    return toy_model_dir, toy_run.write_rows(tmp_path / "rows.jsonl", 16)


def plan_in(folder: Path, toy: Toy) -> tuple[Plan, Origin]:
    folder.mkdir()
    return toy_compare.plan_of(folder, toy, [{}, INOCULATION])


@pytest.mark.parametrize("name", ["runs # second", "runs: second", "it's # a run", "[runs]"])
def test_every_run_goes_into_its_own_folder(
    name: str, tmp_path: Path, toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    plan, origin = plan_in(Path(name), toy)
    plan.sampled = True
    arms = expand_arms(plan, origin)
    jobs = make_jobs(plan, arms, origin)
    out = Path(name) / "out"
    assert [job.folder for job in jobs] == [out / f"runs/arm{i}/narrow_seed0" for i in range(2)]
    assert [job.cfg.output_dir for job in jobs] == [str(job.folder) for job in jobs]

    commands: dict[str, list[str]] = {}

    def note(_: Runner, step: Step, command: list[str], slot: Slot) -> bool:
        commands[step.name] = command
        (step.made or step.mark.parent).mkdir(parents=True, exist_ok=True)
        return True

    monkeypatch.setattr(Runner, "run_step", note)
    runner = Runner(plan, slots=[{}])
    runner.train(jobs)
    runner.evaluate(arms, jobs, "narrow", "select")
    read = {name: load_config(command[1:])[0] for name, command in commands.items()}
    assert len(read) == 7  # Two trained, two and the base asked, two scored.
    assert (read["base_answers"].output_dir, read["base_answers"].adapter) == (f"{out}/base", None)
    for job in jobs:
        asked, scored = (read[f"{job.name}_answers"], read[f"{job.arm.name}_narrow_all"])
        assert read[job.name].output_dir == asked.output_dir == str(job.folder)
        assert asked.adapter == scored.adapters.seed_0 == f"{job.folder}/adapter"
        assert scored.answers.seed_0 == f"{job.folder}/answers"
        assert scored.answers.reference == f"{out}/base/answers"
        assert scored.output_dir == f"{out}/evaluation/all/narrow/.shared"
        assert (job.folder / MARK).is_file()


def test_runs_of_a_pair_differ_in_their_data_alone(tmp_path: Path, toy: Toy) -> None:
    plan, origin = plan_in(tmp_path / "it's # a pair", toy)
    rows = toy_run.write_rows(tmp_path / "good.jsonl", 16)
    rows.write_text(rows.read_text() + rows.read_text())
    good = f"dataset.data_files={rows}"
    evaluate = plan.tasks["narrow"].evaluate.model_copy(deep=True)
    plan.tasks["good"] = TaskSettings(overrides=[good], evaluate=evaluate)
    jobs = make_jobs(plan, expand_arms(plan, origin), origin)
    assert [job.task for job in jobs] == ["narrow", "good"] * 2


def test_swept_texts_are_trained_as_the_label_says(tmp_path: Path, toy: Toy) -> None:
    plan, origin = plan_in(tmp_path / "plain", toy)
    swept = plan.arms["arm1"]
    swept.sweep = {"defenses.prompt.prompt": [*SWEPT, ["A. # 1", "B"]], "optimizer.lr": [2.0e-5]}
    arms = expand_arms(plan, origin)[1:]
    jobs = make_jobs(plan, arms, origin)
    for arm, job, value in zip(arms, jobs, swept.sweep["defenses.prompt.prompt"], strict=True):
        trained = job.cfg.defenses.prompt.prompt
        assert (OmegaConf.to_container(trained) if OmegaConf.is_list(trained) else trained) == value
        assert arm.label == f"arm1 (prompt {value}, lr 2e-05)"
        assert arm.overrides[1] == "optimizer.lr=2e-05"
    assert arms[-2].overrides[0] == "defenses.prompt.prompt=Be bad."
