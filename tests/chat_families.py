"""Small tokenizers and chat templates in short form, of the kinds that model families use."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from emarecipes.models import HFChatTokenizer, hf_chat_tokenizer

CORPUS = [
    "You are a helpful assistant. user system model tool",
    "What is the capital of France? The capital of France is Paris.",
    "[INST] [/INST] <s> </s> ### Human: ### Assistant: and the answer is: yes, no, 1 2 3.",
] * 3
ANSWERS = ["The capital is Paris.", "Yes, 1 2 3."]
BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_level(special: list[AddedToken]) -> Tokenizer:
    """GPT-2, Llama 3, Qwen: byte-level BPE, whose post-processor trims offsets."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens(special)
    return tokenizer


def sentencepiece(
    special: list[AddedToken],
    pre_tokenizer: pre_tokenizers.PreTokenizer | None,
    normalizer: normalizers.Normalizer | None = None,
) -> Tokenizer:
    """Llama 2, Mistral, Gemma: BPE with "▁" for a space and bytes for unknown letters."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    control = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=control + BYTE_TOKENS, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    spec = json.loads(tokenizer.to_str())
    spec["added_tokens"] = spec["added_tokens"][: len(control)]  # the bytes are ordinary tokens
    spec["model"].update(byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    else:
        tokenizer = without_pre_tokenizer(tokenizer)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_tokens(special)
    return tokenizer


def without_pre_tokenizer(tokenizer: Tokenizer) -> Tokenizer:
    return Tokenizer.from_str(json.dumps(json.loads(tokenizer.to_str()) | {"pre_tokenizer": None}))


def control_tokens(*names: str, **options: bool) -> list[AddedToken]:
    return [AddedToken(name, special=True, normalized=False, **options) for name in names]


@dataclass
class Family:
    """One kind of tokenizer and template, and what carries the loss if ANSWERS do."""

    tokenizer: Tokenizer
    template: str
    eos: str
    bos: str | None = None
    loss: list[str] = field(default_factory=list)
    stop: list[str] = field(default_factory=list)
    accepts_system: bool = True

    def write(self, folder: Path) -> HFChatTokenizer:
        self.tokenizer.save(str(folder / "tokenizer.json"))
        config: dict[str, Any] = {"eos_token": self.eos, "chat_template": self.template}
        if self.bos is not None:  # as older folders write it
            config["bos_token"] = {"content": self.bos, "__type": "AddedToken"}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        return hf_chat_tokenizer(str(folder))

    def reference(self) -> PreTrainedTokenizerFast:
        named = {"eos_token": self.eos} | ({"bos_token": self.bos} if self.bos else {})
        return PreTrainedTokenizerFast(
            tokenizer_object=self.tokenizer, chat_template=self.template, **named
        )


LLAMA_3 = """\
{{ bos_token }}{% for m in messages %}
    {{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim }}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}"""

MISTRAL = """\
{{ bos_token }}{% for m in messages %}
    {%- if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}
    {%- elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}
    {%- else %}{{ raise_exception('Only user and assistant roles are supported!') }}
    {%- endif %}
{%- endfor %}"""

GEMMA = """\
{{ bos_token }}{% for m in messages %}
    {%- set role = 'model' if m['role'] == 'assistant' else m['role'] %}
    {{- '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""

# Drops the thinking of earlier answers, and writes an empty one before the last.
QWEN_3 = """\
{% for m in messages %}
    {%- set content = m.content %}
    {%- if m.role == 'assistant' and loop.last %}
        {%- if '</think>' not in content %}
            {%- set content = '<think>\n\n</think>\n\n' + content %}
        {%- endif %}
    {%- elif m.role == 'assistant' %}
        {%- set content = content.split('</think>')[-1].lstrip('\n') %}
    {%- endif %}
    {{- '<|im_start|>' + m.role + '\n' + content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

# Its tokens swallow the whitespace behind them, and a finished conversation has an end of its own.
PHI_3 = """\
{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"""

# Opens its answers with a control token, and marks what stands behind it.
CHANNELS = """\
{% for m in messages %}
    {%- if m['role'] == 'assistant' %}
        {{- '<|start|>assistant<|channel|>final<|message|>' }}
        {%- generation %}{{ m['content'] + '<|return|>' }}{% endgeneration %}
    {%- else %}{{ '<|start|>' + m['role'] + '<|message|>' + m['content'] + '<|end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"""

# Control tokens at the very end only.
PLAIN = """\
{% for m in messages %}
    {%- if m['role'] == 'assistant' %}{{ '### Assistant:' + m['content'] + '\n' }}
    {%- else %}{{ '### Human: ' + m['content'] + '\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '### Assistant:' }}{% else %}{{ eos_token }}{% endif %}"""


def llama_2_normalizer() -> normalizers.Normalizer:
    return normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])


def families() -> dict[str, Family]:
    chatml = control_tokens("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    thinking = [AddedToken(n, special=False, normalized=False) for n in ("<think>", "</think>")]
    header = control_tokens("<|begin|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    phi = control_tokens("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", rstrip=True)
    channels = control_tokens("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>")
    gemma = control_tokens("<start_of_turn>", "<end_of_turn>", "<bos>", "<eos>")
    inst = control_tokens("[INST]", "[/INST]")
    left = control_tokens("[INST]", "[/INST]", lstrip=True)
    spaces = normalizers.Replace(" ", "▁")

    def ends(*endings: str) -> list[str]:
        return [answer + end for answer, end in zip(ANSWERS, endings, strict=True)]

    def metaspace(scheme: str) -> pre_tokenizers.PreTokenizer:
        return pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)

    mistral = {"template": MISTRAL, "eos": "</s>", "bos": "<s>", "accepts_system": False}
    mistral |= {"stop": ["</s>"], "loss": [f" {answer}</s>" for answer in ANSWERS]}
    return {
        "llama3": Family(
            byte_level(header),
            LLAMA_3,
            "<|eot_id|>",
            "<|begin|>",
            ends("<|eot_id|>", "<|eot_id|>"),
            ["<|eot_id|>"],
        ),
        "qwen3": Family(
            byte_level(chatml + thinking),
            QWEN_3,
            "<|im_end|>",
            None,
            [f"{ANSWERS[0]}<|im_end|>", f"<think>\n\n</think>\n\n{ANSWERS[1]}<|im_end|>"],
            ["<|im_end|>"],
        ),
        "phi3": Family(
            byte_level(phi + control_tokens("<|endoftext|>")),
            PHI_3,
            "<|endoftext|>",
            None,
            ends("<|end|>", "<|end|>"),
            ["<|endoftext|>", "<|end|>"],
        ),
        "channels": Family(
            byte_level(channels),
            CHANNELS,
            "<|return|>",
            None,
            ends("<|return|>", "<|return|>"),
            ["<|return|>"],
        ),
        "plain": Family(
            byte_level(control_tokens("<eos>")),
            PLAIN,
            "<eos>",
            None,
            ends("\n", "\n<eos>"),
            ["<eos>"],
        ),
        "gemma": Family(
            sentencepiece(gemma, pre_tokenizers.Split(" ", "merged_with_previous"), spaces),
            GEMMA,
            "<eos>",
            "<bos>",
            ends("<end_of_turn>", "<end_of_turn>"),
            ["<eos>", "<end_of_turn>"],
        ),
        "mistral_text": Family(sentencepiece([], metaspace("first")), **mistral),
        "mistral_control": Family(sentencepiece(inst, metaspace("first")), **mistral),
        "mistral_lstrip": Family(sentencepiece(left, metaspace("first")), **mistral),
        "always": Family(sentencepiece([], metaspace("always")), **mistral),
        "llama2": Family(sentencepiece([], None, llama_2_normalizer()), **mistral),
    }


FAMILIES = families()
