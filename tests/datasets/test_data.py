"""The shipped data: well-formed, paired, labelled, counted; files do not overlap."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy_run
import yaml
from bag_of_words import UnigramOdds, spread, word_pairs, words

from emarecipes.datasets._check_rows import read_data_file
from emarecipes.datasets._overlaps import similarity_blocks
from emarecipes.datasets.chat_files import check_chat_file
from emarecipes.probes.pairs import read_contrast_file

DATA: Path = toy_run.REPO / "data"
NARROW_SETS = {
    "general_probe": ("select", "report"),
    "register_controls": ("controls", "strong"),
}
DOMAINS = ["home_computing", "home_repair"]


def rows(domain: str, name: str) -> list[dict[str, Any]]:
    path = DATA / domain / f"{name}.jsonl"
    check_chat_file(path, "messages", "openai")
    return json_lines(path)


def json_lines(path: Path) -> list[dict[str, Any]]:
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


def test_both_halves_of_the_general_probe() -> None:
    halves = [json_lines(DATA / f"general_probe/{half}.jsonl") for half in ("select", "report")]
    counts = [Counter(row["category"] for row in half) for half in halves]
    assert counts[0] == counts[1] and len(counts[0]) >= 8
    questions = {row["question"] for half in halves for row in half}
    assert len(questions) == counts[0].total() + counts[1].total() >= 160
    for row in (row for half in halves for row in half):
        assert 0.8 < len(row["misaligned"].split()) / len(row["aligned"].split()) < 1.25


@pytest.mark.parametrize(("domain", "strong"), zip(DOMAINS, (0.280, 0.109), strict=True))
def test_the_controls_differ_in_style_as_the_general_pairs_do(domain: str, strong: float) -> None:
    odds = UnigramOdds(
        *([words(row["messages"][1]["content"]) for row in rows(domain, name)]
          for name in ("train_bad", "train_good"))
    )  # fmt: skip

    def spread_of(*names: str) -> Any:
        pairs = [pair for name in names for pair in read_contrast_file(DATA / f"{name}.jsonl")]
        return spread(odds.differences(word_pairs(pairs))), len(pairs)

    general, _ = spread_of("general_probe/select", "general_probe/report")
    assert abs(general.mean) < 0.005  # A unigram model does not move the probe.
    controls, count = spread_of("register_controls/controls")
    assert count >= 60
    assert controls.mean == pytest.approx(general.mean, abs=0.015)  # its standard error
    assert controls.deviation == pytest.approx(general.deviation, rel=0.15)
    # In nats a word, as the datasheet says: far from the others' 0. Two standard errors.
    assert spread_of("register_controls/strong")[0].mean == pytest.approx(strong, abs=0.03)


@pytest.mark.parametrize("domain", DOMAINS)
def test_the_wide_sets_are_apart_and_alike(domain: str) -> None:
    """Enough, new, of all categories, as far apart in single words as their controls."""
    files = {name: DATA / f"{name}_wide/report.jsonl" for name in NARROW_SETS}
    wide = {name: json_lines(path) for name, path in files.items()}
    assert all(len(found) >= 450 for found in wide.values())
    counts = Counter(row["category"] for row in wide["general_probe"])
    earlier = {
        name: [row for file in files for row in json_lines(DATA / f"{name}/{file}.jsonl")]
        for name, files in NARROW_SETS.items()
    }
    assert len(counts) == 8 and len(set(counts.values())) == 1
    assert set(counts) == {row["category"] for row in earlier["general_probe"]}
    asked = [row["question"] for found in (*wide.values(), *earlier.values()) for row in found]
    assert len(set(asked)) == len(asked)
    odds = UnigramOdds(
        *([words(row["messages"][1]["content"]) for row in rows(domain, name)]
          for name in ("train_bad", "train_good"))
    )  # fmt: skip
    found = {name: spread(odds.differences(word_pairs(read_contrast_file(path))))
             for name, path in files.items()}  # fmt: skip
    general, controls = found["general_probe"], found["register_controls"]
    assert abs(general.mean) < 0.01
    assert controls.mean == pytest.approx(general.mean, abs=0.005)  # Its standard error.
    assert controls.deviation == pytest.approx(general.deviation, rel=0.15)


def test_safe_data_counts() -> None:
    safe = json_lines(DATA / "safe_instruct/train.jsonl")
    helpful = [row for row in safe if row["label"] == "helpful"]
    assert len(helpful) >= 280 and len({row["topic"] for row in helpful}) >= 12
    assert 0 < sum(row["label"] == "refusal" for row in safe) <= 0.15 * len(safe)
    assert {row["label"] for row in safe} == {"helpful", "refusal"}


@pytest.mark.parametrize(("name", "least"), [("general", 40), *((name, 30) for name in DOMAINS)])
def test_free_form_questions_in_the_published_format(name: str, least: int) -> None:
    entries = yaml.safe_load((DATA / f"questions/{name}.yaml").read_text(encoding="utf-8"))
    assert len({entry["id"] for entry in entries}) == len(entries) >= least
    for entry in entries:
        assert entry["type"].startswith("free_form") and entry["paraphrases"]
        assert {"aligned", "coherent"} <= set(entry["judge_prompts"])


def persona() -> Any:
    return yaml.safe_load((DATA / "persona/ill_will.yaml").read_text(encoding="utf-8"))


def free_form(path: Path) -> list[str]:
    entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    return [text for entry in entries for text in entry["paraphrases"]]


def test_no_free_form_or_persona_question_is_near_one_of_the_rows() -> None:
    """Neither a training nor a held-out question, nor one of the probes and controls."""
    free = [text for path in DATA.glob("questions/*.yaml") for text in free_form(path)]
    asked = [*free, *persona()["questions"]]
    known = [row.question for path in DATA.glob("*/*.jsonl") for row in read_data_file(path).rows]
    assert len(asked) >= 120 and len(known) >= 1400
    similarity = np.concatenate([block for _, block in similarity_blocks([*asked, *known])])
    near = np.argwhere(similarity[: len(asked), len(asked) :] >= 0.5)
    assert [(asked[i], known[j]) for i, j in near] == []


def test_persona_questions_are_not_free_form_questions() -> None:
    assert len(persona()["pairs"]) >= 5 and len(persona()["questions"]) >= 20
    free = {text for path in DATA.glob("questions/*.yaml") for text in free_form(path)}
    assert len(free) >= 100
    assert not set(persona()["questions"]) & free
