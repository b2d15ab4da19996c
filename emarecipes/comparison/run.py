"""The command behind `recipes/ema_compare.py`: run or collect arms, compare, report."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from emarecipes.command import run_alone
from emarecipes.comparison import page_content as content
from emarecipes.comparison.arms import Arm, Job, check_data, expand_arms, make_jobs
from emarecipes.comparison.execute import Runner
from emarecipes.comparison.in_common import keep_common
from emarecipes.comparison.looks import check_look
from emarecipes.comparison.measured import compare
from emarecipes.comparison.opening import check_choices
from emarecipes.comparison.outcome import BY_QUESTION, RESULT, Outcome, as_json, by_question
from emarecipes.comparison.page import write_report
from emarecipes.comparison.rules import rules_of
from emarecipes.comparison.settings import Plan, check_compare_settings
from emarecipes.comparison.status import pieces_of
from emarecipes.comparison.steps import slots
from emarecipes.comparison.tasks import check_tasks
from emarecipes.config import load_config
from emarecipes.errors import UserError
from emarecipes.files import write_json, write_text
from emarecipes.output_dir import held


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
    check_data(jobs, origin)
    check_choices(plan, arms, jobs, origin)
    check_look(plan, arms, jobs, rules_of(plan) if plan.settings.frozen else {}, origin)
    runner = Runner(plan, slots(plan, origin))
    with held(runner.folder, origin.at("output_dir")):
        _compare_arms(plan, arms, jobs, runner)


def _compare_arms(plan: Plan, arms: list[Arm], jobs: list[Job], runner: Runner) -> None:
    keep_common(plan)
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
    write_text(runner.folder / BY_QUESTION, by_question(outcome.narrow, outcome.good))
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
