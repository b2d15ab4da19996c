"""Every mistake gives one line that names the place, exit code 1, and leaves nothing behind."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import toy_run
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from toy_mistakes import KL, Case


def chat(*messages: tuple[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in messages]}


GOOD = chat(("user", "Hello?"), ("assistant", "Hello."))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"defenses.kl.wieght": 1.0}, r"defenses.kl.wieght: unknown key (did you mean weight?)"),
        ({"defenses.kl.weight": -1.0}, r"defenses.kl: weight must be a finite number >= 0"),
        ({"defenses.kl.weight": float("nan")}, r"weight must be a finite number >= 0"),
        ({"defenses.kl.weight": "much"}, r"defenses.kl.weight: input should be a valid number"),
        ({"defenses.kl.direction": "both"}, r"defenses.kl.direction: input should be"),
        ({"defenses.kl.temperature": 0.0}, r"defenses.kl: temperature must be"),
        ({"defenses.kl.samples": "safe"}, r"defenses.kl.samples: no row has the source safe"),
        ({"defenses.kl._component_": None}, r"no module named None"),
        (
            {"defenses.kl._component_": "emarecipes.defenses.KLToReferense"},
            r"emarecipes.defenses has no KLToReferense (did you mean KLToReference?)",
        ),
        ({"defenses.kl._component_": "nowhere.KL"}, r"defenses.kl._component_: nowhere.KL: no mod"),
        ({"defenses.kl._component_": "torch.optim.Adam"}, r"Adam needs the key params"),
        ({"defenses.kl._component_": "builtins.dict"}, r"not a subclass of emarecipes.defenses.De"),
        ({"defenses.kl": {"weight": 1.0}}, r"defenses.kl: a defense needs a _component_"),
        ({"defenses": [1]}, r"defenses: input should be a valid dictionary"),
        ({"defenses.loss": KL}, r"defenses.loss: the name loss is taken"),
        ({"defences": {"kl": KL}}, r"defences: unknown key (did you mean defenses?)"),
        ({"batch_size": 0}, r"batch_size: input should be greater than or equal to 1"),
        ({"batch_size": "4"}, r"batch_size: input should be a valid integer"),
        ({"epochs": 0}, r"epochs: input should be greater"),
        ({"dtype": "fp16"}, r"dtype: fp16 is not supported"),
        ({"device": "cuda"}, r"device: this machine has no usable CUDA device"),
        ({"device": "quantum"}, r"device: "),
        ({"resume_from_checkpoint": True}, r"resume_from_checkpoint: say `resume: auto` instead"),
        ({"loss._component_": "torch.nn.MSELoss"}, r"loss: the loss head computes token cross"),
        ({"model._component_": "torchtune.models.llama3_2.llama3_2"}, r"unknown key"),
        ({"model.lora_rank": "four"}, r"model.lora_rank: input should be a valid integer"),
        ({"model.lora_attn_modules": ["q_porj"]}, r"model.lora_attn_modules: input should be"),
        ({"model.embed_dim": 64}, r"k_proj.weight is 16x32 there and 32x64 in the model (and"),
        (
            {"model.num_layers": 3},
            r"layers.2.attn.k_proj.weight is missing there and 16x32 in the model (and",
        ),
        ({"checkpointer.model_type": "PHI3_MINI"}, r"checkpointer: the checkpoint does not fit"),
        (
            {"checkpointer.model_type": "LAMA"},
            r"model_type: no adapter can be saved for LAMA; known: GEMMA, GEMMA2",
        ),
        ({"checkpointer.checkpoint_dir": "absent"}, r"checkpoint_dir: no such folder: absent"),
        ({"checkpointer.checkpoint_files": ["x.safetensors"]}, r"has no x.safetensors"),
        ({"tokenizer.path": "absent"}, r"tokenizer.path: no such file or folder: absent"),
        ({"dataset.data_files": "absent.jsonl"}, r"dataset.data_files: no such file: absent.jsonl"),
        ({"dataset.conversation_style": "chatml"}, r"dataset: Unsupported conversation style"),
        ({"dataset.conversation_column": "talk"}, r'a row needs a list of messages under "talk"'),
        ({"optimizer.lr": "fast"}, r"optimizer.lr: "),
        ({"optimizer._component_": "torch.optim.AdamWW"}, r"torch.optim has no AdamWW"),
        ({"batch_size": 8, "gradient_accumulation_steps": 2}, r"12 rows are too few for one step"),
        ({"output_dir": "${nothing}"}, r"cannot be resolved"),
        ({"tokenizer.max_seq_len": -5}, r"max_seq_len must be at least 1, not -5"),
        ({"model.norm_eps": 0.1}, r"the model is built with norm_eps 0.1, "),
        ({"model.rope_base": 500000}, r"the model is built with rope_base 500000, "),
        ({"model.scale_factor": 32}, r"the model is built with scale_factor 32, "),
        ({"model.num_heads": 8, "model.num_kv_heads": 4}, r"4 heads and 2 key-value heads, but"),
        (
            {"checkpointer.model_type": "QWEN2"},
            r"is of a llama model: checkpointer.model_type m",
        ),
        ({"checkpointer.adapter_checkpoint": "a.pt"}, r"name its folder as init_adapter"),
        ({"loss.label_smoothing": 0.5}, r"loss.label_smoothing: has no effect here"),
        (
            {"model.lora_dropout": float("nan")},
            r"model.lora_dropout: must be at least 0 and below 1",
        ),
        ({"defenses.tokens": KL}, r"defenses.tokens: the name tokens is taken"),
        ({"pad_to_multiple_of": 600}, r"pad_to_multiple_of: pads 117 tokens to more than the 512"),
        ({"batch_size": "???"}, r"batch_size: ??? must be given a value"),
        ({"device": "xpu"}, r"device: no xpu device here"),
        ({"output_dir": ""}, r"output_dir: string should have at least 1 character"),
        ({"model.lora_rank": 0}, r"model.lora_rank: must be > 0, not 0"),
        ({"model.lora_alpha": 0}, r"model.lora_alpha: must be > 0, not 0"),
        ({"model.lora_dropout": 1.0}, r"model.lora_dropout: must be at least 0 and below 1"),
        ({"optimizer.lr": float("nan")}, r"optimizer: Invalid learning rate"),
        ({"optimizer": {"_component_": "torch.optim.LBFGS"}}, r"optimizer: it needs a closure"),
        ({"optimizer": {"_component_": "torch.optim.SparseAdam"}}, r"optimizer: SparseAdam takes"),
        ({"optimizer.capturable": True}, r"AdamW cannot take a step: If capturable=True, params"),
        ({"optimizer.differentiable": True}, r"AdamW cannot take a step: a leaf Variable that"),
        ({"adapter_dtype": "bf16"}, r"adapter_dtype: input should be 'fp32', not 'bf16'"),
        (
            {"lr_scheduler": {"_component_": "torch.optim.lr_scheduler.StepLR", "step_size": 1}},
            r"lr_scheduler: StepLR",
        ),
        (
            {"metric_logger": {"_component_": "builtins.int"}},
            r"metric_logger: not one of",
        ),
        (
            {"collate_fn": "torchtune.data.left_pad_sequence"},
            r"collate_fn: torchtune.data.l",
        ),
        (
            {"dataset.source": "csv"},
            r"rows.jsonl: Error tokenizing data. C error: Expected 8",
        ),
        ({"tokenizer.max_seq_len": 5}, r"none of its 12 rows has a label"),
        (
            {"save_merged": True, "save_adapter_weights_only": True},
            r"save_merged: true contradicts",
        ),
        ({"custom_sharded_layers": ["output"]}, r"custom_sharded_layers: the model has no module"),
        ({"custom_sharded_layers": ["tok_embeddings"]}, r"output layer is tied"),
    ],
)
def test_config(case: Case, change: dict[str, Any], expected: str) -> None:
    config = OmegaConf.create(case.config)
    for key, value in change.items():
        OmegaConf.update(config, key, value, merge=False)
    case.config = OmegaConf.to_container(config, resolve=False)  # type: ignore[assignment]
    message = case.error()
    assert expected in message
    assert "config.yaml" in message or "rows.jsonl" in message


def test_a_key_that_torchtunes_recipe_reads_from_the_config(case: Case) -> None:
    del case.config["model"]["apply_lora_to_mlp"]
    assert "model: the config must give apply_lora_to_mlp" in case.error()


def test_a_tokenizer_with_other_numbers(case: Case) -> None:
    """As large as the model's own, it would train without a complaint. Added tokens may differ."""
    base = Path(case.config["tokenizer"]["path"])
    spec = json.loads((base / "tokenizer.json").read_text())
    vocabulary = spec["model"]["vocab"]
    first, *rest = words = [word for word in vocabulary if vocabulary[word] > 1000]
    for name, moved in (("renamed", {}), ("moved", dict(zip(words, [*rest, first], strict=True)))):
        shutil.copytree(base, other := case.folder / name)
        spec["added_tokens"][-1]["content"] = "<|another|>"
        spec["model"]["vocab"] = vocabulary | {w: vocabulary[to] for w, to in moved.items()}
        (other / "tokenizer.json").write_text(json.dumps(spec))
    case.config["tokenizer"]["path"] = str(case.folder / "moved")
    message = case.error()
    assert "tokenizer.path: not this model's tokenizer: " in message
    assert f"so are {len(words) - 1} more" in message
    case.config["tokenizer"]["path"] = str(case.folder / "renamed")
    case.config["defenses"]["kl"]["weight"] = -1.0  # The next mistake that is found.
    assert "weight must be" in case.error()


