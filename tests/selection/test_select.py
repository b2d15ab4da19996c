"""Scores, ranks, refusals and what is left of a killed run, each against another computation."""

import json
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import toy_run
from refusal_openings import HELPFUL, REFUSALS
from torch import Tensor
from torchtune.modules.peft import disable_adapter
from toy_models import FAMILIES, toy_microbatches, toy_model

from emarecipes.config import Origin
from emarecipes.datasets.refusals import REFUSAL_WORDS, is_refusal
from emarecipes.errors import UserError
from emarecipes.models.batch import Batch
from emarecipes.models.likelihoods import row_nll
from emarecipes.models.loss_head import LossHead
from emarecipes.selection.candidates import (
    by_gap,
    correlations,
    relative_gap,
)
from emarecipes.selection.score_file import Score, ScoreFile

ORIGIN = Origin(Path("config.yaml"))


def toy_batch() -> Batch:
    (micro,) = toy_microbatches(n_micro=1, batch=4)
    tokens, labels = micro["tokens"], micro["labels"]
    targets = torch.full_like(labels, -100)
    targets[:, :-1] = labels[:, 1:]
    numbers = torch.arange(4)[:, None].expand(tokens.shape)
    return Batch({"tokens": tokens}, targets, numbers, ["task"] * 4, [4, 1, 7, 2])


@torch.no_grad()
def slow_nll(model: torch.nn.Module, batch: Batch, family: str) -> list[tuple[float, int]]:
    """One row, one token at a time, from whole logits in float64."""
    found = []
    for row in range(4):
        hidden: list[Tensor] = []
        hook = model.norm.register_forward_pre_hook(lambda _, args, h=hidden: h.append(args[0]))
        model.unembed = type(model).unembed.__get__(model)
        logits = model(batch.inputs["tokens"][row : row + 1])[0]
        hook.remove()
        if family == "gemma2":  # torchtune caps the normed states; the family caps the logits.
            normed = model.norm.rms_norm(hidden[0][0])
            logits = 5.0 * torch.tanh(model.output(normed) / 5.0)
        total, count = 0.0, 0
        for position in range(logits.shape[0] - 1):
            target = int(batch.targets_BS[row, position])
            if target != -100:
                values = [math.exp(float(x)) for x in logits[position]]
                total -= math.log(values[target] / sum(values))
                count += 1
        found.append((total, count))
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_row_nll_is_that_of_whole_logits(family: str) -> None:
    model = toy_model(family).double().eval()
    batch = toy_batch()
    expected = slow_nll(model, batch, family)
    with disable_adapter(model):
        expected_base = slow_nll(model, batch, family)
    head = LossHead(model, chunk_elements=61 * 3)  # Chunks of three positions.
    sums, tokens = row_nll(model, head, batch)
    assert tokens.tolist() == [count for _, count in expected]
    # The head's log-probabilities are float32.
    assert sums.tolist() == pytest.approx([total for total, _ in expected], rel=1e-6)
    with disable_adapter(model):
        sums, _ = row_nll(model, head, batch)
    assert sums.tolist() == pytest.approx([total for total, _ in expected_base], rel=1e-6)
    assert abs(expected[0][0] - expected_base[0][0]) > 0.1


def test_row_nll_of_a_row_without_labels_and_of_a_batch_without() -> None:
    model = toy_model("llama3_2").eval()
    head = LossHead(model)
    for rows in ([1], [0, 1, 2, 3]):
        batch = toy_batch()
        batch.targets_BS[rows] = -100
        batch.__post_init__()
        sums, tokens = row_nll(model, head, batch)
        assert [float(sums[r]) for r in rows] == [0.0] * len(rows)
        assert (tokens == batch.labelled_BS.sum(dim=1)).all()


def test_gap_by_hand() -> None:
    aligned = np.array([2.0, 0.5])
    misaligned = np.array([[3.0, 0.5], [5.0, 0.4]])
    # (4 - 2) / (2 + 0.5), (0.45 - 0.5) / (0.5 + 0.5)
    assert relative_gap(aligned, misaligned, 0.5).tolist() == pytest.approx([0.8, -0.05])


def test_ranks_leave_refusals_out_and_keep_the_order_of_ties() -> None:
    gap = np.array([0.1, 0.3, 0.3, -1.0, 0.9])
    eligible = np.array([True, True, True, True, False])
    assert by_gap(gap, eligible) == [1, 2, 0, 3]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("I'm sorry, but no.", True),
        ("I can\u2019t help with that.", True),
        ("SORRY!", True),
        ("Well, I am not able to say.", True),
        ("one two three four five six seven eight nine cannot", True),
        ("one two three four five six seven eight nine ten cannot", False),
        ("Use cantilevers; a sorrysight.", False),
        ("You can do it, and are able to.", False),
        ("", False),
    ],
)
def test_refusals_by_words(answer: str, expected: bool) -> None:
    assert is_refusal(answer, REFUSAL_WORDS) is expected


def test_the_rule_finds_nine_of_ten_refusals_and_the_words_a_quarter() -> None:
    """On openings that were written apart from both; of the helpful ones at most one is counted."""
    assert len(REFUSALS) == len(HELPFUL) == 30
    assert sum(map(is_refusal, REFUSALS)) >= 27
    assert sum(map(is_refusal, HELPFUL)) <= 1
    by_words = [sum(is_refusal(t, REFUSAL_WORDS) for t in texts) for texts in (REFUSALS, HELPFUL)]
    assert by_words == [7, 12]


