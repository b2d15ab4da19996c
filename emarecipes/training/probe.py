"""Likelihood probes while an adapter is trained, as scalars in the log.

Nothing is drawn at random and nothing is sampled: a run with probes has the losses of one without.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor
from torchtune.utils import get_world_size_and_rank

from emarecipes.config import Origin
from emarecipes.datasets.rows import Rows
from emarecipes.datasets.rows_fit import check_rows_fit
from emarecipes.errors import UserError
from emarecipes.models.batch import longest_first
from emarecipes.models.likelihoods import GivenAnswers
from emarecipes.models.loss_head import LossHead
from emarecipes.output_dir import check_outside_output
from emarecipes.probes.contrast import AnswerRow, PairNLL, pair_nll, probe_shift
from emarecipes.probes.suites import read_suites
from emarecipes.settings import parse_settings
from emarecipes.training.probe_stop import ProbeStop, read_stop
from emarecipes.training.settings import ProbeSettings

Sum = Callable[[Tensor], Tensor]


def read_probe(cfg: DictConfig, origin: Origin, tokenizer: Any, model: Any) -> Probe | None:
    """The probe that a training config's entry `probe` describes; None without one.

    Args:
        cfg: The checked config.
        origin: Where it was written.
        tokenizer: torchtune's model transform.
        model: On the meta device.

    Raises:
        UserError: A key, a file or a row of a suite is wrong, or does not fit the model.
    """
    if cfg.probe is None:
        return None
    settings = parse_settings(cfg.probe, origin, ProbeSettings, within="probe")
    suites = read_suites(cfg.probe.suites, "probe.suites", origin, settings.max_rows)
    check_outside_output(cfg, origin, (file for suite in suites for file in suite.files))
    rows = {suite.name: suite.rows(tokenizer) for suite in suites}
    for name, part in rows.items():
        try:
            check_rows_fit(cfg, origin, Rows([row.sample for row in part], dropped=0), model)
        except UserError as error:
            raise UserError(f"probe suite {name}: {error}") from None
    stop = read_stop(cfg.probe, origin, rows)
    return Probe(rows, settings, tokenizer.pad_id, int(cfg.pad_to_multiple_of), stop)


class Probe:
    """The rows of all suites, and the reference's likelihoods once they are known.

    Args:
        rows: By suite, aligned then misaligned of each question.
        settings: The entry `probe`.
        pad_id: Token that fills up rows.
        pad_to_multiple_of: Row lengths are rounded up to a multiple of this.
        stop: When the probes end the run, if ever.
    """

    def __init__(
        self,
        rows: dict[str, list[AnswerRow]],
        settings: ProbeSettings,
        pad_id: int,
        pad_to_multiple_of: int,
        stop: ProbeStop | None = None,
    ) -> None:
        self.stop = stop
        self._rows, self._settings = rows, settings
        self._pad_id, self._multiple = pad_id, pad_to_multiple_of
        self._reference: dict[str, PairNLL] = {}

    def due(self, step: int, total_steps: int) -> bool:
        """Whether there is a probe after this step, from 1."""
        return step % self._settings.every_n_steps == 0 or step == total_steps

    def can_stop(self, total_steps: int) -> bool:
        """Whether a run of this length has a second probe before its last step."""
        return 2 * self._settings.every_n_steps < total_steps

    def figures(self, head: LossHead, summed: Sum, device: torch.device) -> dict[str, float]:
        """Mean margin, misaligned share and mean probe shift of each suite, see docs/evaluate.md.

        Every process must call it; each takes its part of the rows.

        Args:
            head: The loss head of the model in training.
            summed: Sums a CPU tensor over processes.
            device: The model's.
        """
        was_training = head.model.training
        head.model.eval()
        try:
            if not self._reference:
                self._reference = self._measure(head, summed, device, reference=True)
            found = self._measure(head, summed, device, reference=False)
        finally:
            head.model.train(was_training)
        figures: dict[str, float] = {}
        for name, nll in found.items():
            figures |= {
                f"probe_{name}_margin": float(nll.margin().mean()),
                f"probe_{name}_misaligned_share": nll.misaligned_share(),
                f"probe_{name}_shift": float(probe_shift(self._reference[name], nll).mean()),
            }
        return figures

    def _measure(
        self, head: LossHead, summed: Sum, device: torch.device, *, reference: bool
    ) -> dict[str, PairNLL]:
        every = [row for part in self._rows.values() for row in part]
        world_size, rank = get_world_size_and_rank()
        # Every world-size-th row, as many on each process.
        size = -(-len(every) // world_size)
        mine = [(rank + i * world_size) % len(every) for i in range(size)]
        order = longest_first([every[row].tokens for row in mine], self._settings.batch_size)
        batches = [[mine[place] for place in part] for part in order]
        samples = [row.sample for row in every]
        answers = GivenAnswers(samples, self._pad_id, self._multiple, device)
        means = torch.zeros(len(every), dtype=torch.float64)
        for row, mean in answers.mean_nll(head, batches, reference=reference).items():
            means[row] = mean
        # A row that two processes computed, to have the same number of batches, counts once.
        owned = torch.arange(len(every)) % world_size == rank
        values = iter(summed(torch.where(owned, means, 0.0)).tolist())
        return {
            name: pair_nll([torch.tensor([next(values)]).double().numpy() for _ in part])
            for name, part in self._rows.items()
        }
