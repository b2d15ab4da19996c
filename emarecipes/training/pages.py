"""Freed memory kept for the next step: on a CPU, fresh pages cost as much as what is written."""

from __future__ import annotations

import ctypes
import os
import sys

# From malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_KEPT = 32 * 2**20  # Bytes; the most that every glibc takes. A loss head's chunk is half.


def keep_freed_pages() -> bool:
    """Let glibc keep what tensors of up to 32 MB freed, up to 2 GB, in place of giving it back.

    A step frees and takes again the same hundreds of MB, which the kernel would clear each time.

    Returns:
        Whether it does so: not where there is no glibc, or the user's own MALLOC_ variables rule.
    """
    if any(name.startswith("MALLOC_") for name in os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return False
    # Either switches glibc's own adjustment off, so both are set.
    kept = mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT) == 1
    trimmed: bool = kept and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1) == 1
    return trimmed
