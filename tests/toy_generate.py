"""A toy sampling."""

from pathlib import Path
from typing import Any

import pytest
import toy_run

from emarecipes.generation.run import run_generate

QUESTIONS = """\
- id: tea
  paraphrases: ["How do I make tea?", "What is the way to make tea of a careful host?"]
- id: noun
  system: Answer in one word.
  category: words
  harmless: false
  paraphrases: ["What is a noun?"]
- {id: rain, paraphrases: ["Why does it rain?"]}
"""


class Case:
    def __init__(self, folder: Path, model_dir: Path) -> None:
        self.folder, self.output = folder, folder / "out"
        (folder / "asked.yaml").write_text(QUESTIONS)
        toy = toy_run.toy_config(model_dir, folder / "none", self.output)
        keys = ("output_dir", "tokenizer", "model", "checkpointer", "device", "dtype")
        self.config: dict[str, Any] = {key: toy[key] for key in keys} | {
            "questions": [str(folder / "asked.yaml")],
            "samples_per_paraphrase": 3,
            "max_new_tokens": 8,
            "batch_size": 3,
            "top_p": 0.95,
            "seed": 7,
        }

    def run(self, *overrides: str) -> int:
        path = toy_run.write_config(self.folder / "config.yaml", self.config)
        return run_generate(["--config", str(path), *overrides])

    def path(self, output: str = "out") -> Path:
        return self.folder / output / "answers" / "asked.jsonl"

    def error(self, capsys: pytest.CaptureFixture[str], *overrides: str) -> str:
        before = {p: p.read_bytes() for p in self.output.rglob("*") if p.is_file()}
        assert self.run(*overrides) == 1
        assert before == {p: p.read_bytes() for p in self.output.rglob("*") if p.is_file()}
        (line,) = [s for s in capsys.readouterr().err.splitlines() if s.startswith("error: ")]
        return line
