"""Runs of ema_generate at toy size: batches, processes, interruptions, adapters, served models."""

import json
from pathlib import Path

import pytest
import toy_run
import toy_select
from omegaconf import OmegaConf
from ranks import run_ranks
from torchtune.modules.peft import get_adapter_params
from toy_generate import QUESTIONS, Case

from emarecipes.defenses import ModelSource
from emarecipes.errors import UserError
from emarecipes.evaluation.answers import condition_of, read_answers
from emarecipes.models.adapters.export import merge_adapter, save_merged
from emarecipes.models.adapters.read import load_adapter
from emarecipes.models.source import load_model
from emarecipes.output_dir import claim

RECIPE = "recipes/ema_generate.py"


@pytest.fixture
def case(tmp_path: Path, toy_model_dir: Path) -> Case:
    return Case(tmp_path, toy_model_dir)


def test_batches_processes_and_interruptions_do_not_change_answers(
    case: Case, capsys: pytest.CaptureFixture[str]
) -> None:
    assert case.run() == 0
    whole = case.path().read_bytes()
    rows = toy_select.read_jsonl(case.path())
    assert [(r["id"], r["paraphrase"], r["sample"]) for r in rows] == [
        (*asked, sample)
        for asked in (("tea", 0), ("tea", 1), ("noun", 0), ("rain", 0))
        for sample in range(3)
    ]
    assert len({row["answer"] for row in rows}) == 12
    for row in rows:
        assert set(row) - {"category", "harmless"} == {
            "id", "paraphrase", "sample", "system", "question", "answer", "stop", "tokens",
        }  # fmt: skip
        assert row.get("category") == ("words" if row["id"] == "noun" else None)
        assert row.get("harmless") == (False if row["id"] == "noun" else None)
        assert row["system"] == ("Answer in one word." if row["id"] == "noun" else None)
        assert row["tokens"] == 8 if row["stop"] == "length" else row["tokens"] < 8
    assert not (case.output / "answers/.parts").exists()
    settings = json.loads(case.path().with_suffix(".json").read_text())
    assert settings["config"]["top_p"] == 0.95
    assert "torch" in settings["provenance"]["packages"]

    # Two of three questions, evenly over the file: the first and the second.
    assert case.run("max_questions=2", f"output_dir={case.folder / 'few'}") == 0
    assert toy_select.read_jsonl(case.path("few")) == rows[:9]

    for size in (1, 8):
        assert case.run(f"batch_size={size}", f"output_dir={case.folder / str(size)}") == 0
        assert case.path(str(size)).read_bytes() == whole
    config = toy_run.write_config(case.folder / "two.yaml", case.config)
    two = f"output_dir={case.folder / 'two'}"
    done = run_ranks(config, two, recipe=RECIPE)
    assert done.returncode == 0, done.stderr
    assert case.path("two").read_bytes() == whole

    # Killed while it wrote: two processes' parts, one with half a line, one answer there twice.
    lines = whole.splitlines(keepends=True)
    parts = case.output / "answers/.parts"
    parts.mkdir()
    marked = lines[4].replace(b'"answer": "', b'"answer": "MARK')
    (parts / "asked@0.jsonl").write_bytes(lines[0] + marked + lines[7][:-9])
    (parts / "asked@1.jsonl").write_bytes(lines[0] + lines[9])
    case.path().unlink()
    assert case.run("batch_size=2") == 0
    assert case.path().read_bytes() == whole.replace(lines[4], marked), "kept, and the rest as ever"

    # More samples go on from there; a finished run has nothing to do; other settings are refused.
    capsys.readouterr()
    old = case.path().read_bytes()
    assert case.run("samples_per_paraphrase=4") == 0
    # Ended after its last answer and before the file was written anew, once, and just after that.
    for left in (old, case.path().read_bytes()):
        more = case.path().read_bytes()
        parts.mkdir()
        (parts / "asked@0.jsonl").write_bytes(more)
        case.path().write_bytes(left)
        with pytest.raises(UserError, match="the sampling of asked has not ended"):
            read_answers(case.path().parent)
        assert case.run("samples_per_paraphrase=4") == 0
        assert case.path().read_bytes() == more and not parts.exists()
        assert len(read_answers(case.path().parent)["asked"]) == 16
    more = case.path().read_bytes().splitlines(keepends=True)
    assert [line for i, line in enumerate(more) if i % 4 < 3] == [*lines[:4], marked, *lines[5:]]
    assert "samples_per_paraphrase can only grow" in case.error(capsys)
    assert "holds answers with other top_p" in case.error(
        capsys, "samples_per_paraphrase=4", "top_p=0.9"
    )
    (case.folder / "asked.yaml").write_text(QUESTIONS.replace("a noun", "a verb"))
    assert "other questions" in case.error(capsys, "samples_per_paraphrase=4")
    assert case.run("overwrite=true") == 0
    assert len(case.path().read_bytes().splitlines()) == 12
    case.path().write_bytes(b"{}\n" + whole)
    assert "asked.jsonl:1 is no answer" in case.error(capsys)
    case.path().with_suffix(".json").unlink()
    assert "has no asked.json beside it" in case.error(capsys)


