#!/usr/bin/env bash
# torch 2.14.1 on a CPU with AVX-512: what torch.compile kept from one process is read by the next under
# ATEN_CPU_CAPABILITY=avx2, and the numbers are wrong, without an error or a warning.
#
# Expected: inductor honours that variable when it compiles (pick_vec_isa says avx2), so its cache should tell
# what was compiled under another from what is asked for, and compile anew. (No guess beforehand: a test of
# ours failed under the variable, in a suite that had passed without it.)
# Seen: with a cache of its own each process is right (differences of rounding); the second process of a
# common cache is off by hundreds in a sum of 37 cross entropies; a third one without the variable is right.
#
# Needs a CPU with AVX-512, else says so and exits with 0. Exits with 1 if this has changed.
set -euo pipefail
if ! grep -q avx512f /proc/cpuinfo; then
  echo "no AVX-512 here: not to be seen"
  exit 0
fi
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet "torch==2.14.1" numpy
cat >"$folder/try.py" <<'PYTHON'
import torch
from torch._inductor.cpu_vec_isa import pick_vec_isa

torch.manual_seed(0)


def loss(hidden, weight, targets):
    logits = hidden @ weight.T
    return torch.nn.functional.cross_entropy(logits, targets, reduction="sum")


given = torch.randn(37, 64), torch.randn(1000, 64), torch.randint(0, 1000, (37,))
apart = float((loss(*given) - torch.compile(loss)(*given)).abs())
print(f"{torch.__version__} {str(pick_vec_isa()).split()[0]} {'right' if apart < 1e-2 else 'wrong'}")
PYTHON
unset ATEN_CPU_CAPABILITY
run() { TORCHINDUCTOR_CACHE_DIR="$folder/$1" "$folder/venv/bin/python" "$folder/try.py" 2>/dev/null; }
first=$(run common)
second=$(ATEN_CPU_CAPABILITY=avx2 run common)
third=$(run common)
alone=$(ATEN_CPU_CAPABILITY=avx2 run apart)
printf 'common cache: %s; then with avx2: %s; then without: %s\na cache of its own, avx2: %s\n' \
  "$first" "$second" "$third" "$alone"
case "$first|$second|$third|$alone" in
  *avx512*right\|*avx2*wrong\|*avx512*right\|*avx2*right) ;;
  *)
    echo "changed: not what is described above"
    exit 1
    ;;
esac
