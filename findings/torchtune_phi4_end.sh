#!/usr/bin/env bash
# torchtune 0.6.1, Phi-4's tokenizer: rows that chat_dataset makes of it have no <|im_end|> behind the
# answer, so a model that is fine-tuned on them is never trained to stop; and `tune run generate` cannot
# use it, since it takes no `inference`.
#
# Expected: an answer ends with <|im_end|>, as of torchtune's other tokenizers and of Phi-4's own chat
# template. (A guess beforehand, from reading: no end, and TypeError.)
# Seen: as guessed; what is trained is the header of the turn and its text. Asked by hand with
# add_eos=True the end is there.
#
# Exits with 1 if this has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet "torch==2.13.0" "torchao==0.15.0" "torchtune==0.6.1"
cat >"$folder/try.py" <<'PYTHON'
import importlib.metadata
import json
import sys
from pathlib import Path

from torchtune.data import Message
from torchtune.datasets import chat_dataset
from torchtune.models.phi4 import phi4_tokenizer

folder = Path(sys.argv[1])
# GPT-2's alphabet of bytes, with nothing merged.
kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
letters = [chr(b) for b in kept] + [chr(256 + i) for i in range(256 - len(kept))]
(folder / "vocab.json").write_text(json.dumps({letter: i for i, letter in enumerate(letters)}))
(folder / "merges.txt").write_text("#version: 0.2\n")
turns = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
(folder / "rows.json").write_text(json.dumps([{"messages": turns}]))

print("torchtune", importlib.metadata.version("torchtune"))
tokenizer = phi4_tokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
row = chat_dataset(
    tokenizer,
    source="json",
    data_files=str(folder / "rows.json"),
    conversation_column="messages",
    conversation_style="openai",
    split="train",
)[0]
end = tokenizer.special_tokens["<|im_end|>"]
labels = [int(label) for label in row["labels"] if label != -100]
print(f"labels {labels}, <|im_end|> is {end}")
messages = [Message("user", "Why?", masked=True), Message("assistant", "So.")]
asked, _ = tokenizer.tokenize_messages(messages, add_eos=True)
print(f"with add_eos=True: {asked[-4:]}")
seen = end not in labels and asked[-1] == end
try:
    tokenizer({"messages": messages}, inference=True)
    seen = False
except TypeError as error:
    print(f"inference=True: TypeError: {error}")
sys.exit(0 if seen else "the behaviour has changed")
PYTHON
"$folder/venv/bin/python" "$folder/try.py" "$folder"
