"""A worker that refuses without reason is given up, and costs no more than that: its sequences go on elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from engine_rig import BytesPort, Rig, Unnoticed, collect, one_process

from lamina.sampling_params import SamplingParams
from lamina.scheduling.blame import REFUSALS
from lamina_protocols.messages.messages import Request, answered

GREEDY = SamplingParams(max_tokens=12, temperature=0.0).with_defaults({})
LONG = [3 + at % 90 for at in range(700)]


def rig_with(decoder: Any, loses: Callable[[Request], bool], workers: Sequence[int] = (2,), **options: Any) -> Rig:
    """Three workers. Messages without a reply to `workers` are lost where `loses`, and nothing tells so."""

    def before(request: Request) -> None:
        if not answered(request) and loses(request):
            raise Unnoticed

    rig = Rig(decoder, weights=(1, 1, 1), max_batch_tokens=64, port=BytesPort, **options)
    for number in workers:
        rig.ports[number].before = before
    return rig


@pytest.mark.fault("F06")
@pytest.mark.parametrize("lanes", [1, 2])
@pytest.mark.parametrize("shard", ["heads", "sequence"])
def test_link_that_loses_every_store_message_costs_its_holder(decoder, shard, lanes):
    """The prompt was cut back, computed and lost again for ever: nobody counted how often."""
    expected = one_process(decoder, [LONG, LONG[:5]], max_tokens=12)
    rig = rig_with(decoder, lambda request: True, shard=shard, lanes=lanes)
    inboxes = [rig.submit(prompt, GREEDY)[1] for prompt in (LONG, LONG[:5])]
    assert [collect(inbox) for inbox in inboxes] == expected
    assert rig.ports[2].closed
    assert not rig.ports[1].closed
    assert not rig.ports[3].closed
    assert rig.scheduler.counters.preempted == 0
    rig.close()


@pytest.mark.fault("F06")
def test_messages_lost_now_and_then_cost_no_holder(decoder):
    expected = one_process(decoder, [LONG], max_tokens=12)
    sent: list[Request] = []

    def loses(request: Request) -> bool:
        sent.append(request)
        return len(sent) % 10 == 0

    rig = rig_with(decoder, loses, shard="heads")
    assert rig.generate([LONG], max_tokens=12) == expected
    assert len(sent) > 10 * REFUSALS
    assert not any(port.closed for port in rig.ports.values())
    rig.close()


@pytest.mark.parametrize("model", ["decoder", "windowed"])
def test_text_is_the_same_when_keys_are_lost_on_their_way(model, request):
    """Only the engine's notes of faults stood between a lost message and wrong text: one that was lost without any
    fault was never missed, and its positions were attended as whatever the page had before."""
    decoder = request.getfixturevalue(model)
    expected = one_process(decoder, [LONG], max_tokens=40)
    sent: list[Request] = []  # in each layer each of three workers gets one

    def loses(request: Request) -> bool:
        sent.append(request)
        return len(sent) in (20, 120, 204, 316)

    # q goes first, so keys have a message of their own
    rig = rig_with(decoder, loses, (1, 2, 3), shard="heads", fuses=False)
    assert rig.generate([LONG], max_tokens=40) == expected
    assert len(sent) > 400
    assert not any(port.closed for port in rig.ports.values())
    rig.close()