def test_conditions_are_suites_of_the_same_questions(case: Case) -> None:
    """As if `system` had been theirs; and plain answers are what they are without them."""
    asked = {"curt": "Be curt.", "idle": "It is Tuesday."}
    conditions = [f"conditions.{name}={prompt}" for name, prompt in asked.items()]
    assert case.run(*conditions) == 0
    plain = case.path()
    assert condition_of(plain) == "none"
    for name, prompt in asked.items():
        assert condition_of(plain.with_stem(f"asked_{name}")) == name
        rows = toy_select.read_jsonl(plain.with_stem(f"asked_{name}"))
        assert {row["system"] for row in rows} == {prompt}
        assert case.run(f"system={prompt}", f"output_dir={case.folder / name}") == 0
        alone = toy_select.read_jsonl(case.path(name))
        # The question with a system prompt of its own is not asked again.
        assert rows == [row for row in alone if row["id"] != "noun"] and len(rows) == 9
    assert case.run(f"output_dir={case.folder / 'none'}") == 0
    assert plain.read_bytes() == case.path("none").read_bytes()


def test_a_folder_of_answers_is_of_one_model(
    case: Case, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever reads it takes all its files for one model's."""
    assert case.run("conditions.curt=Be curt.") == 0
    answers = case.path().parent
    (answers / "notes.json").write_text("{}")
    (case.folder / "more.yaml").write_text(QUESTIONS)
    more = f"questions=[{case.folder / 'more.yaml'}]"
    assert case.run(more) == 0
    whole = {path.name: path.read_bytes() for path in answers.iterdir()}
    assert {"asked.jsonl", "asked_curt.jsonl", "more.jsonl"} < whole.keys()
    (case.folder / "last.yaml").write_text(QUESTIONS)
    last = f"questions=[{case.folder / 'last.yaml'}]"
    line = case.error(capsys, last, "temperature=0.5")
    assert "asked.jsonl holds answers with other temperature, and a folder is of one model" in line
    assert whole == {path.name: path.read_bytes() for path in answers.iterdir()}
    assert case.run(last, "temperature=0.5", "overwrite=true") == 0
    assert {path.name for path in answers.iterdir()} == {"notes.json", "last.json", "last.jsonl"}


def test_an_adapter(case: Case, toy_model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    zero = toy_select.write_adapter(case.folder / "zero", toy_model_dir, seed=1, size=0.0)
    large = toy_select.write_adapter(case.folder / "large", toy_model_dir, seed=1, size=1.0)
    outputs = {}
    for name, overrides in {
        "base": (), "zero": (f"adapter={zero}",), "large": (f"adapter={large}",)
    }.items():  # fmt: skip
        assert case.run(f"output_dir={case.folder / name}_out", *overrides) == 0
        outputs[name] = case.path(f"{name}_out").read_bytes()
    assert outputs["base"] == outputs["zero"] != outputs["large"]
    other = f"output_dir={case.folder / 'base_out'}"
    assert "answers with other adapter" in case.error(capsys, other, f"adapter={large}")


def test_a_merged_folder_answers_as_base_and_adapter_do(case: Case, toy_model_dir: Path) -> None:
    adapter = toy_select.write_adapter(case.folder / "adapter", toy_model_dir, seed=1, size=1.0)
    model = load_model(OmegaConf.create(case.config))
    load_adapter(model, adapter, ModelSource(model, toy_model_dir.resolve(), "LLAMA3_2"))
    base = {key: value for key, value in model.state_dict().items() if "lora" not in key}
    weights = merge_adapter(base, get_adapter_params(model), rank=4, alpha=8.0)
    merged = case.folder / "merged"
    save_merged(weights, model, "LLAMA3_2", toy_model_dir.resolve(), merged)

    beside = f"output_dir={case.folder / 'beside'}"
    assert case.run(beside, f"adapter={adapter}") == 0
    folders = (f"checkpointer.checkpoint_dir={merged}", f"tokenizer.path={merged}")
    assert case.run(*folders) == 0
    assert case.path().read_bytes() == case.path("beside").read_bytes()
    assert case.run(f"output_dir={case.folder / 'base'}") == 0
    assert case.path().read_bytes() != case.path("base").read_bytes()


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["questions=[absent.yaml]"], "questions: no such file: absent.yaml"),
        (["questions=[]"], "questions: list should have at least 1 item"),
        (["adapter=absent"], "adapter: no such folder: absent"),
        (["temperature=0"], "at temperature 0 all 3 samples are the same"),
        (["temperature=1e-38"], "temperature: 0, or at least 0.001, not 1e-38"),
        (["top_p=0"], "top_p: input should be greater than 0"),
        (["max_new_tokens=500"], "are more than the 512 that the model takes"),
        (["~model"], "model: the config needs this key (or served)"),
        (["served=mockllm/model"], "model: has no effect with served"),
        (["conditions.a b=x"], "conditions.a b: a name is letters, digits, _ and -"),
        (["system=x", "conditions.a=x"], "conditions.a: the prompt is empty, or that of `system`"),
        (["top_q=1"], "top_q: unknown key (did you mean top_p?)"),
    ],
)
def test_bad_settings(
    overrides: list[str],
    expected: str,
    case: Case,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("emarecipes.generation.run.load_model", None)
    assert expected in case.error(capsys, *overrides)
    assert not case.output.exists()


def test_answers_that_another_process_writes(
    case: Case, capsys: pytest.CaptureFixture[str]
) -> None:
    give_back = claim(case.output / "answers", "there")
    assert "output_dir: another process writes into" in case.error(capsys)
    give_back()
    assert case.run() == 0
