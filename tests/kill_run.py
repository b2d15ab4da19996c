"""Runs that are killed and resumed, in forks of one process that has imported everything.

A kill is a real SIGKILL, sent by the run to itself at its n-th Python call: a moment that a seed
draws and that does not depend on how fast the machine is. With several processes one of them is
killed, and nobody tells the others.

    python kill_run.py CONFIG KILLS SEED PROCESSES

prints one JSON object a line: of the whole run first, then of every attempt.
"""

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

import emarecipes._torchtune
import emarecipes.training.run
from emarecipes.training import run_lora
from emarecipes.training.checkpoint_save import CheckpointSaver
from emarecipes.training.recipe import LoRATraining

emarecipes._torchtune.stock_recipe("lora_finetune_single_device")
emarecipes._torchtune.stock_recipe("lora_finetune_distributed")


class Calls:
    """Counts Python calls from the start of training; kills the process at one of them."""

    def __init__(self, fatal: int | None) -> None:
        self.count = 0
        self.fatal = fatal
        self.spans: list[tuple[str, int, int]] = []

    def start(self) -> None:
        def count(frame: Any, event: str, argument: Any) -> None:
            if event == "call":
                self.count += 1
                if self.count == self.fatal:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.setprofile(count)

    def spanned(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            before = self.count
            result = method(*args, **kwargs)
            self.spans.append((name, before, self.count))
            return result

        return wrapped


def child(config: Path, overrides: list[str], fatal: int | None, report: Path | None) -> None:
    """One process of a run; never returns."""
    torch.set_num_threads(1)
    calls = Calls(fatal)
    train = LoRATraining.train

    def counted(self: LoRATraining) -> bool:
        calls.start()
        return train(self)

    LoRATraining.train = counted  # type: ignore[method-assign]
    if report is not None:
        for kind, names in ((LoRATraining, ("_step", "_save")), (CheckpointSaver, ("save",))):
            for name in names:
                method = getattr(kind, name)
                setattr(kind, name, calls.spanned(f"{kind.__name__}.{name}", method))
    code = run_lora(["--config", str(config), *overrides])
    sys.setprofile(None)
    if report is not None:
        report.write_text(json.dumps({"calls": calls.count, "spans": calls.spans}))
    sys.stdout.flush()
    os._exit(code)


def launch(
    config: Path,
    output: Path,
    *,
    processes: int,
    fatal: int | None,
    rank: int = 0,
    report: Path | None = None,
) -> list[dict[str, Any]]:
    """Run once; `rank` dies at its call number `fatal`. Returns how each process ended."""
    overrides = [f"output_dir={output}", "resume=auto"]
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


def draw(rng: random.Random, whole: dict[str, Any], left: float) -> int:
    """A call at which to die, among the last share `left` of a whole run's calls.

    A third of the time anywhere, else in a save of the checkpoint or the adapter, or in a step.
    """
    if rng.random() < 0.34:
        return rng.randint(1, max(1, int(whole["calls"] * left)))
    _, start, end = rng.choice(whole["spans"])
    skipped = whole["calls"] * (1 - left)
    return max(1, int(rng.randint(start, end) - skipped)) if end > skipped else 1


def main() -> None:
    config, kills, seed, processes = Path(sys.argv[1]), *map(int, sys.argv[2:5])
    folder = config.parent
    rng = random.Random(seed)
    report = folder / "report.json"
    (ended, *_) = launch(
        config, folder / "whole", processes=processes, fatal=None, report=report
    )
    assert ended["code"] == 0, ended["log"]
    whole = json.loads(report.read_text())
    print(json.dumps({"whole": len(whole["spans"])}), flush=True)
    output, number = folder / "killed_0", 0
    while True:
        steps = sorted(int(p.name[5:]) for p in (output / "checkpoints").glob("step_*"))
        total = sum(name == "LoRATraining._step" for name, *_ in whole["spans"])
        left = 1 - (steps[-1] if steps else 0) / total
        fatal = draw(rng, whole, max(left, 0.02)) if kills > 0 else None
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
