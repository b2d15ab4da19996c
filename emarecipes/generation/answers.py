"""The answers of a suite: written as sampling goes, so that a stopped run goes on where it was.

While a suite is sampled, every process appends to a file of its own in `answers/.parts/`. Once all
answers are there they are written to `answers/<suite>.jsonl` in a fixed order, at once: no file of
that name is half a suite. `answers/<suite>.json` says what the answers depend on.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from emarecipes.config import Origin
from emarecipes.datasets.questions import Question
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
from emarecipes.output_dir import ANSWER_PARTS


class AnswerKey(NamedTuple):
    """Which answer: what its random numbers depend on, beside the run's seed."""

    id: str
    paraphrase: int
    sample: int


@dataclass(frozen=True)
class Asked:
    """One answer to be sampled."""

    key: AnswerKey
    question: str
    system: str | None
    category: str | None
    harmless: bool | None

    def record(self, answer: str, *, stopped: bool, tokens: int | None) -> dict[str, Any]:
        """The answer's line."""
        given = {"category": self.category, "harmless": self.harmless}
        return {
            **self.key._asdict(),
            **{key: value for key, value in given.items() if value is not None},
            "system": self.system,
            "question": self.question,
            "answer": answer,
            "stop": "end" if stopped else "length",
            "tokens": tokens,
        }


def all_asked(
    questions: Sequence[Question], samples: int | None, system: str | None
) -> dict[AnswerKey, Asked]:
    """Every answer of a suite, in the order of its file.

    Args:
        questions: The suite's.
        samples: Answers a paraphrase; None: as many as the question says, or one.
        system: For questions without a system prompt of their own.
    """
    return {
        key: Asked(key, text, question.system if question.system is not None else system,
                   question.category, question.harmless)
        for question in questions
        for paraphrase, text in enumerate(question.paraphrases)
        for sample in range(samples or question.samples_per_paraphrase or 1)
        for key in [AnswerKey(question.id, paraphrase, sample)]
    }  # fmt: skip


# Of what answers depend on, what is each question file's own.
OF_QUESTIONS = ("questions", "prompts")


def settings_file(output_dir: Path, suite: str) -> Path:
    """The file that says what a suite's answers depend on."""
    return output_dir / "answers" / f"{suite}.json"


def foreign_answers(
    output_dir: Path, suites: Collection[str], common: Mapping[str, str], where: str
) -> dict[Path, list[str]]:
    """Files of answers in the output folder that another model or other sampling has left there.

    Whoever reads the folder takes all of it for one model's.

    Args:
        output_dir: The run's.
        suites: Names of those that are asked, which see to themselves.
        common: What every answer depends on beside its question, as in `AnswerSet`.
        where: What messages begin with.

    Returns:
        By the file that holds the settings, the names of what is other.
    """
    found = {}
    for path in sorted((output_dir / "answers").glob("*.json")):
        if path.stem in suites or not path.with_suffix(".jsonl").exists():
            continue
        other = [key for key in differing(path, common, where) if key not in OF_QUESTIONS]
        if other:
            found[path] = other
    return found


