"""Peak memory and operations of a training step, from the config and the meta device.

Shapes: B rows of S tokens in a micro-batch, T of them in the loss head, D width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from emarecipes.components import build
from emarecipes.config import Origin
from emarecipes.defenses import AdapterEMA, AsFT, Defense, ModelSource, SafeLoRA
from emarecipes.errors import UserError
from emarecipes.machine import DTYPES
from emarecipes.models._torchtune import build_rope_on_meta, is_nf4, model_on_meta, root_is_frozen
from emarecipes.models.loss_head import LossHead, cross_entropy, term_values
from emarecipes.models.loss_terms import LogitTerm
from emarecipes.plan.trace import Trace, trace
from emarecipes.training.frozen_layers import adapter_behind, check_freeze
from emarecipes.training.logit_terms import values_of
from emarecipes.training.muon import check_muon, is_muon
from emarecipes.training.reference_cache import reference_depth, reference_layers

# NF4: half a byte a weight, a byte for 64 of them, four bytes for 64 x 256.
_NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
# Layers whose weights FSDP2 holds whole at once: the one that computes, and the next.
_LAYERS_IN_FLIGHT = 2


@dataclass(frozen=True)
class Load:
    """What a device is given.

    Attributes:
        gpus: Devices that share the weights (FSDP2).
        row_tokens: S.
        labelled: The share of tokens that are trained, where terms with `tokens: response` act.
    """

    gpus: int
    row_tokens: int
    labelled: float = 1.0


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes a device holds at the peak, by what holds them; operations a step on all devices.

    Where the reference is run in some steps only (`every_n_batches`) the operations are the mean
    over steps; the peak is that of a step with all terms.
    """

    parts: dict[str, float]
    flops: float
    tokens: int

    @property
    def peak(self) -> float:
        """Bytes at the peak."""
        return sum(self.parts.values())


