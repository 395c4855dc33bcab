"""The engine process of one model: started on demand, started again when it dies, ended when it is not needed."""

from __future__ import annotations

import urllib.parse
from dataclasses import dataclass
from typing import Any

from lamina.deploy.supervision import Backoff, Slot
from lamina.system.child_process import ChildProcess


@dataclass(eq=False)
class EngineRole(Slot[ChildProcess]):
    """The engine of the model that is served as `model`, which is loaded from `source`. Not loaded at first."""

    model: str = ""
    source: str = ""
    due: float | None = None
    starts: int = 0  # of all processes so far
    loads: int = 0  # how often it was loaded
    fresh: bool = True  # no process has been ready since it was last loaded
    ending: bool = False  # it is being unloaded
    facts: dict[str, Any] | None = None  # of the engine that is ready
    loading: str = ""  # how far the start is

    @property
    def loaded(self) -> bool:
        """Whether it is loaded, or to be."""
        return self.worker is not None or self.due is not None

    @property
    def socket_name(self) -> str:
        """Of each start another, so that no client reaches an engine by the name of the previous one."""
        return f"engine-{self.number}.{self.starts}.sock"

    @property
    def file_name(self) -> str:
        """The model's name as a name in a folder: no two names have the same."""
        return urllib.parse.quote(self.model, safe="").replace(".", "%2E")

    def load(self) -> None:
        """Have it started; without effect where it is, or is about to be."""
        if not self.loaded:
            self.due, self.fresh, self.backoff = 0.0, True, Backoff(self.backoff.first)
            self.loads += 1

    def started(self, worker: ChildProcess) -> None:
        """A process runs."""
        self.worker, self.facts, self.loading = worker, None, ""

    def ready(self, facts: dict[str, Any]) -> None:
        """The process serves."""
        self.facts, self.fresh = facts, False

    def gone(self) -> None:
        """It is not loaded any more, and not started again."""
        self.give_up()
        self.facts, self.ending, self.loading = None, False, ""
