"""Runs killed by SIGKILL and resumed give the adapter of a run that was left alone."""

import json
import os
import re
import shlex
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import toy_defenses
import toy_run
from safetensors.torch import load_file

NAMES = ("kl", "safelora")
EPOCHS, STEPS = 2, 5


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> dict[str, Any]:
    """Interleaving, KL, SafeLoRA every two steps and dropout, two epochs of five steps."""
    folder = tmp_path_factory.mktemp("toy")
    model = toy_run.write_toy_model(folder / "model", model_dir)
    rows = toy_run.write_rows(folder / "rows.jsonl", 18)
    config = toy_run.toy_config(model, rows, folder / "out")
    config["tokenizer"]["max_seq_len"] = 64
    config["model"]["lora_dropout"] = 0.2
    defenses = toy_defenses.defense_entries(folder, model, toy_run.LAYERS, toy_run.WIDTH)
    safe = toy_defenses.write_safe_rows(folder / "safe.jsonl")
    return config | {
        "shuffle": True,
        "batch_size": 2,
        "gradient_accumulation_steps": 2,
        "epochs": EPOCHS,
        "max_steps_per_epoch": STEPS,
        "clip_grad_norm": 1.0,
        "pad_to_multiple_of": 32,
        "save_every_n_steps": 2,
        "dataset": toy_defenses.interleaved(config["dataset"], safe),
        "defenses": {name: defenses[name] for name in NAMES},
        "metric_logger": None,
    }


def killed(
    config: dict[str, Any], folder: Path, kills: int, seed: int, processes: int
) -> list[dict[str, Any]]:
    """Run tests/kill_run.py and check every run that came to its end against the whole one."""
    if processes > 1:
        config = config | {"gradient_accumulation_steps": 1}
    path = toy_run.write_config(folder / "config.yaml", config)
    script = Path(toy_run.__file__).with_name("kill_run.py")
    arguments = [str(path), str(kills), str(seed), str(processes)]
    started = toy_run.start([str(script), *arguments])
    printed, errors = started.communicate(timeout=3600)
    assert started.returncode == 0, printed[-3000:] + errors[-3000:]
    _, *attempts = [json.loads(line) for line in printed.splitlines()]
    assert sum(attempt["killed"] for attempt in attempts) == kills
    finished = [Path(attempt["output"]) for attempt in attempts if attempt["done"]]
    assert finished
    expected = load_file(folder / "whole/adapter/adapter_model.safetensors")
    rows = figures(folder / "whole")
    assert [row["step"] for row in rows] == list(range(1, config["epochs"] * STEPS + 1))
    assert rows[-1]["kl"] > 1e-5
    for output in finished:
        found = load_file(output / "adapter/adapter_model.safetensors")
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert found[name].equal(tensor), f"{output}: {name}"
        assert figures(output) == rows
        if "reference_cache" in config:
            per_step = config["batch_size"] * config["gradient_accumulation_steps"]
            states, marks = cache_files(output)
            assert (states, marks) == cache_files(folder / "whole")
            filled = sum(any(marks[i : i + 8]) for i in range(0, len(marks), 8))
            assert filled >= STEPS * per_step, "a row of the first epoch is not stored"
    return attempts


def cache_files(output: Path) -> tuple[bytes, bytes]:
    """The states of a run's own reference cache, and the marks of its rows."""
    (cache,) = output.with_name(f"{output.name}_cache").iterdir()
    return (cache / "states.bin").read_bytes(), (cache / "marks.bin").read_bytes()


def figures(output: Path) -> list[dict[str, float]]:
    rows = toy_run.metrics(output)
    for row in rows:
        row.pop("tokens_per_second")
    return rows


def check_others(attempts: list[dict[str, Any]]) -> None:
    """Each time the process that was left stopped by itself, soon, and said why."""
    for attempt in attempts:
        if attempt["killed"]:
            assert attempt["seconds"] < 60
            (log,) = attempt["others"]
            assert "error: another process has gone" in log, log
            assert "Resume from step" in log or "There is no checkpoint yet" in log


