"""The frontier: how far undefended training moves general probes for what it teaches in-domain.

Any drag on training keeps the general margin. So a defense is compared with undefended runs *at
equal in-domain shift*: with the curve through undefended runs of fewer steps and lower rates.
Shapes: R resamples, S seeds, Q questions, K undefended runs of a seed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from emarecipes.comparison.statistics import Estimate, Floats, crossed_estimate, pooled

GENERAL, IN_DOMAIN, CONTROLS = "general", "in-domain", "controls"


@dataclass(frozen=True)
class Shifts:
    """Probe shifts of an arm's runs, row s of seed s.

    Attributes:
        general_SQ: On the general questions, or another probe of the same role.
        in_domain_SQ: On held-out questions of the training domain.
        controls_SQ: On the controls of style, taken off the general ones; None: nothing is.
    """

    general_SQ: Floats
    in_domain_SQ: Floats
    controls_SQ: Floats | None = None


@dataclass(frozen=True)
class Bound:
    """What counts as no difference: a share of what undefended training does.

    Attributes:
        share: Of the undefended effect.
        general_SQ: Shifts of undefended training on the general questions, rows as the defense's.
        controls_SQ: On the controls of style, which are taken off; None if there are none.
    """

    share: float
    general_SQ: Floats
    controls_SQ: Floats | None = None


@dataclass(frozen=True)
class Excess:
    """A defense's general shift minus the frontier's at the same in-domain shift.

    Attributes:
        estimate: Negative is better than learning less. In the probe's unit.
        over: The same minus the bound; surely below 0 is not worse. The bound is itself estimated,
            from the same seeds and questions, so that its uncertainty counts.
        under: The same plus the bound.
        curve: The frontier's general shift there. A defense with no general shift at all has an
            excess of minus this.
        above: Seeds whose in-domain shift lies beyond the curve's end. They are compared with the
            curve's end, which favours the undefended runs.
        below: Seeds that did not move in-domain, or to the other side. They are compared with 0.
        seeds: How many there are.
    """

    estimate: Estimate
    over: Estimate
    under: Estimate
    curve: float
    above: int = 0
    below: int = 0
    seeds: int = 2

    def moved(self, monte_carlo_errors: float) -> Excess:
        """See `Estimate.moved`."""
        parts = (e.moved(monte_carlo_errors) for e in (self.estimate, self.over, self.under))
        estimate, over, under = parts
        return replace(self, estimate=estimate, over=over, under=under)


def on_curve(x_RS: Floats, points_x_RSK: Floats, points_y_RSK: Floats) -> Floats:
    """Piecewise linear interpolation at x through the origin and the points of the same seed.

    The origin is the model before training: no shift at all. Beyond the outermost points the curve
    is constant.

    Returns:
        (R, S).
    """
    origin = np.zeros((*points_x_RSK.shape[:-1], 1))
    x, y = (np.concatenate([origin, p], axis=-1) for p in (points_x_RSK, points_y_RSK))
    order = np.argsort(x, axis=-1, kind="stable")
    x, y = np.take_along_axis(x, order, -1), np.take_along_axis(y, order, -1)
    right = np.clip((x < x_RS[..., None]).sum(-1, keepdims=True), 1, x.shape[-1] - 1)
    x0, x1 = (np.take_along_axis(x, right - step, -1)[..., 0] for step in (1, 0))
    y0, y1 = (np.take_along_axis(y, right - step, -1)[..., 0] for step in (1, 0))
    width = np.where(x1 > x0, x1 - x0, 1.0)
    y_RS: Floats = y0 + np.clip((x_RS - x0) / width, 0.0, 1.0) * (y1 - y0)
    return y_RS


def excess(
    defended: Shifts,
    undefended: Mapping[str, Shifts],
    bound: Bound,
    *,
    is_share: bool = False,
    limit: float = 1.0,
) -> Excess:
    """The excess of a defense over the frontier, paired by seed.

    Args:
        defended: The defense's runs.
        undefended: The undefended runs of the same seeds, by arm: full training, fewer steps, lower
            rates. The questions of all probes are drawn in the crossed bootstrap; the curve of
            every resample goes through that resample's points.
        bound: What counts as no difference. Its general questions are the probe's own.
        is_share: Whether the general shifts are differences of shares of answers.
        limit: See `crossed_estimate`.
    """
    in_domain_KSQ = np.stack([shifts.in_domain_SQ for shifts in undefended.values()])
    general_KSQ = np.stack([shifts.general_SQ for shifts in undefended.values()])
    off_SQ = [s.controls_SQ for s in undefended.values() if s.controls_SQ is not None]
    controls_KSQ = None if defended.controls_SQ is None else np.stack(off_SQ)

    def curve(shares: Mapping[str, Floats]) -> Floats:
        in_domain, points_RSK = shares[IN_DOMAIN], _of_arms(shares[GENERAL], general_KSQ)
        if controls_KSQ is not None:
            points_RSK = points_RSK - _of_arms(shares[CONTROLS], controls_KSQ)
        return on_curve(
            in_domain @ defended.in_domain_SQ.T, _of_arms(in_domain, in_domain_KSQ), points_RSK
        )

    def off_bound(sign: float) -> Callable[[Mapping[str, Floats]], Floats]:
        def by_seed(shares: Mapping[str, Floats]) -> Floats:
            found = shares[GENERAL] @ defended.general_SQ.T - curve(shares)
            if defended.controls_SQ is not None:
                found = found - shares[CONTROLS] @ defended.controls_SQ.T
            return found + sign * bound.share * effect_by_seed(shares, bound) if sign else found

        return by_seed

    questions = {
        GENERAL: defended.general_SQ.shape[1],
        IN_DOMAIN: defended.in_domain_SQ.shape[1],
    }
    all_questions = questions | controls_of(bound)
    if defended.controls_SQ is not None:
        questions = all_questions
    even = {name: np.full((1, count), 1 / count) for name, count in questions.items()}
    x_S = defended.in_domain_SQ.mean(axis=1)
    end_S = in_domain_KSQ.mean(axis=2).max(axis=0)
    return Excess(
        crossed_estimate(off_bound(0.0), questions, is_share=is_share, limit=limit),
        over=crossed_estimate(off_bound(-1.0), all_questions, is_share=is_share, limit=limit),
        under=crossed_estimate(off_bound(1.0), all_questions, is_share=is_share, limit=limit),
        curve=float(curve(even).mean()),
        above=int((x_S > end_S).sum()),
        below=int((x_S <= 0).sum()),
        seeds=len(x_S),
    )


def _of_arms(share_RQ: Floats, values_KSQ: Floats) -> Floats:
    """The mean of each arm and seed in each resample, (R, S, K)."""
    mean_RSK: Floats = np.einsum("rq,ksq->rsk", share_RQ, values_KSQ, optimize=True)
    return mean_RSK


def pooled_excesses(excesses: Mapping[str, Excess]) -> dict[str, Excess]:
    """Those of several defenses on one probe, by name, with the spread of all of their seeds."""
    estimate, over, under = (
        pooled([getattr(found, part) for found in excesses.values()])
        for part in ("estimate", "over", "under")
    )
    return {
        name: replace(found, estimate=e, over=o, under=u)
        for (name, found), e, o, u in zip(excesses.items(), estimate, over, under, strict=True)
    }


def effect_by_seed(shares: Mapping[str, Floats], bound: Bound) -> Floats:
    """The undefended effect, (R, S): the general shift minus that of the controls of style."""
    effect = shares[GENERAL] @ bound.general_SQ.T
    return effect if bound.controls_SQ is None else effect - shares[CONTROLS] @ bound.controls_SQ.T


def controls_of(bound: Bound) -> dict[str, int]:
    """The number of questions of the controls, by their name in shares."""
    return {} if bound.controls_SQ is None else {CONTROLS: bound.controls_SQ.shape[1]}
