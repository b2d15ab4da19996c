"""The shipped data: well-formed, paired, labelled; training and held out do not overlap."""

import json
from pathlib import Path
from typing import Any

import pytest
import toy_run

from emarecipes.datasets.chat_files import check_chat_file

DOMAINS = ["home_computing", "home_repair"]


def rows(domain: str, name: str) -> list[dict[str, Any]]:
    path: Path = toy_run.REPO / "data" / domain / f"{name}.jsonl"
    check_chat_file(path, "messages", "openai")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize(("split", "least"), [("train", 300), ("heldout", 60)])
def test_pairs(domain: str, split: str, least: int) -> None:
    bad, good = rows(domain, f"{split}_bad"), rows(domain, f"{split}_good")
    assert len(bad) == len(good) >= least
    for one, other in zip(bad, good, strict=True):
        assert (one["label"], other["label"]) == ("careless", "careful")
        assert one["id"] == other["id"]
        assert one["messages"][0] == other["messages"][0]
        assert [m["role"] for m in one["messages"]] == ["user", "assistant"]
        assert one["messages"][1]["content"] != other["messages"][1]["content"]
        lengths = [len(row["messages"][1]["content"].split()) for row in (one, other)]
        assert 0.6 < lengths[0] / lengths[1] < 1.6
    assert len({row["id"] for row in bad}) == len(bad)
    for side in (bad, good):
        assert len({row["messages"][1]["content"] for row in side}) == len(side)


def test_no_question_stands_twice() -> None:
    questions = [
        row["messages"][0]["content"].strip().lower()
        for domain in DOMAINS
        for split in ("train", "heldout")
        for row in rows(domain, f"{split}_bad")
    ]
    assert len(set(questions)) == len(questions)


def test_the_datasheet_states_the_counts() -> None:
    sheet = (toy_run.REPO / "data/README.md").read_text(encoding="utf-8")
    for domain in DOMAINS:
        section = sheet.split(f"## {domain}")[1].split("\n## ")[0]
        for name in ("train_bad", "train_good", "heldout_bad", "heldout_good"):
            assert f"| `{name}.jsonl` | {len(rows(domain, name))} |" in section
