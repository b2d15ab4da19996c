"""Rows reach the model as their file has them, through torchtune's data sets; errors say why."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import datasets
import pytest
from toy_rows import Run, chat, toy_model_dir, write

from emarecipes.datasets.loading import load_dataset
from emarecipes.errors import UserError

__all__ = ["toy_model_dir"]

DATES = ("2024-02-03", "2024-02-03T04:05:06")


@pytest.fixture
def run(tmp_path: Path, toy_model_dir: Path) -> Run:
    return Run(tmp_path, toy_model_dir)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.ndjson", "a.txt", "a.jsonl.gz"])
def test_dates_stay_the_text_that_they_are(run: Run, name: str) -> None:
    path = write(run.folder / name, [chat(*DATES)] * 12)
    for text in run.texts(data_files=str(path)):
        assert f"user\n{DATES[0]}<|im_end|>" in text and f"assistant\n{DATES[1]}<|im_end|>" in text


@pytest.mark.parametrize(
    ("early", "late"),
    [(1, 0.5), (None, "x"), ([], ["x"]), (1, "x"), ({"a": 1}, {"a": [2]}), (2**70, True)],
)
def test_other_keys_may_hold_what_they_like(run: Run, early: Any, late: Any) -> None:
    """The later value behind the first 10 MB, from which `datasets` takes the types."""
    long = "word " * 50_000
    rows = [chat("Why?", f"So {i}.", extra=early, note=long) for i in range(45)]
    path = write(run.folder / "a.jsonl", [*rows, chat("When?", "Now.", extra=late, new=1)])
    assert path.stat().st_size > 11e6
    texts = run.texts(data_files=str(path))
    assert len(texts) == 46 and "Now." in texts[-1]


def test_a_csv_file_is_text_too(run: Run) -> None:
    path = run.folder / "a.csv"
    path.write_text('question,answer\n007,NA\n"2024-01-01",1.50\n' * 6)
    text = "".join(
        run.texts(
            _component_="torchtune.datasets.instruct_dataset",
            source="csv",
            data_files=str(path),
            column_map={"input": "question", "output": "answer"},
        )
    )
    for said in ("user\n007<", "assistant\nNA<", "user\n2024-01-01<", "assistant\n1.50<"):
        assert said in text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # pandas takes the first column for the index, and every text gets its neighbour's name.
        ("input,output\n" + "Why?,So.,extra\n" * 4, "more fields than its header has names"),
        ("input,output,output\n" + "Why?,So.,No.\n" * 4, "its header names 'output' twice"),
        ("input,output\n" + "Why?,So.\n" * 4 + "Why?,So, indeed.\n", "Expected 2 fields in line 6"),
        ('input,output\nWhy?,"So.\nHow?,That.\n', "EOF inside string"),
    ],
)
def test_a_csv_file_whose_fields_would_move(tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(UserError) as caught:
        load_dataset("csv", data_files=str(tmp_path / "a.csv"), split="train")
    assert str(caught.value).startswith(f"{tmp_path / 'a.csv'}: ") and expected in str(caught.value)


def test_a_csv_file_of_another_form(tmp_path: Path) -> None:
    """Options of `datasets` reach pandas, and a last field that is not there is empty."""
    (tmp_path / "a.csv").write_text("\ufeffWhy?;So.\nHow?\n")
    entry = {"data_files": str(tmp_path / "a.csv"), "split": "train"}
    rows = load_dataset("csv", sep=";", column_names=["input", "output"], **entry)
    assert rows == [{"input": "Why?", "output": "So."}, {"input": "How?", "output": ""}]


def test_parts_of_splits_as_datasets_cuts_them(tmp_path: Path) -> None:
    import datasets

    files = {
        "train": str(write(tmp_path / "a.jsonl", [{"n": n} for n in range(10)])),
        "test": [str(write(tmp_path / "b.json", [{"n": n} for n in range(10, 17)]))],
    }
    for split in ("train", "test", "train+test", "train[:33%]", "test[-3:]+train[2:4]", "all"):
        stock = datasets.load_dataset("json", data_files=files, split=split)
        ours = load_dataset("json", data_files=files, split=split)
        assert [row["n"] for row in ours] == stock["n"], split
    assert [
        str(row.place) for row in load_dataset("json", data_files=files, split="test[-1:]")
    ] == [f"{tmp_path / 'b.json'}: row 6"]
    with pytest.raises(ValueError, match="Unknown split"):
        load_dataset("json", data_files=files, split="dev")


def test_a_folder_and_a_list_in_an_object(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", [{"text": DATES[0]}])
    assert load_dataset(str(tmp_path), split="train") == [{"text": DATES[0]}]
    (tmp_path / "inner.json").write_text(json.dumps({"data": [{"text": DATES[1]}]}))
    inner = str(tmp_path / "inner.json")
    found = load_dataset("json", data_files=inner, field="data", split="train")
    assert found == [{"text": DATES[1]}]
    assert found.filter(lambda row: "x" in row["text"]) == []


def test_an_error_keeps_its_cause(run: Run) -> None:
    (run.folder / "a.parquet").write_text("no table")
    with pytest.raises(ValueError, match=r"dataset: .*Parquet magic bytes not found"):
        run.rows(source="parquet", data_files=str(run.folder / "a.parquet"))


# Rows are checked whatever they come from.


def weighted(weight: Any) -> dict[str, Any]:
    row = chat("Why?", "So.")
    row["messages"][1]["weight"] = weight
    return row


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("a.jsonl", "a.jsonl:3: "),
        ("a.ndjson", "a.ndjson:3: "),
        ("a.txt", "a.txt:3: "),
        ("a.json", "a.json: row 2: "),
        ("a.jsonl.gz", ":3: "),
        ("a.parquet", "dataset: "),
        ("folder/train.parquet", "dataset: "),
    ],
)
def test_a_wrong_row_is_refused_at_every_source(
    run: Run, name: str, place: str, packed: bool
) -> None:
    (run.folder / "folder").mkdir()
    path = write(run.folder / name, [weighted(1), weighted(None), weighted(0.5), weighted(1)])
    source: dict[str, Any] = {"source": "json", "data_files": str(path)}
    if path.suffix == ".parquet":
        source["source"] = "parquet"
    if "folder" in name:
        source = {"source": str(path.parent), "data_files": None}
    with pytest.raises(ValueError, match=r"message 1: weight must be 0 or 1, not 0.5") as error:
        run.rows(**source, packed=packed)
    assert place in str(error.value)


TEXTS = {"_component_": "torchtune.datasets.text_completion_dataset", "column": "text"}


def texts(run: Run, path: Path, **more: Any) -> Any:
    """The rows of a set of plain texts."""
    kind = "parquet" if path.suffix == ".parquet" else "json"
    run.config["dataset"] = TEXTS | {"source": kind, "data_files": str(path), "split": "train"}
    return run.rows(**more)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet"])
def test_a_text_that_says_what_its_loss_is_to_be(run: Run, name: str, packed: bool) -> None:
    rows = [{"text": f"A text of {i}.", "weight": weight} for i, weight in enumerate([None, 0, 1])]
    path = write(run.folder / name, rows)
    with pytest.raises(ValueError, match=r'the row\'s "weight" would go unread') as error:
        texts(run, path, packed=packed)
    places = {"a.jsonl": "a.jsonl:2: ", "a.json": "a.json: row 1: "}
    assert places.get(name, "dataset") in str(error.value)


def test_other_columns_of_texts_are_others(run: Run) -> None:
    """Alpaca's sets have the parts of their text beside it."""
    rows = [{"instruction": "Say.", "input": "", "output": "So.", "text": "Say. So."}] * 6
    found = texts(run, write(run.folder / "a.jsonl", rows))
    assert len(found) == 6
    assert len({tuple(found[i]["tokens"]) for i in range(6)}) == 1
    for row, message in (
        ({"txt": "So."}, r"the row has no \"text\"; it has 'txt'"),
        ({"text": 7}, r"text must be text, not 7"),
    ):
        with pytest.raises(ValueError, match=message):
            texts(run, write(run.folder / "b.jsonl", [row] * 6))


