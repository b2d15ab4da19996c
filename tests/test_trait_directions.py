"""Directions of a trait by rule are those along which it changes answers."""

import json
from pathlib import Path

import pytest
import torch
import toy_run
import trait_directions
from safetensors.torch import load_file
from tokenizers import Tokenizer


def test_directions_of_the_embeddings(
    tmp_path: Path, model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = toy_run.write_toy_model(tmp_path / "model", model_dir)
    out = tmp_path / "new/out.safetensors"
    trait_directions.main([str(out), "--model", str(model), "--count", "8"])
    subspace_LKD = load_file(out)["subspace"].double()
    assert subspace_LKD.shape == (toy_run.LAYERS + 1, 4, toy_run.WIDTH)
    assert not subspace_LKD[-1].any()
    assert "after 0 layers: " in capsys.readouterr().out
    # By hand: before any layer an answer is the mean of its tokens' embeddings. Two are held out.
    table_VD = load_file(model / "model.safetensors")["model.embed_tokens.weight"].double()
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    rows = (toy_run.REPO / "data/safe_instruct/train.jsonl").read_text("utf-8").splitlines()[2:8]
    changes = []
    for row in rows:
        text = json.loads(row)["messages"][-1]["content"]
        pair = [tokenizer.encode(t, add_special_tokens=False).ids for t in (text.upper(), text)]
        upper_D, plain_D = (table_VD[ids[:80]].mean(0) for ids in pair)
        changes.append(upper_D - plain_D)
    change_ND = torch.stack(changes)
    _, _, right_ND = torch.linalg.svd(change_ND, full_matrices=False)
    found_KD, expected_KD = subspace_LKD[0], right_ND[:4]
    assert torch.allclose(found_KD.T @ found_KD, expected_KD.T @ expected_KD, atol=1e-4)
