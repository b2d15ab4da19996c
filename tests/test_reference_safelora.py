"""The float64 reference of SafeLoRA and of projections, by hand."""

import math
from typing import Any

import pytest
import torch
from reference_defenses import (
    safelora_dense,
    safelora_projector_dense,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def double(*rows: Any) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


# V = diag(3, 4): ||V||_F = 5, so C = diag(1.8, 3.2). B A = [[1, 0, 0], [1, 0, 0]].
A, B = double([1.0, 0.0, 0.0]), double([1.0], [1.0])


BASE = {"m": double([1.0, 2.0, 3.0], [4.0, 5.0, 6.0])}


ALIGNED = {"m": BASE["m"] + double([3.0, 0.0, 0.0], [0.0, 4.0, 0.0])}


NEW_NORM = math.sqrt(1.8**2 + 3.2**2)


COSINE = 5 / (math.sqrt(2) * NEW_NORM)


def test_safelora_by_hand():
    lora = {"m": (A.float(), B.float())}
    result = safelora_dense(lora, ALIGNED, BASE, threshold=COSINE + 1e-9)["m"]
    assert result["projected"]
    assert result["cosine"] == pytest.approx(COSINE, abs=1e-15)
    torch.testing.assert_close(result["B"], double([1.8], [3.2]))
    assert result["norm_before"] == pytest.approx(math.sqrt(2))
    assert result["norm_after"] == pytest.approx(NEW_NORM)
    kept = safelora_dense(lora, ALIGNED, BASE, threshold=COSINE - 1e-9)["m"]
    assert not kept["projected"] and torch.equal(kept["B"], B)
    assert kept["norm_after"] == kept["norm_before"]

    rescaled = safelora_projector_dense(lora, ALIGNED, BASE, mode="rescale", num_layers=1)["m"]
    assert rescaled["projected"] and rescaled["cosine"] == result["cosine"]
    assert rescaled["norm_after"] == pytest.approx(NEW_NORM)
    torch.testing.assert_close(rescaled["B"], B * NEW_NORM / math.sqrt(2))


def test_safelora_choice_of_modules():
    # C = diag(1, 0) in all; cosines 0 (nothing kept), 1/sqrt 2, 1, and 0 for B = 0
    columns = {"mixed": [1.0, 1.0], "out": [0.0, 1.0], "in": [1.0, 0.0], "zero": [0.0, 0.0]}
    lora = {name: (A, double(*[[x] for x in column])) for name, column in columns.items()}
    base = {name: torch.zeros(2, 3) for name in lora}
    aligned = {name: double([1.0, 0.0, 0.0], [0.0, 0.0, 0.0]) for name in lora}

    def projected(**options: Any) -> set[str]:
        result = safelora_dense(lora, aligned, base, **options)
        return {name for name, entry in result.items() if entry["projected"]}

    assert projected(num_layers=0) == set()
    assert projected(num_layers=1) == {"out"}
    assert projected(num_layers=3) == {"out", "zero", "mixed"}
    assert projected(threshold=0.0) == {"out", "zero"}
    assert projected(threshold=0.8) == {"out", "zero", "mixed"}
    assert projected(threshold=1.0) == set(lora)
    assert projected(threshold=-0.1) == set()
    with pytest.raises(ValueError, match="either"):
        projected()
    with pytest.raises(ValueError, match="equals"):
        safelora_dense(lora, base, base, threshold=1.0)


def test_orthogonal_projector_by_hand():
    lora = {"m": (A, B)}
    # squared singular values 16 (second axis) and 9
    for size in ({"rank": 1}, {"energy": 0.6}):
        result = safelora_projector_dense(
            lora, ALIGNED, BASE, mode="orthogonal", threshold=0.9, **size
        )["m"]
        assert result["projected"]
        assert result["cosine"] == pytest.approx(1 / math.sqrt(2))
        torch.testing.assert_close(result["B"], double([0.0], [1.0]))
        assert result["norm_after"] == pytest.approx(1.0)
    for size in ({"rank": 2}, {"rank": 9}, {"energy": 0.65}, {"energy": 1.0}):
        result = safelora_projector_dense(
            lora, ALIGNED, BASE, mode="orthogonal", num_layers=1, **size
        )["m"]
        assert result["cosine"] == pytest.approx(1.0)
        torch.testing.assert_close(result["B"], B)


def test_soft_projection_by_hand():
    # W = B A = [[1, 2, 5], [3, 4, 6]]; P keeps the second row, Q the second column
    lora = {"m": (double([1.0, 2.0, 5.0], [3.0, 4.0, 6.0]), torch.eye(2))}
    result = safelora_projector_dense(lora, ALIGNED, BASE, mode="soft", rank=1, lam=1.0)["m"]
    torch.testing.assert_close(result["W"], double([0.25, 1.0, 1.25], [1.5, 4.0, 3.0]))
    assert result["norm_before"] == pytest.approx(math.sqrt(91))
    same = safelora_projector_dense(lora, ALIGNED, BASE, mode="soft", energy=0.6, lam=0.0)["m"]
    torch.testing.assert_close(same["W"], lora["m"][0])
    assert same["norm_after"] == pytest.approx(same["norm_before"])
