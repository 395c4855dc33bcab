"""The local share over simulated tiers: it is soon near the best, and slow remote attention is not used."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina.scheduling.local_share import Batch, LocalShare, prefers_local, to_move

SEQUENCES = 8


@dataclass
class World:
    """Sequences of equal length over two tiers. `local` and `remote` are seconds that reading 1,000 tokens of each
    takes them, `fixed` those of having anything remote, `dense` the rest of a step. Where they share cores (`shared`)
    each takes time from the other, and answers come `beside` seconds later. A sequence takes `slow` steps to move,
    each of which takes twice the time."""

    local: float
    remote: float
    fixed: float = 0.002
    dense: float = 0.03
    shared: float = 0.0
    beside: float = 0.0
    noise: float = 0.0
    slow: int = 2
    most: int = SEQUENCES
    rng: random.Random = field(default_factory=lambda: random.Random(1))
    here: int = SEQUENCES
    moving: int = 0
    tokens: int = 1000
    grows: int = 1

    def times(self, here: int) -> tuple[float, float, float]:
        """Seconds that the local and the remote tier take, and the whole step."""
        share, length = here / SEQUENCES, self.tokens / 1000
        local, remote = self.local * share * length, self.remote * (1 - share) * length
        both = self.shared * min(local, remote)
        local, remote = local + both, remote + both
        answered = self.fixed + (self.beside if share else 0.0) + remote if share < 1 else 0.0
        return local, remote, self.dense + max(local, answered)

    def step(self, balance: LocalShare) -> float:
        local, remote, seconds = self.times(self.here)
        wobble = 1 + self.noise * self.rng.uniform(-1, 1)
        answered = self.fixed + (self.beside if self.here else 0.0) + remote if self.here < SEQUENCES else 0.0
        waited = max(0.0, answered - local)
        self.tokens += self.grows
        moving = self.moving > 0
        balance.completed(
            Batch(
                self.here * self.tokens, (SEQUENCES - self.here) * self.tokens, local * wobble, remote * wobble,
                max(answered, local if answered else 0.0), waited, seconds * wobble * (2 if moving else 1), SEQUENCES,
            ),
            moving,
        )  # fmt: skip
        self._move(balance)
        return seconds

    def _move(self, balance: LocalShare) -> None:
        if self.moving:
            self.moving -= 1
            if self.moving == 0:
                self.here += self.towards
            return
        off = balance.share * SEQUENCES - self.here
        if abs(off) > 0.6 and not (off > 0 and self.here >= self.most):
            self.towards = 1 if off > 0 else -1
            self.moving = self.slow

    def best(self) -> float:
        return min(self.times(here)[2] for here in range(self.most + 1))

    def run(self, balance: LocalShare, steps: int) -> list[float]:
        return [self.step(balance) for _ in range(steps)]


@pytest.mark.parametrize(
    ("world", "share"),
    [
        (World(local=0.04, remote=0.04), 0.5),
        (World(local=0.04, remote=0.12), 0.75),
        (World(local=0.12, remote=0.04), 0.25),
        (World(local=0.04, remote=0.04, fixed=0.05, slow=1), 1.0),  # all remote is tried on the way
        (World(local=0.01, remote=1.0), 1.0),
        (World(local=2.0, remote=0.01), 0.0),
        (World(local=0.04, remote=0.04, most=3), 0.375),
    ],
)
def test_local_share_settles_near_the_best_within_fifty_steps(world: World, share: float) -> None:
    balance = LocalShare()
    if world.most < SEQUENCES:
        world.here = world.most
    world.run(balance, 50)
    assert balance.settled
    assert world.moving == 0
    assert world.times(world.here)[2] <= 1.05 * world.best()
    assert abs(world.here / SEQUENCES - share) <= 1.01 / SEQUENCES


@pytest.mark.parametrize(
    ("world", "here"),
    [
        (World(local=0.04, remote=0.04, shared=1.0, slow=1), SEQUENCES),
        (World(local=0.024, remote=0.008, fixed=0.01, dense=0.019, shared=2.0, slow=1), 0),
    ],
)
def test_local_share_tries_all_remote_when_the_tiers_disturb_each_other(world: World, here: int) -> None:
    balance = LocalShare()
    world.run(balance, 80)
    assert balance.settled
    assert world.moving == 0
    assert world.here == here


def test_local_share_settles_again_within_fifty_steps_after_a_change() -> None:
    world, balance = World(local=0.04, remote=0.04), LocalShare()
    world.run(balance, 100)
    for local, remote in ((0.12, 0.04), (0.04, 0.12), (0.04, 0.04), (0.12, 0.12)):
        world.local, world.remote = local, remote
        world.run(balance, 50)
        assert balance.settled
        assert world.times(world.here)[2] <= 1.05 * world.best(), (local, remote, world.here)
        world.run(balance, 30)
        assert world.times(world.here)[2] <= 1.05 * world.best()


@pytest.mark.parametrize("beside", [0.0, 0.012])
@pytest.mark.parametrize("noise", [0.01, 0.05])
def test_local_share_settles_within_fifty_steps_when_either_tier_slows(noise: float, beside: float) -> None:
    """A tier becomes 1.5 to 5 times as slow, or as it was, while it has something to do and no search goes on.
    `beside`: seconds a step that the tiers cost each other, so that all or nothing may be best with a hill between."""
    late, seen = list[tuple[int, float, float]](), 0
    for seed in range(40):
        rng = random.Random(seed)
        local, remote = (rng.uniform(0.01, 0.04) for _ in range(2))
        world, balance = World(local, remote, noise=noise, beside=beside, slow=1, rng=rng, grows=0), LocalShare()
        world.run(balance, 80)
        factor = rng.uniform(1.5, 5)
        for slow_local, slow_remote in ((factor, 1), (1, 1), (1, factor), (1, 1), (factor, 1)):
            changes = local * slow_local != world.local, remote * slow_remote != world.remote
            world.local, world.remote = local * slow_local, remote * slow_remote
            silent = not balance.settled or (changes[0] and world.here == 0) or (changes[1] and world.here == SEQUENCES)
            world.run(balance, 50)
            seen += not silent
            if not silent and world.times(world.here)[2] > 1.05 * world.best():
                late.append((seed, slow_local, slow_remote))
            world.run(balance, 50)
    assert seen > 50
    assert len(late) <= 0.08 * seen, late


@settings(max_examples=60, deadline=None)
@given(
    local=st.floats(0.002, 0.2),
    remote=st.floats(0.002, 0.2),
    fixed=st.floats(0.0, 0.05),
    dense=st.floats(0.005, 0.1),
    shared=st.floats(0.0, 1.0),
    slow=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_local_share_is_near_the_best_for_any_two_tiers(
    local: float, remote: float, fixed: float, dense: float, shared: float, slow: int, seed: int
) -> None:
    world = World(local, remote, fixed, dense, shared, noise=0.01, slow=slow, rng=random.Random(seed), grows=0)
    balance = LocalShare()
    world.run(balance, 120)
    there = world.times(world.here)[2]
    if shared <= 0.5:  # beyond, the best two places are all or nothing, with a hill between them
        assert there <= 1.06 * world.best()
    assert there <= 1.03 * world.times(SEQUENCES)[2]  # nothing is lost by having workers


@pytest.mark.parametrize("noise", [0.03, 0.1])
def test_local_share_settles_despite_noise(noise: float) -> None:
    world, balance = World(local=0.04, remote=0.04, noise=noise), LocalShare()
    settled, steps = 0, 600
    for _ in range(steps):
        world.step(balance)
        settled += balance.settled
    assert settled > 0.7 * steps
    assert world.times(world.here)[2] <= 1.15 * world.best()


def test_trials_of_a_silent_tier_cost_no_more_than_a_hundredth() -> None:
    world, balance = World(local=0.01, remote=0.5, grows=0), LocalShare()
    world.run(balance, 60)
    assert world.here == SEQUENCES
    spent = sum(world.run(balance, 5000))
    assert spent <= 1.013 * 5000 * world.times(SEQUENCES)[2]
    world.remote = 0.001  # and a worker that has become worth it is found
    world.run(balance, 5000)
    assert world.here < SEQUENCES


def test_local_share_ignores_a_change_of_lanes() -> None:
    balance = LocalShare()
    batch = Batch(4000, 4000, 0.02, 0.02, 0.022, 0.002, 0.05, SEQUENCES)
    for _ in range(40):
        balance.completed(batch._replace(local_tokens=8000, remote_tokens=0))
    share = balance.share
    while not balance.settled:
        balance.completed(batch)
    share = balance.share
    for _ in range(30):
        balance.completed(batch._replace(seconds=0.04, lanes=2))
    assert balance.settled
    assert balance.share == share


def test_local_share_stays_when_it_was_given() -> None:
    balance = LocalShare(0.3)
    World(local=1.0, remote=0.1).run(balance, 100)
    assert balance.share == 0.3
    assert balance.settled
    balance.reset()
    assert balance.share == 0.3


def test_new_sequences_go_to_the_tier_below_its_share() -> None:
    assert prefers_local(0, 0, 10, 1.0)
    assert not prefers_local(0, 0, 10, 0.0)
    local = total = 0
    for _ in range(20):
        if prefers_local(local, total, 10, 0.25):
            local += 10
        total += 10
    assert local == 50


def test_moves_bring_the_share_closer() -> None:
    assert to_move([100, 100, 100, 100], 200, 5) == [0, 1]
    assert to_move([100, 100, 100, 100], 200, 1) == [0]
    assert to_move([100], 49, 2) == []  # it would be off by more
    assert to_move([100], 52, 2) == []  # it would hardly be closer
    assert to_move([10, 70, 30], 100, 5) == [1, 2]
    assert to_move([], 100, 5) == []
