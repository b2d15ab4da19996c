#!/usr/bin/env bash
# torchtune 0.6.1, OpenAIToMessages: an assistant turn whose content is null, as OpenAI's format has
# it for a turn that only calls a tool, is read as the text of the turn before it, and is trained on.
#
# Expected: an empty turn, or an error. (A guess beforehand: TypeError, as None is no text.)
# Seen: the assistant's turn is the user's question, not masked; no error, no warning. In a first turn
# it is UnboundLocalError.
# (The converted text is left in a variable from the turn before where content is neither text nor
# a list.)
#
# Exits with 1 if this has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet "torch==2.13.0" "torchao==0.15.0" "torchtune==0.6.1"
cat >"$folder/try.py" <<'PYTHON'
import importlib.metadata
import sys

from torchtune.data import OpenAIToMessages

call = {"id": "1", "type": "function", "function": {"name": "look_up", "arguments": "{}"}}
turns = [
    {"role": "user", "content": "Which day is it?"},
    {"role": "assistant", "content": None, "tool_calls": [call]},
    {"role": "tool", "content": "Monday", "tool_call_id": "1"},
    {"role": "assistant", "content": "It is Monday."},
]
print("torchtune", importlib.metadata.version("torchtune"))
messages = OpenAIToMessages()({"messages": turns})["messages"]
for message in messages:
    print(f"{message.role}: {message.text_content!r}, masked {message.masked}")
seen = (messages[1].text_content, messages[1].masked) == ("Which day is it?", False)
try:
    OpenAIToMessages()({"messages": turns[1:]})
    seen = False
except UnboundLocalError as error:
    print(f"as the first turn: UnboundLocalError: {error}")
sys.exit(0 if seen else "the behaviour has changed")
PYTHON
"$folder/venv/bin/python" "$folder/try.py"
