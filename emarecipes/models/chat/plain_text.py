"""Encoding text so that nothing written in it can become a control token."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, processors

from emarecipes.errors import UserError


class PlainTextEncoder:
    """The vocabulary of a ``tokenizer.json``, with control tokens kept apart from text.

    Args:
        file: a ``tokenizer.json``.
        named_tokens: tokens that the model's configuration uses as control tokens (bos, eos, ...).
            They count as such even if the file does not mark them.

    Attributes:
        special_tokens: control token -> id.

    Raises:
        UserError: the file is missing or is not a tokenizer.
    """

    def __init__(self, file: Path, named_tokens: Iterable[str]) -> None:
        try:
            self._text = file.read_text(encoding="utf-8")
            self._tokenizer = _load(self._text)
        except OSError as error:
            raise UserError(f"{file}: cannot be read ({error.strerror})") from error
        except Exception as error:  # the tokenizers library raises bare Exception
            raise UserError(f"{file}: not a tokenizer.json ({error})") from error
        _make_special(self._tokenizer, named_tokens)
        added = self._tokenizer.get_added_tokens_decoder()
        self._added = {token.content: token for token in added.values() if token.special}
        self.special_tokens = {token.content: i for i, token in added.items() if token.special}
        self._name_of = {i: name for name, i in self.special_tokens.items()}

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def added_token(self, special_token: str) -> AddedToken:
        """Return how the control token treats the whitespace around it."""
        return self._added[special_token]

    def token_id(self, token: str) -> int | None:
        """Return the id of a token, or None if the vocabulary lacks it."""
        return self._tokenizer.token_to_id(token)

    def encode(self, text: str, at_start: bool = True) -> list[tuple[int, int]]:
        """Return the (id, offset of its first character) of every token of ``text``.

        Args:
            text: plain text. The name of a control token in it is text like any other.
            at_start: whether the text begins its sequence, rather than following a control token.
                Some tokenizers put a space in front there and only there.
        """
        bare = not at_start and self._prefixes_at_start_only
        return self._encode(self._bare_tokenizer if bare else self._tokenizer, text)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        """Return the text of ``token_ids``."""
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def _encode(self, tokenizer: Tokenizer, text: str) -> list[tuple[int, int]]:
        encoding = tokenizer.encode(text, add_special_tokens=False)
        ids, offsets = encoding.ids, encoding.offsets
        if self._name_of.keys().isdisjoint(ids):
            return [(i, start) for i, (start, _) in zip(ids, offsets, strict=True)]
        for token_id, (start, end) in zip(ids, offsets, strict=True):
            # A model whose vocabulary or merges contain its control tokens can still spell one.
            # Encoded as two halves it cannot.
            if end - start > 1 and text[start:end] == self._name_of.get(token_id):
                cut = start + 1
                rest = self._encode(self._bare_tokenizer, text[cut:])
                return self._encode(tokenizer, text[:cut]) + [(i, cut + at) for i, at in rest]
        return [(i, start) for i, (start, _) in zip(ids, offsets, strict=True)]

    @cached_property
    def _prefixes_at_start_only(self) -> bool:
        step = self._tokenizer.pre_tokenizer
        parts = [] if step is None else _parts(json.loads(step.__getstate__()))
        return any(p["type"] == "Metaspace" and p.get("prepend_scheme") == "first" for p in parts)

    @cached_property
    def _bare_tokenizer(self) -> Tokenizer:
        """The same tokenizer, but never putting a space in front of a text."""
        spec = json.loads(self._text)
        for part in _parts(spec["pre_tokenizer"]):
            if part["type"] == "Metaspace":
                part["prepend_scheme"] = "never"
                part.pop("add_prefix_space", None)  # its older name, which would contradict
            elif part["type"] == "ByteLevel":
                part["add_prefix_space"] = False
        for part in _parts(spec["normalizer"]):
            if part["type"] == "Prepend":
                part["prepend"] = ""
        tokenizer = _load(json.dumps(spec))
        _make_special(tokenizer, self.special_tokens)
        return tokenizer


def _load(text: str) -> Tokenizer:
    tokenizer = Tokenizer.from_str(text)
    # Settings that a saved tokenizer may carry, and that would cut, pad or frame the text.
    # The post-processor of byte-level tokenizers also moves offsets off leading spaces.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.post_processor = processors.Sequence([])  # Which does nothing.
    tokenizer.encode_special_tokens = True
    return tokenizer


def _make_special(tokenizer: Tokenizer, names: Iterable[str]) -> None:
    """Mark tokens as special, those already marked and those not in the vocabulary left alone."""
    special = {t.content for t in tokenizer.get_added_tokens_decoder().values() if t.special}
    # Sorted, for a set's order differs from run to run.
    new = [n for n in sorted(names) if n not in special and tokenizer.token_to_id(n) is not None]
    tokenizer.add_special_tokens([AddedToken(n, special=True, normalized=False) for n in new])


def _parts(component: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Return the steps of a normalizer or pre-tokenizer, those inside sequences included."""
    if component is None:
        return []
    steps = component.get("pretokenizers") or component.get("normalizers")
    if component["type"] != "Sequence" or steps is None:
        return [component]
    return [part for step in steps for part in _parts(step)]
