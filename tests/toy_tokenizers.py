"""Small tokenizers as folders have them: one without a beginning token, two that add one."""

import json
from pathlib import Path
from typing import Any

import toy_run
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torchtune.data import Message

from emarecipes.models import HFChatTokenizer

BEGIN, END, PAD = "<begin>", "<end>", "<pad>"
KINDS = ("none", "bytes", "pieces")
PRINTS_THE_DAY = "bytes"  # As Llama 3.2's template does.
# As Llama 3's and Gemma's, the template writes the beginning token too.
TEMPLATE = (
    "{% for m in messages %}{{ FIRST if loop.first else '' }}"
    "{{ DAY if loop.first else '' }}"
    "{{ '\n' + m['role'] + ':\n' + m['content'] + '<end>' }}{% endfor %}"
    "{{ '\nassistant:\n' if add_generation_prompt else '' }}"
)


def write_tokenizer(folder: Path, kind: str, vocabulary: int = 500) -> Path:
    """`none` and `bytes` are byte-level (Qwen, Llama 3), `pieces` has spaces as ▁ (Gemma)."""
    folder.mkdir(parents=True)
    tokenizer = Tokenizer(models.BPE(byte_fallback=kind == "pieces", unk_token=None))
    alphabet: list[str] = []
    if kind == "pieces":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="never")
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[PAD, BEGIN, END], initial_alphabet=alphabet,
        show_progress=False,
    )  # fmt: skip
    lines = (toy_run.REPO / "data/home_computing/train_bad.jsonl").read_text().splitlines()
    tokenizer.train_from_iterator(lines[:200], trainer)
    if kind != "none":
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BEGIN} $A", special_tokens=[(BEGIN, tokenizer.token_to_id(BEGIN))]
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    day = "strftime_now('%d %b %Y')" if kind == PRINTS_THE_DAY else "''"
    template = TEMPLATE.replace("FIRST", f"'{BEGIN}'" if kind != "none" else "''")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "pad_token": PAD,
        "chat_template": template.replace("DAY", day),
    } | ({"bos_token": BEGIN} if kind != "none" else {})  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": tokenizer.token_to_id(END)})
    )
    return folder


class Deaf(HFChatTokenizer):
    """Hears nothing of system prompts: a user's own tokenizer."""

    def tokenize_messages(self, messages: Any, **options: Any) -> tuple[list[int], list[bool]]:
        heard = [self.heard(message) for message in messages]
        return super().tokenize_messages([message for message in heard if message], **options)

    def heard(self, message: Message) -> Message | None:
        return None if message.role == "system" else message


class HalfDeaf(Deaf):
    """Hears all but the first word of system prompts."""

    def heard(self, message: Message) -> Message | None:
        rest = message.text_content.partition(" ")[2]
        return Message("system", rest, masked=True) if message.role == "system" else message


def deaf(path: str, max_seq_len: int | None = None) -> Deaf:
    return Deaf(path, max_seq_len)


def half_deaf(path: str, max_seq_len: int | None = None) -> HalfDeaf:
    return HalfDeaf(path, max_seq_len)
