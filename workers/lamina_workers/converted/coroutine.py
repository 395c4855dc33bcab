"""A model's own forward pass as a coroutine that stops at each attention: for models that cannot be recorded.

It runs in a greenlet, on the thread that drives it.
"""

from __future__ import annotations

import inspect
from collections.abc import Generator

import torch
from greenlet import getcurrent, greenlet

from lamina_workers.converted.attention_calls import AttentionCall, attention_by


def stepwise(
    model: torch.nn.Module, token_ids: torch.Tensor, positions: torch.Tensor | None, sampled: torch.Tensor
) -> Generator[AttentionCall, torch.Tensor, torch.Tensor]:
    """Run the model over token_ids and positions, `[1, T]`; without positions it counts them itself.

    Yields each attention, which is answered by `send`ing its output, `[1, T, heads, d_v]`; returns the logits of the
    tokens `sampled`, `[S, vocab]`.
    """

    def ask(call: AttentionCall) -> torch.Tensor:
        answer: torch.Tensor = getcurrent().parent.switch(call)
        return answer

    def body() -> torch.Tensor:
        with attention_by(ask):
            if "logits_to_keep" in inspect.signature(model.forward).parameters:
                logits: torch.Tensor = model(
                    input_ids=token_ids, position_ids=positions, use_cache=False, logits_to_keep=sampled
                ).logits
                return logits[0]
            logits = model(input_ids=token_ids, position_ids=positions, use_cache=False).logits
            return logits[0, sampled]

    runner = greenlet(body)
    try:
        event = runner.switch()
        while not runner.dead:
            answer = yield event
            runner.parent = getcurrent()
            event = runner.switch(answer)
    finally:
        if not runner.dead:
            runner.parent = getcurrent()
            runner.throw()  # GreenletExit, as where a generator is closed
    logits: torch.Tensor = event
    return logits
