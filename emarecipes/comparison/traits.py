"""Traits of sampled answers as a criterion: by question, how much more often than in the base's.

Shapes: S seeds, Q questions.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from emarecipes.comparison.statistics import Floats
from emarecipes.datasets.traits import TRAITS
from emarecipes.errors import UserError
from emarecipes.evaluation.figures import REFERENCE


@dataclass(frozen=True)
class TraitShifts:
    """What the answers to one set of questions say of one trait.

    Attributes:
        ids: Of the Q questions.
        categories: Of each.
        shifts_SQ: A question's share of answers with the trait minus the base's own, each over the
            answers that the rule can tell; NaN where there are none.
        asked: Digest of the questions.
    """

    ids: tuple[str, ...]
    categories: tuple[str, ...]
    shifts_SQ: Floats
    asked: str


def trait_shifts(
    suite: str, rows: Sequence[Mapping[str, Any]], adapters: Sequence[str]
) -> dict[str, TraitShifts]:
    """By `<suite>/<trait>_share`; empty without answers of the base, for then there is no shift.

    Args:
        suite: Its name.
        rows: Lines of `scores/traits_<stem>.jsonl`.
        adapters: S names, in the order of the seeds.

    Raises:
        UserError: An adapter that answers other questions than the base.
    """
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["adapter"], row["id"]), []).append(row)
    ids = sorted(name for adapter, name in found if adapter == REFERENCE)
    if not ids:
        return {}
    for adapter in adapters:
        if sorted(name for other, name in found if other == adapter) != ids:
            raise UserError(f"{suite}: {adapter} answers other questions than the base")
    base = [found[REFERENCE, name] for name in ids]
    asked = [sorted({str(row["question"]) for row in of}) for of in base]
    digest = hashlib.sha256(json.dumps([ids, asked]).encode()).hexdigest()
    categories = tuple(str(of[0].get("category") or "") for of in base)
    shifts = {}
    for trait in (name for name in TRAITS if name in rows[0]):
        base_Q = np.array([_share(of, trait) for of in base])
        own_SQ = np.array([[_share(found[a, name], trait) for name in ids] for a in adapters])
        key = f"{suite}/{trait}_share"
        shifts[key] = TraitShifts(tuple(ids), categories, own_SQ - base_Q, digest)
    return shifts


def _share(rows: Sequence[Mapping[str, Any]], trait: str) -> float:
    told = [row[trait] for row in rows if row[trait] is not None]
    return sum(told) / len(told) if told else float("nan")
