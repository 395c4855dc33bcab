"""Restarts: the slot alone, and the supervising threads with fake workers that are not processes."""

from __future__ import annotations

import queue
import threading
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamina.deploy.supervision import AttentionSupervisor, Backoff, ModelSupervisor, Slot, Worker, incarnation
from lamina.deploy.worker_events import WorkerAddress
from lamina.errors import EngineError

gaps = st.lists(st.floats(0, 100, allow_nan=False), max_size=60)  # seconds between one end and the next
backoffs = st.builds(Backoff, st.floats(0.01, 2), st.integers(1, 8), st.floats(1, 100))


def test_backoff_doubles_until_there_are_too_many_restarts_and_shrinks_with_time() -> None:
    backoff = Backoff()
    delays = [backoff.delay(now=float(second)) for second in range(8)]
    assert delays == [0.5, 1, 2, 4, 8, 16, None, None]
    assert backoff.delay(now=62.5) == 8  # two of them are more than a minute ago
    assert backoff.delay(now=1000) == 0.5


def test_worker_that_ends_too_often_is_tried_again_after_its_window() -> None:
    """A worker that had died seven times within a minute was never started again, however long ago that was."""
    backoff = Backoff(ever=True)
    now, starts = 0.0, list[float]()
    for _ in range(20):
        delay = backoff.delay(now)
        assert delay is not None
        now += delay
        starts.append(now)
    assert starts[:7] == [0.5, 1.5, 3.5, 7.5, 15.5, 31.5, 60.5]
    assert all(later - earlier >= 60 for earlier, later in zip(starts, starts[6:], strict=False))


@given(backoffs, gaps)
def test_backoff_counts_no_more_restarts_in_a_window_than_the_limit(backoff: Backoff, gaps: list[float]) -> None:
    starts = [(now, backoff.delay(now)) for now in accumulate(gaps)]
    counted = [now + delay for now, delay in starts if delay is not None]
    for first in counted:
        assert sum(first <= now < first + backoff.window for now in counted) <= backoff.limit


@given(backoffs, gaps)
def test_backoff_gives_up_only_when_a_window_is_full(backoff: Backoff, gaps: list[float]) -> None:
    counted: list[float] = []
    for now in accumulate(gaps):
        recent = sum(now - backoff.window < each for each in counted)
        delay = backoff.delay(now)
        assert (delay is None) == (recent >= backoff.limit)
        if delay is not None:
            counted.append(now + delay)


@given(st.lists(st.tuples(st.floats(0, 30), st.booleans()), max_size=40))
def test_slot_is_not_due_before_its_time_and_repeats_no_name(steps: list[tuple[float, bool]]) -> None:
    slot: Slot[str] = Slot("w", backoff=Backoff(limit=4, window=20))
    names: list[str] = []
    now, ended_at = 0.0, -1.0
    for seconds, ends in steps:
        now += seconds
        if slot.is_due(now):
            assert slot.worker is None
            assert now >= ended_at + 0.5
            slot.worker = slot.name
            names.append(slot.name)
        assert (slot.next_start is None) == (slot.worker is not None or slot.due is None)
        if ends and slot.worker is not None:
            slot.ended(now)
            ended_at = now
    assert len(set(names)) == len(names)
    assert slot.restarts in (len(names) - 1, len(names)) or not names


def test_slot_stays_down_after_too_many_restarts() -> None:
    slot: Slot[str] = Slot("w", backoff=Backoff(limit=1), worker="w")
    assert slot.ended(10.0) == "it starts again in 0.5 s"
    assert (slot.name, slot.is_due(10.4), slot.is_due(10.5)) == ("w.1", False, True)
    slot.worker = slot.name
    assert slot.next_start is None
    assert slot.ended(11.0) == "too often: it stays down"
    assert not slot.is_due(1e9)


def test_slot_is_never_due_when_given_up() -> None:
    slot: Slot[str] = Slot("w")
    slot.give_up()
    assert not slot.is_due(1e9)


class Launcher:
    """Starts fake workers for both kinds of pools; a test ends them."""

    def __init__(self) -> None:
        self.launched: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.killed: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        self.refuses = ""  # the name of a worker that cannot be started
        self.breaks = False  # the next start is a bug

    def launch(self, name: str) -> Worker:
        if self.breaks:
            raise RuntimeError("a bug")
        if name == self.refuses:
            raise OSError("no memory")
        self.launched.put(name)
        return Worker()


