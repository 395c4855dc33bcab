"""Slow masks: in the registry of requests, and in a running engine."""

from __future__ import annotations

import threading
from typing import Any, cast

import numpy as np
import pytest
from engine_rig import Rig as EngineRig
from engine_rig import collect, tiny_decoder
from registry_rig import Choice, Rig, constrained

from lamina.errors import EngineError
from lamina.messages.engine_request import EngineRequest
from lamina.sampling_params import SamplingParams


def late(name: str, *text: int, tokens: int = 9) -> tuple[Rig, Choice, EngineRequest]:
    """A request whose first token is sampled, but not yet what may follow it, and another one that goes on."""
    rig, choice = Rig(recorded=True, patience=0.0), Choice(*text)
    choice.gate.clear()
    request = constrained(rig, name, choice, tokens=tokens)
    rig.submit("b", prompt=(9, 9))
    rig.step()
    assert rig.tokens(name) == [7]
    return rig, choice, request


def test_sample_whose_mask_is_late_is_left_out_of_batches_until_it_is_there() -> None:
    """The engine's thread computed all masks: a grammar with slow ones stopped the other requests too."""
    rig, choice, _ = late("a", 7, 7)
    for _ in range(2):
        rig.step()
    assert (rig.tokens("a"), rig.tokens("b"), rig.reasons("b")) == ([7], [7, 7, 7], ["length"])
    assert rig.scheduler.plan() is None
    choice.gate.set()
    rig.mail.get(timeout=60)()
    rig.step()
    rig.mail.get(timeout=60)()
    assert (rig.tokens("a"), rig.reasons("a")) == ([7, 7], ["stop"])
    rig.check_empty()


@pytest.mark.parametrize(("text", "reason"), [((7,), "stop"), ((7, 7), "length")])
def test_last_token_of_a_sample_whose_mask_is_late_ends_for_the_same_reason(text, reason) -> None:
    rig, choice, _ = late("a", *text, tokens=1)
    assert rig.reasons("a") == []
    choice.gate.set()
    rig.mail.get(timeout=60)()
    assert rig.reasons("a") == [reason]
    assert (reason, [0]) in rig.log
    rig.registry.end(rig.registry.requests["b"], None, "abort")
    rig.check_empty()


@pytest.mark.parametrize("tokens", [1, 9])
def test_mask_that_is_late_is_of_no_use_once_its_request_has_ended(tokens: int) -> None:
    rig, choice, request = late("a", 7, 7, tokens=tokens)
    rig.registry.fail(request, EngineError("it has failed"))
    choice.gate.set()
    rig.mail.get(timeout=60)()
    assert (rig.reasons("a"), rig.errors("a")) == ([], ["it has failed"])
    rig.registry.end(rig.registry.requests["b"], None, "abort")
    rig.check_empty()


def test_late_mask_of_a_token_that_leaves_the_constraint_fails_its_request() -> None:
    rig, choice, _ = late("a", 5, 7)
    choice.gate.set()
    rig.mail.get(timeout=60)()
    assert rig.errors("a") == ["token 7 is not allowed"]
    rig.registry.end(rig.registry.requests["b"], None, "abort")
    rig.check_empty()


class Slow:
    """A constraint that allows everything, whose masks take until `gate` is open."""

    slow, spent, finished = False, 0.0, False

    def __init__(self, gate: threading.Event) -> None:
        self._gate = gate
        self.allowed = np.full(4, -1, np.int32)

    def advance(self, *tokens: int) -> None:
        assert self._gate.wait(60)

    def after(self, drafts: int) -> Any:
        return self.allowed

    def impossible(self, tokens: Any, ignore_eos: bool, drafts: int) -> tuple[int, ...]:
        return tuple(tokens)


class SlowGrammars:
    """Makes such constraints."""

    def __init__(self) -> None:
        self.gate = threading.Event()

    def constraints(self, params: SamplingParams, count: int) -> tuple[Slow, ...]:
        return tuple(Slow(self.gate) for _ in range(count)) if params.constrained else ()


def test_an_engine_goes_on_while_a_mask_takes_its_time_and_rests_where_nothing_else_is_left() -> None:
    """A mask was computed on the engine's thread, so every request waited for it."""
    grammars = SlowGrammars()
    engine = EngineRig(tiny_decoder(), grammars=cast(Any, grammars))
    held, free = (
        engine.submit([1, 2, 3], SamplingParams(max_tokens=12, ignore_eos=True, **more).with_defaults({}))[1]
        for more in ({"n": 2, "regex": "a*"}, {})
    )
    [others] = collect(free)
    assert len(others) == 12
    grammars.gate.set()
    assert [len(tokens) for tokens in collect(held, 2)] == [12, 12]
    engine.close()
