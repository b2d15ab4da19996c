"""torchtune's LoRA recipe with defenses: one loop for one device and for several.

Read `LoRATraining` top to bottom: build (`BuiltTraining`), train, save.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torchtune import training, utils

from emarecipes.datasets.rows import micro_batch_rows
from emarecipes.defenses.base import Defense
from emarecipes.errors import UserError
from emarecipes.models._torchtune_recipe import StockRecipe
from emarecipes.models.batch import Batch, make_batch
from emarecipes.progress import Progress
from emarecipes.training.built import BuiltTraining
from emarecipes.training.checked import CheckedRun
from emarecipes.training.checkpoint import Counters
from emarecipes.training.checkpoint_save import CheckpointSaver, StepAbandonedError, StopRequest
from emarecipes.training.checkpoint_state import TrainingState
from emarecipes.training.no_effect import EffectWatch
from emarecipes.training.nonfinite import SkippedSteps, brief, broken_gradient, broken_loss
from emarecipes.training.probe_stop import has_stopped, prepare_stop
from emarecipes.training.random_state import random_state, set_random_state
from emarecipes.training.run_log import RunLog, add_figures
from emarecipes.training.weight_terms import update_evenness
from emarecipes.training.weights import save_weights

log = utils.get_logger("INFO")


class LoRATraining:
    """A run: torchtune's LoRA recipe builds it, and it trains with defenses.

    Args:
        run: A run that passed all checks; its config gets the seed that is drawn.
        distributed: Whether there are several processes; their group must be there.
    """

    def __init__(self, run: CheckedRun, *, distributed: bool) -> None:
        self._stock = StockRecipe(run.cfg, distributed=distributed)
        self._device, self.seed = self._stock.device, self._stock.seed
        self.run = run
        self.cfg = run.cfg
        self.world_size, self.rank = utils.get_world_size_and_rank()
        self.cfg.seed = self.seed
        per_step = self.cfg.batch_size * self.cfg.gradient_accumulation_steps * self.world_size
        steps = run.rows.num_steps(per_step)
        self.steps_per_epoch = min(steps, self.cfg.max_steps_per_epoch or steps)
        self.total_steps = self.steps_per_epoch * self.cfg.epochs
        resumed = run.resumed
        self.counters = Counters() if resumed is None else resumed.counters
        self._skipped = SkippedSteps(self.cfg.skip_nonfinite, self.counters.skipped)
        self._stop_rule = prepare_stop(run.probe, self.counters.last, self.total_steps)

    # --- build ---------------------------------------------------------------------------------

    def setup(self) -> None:
        """Load the model and build what trains it."""
        built = BuiltTraining(
            self.run, self._stock, self.total_steps, self.world_size, first_process=self.rank == 0
        )
        self._model, self._optimizer = built.model, built.optimizer
        self._scheduler, self._profiler = built.scheduler, built.profiler
        self.loss, self._gradients = built.loss, built.gradients
        self._state = TrainingState(
            self._model, self._optimizer, self._scheduler, self.run.defenses, self._device
        )
        self.checkpoints = CheckpointSaver(
            Path(self.cfg.output_dir),
            self._state,
            self.run.description(self.world_size),
            every=self.cfg.save_every_n_steps,
            keep=self.cfg.keep_last,
            resumed=self.run.resumed,
        )
        if self.run.resumed is not None:
            self._state.load(self.run.resumed)

    # --- train ---------------------------------------------------------------------------------

    def train(self) -> bool:
        """Train all epochs; the adapter is saved after each, merged weights after the last.

        Returns:
            Whether the run is complete. Else a signal stopped it, and there is a checkpoint.
        """
        if self.rank == 0:
            self.checkpoints.delete_newer()
        self._log = RunLog(self.run, self.counters, self.world_size, first_process=self.rank == 0)
        started = time.perf_counter() - self.counters.seconds
        self._optimizer.zero_grad(set_to_none=True)
        self._profiler.start()
        watch, complete = EffectWatch(self.run.defenses), True
        with StopRequest(alone=self.world_size == 1) as self._stop:
            self._say_if_probe_ended_it()
            self._end_epoch()  # A resumed run may have died between its checkpoint and its adapter.
            for epoch, rows in self._plan():
                figures = self._step_unless_stopped(self.counters.step + 1, rows)
                self.counters.seconds = time.perf_counter() - started
                if figures is None:
                    self._save_checkpoint()
                    complete = False
                    break
                step = self.counters.step + 1
                more = self._probe(step)
                last = step == self.total_steps or has_stopped(more)
                if step % self.steps_per_epoch == 0 or last:
                    more |= update_evenness(self._model)
                watch.see(step, figures, self.counters.first, last=last)
                self._log.step(epoch, figures | more, always=bool(more))
                self._profiler.step()
                if self._say_if_probe_ended_it():
                    for _, defense in self._in_order():
                        defense.stopped_early(self._model, self.counters.step)
                if self.checkpoints.due(self.counters.step, last=self._at_its_end):
                    self._save_checkpoint()
                self._end_epoch()
        self._profiler.stop()
        self._log.close(self.loss, complete=complete)
        return complete

    def cache_reference(self) -> None:
        """Store the reference's states of every row, without training."""
        per_step = self.cfg.batch_size * self.cfg.gradient_accumulation_steps * self.world_size
        steps = self.run.rows.covering_steps(per_step, seed=self.seed, shuffle=self.cfg.shuffle)
        for rows in Progress(steps, "Reference", unit="step", disable=self.rank != 0):
            for batch in self._batches(rows):
                self.loss.cache_reference(batch.to(self._device))

    def _plan(self) -> Iterator[tuple[int, list[int]]]:
        """Epoch, from 0, and rows of every step to come, with a bar on the first process."""
        cfg = self.cfg
        per_step = cfg.batch_size * cfg.gradient_accumulation_steps * self.world_size
        done = self.counters.step
        quiet = self.rank != 0
        with Progress(
            total=self.total_steps, initial=done, unit="step", disable=quiet
        ) as self._bar:
            first_epoch, first_step = divmod(done, self.steps_per_epoch)
            for epoch in range(first_epoch, cfg.epochs):
                steps = self.run.rows.steps(
                    per_step, seed=self.seed, epoch=epoch, shuffle=cfg.shuffle
                )
                for rows in steps[first_step : self.steps_per_epoch]:
                    if has_stopped(self.counters.last):
                        return
                    yield epoch, rows
                    self._bar.update()
                first_step = 0

    def _step_unless_stopped(self, step: int, rows: list[int]) -> dict[str, float] | None:
        """`_step`; None also if it was given up, with nothing changed."""
        before = random_state(self._device)
        try:
            return self._step(step, rows)
        except StepAbandonedError:
            set_random_state(before, self._device)
            return None

    def _step(self, step: int, rows: list[int]) -> dict[str, float] | None:
        """One optimizer step on these rows of all processes.

        Returns:
            Its figures; None if some process was asked to stop, and nothing is changed.
        """
        started = time.perf_counter()
        batches = self._batches(rows)
        self.loss.begin_step(step)
        for defense in self.run.defenses.values():
            defense.begin_step(step)
        counts = self.loss.counts(batches)
        # With the tokens of this step, for the log, and whether to stop: one reduction.
        tokens = sum(batch.num_tokens for batch in batches)
        padded = sum(batch.conversation_BS.numel() for batch in batches)
        more = torch.tensor([tokens, padded, self._stop.made], dtype=torch.float64)
        *counts_list, tokens_all, padded_all, stop = self._summed(
            torch.cat([counts, more])
        ).tolist()
        if stop:
            return None
        counts = torch.tensor(counts_list, dtype=torch.float64)
        if not counts.any():
            raise UserError(f"step {step}: none of its rows ({brief(rows)}) has a label")

        batches = [batch.to(self._device) for batch in batches]
        with self._stop.can_be_abandoned():
            last = step == self.total_steps
            ratios = self._gradients.ratios(
                step, batches, counts, self.run.defenses, self.counters.first, last=last
            )
            sums, once = self._gradients.backward(batches, counts, self.run.defenses)
        figures = self.loss.means(self._summed(torch.stack([*sums, once]).sum(dim=0)), counts)
        names = [name for name in figures if name != "ce" or "ce_task" not in figures]
        shown = " ".join(f"{name} {figures[name]:.3f}" for name in names)
        self._gradients.before_update(step, self.run.defenses)
        norm = self._gradients.clip(float(self.cfg.clip_grad_norm or math.inf))
        broken = broken_loss(figures, batches, sums) or broken_gradient(
            norm, lambda n: self._gradients.norm_of([n], batches, counts), self.loss.present, rows
        )
        if self.cfg.clip_grad_norm is not None:
            figures["grad_norm"] = norm
        if broken is not None:
            self._skipped.skip(step, broken)
            figures = {k: v for k, v in figures.items() if math.isfinite(v)} | {"skipped": 1.0}
        figures["lr"] = float(self._optimizer.param_groups[0]["lr"])
        figures |= ratios
        self._update(step, figures, skip=broken is not None)
        seconds = time.perf_counter() - started
        figures |= {"tokens_per_second": tokens_all / seconds, "tokens": tokens_all}
        figures["padding_share"] = 1.0 - tokens_all / padded_all
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

    def _update(self, step: int, figures: dict[str, float], *, skip: bool) -> None:
        if not skip:
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        if self._scheduler is not None:
            self._scheduler.step()
        for name, defense in self._in_order():
            if name in figures and not skip:
                defense.saw_term(figures[name])
            defense.after_step(self._model, step)
            add_figures(figures, self.run.defenses, name)

    def _in_order(self) -> list[tuple[str, Defense]]:
        """The defenses after a step: those that keep an adapter see what all others left."""
        return sorted(self.run.defenses.items(), key=lambda named: named[1].has("saved_adapter"))

    def _probe(self, step: int) -> dict[str, float]:
        """Likelihood probes, where they are due."""
        probe = self.run.probe
        if probe is None or not probe.due(step, self.total_steps):
            return {}
        figures = probe.figures(self.loss.head, self._summed, self._device)
        if self._stop_rule is not None and step < self.total_steps:
            figures |= self._stop_rule.judge(figures, self.counters.last)
        return figures

    def _say_if_probe_ended_it(self) -> bool:
        if self._stop_rule is None or not has_stopped(self.counters.last):
            return False
        if self.rank == 0:
            log.info(self._stop_rule.why(self.counters.last))
        return True

    @property
    def _at_its_end(self) -> bool:
        """Whether no step is to come."""
        return self.counters.step == self.total_steps or has_stopped(self.counters.last)

    def _summed(self, values: Tensor) -> Tensor:
        """Sum of a CPU tensor over processes."""
        if self.world_size > 1:
            torch.distributed.all_reduce(values)
        return values

    # --- save ----------------------------------------------------------------------------------

    def _save_checkpoint(self) -> None:
        self._log.sync()
        self.checkpoints.save(self.counters)

    def _end_epoch(self) -> None:
        """After an epoch's last step: the adapter, and after the run's last merged weights."""
        step = self.counters.step
        if step == 0 or (step % self.steps_per_epoch and not self._at_its_end):
            return
        save_weights(
            self.run,
            self._model,
            self._state.adapter(),
            self._device,
            first_process=self.rank == 0,
            merged=self._at_its_end and self.cfg.save_merged,
        )
        self._log.adapter_saved()
