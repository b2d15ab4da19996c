"""What a run trains with: model, optimizer, loss and gradients, each built once.

Building and sharding the model, the optimizer and the profiler are torchtune's own methods, behind
`StockRecipe`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torchtune.config import instantiate

from emarecipes.defenses import TrainingContext
from emarecipes.machine import DTYPES, keep_compiled_apart
from emarecipes.models._adapter_dtype import hold_adapter_in
from emarecipes.models._torchtune import gather_root_in_forward_alone
from emarecipes.models._torchtune_convert import fix_dora_bias
from emarecipes.models._torchtune_cpu import with_fewer_passes
from emarecipes.models._torchtune_recipe import StockRecipe
from emarecipes.training.checked import CheckedRun
from emarecipes.training.frozen_layers import freeze_after
from emarecipes.training.gradients import Gradients
from emarecipes.training.initialize import initialize_adapter
from emarecipes.training.muon import build_muon, is_muon
from emarecipes.training.pages import keep_freed_pages
from emarecipes.training.step import TrainingLoss


class BuiltTraining:
    """Loads the model and builds what trains it; the defenses are set up on it.

    Args:
        run: A run that passed all checks.
        stock: torchtune's recipe of its config.
        total_steps: Of the run, for the schedule and the defenses.
        world_size: Number of processes.
        first_process: Whether this is the first of them.

    Attributes:
        model: torchtune's decoder with LoRA, the adapter initialised.
        optimizer: Over the adapter.
        scheduler: Of its rate; None: the rate stays.
        profiler: torchtune's.
        loss: Cross entropy, or what takes its place, and the defenses' terms.
        gradients: Of that loss.
    """

    def __init__(
        self,
        run: CheckedRun,
        stock: StockRecipe,
        total_steps: int,
        world_size: int,
        *,
        first_process: bool,
    ) -> None:
        cfg, device = run.cfg, stock.device
        if device.type == "cpu":
            keep_freed_pages()
        self.model = _build_model(cfg, stock)
        scale = float(cfg.model.lora_alpha) / float(cfg.model.lora_rank)
        initialize_adapter(self.model, stock.seed, run.initial_adapter, scale)
        if cfg.freeze_after is not None:
            freeze_after(self.model, cfg.freeze_after, first_process=first_process)
        muon = is_muon(cfg)
        self.optimizer = build_muon(cfg, self.model) if muon else stock.build_optimizer()
        self.scheduler: Any = None
        if cfg.lr_scheduler is not None:
            self.scheduler = instantiate(
                cfg.lr_scheduler, self.optimizer, num_training_steps=total_steps, last_epoch=-1
            )
        self.profiler = stock.build_profiler()
        if cfg.compile:
            keep_compiled_apart()
        self.loss = TrainingLoss(
            self.model,
            run.defenses,
            safe_ce_weight=run.rows.safe_ce_weight,
            forward_context=stock.activations,
            reference_cache=run.reference_cache,
            seed=stock.seed,
            compiled=cfg.compile,
        )
        gather_root_in_forward_alone(self.model)
        self.gradients = Gradients(self.model, self.loss, world_size, device)
        output_dir = Path(cfg.output_dir)
        context = TrainingContext(
            device, stock.dtype, total_steps, output_dir, run.source, first_process=first_process
        )
        for defense in run.defenses.values():
            defense.setup(self.model, context)


def _build_model(cfg: Any, stock: StockRecipe) -> Any:
    model = stock.build_model()
    fix_dora_bias(model)
    hold_adapter_in(model, DTYPES.get(cfg.adapter_dtype))
    # Compiled layers fuse by themselves; in bf16 other sums would be rounded.
    plain = stock.dtype == torch.float32 and not cfg.compile
    if stock.device.type == "cpu" and plain:
        with_fewer_passes(model)
    return model
