"""Padding: its share in the log, and steps of rows of similar length."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
import toy_defenses
import toy_run
from safetensors.torch import load_file

from emarecipes.datasets.interleaved import Placement
from emarecipes.datasets.rows import Rows
from emarecipes.training import run_lora
from emarecipes.training.checked import CheckedRun


def make_rows(
    lengths: list[int], num_safe: int = 0, placement: Placement = "shuffle", grouped: bool = True
) -> Rows:
    samples = [
        {"tokens": [1] * n, "labels": [1] * n, "source": "safe" if i < num_safe else "task"}
        for i, n in enumerate(lengths)
    ]
    return Rows(samples, dropped=0, placement=placement, grouped=grouped)


def padding(steps: list[list[int]], lengths: list[int]) -> int:
    return sum(max(lengths[r] for r in step) - lengths[row] for step in steps for row in step)


def test_steps_of_similar_length_have_each_row_of_the_epoch_once() -> None:
    lengths = [1 + (37 * i) % 202 for i in range(202)]  # 1 to 202, in no order.
    plain, grouped = (
        make_rows(lengths, grouped=on).steps(4, seed=3, epoch=2, shuffle=True)
        for on in (False, True)
    )
    assert sorted(r for step in plain for r in step) == sorted(r for step in grouped for r in step)
    assert len({r for step in grouped for r in step}) == 200  # Two are left over in either.
    # One pool: four neighbours in length pad 3 + 2 + 1, unless one that is left over lies between.
    assert 50 * 6 <= padding(grouped, lengths) <= 50 * 6 + 2 * 3
    assert padding(plain, lengths) > 10_000
    firsts = [lengths[step[0]] for step in grouped]
    assert firsts != sorted(firsts)
    rows = make_rows(lengths)
    assert rows.steps(4, seed=3, epoch=2, shuffle=True) == grouped
    assert rows.steps(4, seed=3, epoch=1, shuffle=True) != grouped
    assert rows.steps(4, seed=4, epoch=2, shuffle=True) != grouped
    # Several pools; micro-batches of two within a step of four are sorted as well.
    many = [1 + (37 * i) % 202 for i in range(1000)]
    steps = make_rows(many).steps(4, seed=3, epoch=0, shuffle=True)
    assert sorted(row for step in steps for row in step) == list(range(1000))
    assert all([many[r] for r in step] == sorted(many[r] for r in step) for step in steps)
    assert len({steps[i][0] for i in range(250)}) == 250


def test_every_step_keeps_its_exact_share_of_safe_rows() -> None:
    lengths = [5 + (7 * i) % 40 for i in range(10)] + [60 + (31 * i) % 97 for i in range(30)]
    rows = make_rows(lengths, num_safe=10, placement="per_batch")
    steps = rows.steps(4, seed=0, epoch=0, shuffle=True)
    assert sorted(row for step in steps for row in step) == list(range(40))
    assert [sum(row < 10 for row in step) for step in steps] == [1] * 10
    plain = make_rows(lengths, num_safe=10, placement="per_batch", grouped=False)
    without = plain.steps(4, seed=0, epoch=0, shuffle=True)
    # Task rows alone, where the share of safe ones sets no bound: each source is sorted apart.
    task, task_without = ([[r for r in s if r >= 10] for s in found] for found in (steps, without))
    assert padding(task, lengths) < padding(task_without, lengths) / 5


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("toy")
    model = toy_run.write_toy_model(folder / "model", model_dir)
    config = toy_run.toy_config(model, toy_run.write_rows(folder / "rows.jsonl", 21), folder)
    config |= {"max_steps_per_epoch": None, "metric_logger": None, "shuffle": True}
    return config | {"optimizer": {"_component_": "torch.optim.AdamW", "lr": 2e-3}}


def write(toy: dict[str, Any], folder: Path, **changes: Any) -> str:
    folder.mkdir(exist_ok=True)
    config = json.loads(json.dumps(toy)) | {"output_dir": str(folder / "out")} | changes
    return str(toy_run.write_config(folder / "config.yaml", config))


def train(toy: dict[str, Any], folder: Path, **changes: Any) -> list[dict[str, float]]:
    assert run_lora(["--config", write(toy, folder, **changes)]) == 0
    return toy_run.metrics(folder / "out")


def test_the_logged_share_falls_and_the_split_of_a_step_changes_no_loss(
    toy: dict[str, Any], tmp_path: Path
) -> None:
    config = write(toy, tmp_path / "rows", group_by_length=True)
    rows = CheckedRun(["--config", config], 1, 0).rows
    lengths = [len(rows[i]["tokens"]) for i in range(len(rows))]
    shares = {}
    for on in (False, True):
        found = train(toy, tmp_path / f"grouped_{on}", group_by_length=on)
        shares[on] = [row["padding_share"] for row in found]
        if on:
            steps = rows.steps(4, seed=7, epoch=0, shuffle=True)
            by_hand = [
                padding([step], lengths) / (4 * max(lengths[r] for r in step)) for step in steps
            ]
            assert shares[on] == pytest.approx(by_hand, abs=1e-12)
    assert sum(shares[True]) < sum(shares[False]) / 2
    # Two micro-batches of two rows: as many padding tokens or fewer, and the same losses.
    split = train(
        toy,
        tmp_path / "split",
        group_by_length=True,
        batch_size=2,
        gradient_accumulation_steps=2,
    )
    assert [row["loss"] for row in split] == pytest.approx([r["loss"] for r in found], rel=1e-5)
    assert sum(row["padding_share"] for row in split) < sum(shares[True])


def test_a_resumed_run_goes_on_within_the_epoch(toy: dict[str, Any], tmp_path: Path) -> None:
    changes = {"group_by_length": True, "save_every_n_steps": 3, "keep_last": 9, "epochs": 2}
    whole = train(toy, tmp_path / "a", **changes)
    checkpoint = str(tmp_path / "a/out/checkpoints/step_3")
    train(toy, tmp_path / "b", **changes, resume=checkpoint)
    adapters = [
        load_file(tmp_path / name / "out/adapter/adapter_model.safetensors") for name in "ab"
    ]
    assert all(tensor.equal(adapters[1][key]) for key, tensor in adapters[0].items())
    assert len(whole) == 10


def test_what_cannot_be_grouped_is_one_clear_line(toy: dict[str, Any], tmp_path: Path) -> None:
    safe = toy_defenses.write_safe_rows(tmp_path / "safe.jsonl")
    every_k = toy_defenses.interleaved(toy["dataset"], safe, placement="every_k")
    packed = toy["dataset"] | {"packed": True}
    for changes, message in (
        ({"shuffle": False}, "group_by_length: needs shuffle: true"),
        ({"dataset": every_k}, "group_by_length: with placement every_k the order of rows is set"),
        ({"dataset": packed}, "group_by_length: packs all have one length"),
        ({"group_by_length": "yes"}, "group_by_length: input should be a valid boolean"),
    ):
        config = write(toy, tmp_path / "run", **({"group_by_length": True} | changes))
        with contextlib.redirect_stderr(io.StringIO()) as stderr:
            assert run_lora(["--config", config]) == 1
        lines = [x for x in stderr.getvalue().splitlines() if x.startswith("error: ")]
        assert len(lines) == 1
        assert message in lines[0]
    assert not (tmp_path / "run/out").exists()
