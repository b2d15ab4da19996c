"""Write a trained adapter as PEFT loads it, or merged into its model as transformers loads it.

torchtune's own export is right for Llama's layout only; see `_torchtune_convert`.
"""

import math
import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from emarecipes.errors import UserError, disk_errors
from emarecipes.files import open_to_others, sync, write_json
from emarecipes.models._torchtune_convert import read_base_config, to_hf
from emarecipes.models.adapters.layout import (
    adapter_layers,
    adapter_to_hf,
    exported_scale,
    target_modules,
)
from emarecipes.models.families.blocks import Decoder
from emarecipes.models.families.checkpoint import image_tensors

_COPIED_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".py")
_COPIED_STEMS = ("LICENSE", "NOTICE", "USE_POLICY")
_NOT_COPIED = ("config.json", "adapter_config.json", "original_repo_id.json")


def save_adapter(
    adapter_state: dict[str, Tensor],
    model: nn.Module,
    model_type: str,
    base_dir: Path,
    output_dir: Path,
    *,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    plain_scale: bool = False,
) -> None:
    """Write a LoRA or DoRA adapter that ``peft.PeftModel.from_pretrained`` loads.

    Fused layers (Phi-3) become one adapter of a higher rank with block-diagonal B, listed in
    ``rank_pattern``. DoRA on layers with a bias must have been trained after ``fix_dora_bias``.
    The folder is written beside `output_dir` and takes its place when complete.

    Args:
        adapter_state: torchtune's adapter weights, ``<module>.lora_a.weight`` of shape (rank, in),
            ``<module>.lora_b.weight`` (out, rank), for DoRA ``<module>.magnitude`` (out,).
        model: torchtune's model, on any device; only its structure is read.
        model_type: name of torchtune's ``ModelType``.
        base_dir: folder of the base model in Hugging Face's format.
        output_dir: folder to write; an adapter already there is replaced.
        rank: LoRA rank in training.
        alpha: torchtune's ``lora_alpha``; the update is alpha / rank * B A.
        dropout: LoRA dropout in training.
        plain_scale: Write one alpha, so that every layer's scale is alpha over its rank: no
            rank-stabilised form and no ``alpha_pattern``; B absorbs the rest.

    Raises:
        UserError: if PEFT has no form for the adapter, or a folder would be lost.
    """
    config = read_base_config(base_dir, model)
    layers = adapter_layers(adapter_state, rank)
    use_dora = any("magnitude" in layer for layer in layers.values())
    lora_alpha, use_rslora, ratio = exported_scale(alpha, rank, plain=plain_scale)
    adapted = adapter_to_hf(layers, model, model_type, config, ratio, one_alpha=plain_scale)
    ranks = {name: layer["lora_A.weight"].shape[0] for name, layer in adapted.items()}
    fused = {name: r // rank for name, r in ranks.items() if r != rank}
    # The scale, alpha / rank or alpha / sqrt(rank), stays the same for every layer.
    alphas = {n: lora_alpha * (math.sqrt(k) if use_rslora else k) for n, k in fused.items()}
    peft_config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base_dir),
        "inference_mode": True,
        "r": rank,
        "lora_alpha": lora_alpha,
        "use_rslora": use_rslora,
        "use_dora": use_dora,
        "lora_dropout": dropout,
        "target_modules": target_modules(adapted),
        "rank_pattern": {name: ranks[name] for name in fused},
        "alpha_pattern": {} if plain_scale else alphas,
        "bias": "none",
    }
    tensors = {
        f"base_model.model.{name}.{leaf}": tensor
        for name, layer in adapted.items()
        for leaf, tensor in layer.items()
    }
    with replacing(output_dir, marker="adapter_config.json", keep=base_dir) as folder:
        write_json(folder / "adapter_config.json", peft_config)
        with disk_errors(output_dir):
            save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def merge_adapter(
    base_state: dict[str, Tensor], adapter_state: dict[str, Tensor], *, rank: int, alpha: float
) -> dict[str, Tensor]:
    """Return the model's weights with the adapter merged, in torchtune's layout.

    LoRA: W' = W + s B A with s = alpha / rank. DoRA: W' = m * (W + s B A) / ||W + s B A||, norms
    taken by row, as in torchtune's ``DoRALinear``.

    Args:
        base_state: the base model's weights; not changed.
        adapter_state: torchtune's adapter weights (see `save_adapter`).
        rank: LoRA rank in training.
        alpha: torchtune's ``lora_alpha``.

    Returns:
        A new dict: fp32 weights for the adapted layers, the base's own tensors for the others.

    Raises:
        UserError: if the adapter does not belong to this model.
    """
    merged = dict(base_state)
    for name, layer in adapter_layers(adapter_state, rank).items():
        key = f"{name}.weight"
        if key not in base_state:
            raise UserError(f"adapter: {name} is not a layer of the base model")
        a, b = layer["lora_a.weight"].float(), layer["lora_b.weight"].float()
        weight = base_state[key].to(a.device, torch.float32)
        weight = torch.addmm(weight, b, a, alpha=alpha / rank)
        if "magnitude" in layer:
            norm = torch.linalg.vector_norm(weight, dim=1)
            weight *= (layer["magnitude"].float() / norm).unsqueeze(1)
        merged[key] = weight
    return merged


def rounding_error(
    base_state: dict[str, Tensor], merged_state: dict[str, Tensor], dtype: torch.dtype
) -> float:
    """Return how much of a merged update is lost when it is stored in `dtype`.

    ||round(W') - W'|| / ||W' - W||, Frobenius norms over all weights that the merge changed; 0 if
    there are none. Above about 0.1, serve the adapter itself or store fp32.
    """
    lost = update = 0.0
    for name, merged in merged_state.items():
        base = base_state[name]
        if merged is base or not (change := _squared_norm(merged.float() - base.float())):
            continue
        update += change
        lost += _squared_norm(merged.to(dtype).float() - merged.float())
    return math.sqrt(lost / update) if update else 0.0


