"""A model whose weights come from files is built without drawing any."""

from pathlib import Path
from typing import Any

import pytest
import torch
import toy_models
import toy_run
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torchtune.modules.peft import DoRALinear

from emarecipes.config import load_config
from emarecipes.models._torchtune import model_on_meta
from emarecipes.models._torchtune_recipe import StockRecipe
from emarecipes.models._undrawn import Undrawn
from emarecipes.models.source import load_model
from emarecipes.training import run_lora
from emarecipes.training.settings import check_settings


def test_layers_begin_as_zeros_and_other_tensors_as_ever() -> None:
    before = torch.get_rng_state()
    with Undrawn():
        model = toy_models.BUILDERS["llama3"](
            ["q_proj"], vocab_size=7, num_layers=1, num_heads=2, num_kv_heads=2, embed_dim=8,
            intermediate_dim=8, max_seq_len=8, lora_rank=2, lora_alpha=2.0, use_dora=True,
        )  # fmt: skip
    assert torch.equal(torch.get_rng_state(), before)
    scales = {name for name, values in model.named_parameters() if "scale" in name}
    assert scales
    for name, values in model.named_parameters():
        if "magnitude" not in name:  # set with the base
            assert torch.equal(values, torch.full_like(values, float(name in scales))), name
    rope = [buffer for name, buffer in model.named_buffers() if "cache" in name]
    assert rope and all(bool((buffer != 0).any()) for buffer in rope)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_a_run_draws_nothing_for_the_base(
    dora: bool, tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = toy_config(tmp_path, model_dir)
    config["model"]["use_dora"] = dora
    build, built = StockRecipe.build_model, []

    def build_and_look(recipe: StockRecipe) -> Any:
        before = torch.get_rng_state()
        model = build(recipe)
        assert torch.equal(torch.get_rng_state(), before)
        built.extend(module for module in model.modules() if isinstance(module, DoRALinear))
        for module in built:
            torch.testing.assert_close(module.magnitude, module.weight.norm(dim=1))
        return model

    monkeypatch.setattr(StockRecipe, "build_model", build_and_look)
    assert run_lora(["--config", str(toy_run.write_config(tmp_path / "c.yaml", config))]) == 0
    assert bool(built) == dora


def test_an_evaluation_draws_nothing_for_the_base(tmp_path: Path, model_dir: Path) -> None:
    config = toy_config(tmp_path, model_dir)
    config["checkpointer"].pop("output_dir", None)
    before = torch.get_rng_state()
    model = load_model(OmegaConf.create(config | {"device": "cpu", "dtype": "fp32"}))
    assert torch.equal(torch.get_rng_state(), before)
    stored = load_file(tmp_path / "model/model.safetensors")
    assert torch.equal(model.tok_embeddings.weight, stored["model.embed_tokens.weight"])


def test_a_model_without_weights_is_built_without_a_draw(tmp_path: Path, model_dir: Path) -> None:
    """Three quarters of the time were its layers' draws of numbers that are nowhere."""
    file = toy_run.write_config(tmp_path / "c.yaml", toy_config(tmp_path, model_dir))
    raw, origin = load_config(["--config", str(file)])
    cfg = check_settings(raw, origin)
    with Recorded() as recorded:
        model_on_meta(cfg, origin)
    assert "aten::zero_" in recorded.names
    assert not {"aten::uniform_", "aten::uniform", "aten::normal_"} & recorded.names


class Recorded(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.names.add(func._schema.name)
        return func(*args, **(kwargs or {}))


def toy_config(folder: Path, model_dir: Path) -> dict[str, Any]:
    model = toy_run.write_toy_model(folder / "model", model_dir)
    rows = toy_run.write_rows(folder / "rows.jsonl", 4)
    return toy_run.toy_config(model, rows, folder) | {"output_dir": str(folder / "out")}
