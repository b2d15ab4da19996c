"""What keeping freed pages does, counted by the kernel in processes of their own."""

import os
import subprocess
import sys

import pytest

from emarecipes.training import pages

# The file alone: its package's imports take longer than all rounds.
ROUNDS = """
import resource, runpy, sys, torch
keep_freed_pages = runpy.run_path(sys.argv[1])["keep_freed_pages"]
kept = {call}
def work():
    held = [torch.ones(1024, 1536) for _ in range(20)]  # 6 MB each
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
work()
before = faults()
for _ in range(4):
    work()
print(kept, (faults() - before) // 4)
"""


def faults(call: str, **variables: str) -> tuple[str, int]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    command = [sys.executable, "-c", ROUNDS.format(call=call), pages.__file__]
    output = subprocess.check_output(command, env=kept | variables, text=True)
    answer, count = output.split()
    return answer, int(count)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_memory_of_a_round_is_taken_from_the_kernel_once() -> None:
    """Against a threshold under which nothing is kept, which is a user's variable and rules."""
    # 120 MB are 30,720 pages of 4 kB. By itself glibc keeps some of them, now more and now less.
    answer, count = faults("keep_freed_pages()", MALLOC_MMAP_THRESHOLD_="131072")
    assert answer == "False"
    assert count > 20_000
    answer, count = faults("keep_freed_pages()")
    assert answer == "True"
    assert count < 10_000
