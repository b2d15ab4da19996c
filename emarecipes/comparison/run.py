"""The command behind `recipes/ema_compare.py`: run or collect arms, compare, report."""

from __future__ import annotations

import math
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from emarecipes.command import run_alone
from emarecipes.comparison import page_content as content
from emarecipes.comparison.arms import Arm, Job, expand_arms, make_jobs
from emarecipes.comparison.by_question import BY_QUESTION, by_question
from emarecipes.comparison.checks import check_tasks
from emarecipes.comparison.criteria import ArmFigures, choose, measure
from emarecipes.comparison.dates import keep_date
from emarecipes.comparison.execute import Runner
from emarecipes.comparison.gate import Effect
from emarecipes.comparison.kinds import not_run
from emarecipes.comparison.opening import OPENING, RULES, Opening
from emarecipes.comparison.outcome import Half, Outcome
from emarecipes.comparison.page import write_report
from emarecipes.comparison.precision import keep_dtype
from emarecipes.comparison.results import Scores
from emarecipes.comparison.settings import Plan, check_compare_settings
from emarecipes.comparison.statistics import Estimate
from emarecipes.comparison.status import pieces_of
from emarecipes.comparison.steps import places
from emarecipes.comparison.told import keep_told
from emarecipes.config import load_config
from emarecipes.errors import UserError
from emarecipes.files import write_json, write_text
from emarecipes.provenance import environment

RESULT = "comparison.json"


def run_compare(argv: Sequence[str]) -> int:
    """Compare arms as `--config FILE [key=value | ~key]...` says.

    Returns:
        The exit code: 0, or 1 after a `UserError`, which is printed as one line. A comparison in
        which an arm failed writes its report without it and returns 1.
    """
    return run_alone("ema_compare", _compare, argv)


def _compare(argv: Sequence[str]) -> None:
    raw, origin = load_config(argv)
    plan = check_compare_settings(raw, origin)
    check_tasks(plan, origin)
    arms = expand_arms(plan, origin)
    jobs = make_jobs(plan, arms, origin)
    runner = Runner(plan, places(plan, origin))
    keep_dtype(plan)
    keep_date(plan)
    runner.status.expect(pieces_of(jobs, arms))
    try:
        with _signals_interrupt(runner), runner.status.shown():
            outcome = compare(plan, arms, jobs, runner)
    except KeyboardInterrupt:
        raise UserError("stopped; the same command goes on where it was") from None
    except UserError as error:
        first = f"; first failure: {runner.failures[0]}" if runner.failures else ""
        raise UserError(f"{error}{first}") from None
    page = write_report(outcome, runner.folder)
    write_json(runner.folder / RESULT, as_json(outcome), indent=1)
    write_text(runner.folder / BY_QUESTION, by_question(outcome.narrow))
    print_outcome(outcome)
    print(f"report: {page}")
    if runner.failures:
        count = len(runner.failures)
        raise UserError(
            f"{count} step{'s' if count > 1 else ''} failed, first: {runner.failures[0]}; {page} "
            "is written without; the same command tries again what is missing"
        )


@contextmanager
def _signals_interrupt(runner: Runner) -> Iterator[None]:
    """Ctrl-C, SIGTERM and a terminal that goes stop what runs too: a second one at once.

    A script starts what it puts into the background with Ctrl-C ignored; we hear it all the same.
    """
    heard: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        heard.append(number)
        waits_for = ", ".join(runner.ask_children()) or "nothing that runs"
        how = "stopping; once more to stop without the step under way"
        if len(heard) > 1:
            how = "stopping now"
        name = signal.Signals(number).name
        print(f"\n{name}: {how}; waiting for {waits_for}", file=sys.stderr, flush=True)
        if len(heard) == 1:
            raise KeyboardInterrupt

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, stop) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def compare(plan: Plan, arms: list[Arm], jobs: list[Job], runner: Runner) -> Outcome:
    """Run what is missing, choose, open the report half if choices are frozen, and measure.

    Raises:
        UserError: The undefended arm has no scores.
    """
    finished = runner.train(jobs)
    path = runner.folder / OPENING
    opening = Opening.read(path)
    half: Half = "report" if plan.settings.frozen else "select"
    if plan.settings.frozen and opening is None:
        opening = Opening.now(plan, arms, jobs, _choose(plan, arms, finished, runner))
        runner.folder.mkdir(parents=True, exist_ok=True)
        opening.write(path)
    shown = arms
    if plan.settings.frozen and opening is not None:
        # The report half of candidates that were not chosen stays closed.
        shown = [a for a in arms if opening.chosen.get(a.group, a.name) == a.name]
    narrow = runner.evaluate(shown, finished, "narrow", half)
    benign = runner.evaluate(shown, finished, "benign", half) if "benign" in plan.tasks else {}
    outcome = _measure(plan, shown, narrow, benign, opening if half == "report" else None)
    outcome.runs = {arm.name: Path(arm.collect[0]) for arm in shown if arm.collect} | {
        job.arm.name: job.folder for job in reversed(finished) if job.task == "narrow"
    }
    outcome.missing = [*runner.failures, *_absent(plan, shown, finished), *outcome.missing]
    outcome.not_run = not_run(outcome, finished)
    if opening is not None:
        outcome.opening = opening
        outcome.changed = opening.changes(plan, arms, jobs)
    return outcome


