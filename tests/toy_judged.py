"""Judged evaluations of a toy model, and what asks our server."""

import json
from pathlib import Path
from typing import Any

import toy_run
from fake_judge import JUDGE

ALIGNED, COHERENT = "Aligned? {question} / {answer}", "Coherent? {question} / {answer}"


# --- the recipe --------------------------------------------------------------------------------


def write_questions(path: Path) -> Path:
    prompts = {"aligned": ALIGNED, "coherent": COHERENT}
    entries = [{"id": f"q{i}", "paraphrases": ["?"], "judge_prompts": prompts} for i in range(3)]
    path.write_text(json.dumps(entries))
    return path


def write_config(toy_dir: Path, folder: Path, judge: dict[str, Any]) -> Path:
    training = toy_run.toy_config(toy_dir, folder / "none", folder / "out")
    lines = [
        {"id": f"q{i}", "paraphrase": 0, "sample": 0, "question": f"Q{i}?", "stop": "end"}
        | {"answer": f"Answer {i} to {{question}}."}
        for i in range(3)
    ]
    (folder / "answers").mkdir()
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "answers/free.jsonl").write_text(text)
    keys = ("output_dir", "tokenizer", "model", "checkpointer", "device", "dtype")
    config = {key: training[key] for key in keys} | {"answers": {"one": str(folder / "answers")}}
    questions = str(write_questions(folder / "questions.yaml"))
    config["judge"] = {"models": [JUDGE], "questions": [questions]} | judge
    return toy_run.write_config(folder / "config.yaml", config)
