"""A toy extraction of a persona vector."""

from pathlib import Path
from typing import Any

import toy_run

PROMPTS = """\
trait: curtness
pairs:
  - positive: Answer curtly, as if you had no time.
    negative: Answer at length, as if you had all day.
  - {positive: You are short with people., negative: You are patient with people.}
questions:
  - How do I make tea?
  - What is a noun?
  - Why does it rain?
  - Who was the first to sail round the world?
  - Is glass a liquid?
  - Where do I begin?
"""


def persona_config(folder: Path, model_dir: Path) -> dict[str, Any]:
    (folder / "prompts.yaml").write_text(PROMPTS)
    toy = toy_run.toy_config(model_dir, folder / "rows.jsonl", folder / "out")
    shared = ("output_dir", "tokenizer", "model", "checkpointer", "seed", "device", "dtype")
    return toy_run.with_variable({key: toy[key] for key in shared}) | {
        "prompts": str(folder / "prompts.yaml"),
        "max_new_tokens": 6,
        "batch_size": 5,
        "held_out_questions": 0.34,
    }
