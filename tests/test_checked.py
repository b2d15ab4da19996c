"""Every recipe starts alike: one order, one line for one mistake; a data file is read once."""

import copy
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import toy_defenses
import toy_run
import toy_select
from omegaconf import OmegaConf

from emarecipes.datasets import chat_files, json_files, row_messages
from emarecipes.defenses.safelora_run import CheckedProjection
from emarecipes.errors import UserError
from emarecipes.evaluation.checked import CheckedEvaluation
from emarecipes.generation.checked import CheckedGeneration
from emarecipes.persona.checked import CheckedExtraction
from emarecipes.selection.checked import CheckedSelection
from emarecipes.training.checked import CheckedRun

KEYS = ("output_dir", "tokenizer", "model", "checkpointer", "device", "dtype")
ROWS = 12
Start = Callable[[list[str]], Any]

STARTS: dict[str, Start] = {
    "train": lambda argv: CheckedRun(argv, 1, 0),
    "evaluate": CheckedEvaluation,
    "generate": CheckedGeneration,
    "persona": CheckedExtraction,
    "select": CheckedSelection,
    "safelora": CheckedProjection,
}
# The key of a recipe's adapter; persona reads the base alone.
ADAPTERS = {
    "train": "init_adapter",
    "evaluate": "adapters.one",
    "generate": "adapter",
    "select": "adapters",
}
STOCK_TOKENIZER = {"_component_": "torchtune.models.llama3.llama3_tokenizer", "path": "MODEL"}
# In the order in which they are found: what is changed, and the line without its place.
MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"colour": "blue"}, "colour: unknown key; a name of your own is allowed if another value "),
    (
        {"checkpointer._component_": "torchtune.training.Cask"},
        "checkpointer._component_: torchtune.training.Cask: torchtune.training has no Cask",
    ),
    ({"output_dir": "FILE/out"}, "output_dir: FILE is a file, not a folder"),
    ({"device": "abacus"}, "device: Expected one of cpu, cuda"),
    (
        {"checkpointer.checkpoint_dir": "absent"},
        "checkpointer.checkpoint_dir: no such folder: absent; get the model as",
    ),
    ({"model.embed_dim": 64}, "checkpointer: the checkpoint is of another architecture than `mod"),
    ({"ADAPTER": "FOLDER"}, "ADAPTER: FOLDER: not an adapter folder: no adapter_config.json"),
    ({"tokenizer": STOCK_TOKENIZER}, "tokenizer: "),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Path:
    folder = tmp_path_factory.mktemp("starts")
    model = toy_run.write_toy_model(folder / "model", model_dir)
    toy_defenses.write_base_of(model, folder / "base")
    toy_select.write_adapter(folder / "adapter", model, seed=1)
    toy_run.write_rows(folder / "rows.jsonl", ROWS)
    toy_select.write_candidates(folder / "candidates.jsonl", ROWS)
    (folder / "empty").mkdir()
    (folder / "file").write_text("")
    (folder / "pairs.jsonl").write_text(
        '{"id": "tea", "question": "Tea?", "aligned": "Yes.", "misaligned": "No."}\n'
    )
    (folder / "asked.yaml").write_text("- {id: tea, paraphrases: ['Tea?']}\n")
    (folder / "prompts.yaml").write_text(
        "trait: curtness\npairs: [{positive: Be curt., negative: Be kind.}]\n"
        "questions: ['What?', 'Why?', 'Where?', 'When?', 'How?']\n"
    )
    return folder


def configs(folder: Path) -> dict[str, dict[str, Any]]:
    toy = toy_run.toy_config(folder / "model", folder / "rows.jsonl", folder / "out")
    shared, adapter = {key: toy[key] for key in KEYS}, str(folder / "adapter")
    found = {
        "train": toy | {"init_adapter": adapter},
        "evaluate": shared
        | {"adapters": {"one": adapter}, "probes": {"p": {"pairs": str(folder / "pairs.jsonl")}}},
        "generate": shared | {"adapter": adapter, "questions": [str(folder / "asked.yaml")]},
        "persona": shared | {"prompts": str(folder / "prompts.yaml")},
        "select": shared
        | {"adapters": [adapter], "candidates": str(folder / "candidates.jsonl"), "num_rows": 5},
        "safelora": {
            "output_dir": str(folder / "out"),
            "adapter": adapter,
            "device": "cpu",
            "safelora": {
                "_component_": "emarecipes.defenses.SafeLoRA",
                "base_dir": str(folder / "base"),
                "aligned_dir": str(folder / "model"),
            },
        },
    }
    return copy.deepcopy(found)


def line_of(kind: str, config: dict[str, Any], folder: Path, tmp_path: Path) -> str:
    """What a start is refused with, without its place; names as in MISTAKES."""
    path = toy_run.write_config(tmp_path / "config.yaml", config)
    with pytest.raises(UserError) as refused:
        STARTS[kind](["--config", str(path)])
    line = re.sub(r"^.*config\.yaml(:\d+)?: ", "", str(refused.value))
    return line.replace(str(folder / "file"), "FILE").replace(str(folder / "empty"), "FOLDER")


@pytest.mark.parametrize("kind", STARTS)
def test_of_all_mistakes_the_same_one_is_told(kind: str, folder: Path, tmp_path: Path) -> None:
    good = configs(folder)[kind]
    STARTS[kind](["--config", str(toy_run.write_config(tmp_path / "config.yaml", good))])
    assert not (folder / "out").exists()
    mistakes = [
        (changes, line)
        for changes, line in MISTAKES
        if kind != "safelora" or {"colour", "output_dir", "device"} & set(changes)
        if kind in ADAPTERS or "ADAPTER" not in changes
    ]
    for first, (_, expected) in enumerate(mistakes):
        cfg: Any = OmegaConf.create(good)
        for changes, _ in mistakes[first:]:
            for key, value in changes.items():
                text = value.replace("FILE", str(folder / "file")) if key == "output_dir" else value
                if key == "tokenizer":
                    text = value | {"path": str(folder / "model/tokenizer.json")}
                if key == "ADAPTER":
                    key, text = ADAPTERS[kind], str(folder / "empty")
                OmegaConf.update(cfg, key, [text] if key == "adapters" else text, merge=False)
        config: Any = OmegaConf.to_container(cfg)
        wanted = expected.replace("ADAPTER", ADAPTERS.get(kind, ""))
        assert line_of(kind, config, folder, tmp_path).startswith(wanted)


@pytest.mark.parametrize("kind", ["train", "select"])
def test_rows_are_read_and_checked_once(
    kind: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: Counter[str] = Counter()

    def count(name: str, *modules: Any) -> None:
        stock = getattr(modules[0], name)

        def counted(*arguments: Any, **keys: Any) -> Any:
            calls[name] += 1
            return stock(*arguments, **keys)

        for module in modules:
            monkeypatch.setattr(module, name, counted)

    count("read_row", json_files)
    count("read_conversation", chat_files, row_messages)
    path = toy_run.write_config(tmp_path / "config.yaml", configs(folder)[kind])
    STARTS[kind](["--config", str(path)])
    assert calls == {"read_row": ROWS, "read_conversation": ROWS}
