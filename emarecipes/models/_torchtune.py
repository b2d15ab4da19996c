"""What is read and exchanged of torchtune's private parts, beside the other `_torchtune_*`.

torchtune 0.6.1 is its last release; what is worked around here will not change under us.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from omegaconf import DictConfig
from safetensors import safe_open
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torchtune import training
from torchtune.config import instantiate
from torchtune.datasets import _sft, _text_completion
from torchtune.models.gemma2._component_builders import Gemma2FinalNorm
from torchtune.modules import TransformerDecoder
from torchtune.modules.common_utils import NF4Tensor  # torchao has moved it
from torchtune.modules.peft import disable_adapter, get_adapter_params, set_trainable_params
from torchtune.training.checkpointing import _checkpointer

from emarecipes.components import build
from emarecipes.config import Origin
from emarecipes.errors import UserError, reason
from emarecipes.machine import DTYPES
from emarecipes.models._adapter_dtype import hold_adapter_in
from emarecipes.models._undrawn import Undrawn
from emarecipes.models.families.checkpoint import FolderCheckpointer
from emarecipes.models.families.names import CONFIG_JSON
from emarecipes.weights_folder import check_stored_dtype

# Nothing that a user could do about: torchtune's norm computes in float32 with scales in bf16, as
# meant; and FSDP2's random start of an adapter, which is replaced by one that the seed alone sets.
warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
warnings.filterwarnings("ignore", message="DTensor random operators may not have complete support")

# Elements whose scales torchao quantizes together: a tensor or shard must hold whole ones.
NF4_BLOCK = 64 * 256


def final_norm_and_cap(model: Any) -> tuple[nn.Module, float | None]:
    """A decoder's last norm, and the soft cap on its logits if it has one.

    torchtune's Gemma-2 puts the cap into the last norm, before the output layer; the model was
    trained with `cap * tanh(logits / cap)` after it.
    """
    if isinstance(model.norm, Gemma2FinalNorm):
        return model.norm.rms_norm, float(model.norm.capping_value)
    return model.norm, getattr(model, "logit_cap", None)


@contextmanager
def unsharded(output: Any) -> Iterator[None]:
    """Holds a separately sharded output layer (`custom_sharded_layers`) whole."""
    if not isinstance(output, FSDPModule):
        yield
        return
    output.unshard()
    try:
        yield
    finally:
        output.reshard()


def root_is_frozen(model: nn.Module) -> bool:
    """Whether nothing outside the layers is trained: embedding, final norm, output layer."""
    rest = (p for name, p in model.named_parameters() if not name.startswith("layers."))
    return not any(p.requires_grad for p in rest)


def gather_root_in_forward_alone(model: nn.Module) -> None:
    """Spares FSDP2's second gather of what is outside the layers, where that is frozen.

    The backward does not read it, as the loss head takes its gradients in the forward. What is
    trained there is gathered as ever: a model of a user's own may have a backward that reads it.
    """
    if isinstance(model, FSDPModule) and root_is_frozen(model):
        model.set_unshard_in_backward(False)


def is_nf4(parameter: torch.Tensor) -> bool:
    """Whether a frozen weight is held in 4 bits (QLoRA)."""
    return isinstance(parameter.data, NF4Tensor) or isinstance(parameter, NF4Tensor)


def model_on_meta(cfg: DictConfig, origin: Origin) -> Any:
    """`cfg.model` without weights, adapters marked as trainable.

    Raises:
        UserError: The builder refuses its arguments.
    """
    # There is nothing to draw numbers for; to be asked takes three quarters of the time.
    with Undrawn(), training.set_default_dtype(DTYPES[cfg.dtype]), torch.device("meta"):
        model = build(cfg, "model", origin)
    if not isinstance(model, TransformerDecoder):
        raise UserError(f"{origin.at('model')}: not a text decoder: {type(model).__name__}")
    adapters = get_adapter_params(model)
    if not adapters:
        raise UserError(
            f"{origin.at('model')}: the model has no LoRA modules; name a lora_ builder and "
            "lora_attn_modules"
        )
    set_trainable_params(model, adapters)
    hold_adapter_in(model, DTYPES.get(cfg.get("adapter_dtype")))
    return model


@contextmanager
def as_reference(model: Any, depth: int) -> Iterator[None]:
    """A decoder without its adapter and dropout, whose forward ends after `depth` layers."""
    was_training, layers, read = model.training, model.layers, model.output_hidden_states
    model.eval()
    try:
        with disable_adapter(model):
            try:
                if depth < len(layers):
                    model.layers = layers[:depth]
                    model.output_hidden_states = [i for i in read if i < depth]
                yield
            finally:  # Before adapters are switched on again: that is done by the model's modules.
                model.layers, model.output_hidden_states = layers, read
    finally:
        model.train(was_training)


def checkpoint_shapes(cfg: DictConfig, where: str) -> dict[str, tuple[int, ...]]:
    """Shapes of the base weights that `cfg.checkpointer` would load, in torchtune's names.

    The checkpointer's own conversion runs on tensors without storage, read from the files' headers.

    Raises:
        UserError: Files cannot be read, or are not of the family that `model_type` names.
    """
    if str(cfg.checkpointer.get("model_type")) == CONFIG_JSON:
        try:
            return FolderCheckpointer(str(cfg.checkpointer.checkpoint_dir)).shapes()
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
    stock_load = _checkpointer.safe_torch_load
    _checkpointer.safe_torch_load = _load_on_meta
    try:
        with tempfile.TemporaryDirectory() as scratch, _quiet_logging():
            checkpointer = instantiate(cfg.checkpointer, output_dir=scratch)
            state = checkpointer.load_checkpoint()[training.MODEL_KEY]
    except KeyError as error:
        raise UserError(f"{where}: unknown model_type or missing key: {error}") from None
    except Exception as error:
        raise UserError(
            f"{where}: the checkpoint does not fit model_type: {reason(error)}"
        ) from None
    finally:
        _checkpointer.safe_torch_load = stock_load
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _load_on_meta(path: Any, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
    if str(path).endswith(".safetensors"):
        found = {}
        with safe_open(path, framework="pt") as file:
            for key in file.offset_keys():
                part = file.get_slice(key)
                check_stored_dtype(Path(path), key, part.get_dtype())
                found[key] = torch.empty(part.get_shape(), device="meta")
        return found
    state: dict[str, torch.Tensor] = torch.load(
        str(path), map_location="meta", mmap=True, weights_only=True
    )
    return state


@contextmanager
def _quiet_logging() -> Iterator[None]:
    logging.disable(logging.INFO)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


@contextmanager
def data_sets_read_with(
    load_dataset: Callable[..., Any], transform: type, texts: type
) -> Iterator[None]:
    """While torchtune's data sets are built: three parts in place of theirs.

    Args:
        load_dataset: Gives them their rows, instead of `datasets`.
        transform: A subclass of `SFTTransform`.
        texts: A subclass of `TextCompletionDataset`.
    """
    stock = _sft.load_dataset, _sft.SFTTransform
    stock_texts = _text_completion.TextCompletionDataset
    _text_completion.load_dataset, _text_completion.TextCompletionDataset = load_dataset, texts
    _sft.load_dataset, _sft.SFTTransform = load_dataset, transform
    try:
        yield
    finally:
        _text_completion.load_dataset = stock[0]
        _text_completion.TextCompletionDataset = stock_texts
        _sft.load_dataset, _sft.SFTTransform = stock


def adapter_state(model: Any, device: torch.device) -> dict[str, torch.Tensor]:
    """The adapter's tensors on the CPU, whole, in torchtune's names. Every process must call it."""
    return {
        plain_name(name): whole_on_cpu(parameter.detach(), device)
        for name, parameter in get_adapter_params(model).items()
    }


def whole_on_cpu(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor, sharded or not, whole and on the CPU. Every process must call it."""
    if isinstance(tensor, DTensor):
        # Offloaded shards are gathered on the device.
        tensor = cast(DTensor, tensor.to(device)).full_tensor()
    return tensor.cpu()


