"""Our harness beside lm_eval's own `hf` model, on folders whose tokenizers begin differently."""

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import toy_run
import yaml
from toy_select import read_jsonl, write_adapter
from toy_tokenizers import KINDS, PRINTS_THE_DAY, write_tokenizer

from emarecipes.evaluation.run import run_eval

lm_eval = pytest.importorskip("lm_eval")

KEYS = ("output_dir", "tokenizer", "model", "checkpointer", "device", "dtype")
VOCABULARY, NEW_TOKENS = 500, 12
ROWS = [
    {"question": "Is the sea salt or sweet? It is", "choices": ["salt", "sweet"], "label": 0},
    {"question": "Two and two make", "choices": ["five", "four", "a long list"], "label": 1},
    {"question": "A file that you need is", "choices": ["kept", "deleted"], "label": 0},
    {"question": "Updates are", "choices": ["to be installed", "not"], "label": 0},
]
CHOICE: dict[str, Any] = {
    "task": "toy_choice", "dataset_path": "json", "output_type": "multiple_choice",
    "test_split": "test", "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}",
    "doc_to_target": "label",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}  # fmt: skip
OPEN = CHOICE | {
    "task": "toy_open", "output_type": "generate_until", "doc_to_target": "{{choices[label]}}",
    "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": NEW_TOKENS},
    "filter_list": [
        {"name": "whole", "filter": [{"function": "take_first"}]},
        {"name": "letter", "filter": [{"function": "regex", "regex_pattern": "([a-z])"},
                                      {"function": "take_first"}]},
    ],
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}  # fmt: skip
del OPEN["doc_to_choice"]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    # What lm_eval adds to its result of the machine: it asks pip, for seconds each time.
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda _: None)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for task in (CHOICE, OPEN):
        kwargs = {"data_files": {"test": str(data)}}
        (folder / f"{task['task']}.yaml").write_text(
            yaml.safe_dump(task | {"dataset_kwargs": kwargs})
        )
    return folder


def write_model(folder: Path, kind: str) -> Path:
    tokens = write_tokenizer(folder / "tokenizer", kind, VOCABULARY)
    return toy_run.write_toy_model(folder / "model", tokens, vocabulary=VOCABULARY)


def write_config(folder: Path, toy: Path, harness: dict[str, Any], adapters: dict[str, str]) -> str:
    training = toy_run.toy_config(toy, folder / "none", folder / "out")
    training["model"]["vocab_size"] = VOCABULARY
    config = toy_run.with_variable({key: training[key] for key in KEYS}) | {
        "adapters": adapters,
        "harness": {"tasks": ["toy_choice", "toy_open"]} | harness,
    }
    return str(toy_run.write_config(folder / "config.yaml", config))


class LeapDay(datetime):
    @classmethod
    def now(cls, tz: Any = None) -> "LeapDay":
        return cls(2024, 2, 29, 15, 30)


CHAT = {"apply_chat_template": True, "num_fewshot": 2}


@pytest.mark.parametrize("options", [{}, CHAT])
@pytest.mark.parametrize("kind", KINDS)
def test_it_finds_what_lm_evals_own_model_finds(
    kind: str,
    options: dict[str, Any],
    tasks: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(toy_run, "VOCABULARY", VOCABULARY)
    toy = write_model(tmp_path, kind)
    adapter = write_adapter(tmp_path / "run/adapter", toy, seed=1)
    harness = {"batch_size": 3, "include_path": str(tasks), "include_defaults": False}
    harness |= options
    config = write_config(tmp_path, toy, harness, {"one": str(adapter)})
    prints_the_day = kind == PRINTS_THE_DAY and "apply_chat_template" in options
    day = ["tokenizer.date=2024-02-29"] if kind == PRINTS_THE_DAY else []
    assert run_eval(["--config", config, *day]) == 0
    if prints_the_day:  # transformers is told by the clock alone.
        monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", LeapDay)
        assert yaml.safe_load((tmp_path / "out/eval.yaml").read_text())["harness"]["date"]
    for name, peft in (("reference", {}), ("one", {"peft": str(adapter)})):
        theirs = own_model(toy, tasks, options, peft)
        for task in ("toy_choice", "toy_open"):
            lines = read_jsonl(tmp_path / f"out/scores/harness_{task}.jsonl")
            mine = [line for line in lines if line["adapter"] == name]
            ours = {(line["id"], line["filter"]): line for line in mine}
            filters = ["whole", "letter"] if task == "toy_open" else ["none"]
            assert len(ours) == len(mine) == len(ROWS) * len(filters)
            for sample in theirs["samples"][task]:
                line = ours[str(sample["doc_id"]), sample["filter"]]
                assert line["question"] == str(sample["arguments"][0][0])
                assert ("29 Feb 2024" in line["question"]) == prints_the_day
                if task == "toy_open":
                    assert line["responses"] == sample["filtered_resps"]
                    assert line["exact_match"] == sample["exact_match"]
                    continue
                wanted = [value for value, _ in sample["filtered_resps"]]
                said = [float(text.strip("()").split(",")[0]) for text in line["responses"]]
                assert said == pytest.approx(wanted, abs=1e-3)
                assert line["acc"] == sample["acc"]


def own_model(toy: Path, tasks: Path, options: dict[str, Any], peft: dict[str, str]) -> Any:
    from lm_eval.tasks import TaskManager

    return lm_eval.simple_evaluate(
        "hf", {"pretrained": str(toy), "dtype": "float32", **peft}, ["toy_choice", "toy_open"],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False), batch_size=3,
        device="cpu", fewshot_as_multiturn="apply_chat_template" in options, **options,
    )  # fmt: skip


def test_a_chat_template_that_is_not_there_is_told_before_weights(
    tasks: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(toy_run, "VOCABULARY", VOCABULARY)
    toy = write_model(tmp_path, "none")
    settings = json.loads((toy / "tokenizer_config.json").read_text())
    template = settings.pop("chat_template")
    (toy / "tokenizer_config.json").write_text(json.dumps(settings))
    harness = {"include_path": str(tasks), "include_defaults": False, "apply_chat_template": True}
    config = Path(write_config(tmp_path, toy, harness, {}))
    # What our own suites need; the harness takes the folder's, as lm_eval does.
    written = yaml.safe_load(config.read_text())
    written["tokenizer"]["chat_template"] = template
    config.write_text(yaml.safe_dump(written))
    assert run_eval(["--config", str(config)]) == 1
    (error,) = [s for s in capsys.readouterr().err.splitlines() if s.startswith("error: ")]
    assert error.endswith(f"harness.apply_chat_template: {toy} has no chat template; leave it out")
    assert not (tmp_path / "out").exists()
