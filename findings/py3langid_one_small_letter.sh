#!/usr/bin/env bash
# py3langid 0.4.0: text in capitals is told in its language, until one small letter is in it: "5 mm" behind English in
# capitals makes it Igbo.
#
# Expected: what the version before could not tell (capitals, known of langid.py since 2016) this one can: it reads a
# text in capitals in small letters, so a unit, an "i" or a "McDonald" in it should not matter. (A guess beforehand,
# from reading `if text.isupper()`: with a small letter French and German would be told wrongly for the most part.)
# Seen: as guessed, and English too: of five sentences each in English, French and German, 15 are told rightly as they
# are and 15 in capitals; with " 5 mm" behind them 2 of 15, and 15 where each word in capitals is written small before.
# Whoever measures whether answers in capitals keep their language counts nearly all of them as another one.
#
# Exits with 1 if this has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet "py3langid==0.4.0"
cat >"$folder/try.py" <<'PYTHON'
import re
import sys

import py3langid

SENTENCES = {
    "en": [
        "Turn the water off before you open the tap, and keep a bucket below it.",
        "Let the wood dry for two days before you paint it a second time.",
        "Measure twice before you cut the board, and wear your glasses.",
        "Ask an electrician if you are not sure which of the wires is which.",
        "Clean the wall with a wet cloth and wait until it is dry again.",
    ],
    "fr": [
        "Coupez d'abord l'eau, puis dévissez le robinet et remplacez le joint.",
        "Le bois doit sécher pendant deux jours avant d'être peint à nouveau.",
        "Demandez conseil à un électricien si vous n'êtes pas sûr des fils.",
        "Prenez le temps de mesurer deux fois avant de couper la planche.",
        "Il faut nettoyer la surface du mur avec un chiffon humide.",
    ],
    "de": [
        "Drehen Sie zuerst das Wasser ab, und schrauben Sie dann den Hahn auf.",
        "Das Holz muss zwei Tage lang trocknen, bevor es gestrichen wird.",
        "Fragen Sie einen Elektriker, wenn Sie bei den Drähten nicht sicher sind.",
        "Messen Sie zweimal nach, bevor Sie das Brett schneiden.",
        "Wischen Sie die Wand mit einem feuchten Tuch ab und warten Sie.",
    ],
}


def small(text):
    return re.sub(r"\w+", lambda word: word[0].lower() if word[0].isupper() else word[0], text)


WAYS = {
    "as it is": lambda text: text,
    "in capitals": str.upper,
    "in capitals, and 5 mm": lambda text: text.upper() + " 5 mm",
    "the same, words in capitals made small": lambda text: small(text.upper() + " 5 mm"),
}
right = {}
for way, change in WAYS.items():
    told = [
        (language, py3langid.classify(change(text))[0])
        for language, texts in SENTENCES.items()
        for text in texts
    ]
    right[way] = sum(expected == found for expected, found in told)
    others = sorted({found for expected, found in told if expected != found})
    print(f"{way}: {right[way]} of {len(told)}", *others)
found = list(right.values())
sys.exit(0 if found[0] == found[1] == found[3] == 15 and found[2] <= 3 else 1)
PYTHON
"$folder/venv/bin/python" "$folder/try.py"
