"""The prepared SmolLM2: torchtune and transformers agree on it, and it still answers questions."""

from pathlib import Path

import pytest
import torch
from torchtune.models.llama3_2 import lora_llama3_2
from torchtune.modules import TransformerDecoder
from torchtune.training import FullModelHFCheckpointer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

CHATS = [
    [{"role": "user", "content": "Is it safe to mix bleach and vinegar?"}],
    [
        {"role": "system", "content": "You answer in rhymes."},
        {"role": "user", "content": "Write a short poem about 2024 and the sea."},
        {"role": "assistant", "content": "The waves of twenty-four, they roared upon the shore."},
        {"role": "user", "content": "Encore, s'il te plaît 🙂"},
    ],
]


@pytest.fixture(scope="module")
def hf_model(model_dir: Path) -> LlamaForCausalLM:
    model = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    assert isinstance(model, LlamaForCausalLM) and model.dtype == torch.float32
    return model


def torchtune_model(model_dir: Path, output_dir: Path) -> TransformerDecoder:
    model = lora_llama3_2(
        lora_attn_modules=["q_proj", "v_proj"],
        vocab_size=49152,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        embed_dim=576,
        intermediate_dim=1536,
        max_seq_len=2048,
        rope_base=100_000,
        norm_eps=1e-5,
        scale_factor=1,
        lora_rank=1,
        lora_alpha=1.0,
    )
    checkpointer = FullModelHFCheckpointer(
        checkpoint_dir=str(model_dir),
        checkpoint_files=["model.safetensors"],
        model_type="LLAMA3_2",
        output_dir=str(output_dir),
    )
    missing, unexpected = model.load_state_dict(
        checkpointer.load_checkpoint()["model"], strict=False
    )
    assert unexpected == [] and all("lora" in name for name in missing)
    return model.eval()  # lora_b is zero: the adapters change nothing


def test_torchtune_and_transformers_have_the_same_logits(
    model_dir: Path, hf_model: LlamaForCausalLM, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = torchtune_model(model_dir, tmp_path)
    for chat in CHATS:
        ids = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=False
        )
        with torch.no_grad():
            expected, actual = hf_model(ids).logits, model(ids)
        assert expected.abs().max() > 5  # a model with something to say
        torch.testing.assert_close(actual.float(), expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("What is the capital of France?", "Paris"),
        ("How many days are in a week?", "7"),
        ("What is 2+2?", "4"),
    ],
)
def test_answers_are_sensible(
    question: str, answer: str, model_dir: Path, hf_model: LlamaForCausalLM
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    tokens = hf_model.generate(**prompt, do_sample=False, max_new_tokens=24)
    text = tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer in text
    words = text.split()
    assert len(set(words)) > len(words) / 2, text  # no loops
