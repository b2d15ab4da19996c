"""What fine-tuning did to probes: shifts by arm, against a good-sibling arm and style controls.

All figures are in nats a token. Shapes: S seeds, N questions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from crossed_bootstrap import crossed_bootstrap
from numpy.typing import NDArray

from emarecipes.errors import UserError
from emarecipes.evaluation.statistics import Interval, question_bootstrap
from emarecipes.probes.contrast import PairNLL, Part, nll_change, probe_shift

Floats = NDArray[np.float64]
# By row (a probe, or the difference of two) and column (an arm, or the difference of both).
Cells = dict[str, dict[str, Interval]]

GENERAL, IN_DOMAIN = "general", "in-domain"
# Matched to the general pairs in style, and farther apart in style than they are.
CONTROLS, STRONG_CONTROLS = "controls", "strong controls"
BAD, GOOD = "bad", "good"
ARMS_DIFFERENCE = f"{BAD} - {GOOD}"


@dataclass
class Measured:
    """A probe's likelihoods under the reference and under the runs of each arm.

    Attributes:
        reference: Without an adapter.
        arms: "bad", "good" or both; run s of either arm has the same seed.
    """

    reference: PairNLL
    arms: dict[str, list[PairNLL]] = field(default_factory=dict)


def shifts(measured: Measured, part: Part = "all") -> dict[str, Floats]:
    """Probe shifts (S, N) by arm and, where both are there, of "bad - good", paired by seed.

    Raises:
        UserError: The arms have different numbers of runs.
    """
    found = {
        arm: np.stack([probe_shift(measured.reference, model, part) for model in models])
        for arm, models in measured.arms.items()
    }
    if BAD in found and GOOD in found:
        if len(found[BAD]) != len(found[GOOD]):
            raise UserError("arms must be paired: they have different numbers of seeds")
        found[ARMS_DIFFERENCE] = found[BAD] - found[GOOD]
    return found


def shift_cells(probes: Mapping[str, Measured], part: Part = "all") -> Cells:
    """Mean shifts of each probe, and general minus either controls, by arm and for bad - good.

    The cell "general - controls" of "bad - good" is the difference in differences. With two seeds
    and more they have 95 % intervals (`crossed_bootstrap`), else NaN for both ends.

    Args:
        probes: "general", and "controls", "strong controls" and any others.
        part: Of the answers' tokens. Pairs with an answer without a rest are left out of "rest".
    """
    columns = {
        name: {column: _finite(values) for column, values in shifts(measured, part).items()}
        for name, measured in probes.items()
    }
    cells: Cells = {
        name: {column: _interval(values) for column, values in found.items()}
        for name, found in columns.items()
    }
    for controls in (CONTROLS, STRONG_CONTROLS):
        if controls in columns:
            cells[f"{GENERAL} - {controls}"] = {
                column: _difference(values, columns[controls][column])
                for column, values in columns[GENERAL].items()
            }
    return cells


def probe_figures(measured: Measured) -> dict[str, Any]:
    """The reference's mean margin; misaligned shares; both answers' mean NLL changes by arm."""
    reference = measured.reference
    shares, changes = {"reference": reference.misaligned_share()}, {}
    for arm, models in measured.arms.items():
        shares[arm] = float(np.mean([model.misaligned_share() for model in models]))
        change_2 = np.mean([nll_change(reference, model).mean(axis=0) for model in models], axis=0)
        changes[arm] = {"aligned": float(change_2[0]), "misaligned": float(change_2[1])}
    return {
        "margin": float(reference.margin().mean()),
        "misaligned_share": shares,
        "nll_change": changes,
    }


def category_shifts(measured: Measured, categories: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Mean shifts of the questions of each category, by arm and for bad - good, and their number.

    Args:
        measured: The probe.
        categories: Of each of its N questions.
    """
    columns, names = shifts(measured), np.array(categories)
    return {
        name: {"questions": int((names == name).sum())}
        | {column: float(values[:, names == name].mean()) for column, values in columns.items()}
        for name in dict.fromkeys(categories)
    }


def unigram_figures(
    differences: Mapping[str, Floats], probes: Mapping[str, Measured]
) -> dict[str, Any]:
    """How much of the language model's shift a unigram model of the training answers reproduces.

    `full` is the shift of going from the good answers' unigram to the bad answers' one. With both
    arms, the unigram is taken as far as it needs to have the language model's in-domain shift
    (bad - good), `weight` times that way, and its shifts there (`unigram`) stand beside the
    language model's (`language_model`). `correlation` is over a probe's questions.

    Args:
        differences: `UnigramOdds.differences` of each probe's pairs, (N,).
        probes: The same probes, "in-domain" among them.
    """
    found: dict[str, Any] = {
        "full": {name: asdict(question_bootstrap(values)) for name, values in differences.items()}
    }
    if any(set(measured.arms) != {BAD, GOOD} for measured in probes.values()):
        return found
    model = {name: shifts(m)[ARMS_DIFFERENCE].mean(axis=0) for name, m in probes.items()}
    weight = float(model[IN_DOMAIN].mean() / differences[IN_DOMAIN].mean())
    scaled = {name: question_bootstrap(weight * values) for name, values in differences.items()}
    return found | {
        "weight": weight,
        "unigram": {name: asdict(interval) for name, interval in scaled.items()},
        "language_model": {
            name: asdict(question_bootstrap(values)) for name, values in model.items()
        },
        "correlation": {
            name: float(np.corrcoef(differences[name], values)[0, 1])
            for name, values in model.items()
        },
    }


def _finite(values_SN: Floats) -> Floats:
    return values_SN[:, np.isfinite(values_SN).all(axis=0)]


def _interval(values_SN: Floats) -> Interval:
    if len(values_SN) < 2:
        return Interval(float(values_SN.mean()), float("nan"), float("nan"))
    return crossed_bootstrap([(1.0, values_SN)])


def _difference(general_SN: Floats, controls_SN: Floats) -> Interval:
    if len(general_SN) < 2:
        estimate = float(general_SN.mean() - controls_SN.mean())
        return Interval(estimate, float("nan"), float("nan"))
    return crossed_bootstrap([(1.0, general_SN), (-1.0, controls_SN)])
