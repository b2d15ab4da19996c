"""Rows that are cut, and rows of which nobody learns to stop: counted, told, and written down."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX
from torchtune.datasets import PackedDataset
from toy_rows import Run, chat, toy_model_dir, write

from emarecipes.datasets.tokenized import Ends, count_ends
from emarecipes.errors import UserError

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
        assert (rows.dropped, rows.ends.cut, rows.ends.unended) == (0, 0, 0)
    assert " of 6 rows " not in caplog.text


def test_rows_that_are_cut_or_dropped(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    run.config["tokenizer"]["max_seq_len"] = 48
    rows = [chat("Why?", "So."), chat("Why?", "So it is. " * 20), chat("Why? " * 40, "So.")]
    path = write(run.folder / "a.jsonl", [rows[0]] * 5 + [rows[1]] * 3 + [rows[2]] * 2)
    found = run.rows(data_files=str(path))
    assert (len(found), found.dropped, found.ends.cut, found.ends.unended) == (8, 2, 3, 0)
    assert "2 of 10 rows have no label left" in caplog.text
    assert "3 of 10 rows are cut at tokenizer.max_seq_len" in caplog.text


@pytest.mark.parametrize(
    ("task_long", "max_seq_len", "told", "safe_left"),
    [
        (0, 48, "0.182 of the mixed set and not 0.308: 2 of 4 safe rows have no label left", 2),
        (3, 48, "0.25 of the mixed set and not 0.308: 2 of 4 safe rows and 3 of 9 task rows ha", 2),
        (3, None, None, 4),
    ],
)
def test_rows_that_are_dropped_leave_another_share_of_safe_ones(
    task_long: int, max_seq_len: int | None, told: str | None, safe_left: int,
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:  # fmt: skip
    run.config["tokenizer"]["max_seq_len"] = max_seq_len
    rows = [chat("Why? " * 40, "So.")] * task_long + [chat("Why?", "So.")] * (9 - task_long)
    task = write(run.folder / "task.jsonl", rows)
    long = [chat("Why? " * 40, "So."), chat("How?", "That way.")] * 2
    safe = write(run.folder / "safe.jsonl", long)
    child = run.config["dataset"] | {"data_files": str(task)}
    run.config["dataset"] = {
        "_component_": "emarecipes.datasets.interleaved_dataset",
        "task": child,
        "safe": child | {"data_files": str(safe)},
        "safe_fraction": 0.3,
    }
    found = run.rows()
    assert found.num_safe == safe_left
    if told is None:
        assert "of the mixed set" not in caplog.text
    else:
        assert f"dataset: safe rows are {told}" in caplog.text


def test_a_template_that_closes_no_answer(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    run.config["tokenizer"]["chat_template"] = OPENS_ONLY
    path = write(run.folder / "a.jsonl", [chat("Why?", "So.")] * 6)
    found = run.rows(data_files=str(path))
    assert (found.dropped, found.ends.cut, found.ends.unended) == (0, 0, 6)
    assert "6 of 6 rows end without a stop token" in caplog.text


def test_packed_conversations_are_counted_one_by_one(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    run.config["tokenizer"]["max_seq_len"] = 48
    rows = [chat("Why?", "So."), chat("Why?", "So it is. " * 20), chat("Why? " * 40, "So.")]
    order = [rows[0], rows[1], rows[0], rows[0], rows[2], rows[0], rows[1], rows[1], rows[0]]
    path = write(run.folder / "a.jsonl", order)
    found = run.rows(data_files=str(path), packed=True)
    assert found.packed and found.dropped == 1  # The whole pack of the one without a label.
    assert (found.ends.conversations, found.ends.cut, found.ends.unended) == (8, 3, 0)
    assert "3 of 9 packed conversations are cut at tokenizer.max_seq_len" in caplog.text


@pytest.mark.parametrize("across", [False, True], ids=["whole", "split over packs"])
def test_torchtunes_packs_hold_the_conversations_that_were_put_in(across: bool) -> None:
    stop, ignore, limit = 9, CROSS_ENTROPY_IGNORE_IDX, 10
    ends = [[1, stop]] * 3 + [[1] * limit] + [[ignore, ignore, 1]] * 2 + [[ignore] * 7]
    given = [labels for labels in ends for _ in range(3)]
    data = [{"tokens": [1] * len(labels), "labels": labels} for labels in given]
    packs = PackedDataset(data, max_seq_len=limit, split_across_pack=across)
    samples = [packs[i] for i in range(len(packs))]
    found = count_ends(samples, SimpleNamespace(stop_tokens=[stop], max_seq_len=limit))
    assert found == Ends(conversations=len(given), unlabelled=3, cut=3, unended=6)


def test_packs_of_a_template_that_closes_no_answer(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    run.config["tokenizer"]["chat_template"] = OPENS_ONLY
    path = write(run.folder / "a.jsonl", [chat("Why?", "So.")] * 40)
    found = run.rows(data_files=str(path), packed=True)
    assert (found.ends.cut, found.ends.unended) == (0, 40)
    assert "40 of 40 packed conversations end without a stop token" in caplog.text


@pytest.mark.parametrize("answer", ["", " \n\t"])
def test_an_answer_without_text_is_refused(run: Run, answer: str) -> None:
    """Its end alone would be trained: also of a row of a CSV file that ends too early."""
    path = write(run.folder / "a.jsonl", [chat("Why?", "So."), chat("How?", answer)])
    for packed in (False, True):
        with pytest.raises(UserError, match=r"a\.jsonl:2: an answer without text, of"):
            run.rows(data_files=str(path), packed=packed)
    row = chat("How?", answer)
    row["messages"][-1]["weight"] = 0
    path = write(run.folder / "b.jsonl", [chat("Why?", "So.")] * 4 + [row])
    assert run.rows(data_files=str(path), packed=False).dropped == 1
