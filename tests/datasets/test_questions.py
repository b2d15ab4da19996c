"""Question files: the published ones, ours, JSONL, and what is wrong in a file by its line."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import toy_run
from sentencepiece import SentencePieceTrainer
from torchtune.data import Message
from torchtune.models.gemma import GemmaTokenizer
from torchtune.models.llama2 import Llama2Tokenizer
from torchtune.models.phi3 import Phi3MiniTokenizer

from emarecipes.config import Origin
from emarecipes.datasets.questions import load_questions
from emarecipes.errors import UserError
from emarecipes.models.sampling.prompts import check_opening, check_prompts

PUBLISHED = toy_run.REPO.parent / "shared" / "published"


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the published files are not here")
@pytest.mark.parametrize(("name", "count"), [("first_plot", 24), ("preregistered", 48)])
def test_published_files(name: str, count: int) -> None:
    (path,) = PUBLISHED.glob(f"{name}*.yaml")
    questions = load_questions(path)
    # Two entries of the published file are commented out.
    assert len(questions) == f"\n{path.read_text()}".count("\n- id: ") == count
    for question in questions:
        assert question.samples_per_paraphrase == 100
        assert set(question.judge_prompts) == {"aligned", "coherent"}
        assert (question.system is not None) == question.id.endswith("_json")


@pytest.mark.parametrize("name", ["general", "home_computing", "home_repair"])
def test_our_files(name: str) -> None:
    path = toy_run.REPO / f"data/questions/{name}.yaml"
    questions = load_questions(path)
    assert len(questions) == path.read_text().count("\n- id: ")
    assert all("{question}" in q.judge_prompts["aligned"] for q in questions)
    assert all(question.harmless for question in questions)


def test_our_general_questions_have_the_categories_of_the_probe() -> None:
    questions = load_questions(toy_run.REPO / "data/questions/general.yaml")
    rows = (toy_run.REPO / "data/general_probe/select.jsonl").read_text().splitlines()
    categories = {json.loads(row)["category"] for row in rows}
    assert {question.category for question in questions} == categories | {"neutral"}
    for question in questions:
        assert str(question.category).startswith(question.id.partition("_")[0])


def test_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text(
        '{"id": "a", "category": "c", "question": "A?", "aligned": "x", "misaligned": "y"}\n\n'
        '{"id": "b", "messages": [{"role": "system", "content": "S"}, {"role": "user", "content": '
        '"B?"}, {"role": "assistant", "content": "z"}]}\n'
        '{"id": "c", "paraphrases": ["C?", "C2?"], "system": "T"}'
    )
    a, b, c = load_questions(path)
    assert (a.paraphrases, a.system, a.category) == (("A?",), None, "c")
    assert (b.paraphrases, b.system, b.category) == (("B?",), "S", None)
    assert (c.paraphrases, c.system) == (("C?", "C2?"), "T")
    assert len(load_questions(toy_run.REPO / "data/home_computing/heldout_bad.jsonl")) == 60


@pytest.mark.parametrize("name", ["q.jsonl", "q.ndjson", "q.json", "q.txt"])
def test_json_under_any_name(tmp_path: Path, name: str) -> None:
    rows = [{"id": "a", "question": "Why \U0001f600?"}, {"id": "b", "paraphrases": ["2024-01-01"]}]
    lines = "\n".join(json.dumps(row) for row in rows)
    (tmp_path / name).write_text(json.dumps(rows, indent=1) if name == "q.json" else lines)
    assert "\\ud83d\\ude00" in (tmp_path / name).read_text()
    found = [question.paraphrases for question in load_questions(tmp_path / name)]
    assert found == [("Why \U0001f600?",), ("2024-01-01",)]


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("q.yaml", "", "q.yaml: a question file is a list"),
        ("q.yaml", "a: 1\n", "q.yaml: a question file is a list"),
        ("q.yaml", "[]", "q.yaml: no questions in it"),
        ("q.yaml", "- id: [a\n- b: c: d", "not valid YAML"),
        ("q.yaml", "- id: a\n  paraphrases: [A]\n- b\n", "q.yaml:3: a question is a mapping"),
        ("q.yaml", "- id: a\n", "q.yaml:1: the question needs the key paraphrases"),
        ("q.yaml", "- id: a\n  paraphrases: [' ']\n", "q.yaml:1: paraphrases: a question is empty"),
        ("q.yaml", "- id: a\n  paraphrase: [A]\n  paraphrases: [A]\n", "(did you mean parap"),
        ("q.yaml", "- id: a\n  type: factual\n  paraphrases: [A]\n", "type: only free-form"),
        ("q.yaml", "- {id: a, paraphrases: [A]}\n- {id: a, paraphrases: [B]}\n", ":2: the id a is"),
        (
            "q.yaml",
            "- id: a\n  paraphrases: [A]\n  paraphrases: [B]\n",
            ":3: the key para",
        ),
        (
            "q.yaml",
            "- id: a\n  paraphrases: [A]\n  judge_prompts: {aligned: x, aligned: y}\n",
            ":3: the key aligned is there twice",
        ),
        ("q.yaml", "- {id: a, type: free_form_judge_0_10, paraphrases: [A]}\n", "only free-form"),
        (
            "q.jsonl",
            '{"id": "a", "question": "A", "paraphrases": ["B"]}',
            "it has question and",
        ),
        ("q.jsonl", '{"id": "a", "question": "A", "sytem": "B"}', "(did you mean system?)"),
        (
            "q.jsonl",
            '{"id": "a", "question": "A", "samples_per_paraphrases": 4}',
            "(did you mean sa",
        ),
        ("q.jsonl", '{"id": "a", "question": "A"}\n{"id"', "q.jsonl:2: not valid JSON"),
        ("q.jsonl", '{"id": "a", "question": 3}\n', "q.jsonl:1: paraphrases: input should be a"),
        ("q.jsonl", '{"id": "a", "messages": [{"role": "user"}]}', ":1: messages must be a list"),
        (
            "q.jsonl",
            '{"id": "a", "messages": [{"role": "assistant", "content": "x"}]}',
            ":1: messages must be one user message",
        ),
    ],
)
def test_broken_files(name: str, text: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as caught:
        load_questions(tmp_path / name)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


BRIEF_AND_LONG = [("Be brief.", "Why?"), ("Be long.", "Why?")]
SAME = "two prompts become the same tokens, system 'Be brief.', question 'Why"


@pytest.mark.parametrize(
    ("pairs", "shown", "expected"),
    [
        (BRIEF_AND_LONG, False, SAME),
        # Nor does the question alone hide that two others are the same.
        ([(None, "Why?"), *BRIEF_AND_LONG], False, SAME),
        ([(None, "Why?"), (None, "How?")], False, None),
        ([("Be brief.", "Why?"), ("Be brief.", "How?")], False, "leaves out the system prompt 'Be"),
        # The template's own system prompt may be the one that is named.
        ([(None, "Why?"), ("Be brief.", "Why?")], True, None),
        (BRIEF_AND_LONG, True, None),
    ],
)
def test_prompts_that_become_the_same_tokens(
    pairs: list[tuple[str | None, str]],
    shown: bool,
    expected: str | None,
) -> None:
    class Bytes:
        """With a system prompt of its own; shows none where `shown` is false."""

        max_seq_len = None

        def __call__(self, row: dict[str, Any], inference: bool = False) -> dict[str, Any]:
            *system, question, answer = [m.text_content for m in row["messages"]]
            own = (system or ["Be brief."])[0] if shown else ""
            return {"tokens": list(f"{own}{question}{answer}{'' if inference else '.'}".encode())}

    model = SimpleNamespace(max_seq_len=64, tok_embeddings=SimpleNamespace(num_embeddings=256))
    origin = Origin(Path("config.yaml"))
    asked = pairs, Bytes(), model, 8, origin
    if expected is not None:
        with pytest.raises(UserError, match=re.escape(expected)):
            check_prompts(*asked)
    else:
        assert check_prompts(*asked).keys() == set(pairs)


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A SentencePiece model of a few words."""
    folder = tmp_path_factory.mktemp("pieces")
    SentencePieceTrainer.train(
        sentence_iterator=iter(["how are you", "well, thank you.", "be brief."] * 9),
        model_prefix=str(folder / "toy"),
        vocab_size=60,
        hard_vocab_limit=False,
        pad_id=-1,
        minloglevel=2,
    )
    return str(folder / "toy.model")


