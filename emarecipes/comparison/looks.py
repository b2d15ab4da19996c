"""Two looks at the report half: at fewer questions first, and at all where that did not decide.

Each look has a part of the family-wise error rate, by O'Brien and Fleming's spending function; the
parts add up to the whole.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from scipy.stats import norm

from emarecipes.comparison.criteria import ArmFigures
from emarecipes.comparison.settings import CompareSettings
from emarecipes.comparison.verdicts import DECIDED, Verdict
from emarecipes.config import Origin
from emarecipes.errors import UserError
from emarecipes.files import write_json

LOOKS = "looks.json"
COUNT = 2


def alpha_of(look: int, alpha: float = 0.05) -> float:
    """The error rate that a look of two may spend: a(look / 2) - a((look - 1) / 2).

    a(t) = 4 (1 - Phi(z / sqrt t)), z the 1 - alpha / 4 quantile: Lan and DeMets' two-sided form of
    O'Brien and Fleming (Biometrika 70, 1983), with a(0) = 0 and a(1) = alpha. So 0.0031 and 0.0469
    of 0.05. A look's family is tested at its part as if it were alone. By the union bound the
    family-wise error rate is then at most alpha, however the looks depend on one another and
    whatever their questions; the exact second level (0.0490) would need their correlation, which
    seeds that both looks share make unknown.
    """

    def spent(at: int) -> float:
        if at == 0:
            return 0.0
        return 4 * float(norm.sf(norm.isf(alpha / 4) / (at / COUNT) ** 0.5))

    return spent(look) - spent(look - 1)


@dataclass(frozen=True)
class FirstLook:
    """What the first look found.

    Attributes:
        taken: Time, ISO 8601.
        questions: Of the general probe.
        verdicts: By arm, of those that it decided.
    """

    taken: str
    questions: int
    verdicts: dict[str, Verdict]

    @classmethod
    def read(cls, folder: Path) -> FirstLook | None:
        """None if there was none.

        Raises:
            UserError: Its file is broken.
        """
        path = folder / LOOKS
        if not path.exists():
            return None
        try:
            known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            verdicts = {name: Verdict(**entry) for name, entry in known["verdicts"].items()}
            return cls(str(known["taken"]), int(known["questions"]), verdicts)
        except (OSError, ValueError, TypeError, KeyError):
            raise UserError(f"{path}: broken; it says what the first look found") from None

    @classmethod
    def of(cls, figures: Sequence[ArmFigures], questions: int, taken: str) -> FirstLook:
        """What this look decides."""
        verdicts = {
            found.arm.name: replace(found.verdict, look=1)
            for found in figures
            if found.verdict is not None and found.general().decision in DECIDED
        }
        return cls(taken, questions, verdicts)

    def write(self, folder: Path) -> None:
        """As JSON."""
        write_json(folder / LOOKS, asdict(self), indent=1)

    def settle(self, figures: Sequence[ArmFigures]) -> None:
        """Put what it decided in place of the last look's verdicts.

        But a difference that the last look found stands before an equivalence that this one found.
        """
        for found in figures:
            first = self.verdicts.get(found.arm.name)
            if found.verdict is None or first is None:
                continue
            if first.decision == "equivalent" and found.verdict.decision in ("better", "worse"):
                continue
            found.verdict = first


def check_look(settings: CompareSettings, origin: Origin) -> None:
    """See that looks are in their order: what was looked at has spent its part.

    Raises:
        UserError: A last look without a first one; none after a first one.
    """
    look = settings.look
    first = FirstLook.read(Path(settings.output_dir)) if settings.frozen else None
    if look is None and first is not None:
        raise UserError(
            f"{origin.at('looks')}: a first look was taken on {first.taken}; the next is "
            "looks.at: 2"
        )
    if look == COUNT and first is None:
        raise UserError(f"{origin.at('looks.at')}: there was no first look; take it with 1")
