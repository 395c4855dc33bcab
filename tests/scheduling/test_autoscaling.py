"""How many attention workers are wanted, by loads that are played to the autoscaler second by second."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from hypothesis import given
from hypothesis import strategies as st

from lamina.scheduling.autoscaling import PATIENCE, Autoscaler, Decision, KvLoad

ROOM = 10_000  # tokens of a worker, and of the engine's own holder


@dataclass
class Play:
    """Workers that need `start` seconds to come, and KV that grows; a worker that leaves is gone at once."""

    scaler: Autoscaler
    start: float = 3.0
    now: float = 0.0
    kept: float = 0.0
    generated: float = 0.0
    names: list[str] = field(default_factory=list)
    coming: list[float] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    most_kept: float = 0.0  # share of the room
    made: int = 0

    def __post_init__(self) -> None:
        for _ in range(self.scaler.least):
            self._join()

    def _join(self) -> None:
        self.names.append(f"attention-{self.made}")
        self.made += 1

    def load(self, queued: int = 0, stranded: bool = False) -> KvLoad:
        total = ROOM * (1 + len(self.names))
        workers = {name: number for number, name in enumerate(self.names, 1)}
        return KvLoad(workers, ROOM, total, int(total - self.kept), queued, stranded, int(self.generated))

    def step(self, rate: float = 0.0, queued: int = 0, stranded: bool = False) -> Decision:
        """Half a second at so many tokens a second."""
        self.now += 0.5
        self.kept += rate / 2
        self.generated += rate / 2
        while self.coming and self.coming[0] <= self.now:
            self.coming.pop(0)
            self._join()
        decision = self.scaler.decide(self.load(queued, stranded), self.now)
        self.coming += [self.now + self.start] * (decision.wanted - len(self.names) - len(self.coming))
        if decision.leaves:
            self.names.remove(decision.leaves)
        if decision.reason:
            self.reasons.append(decision.reason)
        self.most_kept = max(self.most_kept, self.kept / (ROOM * (1 + len(self.names))))
        return decision

    def run(self, seconds: float, rate: float = 0.0) -> None:
        for _ in range(int(seconds * 2)):
            self.step(rate)


def test_workers_come_before_the_holders_are_full_and_go_when_idle() -> None:
    play = Play(Autoscaler(1, 3))
    play.run(10, rate=1000)
    assert (len(play.names), play.coming) == (1, [])
    play.run(16, rate=1000)
    assert len(play.names) == 3
    assert play.most_kept < 1
    play.kept = 0
    play.run(2 * PATIENCE + 5)
    assert len(play.names) == 1
    assert [reason.partition(":")[0] for reason in play.reasons] == [
        "attention workers 1 -> 2 of 1 to 3", "attention workers 2 -> 3 of 1 to 3",
        "attention workers 3 -> 2 of 1 to 3", "attention workers 2 -> 1 of 1 to 3",
    ]  # fmt: skip


def test_one_that_needs_a_minute_is_wanted_a_minute_earlier() -> None:
    slow, quick = Play(Autoscaler(1, 2, start_seconds=60.0), start=60.0), Play(Autoscaler(1, 2))
    for play in (slow, quick):
        while not play.coming:
            play.step(rate=100)
        play.run(70, rate=100)
        assert play.most_kept < 1
    assert slow.scaler.start_seconds == 60.0
    assert quick.scaler.start_seconds == 3.0
    assert "KV is full in 94.5 s" in slow.reasons[0]
    assert "KV is full in 9.0 s" in quick.reasons[0]


def test_the_time_that_a_worker_needed_is_remembered_and_forgotten_slowly() -> None:
    play = Play(Autoscaler(1, 9), start=10.0)
    while len(play.names) < 2:
        play.step(rate=1000)
    assert play.scaler.start_seconds == 10.0
    play.start = 2.0
    while len(play.names) < 3:
        play.step(rate=1000)
    assert play.scaler.start_seconds == 6.0


def test_a_long_queue_wants_several_at_once() -> None:
    play = Play(Autoscaler(1, 8))
    play.step()
    assert play.step(queued=48_000).wanted == 4  # 20,000 are left, 28,000 lack
    assert play.step(queued=48_000).wanted == 4  # they are coming
    assert play.step(queued=1_000_000).wanted == 8


def test_a_request_that_no_holder_can_keep_wants_one_more_at_a_time() -> None:
    play = Play(Autoscaler(0, 3))
    assert play.step(stranded=True).wanted == 1
    assert play.step(stranded=True).wanted == 1
    play.run(4)
    assert play.step(stranded=True).wanted == 2


def test_a_lost_worker_is_expected_back_and_no_reason_for_another() -> None:
    play = Play(Autoscaler(2, 4))
    play.kept = 19_000
    play.run(5)
    play.names.pop()
    assert {play.step(rate=10).wanted for _ in range(20)} == {2}


def test_the_emptiest_leaves_and_the_least_number_stays() -> None:
    play = Play(Autoscaler(1, 3))
    play.step(queued=45_000)
    play.run(5)
    assert play.names == ["attention-0", "attention-1", "attention-2"]
    play.run(PATIENCE + 5)
    assert play.names == ["attention-1", "attention-2"]
    play.run(10 * PATIENCE)
    assert play.names == ["attention-2"]


def test_more_that_joined_than_were_wanted_are_kept_until_they_are_not_needed() -> None:
    """A drain that failed, or an engine that was started again beside three workers."""
    play = Play(Autoscaler(1, 3))
    play._join()
    assert play.step().wanted == 2


def test_when_kv_is_full_is_said_by_growth_and_queue() -> None:
    scaler = Autoscaler(1, 1)
    load = KvLoad({"a": 0}, ROOM, ROOM, ROOM, 0, False, 0)
    assert scaler.decide(load, 0.0).full_in is None
    assert scaler.decide(replace(load, left=9_000, generated=1_000), 10.0).full_in == 90.0
    assert scaler.decide(replace(load, left=9_000, queued=9_500, generated=1_000), 20.0).full_in == 0.0


@given(rates=st.lists(st.floats(0, 4000), min_size=1, max_size=8), least=st.integers(0, 3), most=st.integers(0, 3))
def test_it_stays_in_its_range_and_does_not_swing_at_a_steady_load(rates: list[float], least: int, most: int) -> None:
    play = Play(Autoscaler(least, least + most))
    for rate in rates:
        for _ in range(20):
            decision = play.step(rate)
            assert least <= decision.wanted <= least + most
            play.kept = min(play.kept, ROOM * (1 + len(play.names)))
    play.run(4)
    changes = len(play.reasons)
    play.run(4 * PATIENCE)  # nothing grows: only as many go as there is room without them
    assert all("does not grow" in reason for reason in play.reasons[changes:])
    assert len(play.reasons) - changes <= most
