"""What commands share: processes that fail together, and how a failure is told.

The last line says what to do. An exception out of a user's own defense, or one that nobody
expected, comes with its traceback above that line: who has to mend code needs it. What a user can
mend in a config or a file is one line alone.
"""

from __future__ import annotations

import errno
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from emarecipes.errors import Extension, UserCodeError, UserError
from emarecipes.machine import set_threads
from emarecipes.stop import stoppable

_Result = TypeVar("_Result")

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def together(work: Callable[[], _Result]) -> _Result:
    """Call `work()` on every process; if it fails on one, the same error is raised on all.

    Otherwise the launcher would end the first process before it could say what is wrong, and the
    others would wait for one that has gone.

    Raises:
        UserError: The first process's that has one.
    """
    if not dist.is_initialized():
        return work()
    found: list[_Result] = []
    error: str | None = None
    try:
        found.append(work())
    except UserError as user_error:
        if isinstance(explain(user_error), UserCodeError):
            raise  # With its traceback.
        error = str(user_error)
    errors: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    for first in errors:
        if first is not None:
            raise UserError(first)
    return found[0]


def on_first_process(work: Callable[[], _Result]) -> _Result:
    """Call `work()` on the first process alone; what it returns is returned on all.

    Raises:
        UserError: On every process alike: the first one's, or what a disk refused it.
    """
    if not dist.is_initialized():
        return work()
    found: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            found[0] = work()
        except (UserError, OSError) as error:
            if isinstance(error, UserError) and isinstance(explain(error), UserCodeError):
                raise  # With its traceback.
            found[1] = str(error)
    dist.broadcast_object_list(found, src=0)
    result, failure = found
    if failure is not None:
        raise UserError(failure)
    shared: _Result = result
    return shared


def leave_processes() -> None:
    """Leave the process group. Without the barrier, gloo fails at exit about once in ten runs.

    Every `UserError` of a run is raised on all processes alike, so that all of them come here.
    """
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def run_alone(name: str, work: Callable[[Sequence[str]], None], argv: Sequence[str]) -> int:
    """Call `work(argv)` and turn what a user can mend into one line.

    Args:
        name: The recipe's, for messages.
        work: The command.
        argv: `--config FILE` and overrides.

    Returns:
        The exit code: 0, or 1 after an exception or several processes.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        return _refuse_processes(name)
    set_threads()
    try:
        with stoppable("the same command begins again, or goes on from what is kept"):
            work(argv)
            sys.stdout.flush()
    except BrokenPipeError:  # As `| head` leaves one; what is still to be written goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        report(UserError("what reads the output has gone"))
        return 1
    except Exception as error:
        report(explain(error))
        return 1
    return 0


def explain(error: Exception) -> UserError:
    """What ended a run, as one line. A `UserCodeError` has the exception to be shown as its cause.

    A `UserError` is itself, unless an exception out of a defense that a user wrote lies behind it.
    """
    place = _place_in_a_defense(error)
    if place is not None:
        where, cause = place
        if isinstance(error, UserError):
            line = f"{error} (raised in {where})"
        else:
            line = f"{where}: {type(cause).__name__}: {cause}"
        found = UserCodeError(line)
        found.__cause__ = cause
        return found
    if isinstance(error, UserError):
        return error
    if isinstance(error, torch.OutOfMemoryError):
        return UserError("out of the device's memory; lower batch_size")
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        return UserError(f"{error.filename or 'writing'}: {error.strerror}; make room")
    found = UserCodeError(
        f"unexpected {type(error).__name__}: {error}; the traceback above says where. If none of "
        "your own code is in it, please report it, with the config"
    )
    found.__cause__ = error
    return found


def report(error: UserError, rank: int | None = None) -> None:
    """Print what `explain` gave, its line last.

    Under torchrun it is also left where the launcher looks for it, who repeats the first process's.

    Args:
        error: From `explain`.
        rank: This process's number, where only it failed and others run.
    """
    prefix = "" if rank is None else f"rank {rank}: "
    line = f"error: {prefix}{error}"
    if isinstance(error, UserCodeError) and error.__cause__ is not None:
        traceback.print_exception(error.__cause__)
    print(line, file=sys.stderr, flush=True)
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        message = {"message": line, "line": line, "extraInfo": {"timestamp": str(int(time.time()))}}
        Path(file).write_text(json.dumps({"message": message}), encoding="utf-8")


def end_launcher(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """The `sys.excepthook` of `tune`: a failed process's own line last, no traceback on Ctrl-C.

    The launcher's first failure may be of a process that left no line: times are whole seconds, and
    of a process without a file it takes when it looked. So the first is told that left one.
    """
    failures = getattr(error, "failures", {}).values()  # torchrun's ChildFailedError
    told = [one for one in failures if isinstance(one.message, dict) and "line" in one.message]
    if isinstance(error, KeyboardInterrupt) or kind.__name__ == "SignalException":
        print("error: interrupted", file=sys.stderr)
    elif told:
        first = min(told, key=lambda failure: failure.timestamp)
        print(f"{error}\n{first.message['line']}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def is_of_a_users_defense(error: Exception) -> bool:
    """Whether the code of a defense that a user wrote raised it."""
    return _place(error) is not None


def _place_in_a_defense(error: BaseException | None) -> tuple[str, BaseException] | None:
    """`Class.method (file:line)` of a user's defense that raised, and the exception.

    A `UserError` of a defense says all that is to be said; what lies behind it may not.
    """
    while error is not None:
        if not isinstance(error, UserError) and (place := _place(error)) is not None:
            return place, error
        error = error.__cause__
    return None


def _place(error: BaseException) -> str | None:
    """Read from the traceback, so that no method of a defense needs a wrapper of its own."""
    for frame, line in traceback.walk_tb(error.__traceback__):
        owner, code = frame.f_locals.get("self"), frame.f_code
        if isinstance(owner, Extension) and not _is_ours(code.co_filename):
            return f"{type(owner).__name__}.{code.co_name}, {Path(code.co_filename).name}:{line}"
    return None


def _is_ours(file: str) -> bool:
    return Path(file).is_relative_to(Path(__file__).parent)


def _refuse_processes(name: str) -> int:
    """Say it once; the barrier keeps the launcher from ending the first process before."""
    dist.init_process_group("gloo")
    if dist.get_rank() == 0:
        report(UserError(f"{name} runs in one process; leave --nproc_per_node out"))
    dist.barrier()
    dist.destroy_process_group()
    return 1
