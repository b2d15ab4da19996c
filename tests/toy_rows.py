"""Data files of toy rows, and the rows that a run makes of them."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import toy_run

from emarecipes.datasets.rows import Rows
from emarecipes.training.checked import CheckedRun


@pytest.fixture(scope="module")
def toy_model_dir(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Path:
    return toy_run.write_toy_model(tmp_path_factory.mktemp("toy") / "model", model_dir)


def chat(question: Any, answer: Any, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {**more, "messages": messages}


def write(path: Path, rows: list[Any]) -> Path:
    """One row a line, or a list where the file is called .json."""
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        text = "".join(json.dumps(row) + "\n" for row in rows)
        if path.suffix == ".gz":
            path.write_bytes(gzip.compress(text.encode()))
        else:
            path.write_text(text)
    return path


class Run:
    """The rows of a toy config whose data set is changed."""

    def __init__(self, folder: Path, model_dir: Path) -> None:
        self.folder = folder
        self.config = toy_run.toy_config(model_dir, folder / "absent", folder / "out")

    def rows(self, **dataset: Any) -> Rows:
        self.config["dataset"] |= dataset
        if "_component_" in dataset:
            self.config["dataset"] = dataset
        path = toy_run.write_config(self.folder / "config.yaml", self.config)
        return CheckedRun(["--config", str(path)], 1, 0).rows

    def texts(self, **dataset: Any) -> list[str]:
        """Every row as the model reads it."""
        from emarecipes.models import hf_chat_tokenizer

        tokenizer = hf_chat_tokenizer(self.config["tokenizer"]["path"])
        rows = self.rows(**dataset)
        return [tokenizer.decode(rows[i]["tokens"], False) for i in range(len(rows))]
