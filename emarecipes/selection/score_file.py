"""`scores.jsonl`: written as scoring goes, so that a killed run continues where it stopped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emarecipes.config import Origin
from emarecipes.errors import UserError
from emarecipes.files import (
    START_ANEW,
    append_lines,
    json_lines,
    read_lines,
    write_json,
    write_text,
)
from emarecipes.fingerprint import differing

SCORE_LINES, FINGERPRINT = "scores.jsonl", "scores.fingerprint.json"
ADDED = ("score", "rank")
"""What `selected.jsonl` has of a row beside its own keys."""
RESULTS = ("config.yaml", "selected.jsonl", "gap.png")


@dataclass(frozen=True)
class Score:
    """The likelihoods of one candidate's answer, in nats a token.

    Attributes:
        index: The candidate's number in the file, from 0.
        tokens: The answer's.
        nll_aligned: Mean NLL with the adapter off.
        nll_adapters: Mean NLL with each adapter, by its folder.
    """

    index: int
    tokens: int
    nll_aligned: float
    nll_adapters: dict[str, float]


class ScoreFile:
    """The scores of a run in its output folder.

    Args:
        folder: The run's `output_dir`.
        fingerprint: What the scores depend on, by name, as a digest each; `dtype` and `date`
            as they are.
    """

    def __init__(self, folder: Path, fingerprint: dict[str, str]) -> None:
        self.folder = folder
        self.path = folder / SCORE_LINES
        self._fingerprint = fingerprint
        self.scores: dict[int, Score] = {}

    def check(self, origin: Origin, *, overwrite: bool) -> None:
        """Find what an earlier run has left, without changing anything.

        Raises:
            UserError: The folder's results are another recipe's, or scores of something else, and
                not to be overwritten.
        """
        where = origin.at("output_dir")
        sidecar = self.folder / FINGERPRINT
        present = [name for name in (*RESULTS, SCORE_LINES) if (self.folder / name).exists()]
        if not present:
            return
        if not sidecar.exists():
            raise UserError(
                f"{where}: {self.folder} has {', '.join(present)}, but not of a selection; not "
                "overwritten. Choose another output_dir"
            )
        if overwrite or not self.path.exists():
            return
        self.scores = read_lines(self.path, _as_score, "score", where)
        if other := differing(sidecar, self._fingerprint, where):
            raise UserError(
                f"{where}: {self.path} was made with other {' and '.join(other)}; {START_ANEW}"
            )

    def open(self) -> None:
        """Start the file anew, or drop the line that a killed run was writing and go on."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.scores:
            write_text(self.path, json_lines(map(_as_json, self.scores.values())))
            return
        for name in (*RESULTS, SCORE_LINES):
            (self.folder / name).unlink(missing_ok=True)
        write_json(self.folder / FINGERPRINT, self._fingerprint)

    def append(self, scores: Sequence[Score]) -> None:
        """Add rows that have been scored."""
        append_lines(self.path, map(_as_json, scores))
        self.scores |= {score.index: score for score in scores}

    def finish(self, extra: dict[int, dict[str, Any]]) -> None:
        """Write the file once more in the order of candidates, with what is now known of each.

        Args:
            extra: Further keys of every row, by index.
        """
        rows = (
            {"index": index} | extra[index] | _as_json(self.scores[index])
            for index in sorted(self.scores)
        )
        write_text(self.path, json_lines(rows))


def _as_score(row: Any) -> tuple[int, Score]:
    score = Score(*(row[key] for key in ("index", "tokens", "nll_aligned", "nll_adapters")))
    return score.index, score


def _as_json(score: Score) -> dict[str, Any]:
    return dict(vars(score))
