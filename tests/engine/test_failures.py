"""What an engine does when batches fail, and when holders and model workers come and go: over parts that only note."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import pytest

from lamina.engine.failures import MAX_IN_VAIN, FailureReports, Failures
from lamina.engine.holders import HolderChange
from lamina.engine.holders import Holders as EngineHolders
from lamina.errors import EngineError
from lamina.kv.pages import PageGroup
from lamina.kv.placement import Holder, Placement
from lamina.kv.request import Request, ScheduledSequence, SchedulerConfig
from lamina.scheduling.blame import TRIES, Blame
from lamina.scheduling.control_plane import ControlPlane
from lamina_protocols.messages.messages import Announced
from lamina_protocols.messages.routes import HolderBatch
from lamina_workers.errors import HolderFault, HolderLost, RankLost
from lamina_workers.model_worker.interface import Returned, Waiting


class Worker:
    """Model workers of which `missing` are gone. `gone` are the holders that are found to be."""

    def __init__(self) -> None:
        self.missing: tuple[int, ...] = ()
        self.gone: list[int] = []
        self.back: Returned | Exception = Returned([], [])

    def lost(self) -> list[int]:
        return self.gone

    def returned(self, peer: object) -> Returned:
        self.missing = ()
        return _or_raise(self.back)


class Holders:
    """Attention worker "one" with holder 1, and "two" with holders 2 and 3."""

    def __init__(self, note: Callable[..., None]) -> None:
        self.empty = False
        self.refuses: Exception | None = None  # the answer to `join`
        self.fault: HolderFault | None = HolderFault("not one token")  # of the batch of one token
        self.lose, self.emptied, self._note = partial(note, "lose"), partial(note, "emptied"), note

    def probe(self) -> HolderFault | None:
        return self.fault

    def numbers(self, name: str) -> list[int]:
        return {"one": [1], "two": [2, 3]}.get(name, [])

    def companions(self, numbers: Sequence[int]) -> list[int]:
        return sorted({*numbers, *([2, 3] if {2, 3} & set(numbers) else [])})

    def join(self, port: Port, holder: Holder, credentials: None) -> None:
        _or_raise(self.refuses)
        self._note("join", port.name)


class Parts:
    """Every part around `Failures`. `calls` has what was asked of them, in order."""

    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []
        self.requests = {"a": SimpleNamespace(id="a"), "b": SimpleNamespace(id="b")}
        self.errors: dict[str, Exception] = {}
        self.reported: list[tuple[object, ...]] = []
        self.counters = SimpleNamespace(rebuilt_tokens=0)
        self.worker, self.holders = Worker(), Holders(self.note)
        self.deadline = SimpleNamespace(started=False, start=self._start)
        tiering = SimpleNamespace(abandon=partial(self.note, "abandon moves"))
        self.keeps = False  # requests, when they have failed
        self.under_way: list[tuple[tuple[int, ...], Any]] = []
        in_flight = SimpleNamespace(
            drop=partial(self.note, "drop"), abandon=partial(self.note, "abandon batches"), rows=self._rows
        )
        self.blame = Blame()
        admission = SimpleNamespace(most_hoped=lambda: 100)
        scheduler = SimpleNamespace(counters=self.counters, blame=self.blame, admission=admission)
        registry = SimpleNamespace(of=lambda sequence: self.requests.get(sequence.request.id), fail=self._fail)
        reports = FailureReports(lambda name: self.reported.append((name,)), lambda *n: self.reported.append(n))
        parts: dict[str, Any] = {
            "holders": self.holders,
            "copiers": (tiering,),
            "in_flight": in_flight,
            "registry": registry,
            "deadline": self.deadline,
        }
        self.failures = Failures(cast(Any, self.worker), cast(Any, scheduler), reports=reports, **parts)

    def note(self, *call: object) -> None:
        self.calls.append(call)

    def begin(self, *requests: str, holders: tuple[int, ...] = ()) -> None:
        """A batch of these requests is under way, at these holders."""
        self.under_way = [*(self.under_way if holders else ()), (holders, lane(*requests).step.rows)]

    def _rows(self, numbers: Any = None) -> list[Any]:
        concerned = (rows for at, rows in self.under_way if numbers is None or set(numbers) & set(at))
        found = [row for rows in concerned for row in rows]
        self.under_way = []
        return found

    def _start(self) -> None:
        self.deadline.started = True
        self.note("wait")

    def _fail(self, request: Any, error: Exception, cause: BaseException | None = None) -> None:
        if not self.keeps:
            del self.requests[request.id]
        self.errors[request.id] = error

    def taken(self) -> list[object]:
        """The names of what was asked since the last time."""
        names = [call[0] for call in self.calls]
        self.calls.clear()
        return names


def _or_raise(value: Any) -> Any:
    if isinstance(value, Exception):
        raise value
    return value


class Port:
    def __init__(self, name: str) -> None:
        self.name, self.closed = name, False

    def close(self) -> None:
        self.closed = True


SEQUENCES: dict[str, Any] = {
    name: ScheduledSequence(Request(name, (1,), 1), 0, 0, [1], computed=7) for name in ("a", "b")
}


def lane(*requests: str) -> Any:
    rows = tuple(SimpleNamespace(sequence=SEQUENCES[name], start=7, count=1, known=1) for name in requests)
    return SimpleNamespace(step=SimpleNamespace(rows=rows))


ABANDON = ["abandon moves", "abandon batches"]
FAULT = HolderFault("no room for a page")


def test_batch_alone_is_planned_again_when_it_fails() -> None:
    """All KV of all requests was computed again where the fault came in reply to the announcement."""
    parts = Parts()
    failed = lane("a")
    parts.failures.failed(failed, FAULT)
    assert parts.calls == [("drop", failed)]
    assert not parts.errors


def test_request_whose_batches_fail_ends_and_others_of_its_batches_do_not() -> None:
    """All requests of the third batch that failed in a row ended."""
    parts = Parts()
    for at in range(TRIES - 1):
        parts.failures.failed(lane("a", "b") if at == 0 else lane("a"), FAULT)
    assert not parts.errors
    parts.failures.failed(lane("a"), FAULT)
    why = f"{TRIES} batches in a row failed with this request, the last of it alone: {FAULT}"
    assert {name: str(error) for name, error in parts.errors.items()} == {"a": why}


@pytest.mark.parametrize("requests", [("a",), ()])
@pytest.mark.parametrize("fault", [FAULT, RankLost("model worker 1 is silent")])
def test_engine_ends_with_an_error_when_no_batch_goes_well(fault: HolderFault, requests: tuple[str, ...]) -> None:
    parts = Parts()
    parts.keeps = True  # as if others came each time
    each = TRIES if requests else 1
    for _ in range(each * MAX_IN_VAIN - 1):
        parts.begin(*requests)
        parts.failures.failed(lane(*requests), fault)
        if parts.errors:
            parts.errors.clear()
            parts.blame.forget(SEQUENCES["a"])
    parts.begin(*requests)
    with pytest.raises(EngineError, match=f"no batch goes well any more, {MAX_IN_VAIN} requests were tried") as raised:
        parts.failures.failed(lane(*requests), fault)
    assert raised.value.__cause__ is fault


def test_engine_goes_on_however_many_requests_are_bad_where_a_batch_of_one_token_goes_well() -> None:
    """Eight requests that were allowed, each too large for a frame, ended the engine."""
    parts = Parts()
    parts.keeps, parts.holders.fault = True, None
    for _ in range(3 * MAX_IN_VAIN):
        for _ in range(TRIES):
            parts.failures.failed(lane("a"), FAULT)
        assert parts.errors.pop("a")
        parts.blame.forget(SEQUENCES["a"])


def test_engine_goes_on_where_batches_go_well_between_those_that_fail() -> None:
    """Faults were counted for all requests together, and any batch that went well cleared the count."""
    parts = Parts()
    parts.keeps = True
    for _ in range(2 * MAX_IN_VAIN):
        for _ in range(TRIES):
            parts.failures.failed(lane("a"), FAULT)
        assert parts.errors.pop("a")
        parts.blame.forget(SEQUENCES["a"])
        parts.failures.batch_done(cast(Any, None))


def test_engine_goes_on_however_many_attention_workers_vanish() -> None:
    """Eight requests that ended while a storm took worker after worker ended the engine."""
    parts = Parts()
    parts.keeps = True
    for _ in range(2 * MAX_IN_VAIN):
        for _ in range(TRIES):
            parts.worker.gone = [2]
            parts.begin("a", holders=(2,))
            parts.failures.failed(lane("a"), HolderLost("two is gone"))
        assert parts.errors.pop("a")
        parts.blame.forget(SEQUENCES["a"])


def test_engine_ends_where_its_books_contradict_one_holder_after_another() -> None:
    parts = Parts()
    parts.keeps = True

    def end_a_request() -> None:
        for _ in range(TRIES):
            parts.begin("a", holders=(2,))
            parts.failures.failed(lane("a"), HolderLost("answers contradict the books", [2]))
        parts.errors.clear()
        parts.blame.forget(SEQUENCES["a"])

    parts.holders.fault = None  # one token says nothing of the books
    for _ in range(MAX_IN_VAIN - 1):
        end_a_request()
    with pytest.raises(EngineError, match="no batch goes well any more"):
        end_a_request()


def test_engine_waits_for_a_model_worker_when_a_batch_fails_for_the_lack_of_it() -> None:
    parts = Parts()
    parts.worker.missing = (1,)
    for _ in range(2 * MAX_IN_VAIN):
        parts.failures.failed(lane(), RankLost("model worker 1 is gone"))
    assert parts.taken()[:3] == [*ABANDON, "wait"]
    assert not parts.errors


def test_every_batch_at_a_lost_holder_is_suspected() -> None:
    """A holder that died with a batch was not counted: 38 workers died of one request."""
    parts = Parts()
    for _ in range(TRIES):
        parts.worker.gone = [2]
        parts.begin("a", holders=(2,))
        parts.begin("b", holders=(1,))
        parts.failures.failed(lane("a"), HolderLost("two is gone"))
    assert list(parts.errors) == ["a"]


def test_holders_that_are_gone_leave_with_their_attention_workers_when_a_batch_finds_one() -> None:
    parts = Parts()
    parts.worker.gone = [2]
    parts.failures.failed(lane("a"), HolderLost("two is gone"))
    assert parts.calls[-1] == ("lose", [2, 3])
    assert parts.taken() == [*ABANDON, "lose"]
    assert not parts.errors


def test_batch_runs_again_when_its_holder_is_in_this_process() -> None:
    parts = Parts()
    parts.failures.failed(lane("a"), HolderLost("the pool is closed"))
    assert parts.taken() == ["drop"]


@pytest.mark.parametrize(
    ("missing", "gone", "then"),
    [((), [], []), ((), [1], [*ABANDON, "lose"]), ((1,), [1], [*ABANDON, "wait"]), ((1,), [], [*ABANDON, "wait"])],
)
def test_moves_alone_are_given_up_when_a_holder_fails_outside_of_a_batch_and_is_still_there(
    missing: tuple[int, ...], gone: list[int], then: list[str]
) -> None:
    parts = Parts()
    parts.worker.missing, parts.worker.gone = missing, gone
    parts.failures.failed_outside()
    assert parts.taken() == ["abandon moves", *then]


def test_holder_that_leaves_is_lost_once() -> None:
    parts = Parts()
    parts.failures.leave("two")
    assert parts.calls[-1] == ("lose", [2, 3])
    parts.calls.clear()
    parts.failures.leave("unknown")
    assert not parts.calls


def test_loss_is_reported_and_the_wait_begins_only_when_no_holder_is_left() -> None:
    parts = Parts()
    parts.failures.holders_changed(HolderChange("lost", ("one",)))
    assert (parts.reported, parts.deadline.started) == ([("one",)], False)
    parts.holders.empty = True
    parts.failures.holders_changed(HolderChange("drained", ("two",)))
    assert (parts.reported, parts.deadline.started) == ([("one",)], False)
    parts.failures.holders_changed(HolderChange("lost", ("two", "three")))
    assert (parts.reported[1:], parts.deadline.started) == ([("two",), ("three",)], True)


def test_rebuilt_tokens_are_reported_until_all_are_there() -> None:
    parts = Parts()
    done = cast(Any, None)
    parts.failures.batch_done(done)
    parts.counters.rebuilt_tokens = 100
    parts.failures.holders_changed(HolderChange("lost", (), rebuilt=30))
    for rebuilt in (110, 110, 125, 140, 150):
        parts.counters.rebuilt_tokens = rebuilt
        parts.failures.batch_done(done)
    assert parts.reported == [(10, 30), (10, 30), (25, 30), (30, 30)]


def test_second_loss_begins_the_report_of_rebuilt_tokens_anew() -> None:
    parts = Parts()
    parts.failures.holders_changed(HolderChange("lost", (), rebuilt=30))
    parts.counters.rebuilt_tokens = 20
    parts.failures.holders_changed(HolderChange("lost", (), rebuilt=15))
    parts.failures.batch_done(cast(Any, None))
    parts.failures.holders_changed(HolderChange("lost", ()))
    parts.failures.batch_done(cast(Any, None))
    assert parts.reported == [(0, 15)]


def test_worker_that_cannot_join_is_closed_and_reported() -> None:
    parts = Parts()
    parts.holders.refuses = HolderLost("rank 1 cannot reach it")
    port = Port("three")
    parts.failures.join(cast(Any, port), Holder((1,)), None)
    assert port.closed
    assert parts.reported == [("three",)]


def test_workers_that_join_while_a_rank_is_missing_join_once_it_is_back() -> None:
    parts = Parts()
    parts.worker.missing = (1,)
    for name in ("three", "four"):
        parts.failures.join(cast(Any, Port(name)), Holder((1,)), None)
    assert not parts.calls
    parts.worker.back = RankLost("it is gone again")
    assert not parts.failures.rank_back(cast(Any, None))
    parts.worker.back, parts.worker.missing = Returned([0], []), (1,)
    parts.calls.clear()
    assert parts.failures.rank_back(cast(Any, None))
    assert parts.calls[2:] == [("emptied", [0]), ("join", "three"), ("join", "four")]
    parts.calls.clear()
    assert parts.failures.rank_back(cast(Any, None))
    assert ("join", "three") not in parts.calls


def test_seats_that_are_gone_are_lost_when_a_rank_is_back() -> None:
    parts = Parts()
    parts.worker.back = Returned([], [1])
    assert parts.failures.rank_back(cast(Any, None))
    assert parts.calls[-1] == ("lose", [1])


def test_engine_halts_once_when_a_rank_that_it_needs_is_gone() -> None:
    parts = Parts()
    parts.failures.rank_gone(1, "killed", False)  # a replica is not missed
    assert not parts.calls
    parts.worker.missing = (1,)
    parts.failures.rank_missed("model worker 1 cannot be reached")  # a step has seen it first
    parts.failures.rank_gone(1, "killed", False)
    parts.failures.rank_gone(1, "killed", False)
    assert parts.taken() == [*ABANDON, "wait"]


def test_engine_ends_when_a_rank_that_it_needs_stays_away() -> None:
    parts = Parts()
    parts.failures.rank_gone(1, "no such file", True)
    parts.worker.missing = (1,)
    with pytest.raises(EngineError, match="model worker 1 is gone and stays away: no such file"):
        parts.failures.rank_gone(1, "no such file", True)


@pytest.mark.fault("F15")
@pytest.mark.parametrize("bad", [0, 1, 2])
def test_batch_of_one_token_is_tried_at_each_holder(bad: int) -> None:
    """It was tried in the first layout alone, and of ranges at the first holder: requests ended for the others."""

    class Bad(Worker):
        def announce_now(self, batches: Mapping[int, HolderBatch]) -> tuple[int, dict[int, Announced]]:
            if bad in batches and any(row.store for row in batches[bad].rows):
                raise FAULT
            return 1, {at: Announced(1, 1, True, (9,), (0,) * len(batch.rows)) for at, batch in batches.items()}

        def execute(self, *_: object) -> Generator[Waiting, None, None]:
            yield from ()

    holders = {number: Holder((9,), fused=not number) for number in range(3)}
    placement = Placement(
        holders, heads=((1,),), page_size=16, max_model_len=64, shard="sequence", local_pools=(0,), local_tier=True
    )
    control = ControlPlane(SchedulerConfig(16, 8, 64, 16, ((PageGroup(1),),)), placement)
    assert EngineHolders(cast(Any, Bad()), control, {1: "one", 2: "two"}).probe() is FAULT
