"""Run what is missing of a comparison, choose, and measure what came of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from emarecipes.comparison.arms import Arm, Job
from emarecipes.comparison.cells import ALPHA
from emarecipes.comparison.criteria import ArmFigures, choose, measure
from emarecipes.comparison.execute import Runner
from emarecipes.comparison.gate import Effect, general_probes
from emarecipes.comparison.looks import FirstLook, Runs, alpha_of, runs_of
from emarecipes.comparison.opening import OPENING, Opening
from emarecipes.comparison.outcome import Half, Outcome, not_run
from emarecipes.comparison.paired import pair_arms
from emarecipes.comparison.results import Scores
from emarecipes.comparison.rules import rules_of
from emarecipes.comparison.settings import GOOD, Plan
from emarecipes.errors import UserError
from emarecipes.provenance import environment


def compare(plan: Plan, arms: list[Arm], jobs: list[Job], runner: Runner) -> Outcome:
    """Run what is missing, choose, open the report half if choices are frozen, and measure.

    Raises:
        UserError: The undefended arm has no scores.
    """
    finished = runner.train(jobs)
    path = runner.folder / OPENING
    opening = Opening.read(path)
    half: Half = "report" if plan.settings.frozen else "select"
    rules = rules_of(plan) if plan.settings.frozen or opening is not None else {}
    if plan.settings.frozen and opening is None:
        opening = Opening.now(plan, arms, jobs, _choose(plan, arms, finished, runner), rules)
        runner.folder.mkdir(parents=True, exist_ok=True)
        opening.write(path)
    shown = arms
    if plan.settings.frozen and opening is not None:
        shown = opening.shown(arms)
    scores = {task: runner.evaluate(shown, finished, task, half) for task in _tasks(plan)}
    outcome = _measure(plan, shown, scores, opening if half == "report" else None)
    outcome.runs = {arm.name: Path(arm.collect[0]) for arm in shown if arm.collect} | {
        job.arm.name: job.folder for job in reversed(finished) if job.task == "narrow"
    }
    outcome.missing = [*runner.failures, *_absent(plan, shown, finished), *outcome.missing]
    outcome.not_run = not_run(outcome, finished)
    if opening is not None:
        outcome.opening = opening
        outcome.changed = opening.changes(plan, arms, jobs, rules)
        if isinstance(opening.rules, str):
            outcome.missing.append(
                f"{path} is of an earlier version: whether the files that evaluations read are as "
                "they were then is not known"
            )
    if plan.settings.look is not None:
        _look(outcome, runner.folder, runs_of(plan, shown, jobs), rules)
    return outcome


def _look(outcome: Outcome, folder: Path, runs: Runs, rules: dict[str, str]) -> None:
    """Write down what a first look decided, or let it stand at the last."""
    questions = len(outcome.judged_by("general").ids)
    now = datetime.now(timezone.utc).isoformat(timespec="minutes")
    first = FirstLook.read(folder)
    if outcome.settings.look == 1:
        found = FirstLook.of(outcome.figures, questions, now, runs, rules)
        outcome.first_look = found if first is None else first.taken_again(found)
        outcome.first_look.write(folder)
    elif first is not None:
        first.settle(outcome.figures)
        outcome.first_look = replace(first, last=first.last or now)
        outcome.first_look.write(folder)
        if not first.runs:
            outcome.missing.append(
                "looks.json is of an earlier version: whether the first look's verdicts are of "
                "these runs is not known"
            )
        if questions <= first.questions:
            outcome.missing.append(
                f"the last look read {questions} general questions, the first one "
                f"{first.questions}: take looks.first and max_rows apart"
            )


def _tasks(plan: Plan) -> list[str]:
    """The tasks that are scored; collected runs are of the narrow one, without an entry."""
    return ["narrow", *(task for task in plan.tasks if task != "narrow")]


def _choose(plan: Plan, arms: list[Arm], finished: list[Job], runner: Runner) -> dict[str, str]:
    """The arm of each defense; the select half is read only where a sweep leaves a choice."""
    groups: dict[str, list[str]] = {}
    for arm in arms:
        if arm.role == "defense":
            groups.setdefault(arm.choice, []).append(arm.name)
    chosen = {group: names[0] for group, names in groups.items() if len(names) == 1}
    if len(chosen) == len(groups):
        return chosen
    needed = [a for a in arms if a.role in ("undefended", "frontier") or
              (a.role == "defense" and a.choice not in chosen)]  # fmt: skip
    tasks = [task for task in _tasks(plan) if task != "benign"]
    scores = {task: runner.evaluate(needed, finished, task, "select") for task in tasks}
    outcome = _measure(plan, needed, scores, None)
    found = chosen | choose(outcome.figures)
    for group in groups.keys() - found.keys():
        raise UserError(f"{group}: none of its sweep could be scored; no choice can be frozen")
    return found


def _measure(
    plan: Plan,
    arms: list[Arm],
    scores: Mapping[str, Mapping[str, Scores]],
    opening: Opening | None,
) -> Outcome:
    """The outcome, from the scores of each task by arm's name."""
    settings = plan.settings
    narrow, good, benign = (scores.get(task, {}) for task in ("narrow", GOOD, "benign"))
    judged_by = {role: [found.key] for role, found in settings.criteria.shifted.items()}
    beside = {f"{name}/{GOOD}": of for name, of in good.items()}
    undefended = [arm.name for arm in arms if arm.role == "undefended"]
    for name in undefended:
        if name in narrow:  # General's figure under other conditions.
            judged_by["general"] = general_probes(narrow[name], settings.probes)
    needed = [*undefended, *(f"{name}/{GOOD}" for name in undefended)]
    told, left_out = keep_told({**narrow, **beside}, list(judged_by.values()), needed)
    narrow = {name: told[name] for name in narrow}
    good = {name: told[f"{name}/{GOOD}"] for name in good}
    judged = narrow
    if GOOD in plan.tasks:
        judged, unpaired = pair_arms(arms, narrow, good)
        left_out += unpaired

    alpha = ALPHA if settings.look is None else alpha_of(settings.look)

    def figures_of(family: list[str]) -> tuple[list[ArmFigures], Effect, list[str]]:
        return measure(arms, judged, benign, settings.probes, settings.bounds, family, alpha)

    if opening is None:
        candidates = choose(figures_of([])[0])
        family = [arm.name for arm in arms if candidates.get(arm.choice) == arm.name]
    else:
        family = [arm.name for arm in arms if opening.chosen.get(arm.choice) == arm.name]
    figures, effect, missing = figures_of(family)
    missing += left_out
    half: Half = "select" if opening is None else "report"
    read = _read_half(arms, narrow, settings.probes.general) or half
    if read != half:
        missing.append(
            "general questions were read from the report half before choices are frozen"
            if read == "report"
            else "choices are frozen, and the general questions are still those of the select half"
        )
    trained = any(arm.config is not None for arm in arms)
    if opening is not None and trained and not plan.tasks["narrow"].evaluate.report:
        missing.append(
            "tasks.narrow.evaluate.report is empty: choices and figures are from the same questions"
        )
    if opening is not None:
        present = {arm.name for arm in arms}
        missing += [
            f"{group}: {name}, which was chosen for it, is not in the config any more"
            for group, name in opening.chosen.items()
            if name not in present
        ]
    return Outcome(
        settings=settings,
        figures=figures,
        effect=effect,
        family=family,
        half=read,
        missing=missing,
        alpha=alpha,
        narrow=narrow,
        good=good,
        benign=dict(benign),
        environment=environment(),
    )