def plain_name(name: str) -> str:
    """A parameter's name without what activation checkpointing puts into it."""
    return name.replace("_checkpoint_wrapped_module.", "")


@torch.no_grad()
def assign_whole(parameter: torch.Tensor, value: torch.Tensor | None) -> None:
    """Set a parameter, sharded or not, to a whole tensor that the first process holds.

    Every process must call it; `value` may be None on all but the first.
    """
    if not isinstance(parameter, DTensor):
        assert value is not None
        parameter.copy_(value)
        return
    mesh = parameter.device_mesh
    if value is None:
        value = torch.empty(parameter.shape, dtype=parameter.dtype)
    sharded = distribute_tensor(
        value.to(mesh.device_type, parameter.dtype), mesh, parameter.placements
    )
    parameter.to_local().copy_(sharded.to_local())


def assign_base_weights(model: Any, state: dict[str, torch.Tensor]) -> None:
    """Set all weights but the adapter's from whole tensors, which only the first process needs."""
    for name, parameter in model.named_parameters():
        if "lora" not in name and "magnitude" not in name:
            assign_whole(parameter, state.get(plain_name(name)))


def full_state(model: Any, device: torch.device, *, first_process: bool) -> dict[str, torch.Tensor]:
    """All weights on the CPU, whole and dequantized; empty on every process but the first."""
    if training.is_distributed():
        state: dict[str, torch.Tensor] = training.gather_cpu_state_dict(
            model, first_process, device=device
        )
        return state
    return {name: tensor.cpu() for name, tensor in model.state_dict().items()}


def build_rope_on_meta(model: Any) -> None:
    """Give rotary embeddings on the meta device the table that torchtune leaves out there."""
    for module in model.modules():
        if getattr(module, "is_cache_built", True) is False:
            shape = (module.max_seq_len, module.dim // 2, 2)
            cache = torch.empty(shape, dtype=torch.float32, device="meta")
            module.register_buffer("cache", cache, persistent=False)
            module.is_cache_built = True
