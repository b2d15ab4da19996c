"""Order of rows, batches, packed rows, and the adapter's first values."""

import math
from itertools import chain
from typing import Any

import pytest
import torch
from torchtune.data import padded_collate_packed, padded_collate_sft
from torchtune.datasets import PackedDataset
from torchtune.modules.peft import get_adapter_params
from toy_models import toy_model

from emarecipes.datasets.defended_tokenizer import DefendedTokenizer
from emarecipes.datasets.rows import Rows, micro_batch_rows
from emarecipes.defenses import Defense
from emarecipes.models.batch import make_batch
from emarecipes.training.initialize import initialize_adapter


def order(size: int, per_step: int, **kwargs: Any) -> list[list[int]]:
    rows = Rows([{"tokens": [1, 2], "labels": [-100, 2]}] * size, dropped=0)
    return rows.steps(per_step, **kwargs)


def test_an_epoch_visits_each_row_once_in_an_order_of_its_own() -> None:
    first = order(22, 4, seed=3, epoch=0, shuffle=True)
    second = order(22, 4, seed=3, epoch=1, shuffle=True)
    assert [len(step) for step in first] == [4] * 5  # Two rows are left over.
    flat = [row for step in first for row in step]
    assert len(set(flat)) == 20
    assert set(flat) <= set(range(22))
    assert first == order(22, 4, seed=3, epoch=0, shuffle=True)
    assert first != second
    assert first != order(22, 4, seed=4, epoch=0, shuffle=True)
    assert order(5, 2, seed=3, epoch=0, shuffle=False) == [[0, 1], [2, 3]]


@pytest.mark.parametrize(("batch_size", "world_size"), [(4, 1), (2, 1), (2, 2), (1, 4), (1, 2)])
def test_every_way_of_splitting_a_step_has_the_same_rows(batch_size: int, world_size: int) -> None:
    rows = [9, 2, 7, 4]
    dealt = [
        block
        for rank in range(world_size)
        for block in micro_batch_rows(rows, batch_size=batch_size, rank=rank, world_size=world_size)
    ]
    assert all(len(block) == batch_size for block in dealt)
    assert sorted(row for block in dealt for row in block) == sorted(rows)
    assert len(dealt) == 4 // batch_size


def test_positions_of_a_padded_batch() -> None:
    samples = [
        {"tokens": [5, 6, 7, 8], "labels": [-100, -100, 7, 8], "source": "safe"},
        {"tokens": [5, 6], "labels": [5, -100]},
    ]
    batch = make_batch(samples, [3, 1], padded_collate_sft, pad_id=0, pad_to_multiple_of=6)
    # Task rows come first.
    assert batch.inputs["tokens"].tolist() == [[5, 6, 0, 0, 0, 0], [5, 6, 7, 8, 0, 0]]
    # Position s predicts token s + 1; the label of a row's first token has no position.
    assert batch.labelled_BS.int().tolist() == [[0] * 6, [0, 1, 1, 0, 0, 0]]
    assert batch.real_BS.int().tolist() == [[1, 0, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0]]
    assert batch.first_BS.int().tolist() == [[1, 0, 0, 0, 0, 0]] * 2
    assert batch.conversation_BS.tolist() == [[0, 0, -1, -1, -1, -1], [1, 1, 1, 1, -1, -1]]
    assert batch.targets_BS[1, 1:3].tolist() == [7, 8]
    assert batch.from_source("safe").tolist() == [False, True]
    assert batch.from_source("task").tolist() == [True, False]
    assert (batch.num_tokens, batch.rows) == (6, [1, 3])


@pytest.mark.parametrize("size", [7, 10])
def test_positions_of_packed_rows_stay_within_conversations(size: int) -> None:
    rows = [
        {"tokens": [1, 2, 3], "labels": [-100, 2, 3]},
        {"tokens": [4, 5, 6, 7], "labels": [-100, -100, 6, 7]},
    ]
    (pack,) = PackedDataset(rows, max_seq_len=size).packs
    batch = make_batch([pack], [0], padded_collate_packed, pad_id=0)
    padding = [0] * (size - 7)
    assert batch.real_BS[0].int().tolist() == [1, 1, 0, 1, 1, 1, 0, *padding]
    assert batch.labelled_BS[0].int().tolist() == [1, 1, 0, 0, 1, 1, 0, *padding]
    assert batch.num_tokens == 7


def test_a_pack_does_not_train_the_first_token_of_the_next_conversation() -> None:
    """With train_on_input every token has a label, the first too; what is before it is not its own.

    The same conversations unpacked train 2 and 3 tokens.
    """
    rows = [
        {"tokens": [1, 2, 3], "labels": [1, 2, 3]},
        {"tokens": [4, 5, 6, 7], "labels": [4, 5, 6, 7]},
    ]
    (pack,) = PackedDataset(rows, max_seq_len=9).packs
    packed = make_batch([pack], [0], padded_collate_packed, pad_id=0)
    assert packed.labelled_BS[0].int().tolist() == [1, 1, 0, 1, 1, 1, 0, 0, 0]
    apart = make_batch(rows, [0, 1], padded_collate_sft, pad_id=0)
    assert packed.targets_BS[packed.labelled_BS].tolist() == [2, 3, 5, 6, 7]
    assert apart.targets_BS[apart.labelled_BS].tolist() == [2, 3, 5, 6, 7]


