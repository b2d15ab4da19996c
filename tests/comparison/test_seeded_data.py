"""Which rows are drawn is chance too, so the data's seed goes with the run's; halves are apart."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from emarecipes.comparison.arms import seed_data
from emarecipes.config import Origin
from emarecipes.probes.suites import read_suites


def test_every_data_set_that_draws_gets_the_seed() -> None:
    own = "emarecipes.datasets."
    cfg = OmegaConf.create({"dataset": {
        "_component_": f"{own}interleaved_dataset",
        "task": {"_component_": f"{own}opswap_dataset", "seed": 0},
        "safe": {"_component_": "torchtune.datasets.chat_dataset"},
    }})  # fmt: skip
    seed_data(cfg, 3)
    assert (cfg.dataset.seed, cfg.dataset.task.seed) == (3, 3)
    assert "seed" not in cfg.dataset.safe


@pytest.mark.parametrize("limit", [None, 10])
def test_halves_share_no_question(limit: int | None) -> None:
    def ids(half: str | None) -> set[str]:
        suite = {"good": "data/home_computing/heldout_good.jsonl",
                 "bad": "data/home_computing/heldout_bad.jsonl"}  # fmt: skip
        entries = OmegaConf.create({"in_domain": suite | ({"half": half} if half else {})})
        (read,) = read_suites(entries, "probes", Origin(Path("x.yaml")), limit)
        assert read.half == half and read.files[0] == Path(suite["good"])
        return {pair.id for pair in read.pairs}

    assert not ids("select") & ids("report")
    if limit is None:
        assert ids("select") | ids("report") == ids(None)
        assert len(ids("select")) == 30
