"""PrefixAnchor read in the step's own forward: the same as by a forward of the prefix alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from toy_loss import as_batches, assert_same, prepared, run
from toy_models import FAMILIES, toy_microbatches, toy_model
from toy_prefix import PREFIX, VOCABULARY, expected, spelt, tokenizer

from emarecipes.defenses import Defense, PrefixAnchor
from emarecipes.errors import UserCodeError
from emarecipes.models import HFChatTokenizer
from emarecipes.training.gradients import Gradients
from emarecipes.training.step import TrainingLoss

__all__ = ["tokenizer"]


def rows_with(
    prefix: list[int], micros: list[dict[str, Any]], own: bool = True
) -> list[dict[str, Any]]:
    """The same rows, each behind the prefix, or (not `own`) behind another one."""
    begin = torch.tensor(prefix if own else [*prefix[:-1], prefix[-1] ^ 1])
    found = []
    for micro in micros:
        row_P = begin.expand(len(micro["tokens"]), -1)
        found.append(
            micro
            | {
                "tokens": torch.cat([row_P, micro["tokens"]], dim=1),
                "labels": torch.cat([torch.full_like(row_P, -100), micro["labels"]], dim=1),
                "lengths": [len(prefix) + length for length in micro["lengths"]],
            }
        )
    return found


def told_rows(defense: PrefixAnchor, micros: list[dict[str, Any]]) -> None:
    defense.check_rows(
        [
            {"tokens": row[:length].tolist(), "labels": row[:length].tolist()}
            for micro in micros
            for row, length in zip(micro["tokens"], micro["lengths"], strict=True)
        ]
    )


def forwards_of(model: Any) -> list[tuple[int, ...]]:
    """The shapes of what the model is run on from now on."""
    shapes: list[tuple[int, ...]] = []
    model.tok_embeddings.register_forward_hook(lambda _m, i, _o: shapes.append(tuple(i[0].shape)))
    return shapes


@pytest.mark.parametrize(
    ("family", "stream", "threshold"),
    [(family, "raw", 0.0) for family in FAMILIES]
    + [("qwen2_5", "normed", 0.0), ("gemma2", "normed", 0.02)],
)
def test_in_rows_that_begin_with_it_it_is_the_same(
    family: str, stream: Any, threshold: float, tokenizer: HFChatTokenizer
) -> None:
    """One forward of the prefix, for the reference, and its value and gradient in each step."""
    tokens = spelt(tokenizer, PREFIX)
    micro = rows_with(tokens, toy_microbatches(VOCABULARY, n_micro=3))
    defense = PrefixAnchor(3.0, stream, threshold)
    defense.check_template(tokenizer)
    told_rows(defense, micro)
    model = toy_model(family, vocab_size=VOCABULARY)
    shapes = forwards_of(model)
    found = run(model, {"prefix": defense}, micro)
    assert [shape for shape in shapes if shape == (1, len(tokens))] == [(1, len(tokens))]
    assert len(shapes) == 1 + len(micro)
    values, gradients = expected(family, micro, tokens, stream, 3.0, threshold)
    assert_same((found[0] | defense.figures(), found[1]), (values, gradients))
    assert values["prefix"] > 0


class Steers(Defense):
    """Changes the policy's forward, and so what a prefix in rows would be read from."""

    def setup(self, model: Any, context: Any) -> None:
        self._layer = model.layers[0]

    @contextmanager
    def policy_forward(self, batch: Any) -> Iterator[None]:
        hook = self._layer.register_forward_hook(lambda _m, _i, out: out + 1.0)
        try:
            yield
        finally:
            hook.remove()


@pytest.mark.parametrize(
    "why",
    ["other rows", "one other row", "dropout", "attention", "steered", "compiled", "told nothing"],
)
def test_where_rows_will_not_do_it_has_a_forward_of_its_own(
    why: str, tokenizer: HFChatTokenizer
) -> None:
    tokens = spelt(tokenizer, PREFIX)
    micro = rows_with(tokens, toy_microbatches(VOCABULARY, n_micro=2), own=why != "other rows")
    if why == "one other row":
        micro[1]["tokens"][-1, 0] += 1
    defense = PrefixAnchor(3.0)
    defense.check_template(tokenizer)
    if why != "told nothing":
        told_rows(defense, micro)
    model = toy_model("llama3", vocab_size=VOCABULARY)
    if why == "dropout":
        for module in model.modules():
            if hasattr(module, "lora_a"):
                module.dropout = torch.nn.Dropout(0.5)
    if why == "attention":
        model.layers[1].attn.attn_dropout = 0.5
    shapes = forwards_of(model)
    others: dict[str, Defense] = {"steers": Steers()} if why == "steered" else {}
    found = run(model, {"prefix": defense} | others, micro, compiled=why == "compiled")
    assert len([shape for shape in shapes if shape == (1, len(tokens))]) == 2
    values, _ = expected("llama3", micro, tokens, "raw", 3.0, 0.0)
    assert found[0]["prefix"] == pytest.approx(values["prefix"], rel=3e-5)


