"""Requests are sent when due, never more at once than allowed, and given up when told to."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina.measure.bench.measures import Outcome
from lamina.measure.bench.running import run, run_loop


class Server:
    """Stands for one: each request takes so many turns of the event loop."""

    def __init__(self, turns):
        self.turns = turns
        self.active = self.most = 0
        self.order = []

    async def send(self, number, clock):
        sent = clock()
        self.order.append(number)
        self.active += 1
        self.most = max(self.most, self.active)
        try:
            for _ in range(self.turns[number % len(self.turns)]):
                await asyncio.sleep(0)
        finally:
            self.active -= 1
        return Outcome(0.0, sent, clock(), asked=number)


@given(st.lists(st.integers(0, 8), min_size=1, max_size=12), st.integers(1, 5) | st.none())
@settings(max_examples=40)
def test_all_are_sent_in_order_and_no_more_at_once_than_allowed(turns, most):
    server = Server(turns)
    done = run_loop(run([0.0] * len(turns), server.send, max_concurrency=most))
    assert server.order == list(range(len(turns)))
    assert server.most <= (most or len(turns))
    assert sorted(outcome.asked for outcome in done.outcomes) == server.order
    assert done.unfinished == 0
    assert done.seconds == max(outcome.ended for outcome in done.outcomes)


def test_none_is_sent_before_it_is_due():
    due = [0.0, 0.02, 0.021, 0.05]
    done = run_loop(run(due, Server([0]).send))
    for outcome in done.outcomes:
        assert outcome.sent >= due[outcome.asked] - 0.002  # timers of some event loops count milliseconds


def test_progress_reaches_its_end():
    told = []
    run_loop(run([0.0] * 9, Server([1]).send, progress=lambda *words: told.append(words), what="x"))
    assert (told[0], told[-1]) == (("x", 0, 9), ("x", 9, 9))


def test_stopping_gives_up_what_is_under_way_and_keeps_what_is_there():
    async def stopped():
        stop = asyncio.Event()
        given_up = []

        async def send(number, clock):
            if number < 2:
                return Outcome(0.0, 0.0, clock(), asked=number)
            if number == 4:
                stop.set()
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                given_up.append(number)
                raise

        done = await run([0.0] * 5 + [100.0], send, stop=stop)
        return done, given_up, len(asyncio.all_tasks())

    done, given_up, tasks = run_loop(stopped())
    assert [outcome.asked for outcome in done.outcomes] == [0, 1]
    assert (done.unfinished, sorted(given_up), tasks) == (4, [2, 3, 4], 1)


def test_what_should_never_fail_is_not_hidden():
    async def send(number, clock):
        if number == 1:
            raise RuntimeError("a mistake")
        return Outcome(0.0, 0.0, clock())

    with pytest.raises(RuntimeError, match="a mistake"):
        run_loop(run([0.0, 0.0, 0.01], send))