@pytest.mark.early
def test_killed_and_resumed(config: dict[str, Any], tmp_path: Path) -> None:
    """Also while it fills its reference cache."""
    config = config | {"reference_cache": "cache"}
    attempts = killed(config, tmp_path, kills=4, seed=1, processes=1)
    assert any(attempt["from"] for attempt in attempts), "no run went on from a checkpoint"
    places = {attempt["fatal"][0] for attempt in attempts if attempt["killed"]}
    assert places & {"cache", "cached row"}


def test_one_of_two_processes_killed(config: dict[str, Any], tmp_path: Path) -> None:
    check_others(killed(config | {"epochs": 1}, tmp_path, kills=1, seed=3, processes=2))


@pytest.mark.long
def test_killed_at_fifty_moments(config: dict[str, Any], tmp_path: Path) -> None:
    attempts = killed(config, tmp_path, kills=50, seed=0, processes=1)
    assert sum(bool(attempt["partial"]) for attempt in attempts) >= 3, "kills during a save"
    places = {attempt["fatal"][0] for attempt in attempts if attempt["killed"]}
    assert places == {"run", "save", "adapter", "last step"}


@pytest.mark.long
def test_killed_at_fifty_moments_with_a_reference_cache(
    config: dict[str, Any], tmp_path: Path
) -> None:
    config = config | {"reference_cache": "cache"}
    attempts = killed(config, tmp_path, kills=50, seed=4, processes=1)
    places = {attempt["fatal"][0] for attempt in attempts if attempt["killed"]}
    assert places == {"run", "save", "adapter", "last step", "cache", "cached row"}


@pytest.mark.long
def test_sigterm_to_the_launcher(config: dict[str, Any], tmp_path: Path) -> None:
    """As a cluster preempts a job: both processes save the same step, and the printed line goes on.

    The launcher kills what is left after its grace; then there would be no checkpoint and no line.
    """
    more = {"gradient_accumulation_steps": 1, "epochs": 12, "save_every_n_steps": None}
    path = toy_run.write_config(tmp_path / "config.yaml", config | more)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    output = tmp_path / "out"
    command = [toy_run.TUNE, "run", "--nproc_per_node", "2", "recipes/ema_lora.py"]
    arguments = ["--config", str(path), f"output_dir={output}"]
    launcher = subprocess.Popen(
        [*command, *arguments], cwd=toy_run.REPO, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    metrics = output / "metrics.jsonl"
    while not (metrics.is_file() and len(metrics.read_bytes().splitlines()) >= 3):
        assert launcher.poll() is None, launcher.communicate()
        time.sleep(0.02)
    launcher.send_signal(signal.SIGTERM)
    printed, errors = launcher.communicate(timeout=300)
    assert launcher.returncode == 1
    assert errors.rstrip().endswith("error: interrupted"), errors[-2000:]
    stopped = re.search(
        r"Stopped after step (\d+)\. Resume from step (\d+) with: tune (.*)", printed
    )
    assert stopped, printed + errors[-2000:]
    (checkpoint,) = (output / "checkpoints").iterdir()
    assert checkpoint.name == f"step_{stopped[1]}" == f"step_{stopped[2]}"
    assert len(figures(output)) == int(stopped[1]) < 12 * STEPS
    assert printed.count("Stopped after step") == 1, "one of the two processes says it"

    go_on, whole = shlex.split(stopped[3]), tmp_path / "whole"
    done = subprocess.run([toy_run.TUNE, *go_on], cwd=toy_run.REPO, env=environment)
    assert done.returncode == 0
    assert toy_run.tune_run(path, f"output_dir={whole}", processes=2).returncode == 0
    assert figures(output) == figures(whole)
    found, expected = (load_file(f / "adapter/adapter_model.safetensors") for f in (output, whole))
    for name, tensor in expected.items():
        assert found[name].equal(tensor), name


@pytest.mark.long
def test_one_of_two_processes_killed_ten_times(config: dict[str, Any], tmp_path: Path) -> None:
    check_others(killed(config, tmp_path, kills=10, seed=0, processes=2))
