"""The plain values of a training config, with their types and defaults.

Component entries (`model`, `dataset`, ...) are checked by `emarecipes.components`.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from omegaconf import DictConfig, OmegaConf
from pydantic import Field

from emarecipes.config import Origin
from emarecipes.errors import UserError
from emarecipes.settings import Entry, Keys, ModelSettings, Positive, Seed, parse_settings

_LOSSES = ("CEWithChunkedOutputLoss", "CrossEntropyLoss", "LinearCrossEntropyLoss")


# What these may say without changing the loss; None: any value.
_LOSS_KEYS = {
    "_component_": None,
    "num_output_chunks": None,
    "reduction": "mean",
    "ignore_index": -100,
}


class ProbeSettings(Keys):
    """The entry `probe` of a training config: likelihood probes while the adapter is trained."""

    suites: Annotated[dict[str, Entry], Field(min_length=1)]
    """By name, as `probes` of `ema_eval` has them."""
    every_n_steps: Positive = 50
    """Also after the last step."""
    max_rows: Positive | None = 32
    """Questions a suite, evenly over its file; null: all."""
    batch_size: Positive = 8
    """Answers at a time."""
    stop: Entry | None = None
    """When the probes end the run (docs/probe_stop.md); null: never."""


class ProbeStopSettings(Keys):
    """The entry `stop` of `probe`: when the probes end the run."""

    rise: Annotated[float, Field(gt=0)]
    """The general suite's mean probe shift is at least this, in nats a token."""
    converged: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """The in-domain suite's mean probe shift, above 0, gained at most this share of itself since
    the probe before."""
    general: str = "general"
    """The general suite's name."""
    in_domain: str = "in_domain"
    """The in-domain suite's name."""


class Settings(ModelSettings):
    """What `recipes/ema_lora.py` reads at the top level of its config.

    All but the last group are torchtune's own keys, with their meaning there.
    """

    seed: Seed | None = None
    """Fixes the adapter's first values and the order of rows, whatever the number of processes;
    null draws one and writes it down."""
    dataset: Entry | list[Entry]
    """Component; several are put one behind the other."""
    optimizer: Entry
    """Component, over the adapter's parameters."""
    lr_scheduler: Entry | None = None
    """Component, stepped once an optimizer step."""
    loss: Entry | None = None
    """torchtune's cross-entropy losses are accepted and mean the same here: the loss head computes
    it without a (tokens x vocabulary) tensor."""
    metric_logger: Entry | None = None
    """Component: TensorBoard, W&B, disk."""
    profiler: Entry | None = None
    """Component: torchtune's profiler."""

    shuffle: bool = True
    """A new order of rows in every epoch."""
    batch_size: Positive = 1
    """Rows at a time. A step sees batch_size x gradient_accumulation_steps x processes rows; what
    is left after the last whole step of an epoch is dropped."""
    epochs: Positive = 1
    """The adapter is saved after every epoch."""
    max_steps_per_epoch: Positive | None = None
    """null: all."""
    gradient_accumulation_steps: Positive = 1
    """Micro-batches of an optimizer step."""
    clip_grad_norm: Annotated[float, Field(gt=0)] | Literal["inf"] | None = None
    """Largest norm of the gradient; `inf` only logs the norm."""
    compile: bool = False
    """Compiles the layers, and what the loss head does with a chunk's logits: a step with KL in 3.4
    s for 3.8 s (SmolLM2, two cores, 4 x 256 tokens; the chunk alone gains next to nothing).
    Start-up takes some 20 s longer, again for new lengths, and on a CPU it needs a C++ compiler."""
    collate_fn: str = "torchtune.data.padded_collate_sft"
    """Makes rows a batch."""

    enable_activation_checkpointing: bool = False
    """Compute activations again in the backward: less memory, more time."""
    enable_activation_offloading: bool = False
    """Hold activations in the host's memory; CUDA."""
    low_cpu_ram: bool = False
    """As in torchtune."""
    cudnn_deterministic_mode: str | int | None = None
    """As in torchtune."""
    fsdp_cpu_offload: bool = False
    """Several devices: parameters in the host's memory; CUDA alone."""
    fsdp_reshard_after_forward: bool = True
    """Several devices: free a layer's whole weights after its forward."""
    custom_sharded_layers: list[str] | None = None
    """Several devices: layers that are sharded apart. The output layer can be only without LoRA on
    it; nothing can where it is tied to the embedding."""
    fsdp: Entry | None = None
    """In some stock configs. Accepted, not read (nor by torchtune's recipe)."""

    log_every_n_steps: Positive = 1
    """Steps between lines of the log; an epoch's last step and a probed one have a line, too."""
    log_peak_memory_stats: bool = False
    """CUDA only."""
    log_level: str = "INFO"
    """Accepted, not read."""
    resume_from_checkpoint: Literal[False] = False
    """Use `resume`."""
    save_adapter_weights_only: bool | None = None
    """A stock config's false asks for `save_merged`."""

    # emarecipes' own.
    defenses: dict[str, Entry] | None = Field(default_factory=dict)
    """By name, which is the key in logs and overrides: components (docs/composing.md)."""
    adapter_dtype: Literal["fp32"] | None = None
    """Null: as the base. `fp32` in the shipped configs (docs/configs.md#the-adapters-precision)."""
    adapter_scaling: Literal["auto", "plain"] = "auto"
    """`plain`: one `lora_alpha` and no rank-stabilised form in the saved adapter
    (docs/configs.md#the-saved-adapter)."""
    init_adapter: Annotated[str, Field(min_length=1)] | None = None
    """Folder of a trained adapter (PEFT's form, as `adapter/`) that the run goes on from
    (docs/resume.md#going-on-from-a-trained-adapter)."""
    freeze_after: Positive | None = None
    """Train the adapter of the first so many layers; those behind keep what they began with
    (docs/block.md#freezing-the-layers-behind). Null: all."""
    pad_to_multiple_of: Positive = 1
    """Sequence lengths are rounded up to a multiple; on a CPU every new length costs seconds."""
    group_by_length: bool = False
    """Steps of rows of similar length (docs/configs.md#rows-of-similar-length)."""
    reference_cache: Annotated[str, Field(min_length=1)] | None = None
    """Folder where the reference's states are kept over epochs and runs, made if it is not there;
    several runs may share it (docs/cache.md)."""
    reference_cache_dtype: Literal["bf16", "fp32"] | None = None
    """Null: that of training. `bf16` under `dtype: fp32` halves the size and rounds."""
    save_merged: bool | None = None
    """After the last epoch also write `merged/`, a model folder for transformers; null: false,
    unless `save_adapter_weights_only: false` asks for it."""
    merged_dtype: Literal["bf16", "fp32"] = "fp32"
    """`bf16` halves the size and loses small updates; the log says how much."""
    save_every_n_steps: Positive | None = None
    """Write a checkpoint (docs/resume.md). A signal writes one in any case."""
    keep_last: Positive = 2
    """How many checkpoints are kept."""
    resume: Annotated[str, Field(min_length=1)] | None = None
    """`auto`: go on from the newest whole checkpoint, or start; or the path of one."""
    skip_nonfinite: Annotated[int, Field(ge=0)] = 0
    """How many steps with a loss or gradient that is not finite are left out, in all, before the
    run stops."""
    probe: Entry | None = None
    """Likelihood probes during training (docs/evaluate.md#probes-during-training)."""
    provenance: Entry | None = None
    """Written into a run's `config.yaml` (versions, commit, fingerprints); not read."""


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
        "update",  # Figures of the adapter begin with it.
        "update_stable_rank",
        "update_entropy",
    }
)
