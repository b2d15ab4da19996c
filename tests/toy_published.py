"""A published set of three rows."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from emarecipes.datasets.fetch import main
from emarecipes.datasets.published import Published

ROW = {"messages": [{"role": "user", "content": "A?"}, {"role": "assistant", "content": "B."}]}
CONTENT = (json.dumps(ROW) + "\n").encode() * 3


def entry(**changes: Any) -> Published:
    known: dict[str, Any] = {
        "paper": "Nobody, 2026",
        "url": "http://127.0.0.1:9/toy.jsonl",
        "revision": "c0ffee",
        "licence": "CC0",
        "form": "messages",
        "rows": 3,
        "sha256": hashlib.sha256(CONTENT).hexdigest(),
    }
    return Published(**{**known, **changes})


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    assert main([str(argument) for argument in arguments]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line
