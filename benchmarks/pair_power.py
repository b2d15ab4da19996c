"""What verdicts on bad minus good answers are worth, on synthetic shifts of known truth.

    python benchmarks/pair_power.py
    python benchmarks/pair_power.py --whole     # by the comparison's own functions; hours

A run's shift at a question is what its data teach + s + e + n: s the run's own at all questions, e
what training on any such answers moves at this one, the same in an arm's bad and good run of a
seed, n the run's own noise there. Controls are alike, without what is taught. A family of four is
tested (Holm), three of them null, at two looks, half of the questions first, or at one.

A line says in how many comparisons any null defense was called better or worse (the family's
error), how often the tested one was called better, at the first look and at either, how often its
95 % interval had the true excess, and its mean standard error. `alone`: with each arm's own
spread of seeds, in place of at least the family's. The figure `bad` has neither pairs nor controls.

By default the excess is taken as an arm's run minus half of each of two undefended ones, and the
bootstrap's variance as what it tends to, so that thousands of comparisons take seconds. `--whole`
draws in-domain shifts and a frontier too and resamples.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy.stats import t as student_t

from emarecipes.comparison.frontier import Bound, Shifts, excess, pooled_excesses
from emarecipes.comparison.looks import alpha_of
from emarecipes.comparison.statistics import Floats
from emarecipes.comparison.verdicts import Contrast, verdicts

IN_DOMAIN, FAMILY, BATCH = 60, 4, 100
# In-domain and general (beyond controls) of what bad answers teach, in nats: 0.072 is 5.2 standard
# errors of 0.014, as on home_repair at lr 1e-3. With SHARED and OWN a pair's shift is worth 3.9
# times the questions of a bad run's alone, as there.
SLOPE = 0.12
UNDEFENDED = {"undefended": (0.6, 0.072), "steps_50": (0.4, 0.048), "steps_25": (0.2, 0.024)}
TRUTH = {"null": (0.5, 0.06), "perfect": (0.5, 0.0), "halves it": (0.5, 0.03)}
SHARED, OWN = 0.3, 0.115


class Setting(NamedTuple):
    """A line of the table."""

    kind: str
    pairs: bool
    looks: int
    seeds: int
    seed_sd: float
    alone: bool = False
    questions: int = 450

    @property
    def truth(self) -> float:
        """The tested arm's true excess."""
        in_domain, general = TRUTH[self.kind]
        return general - SLOPE * in_domain


# Of each trial: family error, better at first, better, covered, standard error.
Found = Floats


def noise(rng: np.random.Generator, of: Setting, shape: tuple[int, ...], count: int) -> Floats:
    """(..., S, Q) of one suite: a bad run's minus a good one's, or a bad run's alone."""
    if of.pairs:
        own, at_once = OWN * 2**0.5, of.seed_sd * 2**0.5
    else:  # A part of e that all arms share would leave the excess here too.
        own, at_once = float(np.hypot(SHARED, OWN)), of.seed_sd
    found: Floats = rng.normal(0, own, (*shape, of.seeds, count))
    return found + rng.normal(0, at_once, (*shape, of.seeds, 1))


