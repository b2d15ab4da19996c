"""`scores.jsonl`: written as scoring goes, so that a killed run continues where it stopped."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emarecipes.config import Origin
from emarecipes.errors import UserError, first_line
from emarecipes.files import ended_lines, json_lines, write_json, write_text

SCORES, FINGERPRINT = "scores.jsonl", "scores.fingerprint.json"
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
        self.path = folder / SCORES
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
        present = [name for name in (*RESULTS, SCORES) if (self.folder / name).exists()]
        if not present:
            return
        if not sidecar.exists():
            raise UserError(
                f"{where}: {self.folder} has {', '.join(present)}, but not of a selection; not "
                "overwritten. Choose another output_dir"
            )
        if overwrite or not self.path.exists():
            return
        again = "choose another output_dir, or say overwrite=true to start anew"
        try:
            found = json.loads(sidecar.read_text(encoding="utf-8"))
            self.scores = _read_scores(self.path)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{where}: {self.path} is broken ({first_line(error)}); {again}"
            ) from None
        if found != self._fingerprint:
            other = [
                name for name in self._fingerprint if found.get(name) != self._fingerprint[name]
            ]
            raise UserError(
                f"{where}: {self.path} was made with other {' and '.join(other or found)}; {again}"
            )

    def open(self) -> None:
        """Start the file anew, or drop the line that a killed run was writing and go on."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.scores:
            write_text(self.path, json_lines(map(_as_json, self.scores.values())))
            return
        for name in (*RESULTS, SCORES):
            (self.folder / name).unlink(missing_ok=True)
        write_json(self.folder / FINGERPRINT, self._fingerprint)

    def append(self, scores: Sequence[Score]) -> None:
        """Add rows that have been scored."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json_lines(map(_as_json, scores)))
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


def _read_scores(path: Path) -> dict[int, Score]:
    scores = {}
    for line in ended_lines(path):
        row = json.loads(line)
        score = Score(*(row[key] for key in ("index", "tokens", "nll_aligned", "nll_adapters")))
        scores[score.index] = score
    return scores


def _as_json(score: Score) -> dict[str, Any]:
    return dict(vars(score))
