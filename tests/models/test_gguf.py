"""The conversion of a GGUF file, on a toy model whose Hugging Face weights are known."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer
from toy_gguf import HEADS, KV_HEADS, TEMPLATE, hf_weights, write_gguf

from emarecipes.models.prepare.gguf import convert


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted")
    write_gguf(folder / "toy.gguf")
    convert(folder / "toy.gguf", folder)
    return folder


def test_weights_are_in_hugging_face_layout(folder: Path) -> None:
    written, expected = load_file(folder / "model.safetensors"), hf_weights()
    assert written.keys() == expected.keys()
    embedding = "model.embed_tokens.weight"
    for name in expected.keys() - {embedding}:
        np.testing.assert_array_equal(written[name], expected[name], err_msg=name)
    # Q4_1 has 15 steps between a block's least and greatest value, so it is off by half a step.
    blocks = expected[embedding].reshape(-1, 32)
    step = (blocks.max(1) - blocks.min(1)) / 15
    error = np.abs(written[embedding] - expected[embedding]).reshape(-1, 32).max(1)
    assert (error <= step * 0.51).all() and error.max() > 0.01


def test_configuration(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert (config["model_type"], config["tie_word_embeddings"]) == ("llama", True)
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (HEADS, KV_HEADS)
    assert (config["rms_norm_eps"], config["rope_theta"]) == (1e-5, 10000.0)
    generation = json.loads((folder / "generation_config.json").read_text())
    assert (generation["eos_token_id"], generation["do_sample"]) == (2, True)
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    assert (tokenizer["chat_template"], tokenizer["eos_token"]) == (TEMPLATE, "<|im_end|>")


def test_tokenizer_splits_digits_and_knows_control_tokens(folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    encoding = tokenizer.encode("<|im_start|>ab 12<|im_end|>")
    assert encoding.tokens == ["<|im_start|>", "ab", "Ġ", "1", "2", "<|im_end|>"]  # not "12"
    assert encoding.ids == [1, 5, 6, 7, 8, 2]
    assert tokenizer.decode(encoding.ids) == "ab 12"
