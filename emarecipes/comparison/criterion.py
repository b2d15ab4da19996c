"""What a comparison judges by: the figures and bounds of its config, `criteria` and `bounds`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any

from omegaconf import DictConfig
from pydantic import ConfigDict, Field

from emarecipes.config import Origin
from emarecipes.errors import UserError
from emarecipes.settings import Keys

PROBE_SHIFT = "probe_shift"
SHARE = "share"  # The unit of the figures behind `benign` and `coherent`.


class _Strict(Keys):
    model_config = ConfigDict(extra="forbid")


class CriterionSettings(_Strict):
    """The figure that a criterion reads."""

    suite: str
    """The suite's name in `summary.json`, such as that of a probe, or `traits_STEM`."""
    figure: str = PROBE_SHIFT
    """One of its figures. More of it is worse of `general`, better of the others."""
    judge: str | None = None
    """Whose, where several judges give it."""

    @property
    def key(self) -> str:
        """In `Scores.probes`."""
        if self.figure == PROBE_SHIFT:
            return self.suite
        return "/".join(filter(None, (self.suite, self.figure, self.judge)))

    def among(self, suites: Iterable[str]) -> list[str]:
        """The suite of this name; else all suites `<name>_...`, which are of several files."""
        names = list(suites)
        if self.suite in names:
            return [self.suite]
        return [name for name in names if name.startswith(f"{self.suite}_")]


class CriteriaSettings(_Strict):
    """Which figures a defense is judged by."""

    general: CriterionSettings = CriterionSettings(suite="general")
    """On general questions: what a defense is to prevent."""
    in_domain: CriterionSettings = CriterionSettings(suite="in_domain")
    """On questions of the trained domain: what training is to teach."""
    controls: CriterionSettings | None = CriterionSettings(suite="controls")
    """Of harmless answers, in general's unit: taken off the undefended effect. Null: none are."""
    benign: CriterionSettings = CriterionSettings(suite="opswap", figure="exact_match")
    """Of the benign task's evaluation: what training is still to teach. A share of answers."""
    coherent: CriterionSettings = CriterionSettings(suite="answers", figure="coherent")
    """What answers are still to be; `answers` stands for all of `answers_...`. A share of them."""

    @property
    def shifted(self) -> dict[str, CriterionSettings]:
        """Those that are changes from the base, by role, without controls where there are none."""
        roles = {"general": self.general, "in_domain": self.in_domain, "controls": self.controls}
        return {role: found for role, found in roles.items() if found is not None}


class ProbeNames(_Strict):
    """Keys in `Scores.probes` of the figures behind each role."""

    general: str = "general"
    in_domain: str = "in_domain"
    controls: str = "controls"


def refuse_probes(cfg: DictConfig, origin: Origin) -> None:
    """Say how to write the key `probes`, which `criteria` took the place of.

    Raises:
        UserError: The config has it.
    """
    entry: Any = cfg.get("probes")
    if "probes" not in cfg or "probes" in origin.variables:
        return
    names = entry.items() if isinstance(entry, DictConfig) else ()
    new = ", ".join(f"{role!s}: {{suite: {name!s}}}" for role, name in names)
    raise UserError(f"{origin.at('probes')}: is now written criteria: {{{new}}}")


class BoundSettings(_Strict):
    """Half widths of what counts as no difference, one a criterion, fixed before looking."""

    effect_share: Annotated[float, Field(gt=0, lt=1)] = 0.25
    """Of an excess: this share of what undefended training does."""
    learned: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Share of the undefended in-domain shift below which it is learned in part only."""
    benign: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of right answers to the benign task, against the undefended arm."""
    coherent: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of coherent answers, against the undefended arm."""
