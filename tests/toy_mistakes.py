"""A toy run whose config or data is wrong."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
import toy_run

from emarecipes.training import run_lora

KL = {"_component_": "emarecipes.defenses.KLToReference"}


class Case:
    """A toy run, in the process of the test: config as a dict to be changed, then tried."""

    def __init__(self, folder: Path, model_dir: Path) -> None:
        self.folder = folder
        self.output = folder / "out"
        self.rows = toy_run.write_rows(folder / "rows.jsonl", 12)
        self.config: dict[str, Any] = toy_run.toy_config(model_dir, self.rows, self.output)
        self.config |= {"defenses": {"kl": dict(KL)}, "max_steps_per_epoch": 1}

    def write(self, *rows: Any) -> None:
        lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
        self.rows.write_text("\n".join(lines) + "\n")

    def error(self, *overrides: str, monkeypatch: pytest.MonkeyPatch | None = None) -> str:
        path = toy_run.write_config(self.folder / "config.yaml", self.config)
        before = sorted(str(p) for p in self.output.rglob("*")) if self.output.exists() else None
        stderr = io.StringIO()
        with contextlib.redirect_stderr(stderr):
            code = run_lora(["--config", str(path), *overrides])
        lines = [line for line in stderr.getvalue().splitlines() if line.startswith("error: ")]
        assert code == 1
        assert "Traceback" not in stderr.getvalue()
        assert len(lines) == 1, stderr.getvalue()
        after = sorted(str(p) for p in self.output.rglob("*")) if self.output.exists() else None
        assert after == before, "a refused run left files"
        return lines[0]
