"""The plain values of a training config, with their types and defaults.

Component entries (`model`, `dataset`, ...) are checked by `emarecipes.components`.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, TypeVar

from omegaconf import DictConfig, OmegaConf
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from emarecipes.config import Origin, suggestion
from emarecipes.errors import UserError

Positive = Annotated[int, Field(ge=1)]
Entry = dict[str, Any]
Dtype = Literal["auto", "bf16", "fp32"]

_LOSSES = ("CEWithChunkedOutputLoss", "CrossEntropyLoss", "LinearCrossEntropyLoss")


# What these may say without changing the loss; None: any value.
_LOSS_KEYS = {
    "_component_": None,
    "num_output_chunks": None,
    "reduction": "mean",
    "ignore_index": -100,
}


class ModelSettings(BaseModel):
    """What every recipe reads: a model, where it comes from, and where results go."""

    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())

    output_dir: Annotated[str, Field(min_length=1)]
    model: Entry
    tokenizer: Entry
    checkpointer: Entry
    seed: Annotated[int, Field(ge=0, lt=2**32)] | None = None
    device: str | None = None
    dtype: Dtype = "auto"
    overwrite: bool = False


class ProbeSettings(BaseModel):
    """The entry `probe` of a training config: likelihood probes while the adapter is trained.

    Attributes:
        suites: By name, as the entry `probes` of `recipes/ema_eval.py` has them.
        every_n_steps: Also after the last step.
        max_rows: Questions a suite, evenly over its file; null for all.
        batch_size: Answers at a time.
    """

    model_config = ConfigDict(strict=True, extra="allow")

    suites: Annotated[dict[str, Entry], Field(min_length=1)]
    every_n_steps: Positive = 50
    max_rows: Positive | None = 32
    batch_size: Positive = 8


class Settings(ModelSettings):
    """What `recipes/ema_lora.py` reads at the top level of its config.

    All but the last group are torchtune's own keys, with their meaning there.
    """

    dataset: Entry | list[Entry]
    optimizer: Entry
    lr_scheduler: Entry | None = None
    loss: Entry | None = None
    metric_logger: Entry | None = None
    profiler: Entry | None = None

    shuffle: bool = True
    batch_size: Positive = 1
    epochs: Positive = 1
    max_steps_per_epoch: Positive | None = None
    gradient_accumulation_steps: Positive = 1
    clip_grad_norm: Annotated[float, Field(gt=0)] | Literal["inf"] | None = None
    compile: bool = False
    collate_fn: str = "torchtune.data.padded_collate_sft"

    enable_activation_checkpointing: bool = False
    enable_activation_offloading: bool = False
    low_cpu_ram: bool = False
    cudnn_deterministic_mode: str | int | None = None
    fsdp_cpu_offload: bool = False
    fsdp_reshard_after_forward: bool = True
    custom_sharded_layers: list[str] | None = None
    fsdp: Entry | None = None  # In some stock configs; torchtune's recipe does not read it either.

    log_every_n_steps: Positive = 1
    log_peak_memory_stats: bool = False
    log_level: str = "INFO"
    resume_from_checkpoint: Literal[False] = False
    save_adapter_weights_only: bool | None = None

    # emarecipes' own.
    defenses: dict[str, Entry] | None = Field(default_factory=dict)
    adapter_dtype: Literal["fp32"] | None = None
    adapter_scaling: Literal["auto", "plain"] = "auto"
    init_adapter: Annotated[str, Field(min_length=1)] | None = None
    pad_to_multiple_of: Positive = 1
    group_by_length: bool = False
    reference_cache: Annotated[str, Field(min_length=1)] | None = None
    reference_cache_dtype: Literal["bf16", "fp32"] | None = None
    save_merged: bool | None = None
    merged_dtype: Literal["bf16", "fp32"] = "fp32"
    save_every_n_steps: Positive | None = None
    keep_last: Positive = 2
    resume: Annotated[str, Field(min_length=1)] | None = None
    skip_nonfinite: Annotated[int, Field(ge=0)] = 0
    probe: Entry | None = None
    provenance: Entry | None = None  # Written into a run's config.yaml; read back as it is.


_Kind = TypeVar("_Kind", bound=BaseModel)


def parse_settings(cfg: DictConfig, origin: Origin, kind: type[_Kind], within: str = "") -> _Kind:
    """Check the top level of a config against a recipe's settings and fill in defaults.

    A key that the recipe does not know is refused, unless another value refers to it as `${key}`.
    Such a variable is left out: its value is where it was referred to. So a written config, in
    which nothing refers to it any more, can be run again.

    Args:
        cfg: The config, or one of its entries.
        origin: Where it was written.
        kind: The settings.
        within: The entry's key; inside an entry no key is a variable.

    Raises:
        UserError: An unknown or missing key, a value of a wrong type or out of range.
    """
    plain: Any = OmegaConf.to_container(cfg)
    prefix = f"{within}." if within else ""
    if not within:
        plain = {
            k: v for k, v in plain.items() if k in kind.model_fields or k not in origin.variables
        }
    for key in plain:
        if key in kind.model_fields:
            continue
        hint = suggestion(key, kind.model_fields)
        allowed = (
            f"known are {', '.join(kind.model_fields)}"
            if within
            else f"a name of your own is allowed if another value refers to it as ${{{key}}}"
        )
        raise UserError(f"{origin.at(f'{prefix}{key}')}: unknown key{hint}; {allowed}")
    try:
        return kind.model_validate(plain)
    except ValidationError as error:
        raise UserError(_explain(error, origin, prefix)) from None


def check_settings(cfg: DictConfig, origin: Origin) -> DictConfig:
    """`parse_settings` for a training config, with the checks that concern several keys.

    Raises:
        UserError: See `parse_settings`; a loss or a way of saving that is not supported.
    """
    settings = parse_settings(cfg, origin, Settings)
    settings.defenses = settings.defenses or {}
    _check_defenses(settings.defenses, origin)
    if settings.group_by_length and not settings.shuffle:
        raise UserError(f"{origin.at('group_by_length')}: needs shuffle: true")
    loss = (settings.loss or {}).get("_component_", "CrossEntropyLoss")
    for key, value in (settings.loss or {}).items():
        if key not in _LOSS_KEYS or (_LOSS_KEYS[key] is not None and value != _LOSS_KEYS[key]):
            raise UserError(
                f"{origin.at(f'loss.{key}')}: has no effect here: the loss is the mean cross "
                "entropy of labelled tokens; leave the key out"
            )
    if str(loss).rpartition(".")[2] not in _LOSSES:
        raise UserError(
            f"{origin.at('loss')}: the loss head computes token cross entropy; {loss} is not "
            f"supported (leave the key out, or name {_LOSSES[0]})"
        )
    if settings.save_merged is None:
        # Stock configs ask for merged weights by not asking for the adapter alone.
        settings.save_merged = settings.save_adapter_weights_only is False
    elif settings.save_merged and settings.save_adapter_weights_only:
        raise UserError(
            f"{origin.at('save_merged')}: true contradicts save_adapter_weights_only: true"
        )
    return OmegaConf.create(settings.model_dump())


def _check_defenses(defenses: dict[str, Entry], origin: Origin) -> None:
    for name, entry in defenses.items():
        key = f"defenses.{name}"
        if not re.fullmatch(r"[A-Za-z]\w*", name):
            raise UserError(f"{origin.at(key)}: a defense's name is letters, digits and _")
        if "_component_" not in entry:
            raise UserError(f"{origin.at(key)}: a defense needs a _component_, its import path")
        if name in _LOGGED:
            raise UserError(
                f"{origin.at(key)}: the name {name} is taken by a figure in the log; choose another"
            )


# Keys whose own keys are names that the user chose.
_MAPPINGS = ("defenses", "adapters", "answers", "probes", "suites")

_LOGGED = frozenset(
    {
        "step",
        "tokens",
        "epoch",
        "loss",
        "ce",
        "ce_task",
        "ce_safe",
        "lr",
        "grad_norm",
        "tokens_per_second",
        "padding_share",
        "skipped",
    }
)


def _explain(error: ValidationError, origin: Origin, prefix: str) -> str:
    first = error.errors()[0]
    key = f"{prefix}{first['loc'][0]}"
    if first["loc"][0] in _MAPPINGS and len(first["loc"]) > 1:
        key = f"{key}.{first['loc'][1]}"
    value = first["input"]
    if first["type"] == "missing":
        return f"{origin.at(key)}: the config needs this key"
    if key == "resume_from_checkpoint":
        return f"{origin.at(key)}: say `resume: auto` instead, and leave this at false"
    if key == "resume":
        return f"{origin.at(key)}: auto, or the path of a checkpoint, not {value!r}"
    if key == "dtype" and value in ("fp16", "float16"):
        return (
            f"{origin.at(key)}: fp16 is not supported (its gradients underflow); use auto, bf16 "
            "or fp32"
        )
    reason = first["msg"][0].lower() + first["msg"][1:]
    return f"{origin.at(key)}: {reason}, not {value!r}"
