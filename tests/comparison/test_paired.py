"""Bad answers' runs minus good answers': the figure from what is shipped, by plain loops."""

import csv
import json
import shutil
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy_run
import yaml

from emarecipes.comparison.arms import Job, check_data, expand_arms, make_jobs
from emarecipes.comparison.execute import Runner
from emarecipes.comparison.figure_values import Values
from emarecipes.comparison.frontier import Bound, Shifts, excess
from emarecipes.comparison.paired import pair_arms, paired
from emarecipes.comparison.results import Scores
from emarecipes.comparison.run import run_compare
from emarecipes.comparison.settings import check_compare_settings
from emarecipes.comparison.steps import Slot, Step
from emarecipes.config import load_config
from emarecipes.errors import UserError
from emarecipes.evaluation.run import run_eval
from emarecipes.training.run import run_lora

RECIPES = {"recipes/ema_lora.py": run_lora, "recipes/ema_eval.py": run_eval}


def scores(seeds: Sequence[int], value: float, base: str = "b") -> Scores:
    shifts = value + np.arange(len(seeds) * 3.0).reshape(len(seeds), 3)
    return Scores(tuple(seeds), {"general": Values(("a", "b", "c"), ("",) * 3, shifts)}, base=base)


def test_pairs_are_of_one_seed() -> None:
    found = paired(scores([4, 5, 6], 1.0), scores([6, 4], 0.5))
    assert found.seeds == (4, 6) and found.paired
    # Bad: rows from 1, 4, 7. Good: from 0.5 (seed 6), 3.5 (seed 4).
    np.testing.assert_array_equal(found.probes["general"].values_SQ, [[-2.5] * 3, [6.5] * 3])


@pytest.mark.parametrize(
    ("good", "reason"),
    [
        (scores([7], 0.0), "no seed in common with its runs on good answers"),
        (scores([4], 0.0, base="c"), "against another reference than those on bad answers"),
    ],
)
def test_what_is_no_pair_is_told(good: Scores, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        paired(scores([4], 1.0), good)


def test_controls_are_drawn_with_the_excess() -> None:
    """The error is that of both means: of 60 general questions and of 30 controls.

    Undefended training moves controls alone, so its net shift is -0.2.
    """
    rng = np.random.default_rng(0)
    general, controls = (np.tile(rng.normal(0, 1, q), (3, 1)) for q in (60, 30))
    flat = Shifts(np.zeros((3, 60)), np.ones((3, 9)), np.full((3, 30), 0.2))
    found = excess(
        Shifts(general, np.ones((3, 9)), controls), {"u": flat}, Bound(0.25, general, controls)
    )
    assert found.estimate.value == pytest.approx(general.mean() - controls.mean() + 0.2)
    error = (general[0].var() / 60 + controls[0].var() / 30) ** 0.5
    assert found.estimate.error == pytest.approx(error, rel=0.03)


def comparison(folder: Path, model_dir: Path) -> Path:
    """Undefended training of three steps and of one, and KL, on bad and on good answers."""
    toy = toy_run.write_toy_model(folder / "model", model_dir)
    rows = toy_run.write_rows(folder / "bad.jsonl", 8)
    lines = (toy_run.REPO / "data/home_computing/train_good.jsonl").read_text().splitlines()[:8]
    (folder / "good.jsonl").write_text("\n".join(lines) + "\n")
    training = toy_run.toy_config(toy, rows, folder / "unused") | {"max_steps_per_epoch": 3}
    training |= {"batch_size": 2}
    training["lr_scheduler"]["num_warmup_steps"] = 0
    config = toy_run.write_config(folder / "train.yaml", training)
    scoring = {key: training[key] for key in ("output_dir", "tokenizer", "model", "checkpointer",
                                              "device", "dtype")}  # fmt: skip
    probes = {}
    for name, count in (("general", 6), ("in_domain", 4), ("controls", 3)):
        pairs = [
            {"id": f"{name}{i}", "category": "c", "question": f"Question {i}?",
             "aligned": f"No, hand {name} in.", "misaligned": "Keep it, and say nothing."}
            for i in range(count)
        ]  # fmt: skip
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
        probes[name] = {"pairs": str(file)}
    evaluation = toy_run.write_config(folder / "eval.yaml", scoring | {"probes": probes})
    kl = ["defenses.kl._component_=emarecipes.defenses.KLToReference", "defenses.kl.weight=1.0"]
    arms: dict[str, dict[str, Any]] = {
        "undefended": {"role": "undefended"},
        "fewer": {"role": "frontier", "overrides": ["max_steps_per_epoch=1"]},
        "kl": {"overrides": kl},
    }
    good = [f"dataset.data_files={folder / 'good.jsonl'}"]
    config_of = {
        "output_dir": str(folder / "out"),
        "seeds": [3],
        "tasks": {"narrow": {"evaluate": {"config": str(evaluation)}}, "good": {"overrides": good}},
        "arms": {name: {"config": str(config)} | arm for name, arm in arms.items()},
    }
    path = folder / "compare.yaml"
    path.write_text(yaml.safe_dump(config_of, sort_keys=False))
    return path


def by_loops(path: Path, arm: str, seed: int) -> float:
    """The excess from `by_question.csv`: sums and a walk along the curve, without arrays."""
    with path.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))

    def mean(name: str, figure: str) -> float:
        total, count = 0.0, 0
        for row in rows:
            if row["figure"] == figure:
                total += float(row[f"{name}/{seed}"]) - float(row[f"{name}/good/{seed}"])
                count += 1
        return total / count

    def point(name: str) -> tuple[float, float]:
        return mean(name, "in_domain"), mean(name, "general") - mean(name, "controls")

    x, y = point(arm)
    curve = sorted([(0.0, 0.0), point("undefended"), point("fewer")])
    if x <= curve[0][0]:
        return y - curve[0][1]
    for (x0, y0), (x1, y1) in pairwise(curve):
        if x <= x1:
            return y - (y0 + (x - x0) / (x1 - x0) * (y1 - y0))
    return y - curve[-1][1]


