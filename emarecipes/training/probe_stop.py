"""When a run's probes end it: misalignment has risen, and the task brings no more."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from omegaconf import DictConfig
from torchtune.utils import get_logger, log_rank_zero

from emarecipes.config import Origin, suggestion
from emarecipes.errors import UserError
from emarecipes.settings import parse_settings
from emarecipes.training.settings import ProbeStopSettings

if TYPE_CHECKING:
    from emarecipes.training.probe import Probe

log = get_logger("INFO")

_STOPPED = "probe_stopped"


class ProbeStop:
    """The rule of `probe.stop`, see docs/probe_stop.md.

    With g and i the mean probe shifts of the general and the in-domain suite at a probe, and i'
    that of the in-domain one at the probe before (0 before the first), the run ends where

        g >= rise   and   i > 0   and   i - i' <= converged * i

    It reads nothing but a run's figures, which checkpoints hold: a resumed run ends where the
    uninterrupted one does. All processes have the same figures, and so end together.

    Source: the two conditions are those under which arXiv 2605.12199 finds that stopping early
    keeps the task; the probe and the form of the rule are ours.
    """

    def __init__(self, settings: ProbeStopSettings) -> None:
        self._rise, self._converged = settings.rise, settings.converged
        self._general = f"probe_{settings.general}_shift"
        self._in_domain = f"probe_{settings.in_domain}_shift"
        self._gain = f"probe_{settings.in_domain}_gain"

    def judge(self, probed: Mapping[str, float], last: Mapping[str, float]) -> dict[str, float]:
        """What to log of a probe beside its figures: the gain i - i', and whether the run ends.

        Args:
            probed: Its figures.
            last: Each figure of the run when it was last logged.
        """
        general, in_domain = probed[self._general], probed[self._in_domain]
        gain = in_domain - last.get(self._in_domain, 0.0)
        ends = general >= self._rise and in_domain > 0.0 and gain <= self._converged * in_domain
        return {self._gain: gain} | ({_STOPPED: 1.0} if ends else {})

    def why(self, last: Mapping[str, float]) -> str:
        """A line on the run that it ended."""
        return (
            f"The probe ended this run after step {last['step']:.0f}: {self._general} is "
            f"{last[self._general]:+.4f} (probe.stop.rise {self._rise:g}), and "
            f"{self._in_domain} {last[self._in_domain]:+.4f}, {last[self._gain]:+.4f} since the "
            f"probe before (probe.stop.converged {self._converged:g})"
        )


def has_stopped(last: Mapping[str, float]) -> bool:
    """Whether these last figures are of a run that its probe ended."""
    return _STOPPED in last


def prepare_stop(probe: Probe | None, last: dict[str, float], total_steps: int) -> ProbeStop | None:
    """The rule of a run that begins or goes on, if any; without one a run that was ended goes on.

    Args:
        probe: The run's.
        last: Each figure when it was last logged; changed.
        total_steps: The run's.
    """
    stop = None if probe is None else probe.stop
    if probe is None or stop is None:
        last.pop(_STOPPED, None)
    elif not probe.can_stop(total_steps):
        log_rank_zero(
            log,
            f"probe.stop does nothing in a run of {total_steps} step(s): it takes two probes "
            "before the last step; lower probe.every_n_steps",
            level=logging.WARNING,
        )
    return stop


def read_stop(probe: DictConfig, origin: Origin, suites: Collection[str]) -> ProbeStop | None:
    """The rule that the entry `probe.stop` describes; None without one.

    Raises:
        UserError: A key or value is wrong, or a suite is none of the probe's.
    """
    if probe.get("stop") is None:
        return None
    settings = parse_settings(probe.stop, origin, ProbeStopSettings, within="probe.stop")
    for key in ("general", "in_domain"):
        name = getattr(settings, key)
        if name not in suites:
            raise UserError(
                f"{origin.at(f'probe.stop.{key}')}: {name} is none of probe.suites, which are "
                f"{', '.join(suites)}{suggestion(name, suites)}"
            )
    if settings.general == settings.in_domain:
        raise UserError(
            f"{origin.at('probe.stop')}: general and in_domain are both {settings.general}; name "
            "two suites"
        )
    return ProbeStop(settings)
