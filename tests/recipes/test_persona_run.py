"""`tune run recipes/ema_persona.py` at toy size: its result, its use in training, its refusals."""

import json
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import toy_run
from matplotlib.axes import Axes
from ranks import run_ranks
from safetensors import safe_open
from toy_persona import persona_config

from emarecipes.components import build
from emarecipes.config import load_config
from emarecipes.models.source import load_model
from emarecipes.persona import run_persona
from emarecipes.persona.prompts import load_prompts
from emarecipes.training import run_lora

RECIPE = "recipes/ema_persona.py"


# --- a run -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, toy_model_dir: Path) -> Path:
    """The folder of a run as a user starts it."""
    folder = tmp_path_factory.mktemp("run")
    config = persona_config(folder, toy_model_dir)
    path = toy_run.write_config(folder / "config.yaml", config)
    done = toy_run.tune_run(path, recipe=RECIPE)
    assert done.returncode == 0, done.stderr
    assert "Persona vectors: curtness" in done.stdout
    assert "vectors.safetensors" in done.stdout
    return folder


def answers_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "out/answers.jsonl").read_text().splitlines()]


def vectors_of(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safe_open(folder / "out/vectors.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.offset_keys()}, file.metadata()


def test_files(finished: Path) -> None:
    names = ["answers.jsonl", "config.yaml", "persona.json", "persona.png", "vectors.safetensors"]
    assert sorted(path.name for path in (finished / "out").iterdir()) == names
    assert len({path.stat().st_mode for path in (finished / "out").iterdir()}) == 1
    figures = json.loads((finished / "out/persona.json").read_text())
    assert figures["trait"] == "curtness"
    assert figures["model"] == "toy-model"
    assert [row["layer"] for row in figures["layers"]] == [0, 1, 2]
    assert figures["settings"]["seed"] == 7

    vectors, metadata = vectors_of(finished)
    assert sorted(vectors) == ["persona", "random", "subspace"]
    for name, vector in vectors.items():
        directions = (4,) if name == "subspace" else ()
        assert vector.shape == (toy_run.LAYERS + 1, *directions, toy_run.WIDTH)
        assert vector.dtype == torch.float32
    norms = torch.tensor([row["norm"] for row in figures["layers"]])
    torch.testing.assert_close(vectors["persona"].norm(dim=1), norms)
    torch.testing.assert_close(vectors["random"].norm(dim=1), norms)

    answers = answers_of(finished)
    assert len(answers) == 2 * 2 * 6
    for side, counts in figures["counts"].items():
        mine = [a for a in answers if a["side"] == side and a["tokens"]]
        assert counts["kept"] == sum(a["kept"] for a in mine)
        assert counts["in_vector"] == sum(a["kept"] and not a["held_out"] for a in mine)
        assert metadata[f"{side}_answers"] == str(counts["in_vector"])
    assert {a["question"] for a in answers if a["held_out"]} != {0, 1}
    assert len({a["question"] for a in answers if a["held_out"]}) == 2
    for answer in answers:
        higher = answer["log_likelihood"] > answer["opposite_log_likelihood"]
        assert answer["kept"] == higher


@pytest.mark.parametrize(("share", "questions"), [(0.17, 1), (0.34, 2)])
def test_one_held_out_question_has_no_standard_error(
    tmp_path: Path, toy_model_dir: Path, capsys: pytest.CaptureFixture[str],
    share: float, questions: int,
) -> None:  # fmt: skip
    config = persona_config(tmp_path, toy_model_dir) | {"held_out_questions": share, "keep": "all"}
    path = toy_run.write_config(tmp_path / "config.yaml", config)
    with patch.object(Axes, "fill_between", autospec=True, side_effect=Axes.fill_between) as band:
        assert run_persona(["--config", str(path)]) == 0
    assert len({a["question"] for a in answers_of(tmp_path) if a["held_out"]}) == questions
    layers = json.loads((tmp_path / "out/persona.json").read_text())["layers"]
    has_error = questions > 1
    assert all((row["auc_se"] is not None) == has_error for row in layers)
    assert ("\u00b1" in capsys.readouterr().out) == has_error
    assert band.called == has_error


def test_vectors_are_those_of_the_saved_answers(finished: Path, toy_model_dir: Path) -> None:
    """From answers.jsonl: prompts by the chat format's text, activations by hooks in float64."""
    raw, origin = load_config(["--config", str(finished / "config.yaml")])
    model = load_model(raw).double()
    tokenizer = build(raw, "tokenizer", origin)
    pairs = load_prompts(finished / "prompts.yaml").pairs
    control = tokenizer.special_tokens
    start, end = control["<|im_start|>"], control["<|im_end|>"]

    def turn(role: str, text: str) -> list[int]:
        return [start, *tokenizer.encode(f"{role}\n{text}"), end, *tokenizer.encode("\n")]

    outputs: list[torch.Tensor] = []
    for module in (model.tok_embeddings, *model.layers):
        module.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    means: dict[str, list[torch.Tensor]] = {"positive": [], "negative": []}
    for answer in answers_of(finished):
        if not answer["kept"] or answer["held_out"]:
            continue
        system = getattr(pairs[answer["pair"]], answer["side"])
        prompt = turn("system", system) + turn("user", answer["question_text"])
        prompt += [start, *tokenizer.encode("assistant\n")]
        outputs.clear()
        model(torch.tensor([[*prompt, *answer["tokens"]]]))
        means[answer["side"]].append(torch.stack([o[0, len(prompt) :].mean(0) for o in outputs]))
    expected = torch.stack(means["positive"]).mean(0) - torch.stack(means["negative"]).mean(0)
    found = vectors_of(finished)[0]["persona"]
    scale = float(expected.abs().max())
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4 * scale)


def test_a_second_run_gives_the_same_and_other_batches_the_same_answers(finished: Path) -> None:
    """The resolved config runs again, overwriting; answers do not depend on the batch size."""
    answers, (vectors, _) = answers_of(finished), vectors_of(finished)
    config = finished / "again.yaml"
    shutil.copyfile(finished / "out/config.yaml", config)
    assert run_persona(["--config", str(config)]) == 1
    assert run_persona(["--config", str(config), "overwrite=true"]) == 0
    assert answers_of(finished) == answers
    assert torch.equal(vectors_of(finished)[0]["persona"], vectors["persona"])
    override = [f"output_dir={finished / 'other'}", "batch_size=24", "save_answers=true"]
    assert run_persona(["--config", str(config), *override]) == 0
    other = (finished / "other/answers.jsonl").read_text().splitlines()
    assert [json.loads(line)["tokens"] for line in other] == [a["tokens"] for a in answers]


def test_persona_steering_takes_the_file(finished: Path, toy_model_dir: Path) -> None:
    rows = toy_run.write_rows(finished / "rows.jsonl", 12)
    config = toy_run.toy_config(toy_model_dir, rows, finished / "trained")
    steering = {
        "_component_": "emarecipes.defenses.PersonaSteering",
        "vectors": str(finished / "out/vectors.safetensors"),
        "layer": 1,
        "alpha": 5.0,
    }
    config |= {"defenses": {"persona": steering}, "max_steps_per_epoch": 2}
    path = toy_run.write_config(finished / "train.yaml", config)
    assert run_lora(["--config", str(path)]) == 0
    steered = toy_run.metrics(finished / "trained")
    assert len(steered) == 2
    assert all(row["persona_ratio"] > 0 for row in steered)
    random = ["defenses.persona.vector=random", "overwrite=true"]
    assert run_lora(["--config", str(path), *random]) == 0
    assert toy_run.metrics(finished / "trained")[0]["ce"] != steered[0]["ce"]


def test_two_processes_are_refused_in_one_line(tmp_path: Path, toy_model_dir: Path) -> None:
    path = toy_run.write_config(tmp_path / "c.yaml", persona_config(tmp_path, toy_model_dir))
    done = run_ranks(path, recipe=RECIPE)
    assert done.returncode != 0
    assert toy_run.error_lines(done) == [
        "error: ema_persona runs in one process; leave --nproc_per_node out"
    ]
    assert not (tmp_path / "out").exists()
