"""A disk that really gets full, in a file system of its own."""

import json
from pathlib import Path
from typing import Any

import pytest
import toy_disk
import toy_run
from safetensors.torch import load_file

from emarecipes.training import run_lora

CHECKPOINT = {f"run/checkpoints/step_2/{name}" for name in ("run.json", "SHA256SUMS")} | {
    "run/checkpoints/step_2/adapter.safetensors",
    "run/checkpoints/step_2/training.pt",
}


def test_a_full_disk_loses_nothing(tmp_path: Path, model_dir: Path) -> None:
    """See full_disk_run.py, which this runs, for what is written in which order."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if not toy_disk.possible():
        pytest.skip("no mount namespaces here")
    model = toy_run.write_toy_model(tmp_path / "model", model_dir)
    rows = toy_run.write_rows(tmp_path / "rows.jsonl", 16)
    config: dict[str, Any] = toy_run.toy_config(model, rows, disk / "run") | {
        "metric_logger": None,
        "save_every_n_steps": 2,
        "defenses": {"disk": {"_component_": "toy_mishaps.FillsDisk"}},
    }
    path = toy_run.write_config(tmp_path / "config.yaml", config)
    whole = tmp_path / "whole"
    assert run_lora(["--config", str(path), f"output_dir={whole}"]) == 0

    script = Path(toy_run.__file__).with_name("full_disk_run.py")
    kept = tmp_path / "resumed.safetensors"
    started = toy_run.start([str(script), str(path), str(disk), str(kept)])
    printed, errors = started.communicate(timeout=300)
    assert started.returncode == 0, errors[-3000:]
    found = {line["name"]: line for line in map(json.loads, printed.splitlines())}

    # A write that the disk refuses half way: one line, and the checkpoint before is what there is.
    half = found["checkpoint"]
    assert half["line"].startswith("checkpoint of step 2 not written: ")
    assert half["newest"] == 1
    assert not [name for name in half["files"] if "step_2" in name]

    # Room that is found to lack before the write.
    refused = found["no room for step 4"]
    assert (refused["code"], refused["traceback"]) == (1, False)
    error, advice = refused["said"]
    assert error.startswith("error: checkpoint of step 4 not written: it needs 1 MiB, and ")
    assert error.endswith("make room, or lower keep_last")
    assert advice.startswith("Resume from step 2 with: tune run recipes/ema_lora.py --config")
    files = {name for name in refused["files"] if "/step_" in name or "partial" in name}
    assert files == CHECKPOINT | {"run/checkpoints/step_2"}

    # With room again it goes on exactly.
    assert found["resumed"]["code"] == 0, errors[-3000:]
    expected = load_file(whole / "adapter/adapter_model.safetensors")
    for name, tensor in load_file(kept).items():
        assert tensor.equal(expected[name]), name

    # An adapter that does not fit leaves none, and the run that it would replace as it was.
    adapter = found["no room for the adapter"]
    assert (adapter["code"], adapter["traceback"]) == (1, False)
    assert adapter["said"] == [
        f"error: {disk}/run/adapter: No space left on device",
        "There is no checkpoint yet: start it again with overwrite=true",
    ]
    assert not [name for name in adapter["files"] if name.startswith(("run/adapter", "run/.adap"))]
    assert found["kept"]["same"]
