"""The files of a PEFT adapter folder: config, names and shapes of tensors, scale."""

from __future__ import annotations

import json
import logging
import math
import re
import shlex
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor
from torchtune import utils

from emarecipes.errors import UserError, first_line
from emarecipes.weights_folder import check_stored_dtype

log = utils.get_logger("INFO")

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
HF_PREFIX = "base_model.model."
_LEAVES = {
    "lora_A.weight": "a",
    "lora_B.weight": "b",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
}

# What is read here, and what says nothing about the function: where it came from, how it was
# trained, and sizes of what is switched off. Any other key that is set may say another function.
_READ = {
    *("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "bias"),
    *("modules_to_save", "use_dora", "init_lora_weights", "base_model_name_or_path"),
}
_NO_FUNCTION = {
    *("auto_mapping", "peft_version", "revision", "task_type", "inference_mode", "lora_dropout"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("megatron_core", "qalora_group_size", "eva_config", "runtime_config"),
}
# First values that leave the base as it is. The others (PiSSA, OLoRA, CorDA, LoftQ, ...) take
# s B0 A0 out of the base's weights, which the folder does not hold.
_INITS = (None, True, False, "gaussian", "orthogonal", "eva")

# Of one Hugging Face module: "a" (r, in), "b" (out, r), for DoRA "magnitude" (out,).
Shapes = dict[str, tuple[int, ...]]
Tensors = dict[str, Tensor]


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """`adapter_config.json` of a LoRA or DoRA adapter.

    Raises:
        UserError: A file is missing or broken, or it is an adapter of another kind.
    """
    if not folder.is_dir():
        raise UserError(f"no such adapter folder: {folder}")
    check_weights_format(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(f"{folder}: not an adapter folder: no {name}")
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {first_line(error)}") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise UserError(f"{path}: not the config of a LoRA adapter")
    if config.get("bias", "none") != "none" or config.get("modules_to_save"):
        raise UserError(f"{path}: adapters that train biases or whole modules are not supported")
    init = config.get("init_lora_weights")
    if init not in _INITS:
        raise UserError(
            f"{path}: init_lora_weights {init!r} changes the base's weights, which the folder does "
            "not hold; save it from PEFT as a plain adapter: save_pretrained(..., "
            "path_initial_model_for_weight_conversion=...)"
        )
    for key, value in config.items():
        # JSON's false, null, 0, "" and empty ones: what such a key asks for is switched off.
        if value and key not in _READ and key not in _NO_FUNCTION:
            raise UserError(
                f"{path}: {key} is {value!r:.60}, which may mean another function than LoRA's; "
                "only plain LoRA, rank-stabilised LoRA and DoRA are read"
            )
    for key in ("use_rslora", "use_dora"):
        if not isinstance(config.get(key, False), bool | None):
            raise UserError(f"{path}: {key} must be true or false, not {config[key]!r:.60}")
    for key in ("r", "lora_alpha"):
        _check_positive(path, key, config.get(key))
    for key in ("rank_pattern", "alpha_pattern"):
        _check_pattern(path, key, config.get(key) or {})
    return config


def _check_positive(path: Path, what: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise UserError(f"{path}: {what} must be a positive number, not {value!r:.60}")


def _check_pattern(path: Path, key: str, pattern: Any) -> None:
    if not isinstance(pattern, dict):
        raise UserError(f"{path}: {key} must be a mapping, not {pattern!r:.60}")
    for name, value in pattern.items():
        _check_positive(path, f"{key}: {name}", value)
        try:
            re.compile(name)
        except re.error as error:
            raise UserError(f"{path}: {key}: {name} is no regular expression: {error}") from None


def check_weights_format(folder: Path) -> None:
    """Check that an adapter's weights are not in PyTorch's older form alone.

    Raises:
        UserError: They are; with the command that converts them, which reads tensors and runs none
            of a file's code.
    """
    old, new = folder / "adapter_model.bin", folder / WEIGHTS
    if old.is_file() and not new.exists():
        code = (
            "import sys, torch; from safetensors.torch import save_file; "
            "state = torch.load(sys.argv[1], map_location='cpu', weights_only=True); "
            "save_file({k: t.clone().contiguous() for k, t in state.items()}, sys.argv[2])"
        )
        command = shlex.join(["python", "-c", code, str(old), str(new)])
        raise UserError(f"{folder}: {old.name} is not read, only {WEIGHTS}; convert it: {command}")


def read_shapes(folder: Path) -> dict[str, Shapes]:
    """The shapes of an adapter's tensors by Hugging Face module, from the file's header.

    Raises:
        UserError: The file cannot be read, or holds something else than LoRA and DoRA.
    """
    found: dict[str, Shapes] = defaultdict(dict)
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            for key in _of_the_adapter(file):
                name, leaf = _split(folder, key)
                part = file.get_slice(key)
                check_stored_dtype(folder / WEIGHTS, key, part.get_dtype())
                found[name][leaf] = tuple(part.get_shape())
    except (SafetensorError, OSError) as error:
        raise UserError(f"{folder / WEIGHTS}: cannot be read: {error}") from None
    if not found:
        raise UserError(f"{folder / WEIGHTS}: it has no weights")
    return dict(found)


def read_tensors(folder: Path) -> dict[str, Tensors]:
    """The same with the tensors themselves, on the CPU.

    An adapter that was never trained, or whose training came to nothing, is allowed, and told. One
    with magnitudes acts without B.
    """
    found: dict[str, Tensors] = defaultdict(dict)
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        for key in _of_the_adapter(file):
            name, leaf = _split(folder, key)
            found[name][leaf] = file.get_tensor(key)
    if not any("magnitude" in tensors or bool(tensors["b"].any()) for tensors in found.values()):
        utils.log_rank_zero(
            log,
            f"{folder}: the adapter has no effect: every B is zero, as before training",
            level=logging.WARNING,
        )
    return dict(found)


def is_base_copy(key: str) -> bool:
    """Whether a tensor is one of the base's, see `base_copies`."""
    return key.endswith(".base_layer.weight")


def _of_the_adapter(file: Any) -> list[str]:
    return [key for key in file.offset_keys() if not is_base_copy(key)]


def _split(folder: Path, key: str) -> tuple[str, str]:
    leaf = next((leaf for leaf in _LEAVES if key.endswith(f".{leaf}")), None)
    if leaf is None or not key.startswith(HF_PREFIX):
        raise UserError(f"{folder / WEIGHTS}: {key} belongs to neither LoRA nor DoRA")
    return key.removeprefix(HF_PREFIX).removesuffix(f".{leaf}"), _LEAVES[leaf]


def adapter_scale(config: dict[str, Any], name: str, rank: int) -> float:
    """A module's alpha / r, or alpha / sqrt(r) where the adapter is rank-stabilised."""
    alpha = float(by_pattern(config.get("alpha_pattern"), name, config["lora_alpha"]))
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def check_rank(folder: Path, config: dict[str, Any], name: str, rank: int) -> None:
    """Check that a module's weights have the rank that the adapter's config gives it.

    Raises:
        UserError: They have another.
    """
    stated = by_pattern(config.get("rank_pattern"), name, config["r"])
    if stated != rank:
        raise UserError(f"{folder / CONFIG}: gives {name} rank {stated}, its weights have {rank}")


def check_complete(
    folder: Path, config: dict[str, Any], found: Iterable[str], all_linear: Iterable[str]
) -> None:
    """Check that an adapter's weights cover the layers that its config names, by PEFT's rules.

    What is lacking would be without effect, and nobody would see it.

    Args:
        folder: The adapter's.
        config: Its config.
        found: The Hugging Face modules that its weights are of.
        all_linear: Those of all linear layers of the model.

    Raises:
        UserError: A layer is lacking or not named, or none is named, or a pattern of ranks or
            alphas is of none.
    """
    present = set(found)
    if not config.get("target_modules"):
        raise UserError(
            f"{folder / CONFIG}: target_modules names no layer: PEFT would adapt those of its own "
            f"choice, whatever {WEIGHTS} has; name them there"
        )
    try:
        lacking = [name for name in all_linear if _is_target(config, name) and name not in present]
        unused = [
            f"{key} {pattern!r}"
            for key in ("rank_pattern", "alpha_pattern")
            for pattern in config.get(key) or {}
            if not any(by_pattern({pattern: True}, name, False) for name in present)
        ]
    except re.error as error:
        raise UserError(f"{folder / CONFIG}: a pattern is no regular expression: {error}") from None
    if lacking:
        more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        raise UserError(
            f"{folder}: an incomplete adapter: its config names {lacking[0]}{more}, of which "
            f"{WEIGHTS} has nothing"
        )
    extra = [name for name in sorted(present) if not _is_target(config, name)]
    if extra:
        raise UserError(
            f"{folder}: {WEIGHTS} has {extra[0]}, which its config does not name: "
            "PEFT would leave it out; name it in target_modules, or save it from PEFT again"
        )
    if unused:
        raise UserError(f"{folder / CONFIG}: {unused[0]} is of none of its layers")


def _is_target(config: dict[str, Any], name: str) -> bool:
    """Whether PEFT would put an adapter on a module of that name."""
    targets, excluded = config.get("target_modules"), config.get("exclude_modules")
    if excluded and _names(excluded, name):
        return False
    if targets == "all-linear":
        return name != "lm_head"
    if not _names(targets, name):
        return False
    layers = config.get("layers_to_transform")
    if layers is None or layers == [] or name in (targets if isinstance(targets, list) else ()):
        return True
    number = re.search(r"\.(\d+)\.", name)
    wanted = layers if isinstance(layers, list) else [layers]
    return number is not None and int(number[1]) in wanted


def _names(modules: Any, name: str) -> bool:
    if isinstance(modules, str):
        return re.fullmatch(modules, name) is not None
    return any(name == module or name.endswith(f".{module}") for module in modules)


def by_pattern(pattern: dict[str, Any] | None, name: str, default: Any) -> Any:
    """PEFT's rule: the first key that, as a regular expression, ends the module's name."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default
