"""Holders die and drain while requests run: only lost KV is computed again, and what cannot be has an error. That the
text stays the same is in `engine/test_one_text`."""

from __future__ import annotations

import random
import threading

import pytest
from engine_rig import BytesPort, Rig, one_process
from faulty_ports import FaultyPorts

from lamina.errors import EngineError, InvalidRequest
from lamina.sampling_params import SamplingParams
from lamina_protocols.messages.messages import Announcement, Exchange, Fresh
from lamina_workers.errors import HolderLost

rng = random.Random(5)
PROMPTS = [[rng.randrange(101) for _ in range(n)] for n in (3, 40, 70, 150)]
GREEDY = {"max_tokens": 40}
MESSAGES = (Announcement, Exchange, Fresh)


@pytest.mark.parametrize("local_pool", [500, 0])
def test_surviving_holders_store_nothing_again(decoder, local_pool):
    """By heads: the forward pass repeats, but only the lost heads' keys are sent and stored."""
    prompt, before = PROMPTS[3], {}

    def dies(port):
        before.update((number, worker.counters.vectors_stored) for number, worker in rig.workers.items())
        raise HolderLost("killed")

    ports = FaultyPorts(150, dies, MESSAGES)
    rig = Rig(decoder, port=ports, shard="heads", weights=(1, 1, 1), local_pool=local_pool)
    assert rig.generate([prompt], max_tokens=30) == one_process(decoder, [prompt], max_tokens=30)
    left = [number for number, port in rig.ports.items() if port is not ports.struck[0]]
    # Of a token three vectors are stored for each head, one in each layer.
    least, most = sorted(rig.workers[number].counters.vectors_stored - before[number] for number in left)
    assert least < 30 * 3  # the rerun of the dropped batch, and what came after it: one token a step
    assert most >= len(prompt) * 3 + least  # the holder that took over the lost heads
    assert rig.scheduler.counters.rebuilt_tokens >= len(prompt)
    rig.close()


def test_only_the_lost_range_of_positions_is_computed_again(decoder):
    prompt = PROMPTS[3]  # 150 tokens and 30: ranges of 64, 64, and the rest
    expected = one_process(decoder, [prompt], max_tokens=30)
    rig = Rig(decoder, port=BytesPort, shard="sequence", weights=(1, 1, 1), local_pool=500)
    params = SamplingParams(max_tokens=30).with_defaults({})
    request, inbox = rig.submit(prompt, params)
    first = inbox.get(timeout=60)
    (middle,) = [share for share in request.sequences[0].layout if share.lo == 64]
    rig.engine.leave(f"worker-{middle.holder}")
    tokens = [output.token for output in first]
    while len(tokens) < 30:
        tokens += [output.token for output in inbox.get(timeout=60)]
    assert tokens == expected[0][0]
    assert rig.scheduler.counters.rebuilt_tokens == 64
    rig.close()


@pytest.mark.fault("F02")
def test_requests_end_with_an_error_when_no_holder_is_left(decoder):
    rig = Rig(decoder, port=FaultyPorts(40, HolderLost("killed"), MESSAGES), shard="heads", wait=0.3)
    with pytest.raises(EngineError, match=r"no attention worker is left, and none has joined for 0\.3 s"):
        rig.generate(PROMPTS, **GREEDY)
    with pytest.raises(EngineError, match="no attention worker is left"):
        rig.generate(PROMPTS[:1], **GREEDY)
    assert rig.engine.alive
    rig.close()


def test_drain_refuses_and_names_an_unknown_or_only_worker(decoder):
    rig = Rig(decoder, shard="heads")
    with pytest.raises(InvalidRequest, match="no attention worker is called 'unknown'; there are worker-1"):
        rig.engine.drain("unknown").result(timeout=60)
    with pytest.raises(InvalidRequest, match="the only attention worker"):
        rig.engine.drain("worker-1").result(timeout=60)
    rig.close()


@pytest.mark.parametrize("stops", [False, True])
def test_cancelled_drain_does_no_harm(decoder, stops):
    rig = Rig(decoder, shard="heads", weights=(1, 1))
    busy, gate = threading.Event(), threading.Event()
    rig.engine.snapshot(lambda _: (busy.set(), gate.wait(60)))
    busy.wait(60)
    if stops:
        rig.engine.close()
    assert rig.engine.drain("worker-2").cancel()
    _, inbox = rig.submit(PROMPTS[0], SamplingParams(**GREEDY))
    gate.set()
    if stops:
        assert isinstance(inbox.get(timeout=60)[0].error, EngineError)
    else:
        assert len(rig.generate(PROMPTS[:1], **GREEDY)[0][0]) == 40
    rig.close()


def test_shared_kv_is_rebuilt_once(decoder):
    prompt, sampling = PROMPTS[3], {"n": 4, "temperature": 1.0, "seed": 3, "max_tokens": 30}
    ports = FaultyPorts(150, HolderLost("killed"), MESSAGES)
    rig = Rig(decoder, port=ports, shard="heads", weights=(1, 1, 1), local_pool=500)
    assert rig.generate([prompt], **sampling) == one_process(decoder, [prompt], **sampling)
    assert len(prompt) <= rig.scheduler.counters.rebuilt_tokens < 2 * len(prompt)
    rig.close()
