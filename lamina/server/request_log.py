"""One log line for each request that has been answered, with what it cost."""

from __future__ import annotations

import logging
from contextvars import ContextVar
from dataclasses import dataclass

from lamina.completions import Completion
from lamina.errors import LaminaError
from lamina.messages.engine_request import EngineRequest
from lamina.server.frontend import Observer

logger = logging.getLogger("lamina")


@dataclass(slots=True)
class RequestCost:
    """What the prompts of one HTTP request took, summed; the times are of its first prompt. `error` is the last one."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    tokens: int = 0
    first_token: float = 0.0
    tokens_per_second: float = 0.0
    error: str = ""


_cost: ContextVar[RequestCost | None] = ContextVar("lamina_request_cost", default=None)


def begin_cost() -> RequestCost:
    """Have the prompts that the running task submits from now on counted."""
    _cost.set(cost := RequestCost())
    return cost


def note_error(why: str) -> None:
    """Have the line of the running task's request end with why it was refused or failed."""
    if (cost := _cost.get()) is not None:
        cost.error = why


def log_request(method: str, path: str, status: int, seconds: float, cost: RequestCost, level: int) -> None:
    """Write the line of a request: `POST /v1/completions 200 in 3.21 s: 812 prompt tokens (640 cached), first token
    after 0.31 s, 150 tokens, 51.2 a second`."""
    fields: dict[str, object] = {"method": method, "path": path, "status": status, "seconds": round(seconds, 4)}
    text = f"{method} {path} {status} in {seconds:.2f} s"
    if cost.prompt_tokens:
        cached = f" ({cost.cached_tokens} cached)" if cost.cached_tokens else ""
        text += f": {cost.prompt_tokens} prompt tokens{cached}"
        fields |= {"prompt_tokens": cost.prompt_tokens, "cached_tokens": cost.cached_tokens, "tokens": cost.tokens}
    if cost.tokens:
        text += f", first token after {cost.first_token:.2f} s, {cost.tokens} tokens"
        text += f", {cost.tokens_per_second:.1f} a second" if cost.tokens_per_second else ""
        fields |= {"first_token": cost.first_token, "tokens_per_second": cost.tokens_per_second}
    if cost.error:
        text += f"; {cost.error}"
        fields["error"] = cost.error
    logger.log(level, "%s", text, extra={"fields": fields})


class CostObserver:
    """An observer that adds each prompt to the cost of the running task's request. Calls go on to the observer behind
    it, those for tokens directly."""

    def __init__(self, behind: Observer) -> None:
        self._behind = behind
        self.first_token = behind.first_token
        self.next_tokens = behind.next_tokens

    def ended(self, request: EngineRequest, completion: Completion, seconds: float) -> None:
        self._behind.ended(request, completion, seconds)
        cost, usage, timing = _cost.get() or RequestCost(), completion.usage, completion.timing
        if not cost.prompt_tokens:
            cost.first_token, cost.tokens_per_second = timing.first_token, timing.tokens_per_second
        cost.prompt_tokens += usage.prompt_tokens
        cost.cached_tokens += usage.cached_tokens
        cost.tokens += usage.completion_tokens

    def failed(self, request: EngineRequest, error: LaminaError) -> None:
        self._behind.failed(request, error)
        note_error(str(error))
