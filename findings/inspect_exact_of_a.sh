#!/usr/bin/env bash
# inspect_ai 0.3.285, the scorers exact() and f1(): where the target is the letter A (or "the", "an"), the
# same letter as an answer is wrong. Of four questions whose answers are A, B, C and D, all answered
# rightly, exact() has 0.75 right.
#
# Expected: what its text says, CORRECT "when the answer is an exact match to one or more targets". (No guess
# beforehand: "a" and "the" were among many pairs that were tried. Of the letters, after these two were wrong:
# A is, the others are not.)
# Seen: A is I and 0.0, the other letters are C and 1.0; match() has all four right; no error, no warning.
# Both texts are normalised as SQuAD's are, in lower case and without articles (the reference says no more
# than that they are normalised); of A nothing is left, and a target of which nothing is left is passed
# over. For the same reason "type" is an exact match to "Type A".
#
# Exits with 1 if this has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet "inspect_ai==0.3.285"
cat >"$folder/try.py" <<'PYTHON'
import sys

import inspect_ai
from inspect_ai import Task
from inspect_ai.dataset import Sample
from inspect_ai.model import ModelOutput, ModelUsage, get_model
from inspect_ai.scorer import exact, f1, match


def scored(pairs):
    answers = [ModelOutput.from_content("mockllm/model", answer) for answer, _ in pairs]
    for answer in answers:
        answer.usage = ModelUsage(input_tokens=1, output_tokens=1, total_tokens=2)
    task = Task(
        dataset=[Sample(input="Which?", target=target) for _, target in pairs],
        scorer=[exact(), f1(), match()],
    )
    model = get_model("mockllm/model", custom_outputs=answers, memoize=False)
    (log,) = inspect_ai.eval(
        task, model=model, log_dir=sys.argv[1], display="none", max_connections=1, max_samples=1
    )
    assert log.status == "success", log.error
    for sample, (answer, target) in zip(log.samples, pairs):
        assert (sample.output.completion, sample.target) == (answer, target)
    names = ("exact", "f1", "match")
    right = next(s.metrics["mean"].value for s in log.results.scores if s.name == "exact")
    return {n: [sample.scores[n].value for sample in log.samples] for n in names}, right


print("inspect_ai", inspect_ai.__version__)
letters, right = scored([(letter, letter) for letter in "ABCD"])
articles, _ = scored([("the", "the"), ("An", "An")])
types, _ = scored([("type", "Type A")])
print("answers A, B, C, D to targets A, B, C, D:", letters, "mean of exact:", right)
print("answers the, An to targets the, An:", articles)
print("answer type to target Type A:", types)
seen = (
    letters == {"exact": ["I", "C", "C", "C"], "f1": [0, 1, 1, 1], "match": ["C"] * 4}
    and right == 0.75
    and articles == {"exact": ["I", "I"], "f1": [0, 0], "match": ["C", "C"]}
    and types == {"exact": ["C"], "f1": [1], "match": ["I"]}
)
sys.exit(0 if seen else "the behaviour has changed")
PYTHON
cd "$folder"
"$folder/venv/bin/python" "$folder/try.py" "$folder/logs"
