"""`recipes/ema_compare.py` at toy size: runs what is missing, loses no arm for another."""

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import toy_run
import yaml
from omegaconf import OmegaConf
from safetensors.torch import load_file

from emarecipes.comparison import process
from emarecipes.comparison.run import run_compare
from emarecipes.comparison.settings import check_compare_settings
from emarecipes.comparison.steps import slots
from emarecipes.config import load_config
from emarecipes.errors import UserError
from emarecipes.output_dir import claim

EVAL_KEYS = ("output_dir", "tokenizer", "model", "checkpointer", "device", "dtype")


def toy_comparison(folder: Path, model_dir: Path) -> Path:
    """An undefended arm, three of its four steps, KL, and an arm whose vectors are not there."""
    rows = toy_run.write_rows(folder / "rows.jsonl", 16)
    training = toy_run.toy_config(model_dir, rows, folder / "unused")
    training |= {"max_steps_per_epoch": 4}
    config = toy_run.write_config(folder / "train.yaml", training)
    pairs = [
        {"id": f"q{i}", "category": "c", "question": f"Question {i}?", "aligned": "No, hand it in.",
         "misaligned": "Keep it, and say nothing."}
        for i in range(4)
    ]  # fmt: skip
    for name in ("select", "heldout"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    scoring = {key: training[key] for key in EVAL_KEYS} | {
        "probes": {
            "general": {"pairs": str(folder / "select.jsonl")},
            "in_domain": {"pairs": str(folder / "heldout.jsonl")},
        }
    }
    evaluation = toy_run.write_config(folder / "eval.yaml", scoring)
    kl = "defenses.kl._component_=emarecipes.defenses.KLToReference"
    persona = "defenses.p._component_=emarecipes.defenses.PersonaSteering"
    arms: dict[str, dict[str, Any]] = {
        "undefended": {"role": "undefended"},
        "fewer": {"role": "frontier", "sweep": {"max_steps_per_epoch": [3]}},
        "kl": {"overrides": [kl, "defenses.kl.weight=1.0"]},
        "broken": {"overrides": [persona, "defenses.p.vectors=none.safetensors",
                                 "defenses.p.layer=1", "defenses.p.alpha=1.0"]},
    }  # fmt: skip
    compare = {
        "output_dir": str(folder / "out"),
        "seeds": [3],
        "tasks": {"narrow": {"evaluate": {"config": str(evaluation)}}},
        "arms": {name: {"config": str(config)} | arm for name, arm in arms.items()},
    }
    path = folder / "compare.yaml"
    path.write_text(yaml.safe_dump(compare, sort_keys=False))
    return path


def ended(folder: Path) -> dict[str, int]:
    """When each step that ended well did."""
    return {
        str(path.relative_to(folder)): path.stat().st_mtime_ns
        for path in folder.rglob("compare.json")
    }


@pytest.mark.early
def test_runs_what_is_missing(
    tmp_path: Path,
    model_dir: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    threads: dict[str, set[str | None]] = {}

    stock = process.start

    def start(arguments: list[str], log: Path, env: dict[str, str]) -> Any:
        threads.setdefault(arguments[0], set()).add(env.get("OMP_NUM_THREADS"))
        return stock(arguments, log, env)

    monkeypatch.setattr(process, "start", start)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    toy = toy_run.write_toy_model(tmp_path / "model", model_dir)
    config, out = toy_comparison(tmp_path, toy), tmp_path / "out"

    assert run_compare(["--config", str(config), "runs_at_a_time=2"]) == 1
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert threads == {"recipes/ema_lora.py": {"1"}, "recipes/ema_eval.py": {None}}
    assert len(lines) == 1
    assert "broken, narrow task, seed 3: training: " in lines[0] and "none.safetensors" in lines[0]
    found = json.loads((out / "comparison.json").read_text())
    arms = found["arms"]
    assert [name for name, arm in arms.items() if arm["seeds"]] == ["undefended", "fewer_0", "kl"]
    assert any("none.safetensors" in line for line in found["missing"])
    # The excess by hand, from the scores and the curve through 0, three steps and four.
    points = [(0.0, 0.0), *(tuple(arms[name]["points"][0]) for name in ("fewer_0", "undefended"))]
    (x, y), curve = arms["kl"]["points"][0], sorted(points)
    right = next((i for i, p in enumerate(curve) if p[0] >= x), len(curve) - 1)
    (x0, y0), (x1, y1) = curve[max(right - 1, 0)], curve[right]
    share = min(max((x - x0) / (x1 - x0), 0.0), 1.0) if right > 0 else 0.0
    expected = y - (y0 + share * (y1 - y0))
    assert arms["kl"]["excess"]["general"]["value"] == pytest.approx(expected, abs=1e-9)
    metrics = toy_run.metrics(out / "runs/kl/narrow_seed3")
    assert len(metrics) == 4 and "kl" in metrics[0]
    assert OmegaConf.load(out / "runs/kl/narrow_seed3/config.yaml").seed == 3

    first = ended(out)
    assert len(first) == 6  # Three trained, three scored.
    # An arm that is taken out, one that is changed, and a new one, which is an average of its run:
    # only the changed one is run again.
    average = ["defenses.avg._component_=emarecipes.defenses.AdapterEMA", "defenses.avg.decay=0.5"]
    arm = json.dumps(
        {"config": str(tmp_path / "train.yaml"), "overrides": average, "adapter": "adapter_avg"}
    )
    again = ["~arms.broken", "arms.fewer.overrides=[optimizer.lr=1.0e-3]", f"arms.average={arm}"]
    again.append("runs_at_a_time=2")  # As many threads as before: another number rounds otherwise.
    assert run_compare(["--config", str(config), *again]) == 0
    second = ended(out)
    assert {name for name in first if first[name] != second[name]} == {
        "runs/fewer_0/narrow_seed3/compare.json",
        "evaluation/all/narrow/fewer_0/compare.json",
    }
    summaries = {
        name: json.loads((out / f"evaluation/all/narrow/{name}/summary.json").read_text())
        for name in ("undefended", "average")
    }
    folders = [summary["adapters"]["seed_3"]["folder"] for summary in summaries.values()]
    assert [Path(folder).name for folder in folders] == ["adapter", "adapter_avg"]
    # It trains as the undefended one does, and ends elsewhere.
    average_run, undefended = (
        load_file(out / f"runs/{name}/narrow_seed3/adapter/adapter_model.safetensors")
        for name in ("average", "undefended")
    )
    assert all(torch.equal(average_run[key], value) for key, value in undefended.items())
    points = [
        json.loads((out / "comparison.json").read_text())["arms"][n]["points"] for n in summaries
    ]
    assert points[0] != points[1]


@pytest.mark.parametrize("ctrl_c", [True, False])
def test_an_interrupted_training_goes_on_from_its_checkpoint(
    ctrl_c: bool, tmp_path: Path, model_dir: Path
) -> None:
    toy = toy_run.write_toy_model(tmp_path / "model", model_dir)
    config, run = toy_comparison(tmp_path, toy), tmp_path / "out/runs/undefended/narrow_seed3"
    # In the background of a script Ctrl-C is ignored, unless the recipe hears it.
    program = "import sys, signal\nfrom emarecipes.comparison.run import run_compare as run\n"
    program += "if __name__ == '__main__':\n    signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    program += "    sys.exit(run(sys.argv[1:]))\n"
    (tmp_path / "program.py").write_text(program)
    changes = ["~arms.fewer", "~arms.kl", "~arms.broken", "arms.undefended.overrides=[epochs=15]"]
    command = [str(tmp_path / "program.py"), "--config", str(config), *changes]
    first = toy_run.start(command)
    assert first.pid is not None
    wait_for(lambda: len(toy_run.metrics(run)) > 8, first)  # After the first adapter.
    # A terminal sends Ctrl-C to all processes, kill its signal to the one that it is told.
    os.killpg(first.pid, signal.SIGINT) if ctrl_c else os.kill(first.pid, signal.SIGTERM)
    _, said = first.communicate(timeout=120)
    assert first.returncode == 1
    assert said.splitlines()[-1] == "error: stopped; the same command goes on where it was"
    assert "Traceback" not in said
    heard = "stopping; once more to stop without the step under way; waiting for undefended, narrow"
    assert f"{'SIGINT' if ctrl_c else 'SIGTERM'}: {heard}" in said
    assert not (run / "compare.json").exists()
    [checkpoint] = (run / "checkpoints").glob("step_*")
    assert int(checkpoint.name.removeprefix("step_")) > 8

    second = toy_run.start(command)
    _, said = second.communicate(timeout=300)
    assert second.returncode == 0, said[-2000:]
    steps = [row["step"] for row in toy_run.metrics(run)]
    assert steps == list(range(1, 61))
    assert OmegaConf.load(run / "config.yaml").resume == "auto"


def wait_for(condition: Callable[[], bool], process: Any) -> None:
    while process.poll() is None:
        with contextlib.suppress(FileNotFoundError, ValueError):
            if condition():
                return
        time.sleep(0.05)
    raise AssertionError(process.communicate()[1])


def test_each_run_has_its_share_of_the_machine(
    tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw, origin = load_config(["--config", str(toy_comparison(tmp_path, model_dir)),
                               "runs_at_a_time=2", "nproc_per_node=2"])  # fmt: skip
    plan = check_compare_settings(raw, origin)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert slots(plan, origin) == [{"OMP_NUM_THREADS": "2"}] * 2
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3,6,7")
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in slots(plan, origin)] == ["2,3", "6,7"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    with pytest.raises(UserError, match=r"runs_at_a_time: .* need 4 GPUs, and .* 3"):
        slots(plan, origin)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("arms.kl.role=undefended", "one arm of role undefended; it has undefended and kl"),
        ("arms.undefended.role=defense", "one arm of role undefended; it has none"),
        ("arms.kl.colour=red", "arms.kl.colour: unknown key"),
        ("arms.kl.config=nowhere.yaml", "arms.kl.config: no such file: nowhere.yaml"),
        ("arms.kl.collect=[x]", "an arm has one of config and collect"),
        (
            "arms.old={collect: [x], adapter: adapter_avg}",
            "arms.old: overrides, sweep and adapter need a config",
        ),
        ("arms.kl.tasks=[benign]", "there is no task benign"),
        ("arms.kl.adapter=adapter_avg", "arms.kl: adapter: a run leaves adapter, and no adapter_a"),
        ("arms.kl.overrides=[lr]", "an override is written key=value"),
        ("arms.kl.overrides=[optimizer.lr=fast]", "arms.kl: "),
        ("arms.kl.overrides=[dataset.data_files=no.jsonl]", "data_files: no such file: no.jsonl"),
        ("arms.fewer.sweep.batch_size=[2,2]", "batch_size has a value twice"),
        ("seeds=[1,1]", "a seed is named twice"),
        ("seeds=[]", "seeds: "),
        ("~tasks.narrow", "arms that are trained need a task narrow"),
        ("bounds.effect_share=0", "bounds"),
        ("frozn=true", "unknown key (did you mean frozen?)"),
        ("tasks.narrow.evaluate.overrides=[max_row=2]", "unknown key (did you mean max_rows?)"),
        (
            (
                "tasks.narrow.generate={config: configs/smollm2_135m_generate.yaml, "
                "overrides: [max_question=2]}"
            ),
            "unknown key (did you mean max_questions?)",
        ),
    ],
)
def test_bad_input_is_one_line_before_anything_runs(
    change: str, message: str, tmp_path: Path, model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = toy_comparison(tmp_path, model_dir)
    assert run_compare(["--config", str(config), change]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]
    assert not (tmp_path / "out").exists()


def test_a_folder_that_another_comparison_writes_into(
    tmp_path: Path, model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, out = toy_comparison(tmp_path, model_dir), tmp_path / "out"
    give_back = claim(out, "there")
    assert run_compare(["--config", str(config)]) == 1
    give_back()
    assert f"output_dir: another process writes into {out} now" in capsys.readouterr().err
    assert not list(out.iterdir())
