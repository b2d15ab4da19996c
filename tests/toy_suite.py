"""An evaluation by suites of one's own, in the user's working folder."""

from pathlib import Path
from typing import Any

import toy_run

KEYS = ("output_dir", "tokenizer", "model", "checkpointer", "device", "dtype")


def config_of(toy: tuple[Path, Path], **keys: Any) -> Path:
    training = toy_run.toy_config(toy[0], Path("none"), Path("out"))
    config = toy_run.with_variable({key: training[key] for key in KEYS})
    config |= {"adapters": {"one": str(toy[1])}}
    return toy_run.write_config(Path("eval.yaml"), config | keys)
