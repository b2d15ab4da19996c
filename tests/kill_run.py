"""Runs that are killed and resumed, in forks of one process that has imported everything.

A kill is a real SIGKILL, sent by the run to itself at its n-th Python call: a moment that a seed
draws and that does not depend on how fast the machine is. With several processes one of them is
killed, and nobody tells the others.

    python kill_run.py CONFIG KILLS SEED PROCESSES

prints one JSON object a line: of the whole run first, then of every attempt.
"""

import gc
import json
import os
import random
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import emarecipes.models._torchtune_recipe
import emarecipes.training.recipe
from emarecipes.training import run_lora
from emarecipes.training.checkpoint_save import CheckpointSaver
from emarecipes.training.recipe import LoRATraining
from emarecipes.training.reference_cache import ReferenceCache
from emarecipes.training.row_store import RowStore

emarecipes.models._torchtune_recipe.stock_recipe("lora_finetune_single_device")
emarecipes.models._torchtune_recipe.stock_recipe("lora_finetune_distributed")


class Calls:
    """Counts Python calls from the start of training; kills the process at one of them.

    Args:
        fatal: (place, n): the n-th call after that place is first entered.
    """

    def __init__(self, fatal: tuple[str, int] | None) -> None:
        self.count = 0
        self.place, self.left = fatal or ("", 0)
        self.at = self.left if self.place == "run" else 0
        self.sizes: dict[str, int] = {}

    def start(self) -> None:
        def count(frame: Any, event: str, argument: Any) -> None:
            if event == "call":
                self.count += 1
                if self.count == self.at:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.setprofile(count)

    def watch(
        self, place: str, owner: Any, name: str, when: Callable[..., bool] = lambda *_: True
    ) -> None:
        function = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            if not when(*args):
                return function(*args, **kwargs)
            before = self.count
            if place == self.place and not self.at:
                self.at = before + self.left
            result = function(*args, **kwargs)
            self.sizes[place] = max(self.count - before, self.sizes.get(place, 0))
            return result

        setattr(owner, name, watched)


def child(
    config: Path, overrides: list[str], fatal: tuple[str, int] | None, report: Path | None
) -> None:
    """One process of a run; never returns."""
    torch.set_num_threads(1)
    calls = Calls(fatal)
    train = LoRATraining.train

    def counted(self: LoRATraining) -> bool:
        calls.start()
        return train(self)

    LoRATraining.train = counted  # type: ignore[method-assign]
    calls.watch("save", CheckpointSaver, "save")
    calls.watch("adapter", emarecipes.training.recipe, "save_weights")
    ends = lambda run, step, rows: step % run.steps_per_epoch == 0  # noqa: E731
    calls.watch("last step", LoRATraining, "_step", ends)
    # Entered only with a reference cache, which such a run fills as it goes.
    calls.watch("cache", ReferenceCache, "states")
    calls.watch("cached row", RowStore, "write")
    code = run_lora(["--config", str(config), *overrides])
    sys.setprofile(None)
    if report is not None:
        report.write_text(json.dumps(calls.sizes | {"run": calls.count}))
    sys.stdout.flush()
    os._exit(code)


def launch(
    config: Path,
    output: Path,
    *,
    processes: int,
    fatal: tuple[str, int] | None,
    rank: int = 0,
    report: Path | None = None,
) -> list[dict[str, Any]]:
    """Run once; `rank` dies at its call number `fatal`. Returns how each process ended."""
    overrides = [f"output_dir={output}", "resume=auto"]
    if "reference_cache:" in config.read_text():
        overrides.append(f"reference_cache={cache_of(output)}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children: dict[int, int] = {}
    logs = [output.with_name(f"{output.name}.{r}.log") for r in range(processes)]
    for r in range(processes):
        pid = os.fork()
        if pid == 0:
            try:
                descriptor = os.open(logs[r], os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
                os.dup2(descriptor, 1)
                os.dup2(descriptor, 2)
                if processes > 1:
                    os.environ |= {
                        "RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": str(processes),
                        "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1",
                        "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "kill_run",
                    }  # fmt: skip
                mine = r == rank
                child(config, overrides, fatal if mine else None, report if mine else None)
            except BaseException as error:
                print(f"{type(error).__name__}: {error}", flush=True)
                os._exit(3)
        children[pid] = r
    ended: list[dict[str, Any]] = [{} for _ in range(processes)]
    while children:
        pid, status = os.wait()
        r = children.pop(pid)
        code = os.waitstatus_to_exitcode(status)
        ended[r] = {"code": code, "time": time.monotonic(), "log": logs[r].read_text()}
    return ended


def cache_of(output: Path) -> Path:
    """A run's own reference cache: kept over its kills, empty when the next run begins."""
    return output.with_name(f"{output.name}_cache")


def draw(rng: random.Random, sizes: dict[str, int], left: float) -> tuple[str, int]:
    """A moment to die: anywhere in what is left of the run, or in a place of few calls."""
    place = rng.choice(["run", "run", *sizes])
    return place, rng.randint(1, max(1, int(sizes[place] * (left if place == "run" else 1))))


def main() -> None:
    config, kills, seed, processes = Path(sys.argv[1]), *map(int, sys.argv[2:5])
    folder = config.parent
    gc.freeze()  # As in emarecipes/comparison/server.py.
    rng = random.Random(seed)
    report = folder / "report.json"
    (ended, *_) = launch(config, folder / "whole", processes=processes, fatal=None, report=report)
    assert ended["code"] == 0, ended["log"]
    sizes = json.loads(report.read_text())
    print(json.dumps(sizes), flush=True)
    total = len((folder / "whole/metrics.jsonl").read_text().splitlines())
    output, number = folder / "killed_0", 0
    while True:
        steps = sorted(int(p.name[5:]) for p in (output / "checkpoints").glob("step_*"))
        left = 1 - (steps[-1] if steps else 0) / total
        fatal = draw(rng, sizes, max(left, 0.02)) if kills > 0 else None
        rank = rng.randrange(processes)
        ended = launch(config, output, processes=processes, fatal=fatal, rank=rank)
        died = ended[rank]["code"] == -signal.SIGKILL
        kills -= died
        done = all(e["code"] == 0 for e in ended)
        seconds = max(e["time"] for e in ended) - ended[rank]["time"]
        line = {
            "output": str(output), "from": steps, "fatal": fatal, "killed": died, "done": done,
            "seconds": seconds, "partial": [p.name for p in output.rglob("*.partial")],
            "others": [e["log"][-1500:] for r, e in enumerate(ended) if r != rank or not died],
        }  # fmt: skip
        print(json.dumps(line), flush=True)
        if not died and not done:
            sys.exit("a run failed that was not killed")
        if done:
            if kills <= 0:
                return
            number += 1
            shutil.rmtree(output / "checkpoints")
            output = folder / f"killed_{number}"


if __name__ == "__main__":
    main()
