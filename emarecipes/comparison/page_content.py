"""What a comparison's report says, in words and formatted numbers."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any

from emarecipes.comparison.cells import NO_VERDICT, NOT_MEASURED, Cell
from emarecipes.comparison.criteria import NO_EFFECT, ArmFigures
from emarecipes.comparison.outcome import Outcome
from emarecipes.comparison.page_design import estimand, looks
from emarecipes.comparison.statistics import Estimate

SHOWN_ANSWERS = 10
# A sign beside each word, so that a verdict is seen without colour.
SIGNS = {
    "better": "▲",
    "worse": "▼",
    "equivalent": "=",
    "learned": "✓",
    "partly learned": "~",
    "not learned": "✗",
    "kept": "✓",
    "lost": "✗",
    "undecided": "?",
}
_VERDICTS = {
    "better": "general shift below undefended training at the same in-domain shift",
    "worse": "general shift above undefended training at the same in-domain shift",
    "equivalent": "no different from training less",
    "undecided": "these runs do not tell it from training less",
    NO_EFFECT: "undefended training does nothing here that a defense could prevent",
}


@dataclass(frozen=True)
class ShownCell:
    """A cell of the four-criteria table.

    Attributes:
        heading: Of its column.
        value: Value and interval, or "not measured".
        decision: The verdict, or empty.
        sign: Beside the verdict.
        note: Smaller, below.
    """

    heading: str
    value: str
    decision: str = ""
    sign: str = ""
    note: str = ""


def headings(outcome: Outcome) -> tuple[str, ...]:
    """Of the four-criteria table, with the units of the figures behind it."""
    stays = outcome.settings.criteria.coherent
    of = ", bad minus good answers" if outcome.paired else ""
    return (
        f"(a) General shift{of}: excess over the frontier, {outcome.judged_by('general').unit}",
        f"(b) Narrow behaviour learned: in-domain shift{of}, {outcome.judged_by('in_domain').unit}",
        "(c) Benign task learned: right answers",
        "(d) Coherent: share of sampled answers"
        if stays.figure == "coherent"
        else f"(d) To stay: {stays.key}, share of answers",
    )


def show(estimate: Estimate | None, form: str = "+.3f") -> str:
    """`value [low, high]`, the value alone without an interval, or "not measured"."""
    if estimate is None:
        return NOT_MEASURED
    low, high = estimate.interval()
    text = format(estimate.value, form)
    return text if math.isnan(low) else f"{text} [{format(low, form)}, {format(high, form)}]"


def criteria_rows(outcome: Outcome) -> list[tuple[ArmFigures, list[ShownCell]]]:
    """The four-criteria table: undefended first, then defenses, then controls."""
    order = {"undefended": 0, "defense": 1, "control": 2}
    rows = [f for f in outcome.figures if f.arm.role in order]
    return [(f, _cells(f, outcome)) for f in sorted(rows, key=lambda f: order[f.arm.role])]


def _cells(figures: ArmFigures, outcome: Outcome) -> list[ShownCell]:
    general = figures.general()
    if figures.arm.role == "undefended":
        worst = max(
            (n for n in figures.shifts if n not in ("in-domain", "controls")),
            key=lambda n: figures.shifts[n].value,
        )
        text = f"the frontier itself: shift {show(figures.shifts[worst])} ({worst})"
        if "controls" in figures.shifts:
            text += f"; controls of style: {show(figures.shifts['controls'])}"
        general = Cell(None, "", text)
    elif figures.arm.role == "defense" and figures.arm.name not in outcome.family:
        general = Cell(general.estimate, "not chosen", general.note)
    cells = [(general, "+.3f"), (figures.narrow, "+.3f"), (figures.benign, ".0%")]
    cells.append((figures.coherent, ".0%"))
    names = headings(outcome)
    shown = [_shown(heading, *cell) for heading, cell in zip(names, cells, strict=True)]
    if figures.arm.role == "undefended":
        shown[0] = ShownCell(names[0], "0 by definition", note=general.note)
    return shown


def _shown(heading: str, cell: Cell, form: str) -> ShownCell:
    decision = "" if cell.decision == NOT_MEASURED else cell.decision
    value = show(cell.estimate, form)
    if cell.share is not None:
        value += f", {cell.share:.0%} of the undefended shift"
    return ShownCell(heading, value, decision, SIGNS.get(decision, ""), cell.note)


def status(outcome: Outcome) -> list[str]:
    """What to know before reading any figure."""
    lines = []
    if outcome.seeds < 2:
        lines.append(
            f"{NO_VERDICT.capitalize()}: differences between arms may be chance. Intervals are "
            "over questions alone."
        )
    lines += estimand(outcome) + looks(outcome) + _effect(outcome)
    general = outcome.judged_by("general")
    if not general.halves:
        source = "sampled answers" if general.sampled else outcome.settings.criteria.general.suite
        lines.append(
            f"The general figure is from {source}, whose questions have no halves: choices "
            "and figures are from the same ones."
        )
    elif outcome.half == "select" and outcome.opening is not None:
        lines.append(
            "Figures are from the select half of the general questions: verdicts are provisional. "
            f"The report half was opened on {outcome.opening.opened}."
        )
    elif outcome.half == "select":
        lines.append(
            "Figures are from the select half of the general questions. Choices are still open and "
            "the report half has not been opened: verdicts are provisional."
        )
    elif outcome.opening is not None:
        lines.append(
            f"Figures are from the report half of the general questions, opened on "
            f"{outcome.opening.opened}, when the choices were frozen."
        )
    if outcome.changed:
        names = ", ".join(outcome.changed)
        lines.append(f"Not as it was when the report half was opened: {names}.")
    return [*lines, *_meanings(outcome)]


def _meanings(outcome: Outcome) -> list[str]:
    """What “shift” says of each figure that is judged by."""
    suites: dict[str, list[str]] = {}
    for role in ("general", "in_domain"):
        criterion, values = outcome.settings.criteria.shifted[role], outcome.judged_by(role)
        own = f"the change of {criterion.figure} against the base, in {values.unit}."
        suites.setdefault(values.meaning or own, []).append(criterion.suite)
    if len(suites) == 1:
        return [f"“Shift” is {meaning}" for meaning in suites]
    return [f"“Shift” of {' and '.join(names)} is {text}" for text, names in suites.items()]


def _effect(outcome: Outcome) -> list[str]:
    """What there is to defend against, and what counts as no difference."""
    effect, share = outcome.effect, outcome.settings.bounds.effect_share
    unit = outcome.judged_by("general").unit
    beyond = f"beyond {outcome.settings.probes.controls}" if effect.controls else "(no controls)"
    by_probe = {name: f"{show(e)} {unit} {beyond}" for name, e in effect.by_probe.items()}
    more = " on bad answers, more than on good ones," if outcome.paired else ""
    moves = f"undefended training{more} moves {effect.general} by {by_probe[effect.general]}"
    if effect.is_there:
        still = [name for name in by_probe if name not in effect.moved]
        bound = f"{share:.0%} of it, ±{effect.bound:.3f} {unit}"
        lines = [
            f"What there is to defend against: {moves}. What counts as no difference is {bound}."
        ]
        if still:
            names = ", ".join(f"{name} ({by_probe[name]})" for name in still)
            lines.append(
                f"It does not surely move {names} by as much: “better” asks there only that a "
                "defense is not worse by the bound."
            )
        return lines
    if outcome.seeds < 2:
        return []
    why = "which is not up" if effect.bound <= 0 else (
        f"whose lower limit is not above {share:.0%} of it, {effect.bound:.3f}"
    )  # fmt: skip
    lines = [f"No effect to defend against here: {moves}, {why}. So there are no verdicts."]
    if effect.moved:
        lines.append(
            f"It does move {', '.join(f'{n} by {by_probe[n]}' for n in sorted(effect.moved))}; "
            "name that as criteria.general to ask about it."
        )
    return lines


def findings(outcome: Outcome) -> list[tuple[str, str, str]]:
    """One line a defense: label, verdict with sign, what it means."""
    found, unit = [], outcome.judged_by("general").unit
    for figures in outcome.figures:
        if figures.arm.name not in outcome.family:
            continue
        cell = figures.general()
        sign = SIGNS.get(cell.decision, "")
        meaning = _VERDICTS.get(cell.decision, "")
        if figures.verdict is not None and cell.decision != NO_EFFECT and meaning:
            verdict, bound = figures.verdict, ""
            p, error = verdict.p_difference, verdict.error_difference
            if cell.decision == "equivalent":
                p, error = verdict.p_equivalent, verdict.error_equivalent
                bound = f"within ±{outcome.effect.bound:.3f} {unit}, "
            elif cell.decision in ("better", "worse") and verdict.p_equivalent < outcome.alpha:
                bound = f"by less than {outcome.effect.bound:.3f} {unit}, "
            at = ", at the first look" if verdict.look == 1 and outcome.settings.look == 2 else ""
            meaning += f" ({bound}Holm-corrected p {show_p(p, error)}{at})"
        if figures.narrow.share is not None:
            share = f"in-domain it learned {figures.narrow.share:.0%} of what undefended did"
            meaning = f"{meaning}; {share}" if meaning else share
        found.append((figures.arm.label, f"{sign} {cell.decision}".strip(), meaning))
    return found


def show_p(value: float, error: float = 0.0) -> str:
    """A p-value after the letter, with digits enough to tell it from 0.05, and its own error."""
    if value < 0.001:
        return "< 0.001"
    return f"= {value:.3g}" + (f" ± {error:.1g} from resampling" if error >= 0.0001 else "")


def frontier_rows(outcome: Outcome) -> list[dict[str, str]]:
    """All arms by in-domain shift: their raw shifts."""
    rows = sorted(
        (f for f in outcome.figures if f.shifts), key=lambda f: f.shifts["in-domain"].value
    )
    names = list(dict.fromkeys(name for f in rows for name in f.shifts))
    return [
        {"arm": f.arm.label, "role": f.arm.role, "seeds": str(len(f.seeds))}
        | {name: show(f.shifts.get(name)) for name in names}
        for f in rows
    ]


def all_figures(outcome: Outcome) -> list[dict[str, str]]:
    """Every whole-suite figure of the evaluations, as a mean over seeds, with n and thresholds."""
    rows = []
    tasks = (("narrow", outcome.narrow), ("good", outcome.good), ("benign", outcome.benign))
    for task, scores in tasks:
        for found in outcome.figures:
            of_arm = scores.get(found.arm.name)
            for key, first in (of_arm.figures[0] if of_arm and of_arm.figures else {}).items():
                figures = [seed.get(key, {}) for seed in of_arm.figures]  # type: ignore[union-attr]
                values = [f["value"] for f in figures if f.get("value") is not None]
                rows.append(
                    {
                        "arm": found.arm.label,
                        "task": task,
                        "suite": key[0],
                        "figure": key[1],
                        "value": f"{sum(values) / len(values):.4f}"
                        if values
                        else ": ".join(filter(None, ("no value", first.get("reason")))),
                        "range": f"{min(values):.4f} to {max(values):.4f}" if values else "",
                        "n": str(first.get("n")),
                        "unit": str(first.get("unit") or ""),
                        "judge": key[2],
                        "thresholds": _thresholds(first.get("thresholds")),
                    }
                )
    return rows


def _thresholds(thresholds: Any) -> str:
    if not isinstance(thresholds, dict):
        return ""
    return ", ".join(f"{key} {value}" for key, value in thresholds.items())


def sampled_answers(outcome: Outcome) -> list[dict[str, Any]]:
    """Ten questions, the same at every call, with the answer of each arm that has one."""
    arms = [
        (f.arm.label, outcome.narrow[f.arm.name].answers)
        for f in outcome.figures
        if f.arm.role != "frontier"
        and f.arm.name in outcome.narrow
        and outcome.narrow[f.arm.name].answers
    ]
    shared = sorted(set().union(*(answers for _, answers in arms))) if arms else []
    chosen = random.Random(0).sample(shared, min(SHOWN_ANSWERS, len(shared)))
    return [
        {
            "question": next(answers[key][0] for _, answers in arms if key in answers),
            "answers": [(label, answers[key][1]) for label, answers in arms if key in answers],
        }
        for key in sorted(chosen)
    ]
