"""Runs what is missing of a comparison as subprocesses of `tune run`, and reuses what is there.

Each step leaves a small file with its fingerprint once it has ended well. A step that would get the
fingerprint that is there is not run again, so an interrupted comparison continues, a training run
from its newest checkpoint, and a step whose config or data have changed is done anew.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from emarecipes.comparison.arms import Arm, Job, fingerprint
from emarecipes.comparison.outcome import Half
from emarecipes.comparison.results import (
    Scores,
    find_adapter,
    read_scores,
    stack,
)
from emarecipes.comparison.settings import (
    GOOD,
    AnswersSettings,
    CompareSettings,
    TaskSettings,
)
from emarecipes.comparison.status import (
    Piece,
    answers_title,
    scores_title,
    training_title,
)
from emarecipes.comparison.steps import Slot, Step, Steps
from emarecipes.config import load_config
from emarecipes.errors import UserError
from emarecipes.evaluation.figures import REFERENCE, SUMMARY
from emarecipes.evaluation.settings import without_answers
from emarecipes.files import write_text
from emarecipes.overrides import as_override
from emarecipes.training.settings import Settings

MARK = "compare.json"
# What the share of a trait in an arm's answers is a change from.
BASE_ANSWERS = "answers of the base"
_WEIGHTS = "adapter_model.safetensors"


def _training_step(job: Job) -> Step:
    return Step(training_title(job), job.name, job.folder / MARK, job.fingerprint)


class Runner(Steps):
    """What is done to the arms of a comparison, where it is missing."""

    _base: Path | None = None

    def train(self, jobs: Sequence[Job]) -> list[Job]:
        """Run the training jobs that are missing; returns those whose adapter is there."""
        steps = {job: _training_step(job) for job in jobs}

        def trained(job: Job) -> bool:
            return steps[job].is_done() and (job.adapter / _WEIGHTS).is_file()

        todo = [job for job in jobs if not trained(job)]
        for job in jobs:
            if job not in todo:
                self.status.drop(steps[job].title)
        self.each(todo, lambda job, slot: self._train(job, steps[job], slot))
        return [job for job in jobs if trained(job)]

    def _train(self, job: Job, step: Step, slot: Slot) -> None:
        known = {k: v for k, v in job.cfg.items() if k in Settings.model_fields}
        path = self.folder / "configs" / f"{job.name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        started = path.with_suffix(".json")
        begun = step.is_in(started) and not step.is_done()
        if begun and any((job.folder / "checkpoints").glob("step_*")):
            known |= {"overwrite": False, "resume": "auto"}
        step.write(started)
        write_text(path, OmegaConf.to_yaml(OmegaConf.create(known)))
        processes = self.plan.settings.nproc_per_node
        launcher = ["--nproc_per_node", str(processes)] if processes > 1 else []
        if self.run_step(step, [*launcher, "recipes/ema_lora.py", "--config", str(path)], slot):
            step.write(step.mark)

    def answer(self, jobs: Sequence[Job], task: str) -> list[Job]:
        """Sample answers of a task's runs, if it says how; returns the runs that have them."""
        settings = self.plan.tasks[task].generate if jobs else None
        if settings is None:
            return []
        steps: dict[Job, Step] = {}
        runs = [job for job in jobs if job.task == task]
        self.status.expect(Piece(answers_title(job), "answers", task) for job in runs)

        def sample(job: Job, slot: Slot) -> None:
            overrides = [*settings.overrides, as_override("adapter", job.adapter)]
            overrides.append(as_override("output_dir", job.folder))
            cfg, _ = load_config(["--config", settings.config, *overrides])
            steps[job] = step = Step(
                title=answers_title(job),
                name=f"{job.name}_answers",
                mark=job.folder / "answers.compare.json",
                fingerprint=fingerprint(cfg, job.folder, job.fingerprint),
                made=job.folder / "answers",
            )
            if step.is_done():
                self.status.drop(step.title)
            else:
                step.begin()
                command = ["recipes/ema_generate.py", "--config", settings.config, *overrides]
                if self.run_step(step, command, slot):
                    step.write(step.mark)

        self.each(runs, sample)
        return [job for job in runs if steps[job].is_done()]

    def _sample_base(self, generate: AnswersSettings) -> Path | None:
        """The folder with the base's answers, sampled as the arms' are; None if sampling failed."""
        folder = self.folder / "base"
        overrides = [*generate.overrides, "adapter=null", as_override("output_dir", folder)]
        cfg, _ = load_config(["--config", generate.config, *overrides])
        mark, made = folder / "answers.compare.json", folder / "answers"
        step = Step(BASE_ANSWERS, "base_answers", mark, fingerprint(cfg, folder), made)
        if not step.is_done():
            self.status.expect([Piece(BASE_ANSWERS, "answers", "narrow")])
            step.begin()
            command = ["recipes/ema_generate.py", "--config", generate.config, *overrides]
            if not self.run_step(step, command, slot={}):
                return None
            step.write(mark)
        return made

    def evaluate(
        self, arms: Sequence[Arm], jobs: Sequence[Job], task: str, half: Half
    ) -> dict[str, Scores]:
        """Scores of each arm's runs on a task; those that are missing are computed.

        Args:
            arms: The arms.
            jobs: The training runs that are there.
            task: Which task.
            half: Of the general questions.
        """
        runs = {arm: [j for j in jobs if j.arm == arm and j.task == task] for arm in arms}
        shown = [arm for arm in arms if task in arm.tasks]
        # Frontier arms are there for their shifts alone, which answers may be what shows.
        sampled = task in ("narrow", GOOD) and self.plan.sampled
        asked = [job for a in shown if sampled or a.role != "frontier" for job in runs[a]]
        answered = self.answer(asked, task)
        generate = self.plan.tasks[task].generate if task in self.plan.tasks else None
        if sampled and answered and generate is not None:
            self._base = self._sample_base(generate)
        found = {}
        for arm in shown:
            title = scores_title(arm, task)
            try:
                if arm.collect:
                    found[arm.name] = _collected(arm, self.plan.settings)
                elif runs[arm]:
                    folder = self._evaluate(title, runs[arm], answered, half)
                    if folder is not None:
                        seeds = {f"seed_{job.seed}": job.seed for job in runs[arm]}
                        found[arm.name] = read_scores(folder, seeds, self.plan.settings.criteria)
            except UserError as error:
                self.failures.append(f"{title}: {error}")
        return found

    def _evaluate(
        self, title: str, runs: Sequence[Job], answered: Sequence[Job], half: Half
    ) -> Path | None:
        """The evaluation of all runs of one arm on one task; None if it failed."""
        arm, task = runs[0].arm, runs[0].task
        settings = self.plan.tasks[task]
        # Without overrides for the report half both halves are the same evaluation.
        name: str = half if settings.evaluate.report else "all"
        fewer = self.plan.settings.first_look(task, half)
        name += "_look_1" if fewer else ""
        folder = self.folder / "evaluation" / name / task / arm.name
        overrides = evaluation_overrides(settings, half) + fewer
        overrides += [as_override(f"adapters.seed_{job.seed}", job.adapter) for job in runs]
        given = [job for job in runs if job in answered]
        overrides += [as_override(f"answers.seed_{j.seed}", j.folder / "answers") for j in given]
        if given and task in ("narrow", GOOD) and self._base is not None:
            overrides.append(as_override(f"answers.{REFERENCE}", self._base))
        cfg, _ = load_config(["--config", settings.evaluate.config, *overrides])
        if not given:  # What is about answers is refused where there are none.
            about = [f"~{key}" for key in without_answers(cfg)]
            overrides += about
            cfg, _ = load_config(["--config", settings.evaluate.config, *overrides])
        # All arms are evaluated in one folder, where the reference's likelihoods are kept, and what
        # was found is moved to the arm's own.
        shared = folder.parents[1] / ("narrow" if task == GOOD else task) / ".shared"
        cfg.output_dir = str(shared)  # As it will be: the config's own may hold the runs.
        step = Step(title, f"{arm.name}_{task}_{name}", folder / MARK, fingerprint(cfg, shared))
        if step.is_done() and (folder / SUMMARY).is_file():
            self.status.drop(title)
            return folder
        overrides += [as_override("output_dir", shared), "overwrite=true"]
        folder.mkdir(parents=True, exist_ok=True)
        # Alone, so with all of the machine.
        command = ["recipes/ema_eval.py", "--config", settings.evaluate.config, *overrides]
        (shared / SUMMARY).unlink(missing_ok=True)
        ended = self.run_step(step, command, slot={})
        # Written also where an adapter or a judge failed: the rest counts; a next call tries again.
        if not (shared / SUMMARY).is_file():
            return None
        shutil.rmtree(folder / "scores", ignore_errors=True)
        for result in ("scores", SUMMARY):
            (shared / result).replace(folder / result)
        if ended:
            step.write(step.mark)  # Last: a kill before leaves no older scores that look done.
        return folder


def evaluation_overrides(task: TaskSettings, half: Half) -> list[str]:
    """A task's overrides of its evaluation's config; adapters that the config names are removed."""
    own = [*task.evaluate.overrides, *(task.evaluate.report if half == "report" else [])]
    cfg, _ = load_config(["--config", task.evaluate.config, *own])
    return [*own, *_removed(cfg, "adapters"), *_removed(cfg, "answers")]


def _removed(cfg: DictConfig, key: str) -> list[str]:
    entry: Any = cfg.get(key)
    # The base's own answers stay: what they are is every arm's yardstick.
    names = entry if isinstance(entry, DictConfig) else ()
    return [f"~{key}.{name!s}" for name in names if name != REFERENCE]


def _collected(arm: Arm, settings: CompareSettings) -> Scores:
    parts = []
    for run, seed in zip(map(Path, arm.collect), settings.seeds, strict=True):
        parts.append(read_scores(run, {find_adapter(run): seed}, settings.criteria))
    return stack(parts)
