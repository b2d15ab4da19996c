"""A swept defense under `frozen: true`: chosen on the select half, kept, reported on the other."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import toy_compare
import toy_run

from emarecipes.comparison.arms import Arm, Job, expand_arms, make_jobs
from emarecipes.comparison.execute import Runner
from emarecipes.comparison.opening import check_choices
from emarecipes.comparison.outcome import Half, Outcome
from emarecipes.comparison.results import Scores, read_scores
from emarecipes.comparison.run import compare
from emarecipes.comparison.settings import Plan, check_compare_settings
from emarecipes.comparison.steps import Slot, Step
from emarecipes.config import load_config
from emarecipes.errors import UserError

Halves = dict[Half, dict[str, tuple[float, float]]]
Reads = list[tuple[Half, list[str]]]

SEEDS = {"seed_0": 0, "seed_1": 1}
# In-domain and general shift. The frontier's truth is general = 0.5 x, so that the excesses of the
# candidates on the select half are +0.05, -0.2, -0.05, and on the report half +0.05, +0.1, -0.3.
SELECT = {
    "undefended": (1.0, 0.5),
    "fewer_0": (0.5, 0.25),
    "kl_0": (0.6, 0.35),
    "kl_1": (0.6, 0.10),
    "kl_2": (0.8, 0.35),
}
REPORT = SELECT | {"kl_1": (0.6, 0.40), "kl_2": (0.8, 0.10)}


class Given(Runner):
    """A runner for which everything has been run, and which notes what is read."""

    def __init__(self, plan: Plan, halves: Halves, folder: Path) -> None:
        super().__init__(plan, slots=[{}])
        self.halves, self.given = halves, folder
        self.read: Reads = []

    def train(self, jobs: Sequence[Job]) -> list[Job]:
        return list(jobs)

    def evaluate(
        self, arms: Sequence[Arm], jobs: Sequence[Job], task: str, half: Half
    ) -> dict[str, Scores]:
        self.read.append((half, [arm.name for arm in arms]))
        found = {}
        for number, arm in enumerate(arms):
            folder = self.given / f"{len(self.read)}_{arm.name}"
            shifts = {name: self.halves[half][arm.name] for name in SEEDS}
            toy_compare.evaluation(folder, shifts, seed=number, half=half)
            found[arm.name] = read_scores(folder, SEEDS)
        return found


@pytest.fixture
def config(tmp_path: Path, model_dir: Path) -> Path:
    rows = toy_run.write_rows(tmp_path / "rows.jsonl", 16)
    training = toy_run.toy_config(model_dir, rows, tmp_path / "unused")
    training["defenses"] = {"kl": {"_component_": "emarecipes.defenses.KLToReference"}}
    path = str(toy_run.write_config(tmp_path / "train.yaml", training))
    plain = {"config": path, "overrides": ["~defenses"]}
    return toy_run.write_config(
        tmp_path / "compare.yaml",
        {
            "output_dir": str(tmp_path / "out"),
            "seeds": list(SEEDS.values()),
            "frozen": True,
            "tasks": {"narrow": {"evaluate": {"config": path}}},
            "arms": {
                "undefended": plain | {"role": "undefended"},
                "fewer": plain | {"role": "frontier", "sweep": {"max_steps_per_epoch": [2]}},
                "kl": {"config": path, "sweep": {"defenses.kl.weight": [0.1, 1.0, 10.0]}},
            },
        },
    )


def run(config: Path, halves: Halves, folder: Path, *overrides: str) -> tuple[Outcome, Reads]:
    raw, origin = load_config(["--config", str(config), *overrides])
    plan = check_compare_settings(raw, origin)
    arms = expand_arms(plan, origin)
    jobs = make_jobs(plan, arms, origin)
    check_choices(plan, arms, jobs, origin)
    runner = Given(plan, halves, folder)
    return compare(plan, arms, jobs, runner), runner.read


def test_a_swept_defense_is_chosen_on_select_and_reported_on_report(
    config: Path, tmp_path: Path
) -> None:
    outcome, read = run(config, {"select": SELECT, "report": REPORT}, tmp_path / "first")
    shown = ["undefended", "fewer_0", "kl_1"]
    assert read == [("select", list(SELECT)), ("report", shown)]
    kept = (tmp_path / "out/choices.json").read_bytes()
    assert json.loads(kept)["chosen"] == {"kl": "kl_1"}
    assert set(json.loads(kept)["arms"]) == set(SELECT)
    assert (outcome.half, outcome.family, outcome.changed) == ("report", ["kl_1"], [])
    # The config has no overrides for the report half, whatever the stand-in's scores say.
    assert [line for line in outcome.missing if "evaluate.report is empty" in line]
    found = {figures.arm.name: figures for figures in outcome.figures}
    assert list(found) == shown
    assert found["kl_1"].arm.overrides == ("defenses.kl.weight=1.0",)
    excess = found["kl_1"].excesses["general"].estimate.value
    assert excess == pytest.approx(REPORT["kl_1"][1] - 0.5 * REPORT["kl_1"][0], abs=1e-9)

    # Later another value would win on select: the choice stands, and select is not read again.
    better = SELECT | {"kl_2": (0.8, -0.5)}
    outcome, read = run(config, {"select": better, "report": REPORT}, tmp_path / "second")
    assert read == [("report", shown)] and outcome.family == ["kl_1"]
    assert (tmp_path / "out/choices.json").read_bytes() == kept
    assert outcome.opening is not None and outcome.opening.opened == json.loads(kept)["opened"]


def test_a_candidate_that_learned_nothing_does_not_win(config: Path, tmp_path: Path) -> None:
    halves = {"select": SELECT | {"kl_2": (-0.1, -0.5)}, "report": REPORT}
    outcome, _ = run(config, halves, tmp_path / "first")
    assert outcome.family == ["kl_1"]


def test_without_a_choice_every_value_is_tested(config: Path, tmp_path: Path) -> None:
    halves = {"select": SELECT, "report": SELECT}
    outcome, read = run(config, halves, tmp_path / "first", "arms.kl.choose=false")
    assert read == [("report", list(SELECT))]
    assert outcome.family == ["kl_0", "kl_1", "kl_2"]
    assert [f.arm.name for f in outcome.figures if f.arm.role == "defense"] == outcome.family


BOTH: Halves = {"select": SELECT, "report": REPORT}


@pytest.mark.parametrize("older", [False, True])
def test_a_choice_does_not_move_to_another_value(config: Path, tmp_path: Path, older: bool) -> None:
    run(config, BOTH, tmp_path / "first")
    path = tmp_path / "out/choices.json"
    found = json.loads(path.read_text())
    assert found["values"] == {"kl": ["defenses.kl.weight=1.0"]}
    if older:  # Then it is known by what is trained.
        del found["values"]
        path.write_text(json.dumps(found))

    def refused(values: str, now: str) -> None:
        told = rf"kl.sweep: kl_1 was chosen when .*, with defenses.kl.weight=1.0; now it is .*{now}"
        with pytest.raises(UserError, match=told):
            run(config, BOTH, tmp_path / "none", f"arms.kl.sweep={{defenses.kl.weight: {values}}}")

    refused("[1.0,0.1,10.0]", "weight=0.1")
    refused("[1.0]", "not there")
    if not older:
        refused("[0.1,2.0]", "weight=2.0")
    # The others are free.
    outcome, read = run(
        config, BOTH, tmp_path / "second", "arms.kl.sweep={defenses.kl.weight: [0.3,1.0,10.0,30]}"
    )
    assert outcome.family == ["kl_1"] and read == [("report", ["undefended", "fewer_0", "kl_1"])]


@pytest.mark.parametrize("first", ["true", "false"])
def test_whether_a_value_is_chosen_stays_as_it_was(
    config: Path, tmp_path: Path, first: str
) -> None:
    run(config, BOTH, tmp_path / "first", f"arms.kl.choose={first}")
    other = "false" if first == "true" else "true"
    told = r"choose: kl_1 was chosen" if first == "true" else r"choose: was false when"
    with pytest.raises(UserError, match=rf"arms.kl.{told}"):
        run(config, BOTH, tmp_path / "second", f"arms.kl.choose={other}")


@pytest.mark.parametrize(("seeds", "told"), [("1,0", ""), ("1,2", "0, 1 before, 1, 2 now")])
def test_seeds_are_no_part_of_an_arm(config: Path, tmp_path: Path, seeds: str, told: str) -> None:
    run(config, BOTH, tmp_path / "first")
    expected = [f"the seeds ({told})"] if told else []
    for arm, changed in {"kl": [], "fewer": ["fewer (max_steps_per_epoch 2) (changed)"]}.items():
        own = {"kl": "[]", "fewer": "[~defenses,optimizer.lr=1.0e-3]"}[arm]
        given = [f"seeds=[{seeds}]", f"arms.{arm}.overrides={own}"]
        outcome, _ = run(config, BOTH, tmp_path / arm, *given)
        assert outcome.changed == changed + expected


def test_what_is_asked_is_known_by_its_content(config: Path, tmp_path: Path) -> None:
    probe, scoring = tmp_path / "report.jsonl", tmp_path / "eval.yaml"
    probe.write_text("first")
    # A folder that holds the probe: it is not where results go.
    rule = {"output_dir": str(tmp_path), "probes": {"general": {"pairs": str(probe)}}}
    toy_run.write_config(scoring, rule)
    task = f"tasks.narrow.evaluate.config={scoring}"

    def changed(*overrides: str) -> list[str]:
        folder = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        return run(config, BOTH, folder, task, *overrides)[0].changed

    assert changed() == changed() == []
    probe.write_text("other")
    asked = "how the narrow task is evaluated"
    assert changed() == [asked]
    probe.write_text("first")
    toy_run.write_config(scoring, rule | {"max_rows": 3})
    assert changed() == [asked]
    toy_run.write_config(scoring, rule)
    assert changed("criteria.coherent.suite=judge") == ["the criteria"]
    assert changed("bounds.benign=0.2") == ["the bounds"]
    assert changed() == []


def test_an_older_file_of_choices(config: Path, tmp_path: Path) -> None:
    """It has one fingerprint of the rules, without any file's content."""
    run(config, BOTH, tmp_path / "first")
    path = tmp_path / "out/choices.json"
    found = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in found.items() if k != "values"} | {"rules": "0"}))
    outcome, _ = run(config, BOTH, tmp_path / "second")
    assert outcome.changed == ["bounds, probes, or how runs are evaluated"]
    assert any("choices.json is of an earlier version" in line for line in outcome.missing)