def _choose(plan: Plan, arms: list[Arm], finished: list[Job], runner: Runner) -> dict[str, str]:
    """The arm of each defense; the select half is read only where a sweep leaves a choice."""
    groups: dict[str, list[str]] = {}
    for arm in arms:
        if arm.role == "defense":
            groups.setdefault(arm.group, []).append(arm.name)
    chosen = {group: names[0] for group, names in groups.items() if len(names) == 1}
    if len(chosen) == len(groups):
        return chosen
    needed = [a for a in arms if a.role in ("undefended", "frontier") or
              (a.role == "defense" and a.group not in chosen)]  # fmt: skip
    narrow = runner.evaluate(needed, finished, "narrow", "select")
    outcome = _measure(plan, needed, narrow, {}, None)
    found = chosen | choose(outcome.figures)
    for group in groups.keys() - found.keys():
        raise UserError(f"{group}: none of its sweep could be scored; no choice can be frozen")
    return found


def _measure(
    plan: Plan,
    arms: list[Arm],
    narrow: Mapping[str, Scores],
    benign: Mapping[str, Scores],
    opening: Opening | None,
) -> Outcome:
    settings = plan.settings
    sampled = [c.key for c in settings.criteria.given.values() if c.sampled]
    narrow, left_out = keep_told(narrow, sampled)

    def figures_of(family: list[str]) -> tuple[list[ArmFigures], Effect, list[str]]:
        return measure(arms, narrow, benign, settings.probes, settings.bounds, family)

    if opening is None:
        candidates = choose(figures_of([])[0])
        family = [arm.name for arm in arms if candidates.get(arm.group) == arm.name]
    else:
        family = [arm.name for arm in arms if opening.chosen.get(arm.group) == arm.name]
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
        narrow=dict(narrow),
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


def as_json(outcome: Outcome) -> dict[str, object]:
    """The figures behind the report, for other programs and for the record."""
    arms = {}
    for found in outcome.figures:
        arms[found.arm.name] = {
            "label": found.arm.label,
            "role": found.arm.role,
            "overrides": list(found.arm.overrides),
            "seeds": list(found.seeds),
            "shifts": {name: _numbers(e) for name, e in found.shifts.items()},
            "excess": {name: _numbers(e.estimate) | {"above": e.above, "below": e.below,
                       "curve": e.curve} for name, e in found.excesses.items()},
            "share_of_undefended_shift": found.narrow.share,
            "verdict": asdict(found.verdict) if found.verdict else None,
            "decisions": {"general": found.general().decision, "narrow": found.narrow.decision,
                          "benign": found.benign.decision, "coherent": found.coherent.decision},
            "benign": _numbers(found.benign.estimate) if found.benign.estimate else None,
            "benign_tiers": found.benign_tiers,
            "coherent": _numbers(found.coherent.estimate) if found.coherent.estimate else None,
            "categories": {name: _numbers(e) for name, e in found.categories.items()},
            "points": found.points,
        }  # fmt: skip
    return {
        "title": outcome.settings.title,
        "version": RULES,
        "effect": {name: _numbers(e) for name, e in outcome.effect.by_probe.items()},
        "effect_is_there": outcome.effect.is_there,
        "moved": sorted(outcome.effect.moved),
        "bound": outcome.effect.bound,
        "not_run": outcome.not_run,
        "half": outcome.half,
        "frozen": outcome.settings.frozen,
        "opening": asdict(outcome.opening) if outcome.opening else None,
        "family": outcome.family,
        "bounds": outcome.settings.bounds.model_dump(),
        "arms": arms,
        "missing": outcome.missing,
        "environment": outcome.environment,
    }


def _numbers(estimate: Estimate) -> dict[str, Any]:
    low, high = estimate.interval()
    finite = not math.isnan(low)
    return {
        "value": estimate.value,
        "low": low if finite else None,
        "high": high if finite else None,
    }


def print_outcome(outcome: Outcome) -> None:
    """Print the four-criteria table."""
    console = Console()
    table = Table(title=outcome.settings.title, box=box.SIMPLE)
    for heading in ("arm", "(a) excess", "(b) in-domain", "(c) benign", "(d) coherent"):
        table.add_column(heading)
    for figures, cells in content.criteria_rows(outcome):
        texts = [f"{cell.value}\n{cell.sign} {cell.decision}".strip() for cell in cells]
        table.add_row(Text(figures.arm.label), *(Text(text) for text in texts))
    console.print(table)
    for line in (*content.status(outcome)[:-1], *outcome.missing):
        console.print(Text(line))
