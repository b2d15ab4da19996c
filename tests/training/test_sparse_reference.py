"""`every_n_batches`: the dense gradient in expectation, and no reference where nothing needs it."""

import json
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
import toy_run
from safetensors.torch import load_file
from torch.testing import assert_close
from torchtune.data import padded_collate_sft
from torchtune.modules import TransformerDecoder
from torchtune.modules.peft import get_adapter_params
from toy_models import toy_microbatches, toy_model

from emarecipes.defenses import Defense, FeatureL2, KLToReference
from emarecipes.errors import UserError
from emarecipes.models.batch import Batch, make_batch
from emarecipes.training import run_lora
from emarecipes.training.gradients import Gradients
from emarecipes.training.step import TrainingLoss

EVERY = 4
KL: dict[str, Any] = {
    "weight": 0.7,
    "direction": "policy_to_reference",
    "tokens": "all",
    "samples": "all",
    "temperature": 1.0,
}


def as_batches(microbatches: list[dict[str, Any]]) -> list[Batch]:
    batches = []
    for micro in microbatches:
        rows = range(len(micro["lengths"]))
        samples = [
            {key: micro[key][b, : micro["lengths"][b]].tolist() for key in ("tokens", "labels")}
            for b in rows
        ]
        batches.append(make_batch(samples, rows, padded_collate_sft, pad_id=0))
    return batches


def features(every: int = 1) -> FeatureL2:
    defense = FeatureL2(weight=0.05, every_n_layers=1, every_n_batches=every)
    defense.hidden_layers = [1, 2]
    return defense


def gradients(model: Any, loss: TrainingLoss, batches: Any, step: int) -> Any:
    """The step's figures, and its gradient by parameter."""
    model.zero_grad()
    loss.begin_step(step)
    counts = loss.counts(batches)
    sums = sum(loss.backward(batch, counts) for batch in batches)
    found = {name: p.grad.double() for name, p in get_adapter_params(model).items()}
    return loss.means(sums, counts), found


def test_the_mean_over_a_block_of_steps_is_the_dense_gradient() -> None:
    model, batches = toy_model("qwen2_5", lora_output=True), as_batches(toy_microbatches())
    dense: dict[str, Defense] = {"kl": KLToReference(**KL), "l2": features()}
    sparse: dict[str, Defense] = {
        "kl": KLToReference(**KL, every_n_batches=EVERY),
        "l2": features(EVERY),
    }
    expected_values, expected = gradients(model, TrainingLoss(model, dense), batches, 1)
    for seed in (0, 1):
        loss = TrainingLoss(model, sparse, seed=seed)
        found = [gradients(model, loss, batches, step) for step in range(9, 9 + EVERY)]
        for name, gradient in expected.items():
            mean = sum(step[name] for _, step in found) / EVERY
            scale = float(gradient.abs().max())
            assert_close(mean, gradient, rtol=1e-4, atol=1e-5 * scale, msg=name)
        (with_term,) = (values for values, _ in found if "kl" in values)
        assert with_term["kl"] == pytest.approx(expected_values["kl"], rel=1e-6)
        assert with_term["l2"] == pytest.approx(expected_values["l2"], rel=1e-6)
        for values, _ in found:
            assert ("kl" in values) == ("l2" in values) == (values["loss"] - values["ce"] > 1e-3)
        mean_loss = sum(values["loss"] for values, _ in found) / EVERY
        assert mean_loss == pytest.approx(expected_values["loss"], rel=1e-6)


def test_a_step_with_the_term_is_the_reference_with_so_many_times_the_weight() -> None:
    model, microbatches = toy_model("llama3_2"), toy_microbatches()
    loss = TrainingLoss(model, {"kl": KLToReference(**KL, every_n_batches=EVERY)})
    steps = [gradients(model, loss, as_batches(microbatches), step) for step in range(1, EVERY + 1)]
    for values, found in steps:
        kl = KL | {"weight": EVERY * KL["weight"]} if "kl" in values else None
        _, expected = reference.loss_and_gradients(model, microbatches, kl=kl)
        for name, gradient in expected.items():
            scale = float(gradient.abs().max())
            assert_close(found[name], gradient, rtol=1e-3, atol=3e-5 * scale, msg=name)


