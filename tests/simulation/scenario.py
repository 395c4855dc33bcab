"""A scenario as data: what is built, what happens when, and what came of it.

A scenario is a value: it prints as Python, and running it again gives the same outcome. Times are seconds of virtual
time since the start. `run` builds the cluster of a scenario in one thread and lets the virtual time pass. Knows nothing
of how scenarios are drawn, which tokens are right, and how a failing one gets smaller.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

Way = Literal["both", "to worker", "to engine"]
Mode = Literal["liveness", "safety"]


class Model(NamedTuple):
    """What differs between models: the `policy` of all heads ("": they read everything), the sliding `window` of the
    second layer (0: none), and whether the first layer keeps `states` instead of KV."""

    policy: str = ""
    window: int = 0
    states: bool = False


PLAIN = Model()


@dataclass(frozen=True, slots=True)
class Setup:
    """The cluster before anything goes wrong.

    `workers` has the pages of each attention worker: worker n of an event is the entry n, those that join later follow.
    Of these the first `old_workers` are of the previous version, and lack what is new in this one. Without workers the
    engine's process has all KV.
    `local_pages`: of the pool in the engine's process; with a `local_tier` whole sequences live there too, and move.
    `drafts`: how many tokens are proposed beside each, some of them wrong; 0: no speculation. `shares`: how many ranks
    there are ("tensor") or replicas. `policy`, `window` and `states` as in `Model`. `eager`: growth goes elsewhere,
    parts move and spares are copied for a few tokens already, not only where that pays.

    Seconds: after `timeout` without an answer a worker is lost; a worker ends a session after `lease` without a sign
    of life, and keeps the KV of an engine that is gone for `linger`; requests wait `wait` for a worker to join.
    `again`: between two attempts to connect to a worker, or to start an engine.
    `checksum`: on each frame, so that a flipped bit ends the channel. `link`: an HTTP process with all clients stands
    before the engine, and outlives it.
    """

    workers: tuple[int, ...] = (64, 64)
    shard: Literal["heads", "sequence", "heads+sequence"] = "heads"
    local_pages: int = 32
    local_tier: bool = False
    lanes: int = 1
    query_first: bool = False
    max_batch_tokens: int = 64
    prefix_cache: bool = False
    drafts: int = 0
    policy: str = ""
    window: int = 0
    states: bool = False
    eager: bool = False
    old_workers: int = 0
    redundancy: str = "none"
    model_workers: int = 1
    model_parallel: Literal["replicas", "tensor"] = "replicas"
    journal: bool = False
    link: bool = False
    timeout: float = 1.0
    lease: float = 2.0
    linger: float = 5.0
    wait: float = 30.0
    latency: float = 0.0002
    again: float = 0.2
    checksum: bool = True

    @property
    def model(self) -> Model:
        """What differs between models."""
        return Model(self.policy, self.window, self.states)


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happens at second `at`. One that makes no sense then, such as the death of what is dead, does
    nothing."""

    at: float


@dataclass(frozen=True, slots=True)
class Submit(Event):
    """A client asks for `tokens` of each of `samples`, with a prompt of `prompt` tokens: the first `shared` are those
    of every request of the same `family`. `request` numbers the requests of a scenario. Several samples are drawn at
    random, each with another text; one alone is greedy."""

    request: int
    prompt: int
    tokens: int
    samples: int = 1
    family: int = 0
    shared: int = 0
    priority: int = 0


@dataclass(frozen=True, slots=True)
class Leave(Event):
    """The client of a request goes: `how` it aborts (all samples, or the one), or its sink breaks."""

    request: int
    how: Literal["abort", "break"] = "abort"
    sample: int | None = None


@dataclass(frozen=True, slots=True)
class KillWorker(Event):
    """An attention worker's process dies at once, and its KV with it. A new one starts in its place after `back`
    seconds. The engine's host sees connections break, unless its machine is gone with it (`silent`)."""

    worker: int
    back: float = 0.5
    silent: bool = False


@dataclass(frozen=True, slots=True)
class KillModelWorker(Event):
    """A model worker beyond 0 dies, and a new one starts after `back` seconds."""

    rank: int
    back: float = 0.5


@dataclass(frozen=True, slots=True)
class KillEngine(Event):
    """The engine's process dies at once. A new one starts after `back` seconds; with a journal it goes on. `torn`: this
    many of the last bytes that it wrote to the journal are lost."""

    back: float = 0.5
    torn: int = 0


@dataclass(frozen=True, slots=True)
class KillServer(Event):
    """The HTTP process before the engine dies and another takes its place at once: its clients are gone. There is one
    where the setup has a `link`."""


@dataclass(frozen=True, slots=True)
class ResetLink(Event):
    """The connection between the HTTP process and the engine breaks; what was on its way is lost."""


@dataclass(frozen=True, slots=True)
class Freeze(Event):
    """A worker stands still for `seconds`, as by SIGSTOP; what comes meanwhile waits."""

    worker: int
    seconds: float


