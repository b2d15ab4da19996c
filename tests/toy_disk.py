"""A small file system of a process's own, which really gets full."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

_NEW_MOUNTS, _NEW_USER = 0x00020000, 0x10000000  # CLONE_NEWNS, CLONE_NEWUSER of sched.h.


def possible() -> bool:
    """Whether a process may have such a file system here: it tries."""
    script = (
        "import tempfile, pathlib, toy_disk\n"
        "toy_disk.mount(pathlib.Path(tempfile.gettempdir()), 65536)\n"
    )
    here = Path(__file__).parent
    tried = subprocess.run([sys.executable, "-c", script], cwd=here, capture_output=True)
    return tried.returncode == 0


def mount(folder: Path, size: int) -> None:
    """Give this process, and no other, a file system of so many bytes at `folder`.

    It is as `unshare -rm` and `mount -t tmpfs`, for a process that has imported torch already. The
    kernel wants a process of one thread, as one that was just forked is.
    """
    user, group = os.getuid(), os.getgid()
    libc = ctypes.CDLL(None, use_errno=True)
    _check(libc.unshare(_NEW_USER | _NEW_MOUNTS))
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    options = f"size={size}".encode()
    _check(libc.mount(b"none", os.fsencode(folder), b"tmpfs", ctypes.c_ulong(0), options))


def _check(answer: int) -> None:
    if answer != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
