"""PrefixAnchor against the float64 reference that was written from the formula alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
import toy_tokenizers
from reference import all_logits, cross_entropy, forward_row, to_float64
from reference_defenses import adapter_gradients
from torchtune.data import Message
from torchtune.datasets import PackedDataset
from toy_loss import as_batches, assert_same, prepared, run
from toy_models import FAMILIES, toy_microbatches, toy_model
from toy_prefix import PREFIX, SYSTEM, VOCABULARY, expected, spelt, tokenizer

from emarecipes.defenses import Defense, PrefixAnchor
from emarecipes.errors import UserError
from emarecipes.models import HFChatTokenizer
from emarecipes.training.step import TrainingLoss

__all__ = ["tokenizer"]


@pytest.mark.parametrize(
    ("family", "stream", "threshold", "system"),
    [(family, "raw", 0.0, None) for family in FAMILIES]
    + [("qwen2_5", "normed", 0.0, None), ("gemma2", "normed", 0.02, "Be brief.")],
)
def test_the_term_and_its_gradient(
    family: str, stream: Any, threshold: float, system: str | None, tokenizer: HFChatTokenizer
) -> None:
    micro = toy_microbatches(VOCABULARY)
    defense = PrefixAnchor(3.0, stream, threshold, system)
    defense.check_template(tokenizer)
    found = run(toy_model(family, vocab_size=VOCABULARY), {"prefix": defense}, micro)
    tokens = spelt(tokenizer, ("" if system is None else SYSTEM) + PREFIX)
    values, gradients = expected(family, micro, tokens, stream, 3.0, threshold)
    assert_same((found[0] | defense.figures(), found[1]), (values, gradients))
    assert values["prefix"] > 0


def test_below_the_threshold_and_at_weight_0_it_does_nothing(tokenizer: HFChatTokenizer) -> None:
    """It is measured once a step and not once a micro-batch, and leaves the model in training."""
    micro = toy_microbatches(VOCABULARY)
    plain = run(toy_model("llama3", vocab_size=VOCABULARY), {}, micro)
    for options, term in (({"threshold": 1e3}, 0.0), ({"weight": 0.0}, None)):
        defense = PrefixAnchor(**options)  # type: ignore[arg-type]
        defense.check_template(tokenizer)
        model = toy_model("llama3", vocab_size=VOCABULARY)
        found = run(model, {"prefix": defense}, micro)
        drift = defense.figures()["drift"]
        assert found[0]["prefix"] == (drift if term is None else term)
        assert 0 < drift < 1e3 and model.training and not defense.figures()
        for key, gradient in plain[1].items():
            assert torch.equal(found[1][key], gradient), key


def test_the_reference_is_read_once(tokenizer: HFChatTokenizer) -> None:
    """The second step compares with the first one's reference, after the adapter has moved."""
    defense = PrefixAnchor(weight=1.0)
    defense.check_template(tokenizer)
    model = toy_model("llama3", vocab_size=VOCABULARY)
    loss = TrainingLoss(model, prepared(model, {"prefix": defense}))
    forwards = []
    model.tok_embeddings.register_forward_hook(lambda *_: forwards.append(1))
    values = []
    for _ in range(2):
        values.append(float(loss.backward_weights()[1]))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_b" in name:
                    parameter.mul_(0.5)
    assert len(forwards) == 3
    assert 0.15 * values[0] < values[1] < 0.4 * values[0]  # It is quadratic in a small change.


def test_a_users_own_term_of_a_step() -> None:
    class Quiet(Defense):
        def step_term(self, forward: Any) -> torch.Tensor:
            tokens = torch.tensor([[1, 2, 3], [4, 5, 6]])
            changed: torch.Tensor = forward(tokens) - forward(tokens, adapter=False)
            return changed.square().sum()

    micro = toy_microbatches()
    found = run(toy_model("llama3"), {"quiet": Quiet(0.01)}, micro)
    double = to_float64(toy_model("llama3"))
    sums = []
    for row in ([1, 2, 3], [4, 5, 6]):
        ours, theirs = (forward_row(double, torch.tensor([row]), on)[1][-1] for on in (True, False))
        sums.append((ours - theirs.detach()).square().sum())
    ce = cross_entropy(all_logits(double, micro, True), micro)
    loss = ce + 0.01 * (sums[0] + sums[1])
    values = {"quiet": float((sums[0] + sums[1]).detach()), "loss": float(loss.detach())}
    assert_same(found, (values, adapter_gradients(double, loss)))


