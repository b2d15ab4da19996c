"""A bar of a process that a person or another program reads, as that process writes it."""

import fcntl
import json
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path

SCRIPT = """
import os, time
from emarecipes.progress import NOTE, Progress
with Progress(total=40, initial=10, desc="Scoring", unit="row") as bar:
    for _ in range(30):
        time.sleep(0.02)
        bar.update()
    bar.refresh()
    print(open(os.environ[NOTE]).read())
"""


def test_lines_in_a_file_and_a_note_for_the_parent(tmp_path: Path) -> None:
    environment = os.environ | {"EMARECIPES_PROGRESS": str(tmp_path / "note")}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment, check=True
    )
    first, last = done.stderr.splitlines()
    assert first.startswith("Scoring: row 1") and " left" in first and "\r" not in done.stderr
    assert last.startswith("Scoring: row 40 of 40, ") and "left" not in last
    note = json.loads(done.stdout)
    assert (note["title"], note["total"], note["first"], note["unit"]) == ("Scoring", 40, 10, "row")
    assert 10 <= note["done"] <= 40


def test_a_bar_in_a_terminal(tmp_path: Path) -> None:
    environment = os.environ | {"EMARECIPES_PROGRESS": str(tmp_path / "note")}
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT], stderr=child, stdout=subprocess.DEVNULL, env=environment
    ) as process:
        process.wait()
    os.close(child)
    shown = os.read(parent, 2**16).decode()
    assert "\r" in shown and "40/40" in shown
