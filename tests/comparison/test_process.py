"""Runs as processes of their own, forked from a server."""

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
import torch
import warm

from emarecipes.comparison import process

assert warm.SERVER  # The one server of all tests, which has imported what is needed.


@pytest.mark.recipe
def test_the_exit_code_is_its_own_while_others_are_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Starting one reads the codes of those that have ended, each of which can be read but once."""
    script = tmp_path / "end.py"
    script.write_text("import sys\nsys.exit(3)\n")
    read, asked = forkserver.read_signed, threading.Event()

    def slowly(sentinel: int) -> Any:
        if not asked.is_set():  # For the other thread to come to the same place, and to be first.
            asked.set()
            time.sleep(1.0)
        return read(sentinel)

    monkeypatch.setattr(process, "_TUNE", str(script))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # With a GPU nothing is forked.

    def start(number: int) -> process.Started:
        return process.start([], tmp_path / f"{number}.log", dict(os.environ))

    first = start(0)
    monkeypatch.setattr(forkserver, "read_signed", slowly)
    with ThreadPoolExecutor(1) as pool:
        code = pool.submit(first.wait)
        assert asked.wait(60)
        second = start(1)
        assert code.result() == 3
    assert second.wait() == 3