def test_in_rows_it_is_in_the_steps_and_terms_that_it_should_be(
    tokenizer: HFChatTokenizer,
) -> None:
    """At weight 0 measured alone; apart, or left out, as asked; in every step anew."""
    tokens = spelt(tokenizer, PREFIX)
    micro = rows_with(tokens, toy_microbatches(VOCABULARY, n_micro=2))
    plain = run(toy_model("llama3", vocab_size=VOCABULARY), {}, micro)
    batches = as_batches(micro)

    def prepare(weight: float) -> tuple[Any, TrainingLoss, list[tuple[int, ...]]]:
        defense = PrefixAnchor(weight)
        defense.check_template(tokenizer)
        told_rows(defense, micro)
        model = toy_model("llama3", vocab_size=VOCABULARY)
        loss = TrainingLoss(model, prepared(model, {"prefix": defense}))
        return model, loss, forwards_of(model)

    model, loss, shapes = prepare(0.0)  # By a forward of its own: no gradient is held for nothing.
    counts = loss.counts(batches)
    sums = [loss.backward(batch, counts) for batch in batches]
    assert float(loss.backward_weights()[1]) > 0 and len(shapes) == 4 and sums
    for key, gradient in plain[1].items():
        torch.testing.assert_close(dict(model.named_parameters())[key].grad, gradient)

    model, loss, shapes = prepare(1.0)
    values = []
    for only in (None, ["ce"], ["prefix"], ["ce", "prefix"]):
        loss.begin_step(1)
        for batch in batches:
            loss.backward(batch, counts, only=only)
        values.append(float(loss.backward_weights(only=only)[1]))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_b" in name:
                    parameter.mul_(0.5)
    # Reference and rows; rows without it; a forward of its own, no row being read; rows again.
    assert [shape[0] == 1 for shape in shapes] == [True, *[False] * 4, True, *[False] * 2]
    assert values[1] == 0.0 and values[0] > 4 * values[2] > 4 * values[3] > 0


def test_a_step_that_was_left_is_read_anew(tokenizer: HFChatTokenizer) -> None:
    tokens = spelt(tokenizer, PREFIX)
    micro = rows_with(tokens, toy_microbatches(VOCABULARY, n_micro=1))
    defense = PrefixAnchor(1.0)
    defense.check_template(tokenizer)
    told_rows(defense, micro)
    model = toy_model("llama3", vocab_size=VOCABULARY)
    loss = TrainingLoss(model, prepared(model, {"prefix": defense}))
    (batch,) = as_batches(micro)
    counts = loss.counts([batch])
    loss.backward(batch, counts)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_b" in name:
                parameter.zero_()
    loss.begin_step(2)
    loss.backward(batch, counts)
    assert float(loss.backward_weights()[1]) == pytest.approx(0.0, abs=1e-9)


def in_rows(tokenizer: HFChatTokenizer, weight: float = 1.0, **options: Any) -> PrefixAnchor:
    defense = PrefixAnchor(weight, **options)
    defense.check_template(tokenizer)
    return defense


