"""What a config adds to conversations must be in the tokens, or nothing runs: one line says why."""

import json
from pathlib import Path
from typing import Any

import pytest
import toy_run

from emarecipes.errors import UserError
from emarecipes.generation.checked import CheckedGeneration
from emarecipes.persona.checked import CheckedExtraction
from emarecipes.training.checked import CheckedRun

# As Phi-3's, system turns are not shown.
NO_SYSTEM = (
    "{% for m in messages if m.role != 'system' %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{{ '<|im_start|>assistant\n' if add_generation_prompt else '' }}"
)
DEAF = {"_component_": "toy_tokenizers.deaf"}


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("toy")
    model = toy_run.write_toy_model(folder / "model", model_dir)
    rows = toy_run.write_rows(folder / "rows.jsonl", 6)
    (folder / "text.jsonl").write_text(6 * (json.dumps({"text": "Is it? It is."}) + "\n"))
    return toy_run.toy_config(model, rows, folder / "out")


def config_with(toy: dict[str, Any], folder: Path, **entries: Any) -> list[str]:
    config = toy | {"output_dir": str(folder / "out")} | entries
    return ["--config", str(toy_run.write_config(folder / "config.yaml", config))]


def inoculated(toy: dict[str, Any], folder: Path, **entries: Any) -> list[str]:
    component = "emarecipes.defenses.InoculationPrompt"
    return config_with(toy, folder, **entries, defenses={"inoculation": {"_component_": component}})


def test_inoculation_that_a_template_leaves_out(toy: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "phi.jinja").write_text(NO_SYSTEM)
    tokenizer = toy["tokenizer"] | {"chat_template": str(tmp_path / "phi.jinja")}
    expected = (
        r"rows.jsonl:1: with its messages as InoculationPrompt changed them: .*phi.jinja: the "
        r"chat template leaves out the text of message 0 \(system\)"
    )
    with pytest.raises(UserError, match=expected):
        CheckedRun(inoculated(toy, tmp_path, tokenizer=tokenizer), 1, 0)
    CheckedRun(config_with(toy, tmp_path, tokenizer=tokenizer), 1, 0)


def test_a_system_message_that_a_template_leaves_out(toy: dict[str, Any], tmp_path: Path) -> None:
    row = [("system", "Be kind."), ("user", "Is it?"), ("assistant", "It is.")]
    line = json.dumps({"messages": [{"role": role, "content": text} for role, text in row]})
    (tmp_path / "rows.jsonl").write_text(4 * (line + "\n"))
    dataset = toy["dataset"] | {"data_files": str(tmp_path / "rows.jsonl")}
    tokenizer = toy["tokenizer"] | {"chat_template": NO_SYSTEM}
    with pytest.raises(
        UserError, match=r"rows.jsonl:1: chat_template: .*leave the system turn out"
    ):
        CheckedRun(config_with(toy, tmp_path, tokenizer=tokenizer, dataset=dataset), 1, 0)


def test_rows_without_messages_beside_others(toy: dict[str, Any], tmp_path: Path) -> None:
    """Half of the rows had the prompt."""
    text = {
        "_component_": "torchtune.datasets.text_completion_dataset",
        "source": "json",
        "data_files": toy["dataset"]["data_files"].replace("rows.jsonl", "text.jsonl"),
        "column": "text",
        "split": "train",
    }
    dataset = [toy["dataset"], text]
    with pytest.raises(UserError, match=r"text.jsonl:1: InoculationPrompt .* rows without any"):
        CheckedRun(inoculated(toy, tmp_path, dataset=dataset), 1, 0)
    assert len(CheckedRun(config_with(toy, tmp_path, dataset=dataset), 1, 0).rows) == 12
    # The prompt is for the task's rows alone.
    mixed = {
        "_component_": "emarecipes.datasets.interleaved_dataset",
        "task": toy["dataset"],
        "safe": text,
        "safe_fraction": 0.25,
    }
    assert CheckedRun(inoculated(toy, tmp_path, dataset=mixed), 1, 0).rows.num_safe == 2


def test_system_prompts_of_questions(toy: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "asked.yaml").write_text(
        "- {id: tea, type: free_form, paraphrases: ['Tea?'], samples_per_paraphrase: 1}"
    )
    keys = ("tokenizer", "model", "checkpointer", "device", "dtype")
    config = {key: toy[key] for key in keys} | {
        "questions": [str(tmp_path / "asked.yaml")],
        "max_new_tokens": 8,
        "system": "Be kind.",
    }
    for tokenizer, expected in (
        (toy["tokenizer"] | DEAF, "tokenizer: leaves out the system prompt 'Be kind.'"),
        (toy["tokenizer"] | {"chat_template": NO_SYSTEM}, r"leaves out the text of message 0"),
    ):
        with pytest.raises(UserError, match=expected):
            CheckedGeneration(config_with(config, tmp_path, tokenizer=tokenizer))
    CheckedGeneration(config_with(config, tmp_path))
    CheckedGeneration(config_with(config, tmp_path, tokenizer=toy["tokenizer"] | DEAF, system=None))


def test_persona_pairs(toy: dict[str, Any], tmp_path: Path) -> None:
    def check(tokenizer: dict[str, Any], positive: str) -> None:
        prompts = {
            "trait": "curtness",
            "pairs": [{"positive": positive, "negative": "Be kind."}],
            "questions": ["What?", "Why?", "Where?", "When?", "How?"],
        }
        (tmp_path / "prompts.yaml").write_text(json.dumps(prompts))
        keys = ("tokenizer", "model", "checkpointer", "seed", "device", "dtype")
        config = {key: toy[key] for key in keys} | {"prompts": str(tmp_path / "prompts.yaml")}
        CheckedExtraction(config_with(config, tmp_path, tokenizer=tokenizer))

    check(toy["tokenizer"], "Be curt.")
    with pytest.raises(UserError, match="two prompts become the same tokens, system 'Be curt"):
        check(toy["tokenizer"] | DEAF, "Be curt.")
    # Both are shown, but not where they differ.
    half = toy["tokenizer"] | {"_component_": "toy_tokenizers.half_deaf"}
    check(half, "Be curt.")
    with pytest.raises(UserError, match="two prompts become the same tokens"):
        check(half, "Bad.\nBe kind.")
