"""What can be found wrong with a model, its checkpoint and its device before a weight is loaded."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import torch
from omegaconf import DictConfig
from tokenizers import Tokenizer
from torch import nn
from torchtune import training

from emarecipes.config import Origin
from emarecipes.errors import UserError, first_line, reason
from emarecipes.machine import settle_dtype
from emarecipes.models._torchtune import checkpoint_shapes, model_on_meta
from emarecipes.models._torchtune_convert import MODEL_TYPES
from emarecipes.models.config_agreement import check_agreement
from emarecipes.models.families.names import CONFIG_JSON
from emarecipes.models.source import ModelSource

TOKENIZER = "tokenizer.json"
_MAX_LAYERS, _MAX_RANK = 1000, 2**16


def check_model(cfg: DictConfig, origin: Origin) -> ModelSource:
    """Build the model on the meta device and check that the checkpoint is of its shape.

    Raises:
        UserError: The model has no LoRA, its builder refuses its arguments, or the checkpoint's
            shapes or config.json do not agree with it.
    """
    check_lora(cfg, origin)
    model = model_on_meta(cfg, origin)
    _check_checkpoint_fits(cfg, origin, model)
    folder, model_type = Path(cfg.checkpointer.checkpoint_dir), str(cfg.checkpointer.model_type)
    return ModelSource(model, folder, model_type)


def check_device(cfg: DictConfig, origin: Origin) -> None:
    """Check that `device` is there.

    Raises:
        UserError: It is not.
    """
    device = str(cfg.device or "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(
            f"{origin.at('device')}: this machine has no usable CUDA device; say device=cpu"
        )
    if (
        device.startswith("cuda")
        and int(os.environ.get("LOCAL_RANK", 0)) >= torch.cuda.device_count()
    ):
        raise UserError(
            f"{origin.at('device')}: more processes than CUDA devices ({torch.cuda.device_count()})"
        )
    try:
        kind = torch.device(device)
        if kind.type != "cpu" and not getattr(torch, kind.type).is_available():
            raise RuntimeError(f"no {kind.type} device here; say device=cpu")
    except (RuntimeError, AttributeError) as error:
        raise UserError(f"{origin.at('device')}: {first_line(error)}") from None


def check_dtype(cfg: DictConfig, origin: Origin, kept: str | None = None) -> None:
    """Settle in which `dtype` the device computes, and check that it can.

    Args:
        cfg: Its `dtype` is set where it is `auto`.
        origin: Where it was written.
        kept: See `settle_dtype`.

    Raises:
        UserError: It cannot.
    """
    settle_dtype(cfg, origin, kept)
    try:
        training.get_dtype(cfg.dtype, device=torch.device(cfg.device or "cpu"))
    except RuntimeError as error:
        raise UserError(f"{origin.at('dtype')}: {first_line(error)}") from None


def check_offloading(cfg: DictConfig, origin: Origin, world_size: int) -> None:
    """Check that what is to wait on the host has an accelerator to leave.

    Raises:
        UserError: It has not, or activation offloading lacks checkpointing.
    """
    on_cuda = torch.device(cfg.device or "cpu").type == "cuda"
    if cfg.enable_activation_offloading and not (on_cuda and cfg.enable_activation_checkpointing):
        raise UserError(
            f"{origin.at('enable_activation_offloading')}: works on CUDA only, and only with "
            "enable_activation_checkpointing: true"
        )
    if cfg.fsdp_cpu_offload and world_size > 1 and not on_cuda:  # Of no meaning to one process.
        raise UserError(
            f"{origin.at('fsdp_cpu_offload')}: works on CUDA only; the weights are on the host here"
        )


def check_compiler(cfg: DictConfig, origin: Origin) -> None:
    """Check that `compile` finds the C++ compiler that it takes on a CPU.

    Raises:
        UserError: It is not there.
    """
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    on_cpu = torch.device(cfg.device or "cpu").type == "cpu"
    if cfg.compile and on_cpu and shutil.which(compiler) is None:
        raise UserError(
            f"{origin.at('compile')}: on a CPU it needs a C++ compiler, and there is no {compiler} "
            "(CXX names another)"
        )


def check_checkpoint_files(cfg: DictConfig, origin: Origin) -> None:
    """Check that the checkpointer's and the tokenizer's files exist.

    Raises:
        UserError: They do not, or the checkpointer is asked for what is not supported.
    """
    entry = cfg.checkpointer
    key = _folder_key(cfg)
    folder = Path(str(entry.get("checkpoint_dir")))
    if not folder.is_dir():
        raise UserError(
            f"{origin.at(key)}: no such folder: {folder}; get the model as the config's header "
            "says, or point to it"
        )
    files = entry.get("checkpoint_files")
    names = [] if files is None or hasattr(files, "keys") else list(files)
    for name in names:
        if not (folder / str(name)).is_file():
            raise UserError(f"{origin.at('checkpointer.checkpoint_files')}: {folder} has no {name}")
    for key in ("adapter_checkpoint", "recipe_checkpoint"):
        if entry.get(key) is not None:
            raise UserError(
                f"{origin.at(f'checkpointer.{key}')}: not read here; to go on from a trained "
                "adapter name its folder as init_adapter, to resume a run say resume: auto"
            )
    path = cfg.tokenizer.get("path")
    if path is not None and not Path(str(path)).exists():
        raise UserError(f"{origin.at('tokenizer.path')}: no such file or folder: {path}")
    if path is not None:
        _check_same_vocabulary(Path(str(path)), folder, origin)


def _folder_key(cfg: DictConfig) -> str:
    """The key that names the model's folder in the user's config."""
    from_json = str(cfg.checkpointer.get("model_type")) == CONFIG_JSON
    return "model.path" if from_json else "checkpointer.checkpoint_dir"


def _check_same_vocabulary(path: Path, base: Path, origin: Origin) -> None:
    """Check that a tokenizer from elsewhere gives its tokens the numbers that the base's gives.

    One of another family with a vocabulary that is not larger would train without a complaint.
    Tokens that only one of them has (added, or renamed reserved ones) may be what they are.

    Raises:
        UserError: A token has another number.
    """
    ours, theirs = path if path.is_file() else path / TOKENIZER, base / TOKENIZER
    if ours.name != TOKENIZER or not ours.is_file() or not theirs.is_file():
        return  # torchtune's own tokenizers read other files.
    if ours.samefile(theirs) or ours.read_bytes() == theirs.read_bytes():
        return
    try:
        own, other = (Tokenizer.from_file(str(file)).get_vocab() for file in (ours, theirs))
    except Exception as error:  # The tokenizers library raises bare Exception.
        raise UserError(f"{origin.at('tokenizer.path')}: {ours}: {reason(error)}") from None
    moved = [token for token, number in own.items() if other.get(token, number) != number]
    if moved:
        token = min(moved, key=lambda moved: own[moved])
        raise UserError(
            f"{origin.at('tokenizer.path')}: not this model's tokenizer: {token!r:.60} is token "
            f"{own[token]} in {ours} and {other[token]} in {theirs}; so are {len(moved) - 1} more"
        )


def base_files(cfg: DictConfig) -> list[Path]:
    """The files that the frozen model comes from: its weights, and its `config.json`."""
    folder = Path(str(cfg.checkpointer.checkpoint_dir))
    names = cfg.checkpointer.get("checkpoint_files")
    if names is None or hasattr(names, "keys"):  # torchtune's own pattern of names.
        names = [p.name for p in folder.iterdir() if p.suffix in (".safetensors", ".bin", ".pt")]
    paths = [folder / str(name) for name in sorted({*map(str, names), "config.json"})]
    return [path for path in paths if path.is_file()]


def check_lora(cfg: DictConfig, origin: Origin) -> None:
    """Check the model's keys that say how it is adapted.

    Raises:
        UserError: One is missing, or no number that it can be; a model of too many layers.
    """
    # torchtune's recipe reads them from the config, not from the builder's defaults.
    for key in ("lora_rank", "lora_alpha", "lora_attn_modules", "apply_lora_to_mlp"):
        if cfg.model.get(key) is None:
            raise UserError(f"{origin.at('model')}: the config must give {key}")
    dropout = cfg.model.get("lora_dropout") or 0.0
    if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise UserError(f"{origin.at('model.lora_dropout')}: must be at least 0 and below 1")
    for key in ("lora_rank", "lora_alpha"):
        value = cfg.model[key]
        if not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise UserError(f"{origin.at(f'model.{key}')}: must be > 0, not {value}")
    if cfg.model.lora_rank > _MAX_RANK:
        raise UserError(f"{origin.at('model.lora_rank')}: must be at most {_MAX_RANK}")
    # Each layer is built before shapes can be compared: a slip of the key would take for ever.
    layers = cfg.model.get("num_layers")
    if isinstance(layers, int) and layers > _MAX_LAYERS:
        raise UserError(f"{origin.at('model.num_layers')}: no model has {layers} layers")


def _check_checkpoint_fits(cfg: DictConfig, origin: Origin, model: nn.Module) -> None:
    where = origin.at(_folder_key(cfg).removesuffix(".checkpoint_dir"))
    model_type = str(cfg.checkpointer.get("model_type"))
    if model_type not in MODEL_TYPES:
        raise UserError(
            f"{origin.at('checkpointer.model_type')}: no adapter can be saved for {model_type}; "
            f"known: {', '.join(known for known in MODEL_TYPES if known != CONFIG_JSON)}"
        )
    found = checkpoint_shapes(cfg, where)
    expected = {
        name: tuple(tensor.shape)
        for name, tensor in model.named_parameters()
        if "lora" not in name and "magnitude" not in name
    }
    wrong = [
        f"{name} is {_size(found.get(name))} there and {_size(expected.get(name))} in the model"
        for name in sorted(expected.keys() | found.keys())
        if found.get(name) != expected.get(name)
    ]
    try:
        check_agreement(Path(cfg.checkpointer.checkpoint_dir), model, model_type)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise UserError(
            f"{where}: the checkpoint is of another architecture than `model`: {wrong[0]}{more}"
        )


def _size(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else "x".join(map(str, shape))
