"""What keeping freed pages does, counted by the kernel in processes of their own."""

import os
import subprocess
import sys

import pytest

from emarecipes.training import pages

# Memory is asked for as torch does for a tensor on a CPU (c10's alloc_cpu), without the seconds of
# importing torch; the file alone, without its package.
ROUNDS = """
import ctypes, resource, runpy, sys
kept = runpy.run_path(sys.argv[1])["keep_freed_pages"]()
libc = ctypes.CDLL(None)
libc.posix_memalign.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
size = 1024 * 1536 * 4
def work():
    held = [ctypes.c_void_p() for _ in range(20)]  # 6 MB each
    for block in held:
        assert libc.posix_memalign(ctypes.byref(block), 64, size) == 0
        ctypes.memset(block, 1, size)
    for block in held:
        libc.free(block)
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
work()
before = faults()
for _ in range(4):
    work()
print(kept, (faults() - before) // 4)
"""


def faults(**variables: str) -> tuple[str, int]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    command = [sys.executable, "-c", ROUNDS, pages.__file__]
    output = subprocess.check_output(command, env=kept | variables, text=True)
    answer, count = output.split()
    return answer, int(count)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_memory_of_a_round_is_taken_from_the_kernel_once() -> None:
    """Against a threshold under which nothing is kept, which is a user's variable and rules."""
    # 120 MB are 30,720 pages of 4 kB. By itself glibc keeps some of them, now more and now less.
    answer, count = faults(MALLOC_MMAP_THRESHOLD_="131072")
    assert answer == "False"
    assert count > 20_000
    answer, count = faults()
    assert answer == "True"
    assert count < 10_000
