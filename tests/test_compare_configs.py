"""Shipped comparisons pass every check, and have the promised arms."""

from functools import cache
from pathlib import Path

import pytest
import torch
import toy_run

from emarecipes.comparison.arms import Arm, Job, expand_arms, make_jobs
from emarecipes.comparison.execute import evaluation_overrides
from emarecipes.comparison.settings import Plan, check_compare_settings
from emarecipes.comparison.tasks import check_tasks
from emarecipes.config import load_config
from emarecipes.errors import UserError
from emarecipes.evaluation.settings import check_eval_settings

CONFIGS = sorted((toy_run.REPO / "configs").glob("*.yaml"))


COMPARE = [path for path in CONFIGS if path.stem.startswith("compare_")]


@cache
def planned(path: Path) -> tuple[Plan, list[Arm], list[Job]]:
    raw, origin = load_config(["--config", str(path)])
    plan = check_compare_settings(raw, origin)
    arms = expand_arms(plan, origin)
    check_tasks(plan, origin)
    return plan, arms, make_jobs(plan, arms, origin)  # Checks every arm's training config.


@pytest.mark.parametrize("path", COMPARE, ids=lambda path: path.stem)
def test_shipped_compare_config(path: Path) -> None:
    if "torch.optim.Muon" in path.read_text() and not hasattr(torch.optim, "Muon"):
        with pytest.raises(UserError, match=r"torch.optim has no Muon: it came with torch 2.9"):
            planned(path)
        return
    plan, arms, jobs = planned(path)
    assert len(jobs) == len(plan.settings.seeds) * sum(len(arm.tasks) for arm in arms)
    assert len({job.fingerprint for job in jobs}) == len(jobs)
    for task in plan.tasks.values():
        for half in ("select", "report"):
            # Answers are there once they are sampled.
            overrides = [*evaluation_overrides(task, half), "answers.seed=."]
            eval_raw, eval_origin = load_config(["--config", task.evaluate.config, *overrides])
            found = check_eval_settings(eval_raw, eval_origin)
            if plan.sampled:
                continue  # What is counted in sampled answers has no halves.
            assert found.opswap is not None or f"{half}.jsonl" in found.probes.general["pairs"]
    assert plan.settings.output_dir == f"runs/{path.stem}"
    header = path.read_text().split("\n\n")[0]
    assert f"recipes/ema_compare.py --config configs/{path.name}" in header


def test_the_full_comparison_has_the_promised_arms() -> None:
    plan, _, jobs = planned(toy_run.REPO / "configs/compare_smollm2_135m.yaml")
    steps = {job.cfg.max_steps_per_epoch for job in jobs
             if job.task == "narrow" and job.arm.role in ("undefended", "frontier")}  # fmt: skip
    assert steps == {4, 10, 20, 30, 40}  # 10, 25, 50, 75 and 100 %.
    assert len(plan.arms["lower_rate"].sweep["optimizer.lr"]) == 2
    defenses = {name for name, arm in plan.arms.items() if arm.role == "defense"}
    assert defenses == {"kl", "kl_safe", "feature_l2", "interleaving", "persona", "all"}
    controls = {name for name, arm in plan.arms.items() if arm.role == "control"}
    assert controls == {"persona_random", "good_answers"}
    assert len(plan.settings.seeds) >= 5


def test_the_bed_of_half_a_billion_is_paired_and_its_arms_see_as_many_task_rows() -> None:
    plan, arms, jobs = planned(toy_run.REPO / "configs/compare_qwen2_5_coder_0_5b.yaml")
    assert all(set(arm.tasks) == {"narrow", "good"} for arm in arms)
    for job in jobs:
        data = job.cfg.dataset
        mixed = "task" in data
        file = (data.task if mixed else data).data_files
        assert file.endswith({"narrow": "train_bad.jsonl", "good": "train_good.jsonl"}[job.task])
        assert not mixed or data.seed == job.seed, "which safe rows are drawn is chance too"
        rows = job.cfg.max_steps_per_epoch * job.cfg.batch_size
        if job.arm.role != "frontier":
            assert rows * (1 - data.get("safe_fraction", 0)) == 120
    assert {arm.role for arm in arms} == {"undefended", "frontier", "defense"}
    assert len(plan.settings.seeds) == 2
