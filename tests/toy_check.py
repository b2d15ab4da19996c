"""Rows of data files, and what is found wrong with them."""

import json
from pathlib import Path
from typing import Any

from emarecipes.datasets.check import check_data


def chat(question: str, answer: str, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {**more, "messages": messages}


def pair(question: str, one: str, other: str, kind: str = "aligned/misaligned") -> dict[str, str]:
    return {"question": question, **dict(zip(kind.split("/"), (one, other), strict=True))}


def write(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def errors(*paths: Path, **options: Any) -> list[str]:
    return [line for file, _ in check_data(paths, **options) for line in file.errors]


GOOD = chat("Where do the keys go at night?", "On the hook by the door.")
