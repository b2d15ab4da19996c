"""Input that is unusual and allowed, or allowed by others: it works, or one line says why not."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import toy_run

from emarecipes.errors import UserError
from emarecipes.training import run_lora
from emarecipes.training.checked import CheckedRun

LR = 1e-2


class Case:
    def __init__(self, folder: Path, model: Path) -> None:
        self.folder = folder
        self.config = toy_run.toy_config(model, folder / "rows.jsonl", folder / "out")
        self.config |= {"metric_logger": None, "max_steps_per_epoch": 2, "batch_size": 2}
        self.config["optimizer"] = self.config["optimizer"] | {"lr": LR}

    def data(self, *names: str) -> None:
        """Rows that tell their file and their place in it."""
        for name in names:
            rows = [{"messages": self.messages(f"{name} {i}")} for i in range(2)]
            path = self.folder / name
            path.parent.mkdir(exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    @staticmethod
    def messages(text: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": text}, {"role": "assistant", "content": "Yes."}]

    def check(self, data_files: Any = None, *overrides: str) -> CheckedRun:
        if data_files is not None:
            self.config["dataset"] = self.config["dataset"] | {"data_files": data_files}
        path = toy_run.write_config(self.folder / "config.yaml", self.config)
        return CheckedRun(["--config", str(path), *overrides], 1, 0)

    def texts(self, run: CheckedRun) -> list[str]:
        decoded = [run.tokenizer.decode(list(run.rows[i]["tokens"])) for i in range(len(run.rows))]
        return [text.split("user\n")[1].split("<|im_end|>")[0].split("\n")[0] for text in decoded]


@pytest.fixture
def case(tmp_path: Path, toy_model_dir: Path) -> Case:
    return Case(tmp_path, toy_model_dir)


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("part_*.jsonl", ["part_0.jsonl", "part_1.jsonl"]),
        ("part_[0].jsonl", ["part_0.jsonl"]),
        ("**/part_?.jsonl", ["part_0.jsonl", "part_1.jsonl", "deep/part_2.jsonl"]),
        (["other.jsonl", "part_1.*"], ["other.jsonl", "part_1.jsonl"]),
    ],
)
def test_patterns_of_files(case: Case, pattern: str | list[str], names: list[str]) -> None:
    case.data("part_0.jsonl", "part_1.jsonl", "deep/part_2.jsonl", "other.jsonl")
    patterns = [pattern] if isinstance(pattern, str) else pattern
    absolute = [f"{case.folder}/{one}" for one in patterns]
    run = case.check(absolute if isinstance(pattern, list) else absolute[0])
    expected = sorted(f"{name} {i}" for name in names for i in range(2))
    assert sorted(case.texts(run)) == expected
    assert sorted(path.relative_to(case.folder) for path in run.data_files) == sorted(
        map(Path, names)
    )


def test_a_mistake_in_one_file_of_a_pattern(case: Case) -> None:
    case.data("part_0.jsonl", "part_1.jsonl")
    with (case.folder / "part_1.jsonl").open("a") as file:
        file.write('{"messages": []}\n')
    with pytest.raises(UserError) as error:
        case.check(f"{case.folder}/part_*.jsonl")
    assert str(error.value).startswith(f"{case.folder}/part_1.jsonl:3: ")
    with pytest.raises(UserError, match=r"dataset\.data_files: no such file: .*/absent_\*\.jsonl"):
        case.check(f"{case.folder}/absent_*.jsonl")


def test_a_file_whose_name_looks_like_a_pattern(case: Case) -> None:
    """The library that reads it would take rows1.jsonl instead, without a word."""
    case.data("rows[1].jsonl", "rows1.jsonl")
    with pytest.raises(UserError, match=r"dataset\.data_files: .*/rows\[1\]\.jsonl is a file, but"):
        case.check(f"{case.folder}/rows[1].jsonl")


def test_a_stream_is_refused(case: Case) -> None:
    case.data("rows.jsonl")
    case.config["dataset"]["streaming"] = True
    with pytest.raises(UserError, match=r"config\.yaml:\d+: dataset\.streaming: every row is ch"):
        case.check()


def test_links_as_output_dir(case: Case) -> None:
    case.data("rows.jsonl")
    (case.folder / "gone").symlink_to(case.folder / "absent")
    for output in ("gone", "gone/below"):
        with pytest.raises(UserError, match=r"output_dir: .*/gone is a link to what is not there"):
            case.check(None, f"output_dir={case.folder}/{output}")
    assert not (case.folder / "absent").exists()
    (case.folder / "loop").symlink_to(case.folder / "loop")
    with pytest.raises(UserError, match=r"command line: output_dir: "):
        case.check(None, f"output_dir={case.folder}/loop")
    # A link to a folder is that folder.
    (case.folder / "disk").mkdir()
    (case.folder / "link").symlink_to(case.folder / "disk")
    case.check(None, f"output_dir={case.folder}/link")


def test_more_warm_up_than_steps(case: Case, caplog: pytest.LogCaptureFixture) -> None:
    """It trains, at the rates of the warm-up, and says that the rate asked for is not reached."""
    case.data("rows.jsonl")
    case.config["lr_scheduler"]["num_warmup_steps"] = 10
    case.config |= {"epochs": 2, "max_steps_per_epoch": 1}
    path = toy_run.write_config(case.folder / "config.yaml", case.config)
    with caplog.at_level(logging.WARNING):
        assert run_lora(["--config", str(path)]) == 0
    assert "num_warmup_steps: 10 of 2 steps are warm-up, so the learning rate never" in caplog.text
    # Of several processes the first says it.
    caplog.clear()
    CheckedRun(["--config", str(path), "overwrite=true", "batch_size=1"], 2, 1)
    assert "warm-up" not in caplog.text
    rates = [row["lr"] for row in toy_run.metrics(case.folder / "out")]
    assert rates == pytest.approx([0.0, LR / 10])
