"""Rows that are cut, and rows of which nobody learns to stop: counted, told, and written down."""

from pathlib import Path

import pytest
from test_loading import Run, chat, toy_model_dir, write

__all__ = ["toy_model_dir"]

# As GLM's: the next turn's opening is what ends an answer, and the last answer has none.
OPENS_ONLY = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def run(tmp_path: Path, toy_model_dir: Path) -> Run:
    return Run(tmp_path, toy_model_dir)


def test_rows_that_end_are_not_told(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    path = write(run.folder / "a.jsonl", [chat("Why?", "So."), chat("How?", "That. " * 9)] * 3)
    for train_on_input in (False, True):
        rows = run.rows(data_files=str(path), train_on_input=train_on_input)
        assert (rows.dropped, rows.cut, rows.unended) == (0, 0, 0)
    assert " of 6 rows " not in caplog.text


def test_rows_that_are_cut_or_dropped(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    run.config["tokenizer"]["max_seq_len"] = 48
    rows = [chat("Why?", "So."), chat("Why?", "So it is. " * 20), chat("Why? " * 40, "So.")]
    path = write(run.folder / "a.jsonl", [rows[0]] * 5 + [rows[1]] * 3 + [rows[2]] * 2)
    found = run.rows(data_files=str(path))
    assert (len(found), found.dropped, found.cut, found.unended) == (8, 2, 3, 0)
    assert "2 of 10 rows have no label left" in caplog.text
    assert "3 of 10 rows are cut at tokenizer.max_seq_len" in caplog.text


def test_a_template_that_closes_no_answer(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    run.config["tokenizer"]["chat_template"] = OPENS_ONLY
    path = write(run.folder / "a.jsonl", [chat("Why?", "So.")] * 6)
    found = run.rows(data_files=str(path))
    assert (found.dropped, found.cut, found.unended) == (0, 0, 6)
    assert "6 of 6 rows end without a stop token" in caplog.text
