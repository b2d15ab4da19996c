"""Which variables make PyTorch's products leave a CPU's wide instructions unused, by their rates.

python benchmarks/narrow_instructions.py [--isa avx2 | sse] [--threads 1]

With avx2, on a CPU with bf16 units (AMX, AVX512-BF16): the variable under which the bf16 product
falls to a small part of fp32's rate makes this machine behave as one with AVX2 alone, to try
`dtype: auto`, `make demo` and `make test` as they run there. On a CPU with AVX2 alone there is
nothing to switch off, and sse shows whether the variables act at all.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

PROGRAM = """
import sys, time, torch
torch.set_num_threads(int(sys.argv[1]))
rates = []
for dtype, rows in ((torch.float32, 1024), (torch.bfloat16, 64)):
    x, w = torch.randn(rows, 576).to(dtype), torch.randn(1536, 576).to(dtype)
    best = float("inf")
    for _ in range(7):
        began = time.perf_counter()
        torch.nn.functional.linear(x, w)
        best = min(best, time.perf_counter() - began)
    rates.append(2 * rows * 576 * 1536 / best / 1e9)
from emarecipes.machine import native_precision
print(*rates, native_precision("cpu").dtype)
"""
VARIABLES = {
    "avx2": {
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
    "sse": {
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "ATEN_CPU_CAPABILITY": "default",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--isa", choices=VARIABLES, default="avx2")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    own = VARIABLES[arguments.isa]
    kept = {name: value for name, value in os.environ.items() if name not in own}
    settings: dict[str, dict[str, str]] = {"none": {}}
    settings |= {f"{name}={value}": {name: value} for name, value in own.items()}
    settings["all three"] = own
    print("1024 x 576 x 1536 in fp32, 64 x 576 x 1536 in bf16; GFLOP/s, best of 7")
    print(f"{'variable':34} {'fp32':>8} {'bf16':>8} {'bf16/fp32':>10}  dtype: auto")
    for name, variables in settings.items():
        command = [sys.executable, "-c", PROGRAM, str(arguments.threads)]
        said = subprocess.check_output(command, env=kept | variables, text=True).split()
        fp32, bf16 = float(said[0]), float(said[1])
        print(f"{name:34} {fp32:8.1f} {bf16:8.1f} {bf16 / fp32:10.3f}  {said[2]}")


if __name__ == "__main__":
    main()