def estimate(cfg: DictConfig, origin: Origin, load: Load) -> MemoryEstimate:
    """Predict a step of a checked config.

    The peak is the largest of three moments: the loss head; the first layer of the backward, when
    the activations of all are still there; SafeLoRA's projection. What Python, CUDA's context and
    an allocator's gaps take comes on top.

    Raises:
        UserError: The model or a defense cannot be built, the model takes no such rows, or it has
            not what `freeze_after` or the optimizer needs.
    """
    model = model_on_meta(cfg, origin)
    if load.row_tokens > model.max_seq_len:
        raise UserError(
            f"{origin.at('model')}: rows of {load.row_tokens} tokens, and the model takes "
            f"{model.max_seq_len}; lower --row-tokens, or tokenizer.max_seq_len"
        )
    check_freeze(cfg, origin, model)
    if is_muon(cfg):
        check_muon(cfg, origin, model, load.gpus)
    build_rope_on_meta(model)
    defenses = _defenses(cfg, origin, model)
    dtype = DTYPES[cfg.dtype]
    averages = sum(isinstance(d, AdapterEMA) for d in defenses.values())
    fixed = _fixed(cfg, origin, model, load, averages)
    shapes = _adapted_shapes(model)
    apart = {n if key == "own" else key for n, d in defenses.items() for key in d.apart}
    fixed["gradients"] *= 1 + len(apart)
    projecting = [d for d in defenses.values() if isinstance(d, SafeLoRA)]
    fixed["SafeLoRA bases"] = float(sum(d.kept_bytes(shapes) for d in projecting))
    holding = [d for d in defenses.values() if isinstance(d, AsFT)]
    differences = sum(d.kept_bytes(shapes, dtype.itemsize) for d in holding)
    fixed["AsFT differences"] = float(differences)
    rows, width = cfg.batch_size, model.tok_embeddings.embedding_dim
    stream = rows * load.row_tokens * width * dtype.itemsize
    selected = _positions(cfg, defenses.values(), "logit_term", load)
    states = selected * width * dtype.itemsize

    hidden = torch.empty(rows, load.row_tokens, width, dtype=dtype, device="meta")
    layer = trace(lambda: model.layers[len(model.layers) // 2](hidden.requires_grad_()))
    head = _HeadTrace(cfg, model, defenses, load, dtype)
    reads = reference_layers(defenses.values())
    uses_reference = any(d.needs_reference for d in defenses.values())
    share = _share_of_steps(defenses.values())
    reference = uses_reference * states + len(reads) * stream
    compared = _positions(cfg, defenses.values(), "hidden_term", load)
    distances = len(reads) * compared * width * 4  # A difference in float32 for each layer.

    recomputed = layer.kept if cfg.enable_activation_checkpointing else 0
    each = stream if cfg.enable_activation_checkpointing else layer.kept
    activations = stream + len(model.layers) * each
    root, layers = _in_flight(cfg, model, load)
    in_head = {
        "weights in flight": root + layers,
        "activations": activations,
        "loss head": head.kept + head.peak,
    }
    if cfg.fsdp_reshard_after_forward and root_is_frozen(model):
        root = 0.0
    in_backward = {
        "weights in flight": root + layers,
        "activations": activations + recomputed + layer.backward_peak - layer.kept,
        "loss head": head.kept + states + distances,
    }
    peak = max(in_head, in_backward, key=lambda parts: sum(parts.values()))
    parts = fixed | {"reference": float(reference)} | peak
    # Two weights and their difference in float32.
    after = fixed | {"SafeLoRA": 3.0 * 4 * max(map(math.prod, shapes), default=0)}
    if projecting and sum(after.values()) > sum(parts.values()):
        parts = after
    share *= reference_depth(defenses.values(), len(model.layers)) / len(model.layers)
    flops = _flops(cfg, len(model.layers), layer, head, share)
    micro_batches = cfg.gradient_accumulation_steps * load.gpus
    return MemoryEstimate(parts, flops * micro_batches, rows * load.row_tokens * micro_batches)


def _defenses(cfg: DictConfig, origin: Origin, model: Any) -> dict[str, Defense]:
    defenses: dict[str, Defense] = {
        name: build(cfg, f"defenses.{name}", origin) for name in cfg.defenses
    }
    folder = Path(str(cfg.checkpointer.get("checkpoint_dir")))
    source = ModelSource(model, folder, str(cfg.checkpointer.get("model_type")))
    for defense in defenses.values():
        if defense.has("hidden_term"):  # Its layers; the files of others need not be there yet.
            defense.check(source)
    return defenses


def _fixed(
    cfg: DictConfig, origin: Origin, model: Any, load: Load, averages: int
) -> dict[str, float]:
    """What is there from the first step's end on."""
    frozen = sum(_num_bytes(p) for p in model.parameters() if not p.requires_grad)
    buffers = sum({b.data_ptr() or id(b): b.nbytes for b in model.buffers()}.values())
    trained = [p for p in model.parameters() if p.requires_grad]
    adapter = sum(p.nbytes for p in trained)
    numbers = sum(p.numel() for p in trained)
    still = adapter_behind(model, cfg.freeze_after) if cfg.freeze_after else []
    gradients = adapter - sum(p.nbytes for p in still)
    state = (numbers - sum(p.numel() for p in still)) * _optimizer_bytes(cfg, origin)
    parts = {"weights": frozen, "adapter": adapter, "gradients": gradients, "optimizer": state}
    parts["adapter averages"] = 4.0 * averages * numbers
    parts = {name: size / load.gpus for name, size in parts.items()}
    parts["weights"] += buffers
    if load.gpus > 1 and cfg.fsdp_cpu_offload:
        parts = {name: 0.0 for name in parts}
    return parts


def _in_flight(cfg: DictConfig, model: Any, load: Load) -> tuple[float, float]:
    """Bytes that FSDP2 holds whole: of the root (embedding, output layer), and of layers."""
    if load.gpus == 1:
        return 0.0, 0.0
    layers = [float(sum(map(_num_bytes, layer.parameters()))) for layer in model.layers]
    root = sum(map(_num_bytes, model.parameters())) - sum(layers)
    if cfg.fsdp_reshard_after_forward:
        return root, _LAYERS_IN_FLIGHT * max(layers)
    return root, sum(layers)


def _num_bytes(parameter: nn.Parameter) -> float:
    return parameter.numel() * _NF4_BYTES if is_nf4(parameter) else parameter.nbytes


def _optimizer_bytes(cfg: DictConfig, origin: Origin) -> float:
    """Bytes of state a trained number, found by a step on a few of them."""
    weight = nn.Parameter(torch.zeros(64, 64, dtype=DTYPES[cfg.adapter_dtype or cfg.dtype]))
    weight.grad = torch.ones_like(weight)
    optimizer = build(cfg, "optimizer", origin, [weight])
    optimizer.step()
    state = optimizer.state[weight].values()
    return sum(t.nbytes for t in state if isinstance(t, Tensor)) / weight.numel()


def _positions(cfg: DictConfig, defenses: Iterable[Defense], method: str, load: Load) -> int:
    """In how many positions of a micro-batch the terms of this kind act."""
    share = max([load.labelled, *(_share_of_tokens(d, load) for d in defenses if d.has(method))])
    positions: int = max(1, round(cfg.batch_size * load.row_tokens * share))
    return positions


def _share_of_tokens(defense: Defense, load: Load) -> float:
    return 1.0 if defense.tokens == "all" else load.labelled


class _HeadTrace:
    """One chunk of the loss head.

    Attributes:
        kept: Bytes from the head to the backward: selected states and their gradient.
        peak: Bytes of a chunk at its peak.
        flops: Operations of all chunks, the reference's logits as often as a term reads them.
    """

    def __init__(
        self,
        cfg: DictConfig,
        model: Any,
        defenses: Mapping[str, Defense],
        load: Load,
        dtype: torch.dtype,
    ) -> None:
        head = LossHead(model)
        width = model.tok_embeddings.embedding_dim
        selected = _positions(cfg, defenses.values(), "logit_term", load)
        size = min(selected, head.chunk_size(torch.device(cfg.device or "cuda")))
        states_CD = torch.empty(size, width, dtype=dtype, device="meta")
        targets_C = torch.zeros(size, dtype=torch.long, device="meta")
        on_logits = [d for d in defenses.values() if d.has("logit_term") or d.is_objective]
        read = any(d.needs_reference for d in on_logits)
        shares = [load.labelled, *(_share_of_tokens(d, load) for d in on_logits)]
        rows = [self._rows(size, share / max(shares)) for share in shares]
        terms: list[tuple[LogitTerm, bool, bool, Tensor | None]]
        terms = [(cross_entropy, False, False, rows[0])]
        terms += [
            (values_of(d), d.needs_reference, d.reads_reference_at_targets, r)
            for d, r in zip(on_logits, rows[1:], strict=True)
        ]

        def loss() -> Tensor:
            values = term_values(
                head.policy_logits(states_CD.requires_grad_()),
                head.reference_logits(states_CD) if read else None,
                targets_C,
                terms,
                targets_C,
            )
            return torch.stack([v.sum() for v in values]).sum()

        chunk = trace(loss)
        self.kept = 2 * selected * width * dtype.itemsize
        self.peak = max(chunk.forward_peak, chunk.backward_peak)
        reference = trace(lambda: head.logits(states_CD)).forward_flops if read else 0
        absent = (1.0 - _share_of_steps(on_logits)) * reference
        self.flops = (chunk.forward_flops + chunk.backward_flops - absent) * selected / size

    @staticmethod
    def _rows(size: int, share: float) -> Tensor | None:
        """Those of a chunk that a term acts on, None for all: of others it takes a copy."""
        if share == 1.0:
            return None
        return torch.empty(max(1, round(size * share)), dtype=torch.long, device="meta")


def _share_of_steps(defenses: Iterable[Defense]) -> float:
    """The share of steps in which one of these terms reads the reference.

    Terms with the same k are in the same steps, one in k; others are drawn independently.
    """
    every = {defense.every_n_batches for defense in defenses if defense.needs_reference}
    return 1.0 - math.prod(1.0 - 1.0 / k for k in every)


def _flops(cfg: DictConfig, depth: int, layer: Trace, head: _HeadTrace, share: float) -> float:
    forwards = 1.0 + bool(cfg.enable_activation_checkpointing)
    if cfg.reference_cache is None:
        forwards += share
    layers = depth * (forwards * layer.forward_flops + layer.backward_flops)
    return layers + head.flops


def _adapted_shapes(model: Any) -> list[tuple[int, int]]:
    """Rows and columns of the weights that LoRA is on, the output layer's included."""
    adapted = [module for module in model.modules() if hasattr(module, "lora_a")]
    return [(module.lora_b.out_features, module.lora_a.in_features) for module in adapted]
