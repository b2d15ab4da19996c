"""Runs what is missing of a comparison as subprocesses of `tune run`, and reuses what is there.

Each step leaves `compare.json` with its fingerprint in its folder once it has ended well. A step
whose folder has the fingerprint that it would get is not run again, so an interrupted comparison
continues, and a step whose config or data have changed is done anew.
"""

from __future__ import annotations

import json
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
        finished = []
        todo = [job for job in jobs if not is_done(job.folder, job.fingerprint, _ADAPTER)]
        with tqdm(total=len(todo), desc="Training", unit="run", disable=not todo) as bar:
            for job in jobs:
                if job in todo:
                    bar.set_postfix_str(job.name)
                    self._train(job)
                    bar.update()
                if is_done(job.folder, job.fingerprint, _ADAPTER):
                    finished.append(job)
        return finished

    def _train(self, job: Job) -> None:
        known = {k: v for k, v in job.cfg.items() if k in Settings.model_fields}
        path = self.folder / "configs" / f"{job.name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, OmegaConf.to_yaml(OmegaConf.create(known)))
        title = f"{job.arm.label}, {job.task} task, seed {job.seed}: training"
        processes = self.plan.settings.nproc_per_node
        launcher = ["--nproc_per_node", str(processes)] if processes > 1 else []
        command = [*launcher, "recipes/ema_lora.py", "--config", str(path)]
        self._run(title, job.name, command, job.folder, job.fingerprint)

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
        by_arm = {
            arm: [job for job in jobs if job.arm == arm and job.task == task]
            for arm in arms
            if task in arm.tasks
        }
        found = {}
        for arm, runs in tqdm(by_arm.items(), desc=f"Scores, {task} task", unit="arm"):
            title = f"{arm.label}, {task} task: scores"
            try:
                if arm.collect:
                    found[arm.name] = _collected(arm, self.plan.settings.seeds)
                elif runs:
                    folder = self._evaluate(title, arm, runs, task, half)
                    if folder is not None:
                        seeds = {f"seed_{job.seed}": job.seed for job in runs}
                        found[arm.name] = read_scores(folder, seeds)
            except UserError as error:
                self.failures.append(f"{title}: {error}")
        return found

    def _evaluate(
        self, title: str, arm: Arm, runs: Sequence[Job], task: str, half: Half
    ) -> Path | None:
        settings = self.plan.tasks[task]
        # Without overrides for the report half both halves are the same evaluation.
        name = half if settings.evaluate.report else "all"
        folder = self.folder / "evaluation" / name / task / arm.name
        overrides = evaluation_overrides(settings, half)
        for job in runs:
            overrides.append(f"adapters.seed_{job.seed}={job.folder / 'adapter'}")
        overrides += [f"output_dir={folder}", "overwrite=true"]
        cfg, _ = load_config(["--config", settings.evaluate.config, *overrides])
        mark = fingerprint(cfg, folder)
        if not is_done(folder, mark, Path(SUMMARY)):
            command = ["recipes/ema_eval.py", "--config", settings.evaluate.config, *overrides]
            self._run(title, f"{arm.name}_{task}_{name}", command, folder, mark)
        return folder if is_done(folder, mark, Path(SUMMARY)) else None

    def _run(self, title: str, name: str, command: list[str], folder: Path, mark: str) -> None:
        """`tune run COMMAND`, its output in a log. A failure is noted, not raised."""
        log = self.folder / "logs" / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        (folder / MARK).unlink(missing_ok=True)
        tune = str(Path(sys.executable).with_name("tune"))
        with log.open("w", encoding="utf-8") as file:
            ended = subprocess.run(
                [tune, "run", *command], stdout=file, stderr=subprocess.STDOUT, check=False
            )
        self.done += 1
        if ended.returncode == 0:
            write_text(folder / MARK, json.dumps({"fingerprint": mark}) + "\n")
            return
        reason = f"{title}: {_reason(log, ended.returncode)} (log: {log})"
        self.failures.append(reason)
        tqdm.write(f"failed: {reason}", file=sys.stderr)


def evaluation_overrides(task: TaskSettings, half: Half) -> list[str]:
    """A task's overrides of its evaluation's config; adapters that the config names are removed."""
    own = [*task.evaluate.overrides, *(task.evaluate.report if half == "report" else [])]
    cfg, _ = load_config(["--config", task.evaluate.config, *own])
    return [*own, *_removed(cfg, "adapters"), *_removed(cfg, "answers")]


def is_done(folder: Path, mark: str, result: Path) -> bool:
    """Whether a folder holds a step's result under this fingerprint."""
    try:
        found = json.loads((folder / MARK).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return found == {"fingerprint": mark} and (folder / result).is_file()


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