def save_merged(
    merged_state: dict[str, Tensor],
    model: nn.Module,
    model_type: str,
    base_dir: Path,
    output_dir: Path,
    *,
    dtype: torch.dtype = torch.float32,
    shard_bytes: int = 5 * 10**9,
    files: Mapping[str, bytes | None] | None = None,
) -> None:
    """Write a model folder that transformers' ``from_pretrained`` loads.

    Weights are converted layer by layer, so memory beyond `merged_state` is one shard. The folder
    is written beside `output_dir` and takes its place when complete.

    Args:
        merged_state: all weights of the model in torchtune's layout (see `merge_adapter`).
        model: torchtune's model, on any device; only its structure is read.
        model_type: name of torchtune's ``ModelType``.
        base_dir: the base model's folder: config, tokenizer and licence are copied from it.
        output_dir: folder to write; a model already there is replaced.
        dtype: storage type. See `rounding_error` before choosing less than fp32.
        shard_bytes: largest size of a weights file (one tensor may exceed it).
        files: contents of files that take the place of the base's; None for one that it has not.

    Raises:
        UserError: if the family has no converter, or a folder would be lost.
    """
    config = read_base_config(base_dir, model)
    # An output layer of its own may have been adapted: it is stored whatever the base's file says.
    config["tie_word_embeddings"] = "output.weight" not in merged_state
    for key in {"dtype", "torch_dtype"} & set(config) or {"torch_dtype"}:
        config[key] = str(dtype).removeprefix("torch.")

    with replacing(output_dir, marker="config.json", keep=base_dir) as folder:
        write_json(folder / "config.json", config)
        for path in base_dir.iterdir():
            if path.is_file() and _is_copied(path):
                shutil.copyfile(path, folder / path.name)
        for name, content in (files or {}).items():
            (folder / name).unlink(missing_ok=True)
            if content is not None:
                (folder / name).write_bytes(content)
        tensors = _hf_tensors(merged_state, model_type, config, dtype)
        if isinstance(model, Decoder):
            tensors = chain(tensors, image_tensors(base_dir, dtype))
        _write_shards(tensors, folder, shard_bytes)


def _hf_tensors(
    state: dict[str, Tensor], model_type: str, config: dict[str, Any], dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Yield Hugging Face's names and tensors, one layer of the model in memory at a time."""
    blocks: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in state.items():
        # "layers.7" holds together what may be fused; the few other weights stand alone.
        block = ".".join(name.split(".")[:2]) if name.startswith("layers.") else name
        blocks[block][name] = tensor
    for block_state in tqdm(blocks.values(), desc="writing the merged model", disable=None):
        stored = {name: t.detach().cpu().to(dtype) for name, t in block_state.items()}
        for name, tensor in to_hf(stored, model_type, config).items():
            yield name, tensor.contiguous()


def _write_shards(tensors: Iterable[tuple[str, Tensor]], folder: Path, shard_bytes: int) -> None:
    shards: list[dict[str, int]] = []
    pending: dict[str, Tensor] = {}

    def flush() -> None:
        with disk_errors(folder):
            save_file(pending, folder / f"{len(shards)}.part", metadata={"format": "pt"})
        shards.append({name: tensor.nbytes for name, tensor in pending.items()})
        pending.clear()

    for name, tensor in tensors:
        if pending and sum(t.nbytes for t in pending.values()) + tensor.nbytes > shard_bytes:
            flush()
        pending[name] = tensor
    flush()

    if len(shards) == 1:
        (folder / "0.part").rename(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for index, names in enumerate(shards):
        # The number of files, which their names carry, is known only now.
        file_name = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"{index}.part").rename(folder / file_name)
        weight_map |= dict.fromkeys(names, file_name)
    total = sum(sum(names.values()) for names in shards)
    index_json = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(folder / "model.safetensors.index.json", index_json)


@contextmanager
def replacing(target: Path, *, marker: str, keep: Path) -> Iterator[Path]:
    """Give a new folder that takes `target`'s place once the body is done and all is on disk.

    If the body fails, `target` stays as it was. Only a folder that holds `marker` is replaced.
    """
    target = target.resolve()
    if keep.resolve().is_relative_to(target):
        raise UserError(f"{target}: holds the base model; choose another output folder")
    fresh = target.with_name(f".{target.name}.new")
    old = target.with_name(f".{target.name}.old")
    target.parent.mkdir(parents=True, exist_ok=True)
    if old.exists() and not target.exists():
        # An earlier run died between the two renames below.
        old.rename(target)
    empty = target.is_dir() and not any(target.iterdir())
    if target.exists() and not empty and not (target / marker).is_file():
        raise UserError(f"{target}: exists and has no {marker}; choose another output folder")
    shutil.rmtree(fresh, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    fresh.mkdir()
    try:
        yield fresh
        for path in (*fresh.iterdir(), fresh):
            if path.suffix == ".safetensors":
                open_to_others(path)
            sync(path)
        if target.exists():
            target.rename(old)
        fresh.rename(target)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        if old.exists() and not target.exists():
            old.rename(target)
        raise
    sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _is_copied(path: Path) -> bool:
    if path.name in _NOT_COPIED or path.name.endswith(".index.json"):
        return False
    return path.suffix in _COPIED_SUFFIXES or path.name.startswith(_COPIED_STEMS)


def _squared_norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor).double() ** 2)
