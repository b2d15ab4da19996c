"""A recipe on several processes as torchrun's workers run it, without the start-up of each.

Processes are forked from the server of `warm`, which has imported everything; gloo, FSDP2 and the
recipe are what they are under `tune run`. The launcher is tested in test_launch.py and
test_command.py.
"""

import os
import runpy
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import toy_run
import warm


def run_ranks(
    config: Path,
    *overrides: str,
    recipe: str = "recipes/ema_lora.py",
    processes: int = 2,
    modules: Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a recipe on so many processes; stdout and stderr are the first process's, then on.

    `modules` is a folder of a user's own.
    """
    arguments = [str(toy_run.REPO / recipe), "--config", str(config), *overrides]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            warm.SERVER.Process(
                target=_rank, args=(arguments, rank, processes, port, folder, modules)
            )
            for rank in range(processes)
        ]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(timeout=300)
            rank.kill()
        stdout, stderr = (
            "".join((Path(folder) / f"{stream}{i}").read_text() for i in range(processes))
            for stream in ("stdout", "stderr")
        )
    codes = [rank.exitcode for rank in ranks]
    return subprocess.CompletedProcess(arguments, next((c for c in codes if c), 0), stdout, stderr)


def _rank(
    arguments: list[str], rank: int, processes: int, port: int, folder: str, modules: Path | None
) -> None:
    import torch

    for number, stream in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{folder}/{stream}{rank}", os.O_WRONLY | os.O_CREAT), number)
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TOKENIZERS_PARALLELISM": "false",
    }
    os.chdir(toy_run.REPO)
    sys.argv = arguments
    sys.path[:0] = [str(Path(arguments[0]).parent), *([str(modules)] if modules else [])]
    runpy.run_path(arguments[0], run_name="__main__")
