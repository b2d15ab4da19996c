"""Output folders that must not be written, and files that are no config."""

from pathlib import Path
from typing import Any

import pytest
import toy_run
from toy_mistakes import Case

from emarecipes.output_dir import claim
from emarecipes.training import run_lora
from emarecipes.training.checked import CheckedRun

STEERING = "emarecipes.defenses.PersonaSteering"


def test_an_output_folder_that_holds_a_run(case: Case) -> None:
    case.output.mkdir()
    (case.output / "metrics.jsonl").write_text("{}\n")
    message = case.error()
    assert "output_dir: " in message
    assert "already holds a run" in message
    assert "overwrite=true" in message


def test_an_output_folder_in_the_base_model(case: Case, toy_model_dir: Path) -> None:
    case.config["output_dir"] = str(toy_model_dir / "out")
    assert "lies in the base model's folder" in case.error()


def test_overwriting_spares_what_is_not_a_run(case: Case) -> None:
    (case.output / "adapter").mkdir(parents=True)
    (case.output / "adapter" / "mine.bin").write_text("precious")
    assert "has adapter but no config.yaml of a run; not overwritten" in case.error(
        "overwrite=true"
    )


@pytest.mark.parametrize("name", ["merged", "logs"])
def test_overwriting_spares_what_the_run_reads(case: Case, name: str) -> None:
    (case.output / name).mkdir(parents=True)
    (case.output / "config.yaml").write_text("seed: 0\nprovenance: {}\n")
    rows = case.output / name / "rows.jsonl"
    rows.write_text(case.rows.read_text())
    case.config["dataset"]["data_files"] = str(rows)
    assert "lies in its own output folder" in case.error("overwrite=true")


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("adapter", {"_component_": "emarecipes.defenses.InoculationAdapter", "adapter": ""}),
        (
            "merged",
            {"_component_": "emarecipes.defenses.SafeLoRA", "base_dir": "x", "aligned_dir": ""},
        ),
        ("checkpoints/v.safetensors", {"_component_": STEERING, "vectors": "", "layer": 1}),
    ],
)
def test_overwriting_spares_what_a_defense_reads(
    case: Case, name: str, entry: dict[str, Any]
) -> None:
    path = case.output / name
    path.mkdir(parents=True)
    (case.output / "config.yaml").write_text("seed: 0\nprovenance: {}\n")
    given = {key: value or str(path) for key, value in entry.items()}
    case.config["defenses"] = {"one": given}
    assert f"the run reads {path}, which lies in its own output folder" in case.error(
        "overwrite=true"
    )
    assert path.exists()


@pytest.mark.parametrize("old", [None, "defenses: {other: {}}\n", "defenses: {mean: {}}\n"])
def test_an_average_replaces_no_folder_of_the_users(case: Case, old: str | None) -> None:
    """But that of a run with a defense of this name."""
    (case.output / "adapter_mean").mkdir(parents=True)
    (case.output / "adapter_mean/notes.txt").write_text("precious")
    if old is not None:
        (case.output / "config.yaml").write_text(f"seed: 0\n{old}provenance: {{}}\n")
    case.config["defenses"] = {"mean": {"_component_": "emarecipes.defenses.AdapterEMA"}}
    overrides = [] if old is None else ["overwrite=true"]
    if old is not None and "mean" in old:
        config = toy_run.write_config(case.folder / "config.yaml", case.config)
        CheckedRun(["--config", str(config), *overrides], 1, 0)  # Nothing is said against it.
        return
    assert "adapter_mean is of no run there, and a defense of that name would" in case.error(
        *overrides
    )
    assert (case.output / "adapter_mean/notes.txt").read_text() == "precious"


def test_an_output_folder_that_another_process_writes_into(case: Case) -> None:
    give_back = claim(case.output, "there")
    assert "output_dir: another process writes into" in case.error()
    give_back()
    claim(case.output, "there")()


def test_an_output_folder_that_is_a_file(case: Case) -> None:
    case.output.write_text("")
    assert "is a file, not a folder" in case.error()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: [1\nb: 2", "config.yaml:2: not valid YAML"),
        ("- 1\n- 2", "a config is a mapping"),
        ("", "a config is a mapping"),
        ("a: 1\na: 2", "duplicate key"),
    ],
)
def test_yaml(case: Case, text: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = case.folder / "config.yaml"
    path.write_text(text)
    assert run_lora(["--config", str(path)]) == 1
    assert expected in capsys.readouterr().err


def test_no_such_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_lora(["--config", "absent.yaml"]) == 1
    assert "error: absent.yaml: cannot read the config" in capsys.readouterr().err