def test_rows_of_one_source_keep_a_packs_conversations() -> None:
    """Their numbers begin at 0 and rise; what is real, trained and first stays so."""
    sizes = ((3, 4), (2, 5), (4, 3))
    samples = []
    for sizes_of_pack, source in zip(sizes, ("safe", "task", "safe"), strict=True):
        rows = [{"tokens": [7] * n, "labels": [-100] + [7] * (n - 1)} for n in sizes_of_pack]
        (pack,) = PackedDataset(rows, max_seq_len=9).packs
        samples.append(pack | {"source": source})
    batch = make_batch(samples, [0, 1, 2], padded_collate_packed, pad_id=0)
    assert batch.sources == ["task", "safe", "safe"]
    safe, task = batch.rows_of("safe"), batch.rows_of("task")
    assert task.conversation_BS.tolist() == [[0] * 2 + [1] * 5 + [-1] * 2]
    packs = [[0] * 3 + [1] * 4 + [-1] * 2, [2] * 4 + [3] * 3 + [-1] * 2]
    assert safe.conversation_BS.tolist() == packs
    for name in ("real_BS", "labelled_BS", "first_BS", "targets_BS", "offsets_BS"):
        assert torch.equal(getattr(safe, name), getattr(batch, name)[1:]), name
        assert torch.equal(getattr(task, name), getattr(batch, name)[:1]), name
    assert safe.offsets_BS.tolist()[0] == [0, 1, 2, 0, 1, 2, 3, -1, -1]
    assert (safe.num_tokens, task.num_tokens, safe.rows) == (14, 7, [0, 2])


def test_grouping_by_length_keeps_the_safe_rows_of_each_step() -> None:
    """Safe rows are all longer: sorted together, steps would be of safe rows or of task rows."""
    samples = [
        {"tokens": list(range(length)), "labels": list(range(length)), "source": source}
        for source, lengths in (("task", range(10, 40)), ("safe", range(60, 70)))
        for length in lengths
    ]

    def steps(grouped: bool) -> list[list[int]]:
        rows = Rows(samples, 0, "shuffle", 1.0, grouped)
        return rows.steps(4, seed=1, epoch=0, shuffle=True)

    def safe(of: list[list[int]]) -> list[int]:
        return sorted(sum(row >= 30 for row in step) for step in of)

    assert safe(steps(True)) == safe(steps(False))
    assert max(safe(steps(True))) < 4
    assert sorted(chain(*steps(True))) == sorted(chain(*steps(False)))
    # Task rows of a step are near in length: on the mean within a few tokens, and not 20.
    spreads = [max(t) - min(t) for s in steps(True) if len(t := [r for r in s if r < 30]) > 1]
    assert sum(spreads) / len(spreads) < 5


def test_first_values_depend_on_seed_and_name_alone() -> None:
    def values(seed: int, weights: int = 0, **kwargs: Any) -> dict[str, torch.Tensor]:
        model = toy_model("llama3_2", seed=weights, **kwargs)
        initialize_adapter(model, seed)
        params = get_adapter_params(model)
        return {n: p.detach() for n, p in params.items() if "lora_a" in n}

    all_layers, again, other = values(1), values(1, weights=5), values(2)
    fewer = values(1, lora_attn_modules=["v_proj"])
    for name, tensor in fewer.items():
        assert torch.equal(tensor, all_layers[name])
    for name, tensor in all_layers.items():
        assert torch.equal(tensor, again[name])
        assert not torch.equal(tensor, other[name])
        bound = 1 / math.sqrt(tensor.shape[1])
        assert bound * 0.8 < tensor.abs().max() <= bound
    assert len({tuple(t.flatten()[:4].tolist()) for t in all_layers.values()}) == len(all_layers)


def test_defenses_change_messages_before_they_are_tokenized() -> None:
    from torchtune.data import Message

    class Shout(Defense):
        def transform_messages(self, messages: list[Message], source: str) -> list[Message]:
            return [Message(m.role, f"{source}: {m.text_content}") for m in messages]

    class Tokenizer:
        pad_id = 9

        def __call__(self, sample: dict[str, Any], inference: bool = False) -> dict[str, Any]:
            return {"tokens": [m.text_content for m in sample["messages"]]}

    tokenizer = DefendedTokenizer(Tokenizer(), [Defense(), Shout()])
    messages = [Message("user", "a"), Message("assistant", "b")]
    assert tokenizer({"messages": messages}) == {"tokens": ["task: a", "task: b"]}
    assert tokenizer.pad_id == 9
