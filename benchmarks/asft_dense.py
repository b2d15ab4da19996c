"""AsFT without its matrices over its dense form: time, operations and memory of one layer's term.

Dense: C = V V^T / |V|_F is made once and held, which is not counted; every step forms the update
s B A (out x in) and (1 - C) s B A, and takes the gradient of A and B through both. Matrix-free:
`AsFT.weight_term`. Values and gradients are compared. Memory is what a step allocates beside C or
V. The least of some processor times each, in turns.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from emarecipes.defenses import AdaptedModule, AsFT
from emarecipes.plan.trace import Trace, trace

LIMIT = 0.05  # Of the dense form's time and memory.
RANK, SCALE = 32, 2.0
# Of Llama-3-8B's layers, and how many each of the 32 has.
SHAPES = {(4096, 4096): 2, (1024, 4096): 2, (14336, 4096): 2, (4096, 14336): 1}
LAYERS = 32


def matrix_free(a_RI: Tensor, b_OR: Tensor, v_OI: Tensor, norm: float) -> Tensor:
    defense = AsFT.__new__(AsFT)
    defense._v = {"": (v_OI, norm)}
    value = defense.weight_term(AdaptedModule("", a_RI, b_OR, SCALE))
    assert value is not None
    return value


def dense(a_RI: Tensor, b_OR: Tensor, c_OO: Tensor) -> Tensor:
    update_OI = SCALE * b_OR @ a_RI
    return (update_OI - c_OO @ update_OI).square().sum()


def seconds(compute: Callable[[], Tensor], matrices: tuple[Tensor, Tensor]) -> float:
    started = time.process_time()
    torch.autograd.grad(compute(), matrices)
    return time.process_time() - started


def on_meta(rows: int, columns: int) -> tuple[Trace, Trace]:
    a, b, v, c = (
        torch.empty(*shape, device="meta")
        for shape in ((RANK, columns), (rows, RANK), (rows, columns), (rows, rows))
    )
    a.requires_grad_(), b.requires_grad_()
    return trace(lambda: matrix_free(a, b, v, 1.0)), trace(lambda: dense(a, b, c))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--shape", type=int, nargs=2, default=(4096, 4096), metavar=("OUT", "IN"), help="timed"
    )
    parser.add_argument("--repetitions", type=int, default=3)
    options = parser.parse_args()
    out, inner = options.shape
    torch.manual_seed(0)
    v, norm = torch.randn(out, inner), float(inner)
    v *= norm / v.norm()
    c = v @ v.T / norm
    a, b = torch.randn(RANK, inner, requires_grad=True), torch.randn(out, RANK, requires_grad=True)
    forms = [lambda: matrix_free(a, b, v, norm), lambda: dense(a, b, c)]
    values = [form() for form in forms]
    gradients = [torch.autograd.grad(value, (a, b)) for value in values]
    torch.testing.assert_close(values[0], values[1], rtol=1e-4, atol=0.0)
    for one, other in zip(*gradients, strict=True):
        assert float((one - other).norm() / other.norm()) < 1e-4
    times = [[seconds(form, (a, b)) for form in forms] for _ in range(options.repetitions)]
    free, whole = (min(column) for column in zip(*times, strict=True))
    verdict = "met" if free <= LIMIT * whole else "NOT met"
    print(
        f"{out} x {inner}, rank {RANK}, fp32: {free:.3f} s over {whole:.3f} s: {free / whole:.3f}"
    )
    print(f"  time at most {LIMIT}: {verdict}")
    total, held = [0.0, 0.0], [0.0, 0.0]
    for (rows, columns), count in SHAPES.items():
        found = on_meta(rows, columns)
        peaks = [max(t.forward_peak, t.backward_peak) for t in found]
        flops = [t.forward_flops + t.backward_flops for t in found]
        total = [x + LAYERS * count * y for x, y in zip(total, flops, strict=True)]
        sizes = (rows * columns, rows * rows)  # V, C
        held = [x + LAYERS * count * y for x, y in zip(held, sizes, strict=True)]
        print(
            f"{rows} x {columns}: {flops[0] / 1e9:.1f} over {flops[1] / 1e9:.0f} GFLOP: "
            f"{flops[0] / flops[1]:.4f}; {peaks[0] / 1e6:.1f} over {peaks[1] / 1e6:.0f} MB: "
            f"{peaks[0] / peaks[1]:.4f}"
        )
    print(
        f"Llama-3-8B: {total[0] / 1e12:.1f} over {total[1] / 1e12:.0f} TFLOP a step: "
        f"{total[0] / total[1]:.4f}; held are {held[0] / 1e9:.1f} G numbers of V, and "
        f"{held[1] / 1e9:.1f} of C"
    )


if __name__ == "__main__":
    main()