@dataclass(frozen=True, slots=True)
class FreezeEngine(Event):
    """The engine stands still for `seconds`; its heartbeats too."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Slow(Event):
    """A worker takes `factor` times as long for everything, for `seconds`."""

    worker: int
    seconds: float
    factor: float = 10.0


@dataclass(frozen=True, slots=True)
class Delay(Event):
    """Frames between a worker and the engine take `extra` seconds more, for `seconds`. Control calls may overtake."""

    worker: int
    seconds: float
    extra: float


@dataclass(frozen=True, slots=True)
class Cut(Event):
    """Nothing gets through between a worker and the engine for `seconds`, one `way` or both; neither side is told.
    What was sent meanwhile comes afterwards, as TCP sends it again, where the connection still stands."""

    worker: int
    seconds: float
    way: Way = "both"


@dataclass(frozen=True, slots=True)
class Reset(Event):
    """The connection to a worker breaks; what was on its way is lost. Both sides see it."""

    worker: int


@dataclass(frozen=True, slots=True)
class Flip(Event):
    """A bit of the next frame is flipped on its way to or from a worker."""

    worker: int
    way: Way = "both"
    bit: int = 0


@dataclass(frozen=True, slots=True)
class Lose(Event):
    """The next message to a worker that it would not answer, such as keys and values, is lost, and no error tells it.
    No channel loses a message, but what forwards or handles it may."""

    worker: int


@dataclass(frozen=True, slots=True)
class Break(Event):
    """A worker fails by an error of its own, once: `when` its next message is not handled yet, or is, or when it is to
    store what the last one left."""

    worker: int
    when: Literal["before", "after", "settle"] = "before"


@dataclass(frozen=True, slots=True)
class JumpClock(Event):
    """The wall clock of the engine's machine jumps. Monotonic clocks do not."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Drain(Event):
    """The operator drains a worker. It ends when it is let go, and does not come back."""

    worker: int


@dataclass(frozen=True, slots=True)
class Join(Event):
    """One attention worker more, of so many pages."""

    pages: int


@dataclass(frozen=True, slots=True)
class Move(Event):
    """From now on this share of the sequences is to live in the engine's process, as the tuner might decide."""

    share: float


@dataclass(frozen=True, slots=True)
class Disk(Event):
    """The journal's disk is full or read-only for `seconds`."""

    seconds: float
    what: Literal["full", "read-only"] = "full"


@dataclass(frozen=True, slots=True)
class Scenario:
    """`mode`: in "liveness" all faults end at `heals`, everything dead is started again, and every request must end
    before `ends`. In "safety" faults go on until `ends`, and a request may be unfinished then. `seed` decides what the
    events leave open: latencies, which drafts are wrong."""

    seed: int = 0
    setup: Setup = field(default_factory=Setup)
    events: tuple[Event, ...] = ()
    mode: Mode = "liveness"
    heals: float = 10.0
    ends: float = 600.0


@dataclass(slots=True)
class Answer:
    """What one request's client got: the tokens of each sample, and how each ended (None: it has not). `error`: the
    text and kind of an error that ended all. `left`: its client went, so it may end early."""

    submit: Submit
    samples: list[list[int]]
    ends: list[str | None]
    error: str = ""
    left: bool = False

    @property
    def over(self) -> bool:
        return bool(self.error) or all(self.ends)


@dataclass(slots=True)
class Outcome:
    """What came of a scenario. `complaints`: what must never be, as the cluster itself sees it: pages that leak, an
    output after the end, an engine that turns in place or stops by an error. `counts`: `deaths` of processes, each
    fault by the name of its event, `steps`, `frames`, `tokens`, and what engines did, such as `sequences moved`. `log`:
    one line for each thing that happened. `seconds` of virtual time have passed."""

    answers: dict[int, Answer]
    complaints: list[str]
    counts: Counter[str]
    log: list[str]
    seconds: float


def fault_events(counts: Counter[str]) -> int:
    """How many faults have happened, of all kinds, by an outcome's counts."""
    return sum(counts[name] for name in {kind.__name__ for kind in Event.__subclasses__()} - {"Submit"})


def prompt_of(submit: Submit) -> tuple[int, ...]:
    """The token ids of a request's prompt."""
    own = [*_drawn(1 + submit.family, submit.shared), *_drawn(1_000_003 + submit.request, submit.prompt)]
    return tuple(own[: submit.prompt])


def _drawn(seed: int, count: int) -> Iterable[int]:
    """The first `count` tokens of a stream: a linear congruence, whose high bits are used."""
    state = seed * 2_654_435_761 % (1 << 61)
    for _ in range(count):
        state = (state * 6_364_136_223_846_793_005 + 1_442_695_040_888_963_407) % (1 << 64)
        yield (state >> 40) % VOCABULARY


VOCABULARY = 251
STEP_S = 100e-6  # that the model takes for a step
_TOKENS = 48  # of the texts that are kept, unless more are asked for


def run(scenario: Scenario) -> Outcome:
    """Build the cluster of a scenario, let everything happen, and see what came of it. Deterministic."""
    from cluster import Cluster  # it loads torch and the engine

    gc.freeze()  # collections, which freed seats make too, look at what is new: else each would take 0.3 s
    gc.disable()
    try:
        return Cluster(scenario).run()
    finally:
        gc.enable()
        gc.collect()  # the cluster, a knot of cycles: frozen by the next run it would stay for ever


def reference_text(submit: Submit, sample: int, model: Model = PLAIN) -> list[int]:
    """The tokens that a sample must get, computed without any engine."""
    from checksum_model import text

    seed = submit.request if submit.samples > 1 else None
    # A text of fewer tokens is the beginning of one of more, which is kept.
    return list(text(prompt_of(submit), max(submit.tokens, _TOKENS), model, seed, sample)[: submit.tokens])