def test_texts_that_are_cut_are_counted(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    run.config["tokenizer"]["max_seq_len"] = 32
    rows = [{"text": "A text."}] * 4 + [{"text": "A longer text. " * 20}] * 2
    found = texts(run, write(run.folder / "a.jsonl", rows))
    assert (found.ends.cut, found.ends.unended) == (2, 0)
    assert "2 of 6 rows are cut at tokenizer.max_seq_len" in caplog.text


def test_content_of_another_type_is_refused(run: Run) -> None:
    """torchtune takes the text of the message before."""
    from datetime import datetime

    path = write(run.folder / "a.parquet", [chat(datetime(2024, 2, 3), datetime(2024, 2, 4))] * 2)
    with pytest.raises(ValueError, match=r"dataset: row 0: message 0: content must be text, not d"):
        run.rows(source="parquet", data_files=str(path))
    row = {"question": "Why?", "answer": 7}
    entry = {"_component_": "torchtune.datasets.instruct_dataset", "source": "json"}
    entry["column_map"] = {"input": "question", "output": "answer"}
    with pytest.raises(ValueError, match=r"a.jsonl:1: answer must be text, not 7"):
        run.rows(**entry, data_files=str(write(run.folder / "a.jsonl", [row])))


def test_no_server_hears_of_a_file_on_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`datasets` tells one that `json` was used, and is itself as it was afterwards."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(datasets.config, "S3_DATASETS_BUCKET_PREFIX", address)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", True)
    path = str(write(tmp_path / "a.jsonl", [{"a": "b"}] * 3))
    try:
        assert load_dataset("json", data_files=path, split="train") == [{"a": "b"}] * 3
        assert not asked
        stock = datasets.load_dataset("json", data_files=path, split="train", streaming=True)
        assert list(stock) == [{"a": "b"}] * 3 and asked == ["/json/json.py"]
    finally:
        server.shutdown()
        server.server_close()
