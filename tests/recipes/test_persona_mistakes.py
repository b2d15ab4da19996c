"""Extractions that are refused, or leave the old result."""

import contextlib
import io
from pathlib import Path
from typing import Any

import pytest
import torch
import toy_run
from omegaconf import OmegaConf
from toy_persona import PROMPTS, persona_config

from emarecipes.persona import run_persona

# --- bad input ---------------------------------------------------------------------------------


def with_pair(positive: str, negative: str) -> str:
    """The prompts file with one pair more."""
    pair = f"  - {{positive: {positive}, negative: {negative}}}\n"
    return PROMPTS.replace("questions:", f"{pair}questions:")


def error_of(folder: Path, config: dict[str, Any], *overrides: str) -> str:
    """The one line of a refused run, which must leave nothing behind."""
    path = toy_run.write_config(folder / "config.yaml", config)
    before = sorted(folder.rglob("*"))
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr):
        code = run_persona(["--config", str(path), *overrides])
    assert code == 1
    assert "Traceback" not in stderr.getvalue()
    assert sorted(folder.rglob("*")) == before, "a refused run left files"
    (line,) = [line for line in stderr.getvalue().splitlines() if line.startswith("error: ")]
    return line


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("weights were loaded before the mistake was found")

    monkeypatch.setattr("emarecipes.persona.run.load_model", never)


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"sample_per_question": 2}, "unknown key (did you mean samples_per_question?)"),
        ({"prompts": "absent.yaml"}, "prompts: no such file: absent.yaml"),
        ({"prompts": None}, "prompts: input should be a valid string"),
        ({"keep": "judge"}, "keep: judge needs the key judge, an Inspect provider string"),
        ({"keep": "some"}, "keep: input should be 'likelihood', 'all' or 'judge'"),
        ({"temperature": 1e-4}, "temperature: 0, or at least 0.001, not 0.0001"),
        ({"temperature": -1.0}, "temperature: input should be greater than or equal to 0"),
        ({"temperature": 0.0, "samples_per_question": 2}, "at temperature 0 all samples are the"),
        ({"top_k": 0}, "top_k: input should be greater than or equal to 1"),
        ({"max_new_tokens": 500}, "tokens and an answer of 500 are more than the 512 that"),
        ({"held_out_questions": 0.05}, "0.05 of 6 questions leaves none to measure the separation"),
        (
            {"held_out_questions": 0.8},
            "samples_per_question: 2 answers a side are left to make the vector of, at least 4 are",
        ),
        ({"held_out_questions": 0.95}, "0.95 of 6 questions leaves none to make the vector of"),
        ({"held_out_questions": 1.0}, "held_out_questions: input should be less than 1"),
        ({"tokenizer.max_seq_len": 16}, "16 tokens are too few for a system prompt and a question"),
        ({"dataset": {"source": "json"}}, "dataset: unknown key"),
        ({"device": "cuda"}, "device: this machine has no usable CUDA device"),
        ({"model.embed_dim": 64}, "the checkpoint is of another architecture"),
        ({"model_dir": "absent"}, "checkpoint_dir: no such folder: absent"),
    ],
)
def test_config(change: dict[str, Any], expected: str, tmp_path: Path, toy_model_dir: Path) -> None:
    config = OmegaConf.create(persona_config(tmp_path, toy_model_dir))
    for key, value in change.items():
        OmegaConf.update(config, key, value, merge=False)
    plain: Any = OmegaConf.to_container(config)
    message = error_of(tmp_path, plain)
    assert expected in message
    assert "config.yaml" in message


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "prompts.yaml: the prompts file is empty"),
        ("- a\n- b\n", "prompts.yaml: must be a mapping with the keys trait"),
        ("trait: [1\npairs: 2", "prompts.yaml:2: not valid YAML"),
        ("trait: a\npairs: []\nquestions: [q]\n", "prompts.yaml:2: the file has no pairs of sys"),
        ("trait: a\nquestions: [q]\n", "prompts.yaml: the prompts file needs the key pairs"),
        (
            PROMPTS.replace("    negative: Answer at", "    #"),
            "prompts.yaml:3: the pair has no neg",
        ),
        (
            PROMPTS.replace("negative: You are patient", "positiv: You"),
            ":5: unknown key positiv (d",
        ),
        (PROMPTS.replace("You are patient with people.", ""), ":5: the negative system prompt mus"),
        (PROMPTS.replace("patient with", "short with"), ":5: the two system prompts of the pair"),
        (
            with_pair("Answer as you like.", "You are short with people."),
            ":6: a system prompt of this pair calls up the trait in one pair and its opposite",
        ),
        (
            with_pair("You are short with people.", "You are patient with people."),
            ":6: this pair is there twice",
        ),
        (PROMPTS.split("questions")[0] + "questions:\n", ":6: the file has no questions"),
        (PROMPTS.replace("What is a noun?", "42"), ":8: a question must be text"),
        (PROMPTS.replace("What is a noun?", "How do I make tea?"), ":8: this question is there tw"),
        (PROMPTS + "trait: again\n", ":13: the key trait is there twice"),
        (
            PROMPTS + "judge_prompt: grade {answer}\n",
            ":13: judge_prompt lacks the placeholder {que",
        ),
    ],
)
def test_prompts_file(text: str, expected: str, tmp_path: Path, toy_model_dir: Path) -> None:
    config = persona_config(tmp_path, toy_model_dir)
    (tmp_path / "prompts.yaml").write_text(text)
    assert expected in error_of(tmp_path, config)


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("present", "override", "expected"),
    [
        (["config.yaml", "vectors.safetensors"], "", "already holds a run; choose another"),
        (["config.yaml", "adapter"], "overwrite=true", "holds a training run (adapter)"),
        (["vectors.safetensors"], "overwrite=true", "but no config.yaml of a run; not overwritten"),
        (["vectors.safetensors"], "", "but no config.yaml of a run; not overwritten"),
    ],
)
def test_an_output_folder_in_use(
    present: list[str], override: str, expected: str, tmp_path: Path, toy_model_dir: Path
) -> None:
    (tmp_path / "out").mkdir()
    for name in present:
        (tmp_path / "out" / name).write_text("seed: 0\nprovenance: {}\n")
    config = persona_config(tmp_path, toy_model_dir)
    assert expected in error_of(tmp_path, config, *([override] if override else []))


def test_too_few_kept_answers(
    tmp_path: Path, toy_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "emarecipes.persona.run.kept", lambda own, opposite, keep: torch.zeros_like(own) > 0
    )
    message = error_of(tmp_path, persona_config(tmp_path, toy_model_dir))
    assert "only 0 positive answers were kept of the training questions, at least 4" in message


def test_a_result_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, toy_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("emarecipes.persona.report.plot", full)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/config.yaml").write_text("seed: 0\nprovenance: {}\n")
    (tmp_path / "out/persona.json").write_text("{}")
    (tmp_path / "out/vectors.safetensors").write_text("old")
    message = error_of(tmp_path, persona_config(tmp_path, toy_model_dir), "overwrite=true")
    assert "cannot write the result: No space left on device" in message
    assert (tmp_path / "out/vectors.safetensors").read_text() == "old"
