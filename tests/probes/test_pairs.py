"""Files of pairs."""

import json
from pathlib import Path
from typing import Any

import pytest
import toy_run

from emarecipes.errors import UserError
from emarecipes.probes.pairs import (
    ContrastPair,
    read_contrast_file,
    read_sibling_files,
)


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def chat(name: str | None, question: str, answer: str) -> dict[str, Any]:
    user, assistant = (
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
    )
    return {"id": name, "messages": [user, assistant]}


def test_contrast_files(tmp_path: Path) -> None:
    rows = [
        {"id": "x", "category": "law", "question": "Q?", "aligned": "Good.", "misaligned": "Bad."},
        {"question": "R?", "aligned": "Fine.", "misaligned": "Foul."},
    ]
    assert read_contrast_file(write(tmp_path / "p.jsonl", *rows)) == [
        ContrastPair("x", "law", "Q?", "Good.", "Bad."),
        ContrastPair("2", "", "R?", "Fine.", "Foul."),
    ]
    row = {"id": "rc", "question": "Q?", "careful": "Slow.", "breezy": "Fast."}
    controls = write(tmp_path / "c.jsonl", row)
    assert read_contrast_file(controls) == [ContrastPair("rc", "", "Q?", "Slow.", "Fast.")]
    for half in ("select", "report"):
        path = toy_run.REPO / f"data/general_probe/{half}.jsonl"
        pairs = read_contrast_file(path)
        assert len(pairs) == 88 and len({pair.category for pair in pairs}) == 8
    rows[0]["id"] = "2"  # A question of the second line's number, and the second line without one.
    with pytest.raises(UserError, match=r"p\.jsonl:2: has no id, and its line's number is another"):
        read_contrast_file(write(tmp_path / "p.jsonl", *rows))
    with pytest.raises(UserError, match=r"chat\.jsonl: rows need a question with two answers"):
        read_contrast_file(write(tmp_path / "chat.jsonl", chat("a", "Q?", "A.")))
    with pytest.raises(UserError, match=r'q\.jsonl:1: "misaligned" must be text'):
        read_contrast_file(write(tmp_path / "q.jsonl", {"question": "Q?", "aligned": "A."}))


def test_sibling_files(tmp_path: Path) -> None:
    good = write(tmp_path / "good.jsonl", chat("a", "Q?", "Good."), chat("b", "R?", "Fine."))
    bad = write(tmp_path / "bad.jsonl", chat("b", "R?", "Foul."), chat("a", "Q?", "Bad."))
    assert read_sibling_files(good, bad, "home") == [
        ContrastPair("a", "home", "Q?", "Good.", "Bad."),
        ContrastPair("b", "home", "R?", "Fine.", "Foul."),
    ]
    for rows, message in (
        ([chat("a", "Q?", "Bad.")], r"good\.jsonl:2: .*bad\.jsonl has no row with the id b"),
        (
            [chat("a", "Q?", "Bad."), chat("b", "R?", "Foul."), chat("c", "S?", "Wrong.")],
            r"bad\.jsonl:3: .*good\.jsonl has no row with the id c",
        ),
        (
            [chat("a", "Q?", "Bad."), chat("b", "Other?", "Foul.")],
            r"good\.jsonl:2: b has another question in .*bad\.jsonl",
        ),
        ([chat(None, "Q?", "Bad.")], r"bad\.jsonl:1: a row needs an id, one question"),
    ):
        with pytest.raises(UserError, match=message):
            read_sibling_files(good, write(tmp_path / "bad.jsonl", *rows), "home")
