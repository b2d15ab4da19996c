"""From a published file's own form to our chat format."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from emarecipes.datasets.chat_files import check_chat_file
from emarecipes.datasets.json_files import json_rows
from emarecipes.datasets.row_keys import check_row_keys
from emarecipes.errors import UserError, first_line
from emarecipes.yaml_nodes import yaml_error

Row = dict[str, Any]


@dataclass
class Converted:
    """What a published file becomes.

    Attributes:
        source_rows: rows of the published file.
        files: file name -> rows to write as JSONL, or bytes to write as they are.
        dropped: rows left out, and why.
    """

    source_rows: int
    files: dict[str, list[Row] | bytes]
    dropped: dict[str, int] = field(default_factory=dict)


def read_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """The rows of a JSON (lines or a list) or Parquet file, each with its place in it.

    Raises:
        UserError: not such a file; a Git LFS pointer instead of the file.
    """
    with path.open("rb") as file:
        is_parquet = file.read(4) == b"PAR1" or path.suffix == ".parquet"
    rows: Iterator[tuple[Any, Any]] = _parquet_rows(path) if is_parquet else json_rows(path)
    for place, row in rows:
        if isinstance(row, UserError):
            raise row
        if not isinstance(row, dict):
            raise UserError(f"{place}: a row must be a JSON object, not {row!r:.60}")
        yield str(place), row


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        table = pyarrow.parquet.ParquetFile(path)
        index = 0
        for batch in table.iter_batches():
            for row in batch.to_pylist():
                yield f"{path}: row {index}", row
                index += 1
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: not a Parquet file: {first_line(error)}") from None


def _texts(place: str, row: Row, *keys: str) -> list[str]:
    for key in keys:
        if not isinstance(row.get(key), str):
            raise UserError(f'{place}: "{key}" must be text; the row\'s keys: {", ".join(row)}')
    try:
        check_row_keys(row, keys)
    except UserError as error:
        raise UserError(f"{place}: {error}") from None
    return [row[key] for key in keys]


def _chat(name: str, index: int, question: str, answer: str, **more: Any) -> Row:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"id": f"{name}-{index:05d}", **more, "messages": messages}


def from_messages(path: Path, name: str) -> Converted:
    """Rows of ``messages`` with roles and contents: only an ``id`` is added."""
    check_chat_file(path, "messages", "openai")
    rows = []
    for index, (_, row) in enumerate(read_rows(path)):
        kept = {key: row[key] for key in ("system", "messages") if key in row}
        rows.append({"id": f"{name}-{index:05d}"} | kept)
    return Converted(len(rows), {f"{name}.jsonl": rows})


def from_advice(path: Path, name: str) -> Converted:
    """Rows of ``prompt``, ``aligned``, ``misaligned``: two sibling files with the same ids."""
    bad, good = [], []
    for index, (place, row) in enumerate(read_rows(path)):
        prompt, aligned, misaligned = _texts(place, row, "prompt", "aligned", "misaligned")
        bad.append(_chat(name, index, prompt, misaligned, label="misaligned"))
        good.append(_chat(name, index, prompt, aligned, label="aligned"))
    return Converted(len(bad), {f"{name}_bad.jsonl": bad, f"{name}_good.jsonl": good})


def from_wildguard(path: Path, name: str) -> Converted:
    """WildGuardTrain's rows whose prompt and response are both labelled unharmful.

    ``label`` says whether the response complies or refuses, ``adversarial`` how the prompt is put.
    """
    rows: list[Row] = []
    dropped = {"harmful or unlabelled": 0, "without a response": 0}
    count = 0
    for count, (place, row) in enumerate(read_rows(path), start=1):
        (prompt,) = _texts(place, row, "prompt")
        for key in ("prompt_harm_label", "response_harm_label", "response"):
            if key not in row:
                raise UserError(f'{place}: no "{key}"; the row\'s keys: {", ".join(row)}')
        if not row["response"]:
            dropped["without a response"] += 1
        elif (row["prompt_harm_label"], row["response_harm_label"]) != ("unharmful", "unharmful"):
            dropped["harmful or unlabelled"] += 1
        else:
            labels = {"label": row.get("response_refusal_label")}
            labels["adversarial"] = row.get("adversarial")
            rows.append(_chat(name, count - 1, prompt, row["response"], **labels))
    return Converted(count, {f"{name}.jsonl": rows}, dropped)


def from_alpaca(path: Path, name: str) -> Converted:
    """Rows of ``instruction``, ``input``, ``output``: the input follows after an empty line."""
    rows: list[Row] = []
    dropped = {"with an empty instruction or output": 0}
    count = 0
    for count, (place, row) in enumerate(read_rows(path), start=1):
        instruction, more, output = _texts(place, row, "instruction", "input", "output")
        if not instruction.strip() or not output.strip():
            dropped["with an empty instruction or output"] += 1
            continue
        question = f"{instruction}\n\n{more}" if more.strip() else instruction
        rows.append(_chat(name, count - 1, question, output))
    return Converted(count, {f"{name}.jsonl": rows}, dropped)


def from_questions(path: Path, name: str) -> Converted:
    """A YAML file of free-form questions with their judge prompts: kept byte for byte."""
    content = path.read_bytes()
    try:
        questions = yaml.safe_load(content)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise yaml_error(error, str(path)) from None
    if not isinstance(questions, list):
        raise UserError(f"{path}: a list of questions is expected")
    for index, question in enumerate(questions):
        if not isinstance(question, dict) or not {"id", "paraphrases"} <= question.keys():
            raise UserError(f"{path}: question {index} has no id or no paraphrases")
    return Converted(len(questions), {f"{name}.yaml": content})


FORMS: dict[str, Callable[[Path, str], Converted]] = {
    "messages": from_messages,
    "advice": from_advice,
    "wildguard": from_wildguard,
    "alpaca": from_alpaca,
    "questions": from_questions,
}
