"""The step against tests/reference.py: another implementation, slow and in float64."""

import itertools
from typing import Any

import pytest
import reference
import torch
from torchtune.modules.peft import get_adapter_params
from toy_models import toy_microbatches, toy_model

from emarecipes.defenses import Defense, KLToReference
from emarecipes.machine import keep_compiled_apart
from emarecipes.models.batch import Batch, make_batch
from emarecipes.training.step import TrainingLoss


def as_batches(microbatches: list[dict[str, Any]]) -> list[Batch]:
    """The same rows through our own collate."""
    from torchtune.data import padded_collate_sft

    batches = []
    for micro in microbatches:
        samples = [
            {
                "tokens": micro["tokens"][b, :length].tolist(),
                "labels": micro["labels"][b, :length].tolist(),
                "source": micro["sources"][b],
            }
            for b, length in enumerate(micro["lengths"])
        ]
        batches.append(make_batch(samples, range(len(samples)), padded_collate_sft, 0))
    return batches


def run(
    model: Any,
    defenses: dict[str, Defense],
    batches: list[Batch],
    chunk_elements: int = 61 * 3,
    **kwargs: Any,
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    loss = TrainingLoss(model, defenses, chunk_elements=chunk_elements, **kwargs)
    counts = loss.counts(batches)
    sums = sum(loss.backward(batch, counts) for batch in batches)
    values = loss.means(sums, counts)
    grads = {name: p.grad for name, p in get_adapter_params(model).items()}
    return values, grads


def assert_equal_to_reference(
    model: Any, kl: dict[str, Any] | None, microbatches: list[dict[str, Any]], **kwargs: Any
) -> None:
    expected, expected_grads = reference.loss_and_gradients(model, microbatches, kl=kl)
    defenses: dict[str, Defense] = {"kl": KLToReference(**kl)} if kl else {}
    values, grads = run(model, defenses, as_batches(microbatches), **kwargs)
    for name in values:
        assert values[name] == pytest.approx(expected[name], rel=2e-5, abs=1e-6), name
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        scale = max(expected_grads[name].abs().max().item(), 1e-4)
        torch.testing.assert_close(
            grad.double(), expected_grads[name], rtol=1e-3, atol=3e-5 * scale + 1e-8, msg=name
        )


KL = {
    "weight": 0.7,
    "direction": "policy_to_reference",
    "tokens": "response",
    "samples": "all",
    "temperature": 1.0,
}


@pytest.mark.parametrize(
    "family", ["llama3", "llama3_2", "qwen2_5", "qwen2_tied", "mistral", "gemma2", "phi3"]
)
def test_cross_entropy_and_kl_equal_the_reference(family: str) -> None:
    assert_equal_to_reference(toy_model(family), KL, toy_microbatches())


@pytest.mark.parametrize("family", ["llama3", "qwen2_5"])
@pytest.mark.parametrize("dora", [False, True])
def test_lora_on_an_untied_output_layer(family: str, dora: bool) -> None:
    model = toy_model(family, lora_output=True, dora=dora)
    assert_equal_to_reference(model, KL, toy_microbatches())


@pytest.mark.parametrize(
    ("direction", "tokens", "samples", "temperature"),
    itertools.product(
        ["policy_to_reference", "reference_to_policy", "symmetric"],
        ["response", "all"],
        ["all", "task", "safe"],
        [1.0, 2.5],
    ),
)
def test_every_option_of_kl(direction: str, tokens: str, samples: str, temperature: float) -> None:
    kl = {
        "weight": 0.3,
        "direction": direction,
        "tokens": tokens,
        "samples": samples,
        "temperature": temperature,
    }
    assert_equal_to_reference(toy_model("llama3_2"), kl, toy_microbatches())


def test_cross_entropy_alone() -> None:
    assert_equal_to_reference(toy_model("qwen2_5"), None, toy_microbatches())


@pytest.mark.parametrize("chunk_elements", [1, 61 * 2, 10**6])
def test_chunking_does_not_change_the_result(chunk_elements: int) -> None:
    kl = KL | {"tokens": "all"}
    microbatches = toy_microbatches()
    assert_equal_to_reference(toy_model("gemma2"), kl, microbatches, chunk_elements=chunk_elements)


@pytest.mark.early
def test_a_compiled_chunk_equals_the_reference() -> None:
    """Chunks of four rows and a last one of fewer, and the term on some of their rows."""
    model = toy_model("llama3", lora_output=True)
    kl = KL | {"samples": "safe", "direction": "symmetric"}
    keep_compiled_apart()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    assert_equal_to_reference(model, kl, toy_microbatches(), chunk_elements=61 * 4, compiled=True)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert not torch._dynamo.utils.counters["graph_break"]


def test_kl_is_exactly_zero_while_the_adapter_is() -> None:
    model = toy_model("llama3")
    for name, parameter in get_adapter_params(model).items():
        if "lora_b" in name:
            parameter.data.zero_()
    values, _ = run(model, {"kl": KLToReference()}, as_batches(toy_microbatches()))
    assert values["kl"] == 0.0


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_kl_is_not_negative(scale: float) -> None:
    for seed in range(5):
        torch.manual_seed(seed)
        log_p = torch.log_softmax(scale * torch.randn(50, 61), dim=-1)
        log_r = torch.log_softmax(log_p + 1e-3 * scale * torch.randn(50, 61), dim=-1)
        for direction in ("policy_to_reference", "reference_to_policy", "symmetric"):
            value = KLToReference(direction=direction).logit_term(log_p, log_r)
            assert value.min() > -1e-6


def test_two_reference_defenses_share_one_forward() -> None:
    model = toy_model("llama3_2")
    forwards = 0

    def count(*_: Any) -> None:
        nonlocal forwards
        forwards += 1

    model.tok_embeddings.register_forward_hook(count)
    batch = as_batches(toy_microbatches(n_micro=1))
    for defenses, expected in (
        ({}, 1),
        ({"a": KLToReference()}, 2),
        ({"a": KLToReference(), "b": KLToReference(tokens="all"), "c": Distance()}, 2),
    ):
        forwards = 0
        run(model, defenses, batch)
        assert forwards == expected


class Distance(Defense):
    """Squared distance of two layers' states, last layer's output included, summed over tokens."""

    needs_reference = True
    hidden_layers = (1, 2)

    def hidden_term(self, policy_hidden: Any, reference_hidden: Any, batch: Batch) -> torch.Tensor:
        mask = self.positions(batch)
        return sum(
            ((policy_hidden[i] - reference_hidden[i])[mask] ** 2).sum() for i in self.hidden_layers
        )


def test_hidden_states_are_those_that_hooks_see_and_carry_a_gradient() -> None:
    model = toy_model("llama3")
    batches = as_batches(toy_microbatches())
    seen: dict[bool, dict[int, torch.Tensor]] = {}
    hidden: dict[int, torch.Tensor] = {}
    handles = [
        layer.register_forward_hook(lambda _, __, out, i=i: hidden.__setitem__(i + 1, out))
        for i, layer in enumerate(model.layers)
    ]
    expected = 0.0
    for batch in batches:
        for adapters in (True, False):
            with reference.adapters(model, adapters), torch.no_grad():
                model(**batch.inputs)
            seen[adapters] = {i: h.double() for i, h in hidden.items()}
        mask = batch.labelled_BS
        expected += sum(float(((seen[True][i] - seen[False][i])[mask] ** 2).sum()) for i in (1, 2))
    for handle in handles:
        handle.remove()
    count = sum(int(batch.labelled_BS.sum()) for batch in batches)
    values, grads = run(model, {"d": Distance(weight=1e4)}, batches)
    assert values["d"] == pytest.approx(expected / count, rel=1e-5)
    model.zero_grad()
    _, alone = run(model, {}, batches)
    assert any(not torch.allclose(grads[n], alone[n]) for n in grads)


def test_logits_are_whole_outside_a_step() -> None:
    model = toy_model("gemma2")
    tokens = toy_microbatches()[0]["tokens"][:1, :5]
    expected = reference.full_logits(model, tokens, adapters_on=True)
    TrainingLoss(model, {})
    torch.testing.assert_close(model(tokens)[0].double(), expected, rtol=1e-4, atol=1e-5)
