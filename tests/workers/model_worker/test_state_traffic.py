"""Layers with states over attention workers, behind every kind of port, against the recurrence."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from attention_servers import WAYS, connected, running
from exchange_peers import EXCHANGES, Joints, exchanged
from state_layers import D_V, HEADS, KINDS, Inputs, config, constants

from lamina_protocols.frames.tensors import FLOAT_NAMES
from lamina_protocols.messages.messages import Advance, Advanced, Announced, Announcement, Attended, Fault, Open, Row
from lamina_protocols.messages.routes import HolderBatch, Route, Span
from lamina_workers.attention_worker.attention_worker import AttentionWorker
from lamina_workers.decoder.model import StateReady
from lamina_workers.errors import HolderFault, HolderLost
from lamina_workers.model_worker.attention_merge import AttentionMerge
from lamina_workers.model_worker.interface import result
from lamina_workers.model_worker.kv_copy import Move
from lamina_workers.model_worker.model_worker import ModelWorker
from lamina_workers.model_worker.state_traffic import send_constants
from lamina_workers.ports.port import LocalAttention, Replies, survey
from lamina_workers.ports.remote import RemoteAttention

ALL = tuple(range(HEADS))
CUTS = {  # where holders are, and the heads of each
    "here": [("here", ALL)],
    "there": [("there", ALL)],
    "two": [("there", (0, 1)), ("there", (2, 3))],
    "mixed": [("there", (0, 3)), ("here", (1, 2))],
}


class Tier:
    """Holders of states and the model's side of them. Sequences go by number; a part's handle is that number."""

    def __init__(self, kind: str, cut: str, dtype: torch.dtype = torch.float32, knowing: int = 9) -> None:
        """`knowing`: how many of the holders are told constants."""
        self.config = config(kind)
        self.heads = [heads for _, heads in CUTS[cut]]
        self.joints = Joints(compute_dtype=FLOAT_NAMES[dtype])
        self.workers = [AttentionWorker(self.config) for _ in self.heads]
        self.ports = [
            LocalAttention(worker) if place == "here" else self.joints(worker)
            for worker, (place, _) in zip(self.workers, CUTS[cut], strict=True)
        ]
        self.replies = [Replies(port) for port in self.ports]
        self.merge = AttentionMerge(self.config)
        self.batch = 0
        self.dtype = dtype
        self.operations = 0
        for port in self.ports[:knowing]:
            self.tell(port)

    def tell(self, port):
        for layer, of in enumerate(self.config.layers):
            if of.conv:
                port.send(constants(of, layer))

    def announce(self, rows, operations=(), epoch=1):
        """Announce rows (sequence, start, end) at all holders: their answers."""
        self.batch += 1
        answers = []
        for port, heads in zip(self.ports, self.heads, strict=True):
            own = [dataclasses.replace(each, heads=heads) if isinstance(each, Open) else each for each in operations]
            asked = tuple(Row(handle, start, end - start, (0, start) if start else None, True)
                          for handle, start, end in rows)  # fmt: skip
            port.send(Announcement(epoch, self.batch, self.operations, tuple(own), asked))
            answers.append(port.receive(10))
        self.operations += len(operations)
        return answers

    def forward(self, parts, layers=2):
        """What a decoder yields for parts (sequence, start, end, inputs). Returns the outputs of so many layers."""
        outs = []
        for layer in range(layers):
            x = torch.cat([inputs.x[layer][start:end] for _, start, end, inputs in parts]).to(self.dtype)
            gates = torch.cat([inputs.gates[layer][start:end] for _, start, end, inputs in parts])
            answer = yield StateReady(layer, x, gates)
            outs.append(answer.clone())
        return torch.stack(outs)

    def run(self, parts, epoch=1, layers=2):
        """Run the announced batch."""
        spans = [Span(start, end - start) for _, start, end, _ in parts]
        routes = {}
        for replies, heads in zip(self.replies, self.heads, strict=True):
            routes[replies] = [
                Route(source, heads, Row(handle, start, end - start, (0, start) if start else None, True), (start, end))
                for source, (handle, start, end, _) in enumerate(parts)
            ]
            replies.expect(epoch, self.batch)
            replies.accepted(self.batch)
        return result(self.merge.run(self.forward(parts, layers), epoch, self.batch, spans, routes))

    def step(self, parts, operations=(), epoch=1):
        """Announce and run: the outputs `[layers, T, heads * d_v]`."""
        answers = self.announce([part[:3] for part in parts], operations, epoch)
        assert all(answer.accepted for answer in answers), answers
        return self.run(parts, epoch)

    def check(self):
        for worker in self.workers:
            worker.check_integrity()


@pytest.fixture
def tier() -> Iterator:
    made = []

    def make(*asked, **options):
        made.append(Tier(*asked, **options))
        return made[-1]

    yield make
    for each in made:
        each.joints.close()


def opened(handle):
    return Open(handle, 0, ALL, 0, 1000)


def inputs_of(kind, tokens, seed=0):
    return Inputs.random(config(kind).layers, tokens, seed)


def close(found, inputs, start, end):
    wanted = torch.stack([each[start:end] for each in inputs.outputs()])
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_runs_again_from_its_start(tier, kind):
    """Whole, and where it was given up after the first layer; in a new epoch too."""
    at, inputs = tier(kind, "mixed"), inputs_of(kind, 16)
    at.step([(1, 0, 5, inputs)], [opened(1)])
    close(at.step([(1, 5, 9, inputs)]), inputs, 5, 9)
    assert all(answer.accepted for answer in at.announce([(1, 5, 12)]))
    at.run([(1, 5, 12, inputs)], layers=1)
    (there, here) = at.announce([(1, 12, 13)], epoch=2)
    assert (there.accepted, there.starts, here.starts) == (False, (5,), (5,))
    close(at.step([(1, 5, 12, inputs)], epoch=2), inputs, 5, 12)
    close(at.step([(1, 12, 16, inputs)], epoch=2), inputs, 12, 16)
    at.check()


def test_what_is_kept_survives_its_engine(tier):
    """A survey says what is whole; the next engine goes on from there."""
    at, inputs = tier("mamba2", "mixed"), inputs_of("mamba2", 16)
    at.step([(1, 0, 5, inputs)], [opened(1)])
    at.step([(1, 5, 9, inputs), (2, 0, 3, inputs)], [opened(2)])
    at.announce([(2, 3, 4)])
    at.run([(2, 3, 4, inputs)], layers=1)
    for port, heads in zip(at.ports, at.heads, strict=True):
        found = survey(port, 10, past=1)
        assert [(part.handle, part.heads, part.lo, part.held, part.floor) for part in found.parts] == [
            (1, heads, 0, 9, 5),
            (2, heads, 0, 3, 3),
        ]
    found = at.step([(1, 9, 10, inputs), (2, 3, 9, inputs)], epoch=2)
    close(found[:, :1], inputs, 9, 10)
    close(found[:, 1:], inputs, 3, 9)


def test_inputs_travel_in_the_compute_dtype(tier):
    at, inputs = tier("gated_delta", "two", dtype=torch.bfloat16), inputs_of("gated_delta", 9)
    found = at.step([(1, 0, 9, inputs)], [opened(1)])
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found[0].float(), inputs.outputs()[0], rtol=0.05, atol=0.05)


def test_a_holder_here_is_given_the_tensors_themselves(tier):
    at, inputs = tier("mamba2", "here"), inputs_of("mamba2", 9)
    seen = []
    send = at.ports[0].send
    at.ports[0].send = lambda request: (seen.append(request), send(request))[1]
    at.announce([(1, 0, 9)], [opened(1)])
    forward = at.forward([(1, 0, 9, inputs)])
    given = []

    def kept():
        event = next(forward)
        while True:
            given.append(event)
            try:
                event = forward.send((yield event))
            except StopIteration as stop:
                return stop.value

    route = Route(0, ALL, Row(1, 0, 9, None, True), (0, 9))
    at.replies[0].expect(1, 1)
    result(at.merge.run(kept(), 1, 1, [Span(0, 9)], {at.replies[0]: [route]}))
    sent = [each for each in seen if isinstance(each, Advance)]
    for event, message in zip(given, sent, strict=True):
        assert message.x.data_ptr() == event.x.data_ptr()
        assert message.gates.data_ptr() == event.gates.data_ptr()


@pytest.fixture
def answers(monkeypatch) -> list[Advanced]:
    """The answers of layers with states that Python has read off channels."""
    read: list[Advanced] = []
    plain = RemoteAttention.receive

    def receive(self, timeout=None):
        reply = plain(self, timeout)
        if isinstance(reply, Advanced):
            read.append(reply)
        return reply

    monkeypatch.setattr(RemoteAttention, "receive", receive)
    return read


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_decoded_tokens_go_without_python_and_give_the_same_bits(tier, answers, kind, cut, dtype):
    """But where the gates of a head have an odd number: vectors of some heads are gathered by 8 bytes."""
    inputs, outs = inputs_of(kind, 16), {}
    for way in EXCHANGES:
        with exchanged(way):
            at = tier(kind, cut, dtype)
            at.step([(1, 0, 5, inputs), (2, 0, 3, inputs)], [opened(1), opened(2)])
            answers.clear()
            outs[way] = [at.step([(1, n, n + 1, inputs), (2, n - 2, n - 1, inputs)]) for n in range(5, 12)]
            assert bool(answers) == (cut != "here" and (way == "python" or (kind == "kda" and cut != "there")))
            at.check()
    assert all(map(torch.equal, *outs.values()))
    if dtype == torch.float32:
        close(torch.cat(outs["compiled"], 1)[:, ::2], inputs, 5, 12)


def test_a_worker_that_does_not_know_the_frames_is_sent_messages(tier, answers):
    at, inputs = tier("gated_delta", "there"), inputs_of("gated_delta", 9)
    at.ports[0].features = frozenset()
    at.step([(1, 0, 5, inputs)], [opened(1)])
    answers.clear()
    close(at.step([(1, 5, 6, inputs)]), inputs, 5, 6)
    assert len(answers) == 2


@pytest.mark.parametrize("cut", ["there", "two", "mixed"])
def test_a_decoded_batch_that_was_given_up_after_a_layer_runs_again(tier, cut):
    at, inputs = tier("gated_delta", cut), inputs_of("gated_delta", 16)
    at.step([(1, 0, 5, inputs)], [opened(1)])
    for position in (5, 7, 9):
        at.announce([(1, position, position + 1)], epoch=position)
        at.run([(1, position, position + 1, inputs)], epoch=position, layers=1)
        close(at.step([(1, position, position + 1, inputs)], epoch=position + 1), inputs, position, position + 1)
        after = at.step([(1, position + 1, position + 2, inputs)], epoch=position + 1)
        close(after, inputs, position + 1, position + 2)
    at.check()


LIES = {
    "too few": lambda reply: dataclasses.replace(reply, out=reply.out[1:]),
    "too wide": lambda reply: dataclasses.replace(reply, out=reply.out.repeat(1, 2)),
    "flat": lambda reply: dataclasses.replace(reply, out=reply.out.flatten()),
    "another dtype": lambda reply: dataclasses.replace(reply, out=reply.out.half()),
    "another layer": lambda reply: dataclasses.replace(reply, layer=1 - reply.layer),
    "another message": lambda reply: Attended(reply.epoch, reply.batch, reply.layer, reply.out, reply.out[:, 0]),
}


@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("lie", LIES)
def test_a_worker_that_lies_is_lost_alone(tier, lie, tokens):
    """Where compiled code asked, too: a worker that has seen no inputs yet answers by Python."""
    at, inputs = tier("gated_delta", "two"), inputs_of("gated_delta", 9)
    liar = at.joints.made[0].worker
    told, handle = LIES[lie], liar.handle

    def bent(request):
        reply = handle(request)
        return told(reply) if isinstance(reply, Advanced) else reply

    liar.handle = bent
    with pytest.raises(HolderLost, match="worker-1: "):
        at.step([(1, 0, tokens, inputs)], [opened(1)])
    assert [port.closed for port in at.ports] == [True, False]


def test_a_fault_at_a_holder_ends_the_batch_alone(tier):
    """Here: constants have not come."""
    at, inputs = tier("kda", "two", knowing=1), inputs_of("kda", 9)
    with pytest.raises(HolderFault, match="for batch 1, which has no constants"):
        at.step([(1, 0, 9, inputs)], [opened(1)])
    for replies in at.replies:
        replies.forget(1)
    at.tell(at.ports[1])
    close(at.step([(1, 0, 9, inputs)]), inputs, 0, 9)


def test_a_head_that_nobody_has_is_named(tier):
    at, inputs = tier("kda", "two"), inputs_of("kda", 9)
    at.heads[1] = (3,)
    at.announce([(1, 0, 9)], [opened(1)])
    with pytest.raises(HolderFault, match="no worker has the state of head 2 for span 0, it needs all 4"):
        at.run([(1, 0, 9, inputs)])


def test_constants_are_sent_for_all_layers_that_have_some(tier):
    at, inputs = tier("mamba2", "two", knowing=0), inputs_of("mamba2", 9)
    for port in at.ports:
        send_constants(port, 7, {layer: inputs.constants(layer) for layer in (0, 1)})
    close(at.step([(1, 0, 9, inputs)], [opened(1)]), inputs, 0, 9)


@pytest.mark.parametrize("kind", KINDS)
def test_states_are_copied_from_one_holder_to_another(tier, kind):
    """Of two holders that have two heads each, to one that gets all of them; they go on there."""
    at, to, inputs = tier(kind, "two"), tier(kind, "there"), inputs_of(kind, 12)
    at.step([(1, 0, 5, inputs)], [opened(1)])
    at.step([(1, 5, 8, inputs)])
    decoder = SimpleNamespace(device=torch.device("cpu"), state_constants=dict)
    model_worker = ModelWorker(decoder, at.config, dict(enumerate((*at.ports, *to.ports))), epoch=2)
    for position in (5, 8):
        row = Row(position, 0, position, None, True)
        share = HolderBatch(to.operations, (opened(position),), (Route(0, ALL, row, (0, position)),))
        to.operations += 1
        moves = [Move(n, 1, 2, position, 0, position, 2, 2, 0, 4, 2 * n, True) for n in range(2)]
        assert result(model_worker.copy(moves, {2: share}))
        close(to.step([(position, position, 12, inputs)], epoch=model_worker.epoch + 1), inputs, position, 12)
        model_worker.next_epoch(model_worker.epoch + 2)
    to.check()
    moves = [Move(0, 1, 2, 9, 0, 7, 2, 2, 0, 2, 0, True)]
    share = HolderBatch(to.operations, (opened(9),), (Route(0, (0, 1), Row(9, 0, 7, None, True), (0, 7)),))
    with pytest.raises(HolderFault, match=r"states of part 1 at \[0, 7\), it has those that end at \[5, 8\]"):
        result(model_worker.copy(moves, {2: share}))


@pytest.mark.parametrize("way", ["local", "grpc"])
def test_a_worker_of_its_own_keeps_states(way):
    """Handshake, constants and inputs over every transport; what does not fit is answered with a fault."""
    asked, inputs = config("gated_delta"), inputs_of("gated_delta", 9)
    options = {"layers": asked.layers, **WAYS[way]}
    with running(kv_memory=asked.kv_memory) as (_, address), connected(address, **options) as port:
        for layer, of in enumerate(asked.layers):
            port.send(constants(of, layer))
        port.send(Announcement(1, 1, 0, (opened(1),), (Row(1, 0, 9, None, True),)))
        assert isinstance(port.receive(10), Announced)
        x, gates = inputs.x[0].view(-1), inputs.gates[0].view(-1)
        for bad in (Advance(1, 1, 0, x[1:], gates), Advance(1, 1, 0, x, gates.half()), Advance(1, 1, 5, x, gates)):
            port.send(bad)
            assert isinstance(port.receive(10), Fault)
        port.send(Advance(1, 1, 0, x, gates))
        reply = port.receive(10)
        assert isinstance(reply, Advanced)
        assert reply.seconds > 0
        torch.testing.assert_close(reply.out.view(9, HEADS * D_V), inputs.outputs()[0], rtol=1e-4, atol=1e-5)
