"""InoculationAdapter against weights that hold it, in float64; where it acts; what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import all_logits, cross_entropy, kl_to_reference, to_float64
from reference_defenses import adapter_gradients
from safetensors.torch import load_file, save_file
from torchtune.modules.peft import disable_adapter, get_adapter_params
from torchtune.training import set_activation_checkpointing
from toy_loss import as_batches, assert_same, prepared
from toy_models import toy_microbatches, toy_model

from emarecipes.defenses import Defense, InoculationAdapter, KLToReference, ModelSource
from emarecipes.errors import UserError
from emarecipes.models.adapters.export import save_adapter
from emarecipes.training.step import TrainingLoss

RANK, ALPHA = 4, 8.0


@pytest.fixture
def trait(tmp_path: Path) -> Path:
    """The adapter of the same toy model with other random matrices."""
    return write(tmp_path, toy_model("llama3", seed=1))


def write(folder: Path, model: Any) -> Path:
    (folder / "base").mkdir()
    shape = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32}
    (folder / "base" / "config.json").write_text(json.dumps(shape))
    state = {name: p.detach().clone() for name, p in get_adapter_params(model).items()}
    save_adapter(
        state, model, "LLAMA3", folder / "base", folder / "trait", rank=RANK, alpha=ALPHA
    )  # fmt: skip
    return folder / "trait"


def source(trait: Path, **shape: Any) -> ModelSource:
    return ModelSource(toy_model("llama3", **shape), trait.parent / "base", "LLAMA3")


def step(
    model: Any, defenses: dict[str, Defense], trait: Path, micro: Any
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Figures and gradients of a step of all micro-batches."""
    loss = TrainingLoss(model, prepared(model, defenses, source(trait)))
    batches = as_batches(micro)
    counts = loss.counts(batches)
    sums = sum(loss.backward(batch, counts) for batch in batches)
    grads = {n: p.grad for n, p in get_adapter_params(model).items() if p.grad is not None}
    return loss.means(sums, counts), grads


def with_weights(strength: float) -> Any:
    """The toy model in float64, the trait's update added to its frozen weights."""
    double, other = to_float64(toy_model("llama3")), toy_model("llama3", seed=1).double()
    theirs = dict(other.named_modules())
    with torch.no_grad():
        for name, module in double.named_modules():
            if hasattr(module, "adapter_params"):
                a, b = theirs[name].lora_a.weight, theirs[name].lora_b.weight
                module.weight += strength * ALPHA / RANK * (b @ a)
    return double


@pytest.mark.parametrize("strength", [1.0, 0.3])
def test_the_policy_has_it_and_the_reference_has_not(strength: float, trait: Path) -> None:
    micro = toy_microbatches()
    double = with_weights(strength)
    policy = all_logits(double, micro, adapters_on=True)
    with torch.no_grad():
        reference = all_logits(to_float64(toy_model("llama3")), micro, adapters_on=False)
    ce = cross_entropy(policy, micro)
    kl = kl_to_reference(
        policy, reference, micro, direction="policy_to_reference", tokens="response", samples="all",
        temperature=1.0,
    )  # fmt: skip
    loss = ce + 0.5 * kl
    values = {"ce": float(ce.detach()), "kl": float(kl.detach()), "loss": float(loss.detach())}
    defenses: dict[str, Defense] = {
        "kl": KLToReference(weight=0.5, direction="policy_to_reference"),
        "trait": InoculationAdapter(str(trait), strength=strength),
    }
    found = step(toy_model("llama3"), defenses, trait, micro)
    assert_same(found, (values, adapter_gradients(double, loss)))
    assert 0 < defenses["trait"].figures()["ratio"] < 1