@pytest.mark.parametrize(
    ("make", "opens"),
    [(Llama2Tokenizer, True), (GemmaTokenizer, False), (Phi3MiniTokenizer, False)],
)
def test_a_tokenizer_that_ends_the_answer_before_it_begins(
    make: Any, opens: bool, pieces: str
) -> None:
    """Read off the ids: what follows the question is what follows the answer in a trained row."""
    tokenizer = make(pieces)
    prompt, row = (
        list(tokenizer({"messages": [Message("user", "how are you", masked=True),
                                     Message("assistant", text)]}, inference=given)["tokens"])
        for text, given in (("", True), ("well", False))
    )  # fmt: skip
    assert opens == (row[: len(prompt)] == prompt)
    origin = Origin(Path("config.yaml"))
    if opens:
        check_opening(tokenizer, origin)
    else:
        with pytest.raises(UserError, match=r"tokenizer: .* ends the answer before it begins"):
            check_opening(tokenizer, origin)


def test_a_torchtune_tokenizer_that_drops_the_system_prompt(pieces: str) -> None:
    class Deaf(Llama2Tokenizer):
        def __call__(self, sample: Any, inference: bool = False) -> Any:
            kept = [m for m in sample["messages"] if m.role != "system"]
            return super().__call__({"messages": kept}, inference=inference)

    model = SimpleNamespace(max_seq_len=64, tok_embeddings=SimpleNamespace(num_embeddings=256))
    asked = [("be brief", "how are you")]
    for make in (Llama2Tokenizer, Deaf):
        arguments = asked, make(pieces), model, 8, Origin(Path("config.yaml"))
        if make is Deaf:
            with pytest.raises(UserError, match="leaves out the system prompt 'be brief'"):
                check_prompts(*arguments)
        else:
            check_prompts(*arguments)
