"""Forked processes: an engine's threads stay in the process that made it, so a forked child can only be told so."""

from __future__ import annotations

import os

from lamina.errors import EngineError

SPAWN = "multiprocessing.get_context('spawn')"


def check_process(process: int, what: str) -> None:
    """Raise EngineError in a process that was forked from the one that made `what`."""
    if process != os.getpid():
        raise EngineError(
            f"{what} was made in process {process}, and this is {os.getpid()}, forked from it, without its threads; "
            f"make an LLM after the fork, or use {SPAWN}"
        )
