"""Probes during training: they change nothing, and say what an evaluation says afterwards."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy_run
from ranks import run_ranks

from emarecipes.evaluation.run import run_eval
from emarecipes.training import run_lora

DEFENSES = {
    "kl": {"_component_": "emarecipes.defenses.KLToReference", "weight": 0.5},
    "feature_l2": {"_component_": "emarecipes.defenses.FeatureL2", "weight": 0.1, "layers": [1, 2]},
}
SUITES = {
    "general": {"pairs": "data/general_probe/select.jsonl"},
    "in_domain": {
        "good": "data/home_computing/heldout_good.jsonl",
        "bad": "data/home_computing/heldout_bad.jsonl",
        "condition": "inoculation",
    },
}
# 2 x 5 answers for 2 suites: three batches, the last one not full.
PROBE = {"suites": SUITES, "every_n_steps": 2, "max_rows": 5, "batch_size": 8}


@pytest.fixture(scope="module")
def toy_dir(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Path:
    return toy_run.write_toy_model(tmp_path_factory.mktemp("toy") / "model", model_dir, tied=False)


def first_rows(folder: Path, count: int) -> dict[str, Any]:
    """The suites over the first rows of their files alone."""
    suites: dict[str, Any] = {name: dict(suite) for name, suite in SUITES.items()}
    for suite in suites.values():
        for key in {"pairs", "good", "bad"} & suite.keys():
            lines = (toy_run.REPO / suite[key]).read_text().splitlines(keepends=True)[:count]
            file = folder / Path(suite[key]).name
            file.write_text("".join(lines))
            suite[key] = str(file)
    return suites


def write(toy_dir: Path, folder: Path, dropout: float, probe: Any) -> Path:
    folder.mkdir()
    rows = toy_run.write_rows(folder / "rows.jsonl")
    config = toy_run.toy_config(toy_dir, rows, folder / "out")
    config["model"] |= {
        "_component_": "torchtune.models.llama3.lora_llama3",
        "lora_dropout": dropout,
        "apply_lora_to_output": True,
    }
    del config["model"]["scale_factor"]
    config["checkpointer"]["model_type"] = "LLAMA3"
    config["tokenizer"]["max_seq_len"] = 256
    config |= {"defenses": DEFENSES, "max_steps_per_epoch": 3, "probe": probe}
    return toy_run.write_config(folder / "config.yaml", config)


def train(toy_dir: Path, folder: Path, dropout: float, probe: Any) -> list[dict[str, float]]:
    assert run_lora(["--config", str(write(toy_dir, folder, dropout, probe))]) == 0
    return toy_run.metrics(folder / "out")


def test_a_probed_run_has_the_losses_of_one_without(toy_dir: Path, tmp_path: Path) -> None:
    plain = train(toy_dir, tmp_path / "a", 0.2, None)
    probed = train(toy_dir, tmp_path / "b", 0.2, PROBE)
    skipped = {"tokens_per_second"}
    for without, with_probe in zip(plain, probed, strict=True):
        assert {k: with_probe[k] for k in without.keys() - skipped} == {
            k: without[k] for k in without.keys() - skipped
        }
    names = {
        f"probe_{suite}_{figure}"
        for suite in SUITES
        for figure in ("margin", "misaligned_share", "shift")
    }
    found = [{k for k in row if k.startswith("probe_")} for row in probed]
    assert found == [set(), names, names]  # Every second step, and the last one.


def test_probes_are_those_of_the_saved_adapter_and_of_two_processes(
    toy_dir: Path, tmp_path: Path
) -> None:
    suites = first_rows(tmp_path, 23)
    last = train(toy_dir, tmp_path / "a", 0.0, PROBE | {"suites": suites})[-1]
    config = tmp_path / "a/config.yaml"
    two = run_ranks(config, f"output_dir={tmp_path}/two", "batch_size=2")
    assert two.returncode == 0, two.stderr[-2000:]
    on_two = toy_run.metrics(tmp_path / "two")[-1]
    probed = {key: value for key, value in last.items() if key.startswith("probe_")}
    assert {key: on_two[key] for key in probed} == pytest.approx(probed, rel=1e-4, abs=1e-5)

    # The same questions, scored by the recipe for evaluation from the adapter's file.
    cfg: Any = toy_run.toy_config(toy_dir, tmp_path / "none", tmp_path / "out")
    trained = toy_run.OmegaConf.to_container(toy_run.OmegaConf.load(config))
    assert isinstance(trained, dict)
    evaluation = {key: trained[key] for key in ("tokenizer", "model", "checkpointer")}
    evaluation |= {key: cfg[key] for key in ("output_dir", "device", "dtype")}
    evaluation |= {"adapters": {"one": f"{tmp_path}/a/out/adapter"}, "probes": suites}
    path = toy_run.write_config(tmp_path / "eval.yaml", evaluation)
    assert run_eval(["--config", str(path)]) == 0
    for suite in SUITES:
        lines = (tmp_path / f"out/scores/{suite}.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        rows = [rows[place * len(rows) // 5] for place in range(5)]
        margin = np.mean([row["adapters"]["one"]["margin"] for row in rows])
        shift = np.mean([row["adapters"]["one"]["probe_shift"] for row in rows])
        assert last[f"probe_{suite}_margin"] == pytest.approx(margin, abs=2e-5)
        assert last[f"probe_{suite}_shift"] == pytest.approx(shift, abs=2e-5)
        assert abs(shift) > 1e-3


@pytest.mark.parametrize(
    ("probe", "reason"),
    [
        ({"suites": {}}, "probe.suites: dictionary should have at least 1 item"),
        ({"suite": SUITES}, "probe.suite: unknown key (did you mean suites?)"),
        (PROBE | {"every_n_steps": 0}, "probe.every_n_steps: input should be greater than or"),
        ({"suites": {"x": {"pairs": "none.jsonl"}}}, "probe.suites.x.pairs: no such file: none"),
        ({"suites": {"x": {"good": "a"}}}, "probe.suites.x: give `pairs`, a file"),
        ({"suites": {"x": {"pair": "a"}}}, "probe.suites.x.pair: unknown key (did you mean pairs?"),
        (
            {"suites": {"x": SUITES["general"] | {"condition": "domain_cue"}}},
            "probe.suites.x.condition: domain_cue needs the key training_questions",
        ),
        (
            {"suites": {"x": SUITES["general"] | {"system_prompt": "Hello."}}},
            "probe.suites.x.system_prompt: is for condition: training_system_prompt or inocul",
        ),
    ],
)
def test_a_wrong_probe_is_refused_before_weights(
    toy_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], probe: Any, reason: str
) -> None:
    config = write(toy_dir, tmp_path / "a", 0.0, probe)
    assert run_lora(["--config", str(config)]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert len([line for line in errors if line.startswith("error: ")]) == 1
    assert reason in errors[-1]
    assert not (tmp_path / "a/out").exists()


def test_a_probe_file_that_overwrite_would_replace_is_refused(
    toy_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = tmp_path / "a/out/logs/pairs.jsonl"
    config = write(toy_dir, tmp_path / "a", 0.0, {"suites": {"x": {"pairs": str(pairs)}}})
    pairs.parent.mkdir(parents=True)
    text = (toy_run.REPO / "data/general_probe/select.jsonl").read_text()
    pairs.write_text(text)
    (tmp_path / "a/out/config.yaml").write_text("seed: 1\nprovenance: {}\n")
    assert run_lora(["--config", str(config), "overwrite=true"]) == 1
    assert f"output_dir: the run reads {pairs}, which lies in" in capsys.readouterr().err
    assert pairs.read_text() == text
