"""A comparison with everything that its report tells."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from emarecipes.comparison.criteria import ArmFigures
from emarecipes.comparison.figure_values import Values
from emarecipes.comparison.gate import Effect
from emarecipes.comparison.opening import Opening
from emarecipes.comparison.results import Scores
from emarecipes.comparison.settings import CompareSettings

Half = Literal["select", "report"]


@dataclass
class Outcome:
    """What was compared and what was found.

    Attributes:
        settings: The comparison's.
        figures: Of every arm.
        effect: What undefended training does: what there is to defend against.
        family: Names of the defenses whose contrast is tested.
        half: Which half of the general questions the figures are from.
        opening: If the `report` half has been opened.
        changed: What was added, changed or removed since then.
        missing: What is not there or was not compared, and why, one line each.
        not_run: Defenses of this package that no arm has.
        narrow: Scores on the narrow task by arm's name.
        benign: The same on the benign one.
        runs: Folder of each arm's first run on the narrow task.
        environment: Versions, commit, command line.
    """

    settings: CompareSettings
    figures: list[ArmFigures]
    effect: Effect
    family: list[str]
    half: Half
    opening: Opening | None = None
    changed: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    not_run: list[str] = field(default_factory=list)
    narrow: dict[str, Scores] = field(default_factory=dict)
    benign: dict[str, Scores] = field(default_factory=dict)
    runs: dict[str, Path] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)

    @property
    def undefended(self) -> ArmFigures:
        """The undefended arm's figures."""
        return next(found for found in self.figures if found.arm.role == "undefended")

    def judged_by(self, role: str) -> Values:
        """The undefended arm's values of the figure behind `general`, `in_domain` or `controls`."""
        key = self.settings.criteria.shifted[role].key
        return self.narrow[self.undefended.arm.name].probes[key]

    @property
    def seeds(self) -> int:
        """Seeds that the undefended arm was measured with."""
        return len(self.undefended.seeds)
