"""Collected runs: each is one of its own, in the place of its seed."""

import json
import shutil
from pathlib import Path

import pytest
import toy_compare
import toy_run

from emarecipes.comparison.run import run_compare
from emarecipes.fingerprint import digest

ARMS = {"plain": "undefended", "short": "frontier", "kl": "defense"}


def collected(folder: Path, at: str = "") -> tuple[Path, dict[str, list[str]]]:
    """A config and its runs, of seeds 3 and 4; `at`: where an adapter is below its run."""
    runs: dict[str, list[str]] = {}
    for number, name in enumerate(ARMS):
        for seed in (3, 4):
            run = toy_compare.evaluation(
                folder / name / str(seed), {name: (0.9, 0.4)}, seed=10 * number + seed,
                trained=f"{name} {seed}",
            )  # fmt: skip
            trained = run / at
            trained.mkdir(exist_ok=True)
            (trained / "config.yaml").write_text(f"seed: {seed}\n")
            summary = json.loads((run / "summary.json").read_text())
            summary["adapters"][name]["folder"] = str(trained / "adapter")
            (run / "summary.json").write_text(json.dumps(summary))
            runs.setdefault(name, []).append(str(run))
    arms = {name: {"role": role, "collect": runs[name]} for name, role in ARMS.items()}
    config = {"output_dir": str(folder / "out"), "seeds": [3, 4], "arms": arms}
    return toy_run.write_config(folder / "compare.yaml", config), runs


def refused(config: Path, change: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert run_compare(["--config", str(config), change]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert not (config.parent / "out").exists()
    return line


@pytest.mark.parametrize("at", ["", "training"])
def test_runs_in_another_order_than_seeds(
    at: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, runs = collected(tmp_path, at)
    line = refused(config, f"arms.kl.collect={json.dumps(runs['kl'][::-1])}", capsys)
    assert f"arms.kl.collect: {runs['kl'][1]}: is of seed 4 (by its config.yaml) in " in line
    assert "the place of seed 3" in line
    assert "is of seed 3" in refused(config, "seeds=[7,4]", capsys)
    assert run_compare(["--config", str(config)]) == 0
    # Without a word of its seed a run is taken as it is given.
    for path in tmp_path.glob("kl/*/**/config.yaml"):
        path.write_text("{}")
    assert run_compare(["--config", str(config), "output_dir=" + str(tmp_path / "two")]) == 0


def test_a_run_for_two_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, runs = collected(tmp_path)
    first = runs["kl"][0]
    copy = shutil.copytree(first, tmp_path / "copy")
    (copy / "config.yaml").unlink()
    for other in (first, str(copy)):
        line = refused(config, f"arms.kl.collect={json.dumps([first, other])}", capsys)
        assert f"arms.kl.collect: {other}: has the adapter of arms.kl.collect, seed 3 too" in line
    line = refused(config, f"arms.kl.collect={json.dumps(runs['plain'])}", capsys)
    assert "has the adapter of arms.plain.collect, seed 3 too" in line
    for path in (tmp_path / "kl/3/config.yaml", tmp_path / "kl/4/config.yaml"):
        path.unlink()
    line = refused(config, f"arms.kl.collect=[{first}]", capsys)
    assert "arms.kl.collect: 1 run folders for 2 seeds" in line


def test_a_summary_whose_figures_lack_a_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, runs = collected(tmp_path)
    path = Path(runs["kl"][0]) / "summary.json"
    summary = json.loads(path.read_text())
    for figure in summary["figures"]:
        figure.pop("category")
        figure["adapter"] = "reference"
    path.write_text(json.dumps(summary))
    assert run_compare(["--config", str(config)]) == 1
    err = capsys.readouterr().err
    assert f"{path}: not an evaluation's summary (KeyError('category'))" in err
    assert "Traceback" not in err


def trained(run: Path, **entry: str) -> Path:
    """Weights in the run's folder, of which its evaluation is; what else its entry says."""
    (run / "adapter").mkdir()
    weights = run / "adapter/adapter_model.safetensors"
    weights.write_bytes(b"trained")
    summary = json.loads((run / "summary.json").read_text())
    summary["adapters"]["kl"] |= {"fingerprint": digest(weights)} | entry
    (run / "summary.json").write_text(json.dumps(summary))
    return weights


def test_an_adapter_that_changed_since_it_was_evaluated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As after `ema_lora overwrite=true` in a folder that holds an evaluation."""
    config, runs = collected(tmp_path)
    run = Path(runs["kl"][1])
    weights = trained(run)
    assert run_compare(["--config", str(config)]) == 0
    shutil.rmtree(tmp_path / "out")
    weights.write_bytes(b"trained anew")
    capsys.readouterr()
    line = refused(config, "title=x", capsys)
    assert f"arms.kl.collect: {run}: its evaluation is of another adapter than " in line


def test_an_evaluation_of_another_runs_adapter(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, runs = collected(tmp_path)
    run = Path(runs["kl"][1])
    (run / "adapter").mkdir()
    summary = json.loads((run / "summary.json").read_text())
    for folder, code in ((tmp_path / "short/3/adapter", 1), (run / "adapter_mean", 0)):
        summary["adapters"]["kl"]["folder"] = str(folder)
        (run / "summary.json").write_text(json.dumps(summary))
        assert run_compare(["--config", str(config)]) == code
        told = f"{run / 'summary.json'}: has no adapter of this run"
        assert (told in capsys.readouterr().err) == bool(code)


@pytest.mark.parametrize("moved", [True, False])
def test_a_run_that_was_moved_is_known_by_its_content(
    moved: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its evaluation names a folder that is not here; trained anew where it is now, it is told."""
    config, runs = collected(tmp_path)
    run = Path(runs["kl"][1])
    weights = trained(run, folder="elsewhere/adapter")
    if not moved:
        weights.write_bytes(b"trained anew")
    assert run_compare(["--config", str(config)]) == int(not moved)
    assert ("has no adapter of this run" in capsys.readouterr().err) == (not moved)