def _read_half(arms: list[Arm], narrow: Mapping[str, Scores], general: str) -> Half | None:
    """The half that figures are from, by the name of the undefended arm's file; None if unknown."""
    undefended = next(arm.name for arm in arms if arm.role == "undefended")
    stems = {Path(name).stem for name in narrow[undefended].suites[general].get("files", {})}
    return "select" if "select" in stems else "report" if "report" in stems else None


def _absent(plan: Plan, arms: list[Arm], finished: list[Job]) -> list[str]:
    """Arms without a seed that the config names; the failure itself is told apart."""
    lines = []
    for arm in arms:
        for task in arm.tasks if not arm.collect else ():
            there = {job.seed for job in finished if job.arm == arm and job.task == task}
            lacking = [str(seed) for seed in plan.settings.seeds if seed not in there]
            if lacking:
                lines.append(f"{arm.label}, {task} task: no run with seed {', '.join(lacking)}")
    return lines


# Of the questions, at least so many must have usable answers under every arm.
MIN_TOLD = 0.5


def keep_told(
    arms: Mapping[str, Scores], groups: Sequence[Sequence[str]], needed: Collection[str] = ()
) -> tuple[dict[str, Scores], list[str]]:
    """The arms' scores over the questions that have usable answers under every arm and seed.

    An arm that has them to fewer than half of the questions loses the figure.

    Args:
        arms: By name.
        groups: Keys of `Scores.probes`; those of a group are of the same questions, and keep the
            same ones.
        needed: Arms without which there is no comparison.

    Returns:
        The scores, and a line for each group that lost questions, and figure that lost an arm.

    Raises:
        UserError: Fewer than half of the questions are left: what is over them is not what was
            asked; or an arm that is needed has so few.
    """
    kept, notes = dict(arms), []
    for keys in groups:
        for key in keys:
            notes += _drop_mute(kept, key, needed)
        of = [(n, key) for key in keys for n, found in kept.items() if key in found.probes]
        if not of:
            continue
        ids = kept[of[0][0]].probes[of[0][1]].ids
        same = [(name, key) for name, key in of if kept[name].probes[key].ids == ids]
        told_Q = np.all([_told(kept[name], key) for name, key in same], axis=0)
        called = ", ".join(dict.fromkeys(key for _, key in same))
        if told_Q.mean() < MIN_TOLD:
            raise UserError(
                f"{called}: {told_Q.sum()} of {len(ids)} questions have usable answers under every "
                "arm and seed; sample more answers, or longer ones"
            )
        if told_Q.all():
            continue
        notes.append(
            f"{called}: {(~told_Q).sum()} of {len(ids)} questions are left out, for some arm has "
            "no usable answer to them"
        )
        places = np.flatnonzero(told_Q)
        for name, key in same:
            values = kept[name].probes[key]
            part = replace(
                values,
                ids=tuple(ids[i] for i in places),
                categories=tuple(values.categories[i] for i in places),
                values_SQ=values.values_SQ[:, places],
            )
            kept[name] = replace(kept[name], probes=kept[name].probes | {key: part})
    return kept, notes


def _told(scores: Scores, key: str) -> NDArray[np.bool_]:
    """Which questions have usable answers with every seed, (Q,)."""
    told_Q: NDArray[np.bool_] = np.all(np.isfinite(scores.probes[key].values_SQ), axis=0)
    return told_Q


def _drop_mute(kept: dict[str, Scores], key: str, needed: Collection[str]) -> list[str]:
    """Take a figure from arms that hardly answer: they would take all others' questions with them.

    Returns:
        A line for each.
    """
    having, notes = [name for name, scores in kept.items() if key in scores.probes], []
    for name in list(having):
        own = _told(kept[name], key)
        if own.mean() < MIN_TOLD and len(having) > 1:
            if name in needed:
                raise UserError(
                    f"{name}: {key}: {own.sum()} of {own.size} questions have usable answers, "
                    "and all else is compared with it; sample more answers, or longer ones"
                )
            probes = {other: v for other, v in kept[name].probes.items() if other != key}
            kept[name] = replace(kept[name], probes=probes)
            having.remove(name)
            notes.append(
                f"{name}: {key}: {own.sum()} of {own.size} questions have usable answers; "
                "not measured"
            )
    return notes
