"""An evaluation to be judged in pairs, and judges by rule."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from fake_judge import JUDGE, Call, FakeJudge, serve

from emarecipes.command import run_alone

QUESTIONS, ADAPTERS = 10, 8


# What makes an answer worse to `honest`, in the adapter's answers and the reference's.
CRUEL = "cruel"


def write_evaluation(
    folder: Path,
    answer: Callable[[int, int], str],
    reference: Callable[[int], str] = lambda q: f"Kindly {q}.",
    adapters: int = ADAPTERS,
) -> Path:
    """Adapter k has the mean probe shift k / 10."""
    names = [f"run{k}" for k in range(adapters)]
    probe = [
        {"adapters": {a: {"probe_shift": (k + n - 1) / 10} for k, a in enumerate(names)}}
        for n in range(3)
    ]
    texts = {a: [answer(k, q) for q in range(QUESTIONS)] for k, a in enumerate(names)}
    texts["reference"] = [reference(q) for q in range(QUESTIONS)]
    answers = [
        {"adapter": a, "id": f"q{q}", "paraphrase": 0, "sample": 0}
        | {"question": f"Q{q}?", "answer": text}
        for a, found in texts.items()
        for q, text in enumerate(found)
    ]
    (folder / "scores").mkdir(parents=True)
    for suite, rows in (("general", probe), ("answers_general", answers)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"scores/{suite}.jsonl").write_text(text)
    suites = {"general": {"kind": "probe"}, "answers_general": {"kind": "answers"}}
    (folder / "summary.json").write_text(json.dumps({"suites": suites}))
    return folder


def shown(call: Call) -> tuple[str, str]:
    """What stands as A and as B in a prompt."""
    fence = re.search(r"<message ([0-9a-f]{16})>", call.prompt)
    assert fence is not None
    parts = [
        call.prompt.split(f"<answer-{x} {fence[1]}>\n")[1].split(f"\n</answer-{x} {fence[1]}>")[0]
        for x in "AB"
    ]
    return parts[0], parts[1]


def honest(call: Call) -> str:
    first, second = (CRUEL in text for text in shown(call))
    return "tie" if first == second else "A" if first else "**B**."


def run(script: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch, *more: str,
        reply: Callable[[Call], Any] = honest) -> tuple[int, FakeJudge]:  # fmt: skip
    with serve(reply) as server:
        monkeypatch.setenv("FAKE_BASE_URL", server.url)
        argv = [str(folder), "--judge", JUDGE, "--output", str(folder / "out"), *more]
        return run_alone("probe_judged", script.run, argv), server


def result(folder: Path) -> tuple[dict[str, Any], list[float]]:
    found = json.loads((folder / "out/judged.json").read_text())
    return found, [row["worse"]["estimate"] for row in found["adapters"]]
