#!/usr/bin/env bash
# Hugging Face datasets 5.2.0, its JSON reader: text that looks like a date comes back as another
# text, also where the feature is declared a string.
#
# Expected: with Features({"text": Value("string")}) a JSON string is read as it stands in the file.
# Seen: "2024-01-01" is read as "2024-01-01 00:00:00", "2024-02-03T04:05:06Z" without its T and Z; no
# error, no warning. Without features the column is of type timestamp. With parts of a second the text
# stays as it is.
# (The table is parsed with types guessed from its values, and cast to the features afterwards.)
#
# Exits with 1 if this has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet "datasets==5.2.0"
cd "$folder"
cat >try.py <<'PYTHON'
import json
import sys

import datasets
from datasets import Features, Value, load_dataset


def read(texts, features):
    with open("rows.jsonl", "w") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    data = load_dataset("json", data_files="rows.jsonl", split="train", features=features)
    return data["text"][:], data.features["text"].dtype


given = Features({"text": Value("string")})
cases = [
    (["2024-01-01", "2024-02-03"], given, ["2024-01-01 00:00:00", "2024-02-03 00:00:00"]),
    (["2024-02-03T04:05:06"], given, ["2024-02-03 04:05:06"]),
    (["2024-02-03T04:05:06Z"], given, ["2024-02-03 04:05:06"]),
    (["2024-02-03T04:05:06.120Z"], given, ["2024-02-03T04:05:06.120Z"]),
]
print("datasets", datasets.__version__)
changed = False
for texts, features, seen in cases:
    found, dtype = read(texts, features)
    print(f"{texts} as {dtype}: {found}")
    changed |= found != seen
found, dtype = read(["2024-01-01", "2024-02-03"], None)
print(f"without features: {dtype}")
changed |= dtype != "timestamp[s]"
sys.exit("the behaviour has changed" if changed else 0)
PYTHON
HF_HUB_OFFLINE=1 HF_DATASETS_CACHE="$folder/cache" HF_DATASETS_DISABLE_PROGRESS_BARS=1 "$folder/venv/bin/python" try.py
