"""Metrics and an observer of requests that do nothing, for servers whose counts a test does not ask for."""

from __future__ import annotations

from collections.abc import Mapping

from lamina.completions import Completion
from lamina.errors import LaminaError
from lamina.messages.engine_request import EngineRequest
from lamina.server.models import ModelState


class NoMetrics:
    """A `gate.Metrics`."""

    def render(self, models: Mapping[str, ModelState]) -> tuple[bytes, str]:
        return b"", "text/plain; charset=utf-8"

    def rejected(self, reason: str) -> None: ...

    def http(self, handler: str, method: str, status: int, seconds: float) -> None: ...


class Unobserved:
    """A `frontend.Observer`."""

    def first_token(self, seconds: float) -> None: ...

    def next_tokens(self, seconds: float, count: int) -> None: ...

    def ended(self, request: EngineRequest, completion: Completion, seconds: float) -> None: ...

    def failed(self, request: EngineRequest, error: LaminaError) -> None: ...
