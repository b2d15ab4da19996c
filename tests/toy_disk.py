"""A small file system of a process's own, which really gets full."""

import ctypes
import os
import subprocess
from pathlib import Path

_NEW_MOUNTS, _NEW_USER = 0x00020000, 0x10000000  # CLONE_NEWNS, CLONE_NEWUSER of sched.h.


def possible() -> bool:
    """Whether a user may have a mount namespace here."""
    try:
        return subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


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
