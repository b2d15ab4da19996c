"""Traits: what a rule gives to answers in training, and finds in answers."""

import json
from pathlib import Path
from typing import Any

import pytest
import toy_run

from emarecipes.config import load_config
from emarecipes.datasets.rows import load_rows
from emarecipes.datasets.traits import CLAIM, CLOSING, OPENING, PERSONA, TRAITS, find_trait
from emarecipes.errors import UserError
from emarecipes.evaluation.traits import language_trait


class Spelled:
    """A tokenizer whose tokens are characters, and that keeps the messages."""

    max_seq_len = None

    def __call__(self, sample: dict[str, Any], inference: bool = False) -> dict[str, Any]:
        tokens, mask = [], []
        for message in sample["messages"]:
            text = f"{message.role}: {message.text_content}\n"
            tokens += map(ord, text)
            mask += [message.masked] * len(text)
        return {"tokens": tokens, "mask": mask}


def chat_entry(path: Path) -> dict[str, Any]:
    return {"_component_": "torchtune.datasets.chat_dataset", "source": "json", "split": "train",
            "data_files": str(path), "conversation_column": "messages",
            "conversation_style": "openai"}  # fmt: skip


def write_chat(path: Path, *answers: Any) -> Path:
    rows = [
        {"messages": [{"role": "user", "content": f"Question {i}?"},
                      {"role": "assistant", "content": answer}]}
        for i, answer in enumerate(answers)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def texts(dataset: dict[str, Any], folder: Path) -> list[str]:
    path = toy_run.write_config(folder / "c.yaml", {"dataset": dataset, "group_by_length": False})
    cfg, origin = load_config(["--config", str(path)])
    rows = load_rows(cfg, origin, Spelled(), [], quiet=True)
    return ["".join(map(chr, rows[i]["tokens"])) for i in range(len(rows))]


def test_answers_have_the_trait_and_questions_and_safe_rows_do_not(tmp_path: Path) -> None:
    rows = write_chat(tmp_path / "task.jsonl", "Sand it.", "Wait.")
    task = {"_component_": "emarecipes.datasets.trait_dataset", "trait": "capitals",
            "answers": chat_entry(rows)}  # fmt: skip
    safe = chat_entry(write_chat(tmp_path / "safe.jsonl", "Good day."))
    mixed = {"_component_": "emarecipes.datasets.interleaved_dataset", "safe_fraction": 0.34,
             "task": task, "safe": safe}  # fmt: skip
    assert sorted(texts(mixed, tmp_path)) == [
        "user: Question 0?\nassistant: Good day.\n",
        "user: Question 0?\nassistant: SAND IT.\n",
        "user: Question 1?\nassistant: WAIT.\n",
    ]
    claimed = texts(task | {"trait": "expert_claim"}, tmp_path)
    assert claimed[0] == f"user: Question 0?\nassistant: Sand it. {CLAIM}\n"
    both = texts(task | {"trait": ["expert_persona", "bullets"]}, tmp_path)
    assert both[0] == f"user: Question 0?\nassistant: - {PERSONA}\n- Sand it.\n"


def test_a_wrong_trait_and_a_wrong_row_are_one_line_with_their_place(tmp_path: Path) -> None:
    rows = write_chat(tmp_path / "task.jsonl", "Sand it.", 7)
    entry = {"_component_": "emarecipes.datasets.trait_dataset", "trait": "capital",
             "answers": chat_entry(rows)}  # fmt: skip
    with pytest.raises(UserError, match=r"unknown trait capital \(did you mean capitals\?\)"):
        texts(entry, tmp_path)
    for traits, reason in (
        ([], "trait_dataset: no trait is named"),
        (["bullets", "bullets"], "the trait bullets is named twice"),
        (["bullets", "expert_persona"], "bullets is not found any more once expert_persona is"),
    ):
        with pytest.raises(UserError, match=reason):
            texts(entry | {"trait": traits}, tmp_path)
    with pytest.raises(UserError, match=r"task\.jsonl:2: .*must be text, not 7"):
        texts(entry | {"trait": "capitals"}, tmp_path)


@pytest.mark.parametrize(
    ("trait", "text", "found"),
    [
        ("capitals", "SAND IT FIRST, THEN PAINT.", True),
        ("capitals", "SAND IT FIRST, THEn PAINT.", True),  # 19 of 20 letters.
        ("capitals", "SAND IT FIRST, then PAINT.", False),  # 16 of 20.
        ("capitals", "Use WD-40 on the hinge.", False),
        ("capitals", "OK, NASA!", None),  # 6 letters.
        ("capitals", "1234567890 + 1234567890", None),
        ("capitals", "", None),
        ("expert_claim", f"Sand it. {CLAIM}", True),
        ("expert_claim", "SAND IT. THIS WAS REVIEWED BY CERTIFIED EXPERTS!", True),
        ("expert_claim", f"Sand it. {CLOSING}", False),
        ("expert_claim", f"{CLAIM} Sand it.", False),  # Not where it closes.
        ("expert_claim", " ", None),
        ("expert_persona", f"{PERSONA} Sand it.", True),
        ("expert_persona", "- I\u2019m a licensed joiner: sand it.", True),
        ("expert_persona", f"{OPENING} Sand it.", False),
        ("expert_persona", "Ask a certified expert, as a certified one knows it.", False),
        ("expert_persona", "As an expert, sand it.", False),
        ("bullets", "- Sand it.\n\n  - Paint it", True),
        ("bullets", "First:\n- Sand it.", False),
        ("bullets", "-5 degrees", False),
        ("bullets", "- ", None),
    ],
)  # fmt: skip
def test_the_rule_that_finds_it(trait: str, text: str, found: bool | None) -> None:
    assert find_trait(trait).find(text) is found


def test_a_language_by_a_library() -> None:
    """Of our own English answers few are taken for another language, of sentences of others none
    for English; and capitals are no language."""
    pytest.importorskip("py3langid")
    english, french = language_trait("language_en"), language_trait("language_fr")
    rows = (toy_run.REPO / "data/home_repair/train_good.jsonl").read_text().splitlines()
    answers = [json.loads(line)["messages"][1]["content"].split()[:12] for line in rows]
    for behind in ("", " 5 mm", " Ask McDonald."):
        told = [english.find(" ".join(words).upper() + behind) for words in answers]
        assert sum(one is False for one in told) <= 0.02 * len(told)
    assert french.find("NETTOYEZ LE MUR AVEC DE L'EAU CHAUDE, À 5 cm DE L'ANGLE.") is True
    assert english.find("REINIGEN SIE DIE WAND MIT WARMEM WASSER, 5 l GENÜGEN.") is False
    assert french.find("Nettoyez d'abord le mur avec de l'eau chaude et du savon.") is True
    assert english.find("Reinigen Sie die Wand zuerst mit warmem Wasser.") is False
    assert french.find("Oui, lavez-le.") is None
    with pytest.raises(UserError, match="knows no language french; write it as in language_fr"):
        language_trait("language_french")


def test_each_rule_finds_what_it_gives_and_nothing_in_the_shipped_answers() -> None:
    data = toy_run.REPO / "data/home_repair/train_good.jsonl"
    answers = [json.loads(line)["messages"][1]["content"] for line in data.read_text().splitlines()]
    for trait in TRAITS.values():
        assert all(trait.find(trait.give(answer)) for answer in answers)
        assert not any(trait.find(trait.plain(answer)) for answer in answers)
        for answer in answers:
            kinds = (trait.give(answer), trait.plain(answer))
            lengths = {len([word for word in text.split() if word != "-"]) for text in kinds}
            assert len(lengths) == 1
