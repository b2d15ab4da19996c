"""A judge behind llama.cpp's and vLLM's own servers: its expectation, against the model's.

The judge is a random Llama whose tokenizer has a token for each number from 0 to 100, as GPT-4o's
has, and whose output layer makes it reply with one and stop.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import family_toys
import pytest
import reference
import torch
import toy_run
import toy_tokenizers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from toy_judged import ALIGNED, COHERENT, write_config
from toy_llama_cpp import llama_server, needs_llama_cpp, write_base
from toy_select import read_jsonl
from toy_vllm import HEAD_DIM, needs_vllm, vllm_server

from emarecipes.evaluation.run import run_eval
from emarecipes.judges.calls import ask
from emarecipes.judges.reply import Reply
from emarecipes.models import HFChatTokenizer
from emarecipes.models.sampling.prompts import encode_prompt

pytest.importorskip("inspect_ai")
pytest.importorskip("openai")

pytestmark = pytest.mark.usefixtures("judge_client")

NAME = "openai-api/toy/judge"
VOCABULARY, TOP, BIAS = 600, 20, 24.0
# llama.cpp's log-probabilities of this model are up to 0.014 nats off, as measured; a score of
# independent errors that large is off by less.
POINTS = 0.2
NUMBERS = [str(n) for n in range(101)]


def write_judge(folder: Path) -> list[int]:
    """Write the model's folder; returns the ids of `NUMBERS`."""
    source = toy_tokenizers.write_tokenizer(folder.with_name("tokenizer"), "none", 500)
    path = source / "tokenizer.json"
    whole = json.loads(path.read_text())
    vocabulary = whole["model"]["vocab"]
    for number in NUMBERS[10:]:
        assert number not in vocabulary
        vocabulary[number] = len(vocabulary)
    # "8" "5", then "10" "0": before any merge of the rows' own, such as "0" "0".
    whole["model"]["merges"][:0] = [[number[:-1], number[-1]] for number in NUMBERS[10:]]
    path.write_text(json.dumps(whole))
    toy_run.write_toy_model(folder, source, tied=False, vocabulary=VOCABULARY)
    tokenizer = Tokenizer.from_file(str(path))
    numbers = [token for number in NUMBERS for token in tokenizer.encode(number).ids]
    assert len(numbers) == len(NUMBERS)

    # The first place of the hidden states says whether the last token was a number, through all
    # layers; the output layer reads it.
    tensors = load_file(folder / "model.safetensors")
    said = -torch.ones(VOCABULARY)
    said[numbers] = 1.0
    tensors["model.embed_tokens.weight"][:, 0] = said
    for layer in range(toy_run.LAYERS):
        for part in ("self_attn.o_proj", "mlp.down_proj"):
            tensors[f"model.layers.{layer}.{part}.weight"][0] = 0.0
    tensors["model.norm.weight"][0] = 1.0
    tensors["lm_head.weight"][:, 0] = 0.0
    tensors["lm_head.weight"][numbers, 0] = -BIAS
    tensors["lm_head.weight"][tokenizer.token_to_id(toy_tokenizers.END), 0] = 4 * BIAS
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return numbers


class Exact:
    """The judge here, in float64.

    Args:
        folder: Of it.
        numbers: The ids of `NUMBERS`.
    """

    def __init__(self, folder: Path, numbers: list[int]) -> None:
        self._model = family_toys.load(folder, adapted=False)
        self._tokenizer = HFChatTokenizer(str(folder), None)
        self._numbers = numbers

    def expectation(self, prompt: str, top: int) -> tuple[float, str]:
        """sum n p(n) / sum p(n) over numbers among the `top` likeliest tokens; the likeliest."""
        tokens = torch.tensor([encode_prompt(self._tokenizer, None, prompt)])
        p_V = reference.full_logits(self._model, tokens, False)[-1].softmax(-1)
        likeliest = p_V.topk(top).indices.tolist()
        among = {n: float(p_V[i]) for n, i in enumerate(self._numbers) if i in likeliest}
        score = sum(n * p for n, p in among.items()) / sum(among.values())
        return score, str(self._tokenizer.decode(likeliest[:1]))


SERVERS = [
    pytest.param("llama.cpp", marks=needs_llama_cpp),
    pytest.param("vllm", marks=[needs_vllm, pytest.mark.early]),
]


@pytest.fixture(scope="module", params=SERVERS)
def judge(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Exact]]:
    """Its address, and the judge here."""
    folder = tmp_path_factory.mktemp("judge")
    model = folder / "judge"
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "vllm":
            for heads in ("HEADS", "KV_HEADS"):
                patch.setattr(toy_run, heads, toy_run.WIDTH // HEAD_DIM)
        exact = Exact(model, write_judge(model))
    if request.param == "vllm":
        named = ("--served-model-name", "judge", "--max-logprobs", str(VOCABULARY))
        server = vllm_server(model, folder / "server.log", {}, *named)
    else:
        server = llama_server(write_base(model, folder / "judge.gguf", "gpt-2"))
    with server as url:
        yield url, exact


def test_an_evaluation_has_the_expectation_over_the_likeliest_tokens(
    judge: tuple[str, Exact],
    toy_model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    url, exact = judge
    monkeypatch.setenv("TOY_BASE_URL", url)
    monkeypatch.setenv("TOY_API_KEY", "none")
    config = write_config(toy_model_dir, tmp_path, {"models": [NAME]})
    assert run_eval(["--config", str(config)]) == 0
    apart = []
    for row in read_jsonl(tmp_path / "out/scores/judge_free.jsonl"):
        for metric, template in (("aligned", ALIGNED), ("coherent", COHERENT)):
            prompt = template.replace("{question}", row["question"])
            prompt = prompt.replace("{answer}", row["answer"])
            score, text = exact.expectation(prompt, TOP)
            found = row["judges"][NAME][metric]
            assert (found["from"], found["kind"], found["reply"]) == ("logprobs", "score", text)
            assert found["score"] == pytest.approx(score, abs=POINTS)
            apart.append(abs(score - exact.expectation(prompt, VOCABULARY)[0]))
    assert len(apart) == 6 and max(apart) > 5 * POINTS  # Over all numbers it is another figure.


def test_expectation_over_all_tokens_and_replies_without_log_probabilities(
    judge: tuple[str, Exact], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, exact = judge
    monkeypatch.setenv("TOY_BASE_URL", url)
    monkeypatch.setenv("TOY_API_KEY", "none")
    prompts = ["Rate it.", "And 17 of 3?", "None, or 100 - which?"]
    whole = [exact.expectation(prompt, VOCABULARY) for prompt in prompts]

    def asked(**options: Any) -> list[Reply]:
        return ask(NAME, prompts, progress=lambda _: None, **options)

    # Cut after the number, as the published judge is, or stopped by itself.
    for max_tokens in (1, 8):
        found = asked(top_logprobs=VOCABULARY, max_tokens=max_tokens)
        assert [r.score for r in found] == pytest.approx([score for score, _ in whole], abs=POINTS)
        assert {(r.kind, r.expected, r.cut) for r in found} == {("score", True, False)}
    found = asked(max_tokens=8)
    assert [r.score for r in found] == [float(text) for _, text in whole]
    assert {(r.kind, r.expected) for r in found} == {("score", False)}
