"""The real lm-evaluation-harness on tasks from local files, against transformers and PEFT."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import toy_run
import yaml
from peft import PeftModel
from tokenizers import Tokenizer
from toy_eval import PAIRS, write_jsonl
from toy_select import read_jsonl, write_adapter
from transformers import AutoModelForCausalLM

from emarecipes.evaluation.run import run_eval

KEYS = ("output_dir", "tokenizer", "model", "checkpointer", "device", "dtype")
ROWS = [
    {"question": "Is the sea salt or sweet? It is", "choices": ["salt", "sweet"], "label": 0},
    {"question": "Two and two make", "choices": ["five", "four", "a long list"], "label": 1},
]
TASK = {
    "task": "toy_choice",
    "dataset_path": "json",
    "output_type": "multiple_choice",
    "test_split": "test",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "label",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}


GROUP = {
    "group": "toy_group",
    "task": ["toy_choice", "toy_first"],
    "aggregate_metric_list": [{"metric": "acc", "aggregation": "mean", "weight_by_size": True}],
}


def config_of(folder: Path, toy: Path, adapter: Path) -> dict[str, Any]:
    """A config that asks a group of two tasks, which are written."""
    (folder / "tasks").mkdir()
    for name, rows in {"toy_choice": ROWS, "toy_first": ROWS[:1]}.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        task = TASK | {"task": name, "dataset_kwargs": {"data_files": {"test": str(data)}}}
        (folder / f"tasks/{name}.yaml").write_text(yaml.safe_dump(task))
    (folder / "tasks/toy_group.yaml").write_text(yaml.safe_dump(GROUP))
    training = toy_run.toy_config(toy, folder / "none", folder / "out")
    return toy_run.with_variable({key: training[key] for key in KEYS}) | {
        "adapters": {"one": str(adapter)},
        "harness": {
            "tasks": ["toy_group"],
            "include_path": str(folder / "tasks"),
            "include_defaults": False,
        },
    }


def test_a_task_that_fails_costs_nothing_that_was_found(
    tmp_path: Path,
    model_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    toy = toy_run.write_toy_model(tmp_path / "model", model_dir)
    config = config_of(tmp_path, toy, write_adapter(tmp_path / "run/adapter", toy, seed=1))
    config["harness"]["tasks"] = ["toy_group", "toy_choice"]  # The group has the other one.
    config["probes"] = {"general": {"pairs": str(write_jsonl(tmp_path / "pairs.jsonl", PAIRS))}}
    path = toy_run.write_config(tmp_path / "config.yaml", config)
    assert run_eval(["--config", str(path)]) == 1
    assert "error: lm_eval failed: Duplicate task 'toy_choice'" in capsys.readouterr().err
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert list(summary["suites"]) == ["general"]
    assert {figure["suite"] for figure in summary["figures"]} == {"general"}


@torch.no_grad()
def log_likelihoods(model: torch.nn.Module, encode: Tokenizer) -> list[float]:
    """log p(choice | question) of every choice, summed over its tokens."""
    found = []
    for row in ROWS:
        before = encode.encode(row["question"], add_special_tokens=False).ids
        for choice in row["choices"]:
            text = f"{row['question']} {choice}"
            tokens = torch.tensor(encode.encode(text, add_special_tokens=False).ids)
            logits = model(input_ids=tokens[None]).logits[0, :-1].double()
            each = logits.log_softmax(-1).gather(1, tokens[1:, None])[:, 0]
            found.append(float(each[len(before) - 1 :].sum()))
    return found


def test_the_reference_has_no_adapter_and_the_adapter_is_not_merged(
    tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    toy = toy_run.write_toy_model(tmp_path / "model", model_dir)
    adapter = write_adapter(tmp_path / "run/adapter", toy, seed=1)
    path = toy_run.write_config(tmp_path / "config.yaml", config_of(tmp_path, toy, adapter))
    assert run_eval(["--config", str(path)]) == 0

    base = AutoModelForCausalLM.from_pretrained(toy, dtype=torch.float32)
    encode = Tokenizer.from_file(str(toy / "tokenizer.json"))
    expected = {"reference": log_likelihoods(base, encode)}
    expected["one"] = log_likelihoods(PeftModel.from_pretrained(base, adapter), encode)
    assert expected["one"] != pytest.approx(expected["reference"], abs=0.01)
    lines = read_jsonl(tmp_path / "out/scores/harness_toy_choice.jsonl")
    for name, wanted in expected.items():
        said = [r for line in lines if line["adapter"] == name for r in line["responses"]]
        values = [float(re.findall(r"-?\d+\.\d+", response)[0]) for response in said]
        assert values == pytest.approx(wanted, abs=1e-3)
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    found = summary["figures"]
    accuracy = {f["adapter"]: f["value"] for f in found if f["suite"] == "harness_toy_choice"}
    for name, wanted in expected.items():
        right = [wanted[0] > wanted[1], wanted[3] > max(wanted[2], wanted[4])]
        assert accuracy[name] == pytest.approx(sum(right) / 2)
        (group,) = [f for f in found if (f["suite"], f["adapter"]) == ("harness_toy_group", name)]
        # Its two questions, and the first of them once more.
        assert (group["figure"], group["n"], group["questions"]) == ("acc", 3, 3)
        assert group["value"] == pytest.approx((sum(right) + right[0]) / 3, abs=1e-5)
    assert {name: entry["questions"] for name, entry in summary["suites"].items()} == {
        "harness_toy_group": 3, "harness_toy_choice": 2, "harness_toy_first": 1,
    }  # fmt: skip
    assert summary["suites"]["harness_toy_group"]["tasks"] == ["toy_choice", "toy_first"]
