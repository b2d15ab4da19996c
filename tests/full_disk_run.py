"""Writes checkpoints, adapters and runs onto a disk that gets full.

    python full_disk_run.py CONFIG DISK KEPT

DISK is a folder at which this process gets a file system of 3 MB, and the output_dir of CONFIG lies
on it; the adapter of the run that was resumed is copied to KEPT. Prints one JSON object a line:
what failed, with which words, and what was on the disk then.
"""

import contextlib
import io
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import toy_disk

from emarecipes.errors import UserError
from emarecipes.training import run_lora
from emarecipes.training.checkpoint import Counters, newest_checkpoint, write_checkpoint


def show(name: str, disk: Path, **found: Any) -> None:
    files = sorted(str(path.relative_to(disk)) for path in disk.rglob("*"))
    print(json.dumps({"name": name, "files": files, **found}), flush=True)


def checkpoint_that_does_not_fit(disk: Path) -> None:
    """The room that is asked for is that of tensors; this state is mostly text."""
    for step, text in ((1, "short"), (2, "x" * 4_000_000)):
        training = {"random": [torch.zeros(10)], "defenses": {"d": {"text": text}}}
        try:
            write_checkpoint(
                disk / "checkpoints", {"a": torch.ones(9)}, training, {}, Counters(step)
            )
            line = ""
        except UserError as error:
            line = str(error)
    found = newest_checkpoint(disk / "checkpoints")
    show("checkpoint", disk, line=line, newest=found and found.counters.step)


def run(name: str, config: Path, disk: Path, *overrides: str, full_after: int = 0) -> None:
    os.environ |= {"FILL_AFTER": str(full_after), "FILL_FILE": str(disk / "filler")}
    printed = io.StringIO()
    with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
        code = run_lora(["--config", str(config), *overrides])
    lines = printed.getvalue().splitlines()
    traceback = any(line.startswith("Traceback") for line in lines)
    said = [line for line in lines if line.startswith(("error: ", "Resume ", "There is no"))]
    show(name, disk, code=code, said=said, traceback=traceback)


def main() -> None:
    config, disk, copy = map(Path, sys.argv[1:])
    toy_disk.mount(disk, 3 * 2**20)
    torch.set_num_threads(1)
    checkpoint_that_does_not_fit(disk)
    shutil.rmtree(disk / "checkpoints")
    run("no room for step 4", config, disk, full_after=3)
    (disk / "filler").unlink()
    run("resumed", config, disk, "resume=auto")
    # A run that replaces one whose adapter is there fails when it writes its own.
    adapter = disk / "run/adapter/adapter_model.safetensors"
    before = adapter.read_bytes()
    copy.write_bytes(before)
    more = ["overwrite=true", "save_every_n_steps=null", "seed=9"]
    run("no room for the adapter", config, disk, *more, full_after=4)
    kept = disk / "run/.replaced/adapter/adapter_model.safetensors"
    show("kept", disk, same=kept.is_file() and kept.read_bytes() == before)


if __name__ == "__main__":
    main()
