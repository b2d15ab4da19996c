"""AsFT against the dense projector in float64, on folders in Hugging Face's layout."""

from pathlib import Path
from typing import Any

import fuzz_cases
import pytest
import reference_new_defenses
import torch
import toy_defenses
import toy_run
from safetensors.torch import load_file
from torchtune.models.llama3_2 import lora_llama3_2
from torchtune.modules.peft import get_adapter_params, set_trainable_params
from toy_loss import as_batches, prepared
from toy_models import randomise, toy_microbatches

from emarecipes.defenses import AsFT, ModelSource
from emarecipes.errors import UserError
from emarecipes.training.step import TrainingLoss

HF = {"q_proj": "self_attn.q_proj", "k_proj": "self_attn.k_proj", "v_proj": "self_attn.v_proj"}
HF |= {"output_proj": "self_attn.o_proj", "w1": "mlp.gate_proj", "w2": "mlp.down_proj"}
HF |= {"w3": "mlp.up_proj"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pair")
    tokenizer = fuzz_cases.write_toy_tokenizer(folder / "tokenizer")
    aligned = toy_run.write_toy_model(
        folder / "aligned", tokenizer, vocabulary=fuzz_cases.VOCABULARY
    )
    return toy_defenses.write_base_of(aligned, folder / "base"), aligned


def model_of(folder: Path, **options: Any) -> Any:
    arguments = toy_run.toy_config(folder, Path(), Path())["model"] | options
    del arguments["_component_"]
    torch.manual_seed(0)
    model = lora_llama3_2(**arguments | {"vocab_size": fuzz_cases.VOCABULARY}).float()
    randomise(model)
    set_trainable_params(model, get_adapter_params(model))
    return model


def in_torchtunes_order(v: torch.Tensor, layer: str) -> torch.Tensor:
    """Rows of q and k: halves of each head become neighbours."""
    if layer not in ("q_proj", "k_proj"):
        return v
    size = toy_run.WIDTH // toy_run.HEADS
    return v.view(-1, 2, size // 2, v.shape[1]).transpose(1, 2).reshape(v.shape)


def test_value_and_gradient_are_the_dense_projectors(folders: tuple[Path, Path]) -> None:
    base, aligned = (load_file(folder / "model.safetensors") for folder in folders)
    model = model_of(folders[1])
    parameters = get_adapter_params(model)
    total = torch.zeros((), dtype=torch.float64)
    doubles: dict[str, torch.Tensor] = {}
    lora: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    changed: dict[str, torch.Tensor] = {}
    for name in (n for n in parameters if "lora_a" in n):
        twin = name.replace("lora_a", "lora_b")
        doubles |= {n: parameters[n].detach().double().requires_grad_() for n in (name, twin)}
        number, layer = name.split(".")[1], name.split(".")[-3]
        key = f"model.layers.{number}.{HF[layer]}.weight"
        v = in_torchtunes_order(aligned[key].double() - base[key].double(), layer)
        projector = v @ v.T / v.norm()
        update = (8 / 4) * doubles[twin] @ doubles[name]
        total = total + (update - projector @ update).square().sum()
        lora[name], changed[name] = (doubles[name], doubles[twin]), v
    same = reference_new_defenses.asft_penalty(
        lora, changed, {name: torch.zeros_like(v) for name, v in changed.items()}, scale=8 / 4
    )
    assert same.item() == pytest.approx(total.item(), rel=1e-9)
    same.backward()

    defense = AsFT(str(folders[0]), str(folders[1]), weight=0.3)
    source = ModelSource(model, folders[1], "LLAMA3_2")
    loss = TrainingLoss(model, prepared(model, {"asft": defense}, source))
    counts = loss.counts(as_batches(toy_microbatches()))
    value = loss.means(loss.backward_weights(), counts)["asft"]
    assert value == pytest.approx(total.item(), rel=1e-5)
    for name, matrix in doubles.items():
        assert matrix.grad is not None
        expected = 0.3 * matrix.grad
        torch.testing.assert_close(
            parameters[name].grad.double(),
            expected,
            rtol=1e-4,
            atol=1e-5 * float(expected.abs().max()),
            msg=name,
        )


def test_what_it_holds(folders: tuple[Path, Path]) -> None:
    defense = AsFT(str(folders[0]), str(folders[1]))
    model = model_of(folders[1])
    prepared(model, {"asft": defense}, ModelSource(model, folders[1], "LLAMA3_2"))
    shapes = [tuple(v.shape) for v, _ in defense._v.values()]
    held = sum(v.untyped_storage().nbytes() for v, _ in defense._v.values())
    assert len(shapes) == 14 and defense.kept_bytes(shapes, 4) == held


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base_dir": "none"}, "base_dir: no such folder"),
        ({"hold": "disk"}, "hold must be device or cpu"),
        ({"weight": -1.0}, "weight must be"),
        ("swapped", "are they swapped"),
        ("dora", "AsFT measures an update B A; DoRA's"),
    ],
)
def test_what_does_not_fit_is_refused(
    folders: tuple[Path, Path], change: Any, message: str
) -> None:
    base, aligned = map(str, folders)
    options: dict[str, Any] = {"base_dir": base, "aligned_dir": aligned}
    if change == "swapped":
        options = {"base_dir": aligned, "aligned_dir": base}
    elif change != "dora":
        options |= change
    model = model_of(folders[1], use_dora=change == "dora")
    with pytest.raises(UserError, match=message):
        AsFT(**options).check(ModelSource(model, folders[1], "LLAMA3_2"))
