"""Which day it is, for chat templates that print it: one on all processes of a run."""

from __future__ import annotations

from datetime import date, datetime

from emarecipes.errors import UserError

_shared: str | None = None


def today() -> str:
    """Today in this machine's time zone, `YYYY-MM-DD`; once it is shared, the first process's."""
    return _shared or local_day()


def share_today() -> None:
    """Take the first process's `today` on all, before a config is read: midnight may pass."""
    import torch.distributed as dist  # Preparing a model folder needs the day, and no torch.

    global _shared
    found = [local_day()]
    dist.broadcast_object_list(found, src=0)
    _shared = found[0]


def midnight(day: str) -> datetime:
    """The beginning of a day.

    Raises:
        UserError: It is not written `YYYY-MM-DD`, or there is no such day.
    """
    try:
        # `fromisoformat` reads other forms too, such as 20261128.
        if date.fromisoformat(day).isoformat() == day:
            return datetime.fromisoformat(day)
    except (TypeError, ValueError):
        pass
    raise UserError(f"date must be a day, written YYYY-MM-DD, not {day!r}")


def local_day() -> str:
    """Today in this machine's time zone, `YYYY-MM-DD`."""
    return date.today().isoformat()
