"""The byte-level BPE tokenizer of a GGUF file, as tokenizer.json and tokenizer_config.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from emarecipes.errors import first_line

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # gguf.TokenType

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
# How text is cut before merging, by the name in tokenizer.ggml.pre: a rule; None is GPT-2's own.
_SPLITS = {
    "gpt-2": None,
    "smollm": None,
    "qwen2": _WORDS + _REST,
    "llama-bpe": _WORDS + "{1,3}" + _REST,
}


def write_tokenizer(meta: Mapping[str, Any], path: Path) -> None:
    """Write ``tokenizer.json``.

    Raises:
        ValueError: The tokenizer, or how it cuts text, is not known; its tokens or merges do not
            belong together.
        KeyError: A part of it is not there.
    """
    from tokenizers import AddedToken, Tokenizer, models, normalizers

    _check_kind(meta)
    pre = meta["tokenizer.ggml.pre"]
    tokens = _tokens(meta)
    # Byte-level tokens spell a space as another letter, so the one space is the separator.
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    if len({token for token, _ in tokens}) < len(tokens):
        raise ValueError("tokenizer.ggml.tokens has a token twice")
    vocab = {token: i for i, (token, _) in enumerate(tokens)}
    try:
        bpe = models.BPE(vocab=vocab, merges=merges, ignore_merges=pre == "llama-bpe")
    except Exception as error:  # The tokenizers library raises bare Exception.
        raise ValueError(f"tokenizer.ggml.merges: {first_line(error)}") from None
    tokenizer = Tokenizer(bpe)
    if pre == "qwen2":  # As Qwen2's own tokenizer.json; GGUF does not say.
        tokenizer.normalizer = normalizers.NFC()
    _set_pre_tokenizer(tokenizer, pre)
    for token, kind in tokens:
        if kind == _CONTROL:
            tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif kind == _USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, special=False, normalized=False)])
    if _adds_bos(meta):
        _put_in_front(tokenizer, tokens[meta["tokenizer.ggml.bos_token_id"]][0])
    tokenizer.save(str(path))


def tokenizer_config(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of ``tokenizer_config.json``.

    Raises:
        ValueError: The file has no chat template or no end token.
    """
    tokens = _tokens(meta)
    if not isinstance(meta.get("tokenizer.chat_template"), str):
        raise ValueError("has no tokenizer.chat_template; take an instruction-tuned model's file")
    if meta.get("tokenizer.ggml.eos_token_id") is None:
        raise ValueError("has no tokenizer.ggml.eos_token_id")
    special = {
        str(i): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": kind == _CONTROL,
        }
        for i, (token, kind) in enumerate(tokens)
        if kind in (_CONTROL, _USER_DEFINED)
    }
    ids = {name: meta.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "unknown")}
    ids["pad"] = meta.get("tokenizer.ggml.padding_token_id")
    ids["unk"] = ids.pop("unknown")
    named = {f"{name}_token": tokens[i][0] for name, i in ids.items() if i is not None}
    return {
        "add_prefix_space": False,
        "added_tokens_decoder": special,
        "chat_template": meta["tokenizer.chat_template"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": meta[f"{meta['general.architecture']}.context_length"],
        # The class that takes tokenizer.json as it is: a named one brings its own pre-tokenizer.
        "tokenizer_class": "PreTrainedTokenizerFast",
        **named,
    }


def _check_kind(meta: Mapping[str, Any]) -> None:
    kind, pre = meta["tokenizer.ggml.model"], meta.get("tokenizer.ggml.pre")
    if kind != "gpt2":
        raise ValueError(
            f"tokenizer.ggml.model is {kind}; only byte-level BPE (gpt2) can be prepared"
        )
    if pre not in _SPLITS:
        raise ValueError(
            f"tokenizer.ggml.pre is {pre}, and how that cuts text is not known here; known: "
            f"{', '.join(_SPLITS)}"
        )


def _tokens(meta: Mapping[str, Any]) -> list[tuple[str, int]]:
    """Return every token and its kind, but for a rest that no text becomes."""
    kinds = meta["tokenizer.ggml.token_type"]
    found = list(zip(meta["tokenizer.ggml.tokens"], kinds, strict=True))
    while found and found[-1][1] == _UNUSED:  # Rows that fill the embedding up.
        found.pop()
    unknown = {kind for _, kind in found} - {_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED}
    if unknown:
        raise ValueError(f"tokenizer.ggml.token_type has {sorted(unknown)}, not of byte-level BPE")
    return found


def _set_pre_tokenizer(tokenizer: Any, pre: str) -> None:
    from tokenizers import Regex, decoders, pre_tokenizers

    split = _SPLITS[pre]
    steps: list[Any] = []
    if pre == "smollm":
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if split is not None:
        steps.append(pre_tokenizers.Split(Regex(split), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()


def _adds_bos(meta: Mapping[str, Any]) -> bool:
    """Whether a text that is no conversation begins with the beginning token."""
    # llama.cpp adds it to a Llama 3 whose file does not say.
    default = meta["tokenizer.ggml.pre"] == "llama-bpe"
    return bool(meta.get("tokenizer.ggml.add_bos_token", default))


def _put_in_front(tokenizer: Any, bos: str) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A",
        pair=f"{bos} $A {bos} $B",
        special_tokens=[(bos, tokenizer.token_to_id(bos))],
    )