def test_the_place_in_a_block_is_uniform_and_drawn_from_the_seed() -> None:
    model = toy_model("llama3_2")

    def places(every: int, blocks: int, seed: int) -> list[int]:
        loss = TrainingLoss(model, {"kl": KLToReference(every_n_batches=every)}, seed=seed)
        found = []
        for step in range(1, every * blocks + 1):
            loss.begin_step(step)
            if "kl" in loss.present:
                found.append(step - 1)
        assert [step // every for step in found] == list(range(blocks))
        return [step % every for step in found]

    drawn = places(EVERY, 400, seed=5)
    # 100 expected of each, with a standard deviation of 8.7.
    assert all(65 < drawn.count(place) < 135 for place in range(EVERY))
    assert drawn[:50] == places(EVERY, 50, seed=5) != places(EVERY, 50, seed=6)
    assert places(1, 10, seed=5) == [0] * 10


def test_the_reference_runs_only_where_a_defense_of_the_step_needs_it() -> None:
    model, batches = toy_model("llama3_2"), as_batches(toy_microbatches(n_micro=1))
    forwards: list[int] = []
    model.tok_embeddings.register_forward_hook(lambda *_: forwards.append(1))
    sparse = KLToReference(**KL, every_n_batches=EVERY)
    alone = TrainingLoss(model, {"kl": sparse})
    both = TrainingLoss(model, {"kl": sparse, "l2": features()})
    dense_alone = TrainingLoss(model, {"l2": features()})
    _, expected = gradients(model, dense_alone, batches, 1)
    counted: dict[bool, list[tuple[int, int]]] = {True: [], False: []}
    for step in range(1, EVERY + 1):
        numbers = []
        for loss in (alone, both):
            forwards.clear()
            model.output_hidden_states = [] if loss is alone else [1]
            model.unembed = loss.head
            values, found = gradients(model, loss, batches, step)
            numbers.append(len(forwards))
        assert values["l2"] > 0
        if "kl" not in values:  # As if there were no KL.
            for name, gradient in expected.items():
                assert_close(found[name], gradient, rtol=1e-5, atol=1e-8, msg=name)
        counted["kl" in values].append((numbers[0], numbers[1]))
    assert counted == {True: [(2, 2)], False: [(1, 2)] * (EVERY - 1)}


@pytest.mark.parametrize("seed", range(4))
def test_a_ratio_that_is_due_in_a_block_is_logged_where_the_term_is(seed: int) -> None:
    """Due at step 10, in the block of steps 9 to 12, and again at 60, in that of 57 to 60."""
    model, (batch,) = toy_model("llama3_2"), as_batches(toy_microbatches(n_micro=1))
    defenses: dict[str, Defense] = {"l2": features(EVERY)}
    loss = TrainingLoss(model, defenses, seed=seed)
    logged, present = [], []
    for step in (*range(5, 17), *range(57, 65)):
        loss.begin_step(step)
        if "l2" in loss.present:
            present.append(step)
        gradients = Gradients(model, loss, 1, torch.device("cpu"))
        before = ["l2_gradient_ratio"] if logged else []
        if gradients.ratios(step, [batch], loss.counts([batch]), defenses, before):
            logged.append(step)
    assert logged == [step for step in present if 9 <= step <= 12 or 57 <= step <= 60]
    assert len(logged) == 2


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("toy")
    model = toy_run.write_toy_model(folder / "model", model_dir)
    config = toy_run.toy_config(model, toy_run.write_rows(folder / "rows.jsonl", 14), folder)
    config["tokenizer"]["max_seq_len"] = 64
    component = "emarecipes.defenses."
    kl = {"_component_": component + "KLToReference", "weight": 0.5, "every_n_batches": 3}
    l2 = {"_component_": component + "FeatureL2", "weight": 0.02, "every_n_layers": 1}
    l2 |= {"every_n_batches": 3, "gradient_ratio_every": 5}
    return config | {
        "defenses": {"kl": kl, "l2": l2},
        "max_steps_per_epoch": None,
        "metric_logger": None,
        "shuffle": True,
        "batch_size": 2,
    }


def train(toy: dict[str, Any], folder: Path, **changes: Any) -> Any:
    folder.mkdir(exist_ok=True)
    config = json.loads(json.dumps(toy)) | {"output_dir": str(folder / "out")} | changes
    path = toy_run.write_config(folder / "config.yaml", config)
    assert run_lora(["--config", str(path)]) == 0
    adapter = load_file(folder / "out/adapter/adapter_model.safetensors")
    return toy_run.metrics(folder / "out"), adapter


def test_a_run_logs_the_term_where_it_was_and_resumes_exactly(
    toy: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forwards: list[int] = []
    forward = TransformerDecoder.forward

    def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
        forwards.append(1)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(TransformerDecoder, "forward", counting)
    rows, adapter = train(toy, tmp_path / "a", save_every_n_steps=2, keep_last=9)
    with_term = [row for row in rows if "kl" in row]
    # Seven steps: one in each of two blocks of three, and the seventh or not.
    assert [row["step"] for row in with_term if row["step"] < 7] == [
        step for step in range(1, 7) if "kl" in rows[step - 1]
    ]
    blocks = [(row["step"] - 1) // 3 for row in with_term]
    assert blocks[:2] == [0, 1]
    assert blocks[2:] in ([], [2])
    for row in rows:
        terms = 3 * (0.5 * row.get("kl", 0) + 0.02 * row.get("l2", 0))
        assert row["loss"] == pytest.approx(row["ce"] + terms, rel=1e-9)
        assert ("kl" in row) == ("l2" in row)
    assert with_term[-1]["kl"] > 0
    # Due in steps 5 and 10; the block of the former is steps 4 to 6.
    assert [row["step"] for row in rows if "l2_gradient_ratio" in row] == [with_term[1]["step"]]
    # The ratio's: cross entropy alone, which needs no reference, and the term with it.
    assert len(forwards) == len(rows) + len(with_term) + 3

    _, resumed = train(toy, tmp_path / "b", resume=str(tmp_path / "a/out/checkpoints/step_4"))
    assert all(tensor.equal(resumed[key]) for key, tensor in adapter.items())
    # A cache holds all that is asked for, and gives the same run.
    for folder in "cd":
        _, cached = train(toy, tmp_path / folder, reference_cache=str(tmp_path / "cache"))
        assert all(tensor.equal(cached[key]) for key, tensor in adapter.items())


def test_a_number_that_is_none_is_refused() -> None:
    for make in (KLToReference, FeatureL2):
        with pytest.raises(UserError, match="every_n_batches must be >= 1, not 0"):
            make(every_n_batches=0)
