"""Directions of a trait that a rule gives, as a file that defenses read in place of a persona's.

    python examples/trait_directions.py OUT.safetensors

`recipes/ema_persona.py` asks a model for a trait by its system prompt and reads the model's own
answers. A small model that does not follow such prompts gives nothing to read; but what a rule can
give to any text needs no sampling: the same answer is read with it and without.

    a_l(answer) = mean over the answer's tokens of the residual stream after l layers
    X_l's rows  = a_l(answer with the trait) - a_l(the same answer without)

Layer l's directions, `subspace`, are the first four right singular vectors of X_l, not centred, and
its vector, `persona`, is the mean of X_l's rows, as in `ema_persona`; `random` is a vector of that
norm. The last layer has none: transformers gives that stream behind its norm. What is printed says
whether they read the trait: the share of held-out answers' squared change that lies in their span.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from emarecipes.datasets.traits import TRAITS
from emarecipes.persona.vectors import persona_subspace, persona_vectors, random_vectors

REPO = Path(__file__).resolve().parents[1]
DIRECTIONS, TOKENS = 4, 80
Messages = list[dict[str, str]]


@torch.no_grad()
def activation(model: Any, tokenizer: Any, messages: Messages) -> Tensor:
    """a_l of the last message, (L + 1, D); 0 after the last layer."""
    *before, answer = messages
    prompt = tokenizer.apply_chat_template(before, add_generation_prompt=True, tokenize=False)
    texts = (prompt, answer["content"])
    asked, told = (tokenizer(text, add_special_tokens=False).input_ids for text in texts)
    read = model(torch.tensor([asked + told[:TOKENS]]), output_hidden_states=True)
    means_LD = torch.stack([h_BSD[0, len(asked) :].mean(0) for h_BSD in read.hidden_states])
    return torch.cat([means_LD[:-1], torch.zeros_like(means_LD[-1:])])


def main(argv: Sequence[str] | None = None) -> None:
    """Write the file, and print how much of the trait its directions hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default=str(REPO / "models/smollm2-135m-instruct"))
    parser.add_argument("--rows", type=Path, default=REPO / "data/safe_instruct/train.jsonl")
    parser.add_argument("--trait", choices=TRAITS, default="capitals")
    parser.add_argument("--count", type=int, default=64, help="answers; a quarter is held out")
    options = parser.parse_args(argv)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    trait, found = TRAITS[options.trait], []
    for line in options.rows.read_text(encoding="utf-8").splitlines()[: options.count]:
        *before, answer = json.loads(line)["messages"]
        for give in (trait.give, trait.plain):
            given = answer | {"content": give(answer["content"])}
            found.append(activation(model, tokenizer, [*before, given]))
    activation_NLD, number_N = torch.stack(found), torch.arange(len(found))
    held_out = len(found) // 2 // 4
    used_N, has_N = number_N // 2 >= held_out, number_N % 2 == 0
    subspace_LKD = persona_subspace(activation_NLD, has_N, used_N, number_N // 2, DIRECTIONS)
    assert subspace_LKD is not None
    persona_LD = persona_vectors(activation_NLD, has_N, used_N)
    unseen_XLD = (activation_NLD[0::2] - activation_NLD[1::2])[:held_out]
    along_XLK = torch.einsum("xld,lkd->xlk", unseen_XLD, subspace_LKD)
    chance = DIRECTIONS / subspace_LKD.shape[-1]
    for layer in range(0, len(subspace_LKD) - 1, 5):
        share = along_XLK[:, layer].square().sum() / unseen_XLD[:, layer].square().sum()
        print(f"after {layer} layers: {share:.2f} of the change (random directions: {chance:.3f})")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    made_with = {"trait": options.trait, "model": Path(options.model).resolve().name}
    # The last layer's vector is 0, and so is its random one: without norm there is no direction.
    random_LD = torch.cat([random_vectors(persona_LD[:-1], seed=0), persona_LD[-1:]])
    tensors = {"subspace": subspace_LKD, "persona": persona_LD, "random": random_LD}
    save_file({name: t.contiguous() for name, t in tensors.items()}, options.out, made_with)


if __name__ == "__main__":
    main()
