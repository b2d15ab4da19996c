"""From a system prompt and a question to tokens, and whether a model can answer them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torchtune.data import Message

from emarecipes.config import Origin
from emarecipes.errors import UserError, reason


def encode_prompt(tokenizer: Any, system: str | None, question: str) -> list[int]:
    """Token ids of a system prompt (or none) and a question, up to where the answer begins."""
    return list(tokenizer({"messages": _messages(system, question, "")}, inference=True)["tokens"])


def _messages(system: str | None, question: str, answer: str) -> list[Message]:
    messages = [] if system is None else [Message(role="system", content=system, masked=True)]
    messages += [Message(role="user", content=question, masked=True)]
    return [*messages, Message(role="assistant", content=answer)]


def check_opening(tokenizer: Any, origin: Origin, system: str | None = None) -> None:
    """Check that a prompt ends where an answer begins, and not with what ends one in training.

    Of torchtune 0.6.1's tokenizers Gemma's, Mistral's, Qwen2's and Phi-3's do not heed
    `inference`, and close the empty answer: what the model says then is what comes behind it.

    Raises:
        UserError: It ends an answer, or the tokenizer cannot encode a question with an answer.
    """
    row = _messages(system, "How are you?", "Well, thank you.")
    try:
        prompt = encode_prompt(tokenizer, system, "How are you?")
        tokens = list(tokenizer({"messages": row})["tokens"])
    except Exception as error:
        raise UserError(
            f"{origin.at('tokenizer')}: cannot encode a question with an answer: {reason(error)}"
        ) from None
    pairs = zip(prompt, tokens, strict=False)
    shared = next((i for i, (a, b) in enumerate(pairs) if a != b), len(prompt))
    rest = prompt[shared:]
    if rest and tokens[-len(rest) :] == rest:
        raise UserError(
            f"{origin.at('tokenizer')}: {type(tokenizer).__name__} ends the answer before it "
            "begins: it does not heed inference=True; use emarecipes.models.hf_chat_tokenizer"
        )


def check_prompts(
    pairs: Iterable[tuple[str | None, str]],
    tokenizer: Any,
    model: Any,
    max_new_tokens: int,
    origin: Origin,
    key: str = "max_new_tokens",
) -> dict[tuple[str | None, str], list[int]]:
    """Check that every prompt can be encoded, and answered at full length.

    Args:
        pairs: System prompt and question.
        tokenizer: torchtune's, or ours.
        model: torchtune's decoder, on any device.
        max_new_tokens: An answer's.
        origin: The config's.
        key: Where it says `max_new_tokens`.

    Returns:
        Each pair's token ids.

    Raises:
        UserError: The tokenizer refuses a prompt, would cut it, leaves its system prompt out or
            ends the answer before it begins, two become the same tokens, the model does not take
            one's length or its tokens.
    """
    where = origin.at("tokenizer")
    try:
        encoded = {pair: encode_prompt(tokenizer, *pair) for pair in pairs}
    except Exception as error:
        raise UserError(
            f"{where}: cannot encode a system prompt with a question: {reason(error)}"
        ) from None
    check_opening(tokenizer, origin, next(iter(encoded))[0])
    longest = max(map(len, encoded.values()))
    limit = getattr(tokenizer, "max_seq_len", None)
    if limit is not None and longest >= limit:
        raise UserError(
            f"{origin.at('tokenizer.max_seq_len')}: {limit} tokens are too few for a system "
            "prompt and a question"
        )
    alike: dict[tuple[bool, tuple[int, ...]], tuple[str | None, str]] = {}
    for pair, tokens in encoded.items():
        # Without a system prompt the template may put in the very one that another pair names.
        other = alike.setdefault((pair[0] is None, tuple(tokens)), pair)
        if other != pair:
            raise UserError(
                f"{where}: two prompts become the same tokens, {_shown(other)} and {_shown(pair)}: "
                "the chat template leaves out what tells them apart"
            )
    for system, question in {system: question for system, question in encoded if system}.items():
        # Twice the prompt, not none, for the same reason.
        twice = encode_prompt(tokenizer, f"{system} {system}", question)
        if system.strip() and twice == encoded[system, question]:
            raise UserError(
                f"{where}: leaves out the system prompt {system!r:.60}: the tokens are the same "
                "with another one; use a tokenizer or chat template that shows it"
            )
    if longest + max_new_tokens > model.max_seq_len:
        raise UserError(
            f"{origin.at(key)}: a prompt of {longest} tokens and an answer of "
            f"{max_new_tokens} are more than the {model.max_seq_len} that the model takes"
        )
    vocabulary = model.tok_embeddings.num_embeddings
    largest = max(max(tokens) for tokens in encoded.values())
    if largest >= vocabulary:
        raise UserError(
            f"{where}: gives token {largest}, the model's vocabulary has {vocabulary}: tokenizer "
            "and model do not belong together"
        )
    return encoded


def _shown(pair: tuple[str | None, str]) -> str:
    short = (text if text is None or len(text) < 60 else f"{text[:57]}..." for text in pair)
    system, question = short
    return f"system {system!r}, question {question!r}"
