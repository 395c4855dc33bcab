"""A request on which a holder or the model fails: it ends with an error that says so, and no other loses anything."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
from engine_rig import BytesPort, Rig, collect, one_process, tiny_decoder

from lamina.engine.failures import MAX_IN_VAIN
from lamina.errors import EngineError
from lamina.kv.placement import Holder
from lamina.sampling_params import SamplingParams
from lamina.scheduling.blame import TRIES
from lamina_protocols.errors import ProtocolError
from lamina_protocols.messages.messages import Announcement, Exchange, Query, Request
from lamina_workers.attention_worker.attention_worker import AttentionWorker
from lamina_workers.attention_worker.device_worker import attention_worker
from lamina_workers.errors import HolderLost

LONG = 150  # tokens of the poisonous prompt; its first decode step fails
GREEDY = SamplingParams(max_tokens=60, temperature=0.0).with_defaults({})


@pytest.fixture(scope="module")
def decoder() -> Any:
    return tiny_decoder()


class Poison:
    """Ports to holders on which each decode step of `sequence` fails: its `kind` says where, and how."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.tries: set[int] = set()  # batches
        self.parts: Any = lambda handle: ()
        self.sequence: Any = None

    def port(self, worker: AttentionWorker) -> BytesPort:
        failing: set[int] = set()

        def before(request: Request) -> None:
            if isinstance(request, Announcement) and self.sequence is not None:
                handles = {part.handle for part in self.parts(self.sequence.handle)}
                if any(row.handle in handles and row.start >= LONG for row in request.rows):
                    failing.add(request.batch)
            announced = isinstance(request, Announcement) and self.kind == "announcement"
            asked = isinstance(request, Query | Exchange) and self.kind != "announcement" and request.layer == 1
            if (announced or asked) and request.batch in failing:
                failing.discard(request.batch)
                self.tries.add(request.batch)
                raise {
                    "announcement": ProtocolError("cannot be announced"),
                    "fault": ProtocolError("cannot be attended"),
                    "error": RuntimeError("can't allocate memory"),
                    "death": HolderLost("the process died"),
                }[self.kind]

        return BytesPort(worker, before)


def outputs(inbox: Any) -> Iterator[Any]:
    while True:
        yield from inbox.get(timeout=60)


@pytest.mark.fault("F15")
@pytest.mark.parametrize("lanes", [1, 2, 3])
@pytest.mark.parametrize("kind", ["announcement", "fault", "error", "death"])
def test_request_on_which_batches_fail_ends_alone_and_others_lose_nothing(decoder, kind, lanes):
    """The count of faults was everybody's: with two lanes it never came to three, a dead holder was not counted, and a
    RuntimeError ended the engine with all its requests."""
    prompts = [[1, 2, 3, 4 + at] for at in range(6)]
    expected = one_process(decoder, prompts, max_tokens=60)
    poison = Poison(kind)
    rig = Rig(decoder, shard="heads", weights=(1, 1), lanes=lanes, max_batch_tokens=256, port=poison.port)
    joined: list[str] = []

    def join(name: str) -> None:
        port = poison.port(attention_worker(rig.holder))
        port.name = f"again-{len(joined)}"
        joined.append(name)
        rig.engine.join(port, Holder((rig.pages,), 1))

    failures = rig.engine._failures
    failures._reports = dataclasses.replace(failures._reports, lost=join)
    poison.parts = rig.placement.parts
    healthy = [rig.submit(prompt, GREEDY)[1] for prompt in prompts]
    ticket, inbox = rig.submit([5] * LONG, GREEDY)
    first = next(output for output in outputs(inbox))
    assert first.token is not None
    (poison.sequence,) = ticket.sequences
    error = next(output.error for output in outputs(inbox) if output.error is not None)
    assert isinstance(error, EngineError)
    assert "failed with this request" in str(error)
    assert [collect(each) for each in healthy] == expected
    assert len(poison.tries) == TRIES
    assert len(joined) == (TRIES if kind == "death" else 0)
    rig.engine.close()
    rig._thread.join()


@pytest.mark.fault("F15")
@pytest.mark.parametrize("sound", [True, False])
def test_only_an_engine_that_computes_nothing_any_more_ends_for_its_requests(decoder, sound):
    """Each request failed alone, and the eighth ended the engine with all others."""

    class Port(BytesPort):
        def close(self) -> None:
            """As one in this process, which is not lost however often it fails."""

    def port(worker: AttentionWorker) -> BytesPort:
        def before(request: Request) -> None:
            if isinstance(request, Announcement) and any(row.count > 1 or not sound for row in request.rows):
                raise ProtocolError("more than a frame has")

        return Port(worker, before)

    rig = Rig(decoder, shard="heads", weights=(1, 1), port=port)
    inboxes: list[Any] = []
    with contextlib.suppress(EngineError):  # it may end while they come
        inboxes.extend(rig.submit([3, 5 + at, 7], GREEDY)[1] for at in range(2 * MAX_IN_VAIN))
    errors = [str(next(output.error for output in outputs(inbox) if output.error)) for inbox in inboxes]
    if sound:
        assert all("failed with this request" in error for error in errors)
        assert rig.generate([[5]], max_tokens=4) == one_process(decoder, [[5]], max_tokens=4)
        rig.close()
        return
    rig._thread.join(60)
    with pytest.raises(EngineError, match="no batch goes well any more"):
        rig.submit([5], GREEDY)


@pytest.mark.fault("F15")
def test_honest_holder_is_kept_however_many_requests_fail_at_it(decoder):
    """Six failures in a row were counted for all requests together: of four bad ones that came at once."""
    ports: list[BytesPort] = []

    def port(worker: AttentionWorker) -> BytesPort:
        def before(request: Request) -> None:
            if isinstance(request, Announcement) and any(row.count > 1 for row in request.rows):
                raise ProtocolError("more than a frame has")

        ports.append(BytesPort(worker, before))
        return ports[-1]

    rig = Rig(decoder, shard="heads", weights=(1, 1), port=port)
    inboxes = [rig.submit([3, 5 + at, 7], GREEDY)[1] for at in range(6)]
    errors = [str(next(output.error for output in outputs(inbox) if output.error)) for inbox in inboxes]
    assert all("failed with this request" in error for error in errors)
    assert not any(port.closed for port in ports)
    rig.close()
