"""Whole engines of models with states, and what goes wrong beside them."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import whole_engines
from hybrid_families import VOCABULARY, written
from whole_engines import engine

from lamina import LLM
from lamina.kv.running import Counters
from lamina.scheduling.step_tuner import MeasuredBatch, StepTuner
from lamina_protocols.errors import ProtocolError
from lamina_protocols.messages.messages import Advanced, Fault, Reply
from lamina_workers.attention_worker.attention_worker import AttentionWorker
from lamina_workers.attention_worker.state_pool import StatePool
from lamina_workers.model_worker import compiled_exchange
from lamina_workers.ports.remote import RemoteAttention

FAMILIES = {"gated delta": "qwen3_5", "mamba2 beside attention": "falcon_h1", "lightning": "minimax"}
TOKENS = 60
Texts = list[tuple[int, ...]]

every_family = pytest.mark.parametrize("family", FAMILIES)
one_family = pytest.mark.parametrize("family", ["mamba2 beside attention"])
_draw = random.Random(7)
PROMPTS = [[_draw.randrange(3, VOCABULARY) for _ in range(length)] for length in (3, 90, 41, 150)]


def written_models(folder: Path) -> dict[str, Path]:
    """A model of each family."""
    for family in FAMILIES.values():
        written(family, folder / family)
    return {name: folder / family for name, family in FAMILIES.items()}


def texts_alone(models: dict[str, Path]) -> dict[str, Texts]:
    """What each says in one process."""
    answers = {}
    for family, folder in models.items():
        with engine(folder) as llm:
            answers[family] = texts(llm)
    return answers


def texts(llm: LLM, prompts: Sequence[list[int]] = PROMPTS) -> Texts:
    tokens = whole_engines.texts(llm, prompts, TOKENS)
    llm._runtime.engine._scheduler.check_integrity()  # type: ignore[union-attr]
    return tokens


def counters(llm: LLM) -> Counters:
    return llm._runtime.engine._scheduler.counters  # type: ignore[union-attr,no-any-return]


def fail_in_layers(patch: pytest.MonkeyPatch) -> list[Any]:
    """Have a holder in this process refuse some messages, which it is sent then. Those that it refused."""
    chance, handle, struck = random.Random(5), StatePool.handle, []

    def fails(pool: StatePool, *given: Any) -> Advanced:
        if chance.random() < 0.02:
            struck.append(given)
            raise ProtocolError("struck")
        return handle(pool, *given)

    patch.setattr(AttentionWorker, "state_work", lambda *_: None)
    patch.setattr(StatePool, "layer_work", lambda *_: None)
    patch.setattr(StatePool, "handle", fails)
    return struck


def lose_answers(patch: pytest.MonkeyPatch, share: float) -> list[Reply]:
    """Have some answers of a layer lost, which Python carries then: workers have gone on by unlike numbers of layers.
    Those that were."""
    chance, receive, struck = random.Random(5), RemoteAttention.receive, []

    def loses(port: RemoteAttention, timeout: float | None = None) -> Reply:
        reply = receive(port, timeout)
        if isinstance(reply, Advanced) and chance.random() < share:
            struck.append(reply)
            return Fault(reply.epoch, reply.batch, "KVError: struck")
        return reply

    patch.setattr(compiled_exchange, "STATE_FRAMES", "none that a worker has")
    patch.setattr(RemoteAttention, "receive", loses)
    return struck


def be_restless(patch: pytest.MonkeyPatch) -> None:
    """Have the local share change all the time."""
    chance = random.Random(3)

    def restless(tuner: StepTuner, batch: MeasuredBatch, moving: bool = False) -> None:
        if chance.random() < 0.3:
            tuner.share = chance.choice((0.0, 0.3, 0.7, 1.0))

    patch.setattr(StepTuner, "completed", restless)


def kill_at(llm: LLM, at: int) -> Callable[[int], None]:
    """Kills the first attention worker once there are so many tokens."""
    members = llm._runtime.pools.attention.workers  # type: ignore[union-attr]

    def strike(count: int) -> None:
        if count == at:
            os.kill(members.status()[0].process or 0, signal.SIGKILL)

    return strike
