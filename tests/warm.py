"""`tune run` without the ten seconds of imports of each process.

Processes are forked from a server that has imported everything once. What they then do is what the
command does: torchtune's own command line with these arguments, environment and working folder; its
launcher, whose ranks are forked alike; gloo, FSDP2, the recipe. What a start of its own adds is
tested in test_launch.py and test_command.py, or everywhere with COLD=1 in the environment.

The workers of pytest-xdist share one server, which the process that started them starts; see
conftest.py.
"""

import multiprocessing
import os
import subprocess
import sys
import tempfile
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["torch.distributed.run", "emarecipes.comparison.server"])
# What a process needs that asks the server which its parent asked, instead of starting another.
_SERVER_STATE: Any = forkserver._forkserver
_SHARED = ("_forkserver_address", "_forkserver_authkey")  # The latter from Python 3.14 on.
COLD = os.environ.get("COLD") == "1"


def shared() -> dict[str, Any]:
    """Start the server; what `join` takes in another process. It ends with this process."""
    _SERVER_STATE.ensure_running()
    return {name: getattr(_SERVER_STATE, name, None) for name in _SHARED}


def join(state: dict[str, Any]) -> None:
    """Ask the server of `shared`, in a process that has none of its own."""
    for name, value in state.items():
        setattr(_SERVER_STATE, name, value)
    if _SERVER_STATE._forkserver_alive_fd is None:
        # Handed to each process that is forked, in place of the pipe whose end ends the server.
        _SERVER_STATE._forkserver_alive_fd = os.open(os.devnull, os.O_RDONLY)
    _SERVER_STATE.ensure_running = lambda: None


class Warm:
    """As much of `subprocess.Popen` as is used: of a Python program and its arguments."""

    def __init__(
        self,
        command: list[str],
        env: dict[str, str],
        cwd: str | Path,
        streams: tuple[str, str] | None = None,
    ) -> None:
        self._folder = tempfile.TemporaryDirectory()
        own = (f"{self._folder.name}/stdout", f"{self._folder.name}/stderr")
        self._streams = own if streams is None else streams
        arguments = (command, env, str(cwd), self._streams, shared())
        self.process: BaseProcess = SERVER.Process(target=_child, args=arguments)
        self.process.start()
        self.pid = self.process.pid

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired("tune run", timeout or 0.0)
        return self.process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        stdout, stderr = (Path(stream).read_text() for stream in self._streams)
        return stdout, stderr


def start(
    command: list[str], env: dict[str, str], cwd: Path, cold: bool = False
) -> "Warm | subprocess.Popen[str]":
    """A command of this environment's Python, such as `tune run ...`."""
    if not (cold or COLD):
        return Warm(command, env, cwd)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(
        [sys.executable, *command], env=env, cwd=cwd, start_new_session=True, **pipes
    )


def _child(
    command: list[str],
    env: dict[str, str],
    cwd: str,
    streams: tuple[str, str],
    state: dict[str, Any],
) -> None:
    os.setsid()
    join(state)
    for number, stream in zip((1, 2), streams, strict=True):
        os.dup2(os.open(stream, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    script, *arguments = [part for part in command if part not in (sys.executable, "-u")]
    sys.path[:0] = [str(Path(script).parent), *env.get("PYTHONPATH", "").split(os.pathsep)]
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    from emarecipes.comparison import process

    subprocess_handler.SubprocessHandler._popen = _rank
    process.run_script([script, *arguments])


def _rank(handler: object, command: tuple[str, ...], env: dict[str, str]) -> Warm:
    """What torchrun starts for each rank."""
    files = (getattr(handler, "_stdout", None), getattr(handler, "_stderr", None))
    streams = tuple(
        file.name if file else f"/proc/{os.getpid()}/fd/{number}"
        for number, file in zip((1, 2), files, strict=True)
    )
    return Warm(list(command), env, Path.cwd(), (streams[0], streams[1]))
