#!/usr/bin/env bash
# transformers 5.23.0, apply_chat_template: an argument for the template that is not a plain value (a
# date, a set, a function) is replaced by the name of its type in angle brackets, as text.
#
# Expected: what Jinja prints of the object, or an error. (A guess beforehand: one of these two.)
# Seen: a date is "<date>" in the prompt, its year is empty, a set is looped over as the characters of
# "<set>"; no error, no warning. Only calling a function is an error, TypeError: 'str' object is not
# callable. Numbers, texts, lists and dicts of them arrive.
#
# Exits with 1 if this has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet "transformers==5.23.0" "jinja2==3.1.6"
cat >"$folder/try.py" <<'PYTHON'
import datetime
import sys

import jinja2
import transformers
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

words = Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?")
day, names = datetime.date(2024, 2, 29), {"a"}
cases = [
    ("{{ day }}", {"day": day}, "<date>"),
    ("{{ day.year }}", {"day": day}, ""),
    ("{% for name in names %}{{ name }};{% endfor %}", {"names": names}, "<;s;e;t;>;"),
    ("{{ of.day }}", {"of": {"day": day}}, "<date>"),
    ("{{ day }}", {"day": "2024-02-29"}, "2024-02-29"),
]
print("transformers", transformers.__version__)
changed = False
for template, arguments, seen in cases:
    found = tokenizer.apply_chat_template(
        [{"role": "user", "content": "a"}], chat_template=template, tokenize=False, **arguments
    )
    plain = jinja2.Template(template).render(**arguments)
    print(f"{template} of {arguments}: {found!r}; Jinja alone: {plain!r}")
    changed |= found != seen
sys.exit("the behaviour has changed" if changed else 0)
PYTHON
"$folder/venv/bin/python" "$folder/try.py"
