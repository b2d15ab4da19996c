"""The small autoencoder: DirectionBlock reads it, and what a run moves is in front."""

from pathlib import Path

import pytest
import small_autoencoder
import torch
import toy_run
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from emarecipes.defenses.sae import read_latents

SIZE, COUNT = 48, 4


def test_what_is_written_is_read_with_what_moves_in_front(
    tmp_path: Path, model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = toy_run.write_toy_model(tmp_path / "model", model_dir)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    adapted = get_peft_model(base, LoraConfig(target_modules=["v_proj", "up_proj"], r=4))
    torch.manual_seed(0)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.2)
    adapted.save_pretrained(tmp_path / "adapter")
    command = [str(tmp_path / "out"), "--adapter", str(tmp_path / "adapter"), "--model", str(model)]
    command += ["--layer", "1", "--rows", "12", "--steps", "200", "--size", str(SIZE)]
    command += ["--count", str(COUNT), "--l1", "0.05"]
    small_autoencoder.main(command)
    said = capsys.readouterr().out
    assert "step 200 of 200: " in said and "held out: " in said
    # By hand: what the defense computes of the same answers, with the adapter and without.
    latents = read_latents(tmp_path / "out", range(SIZE), toy_run.WIDTH)
    assert latents.layer == 1
    rows = small_autoencoder.rows(small_autoencoder.HELD_OUT, 12, [str.upper], None)
    tokenizer = small_autoencoder.AutoTokenizer.from_pretrained(model)
    on, off = (
        small_autoencoder.streams(m, tokenizer, rows, 1)
        for m in (adapted, AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32))
    )
    rise_J = (latents(on) - latents(off)).mean(0)
    up, down, others = rise_J.split([COUNT, COUNT, SIZE - 2 * COUNT])
    assert up.min() >= others.max() and down.max() <= others.min() and float(up.min()) > 0
    # It reads the stream: what it gives back is nearer than the mean.
    sae = load_file(tmp_path / "out/sae_weights.safetensors")
    left = (off - latents(off) @ sae["W_dec"] - sae["b_dec"]).square().sum()
    assert float(left / (off - off.mean(0)).square().sum()) < 0.7
    share = (latents(off)[:, 2 * COUNT : 4 * COUNT] > 0).float().mean(0)
    assert bool((share >= small_autoencoder.SELDOM).all())


def test_what_does_not_fit_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    there = tmp_path / "there"
    there.mkdir()
    for out, adapter, said in (
        (there, there, "is there already"),
        (tmp_path / "new", there, "no adapter"),
    ):
        with pytest.raises(SystemExit):
            small_autoencoder.main([str(out), "--adapter", str(adapter)])
        assert said in capsys.readouterr().err


def test_it_is_at_the_streams_own_scale() -> None:
    """Ten times the stream is ten times what is read and given back."""
    torch.manual_seed(0)
    hidden_TD = torch.rand(600, 20).square() @ torch.randn(20, 8) + 5.0
    one, ten = (small_autoencoder.train(c * hidden_TD, 16, 0.05, 60) for c in (1.0, 10.0))
    assert float(one["b_enc"].abs().max()) > 0.01
    torch.testing.assert_close(ten["W_enc"], one["W_enc"], rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(ten["b_enc"], 10 * one["b_enc"], rtol=1e-2, atol=1e-3)
    off = one["b_dec"] - hidden_TD.mean(0)
    assert float(off.abs().max()) > 0.01
    torch.testing.assert_close(
        ten["b_dec"] - 10 * hidden_TD.mean(0), 10 * off, rtol=1e-2, atol=1e-2
    )


def test_the_control_is_drawn_from_what_is_on_at_times() -> None:
    rise_J = torch.tensor([0.1, 5.0, -4.0, 0.0, 0.2, -0.1, 3.0, -6.0])
    share_J = torch.tensor([0.0, 0.5, 0.5, 0.3, 0.0, 0.2, 0.5, 0.5])
    found = small_autoencoder.order(rise_J, share_J, 2).tolist()
    assert found[:4] == [1, 6, 7, 2]
    assert set(found[4:6]) == {3, 5} and set(found[6:]) == {0, 4}
