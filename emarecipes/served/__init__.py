"""What a server does with an adapter, and what it does here: `python -m emarecipes.served`."""

from emarecipes.served.command import run_served

__all__ = ["run_served"]
