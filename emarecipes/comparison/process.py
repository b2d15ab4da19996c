"""`tune run` as a process of its own, without the start of one that begins with nothing.

Importing torch, torchtune and datasets takes about ten seconds of one core, and a comparison starts
up to hundreds of runs. So a server imports them once and each run is forked from it; what it then
does is torchtune's own command. Not where a GPU is: a process that has asked CUDA for anything, as
importing torchao does, must not be forked.
"""

from __future__ import annotations

import atexit
import multiprocessing
import multiprocessing.connection
import os
import runpy
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch

_TUNE = str(Path(sys.executable).with_name("tune"))
SERVER = "emarecipes.comparison.server"  # What it imports.


# Starting a process asks the others whether they have ended, and an exit code can be read but
# once: of two threads that ask at a time one is told 255 (github.com/python/cpython/issues/130895).
_ASKING = threading.Lock()


class Started(Protocol):
    """What is asked of a process."""

    def terminate(self) -> None:
        """Send it SIGTERM, if it runs."""

    def wait(self) -> int:
        """Its exit code, once it has ended; that of a signal is negative."""


class _Forked:
    def __init__(self, command: Sequence[str], log: Path, env: Mapping[str, str]) -> None:
        server = multiprocessing.get_context("forkserver")
        server.set_forkserver_preload([SERVER])
        arguments = (list(command), str(log), dict(env))
        self._process = server.Process(target=_run, args=arguments)
        with _ASKING:
            self._process.start()

    def terminate(self) -> None:
        self._process.terminate()

    def wait(self) -> int:
        multiprocessing.connection.wait([self._process.sentinel])
        with _ASKING:
            self._process.join()
        assert self._process.exitcode is not None
        return self._process.exitcode


def start(arguments: Sequence[str], log: Path, env: Mapping[str, str]) -> Started:
    """Start `tune run ARGUMENTS`.

    It is out of the terminal's reach: Ctrl-C comes to us, and from us to what runs.

    Args:
        arguments: Of `tune run`.
        log: The file for what it prints.
        env: Its environment.
    """
    command = [_TUNE, "run", *arguments]
    log.write_bytes(b"")
    if not torch.cuda.is_available():
        return _Forked(command, log, env)
    with log.open("a", encoding="utf-8") as file:
        return subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=dict(env), start_new_session=True
        )


def _run(command: list[str], log: str, env: dict[str, str]) -> None:
    """In the forked process."""
    os.setsid()
    file = os.open(log, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.environ.clear()
    os.environ.update(env)
    run_script(command)


def run_script(command: Sequence[str]) -> None:
    """Run a Python script and its arguments as if it were this process's program, and end."""
    sys.argv = list(command)
    code = 0
    try:
        runpy.run_path(command[0], run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