class AnswerSet:
    """A question file's answers in the output folder.

    Args:
        output_dir: The run's.
        name: The question file's stem.
        asked: All answers that are to be there.
        fingerprint: What the answers depend on, by name, as a digest each; `dtype` and `date`
            as they are.
    """

    def __init__(
        self,
        output_dir: Path,
        name: str,
        asked: dict[AnswerKey, Asked],
        fingerprint: dict[str, str],
    ) -> None:
        self.name = name
        self.asked = asked
        self.path = output_dir / "answers" / f"{name}.jsonl"
        self._fingerprint = fingerprint
        self._settings = settings_file(output_dir, name)
        self._parts = self.path.parent / ANSWER_PARTS
        self.records: dict[AnswerKey, dict[str, Any]] = {}
        self._joined: set[AnswerKey] = set()  # Those in the file itself, not in processes' parts.

    def check(self, origin: Origin, *, overwrite: bool) -> None:
        """Find what an earlier run has left, without changing anything.

        Raises:
            UserError: There are answers of other settings or of unknown origin, or more than are
                asked for, or a file is broken, and they are not to be overwritten.
        """
        files = self._files()
        if overwrite or not (files or self._settings.exists()):
            return
        where = origin.at("output_dir")
        if not self._settings.exists():
            raise UserError(
                f"{where}: {files[0]} has no {self._settings.name} beside it; {START_ANEW}"
            )
        other = differing(self._settings, self._fingerprint, where, old="prompts")
        if other and files:
            raise UserError(
                f"{where}: {self.path} holds answers with other {' and '.join(other)}; {START_ANEW}"
            )
        for file in files:
            found = read_lines(file, _keyed, "answer", where)
            self.records |= found
            if file == self.path:
                self._joined = set(found)
        unasked = [key for key in self.records if key not in self.asked]
        if unasked:
            key = unasked[0]
            raise UserError(
                f"{where}: {self.path} holds sample {key.sample} of {key.id}, which is not asked "
                f"for now: samples_per_paraphrase can only grow; {START_ANEW}"
            )

    def remove(self) -> None:
        """Take its answers and settings away."""
        for file in [*self._files(), self._settings]:
            file.unlink(missing_ok=True)

    def open(self, settings: dict[str, Any]) -> None:
        """Start anew, or gather what earlier processes have left. For the first process alone.

        Args:
            settings: Written to `answers/<suite>.json` with the fingerprint.
        """
        if self.is_complete():
            self._drop_parts()
            return
        old = self._files()
        self._parts.mkdir(parents=True, exist_ok=True)
        if not self.records:
            for file in old:
                file.unlink()
        record = {"suite": self.name, "fingerprint": self._fingerprint, **settings}
        write_json(self._settings, record, ensure_ascii=False)
        if self.records:
            kept = self._part("kept")
            write_text(kept, json_lines(self.records.values()))
            for file in old:
                if file not in (kept, self.path):
                    file.unlink()

    def asked_on(self) -> list[str]:
        """On which days a served model was asked for what is there already."""
        if not self.records:
            return []
        return list(json.loads(self._settings.read_text(encoding="utf-8")).get("asked_on", []))

    def is_complete(self) -> bool:
        """Whether every answer is in the file."""
        return self.path.exists() and self._joined == self.asked.keys()

    def append(self, process: int, records: Sequence[dict[str, Any]]) -> None:
        """Add answers to a process's part, on the disk at once."""
        append_lines(self._part(str(process)), records)

    def join(self) -> None:
        """Write all answers in order. For the first process alone, when all have ended."""
        for file in self._files():
            self.records |= read_lines(file, _keyed, "answer", str(file), "run again")
        missing = self.asked.keys() - self.records.keys()
        assert not missing, f"answers are missing: {sorted(missing)[:3]}"
        self.records = {key: self.records[key] for key in self.asked}
        write_text(self.path, json_lines(self.records.values()))
        self._joined = set(self.records)
        self._drop_parts()

    def _drop_parts(self) -> None:
        for file in self._files():
            if file != self.path:
                file.unlink()
        if self._parts.exists() and not any(self._parts.iterdir()):
            self._parts.rmdir()

    def _part(self, name: str) -> Path:
        return self._parts / f"{self.name}@{name}.jsonl"

    def _files(self) -> list[Path]:
        parts = [p for p in sorted(self._parts.glob("*.jsonl")) if self._is_own(p)]
        return [*([self.path] if self.path.exists() else []), *parts]

    def _is_own(self, part: Path) -> bool:
        return part.stem.rpartition("@")[0] == self.name


def _keyed(record: Any) -> tuple[AnswerKey, dict[str, Any]]:
    return AnswerKey(record["id"], record["paraphrase"], record["sample"]), record
