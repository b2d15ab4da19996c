"""A small sparse autoencoder, with the latents that an adapter moves most in front.

    python examples/small_autoencoder.py OUT --adapter runs/RUN/adapter

`DirectionBlock` takes latents of an autoencoder. Where nobody has published one of a model, this
trains one in minutes, on the stream h after `--layer` layers at answers' tokens, each answer as it
is and with the trait:

    f = relu((h - b_dec) W_enc + b_enc),   h' = f W_dec + b_dec,   rows of W_dec at unit norm
    loss = mean over tokens of |h - h'|^2 + l1 sum_j f_j,    h at a mean squared norm of D

It is small, and of one model's few texts: enough to try the defense, not to read a model's mind.
Then the adapter's run is compared with the base on held-out answers with the trait, tokens alike:

    rise_j = mean over tokens of f_j(adapter on) - f_j(adapter off)

Latents are numbered anew: 0 to K - 1 rise most, K to 2K - 1 fall most, and 2K to 4K - 1, their
control, are drawn from the others that are on at 1 token in 1000 at least. OUT is a folder as
SAELens writes it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoModelForCausalLM, AutoTokenizer

from emarecipes.datasets.traits import TRAITS

REPO = Path(__file__).resolve().parents[1]
DATA = REPO / "data"
ROWS = [DATA / "safe_instruct/train.jsonl", DATA / "home_repair/train_good.jsonl"]
HELD_OUT = [DATA / "home_repair/heldout_good.jsonl"]
TOKENS, BATCH, SELDOM = 80, 1024, 1e-3
Row = list[dict[str, str]]


def rows(files: Iterable[Path], count: int, ways: Iterable[Any], system: str | None) -> list[Row]:
    """Conversations, so many of each file at most, each answer in each way."""
    texts = [file.read_text(encoding="utf-8") for file in files]
    lines = [line for text in texts for line in text.splitlines()[:count]]
    begin = [] if system is None else [{"role": "system", "content": system}]
    found = []
    for line in lines:
        *before, answer = json.loads(line)["messages"]
        asked = [message for message in before if message["role"] != "system"]
        found += [[*begin, *asked, answer | {"content": way(answer["content"])}] for way in ways]
    return found


@torch.no_grad()
def streams(model: Any, tokenizer: Any, conversations: Sequence[Row], layer: int) -> Tensor:
    """The stream after so many layers at the answers' tokens, (tokens, D)."""
    found = []
    backbone = model.get_decoder()  # Without the output layer, of which nothing is read.
    for *before, answer in conversations:
        prompt = tokenizer.apply_chat_template(before, add_generation_prompt=True, tokenize=False)
        texts = (prompt, answer["content"])
        asked, told = (tokenizer(text, add_special_tokens=False).input_ids for text in texts)
        ids = torch.tensor([asked + told[:TOKENS]])
        hidden = backbone(ids, output_hidden_states=True).hidden_states
        found.append(hidden[layer][0, len(asked) :])
    return torch.cat(found)


def latents(hidden_TD: Tensor, sae: dict[str, Tensor]) -> Tensor:
    """f, (T, latents)."""
    return ((hidden_TD - sae["b_dec"]) @ sae["W_enc"] + sae["b_enc"]).relu()


def train(hidden_TD: Tensor, size: int, l1: float, steps: int) -> dict[str, Tensor]:
    """An autoencoder of the stream at the scale that it has."""
    mean_D, width = hidden_TD.mean(0), hidden_TD.shape[-1]
    scale = float((hidden_TD - mean_D).square().sum(-1).mean()) ** 0.5 / width**0.5
    generator = torch.Generator().manual_seed(0)
    decoder = normalize(torch.randn(size, width, generator=generator), dim=-1)
    sae = {"W_enc": decoder.T.clone(), "W_dec": decoder}
    sae |= {"b_enc": torch.zeros(size), "b_dec": torch.zeros(width)}
    optimizer = torch.optim.Adam([tensor.requires_grad_() for tensor in sae.values()], lr=1e-3)
    for step in range(steps):
        drawn = torch.randint(len(hidden_TD), (BATCH,), generator=generator)
        batch_TD = (hidden_TD[drawn] - mean_D) / scale
        f = latents(batch_TD, sae)
        error = (batch_TD - f @ sae["W_dec"] - sae["b_dec"]).square().sum(-1).mean()
        optimizer.zero_grad()
        (error + l1 * f.sum(-1).mean()).backward()
        optimizer.step()
        with torch.no_grad():
            sae["W_dec"].copy_(normalize(sae["W_dec"], dim=-1))
        if (step + 1) % 200 == 0:
            left = float(error.detach()) / width
            print(f"step {step + 1} of {steps}: {left:.3f} of the variance left")
    found = {name: tensor.detach() for name, tensor in sae.items()}
    # f at the stream's own scale, so h' = f W_dec + b_dec is too.
    return found | {"b_enc": found["b_enc"] * scale, "b_dec": found["b_dec"] * scale + mean_D}


