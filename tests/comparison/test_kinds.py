"""Which defense a training config has."""

import pytest
import toy_run

from emarecipes.comparison.outcome import kinds
from emarecipes.config import load_config


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("bed_caps_lora", []),
        ("bed_caps_kl", ["KLToReference"]),  # Its safe rows are not trained on.
        ("bed_caps_interleaved", ["interleaving"]),
        ("smollm2_135m_kl_safe", ["KLToReference"]),
        ("smollm2_135m_spectral", ["SpectralPenalty"]),
    ],
)
def test_safe_rows_that_are_not_trained_on_are_no_interleaving(name: str, found: list[str]) -> None:
    cfg, _ = load_config(["--config", str(toy_run.REPO / f"configs/{name}.yaml")])
    assert list(kinds(cfg)) == found