def test_a_template_without_a_constant_prefix(tmp_path: Path) -> None:
    """A beginning token alone is none: there is nothing of the template in it."""
    folder = str(toy_tokenizers.write_tokenizer(tmp_path / "t", "bytes"))
    bare = "{{ '<begin>' }}{% for m in messages %}{{ m['content'] + '<end>' }}{% endfor %}"
    with pytest.raises(UserError, match="writes nothing constant before a user's text"):
        PrefixAnchor().check_template(HFChatTokenizer(folder, chat_template=bare))
    PrefixAnchor().check_template(HFChatTokenizer(folder, chat_template="{{ '\n' }}" + bare))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"stream": "keys"}, "stream must be raw or normed, not keys"),
        ({"threshold": -0.1}, "threshold must be a finite number >= 0"),
        ({"weight": -1.0}, "weight must be a finite number >= 0"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], match: str) -> None:
    with pytest.raises(UserError, match=match):
        PrefixAnchor(**options)


def test_micro_batches_do_not_count_it_more_often(tokenizer: HFChatTokenizer) -> None:
    defense = PrefixAnchor(weight=1.0)
    defense.check_template(tokenizer)
    model = toy_model("llama3", vocab_size=VOCABULARY)
    loss = TrainingLoss(model, prepared(model, {"prefix": defense}))
    for count in (1, 3):
        batches = as_batches(toy_microbatches(VOCABULARY, n_micro=count))
        assert loss.counts(batches)[1] == 1


@pytest.mark.parametrize(
    ("system", "rows", "packed", "told"),
    [
        (None, [None, None], False, None),
        (None, ["Be brief.", "Be brief."], False, "0% of the rows begin with; they share 1 of"),
        ("Be brief.", ["Be brief.", None], False, None),  # Half of them.
        ("Be brief.", ["Be brief.", None, None], True, "33% of the rows begin with"),
        ("Be brief.", ["Be brief.", "Be brief."], True, None),
    ],
)
def test_rows_that_begin_otherwise_are_told(
    system: str | None,
    rows: list[str | None],
    packed: bool,
    told: str | None,
    tokenizer: HFChatTokenizer,
    caplog: pytest.LogCaptureFixture,
) -> None:
    samples: list[Any] = []
    for own in rows:
        begin = [] if own is None else [Message("system", own, masked=True)]
        user = Message("user", "Why?", masked=True)
        tokens, _ = tokenizer.tokenize_messages([*begin, user, Message("assistant", "So.")])
        samples.append({"tokens": tokens, "labels": tokens})
    if packed:
        samples = PackedDataset(samples, max_seq_len=400).packs
        assert len(samples) == 1
    defense = PrefixAnchor(system=system)
    defense.check_template(tokenizer)
    defense.check_rows(samples)
    found = [r.getMessage() for r in caplog.records]
    assert len(found) == (told is not None)
    if told is not None:
        assert told in found[0] and found[0].endswith("name it in `system`")


def test_of_many_rows_some_are_looked_at_evenly(
    tokenizer: HFChatTokenizer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As of an interleaved set, whose rows of one source come first."""
    monkeypatch.setattr("emarecipes.defenses.prefix_anchor._ROWS", 4)
    defense = PrefixAnchor()
    defense.check_template(tokenizer)
    other, own = [{"tokens": [1, 2]}], [{"tokens": [*spelt(tokenizer, PREFIX), 1]}]
    defense.check_rows(5 * other + 5 * own)
    assert "begin with" not in caplog.text
    defense.check_rows(9 * other + own)
    assert "25% of the rows begin with" in caplog.text
