"""The mailbox of an engine: order, the end, refusals after the end, and many threads at once."""

from __future__ import annotations

import queue
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from lamina.engine.engine import Mailbox
from lamina.errors import EngineError


def unrefused(error: EngineError) -> None:
    pytest.fail(f"refused: {error}")


def take_all(mailbox: Mailbox) -> None:
    """Do everything that is there, as the thread of an engine does."""
    while not mailbox.empty:
        do = mailbox.get(0)
        assert do is not None
        do()


def test_mailbox_gives_requests_and_posts_in_order() -> None:
    mailbox, done = Mailbox(), list[int]()
    mailbox.post(lambda: done.append(1))
    mailbox.request(lambda: done.append(2), unrefused)
    mailbox.post(lambda: done.append(3))
    assert not mailbox.empty
    take_all(mailbox)
    assert done == [1, 2, 3]


def test_get_raises_empty_after_its_timeout() -> None:
    mailbox = Mailbox()
    assert mailbox.empty
    for timeout in (0, 0.001):
        with pytest.raises(queue.Empty):
            mailbox.get(timeout)


def test_get_without_a_timeout_waits_for_another_thread() -> None:
    mailbox, done = Mailbox(), list[str]()
    sender = threading.Timer(0.01, mailbox.post, [lambda: done.append("posted")])
    sender.start()
    do = mailbox.get(None)
    assert do is not None
    do()
    sender.join()
    assert done == ["posted"]


def test_get_returns_none_at_the_end_after_what_came_before() -> None:
    mailbox, done = Mailbox(), list[str]()
    mailbox.post(lambda: done.append("before"))
    mailbox.end()
    first = mailbox.get(0)
    assert first is not None
    assert mailbox.get(0) is None
    assert not mailbox.is_shut  # the engine itself shuts it


@pytest.mark.parametrize("cause", [None, RuntimeError("no memory")])
def test_shut_refuses_requests_that_were_not_taken(cause: RuntimeError | None) -> None:
    mailbox, refused = Mailbox(), list[EngineError]()
    mailbox.request(lambda: pytest.fail("done"), refused.append)
    mailbox.post(lambda: pytest.fail("done"))
    mailbox.end()
    mailbox.request(lambda: pytest.fail("done"), refused.append)
    mailbox.shut(cause)
    assert mailbox.is_shut
    assert mailbox.empty
    assert [error.__cause__ for error in refused] == [cause, cause]
    assert [str(error) for error in refused] == ["the engine has stopped" + (f": {cause!r}" if cause else "")] * 2


def test_request_raises_the_cause_once_the_mailbox_is_shut() -> None:
    mailbox, cause = Mailbox(), ValueError("a fault")
    mailbox.shut(cause)
    with pytest.raises(EngineError, match="the engine has stopped: ValueError") as caught:
        mailbox.request(lambda: None, unrefused)
    assert caught.value.__cause__ is cause


def test_post_is_forgotten_once_the_mailbox_is_shut() -> None:
    mailbox = Mailbox()
    mailbox.shut(None)
    mailbox.post(lambda: pytest.fail("done"))


def test_shut_refuses_the_others_when_a_refusal_raises(caplog: pytest.LogCaptureFixture) -> None:
    mailbox, refused = Mailbox(), list[EngineError]()

    def broken(error: EngineError) -> None:
        raise ValueError("no")

    mailbox.request(lambda: None, broken)
    mailbox.request(lambda: None, refused.append)
    mailbox.shut(None)
    assert len(refused) == 1
    assert [record.levelname for record in caplog.records] == ["ERROR"]


class SlowQueue(queue.SimpleQueue[Any]):
    """A queue whose `put` waits inside until `gate` is set."""

    def __init__(self) -> None:
        self.entered, self.gate = threading.Event(), threading.Event()

    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        self.entered.set()
        assert self.gate.wait(30)
        super().put(item)


def test_shut_waits_for_a_request_that_is_being_sent_and_refuses_it() -> None:
    mailbox, refused = Mailbox(), list[EngineError]()
    mailbox._queue = slow = SlowQueue()
    sender = threading.Thread(target=mailbox.request, args=[lambda: None, refused.append])
    closer = threading.Thread(target=mailbox.shut, args=[None])
    sender.start()
    assert slow.entered.wait(30)
    closer.start()
    closer.join(0.02)
    slow.gate.set()
    sender.join()
    closer.join()
    assert len(refused) == 1


@pytest.mark.parametrize("taken", [0, 150, 400])
def test_every_request_is_done_or_refused_once_when_threads_meet_the_end(taken: int) -> None:
    """Eight threads send 50 requests each; the engine takes some of them and stops while the others still come."""
    mailbox, threads, each = Mailbox(), 8, 50
    done, refused, raised = list[tuple[int, int]](), list[tuple[int, int]](), list[tuple[int, int]]()
    start = threading.Barrier(threads + 1)

    def send(thread: int) -> None:
        start.wait()
        for number in range(each):
            name = (thread, number)
            try:
                mailbox.request(_append(done, name), lambda _, name=name: refused.append(name))  # type: ignore[misc]
            except EngineError:
                raised.append(name)

    senders = [threading.Thread(target=send, args=[thread]) for thread in range(threads)]
    for sender in senders:
        sender.start()
    start.wait()
    for _ in range(taken):
        do = mailbox.get(30)
        assert do is not None
        do()
    mailbox.shut(None)
    for sender in senders:
        sender.join()
    assert len(done) == taken
    assert mailbox.empty
    assert Counter(done + refused + raised) == Counter((t, n) for t in range(threads) for n in range(each))
    for outcome in (done, refused, raised):
        for thread in range(threads):
            mine = [number for at, number in outcome if at == thread]
            assert mine == sorted(mine), "requests of one thread stay in order"


def _append(to: list[tuple[int, int]], name: tuple[int, int]) -> Callable[[], None]:
    return lambda: to.append(name)