def test_outside_of_training_it_is_not_there(trait: Path) -> None:
    (micro,) = toy_microbatches(n_micro=1)
    plain, model = toy_model("llama3"), toy_model("llama3")
    defense = InoculationAdapter(str(trait))
    prepared(model, {"trait": defense}, source(trait))
    (batch,) = as_batches([micro])
    tokens = batch.inputs["tokens"]
    with torch.no_grad():
        with defense.policy_forward(batch):
            assert not torch.equal(model(tokens), plain(tokens))
        with disable_adapter(model), disable_adapter(plain):
            assert torch.equal(model(tokens), plain(tokens))
        assert torch.equal(model(tokens), plain(tokens))
        assert torch.equal(model.eval()(tokens), plain.eval()(tokens))
    assert get_adapter_params(model).keys() == get_adapter_params(plain).keys()


def test_the_control_has_the_same_norms_and_other_directions(trait: Path) -> None:
    given, control, again = (
        InoculationAdapter(str(trait), control=kind)
        for kind in ("none", "random", "random")
    )  # fmt: skip
    for defense in (given, control, again):
        defense.check(source(trait))
    assert len(given._factors) == 14
    for name, (a_RI, b_OR) in given._factors.items():
        one, other = (
            (b_OR @ a_RI).double(),
            (control._factors[name].b_OR @ control._factors[name].a_RI).double(),
        )
        assert float(other.norm()) == pytest.approx(float(one.norm()), rel=1e-5)
        cosine = float((one * other).sum() / (one.norm() * other.norm()))
        assert abs(cosine) < 0.3
        assert torch.equal(control._factors[name].b_OR, again._factors[name].b_OR)


def test_checkpointed_layers_have_it_in_the_backward_pass_too(trait: Path) -> None:
    """They run again there: without it the gradients would be those of another function."""
    micro = toy_microbatches()
    gradients = []
    for checkpointed in (False, True):
        model = toy_model("llama3")
        if checkpointed:
            set_activation_checkpointing(model, auto_wrap_policy={type(model.layers[0])})
        _, found = step(model, {"trait": InoculationAdapter(str(trait))}, trait, micro)
        wrapper = "_checkpoint_wrapped_module."
        gradients.append({name.replace(wrapper, ""): g for name, g in found.items()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


@pytest.mark.parametrize(("named", "told"), [("some/other", True), ("some/Base", False)])
def test_a_base_that_is_not_here_is_known_by_its_name(
    named: str, told: bool, trait: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = trait / "adapter_config.json"
    written = json.loads(file.read_text()) | {"base_model_name_or_path": named}
    file.write_text(json.dumps(written))
    InoculationAdapter(str(trait)).check(source(trait))
    said = f"adapter: {trait} was trained on some/other, and is put on {trait.parent / 'base'} here"
    assert (said in caplog.text) == told and bool(caplog.text) == told


def test_what_does_not_belong_is_refused(trait: Path, tmp_path: Path) -> None:
    for options, match in (
        ({"control": "noise"}, "control must be none or random, not noise"),
        ({"strength": 0.0}, "strength must be a finite number > 0, not 0"),
    ):
        with pytest.raises(UserError, match=match):
            InoculationAdapter(str(trait), **options)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"adapter: no such adapter folder"):
        InoculationAdapter(str(tmp_path / "none")).check(source(trait))
    small = source(trait, lora_rank=2)
    with pytest.raises(UserError, match=r"adapter: .*its rank is 4, the model's 2"):
        InoculationAdapter(str(trait)).check(small)
    weights = load_file(trait / "adapter_model.safetensors")
    zeroed = {k: v * 0 if "lora_B" in k else v for k, v in weights.items()}
    save_file(zeroed, trait / "adapter_model.safetensors")
    with pytest.raises(UserError, match="adds nothing: every B is 0; train it first"):
        InoculationAdapter(str(trait)).check(source(trait))
    (tmp_path / "output").mkdir()
    on_output = write(tmp_path / "output", toy_model("llama3", seed=1, apply_lora_to_output=True))
    with pytest.raises(UserError, match="adapts the output layer, where nothing can be added"):
        InoculationAdapter(str(on_output)).check(source(on_output, apply_lora_to_output=True))
