"""torch's Muon over the adapter: on one process, on several, resumed; and what it cannot train."""

from pathlib import Path
from typing import Any

import fuzz_cases
import pytest
import torch
import toy_run
from ranks import run_ranks
from toy_defended import train, trained

from emarecipes.errors import UserError
from emarecipes.training.checked import CheckedRun
from emarecipes.training.muon import loses_momentum

WITHOUT = not hasattr(torch.optim, "Muon")
LR = 0.02


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("toy")
    tokenizer = fuzz_cases.write_toy_tokenizer(folder / "tokenizer")
    model = toy_run.write_toy_model(folder / "model", tokenizer, vocabulary=fuzz_cases.VOCABULARY)
    config = toy_run.toy_config(model, fuzz_cases.write_rows(folder / "rows.jsonl", 16), folder)
    config["model"]["vocab_size"] = fuzz_cases.VOCABULARY
    config["tokenizer"]["max_seq_len"] = 96
    config["optimizer"] = {"_component_": "torch.optim.Muon", "lr": LR, "weight_decay": 0.0}
    return config | {"metric_logger": None, "lr_scheduler": None, "max_steps_per_epoch": 4}


def write(toy: dict[str, Any], folder: Path, **changes: Any) -> Path:
    folder.mkdir()
    output = {"output_dir": str(folder / "out")}
    return toy_run.write_config(folder / "config.yaml", toy | output | changes)


@pytest.mark.skipif(WITHOUT, reason="torch 2.8 has no Muon")
def test_two_processes_accumulation_and_a_resumed_run_are_the_run_of_one(
    toy: dict[str, Any], tmp_path: Path
) -> None:
    """Matrices of rank 4 over two processes: orthogonalised by halves, they come out otherwise."""
    saving = {"save_every_n_steps": 2}
    one = train(write(toy, tmp_path / "one", batch_size=4, **saving))
    watched = toy["optimizer"] | {"_component_": "toy_muon.Watched"}
    halves = {"batch_size": 2, "optimizer": watched}
    accumulated = write(toy, tmp_path / "some", **halves, gradient_accumulation_steps=2)
    two = write(toy, tmp_path / "two", **halves, **saving)
    done = run_ranks(two)
    assert done.returncode == 0, done.stderr[-3000:]
    others = [train(accumulated), trained(tmp_path / "two")]
    for found, adapter in others:
        for row, expected in zip(found, one[0], strict=True):
            assert row["loss"] == pytest.approx(expected["loss"], rel=1e-3)
        # Muon rounds to bf16 and then makes small singular values large: 0.01 was seen. By halves
        # they are 0.3 and more apart.
        for name, tensor in one[1].items():
            assert float((adapter[name] - tensor).norm()) < 0.03 * float(tensor.norm()), name

    checkpoint = tmp_path / "two/out/checkpoints/step_2"
    again = write(toy, tmp_path / "again", **halves)
    done = run_ranks(again, f"resume={checkpoint}")
    assert done.returncode == 0, done.stderr[-3000:]
    resumed = trained(tmp_path / "again")
    assert resumed[0][-1] == trained(tmp_path / "two")[0][-1]
    assert all(tensor.equal(resumed[1][name]) for name, tensor in others[1][1].items())


@pytest.mark.skipif(WITHOUT, reason="torch 2.8 has no Muon")
def test_a_first_step_is_the_orthogonal_factor_of_the_gradient(
    toy: dict[str, Any], tmp_path: Path
) -> None:
    """B after one step, from 0: its singular values are all near the rate, as A's are of no step.

    Newton-Schulz leaves them between 0.7 and 1.2 of it, times sqrt(max(1, rows / columns)).
    """
    _, adapter = train(write(toy, tmp_path / "a", batch_size=4, max_steps_per_epoch=1))
    for name, b_OR in adapter.items():
        if "lora_B" in name:
            rate = LR * max(1.0, b_OR.shape[0] / b_OR.shape[1]) ** 0.5
            values = torch.linalg.svdvals(b_OR.double()) / rate
            assert float(values.min()) > 0.6 and float(values.max()) < 1.3, name


@pytest.mark.skipif(WITHOUT, reason="torch 2.8 has no Muon")
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.use_dora=true"], r"Muon is for matrices, and \S+magnitude \(32\) is none"),
        pytest.param(
            ["dtype=bf16", "optimizer.nesterov=false"],
            "with nesterov: false the Muon of torch 2",
            marks=pytest.mark.skipif(not loses_momentum(), reason="this torch keeps it"),
        ),
        (["optimizer.adjust_lr_fn=rms"], "Adjust learning rate function rms is not supported"),
    ],
)
def test_what_it_cannot_train_is_refused_before_weights(
    toy: dict[str, Any], tmp_path: Path, overrides: list[str], message: str
) -> None:
    path = write(toy, tmp_path / "a")
    with pytest.raises(UserError, match=message):
        CheckedRun(["--config", str(path), *overrides], 1, 0)
    CheckedRun(["--config", str(path), "optimizer.nesterov=false"], 1, 0)


def test_a_torch_without_it_is_named(
    toy: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    with pytest.raises(UserError, match=r"no Muon: it came with torch 2\.9, and this is torch 2\."):
        CheckedRun(["--config", str(write(toy, tmp_path / "a"))], 1, 0)


@pytest.mark.skipif(WITHOUT, reason="torch 2.8 has no Muon")
def test_which_torch_loses_the_momentum_that_is_refused() -> None:
    parameter = torch.nn.Parameter(torch.zeros(6, 9, dtype=torch.bfloat16))
    optimizer = torch.optim.Muon([parameter], nesterov=False)
    parameter.grad = torch.full((6, 9), 100.0, dtype=torch.bfloat16)
    optimizer.step()
    kept = float(optimizer.state[parameter]["momentum_buffer"].float().norm())
    expected = 1.0 if loses_momentum() else 0.05 * 100 * 54**0.5
    assert kept == pytest.approx(expected, rel=1e-2)
