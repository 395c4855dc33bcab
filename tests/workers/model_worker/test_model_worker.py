"""The model worker over holders that keep dense K and V: announcements, batches, epochs, and what fails in them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from dense_holders import CONFIG, Holder, Model, route

from lamina_kernels.states.operands import StateConstants
from lamina_protocols.messages.messages import Announced, Announcement, Constants, Fault, Open, Reply
from lamina_protocols.messages.routes import HolderBatch, Span
from lamina_workers.decoder.model import Batch, Forward
from lamina_workers.decoder.sampler import RowSampling
from lamina_workers.errors import HolderFault, HolderLost, RankLost
from lamina_workers.model_worker.interface import BatchWork, result
from lamina_workers.model_worker.model_worker import ModelWorker

SPAN = Span(5, 1)
WORK = BatchWork((SPAN,), (6,), [3], (0,), (RowSampling(),))


class FakeDecoder:
    """Its logits are the attention output of the last layer."""

    device = torch.device("cpu")
    config = SimpleNamespace(rope=SimpleNamespace(by_length=False))

    def __init__(self, model: Model, constants: dict[int, StateConstants]) -> None:
        self._model = model
        self._constants = constants
        self.batches: list[Batch] = []

    experts_read = 0, 0

    def state_constants(self) -> dict[int, StateConstants]:
        return self._constants

    def forward(self, batch: Batch, *, query_first: bool) -> Forward:
        self.batches.append(batch)

        def run() -> Generator[Any, Any, torch.Tensor]:
            attended = yield from self._model.forward(query_first)
            return attended[-1, batch.sampled]

        return run()


class Rig:
    """A model worker and two holders, each with one KV head of one sequence."""

    def __init__(self, constants: dict[int, StateConstants] | None = None) -> None:
        self.model = Model([SPAN])
        self.routes = [route(0, SPAN, [head], (0, SPAN.start)) for head in (0, 1)]
        self.holders = [Holder(self.model, [own], name) for own, name in zip(self.routes, "ab", strict=True)]
        self.decoder = FakeDecoder(self.model, constants or {})
        self.worker = ModelWorker(cast(Any, self.decoder), CONFIG, dict(enumerate(cast(Any, self.holders))))
        self.shares = {
            number: HolderBatch(number, (Open(0, 0, (number,), 0, 9),), (own,))
            for number, own in enumerate(self.routes)
        }

    def expected(self) -> int:
        return int(self.model.dense()[-1, 0].argmax())

    def announced(self, number: int) -> list[Announcement]:
        return [request for request in self.holders[number].sent if isinstance(request, Announcement)]


def fault(reply: Announced) -> Reply:
    return Fault(reply.epoch, reply.batch, "keys are gone")


def test_each_holder_gets_its_share_and_batches_are_numbered() -> None:
    rig = Rig()
    first, answers = rig.worker.announce_now(rig.shares)
    second, _ = rig.worker.announce_now({1: rig.shares[1]})
    assert (first, second) == (1, 2)
    assert sorted(answers) == [0, 1]
    for number, share in rig.shares.items():
        assert rig.announced(number)[0] == Announcement(1, 1, share.first, share.operations, share.rows)
    assert [request.batch for request in rig.announced(1)] == [1, 2]


def test_an_announcement_is_suspended_until_every_answer_is_there() -> None:
    rig = Rig()
    rig.holders[1].silent = True
    run = rig.worker.announce(rig.shares)
    assert not next(run).over()
    assert all(len(rig.announced(number)) == 1 for number in (0, 1))
    rig.holders[1].silent = False
    assert sorted(result(run)[1]) == [0, 1]


def test_a_batch_that_all_accept_gives_the_likeliest_token() -> None:
    rig = Rig()
    batch, _ = rig.worker.announce_now(rig.shares)
    sampled = result(rig.worker.execute(WORK, batch, rig.shares))
    assert sampled.tokens == [rig.expected()]
    (given,) = rig.decoder.batches
    assert (given.token_ids.tolist(), given.positions.tolist(), given.rope_lengths) == ([3], [SPAN.start], None)
    assert all(holder.holds(rig.model) for holder in rig.holders)


@pytest.mark.parametrize(
    ("bend", "message", "lost"),
    [
        (fault, "b: keys are gone", False),
        (lambda reply: Announced(reply.epoch, reply.batch, True, (9,), ()), "b: floors and usages", True),
        (lambda reply: Announced(reply.epoch, reply.batch, False, (9,), (), starts=(-1,)), "can start at", True),
        (
            lambda reply: Announced(reply.epoch, reply.batch, False, (9,), (), starts=(SPAN.start + 1,)),
            "can start at",
            True,
        ),
        (lambda reply: Announced(reply.epoch, reply.batch, False, (9,), (), starts=(0,) * 9), "can start at", True),
        (lambda reply: dataclasses.replace(reply, samples=(2,)), "samples of", True),
        (lambda reply: dataclasses.replace(reply, samples=(0, 2)), "samples of", True),
    ],
    ids=[
        "a fault",
        "an answer without floors",
        "below zero",
        "above its start",
        "of other rows",
        "samples of no prompt",
        "samples of other rows",
    ],
)
def test_a_bad_answer_to_an_announcement_blames_its_holder(
    bend: Callable[[Any], Reply], message: str, lost: bool
) -> None:
    rig = Rig()
    rig.holders[1].bend = bend
    with pytest.raises(HolderFault, match=message):
        rig.worker.announce_now(rig.shares)
    assert rig.holders[1].closed == lost


def test_a_lost_holder_is_raised_before_a_fault() -> None:
    rig = Rig()

    def lose() -> Reply:
        rig.holders[1].close()
        raise HolderLost("b is lost")

    rig.holders[0].bend = fault
    rig.holders[1].receive = lambda timeout=None: lose()  # type: ignore[method-assign]
    with pytest.raises(HolderLost, match="b is lost"):
        rig.worker.announce_now(rig.shares)
    assert rig.worker.lost() == [1]
    rig.worker.leave(1)
    rig.holders[0].bend = lambda reply: reply
    _, answers = rig.worker.announce_now({0: rig.shares[0]})
    assert answers[0].accepted


def test_epochs_begin_after_those_of_the_previous_engine() -> None:
    rig = Rig()
    rig.worker.begin_after(7)
    rig.worker.begin_after(3)
    assert rig.worker.epoch == 8
    rig.worker.next_epoch()
    assert rig.worker.epoch == 9


def test_a_holder_joins_and_leaves() -> None:
    rig = Rig()
    port = Holder(rig.model, rig.routes[:1], "c")
    assert rig.worker.join(2, cast(Any, port)) == ()
    assert [link.name for link in rig.worker.links().values()] == ["a", "b", "c"]
    _, answers = rig.worker.announce_now({2: rig.shares[0]})
    assert answers[2].accepted
    rig.worker.leave(2)
    assert port.closed
    assert sorted(rig.worker.links()) == [0, 1]


def test_holders_are_told_the_constants_of_layers_with_states() -> None:
    """Those that are there at first, and one that joins; what a layer does not have is empty."""
    rig = Rig({1: StateConstants(2, 1, 0.5, torch.randn(64, 4)), 3: StateConstants(2, 2, 0.5, skip=torch.ones(2))})
    late = Holder(rig.model, rig.routes[:1], "c")
    rig.worker.join(2, cast(Any, late))
    for holder in (*rig.holders, late):
        told = [request for request in holder.sent if isinstance(request, Constants)]
        assert [(each.layer, *map(len, (each.conv, each.bias, each.skip))) for each in told] == [
            (1, 64, 0, 0),
            (3, 0, 0, 2),
        ]


def test_no_other_rank_can_return() -> None:
    with pytest.raises(RankLost, match="model worker 3 is not one of this engine"):
        Rig().worker.returned(SimpleNamespace(rank=3))
