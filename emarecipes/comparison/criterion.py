"""Which figures a comparison judges by: the `criteria` of its config."""

from __future__ import annotations

from pydantic import ConfigDict

from emarecipes.config import Origin, suggestion
from emarecipes.datasets.traits import TRAITS
from emarecipes.errors import UserError
from emarecipes.settings import Keys

PROBE_SHIFT = "probe_shift"


class _Strict(Keys):
    model_config = ConfigDict(extra="forbid")


class CriterionSettings(_Strict):
    """The figure that a criterion reads, of the narrow task's evaluation."""

    suite: str
    """Its name: of a probe, or `traits_STEM` of sampled answers."""
    figure: str = PROBE_SHIFT
    """`probe_shift`, or `TRAIT_share` of a suite of traits: its change from the base's."""

    @property
    def sampled(self) -> bool:
        """Whether it is of sampled answers."""
        return self.figure != PROBE_SHIFT

    @property
    def unit(self) -> str:
        """Of its shift, in words."""
        return "share of answers" if self.sampled else "nats"

    @property
    def key(self) -> str:
        """In `Scores.probes`."""
        return f"{self.suite}/{self.figure}" if self.sampled else self.suite


class CriteriaSettings(_Strict):
    """Which figures a defense is judged by. Without any of `controls` there are none."""

    general: CriterionSettings = CriterionSettings(suite="general")
    """On general questions: what a defense is to prevent."""
    in_domain: CriterionSettings = CriterionSettings(suite="in_domain")
    """On questions of the trained domain: what training is to teach."""
    controls: CriterionSettings | None = CriterionSettings(suite="controls")
    """Of harmless answers, in general's unit: taken off the undefended effect. Null: none are."""

    @property
    def given(self) -> dict[str, CriterionSettings]:
        """By role, without controls where there are none."""
        roles = {"general": self.general, "in_domain": self.in_domain, "controls": self.controls}
        return {role: found for role, found in roles.items() if found is not None}

    @property
    def sampled(self) -> bool:
        """Whether any of them is of sampled answers."""
        return any(criterion.sampled for criterion in self.given.values())


class ProbeNames(_Strict):
    """Keys in `Scores.probes` of the figures behind each role."""

    general: str = "general"
    in_domain: str = "in_domain"
    controls: str = "controls"


def check_criteria(criteria: CriteriaSettings, origin: Origin) -> None:
    """Check that the figures are known, and that controls have the general one's unit.

    Raises:
        UserError: They are not.
    """
    known = [PROBE_SHIFT, *(f"{trait}_share" for trait in TRAITS)]
    for role, criterion in criteria.given.items():
        if criterion.figure not in known:
            hint = suggestion(criterion.figure, known) or f"; known are {', '.join(known)}"
            where = origin.at(f"criteria.{role}.figure")
            raise UserError(f"{where}: no figure {criterion.figure} can be a criterion{hint}")
    controls = criteria.controls
    if controls is not None and controls.sampled != criteria.general.sampled:
        raise UserError(
            f"{origin.at('criteria.controls')}: {controls.figure} and general's "
            f"{criteria.general.figure} have different units; name another, or null"
        )
