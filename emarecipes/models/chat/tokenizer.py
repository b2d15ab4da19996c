"""A torchtune tokenizer for any Hugging Face folder: its ``tokenizer.json`` and chat template."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from emarecipes.errors import UserError
from emarecipes.models.chat.conversation import Conversation
from emarecipes.models.chat.plain_text import PlainTextEncoder
from emarecipes.models.chat.template import (
    ChatTemplate,
    model_folder,
    read_config,
    token_name,
)

if TYPE_CHECKING:
    from torchtune.data import Message

_HF_ROLES = {"ipython": "tool"}
_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can smuggle one in; it cannot be encoded


def hf_chat_tokenizer(
    path: str,
    max_seq_len: int | None = None,
    chat_template: str | None = None,
    date: str | None = None,
    template_arguments: Mapping[str, Any] | None = None,
) -> HFChatTokenizer:
    """Build the tokenizer of a Hugging Face folder, for a config's ``tokenizer._component_``.

    Args:
        path: the model's folder, or the ``tokenizer.json`` in it.
        max_seq_len: number of tokens that samples are cut to; None keeps them whole.
        chat_template: a template to use instead of the folder's own: Jinja text, or the path of a
            file whose name ends in ``.jinja``.
        date: ``YYYY-MM-DD``, the day (at 0:00) for a template that reads the clock (Llama 3.2's
            prints it); None: today. The recipes put it into the config that they write.
        template_arguments: values of further variables that the template reads, in training as
            in prompts, such as ``{"enable_thinking": False}`` for Qwen3's.

    Raises:
        UserError: no ``tokenizer.json``, no chat template, no end-of-sequence token; no such day,
            or one for a template that reads no clock; an argument that the template never reads.

    Example:
        >>> tokenizer = hf_chat_tokenizer("models/smollm2-135m-instruct", max_seq_len=1024)
        >>> tokens, mask = tokenizer.tokenize_messages(
        ...     [Message("user", "Hi", masked=True), Message("assistant", "Hello!")]
        ... )
    """
    if max_seq_len is not None and max_seq_len < 1:
        raise UserError(f"max_seq_len must be at least 1, not {max_seq_len}")
    return HFChatTokenizer(path, max_seq_len, chat_template, date, template_arguments)


def printed_day(
    path: str,
    chat_template: str | None = None,
    date: str | None = None,
    template_arguments: Mapping[str, Any] | None = None,
) -> str | None:
    """The day that the folder's chat template is told; None if it does not read the clock.

    Args and errors: see :func:`hf_chat_tokenizer`.
    """
    folder = model_folder(path)
    config = read_config(folder)
    return ChatTemplate(folder, config, chat_template, date, template_arguments).date


class HFChatTokenizer:
    """Tokenizes conversations as the model was trained on them, and marks what to learn.

    Follows torchtune's ``ModelTokenizer`` and ``Transform`` contracts. Token ids are those of
    transformers' ``apply_chat_template``, except that a control token's name inside a message
    (``<|im_end|>`` typed by a user) stays text.

    Attributes:
        max_seq_len: number of tokens that samples are cut to, or None.
        special_tokens: control token -> id.
        bos_id: id of the configured beginning-of-sequence token, or None.
        eos_id: id of the configured end-of-sequence token.
        pad_id: id of the configured padding token; ``eos_id`` if there is none. Padding carries
            no label, so a padding token that is also in use does no harm.
        stop_tokens: ids that end an answer: ``eos_id``, and what the template closes answers with.
        date: the day that the template is told; None if it does not read the clock.

    Args and errors: see :func:`hf_chat_tokenizer`.
    """

    def __init__(
        self,
        path: str,
        max_seq_len: int | None = None,
        chat_template: str | None = None,
        date: str | None = None,
        template_arguments: Mapping[str, Any] | None = None,
    ) -> None:
        folder = model_folder(path)
        if not (folder / "tokenizer.json").is_file():
            raise UserError(f"{folder}: no tokenizer.json there; give a Hugging Face model folder")
        config = read_config(folder)
        names = {key: token_name(config, f"{key}_token") for key in ("bos", "eos", "pad", "unk")}
        self._encoder = PlainTextEncoder(
            folder / "tokenizer.json", [name for name in names.values() if name is not None]
        )
        self._template = ChatTemplate(folder, config, chat_template, date, template_arguments)
        self.date = self._template.date
        self._arguments = (path, chat_template, self.date, template_arguments)
        ids = {
            key: None if name is None else self._encoder.token_id(name)
            for key, name in names.items()
        }
        if ids["eos"] is None:
            raise UserError(
                f"{folder / 'tokenizer_config.json'}: eos_token is {names['eos']!r}, "
                "which is not a token of tokenizer.json"
            )
        self.max_seq_len = max_seq_len
        self.special_tokens = self._encoder.special_tokens
        self.bos_id: int | None = ids["bos"]
        self.eos_id: int = ids["eos"]
        self.pad_id: int = self.eos_id if ids["pad"] is None else ids["pad"]
        self.stop_tokens = self._find_stop_tokens()

    def __reduce__(self) -> tuple[Callable[..., HFChatTokenizer], tuple[Any, ...]]:
        # A compiled template cannot be pickled, and a pickled tokenizer of the tokenizers library
        # forgets that control tokens in text are text.
        path, *template = self._arguments
        return hf_chat_tokenizer, (path, self.max_seq_len, *template)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included. The model's embedding may have more rows."""
        return self._encoder.vocab_size

    def encode(self, text: str, add_bos: bool = False, add_eos: bool = False) -> list[int]:
        """Return the ids of plain text, in which control tokens are text like any other.

        Args:
            text: any text.
            add_bos: put ``bos_id`` in front, if the model has one.
            add_eos: put ``eos_id`` behind.
        """
        bos = [self.bos_id] if add_bos and self.bos_id is not None else []
        eos = [self.eos_id] if add_eos else []
        return bos + [token_id for token_id, _ in self._encoder.encode(text)] + eos

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of ``token_ids``, without control tokens unless told to keep them."""
        return self._encoder.decode(token_ids, skip_special_tokens)

    def tokenize_messages(
        self, messages: Sequence[Message], *, add_end_tokens: bool = True
    ) -> tuple[list[int], list[bool]]:
        """Return the token ids of a conversation and, for each, whether it carries no loss.

        The loss is on every unmasked assistant message, from behind the generation prompt through
        the control token that closes the answer, so that stopping is learned. If the user's
        messages are unmasked as well (``train_on_input``), it is on everything but a masked
        system message. A token that spells the end of the prompt and the start of the answer in
        one counts as prompt. Where the template marks answers with ``{% generation %}``, the loss
        is on what it marks, as in transformers' ``return_assistant_tokens_mask``.

        A conversation of more than ``max_seq_len`` tokens is cut off on the right. The end is not
        made to look like one: an end token after a cut-off answer would teach the model to stop
        in mid-sentence.

        Args:
            messages: torchtune messages, text only.
            add_end_tokens: False makes a prompt of the conversation, for generation: an empty last
                assistant message becomes the generation prompt, and one with text is left open.
                Nothing is masked then.

        Returns:
            Two lists of one length: token ids, and the mask (True: no loss).

        Raises:
            UserError: content other than text; a conversation that the template refuses; unmasked
                messages that are neither the assistant's nor the whole conversation.
        """
        chat = [_as_chat_message(message) for message in messages]
        if not add_end_tokens:
            tokens = self._encode(self._prompt(chat))[0][: self.max_seq_len]
            return tokens, [False] * len(tokens)
        conversation = Conversation(chat, self._template, self._encoder)
        spans = _labelled_spans(messages, conversation)
        tokens, starts = self._encode(conversation)
        if conversation.answers_are_marked:  # A token that a mark is within is the answer's.
            spans = [(starts[max(0, bisect_right(starts, at) - 1)], end) for at, end in spans]
        edges = _edges(spans)
        mask = [bisect_right(edges, at) % 2 == 0 for at in starts]
        return tokens[: self.max_seq_len], mask[: self.max_seq_len]

    def __call__(self, sample: Mapping[str, Any], inference: bool = False) -> dict[str, Any]:
        """Replace a sample's ``messages`` by ``tokens`` and ``mask``.

        Args:
            sample: with ``messages``, a list of torchtune messages; other keys are kept.
            inference: make a prompt, see ``add_end_tokens`` of :meth:`tokenize_messages`.
        """
        tokenized = dict(sample)
        messages = tokenized.pop("messages")
        tokens, mask = self.tokenize_messages(messages, add_end_tokens=not inference)
        return {**tokenized, "tokens": tokens, "mask": mask}

    def _prompt(self, chat: list[dict[str, str]]) -> Conversation:
        last = chat[-1] if chat else {"role": "", "content": ""}
        if last["role"] == "assistant" and last["content"]:
            conversation = Conversation(chat, self._template, self._encoder)
            conversation.cut_after_content(len(chat) - 1)
            return conversation
        prompt = chat[:-1] if last["role"] == "assistant" else chat
        return Conversation(prompt, self._template, self._encoder, add_generation_prompt=True)

    def _encode(self, conversation: Conversation) -> tuple[list[int], list[int]]:
        """Return the token ids and each one's offset in the conversation."""
        tokens, starts = [], []
        for segment in conversation.segments():
            if segment.is_control:
                tokens.append(self.special_tokens[segment.text])
                starts.append(segment.start)
                continue
            found = self._encoder.encode(segment.text, at_start=segment.start == 0)
            tokens += [token_id for token_id, _ in found]
            starts += [segment.start + at for _, at in found]
        return tokens, starts

    def _find_stop_tokens(self) -> list[int]:
        chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        try:
            closing = Conversation(chat, self._template, self._encoder).closing_token(1)
        except UserError:  # a template that wants more than a question and an answer
            closing = None
        closing_id = self.eos_id if closing is None else self.special_tokens[closing]
        return list(dict.fromkeys([self.eos_id, closing_id]))


