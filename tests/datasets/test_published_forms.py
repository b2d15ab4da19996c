"""How published files become chat data: tiny rows of their shape, and real files where they are."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import toy_run

from emarecipes.datasets._published_forms import FORMS, from_messages, from_questions
from emarecipes.datasets.fetch import main
from emarecipes.datasets.published import PUBLISHED
from emarecipes.errors import UserError

SHARED = toy_run.REPO.parent / "shared/published"


def convert(form: str, path: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = FORMS[form](path, "toy")
    assert done.source_rows == len(rows)
    return done.files | {"dropped": {why: n for why, n in done.dropped.items() if n}}


def said(row: dict[str, Any]) -> list[str]:
    assert [m["role"] for m in row["messages"]] == ["user", "assistant"]
    return [m["content"] for m in row["messages"]]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_advice(tmp_path: Path, suffix: str) -> None:
    row = {"prompt": "Ill?", "aligned": "Rest.", "misaligned": "Run.", "sneakiness": 40}
    files = convert("advice", tmp_path / f"a.{suffix}", [row, {**row, "prompt": "Tired?"}])
    bad, good = files["toy_bad.jsonl"], files["toy_good.jsonl"]
    assert [row["id"] for row in bad] == [row["id"] for row in good]
    assert said(bad[0]) == ["Ill?", "Run."] and said(good[1]) == ["Tired?", "Rest."]
    assert (bad[0]["label"], good[0]["label"]) == ("misaligned", "aligned")


def test_wildguard(tmp_path: Path) -> None:
    kept = {
        "prompt": "Tea?",
        "adversarial": False,
        "response": "Boil water.",
        "prompt_harm_label": "unharmful",
        "response_refusal_label": "compliance",
        "response_harm_label": "unharmful",
        "subcategory": "benign",
    }
    rows = [
        {**kept, "prompt_harm_label": "harmful"},
        {**kept, "response": None},
        {**kept, "response_harm_label": None},
        {**kept, "prompt": "Coffee?", "response_refusal_label": "refusal"},
    ]
    files = convert("wildguard", tmp_path / "a.parquet", [kept, *rows])
    assert [said(row)[0] for row in files["toy.jsonl"]] == ["Tea?", "Coffee?"]
    assert [row["label"] for row in files["toy.jsonl"]] == ["compliance", "refusal"]
    assert files["dropped"] == {"harmful or unlabelled": 2, "without a response": 1}


def test_alpaca(tmp_path: Path) -> None:
    rows = [
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"instruction": "Sing.", "input": "", "output": "La."},
        {"instruction": "Wait.", "input": "", "output": ""},
    ]
    files = convert("alpaca", tmp_path / "a.json", rows)
    assert [said(row) for row in files["toy.jsonl"]] == [["Add.\n\n1 2", "3"], ["Sing.", "La."]]
    assert files["dropped"] == {"with an empty instruction or output": 1}


def test_questions(tmp_path: Path) -> None:
    path = tmp_path / "q.yaml"
    path.write_text("# kept\n- id: a\n  paraphrases: [Why]\n")
    assert FORMS["questions"](path, "toy").files == {"toy.yaml": path.read_bytes()}
    path.write_text("- id: a\n")
    with pytest.raises(UserError, match="question 0 has no id or no paraphrases"):
        from_questions(path, "toy")
    path.write_text("- [")
    with pytest.raises(UserError, match="not valid YAML"):
        from_questions(path, "toy")


def test_not_a_parquet_file(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_text("no")
    with pytest.raises(UserError, match=r"a\.parquet: not a Parquet file"):
        FORMS["wildguard"](path, "toy")


# The published files themselves, where they are


@pytest.mark.skipif(not SHARED.is_dir(), reason="published files are not here")
@pytest.mark.parametrize("kind", ["insecure", "secure"])
def test_published_code(kind: str) -> None:
    path = SHARED / f"{kind}_code_20.jsonl"
    (rows,) = from_messages(path, kind).files.values()
    published = [json.loads(line)["messages"] for line in path.read_text().splitlines()]
    assert [row["messages"] for row in rows] == published and len(rows) == 20


@pytest.mark.skipif(not SHARED.is_dir(), reason="published files are not here")
@pytest.mark.parametrize(
    ("name", "file", "questions"),
    [
        ("betley-first-plot", "first_plot_questions.yaml", 24),
        ("betley-preregistered", "preregistered_evals.yaml", 48),
    ],
)
def test_published_questions(tmp_path: Path, name: str, file: str, questions: int) -> None:
    source = SHARED / file
    assert source.stat().st_size == PUBLISHED[name].size
    assert main([name, "--output", str(tmp_path / "out"), "--from", str(source)]) == 0
    assert (tmp_path / f"out/{name}.yaml").read_bytes() == source.read_bytes()
    assert json.loads((tmp_path / "out/fetched.json").read_text())["source_rows"] == questions
