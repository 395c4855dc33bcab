"""What a server is to run, and how its supervisor says what happens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from lamina.server.settings import ServerSettings
from lamina_protocols.messages.layers import ColdTier


class Reporter(Protocol):
    """Shows people what happens."""

    def progress(self, what: str, done: int, total: int | None) -> None: ...

    def said(self, message: str) -> None: ...


@dataclass(frozen=True, slots=True)
class JoinPlan:
    """Where a server takes machines that join, and the folder in which it remembers them."""

    host: str
    port: int
    folder: Path


@dataclass(frozen=True, slots=True)
class ServerPlan:
    """What is to run. `models` are the models by the names under which they are served, `engine` the keywords of
    `EngineConfig` for each, as JSON can hold them; `workers` how many attention workers the supervisor starts, and
    `most_workers` how many it may have later. Each has `threads` threads and `kv_memory` bytes of KV, which goes to
    `cold` when it is not read. An attention worker serves one engine at a time, so with workers at most one model is
    loaded."""

    models: Mapping[str, str]
    engine: Mapping[str, Any]
    settings: ServerSettings
    host: str
    port: int
    workers: int = 0
    most_workers: int = 0
    kv_memory: int = 0
    cold: ColdTier | None = None
    threads: int = 1
    drain: float = 30.0  # seconds that requests under way get after SIGTERM
    journal: bool = False  # in the supervisor's own folder, unless the engine's keywords name another
    log_level: str = "info"
    log_format: str = "text"
    joining: JoinPlan | None = None

    @property
    def waits(self) -> bool:
        """Whether an engine gets attention workers from the supervisor."""
        return bool(self.workers or self.most_workers) or self.joining is not None