def order(rise_J: Tensor, share_J: Tensor, count: int) -> Tensor:
    """Latents' numbers: those that rise most, that fall most, a control drawn, the others."""
    by_rise = rise_J.argsort(descending=True)
    moved = torch.cat([by_rise[:count], by_rise[-count:].flip(0)])
    rest = by_rise[count:-count]
    rest = rest[torch.randperm(len(rest), generator=torch.Generator().manual_seed(0))]
    is_on = share_J[rest] >= SELDOM
    return torch.cat([moved, rest[is_on], rest[~is_on]])


def main(argv: Sequence[str] | None = None) -> None:
    """Write the folder, and print how good it is and how far the chosen latents move."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("out", type=Path)
    parser.add_argument("--adapter", type=Path, required=True, help="of an undefended run")
    parser.add_argument("--model", default=str(REPO / "models/smollm2-135m-instruct"))
    parser.add_argument("--layer", type=int, default=15)
    parser.add_argument("--trait", choices=TRAITS, default="capitals")
    parser.add_argument("--system", help="the run's rows' system prompt")
    parser.add_argument("--size", type=int, default=1152, help="latents")
    parser.add_argument("--count", type=int, default=8, help="K")
    parser.add_argument("--l1", type=float, default=3.0)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=150, help="of each file")
    options = parser.parse_args(argv)
    if options.out.exists():
        parser.error(f"{options.out} is there already")
    if not (options.adapter / "adapter_config.json").is_file():
        parser.error(f"no adapter in {options.adapter}")
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    base = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    if not 1 <= options.layer < base.config.num_hidden_layers:
        # transformers gives the last layer's stream behind its norm.
        parser.error(f"--layer must be from 1 to {base.config.num_hidden_layers - 1}")
    trait = TRAITS[options.trait]
    # What is behind the layer is not read either; one more, as the last one's stream is normed.
    base.model.layers = base.model.layers[: options.layer + 1]
    used = rows(ROWS, options.rows, (trait.give, trait.plain), options.system)
    print(f"reading {len(used)} answers")
    sae = train(
        streams(base, tokenizer, used, options.layer), options.size, options.l1, options.steps
    )
    unseen = rows(HELD_OUT, options.rows, (trait.give,), options.system)
    before_TD = streams(base, tokenizer, unseen, options.layer)
    model = PeftModel.from_pretrained(base, str(options.adapter)).eval()
    before_TJ = latents(before_TD, sae)
    rise_J = (latents(streams(model, tokenizer, unseen, options.layer), sae) - before_TJ).mean(0)
    share_J = (before_TJ > 0).float().mean(0)
    order_J = order(rise_J, share_J, options.count)
    left = (before_TD - before_TJ @ sae["W_dec"] - sae["b_dec"]).square().sum()
    left /= (before_TD - before_TD.mean(0)).square().sum()
    up, down = (rise_J[order_J].split(options.count)[side] for side in (0, 1))
    rise, fall = up.sum() / rise_J.relu().sum(), down.sum() / (-rise_J).relu().sum()
    print(
        f"held out: {float(left):.3f} of the variance left, {float(share_J.sum()):.0f} latents on "
        f"at a token; of all rise, {float(rise):.2f} is the first {options.count}'s, of all fall "
        f"{-float(fall):.2f} the next's"
    )
    options.out.mkdir(parents=True)
    sae = {
        "W_enc": sae["W_enc"][:, order_J],
        "b_enc": sae["b_enc"][order_J],
        "W_dec": sae["W_dec"][order_J],
        "b_dec": sae["b_dec"],
    }
    save_file(
        {name: tensor.contiguous() for name, tensor in sae.items()},
        options.out / "sae_weights.safetensors",
    )
    config = {
        "architecture": "standard",
        "d_in": len(sae["b_dec"]),
        "d_sae": options.size,
        "dtype": "float32",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "hook_name": f"blocks.{options.layer - 1}.hook_resid_post",
            "model_name": Path(options.model).resolve().name,
        },
    }
    text = json.dumps(config, indent=2)
    (options.out / "cfg.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