class Attention(AttentionSupervisor[Worker]):
    """Attention workers without processes; `auto`: they are up at once."""

    def __init__(
        self, count: int, *, auto: bool = True, deadline: float | None = None, most: int | None = None
    ) -> None:
        super().__init__(count, most=most)
        self.fake = Launcher()
        self.auto = auto
        self.ended_at_close: list[Worker] = []
        self.dismissed: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._deadline = deadline
        for slot in self._slots:
            slot.backoff.first = 0.001

    def _launch(self, slot: Slot[Worker]) -> Worker:
        worker = self.fake.launch(slot.name)
        slot.deadline = self._deadline and self._clock() + self._deadline
        if self.auto:
            address = WorkerAddress(slot.name, "h:1")
            self._calls.put(lambda: self._joined(worker, address))
        return worker

    def _kill(self, worker: Worker) -> None:
        self.fake.killed.put(worker)
        self.end(next(slot.number for slot in self._slots if slot.worker is worker), "killed")

    def _dismiss(self, worker: Worker) -> None:
        self.dismissed.put(next(slot.number for slot in self._slots if slot.worker is worker))

    def _end(self, workers: Sequence[Worker]) -> None:
        self.ended_at_close.extend(workers)

    def end(self, number: int, how: str = "exit status 1") -> None:
        self._calls.put(lambda: self._ended(self._slots[number], how, ["last words"]))


class Models(ModelSupervisor[Worker]):
    """Model workers without processes."""

    def __init__(self, count: int) -> None:
        super().__init__(count)
        self.fake = Launcher()
        self.ended: queue.SimpleQueue[tuple[int, str, str, bool]] = queue.SimpleQueue()
        for slot in self._slots:
            slot.backoff.first, slot.backoff.limit = 0.001, 2

    def begin(self) -> None:
        self.start("address", lambda rank, name: b"", lambda *ended: self.ended.put(ended))

    def _launch(self, slot: Slot[Worker]) -> Worker:
        return self.fake.launch(slot.name)

    def _kill(self, worker: Worker) -> None:
        slot = next(slot for slot in self._slots if slot.worker is worker)
        self._ended(slot, "killed")

    def _end(self, workers: Sequence[Worker]) -> None:
        pass

    def end(self, rank: int) -> None:
        self._calls.put(lambda: self._ended(self._slots[rank - 1], "exit status 1", ["last words"]))


class Events:
    def __init__(self, workers: Attention) -> None:
        self._queue: queue.SimpleQueue[str] = queue.SimpleQueue()
        workers.watch(lambda worker: self._queue.put(f"+{worker.name}"), lambda name: self._queue.put(f"-{name}"))

    def next(self, count: int) -> list[str]:
        return [self._queue.get(timeout=20) for _ in range(count)]


def test_attention_workers_are_up_after_start_and_ended_by_close() -> None:
    workers = Attention(3)
    progress: list[tuple[str, int, int | None]] = []
    started = workers.start(lambda *step: progress.append(step))
    assert [worker.name for worker in started] == ["attention-0", "attention-1", "attention-2"]
    assert progress == [("attention workers", up, 3) for up in (1, 2, 3)]
    workers.close()
    workers.close()
    assert len(workers.ended_at_close) == 3


def test_ended_worker_leaves_and_the_next_joins_under_another_name() -> None:
    workers = Attention(2)
    workers.start()
    events = Events(workers)
    for restarts in range(3):
        workers.end(1)
        assert events.next(2) == [f"-{incarnation('attention-1', restarts)}", f"+attention-1.{restarts + 1}"]
    assert [(status.state, status.restarts) for status in workers.status()] == [("up", 0), ("up", 3)]
    workers.close()


def test_lost_worker_is_killed_and_replaced_without_a_leave_event() -> None:
    workers = Attention(1)
    workers.start()
    events = Events(workers)
    workers.lost("attention-0")
    assert events.next(1) == ["+attention-0.1"]
    workers.lost("attention-0")  # the previous one: no effect
    workers.end(0)
    assert events.next(2) == ["-attention-0.1", "+attention-0.2"]
    assert workers.fake.killed.qsize() == 1
    workers.close()


def names(workers: Attention) -> list[str]:
    return [status.name for status in workers.status()]


def test_more_workers_join_and_those_that_are_retired_are_not_started_again() -> None:
    workers = Attention(1, most=3)
    workers.start()
    events = Events(workers)
    workers.grow(3)
    assert events.next(2) == ["+attention-1", "+attention-2"]
    workers.grow(2)  # there are more already
    workers.retire("attention-1")
    assert workers.dismissed.get(timeout=20) == 1
    assert names(workers) == ["attention-0", "attention-2"]
    assert [worker.name for worker, _ in workers.described() if worker] == ["attention-0", "attention-2"]
    workers.end(1)
    workers.retire("attention-1")  # the previous one: no effect
    workers.end(0)  # one that ends by itself is started again
    assert events.next(2) == ["-attention-0", "+attention-0.1"]
    workers.grow(3)
    assert events.next(1) == ["+attention-1.1"]
    assert workers.dismissed.empty()
    workers.close()


def test_a_slot_that_is_wanted_while_its_worker_still_ends_gets_another_then() -> None:
    workers = Attention(2)
    workers.start()
    events = Events(workers)
    workers.retire("attention-1")
    workers.dismissed.get(timeout=20)
    workers.grow(2)
    workers.end(1)
    assert events.next(1) == ["+attention-1.1"]
    workers.close()


