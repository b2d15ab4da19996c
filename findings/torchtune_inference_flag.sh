#!/usr/bin/env bash
# torchtune 0.6.1: the tokenizers of Gemma, Mistral, Phi-3 and Qwen2 take `inference=True`, which
# `tune run generate` and its eval recipe pass, and give the same tokens as without it: the empty
# answer's end is part of the prompt.
#
# Expected, as of Llama 2's and Llama 3's: the prompt is the beginning of a trained row.
# (A guess beforehand: Gemma's and Mistral's end with the end-of-sequence token, Phi-3's with
# <|end|>, Llama 2's is right; of Qwen2's none was made.)
# Seen: as guessed, Qwen2's as Gemma's; a model is asked to go on behind the end of its answer, with
# exit code 0.
#
# Exits with 1 if this has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet "torch==2.13.0" "torchao==0.15.0" "torchtune==0.6.1" \
    "sentencepiece==0.2.1"
cat >"$folder/try.py" <<'PYTHON'
import importlib.metadata
import json
import sys
from pathlib import Path

from sentencepiece import SentencePieceTrainer
from torchtune.data import Message
from torchtune.models.gemma import GemmaTokenizer
from torchtune.models.llama2 import Llama2Tokenizer
from torchtune.models.mistral import MistralTokenizer
from torchtune.models.phi3 import Phi3MiniTokenizer
from torchtune.models.qwen2 import Qwen2Tokenizer

folder = Path(sys.argv[1])
SentencePieceTrainer.train(
    sentence_iterator=iter(["why is the sky blue", "because light scatters"] * 9),
    model_prefix=str(folder / "pieces"),
    vocab_size=60,
    hard_vocab_limit=False,
    pad_id=-1,
    minloglevel=2,
)
# GPT-2's alphabet of bytes, with nothing merged.
kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
letters = [chr(b) for b in kept] + [chr(256 + i) for i in range(256 - len(kept))]
(folder / "vocab.json").write_text(json.dumps({letter: i for i, letter in enumerate(letters)}))
(folder / "merges.txt").write_text("#version: 0.2\n")
pieces = str(folder / "pieces.model")
special = {"<|endoftext|>": 256, "<|im_start|>": 257, "<|im_end|>": 258}
tokenizers = [
    Llama2Tokenizer(pieces),
    GemmaTokenizer(pieces),
    MistralTokenizer(pieces),
    Phi3MiniTokenizer(pieces),
    Qwen2Tokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), special_tokens=special
    ),
]


def tokens(tokenizer, answer, **options):
    question = Message("user", "why is the sky blue", masked=True)
    return list(tokenizer({"messages": [question, Message("assistant", answer)]}, **options)["tokens"])


print("torchtune", importlib.metadata.version("torchtune"))
opens = {}
for tokenizer in tokenizers:
    row = tokens(tokenizer, "because light scatters")
    prompt = tokens(tokenizer, "", inference=True)
    name = type(tokenizer).__name__
    opens[name] = row[: len(prompt)] == prompt
    ignored = prompt == tokens(tokenizer, "", inference=False)
    print(f"{name}: flag ignored: {ignored}; prompt ends in {prompt[-2:]}, a row in {row[-2:]}; "
          f"the prompt begins a row: {opens[name]}")
closed = {"GemmaTokenizer", "MistralTokenizer", "Phi3MiniTokenizer", "Qwen2Tokenizer"}
seen = {name for name, right in opens.items() if not right} == closed
sys.exit(0 if seen else "the behaviour has changed")
PYTHON
"$folder/venv/bin/python" "$folder/try.py" "$folder"