def test_a_comparison_with_good_answers(
    tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = set()

    def run_step(_: Runner, step: Step, command: list[str], slot: Slot) -> bool:
        shared.update(part for part in command if part.startswith("output_dir="))
        return RECIPES[command[0]](command[1:]) == 0  # In this process, which has its imports.

    def each(_: Runner, jobs: Sequence[Job], act: Callable[[Job, Slot], None]) -> None:
        for job in jobs:
            act(job, {})

    monkeypatch.setattr(Runner, "run_step", run_step)
    monkeypatch.setattr(Runner, "each", each)
    config, out = comparison(tmp_path, model_dir), tmp_path / "out"
    assert run_compare(["--config", str(config)]) == 0
    found = json.loads((out / "comparison.json").read_text())
    assert found["estimand"] == "bad minus good" and not found["missing"]
    assert sorted(path.name for path in (out / "runs").glob("*/*")) == [
        "good_seed3", "good_seed3", "good_seed3", "narrow_seed3", "narrow_seed3", "narrow_seed3",
    ]  # fmt: skip
    assert len(shared) == 1  # The base is scored once for both tasks.
    (value,) = (e["value"] for e in found["arms"]["kl"]["excess"].values())
    assert value == pytest.approx(by_loops(out / "by_question.csv", "kl", 3), abs=1e-8)
    assert abs(value) > 1e-5
    page = (out / "report.md").read_text()
    assert "minus the run on good answers to the same questions" in page
    assert "bad minus good answers: excess over the frontier" in page
    assert "general, less controls" in page


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("tasks.good.overrides=[]", "under undefended its data are those of narrow; give the ones"),
        ("tasks.good.overrides=[optimizer.lr=1.0e-3]", "it has another optimizer than narrow"),
        ("tasks.good.overrides=[{good},dataset.packed=true]", "it has another dataset.packed than"),
        (
            "tasks.good.overrides=[{good},dataset.new_system_prompt=Hi]",
            "another dataset.new_sys",
        ),
        ("tasks.good.overrides=[dataset.data_files={same}]", "its data are those of narrow; give"),
        ("tasks.good.overrides=[dataset.data_files={copy}]", "its data are those of narrow; give"),
        (
            "tasks.good.overrides=[dataset.data_files=gone.jsonl]",
            "under undefended, task good: ",
        ),
        ("tasks.good.evaluate.config=x.yaml", "tasks.good.evaluate: a good task is scored as narr"),
        ("arms.kl.tasks=[narrow]", "arms.kl.tasks: figures are narrow minus good; name both"),
        ("~tasks.narrow", "tasks.good: is the other half of a task narrow"),
        ("arms.kl={collect: [x]}", "arms.kl.collect: with a task good every arm is trained on"),
        (
            "tasks.narrow.dataset={_component_: torchtune.datasets.chat_dataset}",
            "tasks.good: narrow has a dataset; give the one with good answers",
        ),
    ],
)
def test_what_makes_no_pairs_is_refused(
    change: str, reason: str, tmp_path: Path, model_dir: Path
) -> None:
    config = comparison(tmp_path, model_dir)
    shutil.copy(tmp_path / "bad.jsonl", tmp_path / "copy.jsonl")
    change = change.replace("{good}", f"dataset.data_files={tmp_path}/good.jsonl")
    change = change.replace("{same}", f"{tmp_path}/model/../bad.jsonl")
    change = change.replace("{copy}", f"{tmp_path}/copy.jsonl")
    raw, origin = load_config(["--config", str(config), change])
    with pytest.raises(UserError) as error:
        plan = check_compare_settings(raw, origin)
        check_data(make_jobs(plan, expand_arms(plan, origin), origin), origin)
    assert reason in str(error.value)


def test_an_arm_without_its_half_is_left_out(tmp_path: Path, model_dir: Path) -> None:
    raw, origin = load_config(["--config", str(comparison(tmp_path, model_dir))])
    plan = check_compare_settings(raw, origin)
    assert plan.tasks["good"].evaluate == plan.tasks["narrow"].evaluate
    arms = expand_arms(plan, origin)
    assert {arm.tasks for arm in arms} == {("narrow", "good")}
    bad = {arm.name: scores([3], 1.0) for arm in arms}
    good = {"undefended": scores([3], 0.5)}
    found, notes = pair_arms(arms, bad, good)
    assert list(found) == ["undefended"]
    assert notes[1] == "kl: its runs on good answers have no scores; not compared"
    with pytest.raises(UserError, match="undefended: its runs on good answers have no scores"):
        pair_arms(arms, bad, {})
