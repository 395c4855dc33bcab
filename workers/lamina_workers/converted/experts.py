"""A mixture's experts as transformers' models call them, as one operation: which have work is known when it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

_handler: ContextVar[Callable[..., torch.Tensor] | None] = ContextVar("lamina_experts", default=None)


@contextmanager
def experts_by(handler: Callable[..., torch.Tensor]) -> Iterator[None]:
    """Models that run in here give their experts' calls to `handler`: what computes them, module, args and kwargs."""
    token = _handler.set(handler)
    try:
        yield
    finally:
        _handler.reset(token)


def experts(module: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
    """What transformers calls. Gives a tensor like the first of `args`."""
    if (handler := _handler.get()) is not None:
        return handler(each_expert, module, args, kwargs)
    return torch.empty_like(args[0]) if args[0].is_meta else each_expert(module, *args, **kwargs)


def each_expert(module: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
    """The forward that the class has of its own: experts one by one, each for the tokens that chose it."""
    plain = type(module).forward.__wrapped__  # type: ignore[attr-defined]
    result: torch.Tensor = plain(module, *args, **kwargs)
    return result
