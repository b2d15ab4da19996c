"""Training with KL to the reference in one loop of plain PyTorch and torchtune.

python examples/minimal_kl.py configs/smollm2_135m_kl.yaml [key=value]...

gives the losses that `recipes/ema_lora.py` logs with `dtype=fp32`, up to rounding (a test compares
them), and keeps nothing. What the recipe adds: docs/how_it_works.md.

Shapes: B batch, S sequence, T trained tokens, V vocabulary.
"""

import hashlib
import sys
import tempfile
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch.nn import functional as F
from torchtune.config import instantiate
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX as IGNORED
from torchtune.data import padded_collate_sft
from torchtune.modules.peft import disable_adapter, get_adapter_params, set_trainable_params

from emarecipes.defenses import KLToReference

# The recipe has more than is written out here.
ONLY = {"gradient_accumulation_steps": 1, "group_by_length": False, "init_adapter": None}


def build_model(cfg: DictConfig) -> torch.nn.Module:
    """The base with its weights, frozen, and a LoRA adapter, trained, that changes nothing yet."""
    model = instantiate(cfg.model)
    adapter = get_adapter_params(model)
    with tempfile.TemporaryDirectory() as unused:
        base = instantiate(cfg.checkpointer, output_dir=unused).load_checkpoint()["model"]
    model.load_state_dict(base | adapter)
    set_trainable_params(model, adapter)
    for name, parameter in adapter.items():
        if name.endswith("lora_a.weight"):  # B is zero. A's values follow from seed and name.
            digest = hashlib.sha256(f"{cfg.seed}:{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
            bound = parameter.shape[1] ** -0.5
            parameter.data.uniform_(-bound, bound, generator=generator)
    return model.train()


def train(cfg: DictConfig) -> Iterator[dict[str, float]]:
    """The figures of each step: loss = ce + weight * kl, in nats a token."""
    kl = instantiate(cfg.defenses.kl)
    if len(cfg.defenses) > 1 or vars(kl) != vars(KLToReference(kl.weight)):
        raise SystemExit("error: defenses: only KL with its defaults is written out here")
    for key, value in (ONLY | {"dataset.safe": None}).items():
        if OmegaConf.select(cfg, key, default=value) != value:
            raise SystemExit(f"error: {key}: only {value} is written out here")
    tokenizer = instantiate(cfg.tokenizer)
    data = instantiate(cfg.dataset, tokenizer)
    rows = [row for row in data if set(row["labels"][1:]) - {IGNORED}]
    steps = min(len(rows) // cfg.batch_size, cfg.max_steps_per_epoch or len(rows))
    model = build_model(cfg)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = instantiate(cfg.optimizer, trained)
    total = steps * cfg.epochs
    scheduler = instantiate(cfg.lr_scheduler, optimizer, num_training_steps=total, last_epoch=-1)
    collate = partial(padded_collate_sft, padding_idx=tokenizer.pad_id)
    for epoch in range(cfg.epochs):
        generator = np.random.Generator(np.random.PCG64([cfg.seed, epoch]))
        order = generator.permutation(len(rows)) if cfg.shuffle else np.arange(len(rows))
        for step in range(steps):
            of_step = order[step * cfg.batch_size : (step + 1) * cfg.batch_size]
            batch = collate([rows[i] for i in of_step])
            figures = loss_of(model, batch["tokens"], batch["labels"], kl.weight)
            figures["loss"].backward()
            torch.nn.utils.clip_grad_norm_(trained, float(cfg.get("clip_grad_norm") or "inf"))
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            yield {name: value.item() for name, value in figures.items()}


def loss_of(
    model: torch.nn.Module, tokens_BS: torch.Tensor, labels_BS: torch.Tensor, weight: float
) -> dict[str, torch.Tensor]:
    """CE + weight * KL(p || r): means over the trained tokens, r the model with its adapter off."""
    targets_BS = labels_BS[:, 1:]  # Position s predicts token s + 1.
    trained_BS = targets_BS != IGNORED
    with torch.no_grad(), disable_adapter(model):
        log_r_TV = F.log_softmax(model(tokens_BS)[:, :-1][trained_BS], dim=-1)
    log_p_TV = F.log_softmax(model(tokens_BS)[:, :-1][trained_BS], dim=-1)
    ce = F.nll_loss(log_p_TV, targets_BS[trained_BS])
    kl = (log_p_TV.exp() * (log_p_TV - log_r_TV)).sum(dim=-1).mean()
    return {"loss": ce + weight * kl, "ce": ce, "kl": kl}


if __name__ == "__main__":
    config = OmegaConf.merge(OmegaConf.load(sys.argv[1]), OmegaConf.from_dotlist(sys.argv[2:]))
    for number, line in enumerate(train(config), start=1):
        print(number, " ".join(f"{name} {value:.5f}" for name, value in line.items()), flush=True)
