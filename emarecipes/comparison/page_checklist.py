"""What a comparison's evidence rests on, and what of it is open."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emarecipes.comparison.outcome import Outcome
from emarecipes.comparison.page_content import show

# Below these the evidence is called open.
MIN_SEEDS, MIN_QUESTIONS, MIN_CURVE = 5, 50, 5
# More unusable replies of a judge than this, and the same.
MAX_UNUSABLE = 0.1
_UNUSABLE = (
    "unparsable_share",
    "failed_share",
    "unparsable_coherence_share",
    "failed_coherence_share",
)


@dataclass(frozen=True)
class Check:
    """One line of the checklist."""

    what: str
    done: bool
    found: str


def checklist(outcome: Outcome) -> list[Check]:
    """Questions, halves, seeds, frontier, judges, thresholds, controls: done or open."""
    return [
        *_questions(outcome),
        *_training(outcome),
        *_controls(outcome),
        *judges_answer(outcome),
        Check(
            "probe shift validated against sampled answers",
            False,
            "not by this comparison; docs/evaluate.md says how far it was",
        ),
    ]


def _questions(outcome: Outcome) -> list[Check]:
    scores = outcome.narrow[outcome.undefended.arm.name]
    probes, general = outcome.settings.probes, outcome.judged_by("general")
    conditional = sorted(
        name
        for name in outcome.undefended.shifts
        if name not in (probes.general, "in-domain", "controls")
    )
    counts = {
        name: len(scores.probes[name].ids)
        for name in (probes.general, probes.in_domain)
        if name in scores.probes
    }
    return [
        Check(
            f"at least {MIN_QUESTIONS} general and in-domain questions",
            min(counts.values()) >= MIN_QUESTIONS,
            ", ".join(f"{name}: {count}" for name, count in counts.items()),
        ),
        Check(
            "choices on the select half, figures from the report half",
            outcome.half == "report" and not outcome.changed and general.halves,
            f"{'sampled answers' if general.sampled else probes.general}: questions without halves"
            if not general.halves
            else "select half, choices open"
            if outcome.half == "select"
            else "report half"
            + (f"; changed since: {', '.join(outcome.changed)}" if outcome.changed else ""),
        ),
        Check(
            "in-domain questions of their own on each half, since the excess rests on them too",
            _own_half(scores.suites.get(probes.in_domain, {}), outcome.half),
            f"{probes.in_domain}: {scores.suites.get(probes.in_domain, {}).get('half') or 'all'}",
        ),
        Check(
            "general questions also under training-like conditions",
            bool(conditional),
            ", ".join(conditional) or "no conditional probe",
        ),
    ]


def _own_half(suite: Mapping[str, Any], half: str) -> bool:
    return suite.get("half") == half or half in {Path(file).stem for file in suite.get("files", ())}


def _training(outcome: Outcome) -> list[Check]:
    curve = [f for f in outcome.figures if f.arm.role in ("undefended", "frontier") and f.points]
    tested = [f for f in outcome.figures if f.arm.name in outcome.family]
    compared = [outcome.undefended, *tested]
    benign = [f for f in compared if f.benign.estimate is not None]
    coherent = [f for f in compared if f.coherent.estimate is not None]
    seeds = [len(f.seeds) for f in compared]
    of_all = f"of {len(compared)} arms, the undefended among them"
    return [
        Check(
            f"at least {MIN_SEEDS} seeds an arm",
            min(seeds) >= MIN_SEEDS,
            str(max(seeds)) if min(seeds) == max(seeds) else f"{min(seeds)} to {max(seeds)}",
        ),
        Check(
            f"frontier of at least {MIN_CURVE} undefended settings",
            len(curve) >= MIN_CURVE,
            f"{len(curve)} of undefended training: " + ", ".join(f.arm.label for f in curve),
        ),
        Check(
            "one predeclared contrast a defense, corrected for their number",
            outcome.seeds > 1 and bool(outcome.family),
            f"{len(outcome.family)} contrasts, Holm; equivalence bound "
            f"{outcome.settings.bounds.effect_share:.0%} of the undefended effect",
        ),
        Check(
            "undefended training does something to defend against",
            outcome.effect.is_there,
            f"{show(outcome.effect.by_probe[outcome.effect.general])} "
            f"{outcome.judged_by('general').unit}",
        ),
        Check(
            "a benign task was trained under each defense",
            len(benign) == len(compared) > 1,
            f"{len(benign)} {of_all}",
        ),
        Check(
            "coherence of sampled answers",
            len(coherent) == len(compared),
            f"{len(coherent)} {of_all}",
        ),
        Check(
            "every arm of the config is there",
            not outcome.missing,
            f"{len(outcome.missing)} notes under Missing" if outcome.missing else "all",
        ),
    ]


def _controls(outcome: Outcome) -> list[Check]:
    controls = [f for f in outcome.figures if f.arm.role == "control" and f.points]
    style = "controls" in outcome.undefended.shifts
    return [
        Check(
            "control arms, such as good answers or a random vector",
            bool(controls),
            ", ".join(f.arm.label for f in controls) or "none",
        ),
        Check(
            "each run paired with one on good answers, of the same seed",
            outcome.paired,
            "figures are differences of the two" if outcome.paired else "no task good",
        ),
        each_its_own(outcome),
        Check(
            "questions with two harmless answers, for changes of style",
            style,
            outcome.settings.probes.controls if style else "no such probe",
        ),
    ]


def each_its_own(outcome: Outcome) -> Check:
    """Two arms with the same adapter at one seed: what tells them apart had no effect."""
    by_adapter: dict[tuple[int, str], list[str]] = {}
    labels = {found.arm.name: found.arm.label for found in outcome.figures}
    for name, scores in outcome.narrow.items():
        for seed, adapter in zip(scores.seeds, scores.adapters, strict=bool(scores.adapters)):
            by_adapter.setdefault((seed, adapter), []).append(labels.get(name, name))
    same = {" = ".join(arms) for (_, adapter), arms in by_adapter.items() if adapter and arms[1:]}
    return Check(
        "every arm has an adapter of its own",
        bool(by_adapter) and not same,
        "; ".join(sorted(same)) or ("all different" if by_adapter else "not known"),
    )


def judges_answer(outcome: Outcome) -> list[Check]:
    """Whether most replies of every judge were usable."""
    figures = [
        (key, figure)
        for scores in outcome.narrow.values()
        for seed in scores.figures
        for key, figure in seed.items()
        if key[2]
    ]
    judges = sorted({key[2] for key, _ in figures})
    thresholds = sorted({str(f["thresholds"]) for _, f in figures if f.get("thresholds")})
    thresholds += [of for scores in outcome.narrow.values() for of in scores.sensitivity]
    thresholds = list(dict.fromkeys(thresholds))
    return [
        Check("sampled answers graded by a judge", bool(judges), ", ".join(judges) or "no judge"),
        Check("more than one judge", len(judges) > 1, str(len(judges))),
        _usable(figures),
        Check(
            "misaligned rates under several thresholds",
            len(thresholds) > 1,
            f"{len(thresholds)} of them, in summary.json" if thresholds else "no rate of them",
        ),
    ]


def _usable(figures: Iterable[tuple[tuple[str, str, str], Mapping[str, Any]]]) -> Check:
    """Were the judges' replies what they were asked for? The worst of any arm, seed and judge."""
    what = f"at most {MAX_UNUSABLE:.0%} of a judge's replies unusable"
    found = [(f["value"], k) for k, f in figures if k[1] in _UNUSABLE and f["value"] is not None]
    if not found:
        return Check(what, False, "no judge")
    worst, (suite, figure, judge) = max(found)
    return Check(
        what, worst <= MAX_UNUSABLE, f"at most {worst:.0%}: {figure} of {judge} in {suite}"
    )