def test_an_output_layer_of_its_own_that_the_config_calls_tied(case: Case) -> None:
    """transformers tied it over for some releases, and lost what the file holds."""
    base = Path(case.config["checkpointer"]["checkpoint_dir"])
    shutil.copytree(base, other := case.folder / "model")
    weights = load_file(base / "model.safetensors")
    weights["lm_head.weight"] = 2 * weights["model.embed_tokens.weight"]
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    case.config["checkpointer"]["checkpoint_dir"] = str(other)
    expected = f"output.weight is {toy_run.VOCABULARY}x{toy_run.WIDTH} there and missing in the"
    assert expected in case.error()


def test_line_of_the_key_is_named(case: Case) -> None:
    case.config["defenses"]["kl"]["wieght"] = 1.0
    message = case.error()
    lines = (case.folder / "config.yaml").read_text().splitlines()
    (number,) = [i for i, line in enumerate(lines, start=1) if "wieght" in line]
    assert f"config.yaml:{number}: defenses.kl.wieght" in message


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (chat(("user", "Only a question?")), "rows.jsonl:2: the conversation has no assistant"),
        (chat(("usr", "a"), ("assistant", "b")), "rows.jsonl:2: message 0: unknown role 'usr'"),
        (chat(("user", None), ("assistant", "b")), "rows.jsonl:2: message 0: content must be text"),
        ({"messages": [{"role": "user"}]}, "rows.jsonl:2: message 0: a message is"),
        (
            chat(("user", [{"type": "image"}]), ("assistant", "b")),
            "rows.jsonl:2: message 0: conten",
        ),
        ("[" * 5000, "rows.jsonl:2: "),
        ({"messages": "hello"}, "rows.jsonl:2: a row needs a list of messages"),
        ({"text": "hello"}, "rows.jsonl:2: a row needs a list of messages"),
        ([1, 2], "rows.jsonl:2: a row must be a JSON object, not [1, 2]"),
        ('{"messages": [', "rows.jsonl:2: not valid JSON"),
        (chat(("user", "a"), ("user", "b"), ("assistant", "c")), "rows.jsonl:2: Two consecutive"),
        (chat(("assistant", "b"), ("user", "a")), "rows.jsonl:2: Assistant message before"),
    ],
)
def test_data_row(case: Case, row: Any, expected: str) -> None:
    case.write(GOOD, row, GOOD)
    assert expected in case.error()