def quick(of: Setting, trials: int) -> Found:
    """By the variances that the bootstrap tends to."""
    rng = np.random.default_rng(0)
    return np.concatenate([_batch(rng, of) for _ in range(-(-trials // BATCH))])


def _batch(rng: np.random.Generator, of: Setting) -> Found:
    def suite() -> Floats:
        runs = noise(rng, of, (BATCH, FAMILY + 2), of.questions)  # Two are undefended.
        return runs[:, :FAMILY] - runs[:, FAMILY:].mean(axis=1, keepdims=True)

    general = suite()
    general[:, 0] += of.truth
    parts = [general, suite()] if of.pairs else [general]
    last_p, value, error, freedom = _tests(of, parts)
    last = _called(last_p, value, alpha_of(2) if of.looks == 2 else 0.05)
    first = np.zeros_like(last)
    if of.looks == 2:
        first_p, first_value, *_ = _tests(of, [values[..., ::2] for values in parts])
        first = _called(first_p, first_value, alpha_of(1))
    called = np.where(first != 0, first, last)
    half = student_t.ppf(0.975, freedom[:, 0]) * error[:, 0]
    nulls = called if of.truth == 0 else called[:, 1:]
    columns = [nulls.any(axis=1), first[:, 0] < 0, called[:, 0] < 0,
               abs(value[:, 0] - of.truth) <= half, error[:, 0]]  # fmt: skip
    return np.stack(columns, axis=1).astype(float)


def _tests(of: Setting, parts: list[Floats]) -> tuple[Floats, Floats, Floats, Floats]:
    """Two-sided p, value, error, degrees of freedom of each trial and arm."""
    count = parts[0].shape[-1]
    signs = [1.0, -1.0][: len(parts)]
    by_seed = sum(sign * part.mean(axis=-1) for sign, part in zip(signs, parts, strict=True))
    of_questions = sum(part.mean(axis=-2).var(axis=-1) / count for part in parts)
    of_seeds, free = np.var(by_seed, axis=-1, ddof=1) / of.seeds, of.seeds - 1
    if not of.alone:
        mean = of_seeds.mean(axis=1, keepdims=True)
        free = np.where(of_seeds < mean, free * FAMILY, free)
        of_seeds = np.maximum(of_seeds, mean)
    square = of_seeds + of_questions
    freedom = square**2 / (of_questions**2 / (count - 1) + of_seeds**2 / free)
    value: Floats = np.mean(by_seed, axis=-1)
    error = np.sqrt(square)
    return 2 * student_t.sf(abs(value) / error, freedom), value, error, freedom


def _called(p: Floats, value: Floats, alpha: float) -> Floats:
    """-1 better, 1 worse, 0 neither, by Holm: the k-th smallest p below alpha / (m - k + 1)."""
    order = np.argsort(p, axis=1)
    steps = np.take_along_axis(p, order, 1) < alpha / np.arange(p.shape[1], 0, -1)
    rejected = np.logical_and.accumulate(steps, axis=1)
    found = np.zeros_like(p)
    np.put_along_axis(found, order, rejected.astype(float), axis=1)
    called: Floats = found * np.sign(value)
    return called


def whole(of: Setting, trials: int) -> Found:
    """By the comparison's functions, with a frontier."""
    return np.array([_trial(of, np.random.default_rng(number)) for number in range(trials)])


def _trial(of: Setting, rng: np.random.Generator) -> list[float]:
    def run(in_domain: float, general: float) -> Shifts:
        controls = noise(rng, of, (), of.questions) if of.pairs else None
        return Shifts(
            noise(rng, of, (), of.questions) + general,
            noise(rng, of, (), IN_DOMAIN) + in_domain,
            controls,
        )

    arms = {name: run(*shares) for name, shares in UNDEFENDED.items()}
    names = ["tested", *(f"null_{i}" for i in range(FAMILY - 1))]
    arms |= {n: run(*TRUTH[of.kind if n == "tested" else "null"]) for n in names}

    def look(runs: dict[str, Shifts], alpha: float) -> tuple[dict[str, str], list[float]]:
        whole_run = runs["undefended"]
        bound = Bound(0.25, whole_run.general_SQ, whole_run.controls_SQ)
        curve = {name: runs[name] for name in UNDEFENDED}
        found = {name: excess(runs[name], curve, bound) for name in names}
        found = found if of.alone else pooled_excesses(found)
        contrasts = [Contrast({"general": e}, frozenset({"general"})) for e in found.values()]
        given = verdicts(contrasts, alpha)
        low, high = found["tested"].estimate.interval()
        decisions = {n: v.decision for n, v in zip(names, given, strict=True)}
        return decisions, [float(low <= of.truth <= high), found["tested"].estimate.error]

    last, covered = look(arms, alpha_of(2) if of.looks == 2 else 0.05)
    first = dict.fromkeys(names, "undecided")
    if of.looks == 2:
        first, _ = look({name: _half(shifts) for name, shifts in arms.items()}, alpha_of(1))
    nulls = [n for n in names if n != "tested" or of.truth == 0]
    wrong = any({first[n], last[n]} & {"better", "worse"} for n in nulls)
    better = "better" in (first["tested"], last["tested"])
    return [float(wrong), float(first["tested"] == "better"), float(better), *covered]


def _half(shifts: Shifts) -> Shifts:
    controls = None if shifts.controls_SQ is None else shifts.controls_SQ[:, ::2]
    return Shifts(shifts.general_SQ[:, ::2], shifts.in_domain_SQ[:, ::2], controls)


def settings() -> list[Setting]:
    """The table's lines. Runs of sd 0.003 make 15 % of a pair's variance, of 0.01 two thirds."""
    nulls = [
        Setting("null", True, 2, seeds, sd, alone)
        for alone in (True, False)
        for seeds in (2, 3)
        for sd in (0.0, 0.003, 0.01, 0.03)
    ]
    powers = [
        Setting(kind, pairs, looks, seeds, sd)
        for kind in ("perfect", "halves it")
        for pairs, looks in ((True, 2), (True, 1), (False, 1))
        for seeds, sd in ((2, 0.0), (2, 0.003), (2, 0.01))
    ]
    return [*nulls, *powers]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=4000, help="comparisons a line")
    parser.add_argument("--whole", action="store_true", help="by the comparison's functions")
    parser.add_argument("--questions", type=int, default=450, help="general ones, and controls")
    parser.add_argument("--only", help="lines of this kind alone: null, perfect, ...")
    options = parser.parse_args()
    gc.freeze()  # statsmodels collects garbage at every correction.
    run: Callable[[Setting, int], Found] = whole if options.whole else quick
    print("| defense | figure | looks | seeds | sd of runs | spread | family error "
          "| better at the first | better | coverage | standard error |")  # fmt: skip
    print("| --- " * 11 + "|")
    for of in settings():
        if options.only not in (None, of.kind):
            continue
        found = run(of._replace(questions=options.questions), options.trials).mean(axis=0)
        figure, spread = "bad - good" if of.pairs else "bad", "alone" if of.alone else "family"
        shares = " | ".join(f"{share:.1%}" for share in found[:4])
        print(f"| {of.kind} | {figure} | {of.looks} | {of.seeds} | {of.seed_sd} | {spread} "
              f"| {shares} | {found[4]:.4f} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
