"""torchtune's LoRA recipe with defenses: one loop for one device and for several.

Read `LoRATraining` top to bottom: build, train, save. Building and sharding the model, the
optimizer, the scheduler and the profiler are torchtune's own methods.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torchtune
from torch import Tensor
from torch.distributed.tensor import DTensor
from torchtune import training, utils
from torchtune.config import instantiate
from tqdm import tqdm

from emarecipes._torchtune import adapter_state, stock_recipe
from emarecipes._torchtune_convert import fix_dora_bias, fix_loaded_state
from emarecipes.datasets.rows import micro_batch_rows
from emarecipes.defenses import TrainingContext
from emarecipes.errors import UserError
from emarecipes.training.batch import Batch, make_batch
from emarecipes.training.checks import CheckedRun
from emarecipes.training.initialize import initialize_adapter
from emarecipes.training.run_folder import RunFolder
from emarecipes.training.step import TrainingLoss
from emarecipes.training.summary import print_summary
from emarecipes.training.weights import save_weights

log = utils.get_logger("INFO")


class LoRATraining:
    """What emarecipes adds to a torchtune LoRA recipe class. Use `recipe_class`."""

    # Set by torchtune's recipe.
    _model: Any
    _optimizer: torch.optim.Optimizer
    _device: torch.device
    _dtype: torch.dtype
    activations_handling_ctx: Any
    seed: int

    def __init__(self, run: CheckedRun) -> None:
        super().__init__(run.cfg)  # type: ignore[call-arg]
        self.run = run
        self.cfg = run.cfg
        self.world_size, self.rank = utils.get_world_size_and_rank()
        # torchtune draws a seed, the same on every process, where the config has none.
        self.cfg.seed = self.seed
        per_step = self.cfg.batch_size * self.cfg.gradient_accumulation_steps * self.world_size
        steps = run.rows.num_steps(per_step)
        self.steps_per_epoch = min(steps, self.cfg.max_steps_per_epoch or steps)
        self.total_steps = self.steps_per_epoch * self.cfg.epochs

    # --- build ---------------------------------------------------------------------------------

    def setup(self) -> None:
        """Load the model and build what trains it."""
        self._model = self._build_model()
        initialize_adapter(self._model, self.seed)
        self._optimizer = self._setup_optimizer(self.cfg.optimizer)  # type: ignore[attr-defined]
        self._scheduler = (
            None
            if self.cfg.lr_scheduler is None
            else instantiate(
                self.cfg.lr_scheduler,
                self._optimizer,
                num_training_steps=self.total_steps,
                last_epoch=-1,
            )
        )
        self._profiler = self._setup_profiler(self.cfg.profiler)  # type: ignore[attr-defined]
        self.loss = TrainingLoss(
            self._model,
            self.run.defenses,
            safe_ce_weight=self.run.rows.safe_ce_weight,
            forward_context=self.activations_handling_ctx,
            reference_cache=self.run.reference_cache,
        )
        context = TrainingContext(
            self._device,
            self._dtype,
            self.total_steps,
            Path(self.cfg.output_dir),
            self.run.source,
            first_process=self.rank == 0,
        )
        for defense in self.run.defenses.values():
            defense.setup(self._model, context)

    def _build_model(self) -> Any:
        cfg = self.cfg
        checkpoint = self.load_checkpoint(cfg.checkpointer)  # type: ignore[attr-defined]
        arguments: dict[str, Any] = {
            "cfg_model": cfg.model,
            "enable_activation_checkpointing": cfg.enable_activation_checkpointing,
            "enable_activation_offloading": cfg.enable_activation_offloading,
            "base_model_state_dict": fix_loaded_state(
                checkpoint[training.MODEL_KEY], str(cfg.checkpointer.model_type)
            ),
        }
        if training.is_distributed():
            self._compile = cfg.compile
            arguments |= {
                "custom_sharded_layers": cfg.custom_sharded_layers,
                "fsdp_cpu_offload": cfg.fsdp_cpu_offload,
                "reshard_after_forward": cfg.fsdp_reshard_after_forward,
            }
        else:
            torchtune.modules.common_utils._use_low_cpu_ram = cfg.low_cpu_ram
            arguments["compile_model"] = cfg.compile
        model = self._setup_model(**arguments)  # type: ignore[attr-defined]
        fix_dora_bias(model)
        return model

    # --- train ---------------------------------------------------------------------------------

    def train(self) -> None:
        """Train all epochs; the adapter is saved after each, merged weights after the last."""
        self._folder: RunFolder | None = None
        logger = None
        if self.rank == 0:
            self._folder = RunFolder(self.cfg, self.run.rows, self.run.data_files, self.world_size)
            logger = instantiate(self.cfg.metric_logger)
        first: dict[str, float] = {}
        last: dict[str, float] = {}
        started = time.perf_counter()
        tokens = 0
        self._optimizer.zero_grad(set_to_none=True)
        self._profiler.start()
        for step, (epoch, rows) in enumerate(self._plan(), start=1):
            metrics = {"step": step, "epoch": epoch, **self._step(step, rows)}
            tokens += int(metrics.pop("tokens"))
            first = metrics | first
            last |= metrics
            if self._folder is not None and step % self.cfg.log_every_n_steps == 0:
                self._folder.log(metrics)
                if logger is not None:
                    figures = {k: v for k, v in metrics.items() if k != "step"}
                    logger.log_dict(figures, step=step)
            self._profiler.step()
            if step % self.steps_per_epoch == 0:
                self._save(final=step == self.total_steps)
                if self._folder is not None:
                    self._folder.discard_replaced()
        self._profiler.stop()
        if self._folder is not None:
            self._folder.close()
            print_summary(
                self.loss.names,
                self.loss.weights,
                first,
                last,
                seconds=time.perf_counter() - started,
                tokens=tokens,
                dropped_rows=self.run.rows.dropped,
                output_dir=self._folder.path,
            )
        if logger is not None:
            logger.close()

    def cache_reference(self) -> None:
        """Store the reference's states of every row, without training."""
        per_step = self.cfg.batch_size * self.cfg.gradient_accumulation_steps * self.world_size
        steps = self.run.rows.covering_steps(per_step, seed=self.seed, shuffle=self.cfg.shuffle)
        for rows in tqdm(steps, "Reference", unit="step", disable=self.rank != 0):
            for batch in self._batches(rows):
                self.loss.cache_reference(batch.to(self._device))

    def _plan(self) -> Iterator[tuple[int, list[int]]]:
        """Epoch, from 0, and rows of every step, with a progress bar on the first process."""
        cfg = self.cfg
        per_step = cfg.batch_size * cfg.gradient_accumulation_steps * self.world_size
        with tqdm(total=self.total_steps, unit="step", disable=self.rank != 0) as self._bar:
            for epoch in range(cfg.epochs):
                steps = self.run.rows.steps(
                    per_step, seed=self.seed, epoch=epoch, shuffle=cfg.shuffle
                )
                for rows in steps[: self.steps_per_epoch]:
                    yield epoch, rows
                    self._bar.update()

    def _step(self, step: int, rows: list[int]) -> dict[str, float]:
        """One optimizer step on these rows of all processes; returns its figures."""
        started = time.perf_counter()
        batches = self._batches(rows)
        counts = self.loss.counts(batches)
        # With the tokens of this step, for the log: one reduction.
        tokens = torch.tensor([sum(batch.num_tokens for batch in batches)], dtype=torch.float64)
        *counts_list, tokens_all = self._summed(torch.cat([counts, tokens])).tolist()
        counts = torch.tensor(counts_list, dtype=torch.float64)
        if not counts.any():
            raise UserError(f"step {step}: none of its rows ({_brief(rows)}) has a label")

        batches = [batch.to(self._device) for batch in batches]
        ratios = self._gradient_ratios(step, batches[0], counts)
        sums = torch.zeros(len(counts), dtype=torch.float64)
        for batch in batches:
            sums += self.loss.backward(batch, counts, gradient_scale=self.world_size).cpu()
        figures = self.loss.means(self._summed(sums), counts)
        if not math.isfinite(figures["loss"]):
            values = ", ".join(f"{name} {value:g}" for name, value in figures.items())
            raise UserError(
                f"step {step}: the loss is not finite ({values}); rows {_brief(rows)}. "
                "Lower the learning rate, or look at these rows"
            )
        names = [name for name in figures if name != "ce" or "ce_task" not in figures]
        shown = " ".join(f"{name} {figures[name]:.3f}" for name in names)
        figures["lr"] = float(self._optimizer.param_groups[0]["lr"])
        figures |= ratios | self._update(step)
        seconds = time.perf_counter() - started
        figures |= {"tokens_per_second": tokens_all / seconds, "tokens": tokens_all}
        if self.cfg.log_peak_memory_stats and self._device.type == "cuda":
            figures |= training.get_memory_stats(device=self._device)
        self._bar.set_postfix_str(shown)
        return figures

    def _batches(self, rows: list[int]) -> list[Batch]:
        dealt = micro_batch_rows(
            rows, batch_size=self.cfg.batch_size, rank=self.rank, world_size=self.world_size
        )
        data, pad_id = self.run.rows, self.run.tokenizer.pad_id
        multiple = self.cfg.pad_to_multiple_of
        return [
            make_batch([data[i] for i in block], block, self.run.collate, pad_id, multiple)
            for block in dealt
        ]

    def _gradient_ratios(self, step: int, batch: Batch, counts: Tensor) -> dict[str, float]:
        """Norm of each due term's gradient over cross entropy's, on the first micro-batch."""
        due = [
            name
            for name, defense in self.run.defenses.items()
            if name in self.loss.names
            and defense.gradient_ratio_every
            and step % defense.gradient_ratio_every == 10 % defense.gradient_ratio_every
        ]
        if not due:
            return {}

        def gradient_norm(*terms: str) -> float:
            self.loss.backward(batch, counts, gradient_scale=self.world_size, only=terms)
            norm = self._clipped_norm(math.inf)
            self._optimizer.zero_grad(set_to_none=True)
            return norm

        cross_entropy = gradient_norm("ce", "ce_task", "ce_safe")
        norms = {name: gradient_norm(name) for name in due}
        # Nothing to compare with: cross entropy of weight 0 on every row of this micro-batch.
        return {f"{n}_gradient_ratio": v / cross_entropy for n, v in norms.items() if cross_entropy}

    def _clipped_norm(self, max_norm: float) -> float:
        norm: Any = torch.nn.utils.clip_grad_norm_(self._model.parameters(), max_norm=max_norm)
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def _update(self, step: int) -> dict[str, float]:
        figures: dict[str, float] = {}
        if self.cfg.clip_grad_norm is not None:
            figures["grad_norm"] = self._clipped_norm(float(self.cfg.clip_grad_norm))
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        if self._scheduler is not None:
            self._scheduler.step()
        for name, defense in self.run.defenses.items():
            defense.after_step(self._model, step)
            figures |= {f"{name}_{key}": value for key, value in defense.figures().items()}
        return figures

    def _summed(self, values: Tensor) -> Tensor:
        """Sum of a CPU tensor over processes."""
        if self.world_size > 1:
            torch.distributed.all_reduce(values)
        return values

    # --- save ----------------------------------------------------------------------------------

    def _save(self, *, final: bool) -> None:
        adapter = adapter_state(self._model, self._device)
        broken = [name for name, tensor in adapter.items() if not tensor.isfinite().all()]
        if broken:
            raise UserError(
                f"the last step left values in the adapter that are not finite ({broken[0]}); "
                "it is not saved. Lower the learning rate"
            )
        save_weights(
            self.run,
            self._model,
            adapter,
            self._device,
            first_process=self.rank == 0,
            merged=final and self.cfg.save_merged,
        )


def recipe_class(*, distributed: bool) -> type[LoRATraining]:
    """`LoRATraining` over torchtune's LoRA recipe for one device, or for several."""
    if distributed:
        stock = stock_recipe("lora_finetune_distributed").LoRAFinetuneRecipeDistributed
    else:
        stock = stock_recipe("lora_finetune_single_device").LoRAFinetuneRecipeSingleDevice
    return type(f"EMA{stock.__name__}", (LoRATraining, stock), {})


def _brief(rows: list[int]) -> str:
    return ", ".join(map(str, rows[:8])) + (", ..." if len(rows) > 8 else "")
