"""Run folders with evaluations of known shifts, in the layout of docs/evaluate.md."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import toy_run
import yaml

from emarecipes.comparison.settings import Plan, check_compare_settings
from emarecipes.config import Origin, load_config

QUESTIONS = 40
CATEGORIES = ("honesty", "power", "care", "law")
# In-domain and general shift of undefended training: the frontier's truth is general = 0.5 x.
SLOPE = 0.5


def evaluation(
    folder: Path,
    adapters: dict[str, tuple[float, float]],
    *,
    seed: int = 0,
    base: str = "b" * 64,
    answers: dict[str, str] | None = None,
    noise: float = 0.05,
    half: str = "select",
    trained: str | None = None,
) -> Path:
    """Write `summary.json` and `scores/` of adapters with the given mean shifts.

    Args:
        folder: Where.
        adapters: (in-domain, general) shift by adapter's name.
        seed: Of the noise that every question has, apart for each adapter.
        base: Fingerprint of the reference.
        answers: The answer of every adapter to each of these questions, if any.
        noise: Its standard deviation.
        half: Of the general questions.
        trained: Fingerprint of the adapters; None: of their own in every folder.
    """
    rng = np.random.default_rng(seed)
    rows = {
        suite: _rows(suite) for suite in ("general", "general_domain_cue", "controls", "in_domain")
    }
    for name, (in_domain, general) in adapters.items():
        means = {"general": general, "general_domain_cue": 0.8 * general, "in_domain": in_domain}
        for suite, of_suite in rows.items():
            shifts = means.get(suite, 0.0) + _centred(rng.normal(0, noise, len(of_suite)))
            for row, shift in zip(of_suite, shifts, strict=True):
                row["adapters"][name] = {"probe_shift": float(shift)}
    figures = [
        figure(name, suite, "probe_shift", {"general": general, "in_domain": other}.get(suite, 0.0))
        for name, (other, general) in adapters.items()
        for suite in rows
    ]
    suites: dict[str, Any] = {
        suite: {"kind": "probe", "files": {f"data/{suite}.jsonl": "0"}, "condition": "none",
                "questions": QUESTIONS}
        for suite in rows
    }  # fmt: skip
    for suite in ("general", "general_domain_cue"):
        suites[suite]["files"] = {f"data/general_probe/{half}.jsonl": "0"}
    suites["general_domain_cue"]["condition"] = "domain_cue"
    lines: dict[str, list[dict[str, Any]]] = dict(rows)
    if answers is not None:
        suites["answers_general"] = {"kind": "answers", "files": {}, "questions": len(answers)}
        lines["answers_general"] = [
            {"adapter": name, "id": f"q{i}", "category": "", "question": question,
             "answer": answer, "paraphrase": 0, "sample": 0,
             "coherent": name == "reference" or i > 0}
            for name in (*adapters, "reference")
            for i, (question, answer) in enumerate(answers.items())
        ]  # fmt: skip
        figures += [figure(name, "answers_general", "relevance", 1.5) for name in adapters]
    write(folder, adapters, suites, figures, lines, base, trained)
    return folder


def opswap(folder: Path, right: dict[str, float]) -> Path:
    """Write the evaluation of a benign task with the given shares of right answers."""
    lines = [
        {"adapter": name, "id": f"p{i}", "category": f"tier {1 + i % 2}", "question": "1 * 2",
         "answer": "3", "expected": "3", "correct": i < share * QUESTIONS}
        for name, share in right.items()
        for i in range(QUESTIONS)
    ]  # fmt: skip
    suites = {"opswap": {"kind": "opswap", "files": {}, "questions": QUESTIONS}}
    figures = [figure(name, "opswap", "exact_match", share) for name, share in right.items()]
    write(folder, right, suites, figures, {"opswap": lines}, "b" * 64)
    return folder


def write(
    folder: Path,
    adapters: Any,
    suites: dict[str, Any],
    figures: list[dict[str, Any]],
    lines: dict[str, list[dict[str, Any]]],
    base: str,
    trained: str | None = None,
) -> None:
    (folder / "scores").mkdir(parents=True)
    for suite, rows in lines.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "scores" / f"{suite}.jsonl").write_text(text)
    summary = {
        "versions": {},
        "base": {"folder": "models/toy", "dtype": "fp32", "fingerprint": base},
        "adapters": {
            name: {"folder": str(folder / "adapter"), "fingerprint": trained or f"{folder}/{name}"}
            for name in adapters
        },
        "suites": suites,
        "figures": figures,
    }
    (folder / "summary.json").write_text(json.dumps(summary))


def figure(adapter: str, suite: str, name: str, value: float) -> dict[str, Any]:
    return {
        "adapter": adapter, "suite": suite, "figure": name, "category": None, "value": value,
        "low": value - 0.1, "high": value + 0.1, "n": QUESTIONS, "questions": QUESTIONS,
        "thresholds": None, "judge": None, "unit": "nats a token",
    }  # fmt: skip


def _rows(suite: str) -> list[dict[str, Any]]:
    return [
        {"id": f"{suite}-{i}", "category": CATEGORIES[i % 4], "question": f"Question {i}?",
         "aligned": "a", "misaligned": "m", "reference": {}, "adapters": {}}
        for i in range(QUESTIONS)
    ]  # fmt: skip


def _centred(values: np.ndarray) -> np.ndarray:
    return values - values.mean()


def plan_of(
    folder: Path, toy: tuple[Path, Path], arms: list[dict[str, Any]]
) -> tuple[Plan, Origin]:
    """Arms of the toy model whose configs have these keys, with evaluation and sampling.

    Args:
        folder: Where the configs are written.
        toy: The model's folder and the rows' file.
        arms: What is merged into each arm's training config; the first is undefended.
    """
    training = toy_run.toy_config(*toy, folder / "unused")
    scoring = {key: training[key] for key in ("output_dir", "tokenizer", "model", "checkpointer")}
    toy_run.write_config(folder / "eval.yaml", scoring | {"opswap": {}})
    toy_run.write_config(folder / "generate.yaml", scoring | {"questions": ["q.yaml"]})
    entries = {}
    for number, own in enumerate(arms):
        file = toy_run.write_config(folder / f"arm{number}.yaml", training | own)
        role = "defense" if number else "undefended"
        entries[f"arm{number}"] = {"role": role, "config": str(file)}
    task = {
        "evaluate": {"config": str(folder / "eval.yaml")},
        "generate": {"config": str(folder / "generate.yaml")},
    }
    compare = {"output_dir": str(folder / "out"), "seeds": [0], "tasks": {"narrow": task},
               "arms": entries}  # fmt: skip
    (folder / "compare.yaml").write_text(yaml.safe_dump(compare))
    raw, origin = load_config(["--config", str(folder / "compare.yaml")])
    return check_compare_settings(raw, origin), origin
