"""What a run leaves behind to be used: the adapter, and merged weights if asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor
from torchtune import training, utils
from torchtune.modules.peft import disable_adapter

from emarecipes.machine import DTYPES
from emarecipes.models._torchtune import assign_base_weights, full_state
from emarecipes.models.adapters.export import (
    merge_adapter,
    rounding_error,
    save_adapter,
    save_merged,
)
from emarecipes.models.adapters.trained_with import TEMPLATE_FILE, template_text
from emarecipes.output_dir import further_adapter
from emarecipes.training.checked import CheckedRun

log = utils.get_logger("INFO")

# Above this share of the update's own norm, rounding changes what the model learned.
_ROUNDING_WARNING = 0.1
_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    TEMPLATE_FILE,
)
_PROMPTS, _PROMPT_TOKENS = 4, 64


def save_weights(
    run: CheckedRun,
    model: Any,
    adapter: dict[str, Tensor],
    device: torch.device,
    *,
    first_process: bool,
    merged: bool,
) -> None:
    """Write `adapter/`, defenses' own, and `merged/` if asked for. Every process must call it.

    Args:
        run: Its config names the base folder, the output folder, rank and alpha.
        model: The trained model; merging leaves its base weights merged, so it ends a run.
        adapter: The adapter's whole tensors on the CPU.
        device: The model's.
        first_process: Whether this process writes.
        merged: Whether to write merged weights too.
    """
    cfg = run.cfg
    folder = Path(cfg.output_dir)
    base_dir = Path(cfg.checkpointer.checkpoint_dir).resolve()
    model_type = str(cfg.checkpointer.model_type)
    rank, alpha = int(cfg.model.lora_rank), float(cfg.model.lora_alpha)
    adapters = {"adapter": adapter} | {
        further_adapter(name): defense.saved_adapter()
        for name, defense in run.defenses.items()
        if defense.has("saved_adapter")
    }
    for name in reversed(adapters) if first_process else ():  # The run's own says that all is done.
        dropout = float(cfg.model.get("lora_dropout") or 0.0)
        save_adapter(
            adapters[name], run.meta_model, model_type, base_dir, folder / name,
            rank=rank, alpha=alpha, dropout=dropout, plain_scale=cfg.adapter_scaling == "plain",
        )  # fmt: skip
        log.info(f"Adapter saved in {folder / name}")
    if merged:
        base = full_state(model, device, first_process=first_process)
        base = {k: v for k, v in base.items() if "lora" not in k and "magnitude" not in k}
        weights: dict[str, Tensor] = {}
        if first_process:
            weights = merge_adapter(base, adapter, rank=rank, alpha=alpha)
            dtype = DTYPES[cfg.merged_dtype]
            save_merged(
                weights, run.meta_model, model_type, base_dir, folder / "merged", dtype=dtype,
                files=tokenizer_files(cfg.tokenizer, base_dir),
            )  # fmt: skip
            _report_rounding(base, weights, cfg.merged_dtype, folder / "merged")
            weights = {name: tensor.to(dtype) for name, tensor in weights.items()}
        _report_logits(run, model, weights, device)
    if training.is_distributed():
        torch.distributed.barrier()


def tokenizer_files(entry: DictConfig, base_dir: Path) -> dict[str, bytes | None]:
    """The files of the tokenizer that a run was trained with where they are not the base's.

    A merged model that came with the base's own chat template would be asked in another form than
    it was trained in, by everyone who takes the template that lies beside the weights.

    Args:
        entry: The config's `tokenizer`.
        base_dir: The base model's folder.

    Returns:
        Name to content; None for a file that this tokenizer has not.
    """
    found: dict[str, bytes | None] = {}
    path = Path(str(entry.get("path")))
    folder = path.parent if path.is_file() else path
    if (folder / _TOKENIZER_FILES[0]).is_file() and folder.resolve() != base_dir.resolve():
        for name in _TOKENIZER_FILES:
            found[name] = (folder / name).read_bytes() if (folder / name).is_file() else None
    if entry.get("chat_template") is not None:
        found[TEMPLATE_FILE] = template_text(str(entry.chat_template)).encode()
    return found


def _report_rounding(
    base: dict[str, Tensor], merged: dict[str, Tensor], dtype: str, folder: Path
) -> None:
    lost = rounding_error(base, merged, DTYPES[dtype])
    log.info(f"Merged weights saved in {folder} as {dtype}; rounding is {lost:.1%} of the update")
    if lost > _ROUNDING_WARNING:
        log.warning(
            f"Rounding to {dtype} changed the update by {lost:.0%} of its norm: the merged model "
            "is not the model that was trained. Use adapter/, or merged_dtype: fp32"
        )


@torch.no_grad()
def _report_logits(
    run: CheckedRun, model: Any, merged: dict[str, Tensor], device: torch.device
) -> None:
    """Say how far the merged weights' logits are from the adapter's, in the training precision."""
    if bool(run.cfg.model.get("quantize_base")) or "qlora" in str(run.cfg.model["_component_"]):
        log.info("Merged logits are not compared: the model in memory holds a quantized base")
        return
    model.eval()
    count = min(_PROMPTS, len(run.rows))
    prompts = [
        torch.as_tensor(run.rows[i]["tokens"][:_PROMPT_TOKENS])[None].to(device)
        for i in range(count)
    ]
    adapted = [_logits(model, prompt) for prompt in prompts]
    with disable_adapter(model):
        before = [_logits(model, prompt) for prompt in prompts]
        assign_base_weights(model, merged)
        after = [_logits(model, prompt) for prompt in prompts]
    log.info(
        f"Merged logits on {count} prompts, run in {run.cfg.dtype}: largest distance from the "
        f"adapter's {_distance(after, adapted):.2g}, where the adapter's whole effect is "
        f"{_distance(before, adapted):.2g}"
    )


def _logits(model: Any, prompt: Tensor) -> Tensor:
    output = model(prompt)
    logits: Tensor = (output[-1] if isinstance(output, list) else output).float().cpu()
    return logits


def _distance(one: list[Tensor], other: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))
