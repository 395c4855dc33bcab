"""A pool of states against the recurrence over the whole sequence."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import pytest
import torch
from state_layers import D_K, D_V, HEADS, KINDS, Inputs, config, constants

from lamina_kernels.states import layout
from lamina_protocols.errors import ProtocolError
from lamina_protocols.messages.layers import STATES
from lamina_protocols.messages.messages import Advance, Fetch, FetchPages, Fork, FreshPages, Open, Query, Row
from lamina_protocols.messages.pools import pools
from lamina_workers.attention_worker.batch import Counters
from lamina_workers.attention_worker.page_layout import CPU
from lamina_workers.attention_worker.state_pool import StatePool
from lamina_workers.errors import KVError, UnsupportedModelError

ALL = tuple(range(HEADS))


class Driven:
    """A pool of two layers, as a worker drives it: batches follow one another where they can."""

    def __init__(self, kind, knows=True):
        self.config = config(kind)
        self.pool = StatePool(0, pools(self.config)[0], 1, CPU, Counters())
        for layer, of in enumerate(self.config.layers if knows else ()):
            if of.conv:
                self.pool.constants(layer, constants(of, layer))
        self.batch = None
        self.followed = 0

    def announce(self, operations, rows):
        if not operations and self.batch is not None and self.pool.follows(self.batch, rows):
            self.batch = self.pool.follow(self.batch, rows, 0.0)
            self.followed += 1
            return
        self.pool.update(operations, rows)
        self.pool.commit()
        self.batch = self.pool.begin(rows, 0.0)

    def advance(self, layer, x, gates):
        return self.pool.handle(self.batch, layer, Advance(1, 1, layer, x.reshape(-1), gates.reshape(-1))).out

    def run(self, parts, operations=(), layers=(0, 1)):
        """Each part (handle, start, end, inputs) over these layers: outputs `[n, heads * d_v]`, by layer and part."""
        self.announce(operations, [row(handle, start, end - start) for handle, start, end, _ in parts])
        found = []
        for layer in layers:
            x = torch.cat([inputs.x[layer][start:end].reshape(-1) for _, start, end, inputs in parts])
            gates = torch.cat([inputs.gates[layer][start:end].reshape(-1) for _, start, end, inputs in parts])
            out = self.advance(layer, x, gates).split([(end - start) * HEADS for _, start, end, _ in parts])
            found.append([each.view(-1, HEADS * D_V) for each in out])
        self.pool.check_integrity()
        return found


def row(handle, start, count):
    return Row(handle, start, count, (0, start) if start else None, True)


def opened(handle, heads=ALL):
    return Open(handle, 0, heads, 0, 1000)


def inputs_of(kind, tokens, seed=0):
    return Inputs.random(config(kind).layers, tokens, seed)


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_and_single_tokens_give_the_recurrence(kind):
    driven, inputs = Driven(kind), inputs_of(kind, 40)
    wanted, ends, operations = inputs.outputs(), [0, 1, 8, 30, *range(31, 41)], [opened(1)]
    for start, end in pairwise(ends):
        for layer, (out,) in enumerate(driven.run([(1, start, end, inputs)], operations)):
            close(out, wanted[layer][start:end])
        operations = ()
    assert driven.followed == 9
    assert driven.pool.held(1).held == 40


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_several_parts_and_of_some_heads(kind):
    """Two sequences, one of them in two parts of two heads each."""
    driven, inputs, other = Driven(kind), inputs_of(kind, 12), inputs_of(kind, 12, seed=1)
    of = driven.config.layers[0]
    group = HEADS // of.key_heads
    wanted = inputs.outputs(), other.outputs()
    operations = [opened(1), opened(2, (0, 3)), opened(3, (1, 2))]
    for start, end in ((0, 5), (5, 6), (6, 7), (7, 12)):
        driven.announce(operations, [row(handle, start, end - start) for handle in (1, 2, 3)])
        operations = []
        for layer in (0, 1):
            x, gates = [inputs.x[layer][start:end]], [inputs.gates[layer][start:end].reshape(-1)]
            for heads in ((0, 3), (1, 2)):
                keys = sorted({head // group for head in heads})
                whole = other.x[layer][start:end]
                q, k, v = whole.split([of.key_heads * D_K, of.key_heads * D_K, HEADS * D_V], dim=1)
                x += [some.unflatten(1, (-1, D_K))[:, keys].flatten(1) for some in (q, k)]
                x[-2:] = [torch.cat([*x[-2:], v.unflatten(1, (HEADS, D_V))[:, heads].flatten(1)], dim=1)]
                gates.append(other.gates[layer][start:end][:, heads].reshape(-1))
            out = driven.advance(layer, torch.cat([each.reshape(-1) for each in x]), torch.cat(gates))
            n = end - start
            whole, left, right = out.split([n * HEADS, n * 2, n * 2])
            close(whole.view(n, -1), wanted[0][layer][start:end])
            due = wanted[1][layer][start:end].view(n, HEADS, D_V)
            close(left.view(n, 2, D_V), due[:, (0, 3)])
            close(right.view(n, 2, D_V), due[:, (1, 2)])


@pytest.mark.parametrize("kind", KINDS)
def test_forks_go_their_own_way(kind):
    driven, inputs = Driven(kind), inputs_of(kind, 20)
    other = Inputs(inputs.specs, [x.clone() for x in inputs.x], inputs.gates)
    for x in other.x:
        x[8:] = x[8:].flip(0)
    driven.run([(1, 0, 8, inputs)], [opened(1)])
    operations = [Fork(2, 1, 8)]
    for start in range(8, 20):  # they follow one another once each has records of its own
        found = driven.run([(1, start, start + 1, inputs), (2, start, start + 1, other)], operations)
        operations = [Fork(3, 1, 11)] if start == 10 else []
        for layer, (one, two) in enumerate(found):
            close(one, inputs.outputs()[layer][start : start + 1])
            close(two, other.outputs()[layer][start : start + 1])
    assert driven.followed > 5
    for layer, (out,) in enumerate(driven.run([(3, 11, 20, inputs)])):
        close(out, inputs.outputs()[layer][11:])


def test_messages_that_do_not_fit_are_refused():
    driven, inputs = Driven("gated_delta"), inputs_of("gated_delta", 4)
    driven.announce([opened(1)], [row(1, 0, 4)])
    x, gates = inputs.x[0], inputs.gates[0]
    for bad_x, bad_gates in ((x[:3], gates), (x, gates[:3]), (x.double(), gates), (x, gates.half())):
        with pytest.raises(ProtocolError, match="inputs of batch 1: "):
            driven.advance(0, bad_x, bad_gates)
    nothing = torch.empty(0)
    with pytest.raises(ProtocolError, match="Query for layer 0, whose kind is gated_delta; allowed: Advance"):
        driven.pool.handle(driven.batch, 0, Query(1, 1, 0, nothing))
    with pytest.raises(ProtocolError, match="Fetch for layer 1, whose kind is gated_delta"):
        driven.pool.fetch(1, Fetch(1, 1, 1, 1, 0, 4))
    driven.batch = driven.pool.begin([], 0.0)
    with pytest.raises(ProtocolError, match="batch 1, which has no rows"):
        driven.advance(0, nothing, nothing)
    driven.announce([Open(2, 0, ALL, 0, 1 << 40)], [])
    with pytest.raises(ProtocolError, match="tokens times heads, allowed: "):
        driven.announce([], [row(2, 0, 1 << 39)])


def test_pages_that_are_not_there_or_do_not_fit():
    driven, inputs = Driven("gated_delta"), inputs_of("gated_delta", 8)
    driven.run([(1, 0, 5, inputs)], [opened(1)])
    for lo, hi in ((0, 4), (1, 5), (0, 0), (0, 6)):
        with pytest.raises(KVError, match=rf"states of part 1 at \[{lo}, {hi}\), it has those that end at \[0, 5\]"):
            driven.pool.fetch_pages(FetchPages(1, 1, 0, 2, 1, lo, hi))
    for first, layers in ((0, 3), (2, 1), (0, 0)):
        with pytest.raises(ProtocolError, match="there are 2"):
            driven.pool.fetch_pages(FetchPages(1, 1, first, layers, 1, 0, 5))
    pages = driven.pool.fetch_pages(FetchPages(1, 1, 0, 2, 1, 0, 5)).pages
    driven.announce([opened(2)], [row(2, 0, 5)])
    for bad in (pages[1:], pages[:, 4:], pages.view(torch.float32), pages.flatten()):
        with pytest.raises(ProtocolError, match="fresh pages of batch 1 are"):
            driven.pool.store_pages(driven.batch, FreshPages(1, 1, 0, 0, 2, bad))
    driven.pool.store_pages(driven.batch, FreshPages(1, 1, 0, 0, 1, pages[:HEADS]))
    assert driven.pool.held(2).held == 0  # torn until both layers are there
    driven.pool.store_pages(driven.batch, FreshPages(1, 1, 0, 1, 1, pages[HEADS:]))
    close(driven.run([(2, 5, 8, inputs)])[1][0], inputs.outputs()[1][5:])
    driven.batch = driven.pool.begin([], 0.0)
    with pytest.raises(ProtocolError, match="8 fresh pages for batch 1, which stores 0"):
        driven.pool.store_pages(driven.batch, FreshPages(1, 1, 0, 0, 2, pages))


def test_constants_come_before_inputs_and_fit():
    driven, inputs = Driven("mamba2", knows=False), inputs_of("mamba2", 4)
    of = driven.config.layers[0]
    driven.announce([opened(1)], [row(1, 0, 4)])
    with pytest.raises(ProtocolError, match="batch 1, which has no constants"):
        driven.advance(0, inputs.x[0], inputs.gates[0])
    fitting = constants(of, 0)
    for name in ("conv", "bias", "skip"):
        for bad in (getattr(fitting, name)[1:], getattr(fitting, name).double()):
            with pytest.raises(ProtocolError, match=f"{name} of layer 0 is|constants of layer 0: {name}"):
                driven.pool.constants(0, dataclasses.replace(fitting, **{name: bad}))
    driven.pool.constants(0, fitting)
    fitting.conv.zero_()  # it keeps its own
    close(driven.advance(0, inputs.x[0], inputs.gates[0]).view(4, -1), inputs.outputs()[0])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"key_heads": 3}, UnsupportedModelError, "4 states, 4 heads and 3 of keys"),
        ({"key_heads": 0}, UnsupportedModelError, "4 states, 4 heads and 0 of keys"),
        ({"d_k": 20}, UnsupportedModelError, "d_k must be a multiple of 16"),
        ({"conv": 1}, UnsupportedModelError, "conv must be 0 or from 2"),
        ({"window": 8}, UnsupportedModelError, "a gated_delta layer with a window"),
        ({"decays": (0.5,) * 4}, UnsupportedModelError, "4 decays of a gated_delta layer, 0 are due"),
    ],
)
def test_layers_that_cannot_be_kept(changes, error, message):
    plain = config("gated_delta")
    changed = tuple(dataclasses.replace(of, **changes) for of in plain.layers)
    with pytest.raises(error, match=message):
        StatePool(0, pools(dataclasses.replace(plain, layers=changed))[0], 1, CPU, Counters())


def test_too_little_memory():
    with pytest.raises(KVError, match="kv_memory is 999 bytes; the least is 11264, two states for each layer"):
        StatePool(0, pools(config("gated_delta", kv_memory=999))[0], 1, CPU, Counters())


def test_messages_and_kernels_know_the_same_kinds() -> None:
    assert layout.KINDS == STATES