def test_a_retired_worker_that_does_not_end_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lamina.deploy.supervision.GRACE", 0.05)
    workers = Attention(2)
    workers.start()
    workers.retire("attention-0")
    assert workers.fake.killed.get(timeout=20).retired
    assert names(workers) == ["attention-1"]
    workers.close()


def test_a_standby_worker_is_ready_when_one_more_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lamina.deploy.supervision._STANDBY_AFTER", 0.0)
    workers = Attention(1, most=3)
    workers.keeps_standby = True
    workers.start()
    events = Events(workers)
    launched = workers.fake.launched
    assert [launched.get(timeout=20) for _ in range(2)] == ["attention-0", "attention-1"]
    assert names(workers) == ["attention-0"]
    workers.end(1)  # it is started again, and nobody is told
    assert launched.get(timeout=20) == "attention-1.1"
    workers.grow(2)
    assert events.next(1) == ["+attention-1.1"]
    assert launched.get(timeout=20) == "attention-2"  # the next standby
    workers.retire("attention-0")
    workers.dismissed.get(timeout=20)
    workers.end(0)
    workers.grow(3)
    assert set(events.next(2)) == {"+attention-2", "+attention-0.1"}
    workers.close()
    assert len(workers.ended_at_close) == 3


def test_a_start_without_workers_is_over_at_once() -> None:
    workers = Attention(0, most=2)
    assert workers.optional
    assert workers.start() == ()
    events = Events(workers)
    workers.grow(1)
    assert events.next(1) == ["+attention-0"]
    workers.close()


def test_worker_that_ends_too_often_waits_and_the_others_go_on() -> None:
    workers = Attention(2)
    workers.start()
    events = Events(workers)
    workers._slots[0].backoff.limit = 1
    workers.end(0)
    assert events.next(2) == ["-attention-0", "+attention-0.1"]
    workers.end(0)
    assert events.next(1) == ["-attention-0.1"]
    workers.end(1)
    assert events.next(2) == ["-attention-1", "+attention-1.1"]
    assert [status.state for status in workers.status()] == ["lost", "up"]
    workers.close()


def test_start_shows_the_last_lines_when_a_worker_ends_before_it_is_up() -> None:
    workers = Attention(2, auto=False)
    workers.end(1)
    with pytest.raises(EngineError, match=r"^attention-1 did not start, exit status 1\n  last words$"):
        workers.start()
    assert [status.state for status in workers.status()] == ["given up"] * 2


def test_start_has_the_cause_when_a_worker_cannot_be_started() -> None:
    workers = Attention(3)
    workers.fake.refuses = "attention-1"
    with pytest.raises(EngineError, match="cannot start attention-1: no memory") as caught:
        workers.start()
    assert isinstance(caught.value.__cause__, OSError)
    assert workers.fake.launched.qsize() == 1  # and none after it


def test_start_fails_when_a_worker_is_not_up_at_its_deadline() -> None:
    with pytest.raises(EngineError, match="attention-0 did not start, killed"):
        Attention(1, auto=False, deadline=0.01).start()


def test_start_fails_and_logs_when_the_supervisor_has_a_bug(caplog: pytest.LogCaptureFixture) -> None:
    workers = Attention(1)
    workers.fake.breaks = True
    with pytest.raises(EngineError, match="cannot run the attention workers: a bug"):
        workers.start()
    assert "no longer watched" in caplog.text


def test_start_ends_when_another_thread_closes() -> None:
    workers = Attention(1, auto=False)
    closing = threading.Thread(target=lambda: (workers.fake.launched.get(timeout=20), workers.close()))
    closing.start()
    with pytest.raises(EngineError, match="closed while"):
        workers.start()
    closing.join()


def test_model_worker_end_is_reported_each_time() -> None:
    models = Models(3)
    models.begin()
    assert [models.fake.launched.get(timeout=20) for _ in range(2)] == ["model-1", "model-2"]
    names = ["model-2", "model-2.1", "model-2.2"]
    for name, next_name in zip(names, [*names[1:], None], strict=True):
        models.end(2)
        assert models.ended.get(timeout=20) == (2, name, "exit status 1\n  last words", False)
        assert next_name is None or models.fake.launched.get(timeout=20) == next_name
    assert Counter(status.state for status in models.status()) == {"starting": 1, "lost": 1}
    models.close()


def test_model_worker_is_tried_again_when_it_cannot_be_started() -> None:
    models = Models(2)
    models.fake.refuses = "model-1"
    models.begin()
    assert models.ended.get(timeout=20) == (1, "model-1", "it cannot be started: no memory", False)
    assert models.fake.launched.get(timeout=20) == "model-1.1"
    models.close()


def test_model_workers_are_reported_as_down_when_the_supervisor_has_a_bug(caplog: pytest.LogCaptureFixture) -> None:
    models = Models(3)
    models.fake.breaks = True
    models.begin()
    ends = [models.ended.get(timeout=20) for _ in range(2)]
    assert {(rank, stays_down) for rank, _, _, stays_down in ends} == {(1, True), (2, True)}
    assert "no longer watched" in caplog.text
    models.close()