@pytest.mark.parametrize(("text", "expected"), [("", "is empty"), ("\n\n", "no rows")])
def test_empty_data(case: Case, text: str, expected: str) -> None:
    case.rows.write_text(text)
    assert expected in case.error()


def test_data_that_is_not_text(case: Case) -> None:
    case.rows.write_bytes(b'{"messages": "\xff\xfe"}\n')
    assert "not UTF-8" in case.error()


def test_rows_without_a_label_are_dropped_and_counted(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    from emarecipes.training.checked import CheckedRun

    case.write(GOOD, chat(("user", "why " * 200), ("assistant", "b")), *[GOOD] * 3)
    path = toy_run.write_config(case.folder / "config.yaml", case.config)
    rows = CheckedRun(["--config", str(path)], 1, 0).rows
    assert (len(rows), rows.dropped) == (4, 1)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("defenses.kl.wieght=2", "command line: defenses.kl.wieght: unknown key (did you mean"),
        ("batch_size", "command line: batch_size: an override is written key=value"),
        ("~defenses.kll", "command line: ~defenses.kll: no such key to remove (did you mean kl?)"),
        ("--batch_size=3", "an override is written key=value"),
        ("batch_size=-3", "command line: batch_size: input should be greater"),
    ],
)
def test_override(case: Case, override: str, expected: str) -> None:
    assert expected in case.error(override)


def test_compiling_without_a_compiler(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    message = case.error("compile=true")
    assert "compile: on a CPU it needs a C++ compiler, and there is no no-such-comp" in message
