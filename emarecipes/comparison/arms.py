"""From a comparison's config to the training runs that it needs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from emarecipes.comparison.in_common import settle_dates, settle_dtypes
from emarecipes.comparison.pairs import check_pairs
from emarecipes.comparison.settings import GOOD, RUN_ADAPTER, ArmSettings, Plan, Role
from emarecipes.components import check_components
from emarecipes.config import Origin, load_config
from emarecipes.datasets.chat_files import check_data_files
from emarecipes.errors import UserError
from emarecipes.fingerprint import digest, named_files, sampled_digest
from emarecipes.overrides import as_override
from emarecipes.training.settings import check_settings


@dataclass(frozen=True)
class Arm:
    """One way of training, with one value of each swept key.

    Attributes:
        name: Of files, such as `kl` or `kl_1` for the second value of its sweep.
        group: The entry in the config.
        label: For people.
        series: What arms that are doses of one defense, each tested, are called together.
        role: See `ArmSettings`.
        tasks: The tasks that it is trained on.
        overrides: Of its config, the swept values among them.
        config: Its training config; None if its runs are collected.
        collect: Run folders, one a seed; empty if it is trained.
        adapter: Folder in a run of the adapter that is evaluated.
    """

    name: str
    group: str
    label: str
    role: Role
    tasks: tuple[str, ...]
    overrides: tuple[str, ...] = ()
    config: str | None = None
    collect: tuple[str, ...] = ()
    series: str = ""
    adapter: str = RUN_ADAPTER

    @property
    def choice(self) -> str:
        """Common to the candidates for one defense: a sweep's values, or the arm alone."""
        return self.name if self.series else self.group


@dataclass(frozen=True, eq=False)
class Job:
    """One training run.

    Attributes:
        arm: Its arm.
        task: Its task.
        seed: Its seed.
        folder: Its output folder.
        cfg: Its resolved config.
        fingerprint: Digest of the config and of the files that it names.
    """

    arm: Arm
    task: str
    seed: int
    folder: Path
    cfg: DictConfig
    fingerprint: str

    @property
    def name(self) -> str:
        """Of its config's and log's file."""
        return f"{self.arm.name}_{self.task}_seed{self.seed}"

    @property
    def adapter(self) -> Path:
        """The folder of the adapter that is evaluated."""
        return self.folder / self.arm.adapter


def expand_arms(plan: Plan, origin: Origin) -> list[Arm]:
    """The arms of a plan, a sweep taken apart into one arm for each combination of values.

    Raises:
        UserError: A value of a sweep would get the name of another arm, and its folders; `choose`
            where there is nothing to choose.
    """
    arms: list[Arm] = []
    entries: dict[str, str] = {}  # By the arm's name, which its folders have.
    for entry, settings in plan.arms.items():
        if not settings.choose and (settings.role != "defense" or not settings.sweep):
            raise UserError(
                f"{origin.at(f'arms.{entry}.choose')}: false is for a defense with a sweep; "
                "nothing is chosen here"
            )
        for arm in _expand(entry, settings, list(plan.tasks)):
            arms.append(arm)
            other = entries.setdefault(arm.name, entry)
            if other != entry:
                raise UserError(
                    f"{origin.at(f'arms.{entry}')}: {arm.name} is also an arm of {other}, since a "
                    "sweep's arms are numbered; rename one"
                )
    return arms


def _expand(name: str, arm: ArmSettings, all_tasks: list[str]) -> list[Arm]:
    label = arm.label or name.replace("_", " ")
    # The frontier is about the narrow task; what a benign task costs is asked of other arms.
    of_frontier = [task for task in all_tasks if task in ("narrow", GOOD)]
    tasks = arm.tasks or (of_frontier if arm.role == "frontier" else all_tasks)
    if arm.collect is not None:
        return [Arm(name, name, label, arm.role, ("narrow",), collect=tuple(arm.collect))]
    found = []
    for number, values in enumerate(itertools.product(*arm.sweep.values())):
        pairs = list(zip(arm.sweep, values, strict=True))
        short = ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in pairs)
        own = f"{name}_{number}" if arm.sweep else name
        found.append(
            Arm(
                name=own,
                group=name,
                label=f"{label} ({short})" if arm.sweep else label,
                role=arm.role,
                tasks=tuple(tasks),
                overrides=(*arm.overrides, *(as_override(key, value) for key, value in pairs)),
                config=arm.config,
                series="" if arm.choose else label,
                adapter=arm.adapter,
            )
        )
    return found


