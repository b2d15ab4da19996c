"""A disk that really gets full, in a file system of its own."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import toy_run
from safetensors.torch import load_file

from emarecipes.training import run_lora


def mounted(disk: Path, *command: str) -> list[str]:
    """The command in a mount namespace where `disk` is a file system of 3 MB."""
    return [
        "unshare",
        "-rm",
        "sh",
        "-c",
        f'mount -t tmpfs -o size=3m none {disk} && exec "$@"',
        "-",
        *command,
    ]


def test_a_full_disk_loses_nothing(tmp_path: Path, model_dir: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if shutil.which("unshare") is None or subprocess.run(mounted(disk, "true")).returncode:
        pytest.skip("no mount namespaces here")
    model = toy_run.write_toy_model(tmp_path / "model", model_dir)
    rows = toy_run.write_rows(tmp_path / "rows.jsonl", 16)
    config: dict[str, Any] = toy_run.toy_config(model, rows, disk / "run") | {
        "metric_logger": None,
        "save_every_n_steps": 2,
        "defenses": {
            "disk": {"_component_": "toy_mishaps.FillsDisk", "path": f"{disk}/filler", "step": 99}
        },
    }
    path = toy_run.write_config(tmp_path / "config.yaml", config)
    tests = Path(toy_run.__file__).parent
    done = subprocess.run(
        mounted(disk, sys.executable, str(tests / "full_disk_run.py"), str(path), str(disk)),
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(tests), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout)
    assert 0