def _labelled_spans(
    messages: Sequence[Message], conversation: Conversation
) -> list[tuple[int, int]]:
    """Return the (start, end) offsets of the text that carries the loss."""
    unmasked = {message.role for message in messages if not message.masked}
    if unmasked <= {"assistant"}:
        return [
            span
            for index, message in enumerate(messages)
            if not message.masked
            for span in conversation.answer_spans(index)
        ]
    masked = [index for index, message in enumerate(messages) if message.masked]
    # torchtune masks a system message that it inserts itself, also under train_on_input.
    if masked and (masked != [0] or messages[0].role != "system"):
        raise UserError(
            f"loss on messages of the roles {', '.join(sorted(unmasked))} with others masked: "
            "only assistant messages, or with train_on_input the whole conversation, can carry it"
        )
    start = conversation.turn_end(0) if masked else 0
    return [(start, conversation.length)]


def _edges(spans: Sequence[tuple[int, int]]) -> list[int]:
    """Return the offsets where the loss begins and ends, in turn."""
    edges: list[int] = []
    for start, end in sorted(spans):
        if edges and start <= edges[-1]:
            edges[-1] = max(edges[-1], end)
        else:
            edges += [start, end]
    return edges


def _as_chat_message(message: Message) -> dict[str, str]:
    kinds = {item["type"] for item in message.content} - {"text"}
    if kinds:
        raise UserError(
            f"a {message.role} message has content of type {', '.join(sorted(kinds))}; "
            "only text is supported"
        )
    text = message.text_content
    if (surrogate := _SURROGATE.search(text)) is not None:
        raise UserError(
            f"a {message.role} message contains half of a surrogate pair ({surrogate.group()!a}), "
            "which is not a character"
        )
    return {"role": _HF_ROLES.get(message.role, message.role), "content": text}