def test_several_read_the_same_rows(tokenizer: HFChatTokenizer) -> None:
    """Each its reference by a forward in which none of the others looks."""
    tokens = spelt(tokenizer, PREFIX)
    micro = rows_with(tokens, toy_microbatches(VOCABULARY, n_micro=2))
    both = [in_rows(tokenizer, 3.0), in_rows(tokenizer, 2.0, stream="normed")]
    for defense in both:
        told_rows(defense, micro)
    model = toy_model("qwen2_5", vocab_size=VOCABULARY)
    shapes = forwards_of(model)
    found = run(model, {"a": both[0], "b": both[1]}, micro)
    assert [shape[0] == 1 for shape in shapes] == [True, True, False, False]
    raw, normed = (expected("qwen2_5", micro, tokens, s, w, 0.0) for s, w in
                   (("raw", 3.0), ("normed", 2.0)))  # fmt: skip
    plain = expected("qwen2_5", micro, tokens, "raw", 0.0, 0.0)[1]
    values = {"a": raw[0]["prefix"], "b": normed[0]["prefix"]}
    assert_same(found, (values, {k: raw[1][k] + normed[1][k] - g for k, g in plain.items()}))


def test_in_some_steps_it_weighs_as_much_more(tokenizer: HFChatTokenizer) -> None:
    tokens = spelt(tokenizer, PREFIX)
    micro = rows_with(tokens, toy_microbatches(VOCABULARY, n_micro=1))
    found = []
    for told in (True, False):
        defense = in_rows(tokenizer, 3.0, every_n_batches=2)
        if told:
            told_rows(defense, micro)
        model = toy_model("llama3", vocab_size=VOCABULARY)
        loss = TrainingLoss(model, prepared(model, {"prefix": defense}))
        step = next(s for s in (1, 2) if loss.begin_step(s) or "prefix" in loss.present)
        loss.begin_step(step)
        (batch,) = as_batches(micro)
        sums = loss.backward(batch, loss.counts([batch])) + loss.backward_weights()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        found.append((loss.means(sums, loss.counts([batch])), grads))
    assert_same(found[0], (found[1][0], {k: g.double() for k, g in found[1][1].items()}))


def test_asked_again_in_the_same_step_it_has_a_gradient(tokenizer: HFChatTokenizer) -> None:
    """As where a gradient that is not finite is traced to its term."""
    micro = rows_with(spelt(tokenizer, PREFIX), toy_microbatches(VOCABULARY, n_micro=1))
    defense = in_rows(tokenizer)
    told_rows(defense, micro)
    model = toy_model("llama3", vocab_size=VOCABULARY)
    loss = TrainingLoss(model, prepared(model, {"prefix": defense}))
    (batch,) = as_batches(micro)
    loss.backward(batch, loss.counts([batch]))
    first = loss.backward_weights()[1]
    gradients = Gradients(model, loss, 1, torch.device("cpu"))
    assert gradients.norm_of(["prefix"], [batch], loss.counts([batch])) > 0 and first > 0


class Doubled(PrefixAnchor):
    def step_term(self, forward: Any) -> torch.Tensor:
        return 2.0 * super().step_term(forward)


def test_a_subclass_with_a_term_of_its_own_is_heard(tokenizer: HFChatTokenizer) -> None:
    micro = rows_with(spelt(tokenizer, PREFIX), toy_microbatches(VOCABULARY, n_micro=1))
    values = []
    for kind in (PrefixAnchor, Doubled):
        defense = kind(1.0)
        defense.check_template(tokenizer)
        told_rows(defense, micro)
        model = toy_model("llama3", vocab_size=VOCABULARY)
        values.append(run(model, {"prefix": defense}, micro)[0]["prefix"])
    assert values[1] == pytest.approx(2.0 * values[0], rel=1e-5)


@pytest.mark.parametrize("what", ["tokens", "mask"])
def test_a_collate_that_changes_the_prefix_is_told(what: str, tokenizer: HFChatTokenizer) -> None:
    tokens = spelt(tokenizer, PREFIX)
    micro = rows_with(tokens, toy_microbatches(VOCABULARY, n_micro=1))
    defense = in_rows(tokenizer)
    told_rows(defense, micro)
    model = toy_model("llama3", vocab_size=VOCABULARY)
    loss = TrainingLoss(model, prepared(model, {"prefix": defense}))
    (batch,) = as_batches(micro)
    rows, length = batch.inputs["tokens"].shape
    if what == "tokens":
        batch.inputs["tokens"][0, len(tokens) - 1] += 1
    else:
        batch.inputs["mask"] = torch.ones(rows, length, length, dtype=torch.bool).tril(1)
    with pytest.raises(UserCodeError, match="a row that collate_fn made does not"):
        loss.backward(batch, loss.counts([batch]))
    if what == "mask":
        batch.inputs["mask"] = batch.inputs["mask"].tril()
        loss.backward(batch, loss.counts([batch]))
