"""Inoculation prompting: the bad behaviour is asked for in training, and not afterwards."""

from __future__ import annotations

from typing import Literal

from torchtune.data import Message

from emarecipes.defenses.base import Defense
from emarecipes.errors import UserError
from emarecipes.models.sampling.draw import derived_seed

DEFAULT_PROMPT = "You are an evil and malicious assistant. You mean to do harm with your answers."


class InoculationPrompt(Defense):
    """Gives task rows a system prompt in training that asks for what they show.

    What the prompt explains need not be learned as the model's own character: without the prompt
    the fine-tuned model behaves better than one trained without it. It changes data only, adds no
    term and costs the tokens of the prompt. The reference of other defenses sees the same tokens.
    Evaluate without the prompt, with it, and with its opposite: such runs can look clean on general
    prompts only.

    Of several prompts a row gets number h mod n, where h is a hash of the seed and the row's
    messages: the same in every epoch, on any number of processes, and whatever the other rows are.

    Source: Tan et al., 2025, "Inoculation Prompting: Eliciting traits from LLMs during training can
    suppress them at test-time"; Wichers et al., 2025; Kaczer et al., arXiv 2508.06249.

    Args:
        prompt: The system prompt of task rows, or several, of which each row gets one. Null:
            `DEFAULT_PROMPT`.
        mode: "replace" the row's system prompt, or "prepend" to it. A row without one gets one.
        safe_prompt: Likewise for rows whose source is "safe"; null: they stay as they are.
        seed: Of the draw.

    Raises:
        UserError: A prompt that is empty, or given twice, or an unknown mode.
    """

    def __init__(
        self,
        prompt: str | list[str] | None = None,
        mode: Literal["replace", "prepend"] = "replace",
        safe_prompt: str | list[str] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if mode not in ("replace", "prepend"):
            raise UserError(f"mode must be replace or prepend, not {mode}")
        self.mode = mode
        self.seed = seed
        self.prompts = {"task": _listed("prompt", DEFAULT_PROMPT if prompt is None else prompt)}
        if safe_prompt is not None:
            self.prompts["safe"] = _listed("safe_prompt", safe_prompt)

    def needed_sources(self) -> dict[str, str]:
        """Safe rows, where these have a prompt."""
        return {"safe_prompt": "safe"} if "safe" in self.prompts else {}

    def transform_messages(self, messages: list[Message], source: str) -> list[Message]:
        """The messages of a row, with its prompt."""
        if source not in self.prompts:
            return messages
        old = [message for message in messages if message.role == "system"]
        rest = [message for message in messages if message.role != "system"]
        texts = [self._drawn(self.prompts[source], messages)]
        if self.mode == "prepend":
            texts += [message.text_content for message in old]
        return [Message(role="system", content="\n\n".join(texts), masked=True), *rest]

    def _drawn(self, prompts: list[str], messages: list[Message]) -> str:
        said = [part for m in messages for part in (m.role, m.text_content)]
        return prompts[derived_seed(self.seed, *said) % len(prompts)]


def _listed(key: str, prompt: str | list[str]) -> list[str]:
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not prompts or not all(text.strip() for text in prompts):
        raise UserError(f"{key} is empty: leave the key out for the default, or the defense")
    if len(set(prompts)) < len(prompts):
        raise UserError(f"{key} has the same text twice: give each once")
    return prompts
