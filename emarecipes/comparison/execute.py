"""Runs what is missing of a comparison as subprocesses of `tune run`, and reuses what is there.

Each step leaves a small file with its fingerprint once it has ended well. A step that would get the
fingerprint that is there is not run again, so an interrupted comparison
continues, and a step whose config or data have changed is done anew.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from emarecipes.comparison.arms import Arm, Job, fingerprint
from emarecipes.comparison.outcome import Half
from emarecipes.comparison.results import (
    SUMMARY,
    Scores,
    find_adapter,
    read_scores,
    stack,
)
from emarecipes.comparison.settings import Plan, TaskSettings
from emarecipes.config import load_config
from emarecipes.errors import UserError
from emarecipes.training.run_folder import write_text
from emarecipes.training.settings import Settings

MARK = "compare.json"
_ADAPTER = Path("adapter") / "adapter_model.safetensors"


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        title: For people.
        name: Of its log.
        mark: The file that holds its fingerprint once it has ended well.
        fingerprint: Of what it depends on.
    """

    title: str
    name: str
    mark: Path
    fingerprint: str

    def is_done(self) -> bool:
        """Whether it has ended well with this fingerprint."""
        try:
            found = json.loads(self.mark.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        return bool(found == {"fingerprint": self.fingerprint})


def _training_step(job: Job) -> Step:
    title = f"{job.arm.label}, {job.task} task, seed {job.seed}: training"
    return Step(title, job.name, job.folder / MARK, job.fingerprint)


@dataclass
class Runner:
    """The steps of one comparison.

    Attributes:
        plan: The checked config.
        failures: What failed and why, a line each.
        done: Number of steps that were run now.
    """

    plan: Plan
    failures: list[str] = field(default_factory=list)
    done: int = 0

    @property
    def folder(self) -> Path:
        """The comparison's output folder."""
        return Path(self.plan.settings.output_dir)

    def train(self, jobs: Sequence[Job]) -> list[Job]:
        """Run the training jobs that are missing; returns those whose adapter is there."""
        steps = {job: _training_step(job) for job in jobs}
        todo = [j for j in jobs if not (steps[j].is_done() and (j.folder / _ADAPTER).is_file())]
        with tqdm(total=len(todo), desc="Training", unit="run", disable=not todo) as bar:
            for job in todo:
                bar.set_postfix_str(job.name)
                self._train(job, steps[job])
                bar.update()
        return [job for job in jobs if steps[job].is_done()]

    def _train(self, job: Job, step: Step) -> None:
        known = {k: v for k, v in job.cfg.items() if k in Settings.model_fields}
        path = self.folder / "configs" / f"{job.name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, OmegaConf.to_yaml(OmegaConf.create(known)))
        processes = self.plan.settings.nproc_per_node
        launcher = ["--nproc_per_node", str(processes)] if processes > 1 else []
        self._run(step, [*launcher, "recipes/ema_lora.py", "--config", str(path)])

    def answer(self, jobs: Sequence[Job], task: str) -> list[Job]:
        """Sample answers of a task's runs, if it says how; returns the runs that have them."""
        settings = self.plan.tasks[task].generate if jobs else None
        if settings is None:
            return []
        found = []
        runs = [job for job in jobs if job.task == task]
        for job in tqdm(runs, desc="Answers", unit="run"):
            folder = job.folder / "answers"
            overrides = [*settings.overrides, f"adapter={job.folder / 'adapter'}"]
            overrides.append(f"output_dir={job.folder}")
            cfg, _ = load_config(["--config", settings.config, *overrides])
            step = Step(
                title=f"{job.arm.label}, {task} task, seed {job.seed}: answers",
                name=f"{job.name}_answers",
                mark=job.folder / "answers.compare.json",
                fingerprint=fingerprint(cfg, job.folder, job.fingerprint),
            )
            if not (step.is_done() and folder.is_dir()):
                # Answers of another adapter or setting go; those of an interrupted step are kept.
                again = ["overwrite=true"] if step.mark.exists() else []
                command = ["recipes/ema_generate.py", "--config", settings.config]
                self._run(step, [*command, *overrides, *again])
            if step.is_done():
                found.append(job)
        return found

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
        # Frontier arms are there for their shifts alone.
        asked = [job for arm in shown if arm.role != "frontier" for job in runs[arm]]
        answered = self.answer(asked, task)
        found = {}
        for arm in tqdm(shown, desc=f"Scores, {task} task", unit="arm"):
            title = f"{arm.label}, {task} task: scores"
            try:
                if arm.collect:
                    found[arm.name] = _collected(arm, self.plan.settings.seeds)
                elif runs[arm]:
                    folder = self._evaluate(title, runs[arm], answered, half)
                    if folder is not None:
                        seeds = {f"seed_{job.seed}": job.seed for job in runs[arm]}
                        found[arm.name] = read_scores(folder, seeds)
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
        name = half if settings.evaluate.report else "all"
        folder = self.folder / "evaluation" / name / task / arm.name
        overrides = evaluation_overrides(settings, half)
        overrides += [f"adapters.seed_{job.seed}={job.folder / 'adapter'}" for job in runs]
        overrides += [
            f"answers.seed_{job.seed}={job.folder / 'answers'}" for job in runs if job in answered
        ]
        cfg, _ = load_config(["--config", settings.evaluate.config, *overrides])
        mark = fingerprint(cfg, Path(str(cfg.output_dir)))
        step = Step(title, f"{arm.name}_{task}_{name}", folder / MARK, mark)
        if step.is_done() and (folder / SUMMARY).is_file():
            return folder
        # All arms are evaluated in one folder, where the reference's likelihoods are kept, and what
        # was found is moved to the arm's own.
        shared = folder.parent / ".shared"
        overrides += [f"output_dir={shared}", "overwrite=true"]
        folder.mkdir(parents=True, exist_ok=True)
        self._run(step, ["recipes/ema_eval.py", "--config", settings.evaluate.config, *overrides])
        if not step.is_done():
            return None
        shutil.rmtree(folder / "scores", ignore_errors=True)
        for result in ("scores", SUMMARY):
            (shared / result).replace(folder / result)
        return folder

    def _run(self, step: Step, command: list[str]) -> None:
        """`tune run COMMAND`, its output in a log. A failure is noted, not raised."""
        log = self.folder / "logs" / f"{step.name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        step.mark.unlink(missing_ok=True)
        tune = str(Path(sys.executable).with_name("tune"))
        with log.open("w", encoding="utf-8") as file:
            ended = subprocess.run(
                [tune, "run", *command], stdout=file, stderr=subprocess.STDOUT, check=False
            )
        self.done += 1
        if ended.returncode == 0:
            write_text(step.mark, json.dumps({"fingerprint": step.fingerprint}) + "\n")
            return
        reason = f"{step.title}: {_reason(log, ended.returncode)} (log: {log})"
        self.failures.append(reason)
        tqdm.write(f"failed: {reason}", file=sys.stderr)


def evaluation_overrides(task: TaskSettings, half: Half) -> list[str]:
    """A task's overrides of its evaluation's config; adapters that the config names are removed."""
    own = [*task.evaluate.overrides, *(task.evaluate.report if half == "report" else [])]
    cfg, _ = load_config(["--config", task.evaluate.config, *own])
    return [*own, *_removed(cfg, "adapters"), *_removed(cfg, "answers")]


def _removed(cfg: DictConfig, key: str) -> list[str]:
    entry: Any = cfg.get(key)
    return [f"~{key}.{name!s}" for name in entry] if isinstance(entry, DictConfig) else []


def _collected(arm: Arm, seeds: Sequence[int]) -> Scores:
    parts = []
    for folder, seed in zip(arm.collect, seeds, strict=True):
        parts.append(read_scores(Path(folder), {find_adapter(Path(folder)): seed}))
    return stack(parts)


def _reason(log: Path, code: int) -> str:
    """The line that a recipe ended with, or the last one there is."""
    lines = [
        line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()
    ]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    if errors:
        return errors[-1]
    last = next((line for line in reversed(lines) if line), "it said nothing")
    return f"ended with code {code}: {last[:300]}"
