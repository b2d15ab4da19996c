"""Two launchers that meet at an address, as two nodes do: one process each."""

import socket
from pathlib import Path

import pytest
import toy_run

from emarecipes.training import run_lora


def run_two_launchers(*arguments: str, **more: str) -> str:
    """What they print, after both have ended well."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{probe.getsockname()[1]}"
    launch = [toy_run.TUNE, "run", "--nnodes", "2", "--nproc_per_node", "1", "--rdzv_id", "toy"]
    launch += ["--rdzv_backend", "c10d", "--rdzv_endpoint", endpoint, "recipes/ema_lora.py"]
    nodes = [toy_run.start([*launch, *arguments], **more) for _ in range(2)]
    printed = ""
    for node in nodes:
        stdout, stderr = node.communicate(timeout=300)
        assert node.returncode == 0, stderr[-3000:]
        printed += stdout
    return printed


@pytest.mark.early
def test_two_launchers_give_the_losses_of_one_process_over_a_stop(
    model_dir: Path, tmp_path: Path
) -> None:
    model = toy_run.write_toy_model(tmp_path / "model", model_dir)
    rows = toy_run.write_rows(tmp_path / "rows.jsonl", 12)
    config = toy_run.toy_config(model, rows, tmp_path / "one") | {"metric_logger": None}
    config |= {"shuffle": True, "max_steps_per_epoch": 3}
    config["defenses"] = {
        "kl": {"_component_": "emarecipes.defenses.KLToReference", "weight": 0.5},
        "signal": {"_component_": "toy_mishaps.SignalAfter"},
    }
    path = str(toy_run.write_config(tmp_path / "config.yaml", config))
    assert run_lora(["--config", path]) == 0

    two = ["--config", path, f"output_dir={tmp_path}/two", "batch_size=2", "resume=auto"]
    mishaps = {"PYTHONPATH": str(Path(toy_run.__file__).parent)}
    printed = run_two_launchers(*two, SIGNAL_AFTER="2", SIGNAL_RANK="1", **mishaps)
    advice = "Resume from step 2 with the same command on every node and resume=auto"
    assert printed.count(f"Stopped after step 2. {advice}\n") == 1
    assert not (tmp_path / "two/adapter").exists()
    before = (tmp_path / "two/metrics.jsonl").read_text()
    run_two_launchers(*two, **mishaps)
    # Times among them: these steps were not taken again.
    assert "tokens_per_second" in before
    assert (tmp_path / "two/metrics.jsonl").read_text().startswith(before)
    one, two_rows = toy_run.metrics(tmp_path / "one"), toy_run.metrics(tmp_path / "two")
    assert [row["step"] for row in one] == [row["step"] for row in two_rows] == [1, 2, 3]
    for expected, found in zip(one, two_rows, strict=True):
        for name in ("loss", "ce", "kl"):
            assert found[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6)
    assert (tmp_path / "two/adapter/adapter_config.json").is_file()