def make_jobs(plan: Plan, arms: list[Arm], origin: Origin) -> list[Job]:
    """Every training run of the arms, its config checked; seed by seed, so that seeds come whole.

    Where `dtype` is left to the machine it is set, to one for all, here and in the plan's tasks;
    and so is the day that a chat template prints.

    Raises:
        UserError: A config that does not fit, with the arm that it is for; two that say different
            dtypes or days.
    """
    runs = [
        (arm, task, seed, run_folder(plan, arm, task, seed))
        for seed in plan.settings.seeds
        for arm in arms
        if arm.config is not None
        for task in arm.tasks
    ]
    loaded = [_config(plan, *run, origin) for run in runs]
    named = [(arm.name, task, seed, folder) for arm, task, seed, folder in runs]
    labels = {arm.name: arm.label for arm in arms}
    check_pairs(named, loaded, labels, origin.at(f"tasks.{GOOD}"))
    trained = [(arm.group, cfg) for (arm, *_), cfg in zip(runs, loaded, strict=True)]
    settle_dtypes(plan, trained, origin)
    settle_dates(plan, trained, origin)
    contents = cache(sampled_digest)  # Of the same few files for all.
    return [
        Job(*run, cfg, fingerprint(cfg, run[-1], contents=contents))
        for run, cfg in zip(runs, loaded, strict=True)
    ]


def check_data(jobs: Sequence[Job], origin: Origin) -> None:
    """Check that the data files of all trainings are there, before the first one runs.

    Raises:
        UserError: One is not, or is empty.
    """
    for job in jobs:
        try:
            check_data_files(job.cfg, Origin(Path(str(job.arm.config))))
        except UserError as error:
            where = origin.at(f"arms.{job.arm.group}")
            raise UserError(f"{where}: under {job.arm.label}, task {job.task}: {error}") from None


def run_folder(plan: Plan, arm: Arm, task: str, seed: int) -> Path:
    """Where a training run goes."""
    return Path(plan.settings.output_dir) / "runs" / arm.name / f"{task}_seed{seed}"


def _config(plan: Plan, arm: Arm, task: str, seed: int, folder: Path, origin: Origin) -> DictConfig:
    overrides = [
        *plan.tasks[task].overrides,
        *arm.overrides,
        f"seed={seed}",
        as_override("output_dir", folder),
        "overwrite=true",
    ]
    try:
        cfg, own = load_config(["--config", str(arm.config), *overrides])
        dataset = plan.tasks[task].dataset
        if dataset is not None:
            interleaved = str(cfg.dataset.get("_component_")).endswith("interleaved_dataset")
            place = "dataset.task" if interleaved else "dataset"
            lost = [
                o for o in arm.overrides if o.lstrip("~").startswith((f"{place}.", f"{place}="))
            ]
            if lost and task == "narrow":  # Elsewhere the arm's own data are replaced on purpose.
                raise UserError(
                    f"overrides: {lost[0]}: the task's dataset takes the place of {place}, and "
                    f"this with it; set it in tasks.{task}.dataset"
                )
            OmegaConf.update(cfg, place, dataset, merge=False)
        if not any(override.startswith("dataset.seed=") for override in arm.overrides):
            seed_data(cfg, seed)
        checked = check_settings(cfg, own)
        check_components(checked, own)
        _check_adapter(arm, cfg)
    except UserError as error:
        reason = str(error).replace("command line: ", "overrides: ")
        raise UserError(f"{origin.at(f'arms.{arm.group}')}: {reason}") from None
    return cfg


def _check_adapter(arm: Arm, cfg: DictConfig) -> None:
    """See that training will leave the adapter that is to be evaluated."""
    averages = [
        f"adapter_{name}"
        for name, entry in (cfg.get("defenses") or {}).items()
        if str(entry.get("_component_")).endswith(".AdapterEMA")
    ]
    if arm.adapter not in (RUN_ADAPTER, *averages):
        found = " and ".join([RUN_ADAPTER, *averages])
        raise UserError(f"adapter: a run leaves {found}, and no {arm.adapter}")


def seed_data(cfg: DictConfig, seed: int) -> None:
    """Give every data set that draws rows the run's seed: which rows were drawn is chance too."""
    for key in ("dataset", "dataset.task", "dataset.safe"):
        entry = OmegaConf.select(cfg, key)
        if not isinstance(entry, DictConfig):
            continue
        draws = str(entry.get("_component_")).endswith(("interleaved_dataset", "opswap_dataset"))
        if draws or "seed" in entry:
            OmegaConf.update(cfg, f"{key}.seed", seed, force_add=True)


def fingerprint(
    cfg: DictConfig,
    folder: Path,
    *further: Any,
    contents: Callable[[tuple[Path, ...]], str] = sampled_digest,
) -> str:
    """Digest of a resolved config and of the contents of files and models that it names.

    Args:
        cfg: The config.
        folder: Where its results go; no part of the digest.
        further: JSON values that belong to it.
        contents: Gives the files' digest.
    """
    tree = OmegaConf.to_container(cfg)
    text = OmegaConf.to_yaml(cfg, sort_keys=True).replace(str(folder), "")
    return digest(text, contents(tuple(named_files(tree, folder))), *further)