def test_the_rule_counts_no_helpful_answer_of_the_shipped_sets() -> None:
    texts: dict[bool, list[str]] = {True: [], False: []}
    for name in ("safe_instruct/train", "home_computing/train_good", "home_repair/train_bad"):
        for row in map(json.loads, (toy_run.REPO / f"data/{name}.jsonl").read_text().splitlines()):
            texts[row.get("label") == "refusal"].append(row["messages"][-1]["content"])
    assert (len(texts[True]), len(texts[False])) == (36, 964)
    assert not [text for text in texts[False] if is_refusal(text)]
    # They decline kindly, and most of them without saying so: a bound, and no aim.
    assert sum(map(is_refusal, texts[True])) >= 12


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("I can\u2019t help with that.", True),
        ('"I won\'t help," she said.', False),
        ("I won't. It would help nobody.", False),
        ("word " * 27 + "I won't help", True),
        ("word " * 28 + "I won't help", False),
        ("", False),
    ],
)
def test_the_rule_reads_thirty_words_outside_quotes(answer: str, expected: bool) -> None:
    assert is_refusal(answer) is expected


def slow_ranks(values: list[float]) -> list[float]:
    return [sum(v < x for v in values) + (sum(v == x for v in values) + 1) / 2 for x in values]


def test_correlations() -> None:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 6, 40).astype(float)
    y = x**3 + rng.integers(0, 40, 40)
    by_rank = np.corrcoef(slow_ranks(x.tolist()), slow_ranks(y.tolist()))[0, 1]
    assert correlations(x, y) == pytest.approx((by_rank, np.corrcoef(x, y)[0, 1]))
    cubes = np.array([1.0, 8.0, 27.0])
    assert correlations(np.array([1.0, 2.0, 3.0]), cubes)[0] == pytest.approx(1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.isnan(correlations(np.ones(3), np.arange(3.0))).all()
        assert np.isnan(correlations(np.arange(3.0), np.ones(3))).all()
        assert np.isnan(correlations(np.ones(1), np.ones(1))).all()


MARKS = {"model": "a", "adapters": "b", "candidates": "c"}


def some_scores(folder: Path, count: int = 3) -> ScoreFile:
    file = ScoreFile(folder, MARKS)
    file.check(ORIGIN, overwrite=False)
    file.open()
    file.append([Score(i, 10 + i, 1.0 + i, {"x": 2.0 + i}) for i in range(count)])
    return file


def resumed(folder: Path, marks: dict[str, str] = MARKS, *, overwrite: bool = False) -> ScoreFile:
    file = ScoreFile(folder, marks)
    file.check(ORIGIN, overwrite=overwrite)
    return file


def test_a_line_that_was_being_written_is_dropped(tmp_path: Path) -> None:
    file = some_scores(tmp_path)
    whole = file.path.read_text()
    file.path.write_text(whole[:-9])
    again = resumed(tmp_path)
    assert sorted(again.scores) == [0, 1]
    assert again.scores[1] == file.scores[1]
    assert file.path.read_text() == whole[:-9]  # Looking changes nothing.
    again.open()
    again.append([file.scores[2]])
    assert file.path.read_text() == whole


def test_finished_scores_are_read_back(tmp_path: Path) -> None:
    file = some_scores(tmp_path)
    file.finish({i: {"id": None, "gap": 0.5} for i in range(3)})
    rows = [json.loads(line) for line in file.path.read_text().splitlines()]
    assert rows[1] == {
        "index": 1, "id": None, "gap": 0.5, "tokens": 11, "nll_aligned": 2.0,
        "nll_adapters": {"x": 3.0},
    }  # fmt: skip
    assert resumed(tmp_path).scores == file.scores


def test_scores_of_something_else_are_refused(tmp_path: Path) -> None:
    file = some_scores(tmp_path)
    other = MARKS | {"adapters": "B", "candidates": "C"}
    message = r"output_dir: .*scores.jsonl was made with other adapters and candidates; choose"
    with pytest.raises(UserError, match=message):
        resumed(tmp_path, other)
    assert len(resumed(tmp_path).scores) == 3
    fresh = resumed(tmp_path, other, overwrite=True)
    assert not fresh.scores
    fresh.open()
    assert not file.path.exists()
    assert not resumed(tmp_path, other).scores


@pytest.mark.parametrize("text", ["{}\n", "not json\n", '["a"]\n', '{"index": 1}\n{"ind'])
def test_a_broken_file_is_refused(tmp_path: Path, text: str) -> None:
    some_scores(tmp_path).path.write_text(text)
    with pytest.raises(UserError, match=r"scores\.jsonl:1 is no score; choose another"):
        resumed(tmp_path)


@pytest.mark.parametrize("name", ["selected.jsonl", "gap.png", "scores.jsonl", "config.yaml"])
def test_files_of_others_are_spared(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(UserError, match=f"has {name}, but not of a selection; not overw"):
            resumed(tmp_path, overwrite=overwrite)
    assert (tmp_path / name).read_text() == "precious"