@pytest.mark.parametrize("entry", ["undefended", "fewer", "alone"])
def test_choose_false_where_nothing_is_chosen_is_refused(
    config: Path, tmp_path: Path, entry: str
) -> None:
    alone = f"arms.alone.config={tmp_path / 'train.yaml'}"
    raw, origin = load_config(["--config", str(config), alone, f"arms.{entry}.choose=false"])
    plan = check_compare_settings(raw, origin)
    with pytest.raises(UserError, match=rf"arms.{entry}.choose: false is for a defense with a sw"):
        expand_arms(plan, origin)


@pytest.mark.parametrize("choose", ["true", "false"])
def test_two_arms_of_one_name_are_refused(config: Path, tmp_path: Path, choose: str) -> None:
    other = f"arms.kl_1.config={tmp_path / 'train.yaml'}"
    raw, origin = load_config(["--config", str(config), other, f"arms.kl.choose={choose}"])
    plan = check_compare_settings(raw, origin)
    with pytest.raises(UserError, match=r"arms.kl_1: kl_1 is also an arm of kl"):
        expand_arms(plan, origin)


def test_an_override_of_data_that_the_task_replaces_is_refused(config: Path) -> None:
    replaced = "tasks.narrow.dataset._component_=torchtune.datasets.alpaca_dataset"
    arm = "arms.kl.overrides=[dataset.split=train]"
    raw, origin = load_config(["--config", str(config), replaced, arm])
    plan = check_compare_settings(raw, origin)
    with pytest.raises(UserError, match=r"arms.kl.*dataset.split=train: the task's dataset takes"):
        make_jobs(plan, expand_arms(plan, origin), origin)


def test_an_arm_without_answers_is_evaluated_without_its_judge(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged = ["judge.models=[mockllm/model]", "harmless=[general]"]
    evaluate = toy_run.REPO / "configs/smollm2_135m_eval.yaml"
    overrides = [
        f"tasks.narrow.evaluate.config={evaluate}", f"tasks.narrow.evaluate.overrides={judged}",
    ]  # fmt: skip
    raw, origin = load_config(["--config", str(config), *overrides])
    plan = check_compare_settings(raw, origin)
    arms = expand_arms(plan, origin)
    jobs = make_jobs(plan, arms, origin)
    commands: list[list[str]] = []

    def note(_: Runner, step: Step, command: list[str], slot: Slot) -> bool:
        commands.append(command)
        return False

    monkeypatch.setattr(Runner, "run_step", note)
    Runner(plan, slots=[{}]).evaluate(arms[:1], jobs, "narrow", "select")
    assert {"~judge", "~harmless"} <= set(commands[0])
