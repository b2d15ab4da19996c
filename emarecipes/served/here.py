"""The adapter and its base here: their greedy answers, and what each gives every token of them.

Shapes: T scored tokens of all answers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from emarecipes.errors import UserError
from emarecipes.generation.answers import Asked
from emarecipes.generation.checked import CheckedGeneration
from emarecipes.models.adapters.read import LoadedLayer, read_adapter, set_adapter
from emarecipes.models.batch import longest_first
from emarecipes.models.likelihoods import GivenAnswers, answer_row, reference_where
from emarecipes.models.loss_head import LossHead
from emarecipes.models.sampling.draw import Sampling
from emarecipes.models.sampling.prompts import encode_prompt
from emarecipes.models.sampling.sampler import Completion, sample_batch
from emarecipes.models.source import load_model
from emarecipes.served.figures import Floats


@dataclass(frozen=True)
class Given:
    """A prompt and an answer to it, in tokens."""

    prompt: list[int]
    answer: list[int]


class Here:
    """The model of a config with its adapter.

    Attributes:
        asked: The prompts.
        base: The base's greedy answer to each, as text.
        adapter: The adapter's.
        given: The different ones of these answers, with their prompts; none that are empty.

    Args:
        run: The config, checked, with the adapter.
        asked: Of its prompts, those that are asked.
    """

    def __init__(self, run: CheckedGeneration, asked: list[Asked]) -> None:
        self.asked = asked
        self._run = run
        self._model = load_model(run.cfg)
        self._layers = read_adapter(self._model, Path(run.cfg.adapter), run.source)
        self._set(1.0)
        self._head = LossHead(self._model)
        prompts = [encode_prompt(run.tokenizer, one.system, one.question) for one in asked]
        base, adapter = (self._greedy(prompts, reference) for reference in (True, False))
        self.base, self.adapter = ([self._text(c) for c in found] for found in (base, adapter))
        pairs = dict.fromkeys(
            (tuple(prompt), tuple(completion.tokens))
            for found in (base, adapter)
            for prompt, completion in zip(prompts, found, strict=True)
            if completion.tokens
        )
        if not pairs:
            raise UserError(
                "every answer of the base and of the adapter is empty: nothing to score"
            )
        self.given = [Given(list(prompt), list(answer)) for prompt, answer in pairs]

    def log_probabilities(self, *, reference: bool = False, scale: float = 1.0) -> Floats:
        """Of every token of the answers in `given`, (T,), nats.

        Args:
            reference: The base's.
            scale: What the adapter's own is multiplied by.
        """
        if scale != 1.0:
            self._set(scale)
        rows = [answer_row(one.prompt, one.answer) for one in self.given]
        size = self._run.cfg.batch_size
        batches = longest_first([row["tokens"] for row in rows], size)
        weight = self._model.tok_embeddings.weight
        scored = GivenAnswers(rows, self._run.tokenizer.pad_id, 1, weight.device)
        found: dict[int, Floats] = {}
        for numbers, nll_T, tokens_B in scored.nll(self._head, batches, reference=reference):
            parts = nll_T.split(tokens_B.tolist())
            found |= {n: -part.numpy() for n, part in zip(numbers, parts, strict=True)}
        if scale != 1.0:
            self._set(1.0)
        return np.concatenate([found[number] for number in range(len(rows))])

    def _set(self, scale: float) -> None:
        layers: dict[str, LoadedLayer] = {
            name: replace(layer, scale=layer.scale * scale) for name, layer in self._layers.items()
        }
        set_adapter(self._model, layers)

    def _greedy(self, prompts: list[list[int]], reference: bool) -> list[Completion]:
        cfg, stop = self._run.cfg, tuple(self._run.tokenizer.stop_tokens)
        sampling = Sampling(cfg.max_new_tokens, stop, temperature=0.0)
        found: dict[int, Completion] = {}
        with reference_where(reference, self._model):
            for rows in longest_first(prompts, cfg.batch_size, equal_together=True):
                batch = sample_batch(
                    self._head, [prompts[r] for r in rows], [0] * len(rows), sampling
                )
                found |= dict(zip(rows, batch, strict=True))
        return [found[row] for row in range(len(prompts))]

    def _text(self, completion: Completion) -> str:
        text: Any = self._run.tokenizer.decode(completion.tokens)
        return str(text).strip()
