"""The engine's process of the simulated cluster: the real engine, scheduler, journal, model worker and ports.

`EngineHost` outlives its processes: it keeps the journal's folder, and starts the next engine.
"""

from __future__ import annotations

import contextlib
import os
import queue
import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, Protocol

from attention_host import TOLD_TO_FAIL, AttentionHost
from checksum_model import KV_HEADS, ChecksumDecoder, layer_specs
from disk import Disk
from model_host import ReplicaHosts, edges, part, waits
from scenario import STEP_S, Model, Scenario, Setup
from virtual_time import Process, Time, Wake

from lamina.engine import batch
from lamina.engine.drafting import Wanted
from lamina.engine.engine import Engine, Mailbox
from lamina.engine.failures import FailureReports
from lamina.engine.holders import seated
from lamina.errors import JournalError
from lamina.journal.journal import Facts, Journal
from lamina.journal.recorder import Recorder
from lamina.kv import redundancy
from lamina.kv.kv_shares import Handover, Pages, Part, Share
from lamina.kv.placement import Holder, Placement
from lamina.kv.request import ScheduledSequence, SchedulerConfig
from lamina.launch.journal_setup import Identity, _past_epochs, recover
from lamina.launch.kv_sizing import learns, page_groups, state_pools
from lamina.scheduling.control_plane import ControlPlane
from lamina.scheduling.speculation import Speculation, left_to_draft
from lamina.scheduling.step_tuner import MeasuredBatch, StepTuner
from lamina_protocols.errors import LaminaError
from lamina_protocols.messages.layers import HolderConfig
from lamina_protocols.messages.pools import pools
from lamina_workers.attention_worker.attention_worker import AttentionWorker
from lamina_workers.attention_worker.page_layout import page_cost
from lamina_workers.errors import HolderFault, HolderLost, RankLost
from lamina_workers.model_worker.model_worker import ModelWorker
from lamina_workers.parallel.peer_messages import Begin
from lamina_workers.parallel.peers import Peer
from lamina_workers.parallel.replicas import PipelineReplicas
from lamina_workers.parallel.tensor_parallel import seat
from lamina_workers.ports.data_channel import ChannelOptions
from lamina_workers.ports.port import AttentionPort, LocalAttention, survey
from lamina_workers.ports.remote import RemoteAttention, SeatOptions, connect

PAGE_SIZE = 16
MAX_MODEL_LEN = 512
LOCAL = 0
HANDSHAKE_S = 3.0  # at most
CLAIM_S = 10.0
# What the engine says of a worker whose messages cannot be: see `Replies`, `RemoteAttention`, `ModelWorker`, `Engine`.
_BLAMES = ("was due, got", "nobody has asked for", "it sent a", "contradict the engine's books", "times in a row",
           "can start at", "were announced", "were asked of")  # fmt: skip
_FACTS = Facts("checksum", PAGE_SIZE, "float32", 2)


@lru_cache(maxsize=64)
def kv_config(pages: int, model: Model) -> HolderConfig:
    """What a holder of so many pages of KV is built from; where the model has states, of a quarter as much memory for
    these besides."""
    config = HolderConfig(layer_specs(model), PAGE_SIZE, "float32", 1 << 20, sequence_tokens=64)
    kv = pools(config)[-1].config
    return replace(config, kv_memory=-(-pages * page_cost(kv) * config.kv_memory // kv.kv_memory))


class _Mailbox(Mailbox):
    """As a `Mailbox`, whose thread is a task."""

    def __init__(self, process: Process, each_step: Callable[[], None]) -> None:
        super().__init__()
        self._process = process
        self._each_step = each_step
        self._news = Wake(process)

    def request(self, do: Callable[[], object], refuse: Callable[..., object]) -> None:
        super().request(do, refuse)
        self._news.notify()

    def post(self, do: Callable[[], object]) -> None:
        super().post(do)
        self._news.notify()

    def get(self, timeout: float | None) -> Callable[[], object] | None:
        self._process.check()
        if self.empty:
            if timeout == 0:
                self._each_step()
                self._process.sleep(STEP_S)
            else:
                self._news.wait(timeout)
        try:
            letter = self._queue.get_nowait()
        except queue.Empty:
            if timeout is None:
                return lambda: None  # it was woken for nothing; the loop asks again
            raise
        return None if letter is None else letter.do


class SimulatedEngine(Engine):
    """An engine whose thread is a task of its process."""

    def __init__(self, process: Process, owner: Owner, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._mailbox = _Mailbox(process, owner.step)
        self._owner = owner
        self._handle = self._failures.failed
        self._failures.failed = self._failed  # type: ignore[method-assign]

    def _failed(self, failing: batch.Batch, fault: HolderFault) -> None:
        """A batch failed: by what happened to a worker, never by what a worker said, for all are honest, but where a
        scenario tells one to fail."""
        said = str(fault)
        lost = isinstance(fault, HolderLost | RankLost) or " is lost: " in said  # the latter to a replica alone
        if TOLD_TO_FAIL not in said and (not lost or any(blame in said for blame in _BLAMES)):
            self._owner.complain(f"an honest worker is blamed: {said}")
        self._handle(failing, fault)

    def clear_prefixes(self) -> None:
        """Give up all cached prefixes, between two batches."""
        self._mailbox.post(self._control.scheduler.running.prefix_cache.clear)

    @property
    def holder_names(self) -> dict[int, str]:
        """Of the attention workers that are holders, by number."""
        return self._holders.names

    def run(self) -> None:
        """As of an engine, but that nothing is done where it dies."""
        while self._read_mail():
            self.step()


class Wavering(StepTuner):
    """As many lanes as it is told, and a local share that a scenario changes."""

    def __init__(self, setup: Setup) -> None:
        super().__init__((setup.lanes,), 0.5 if setup.local_tier else 0.0, (not setup.query_first,))

    def completed(self, batch: MeasuredBatch, moving: bool = False) -> None:
        """Nothing is measured: these times are those of the machine that simulates."""


class Always(Speculation):
    """Deals every sequence as many drafts as it can have."""

    def depths(self, sequences: Sequence[ScheduledSequence]) -> list[int]:
        return [min(self.most, left_to_draft(sequence)) for sequence in sequences]


class Guesses:
    """A proposer that knows the texts, by prompt and sample, and is wrong now and then."""

    def __init__(self, texts: Mapping[tuple[tuple[int, ...], int], Sequence[int]], rng: random.Random) -> None:
        self._texts = texts
        self._rng = rng

    def propose(self, wanted: Sequence[Wanted]) -> list[tuple[int, ...]]:
        return [self._drafts(each) for each in wanted]

    def _drafts(self, wanted: Wanted) -> tuple[int, ...]:
        sequence, rng = wanted.sequence, self._rng
        prompt = sequence.request.prompt
        at = len(sequence.tokens) - len(prompt)
        drafts = self._texts.get((prompt, sequence.sample), ())[at : at + rng.randint(1, wanted.depth)]
        right = rng.randint(0, wanted.depth)
        return tuple(draft if n < right else (draft + 1) % 251 for n, draft in enumerate(drafts))

    def ended(self, sequence: ScheduledSequence) -> None:
        pass


class CountedPlacement(Placement):
    """Counts in `reached` what happens to parts, so that what never comes about in many seeds is seen."""

    def __init__(self, reached: Counter[str], *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._reached = reached

    def grow(self, handle: int, handovers: Sequence[Handover]) -> None:
        self._reached["parts that grow elsewhere"] += len(handovers)
        super().grow(handle, handovers)

    def promote(self, handle: int, lost: Share, part: Part | None, share: Share) -> None:
        self._reached["lost parts taken over or read back"] += 1
        super().promote(handle, lost, part, share)

    def moved(self, handle: int, old: Iterable[Part], new: Iterable[Part], freed: Pages) -> None:
        self._reached["sequences moved"] += 1
        super().moved(handle, old, new, freed)

    def adopt(self, handle: int, parts: Sequence[Part]) -> None:
        self._reached["sequences adopted"] += 1
        super().adopt(handle, parts)


class Owner(Protocol):
    """Who starts engines: gets to know of them."""

    def engine_up(self, engine: Engine) -> None: ...
    def engine_failed(self, error: BaseException) -> None: ...
    def engine_gave_up(self, why: str) -> None: ...
    def step(self) -> None: ...
    def complain(self, what: str) -> None: ...
    def say(self, what: str) -> None: ...


class EngineHost:
    """The engine's machine. `hosts` are those of attention workers, by number; those in `retired` are not connected to
    any more."""

    def __init__(
        self, scenario: Scenario, time: Time, hosts: list[AttentionHost], owner: Owner, disk: Disk | None,
        texts: Mapping[tuple[tuple[int, ...], int], Sequence[int]],
    ) -> None:  # fmt: skip
        self.process: Process
        self.engine: SimulatedEngine | None = None
        self.control: ControlPlane
        self.local: AttentionWorker
        self.worker: Any = None
        self.ports: dict[int, RemoteAttention] = {}  # by host: the newest
        self.starts = 0
        self.retired: set[int] = set()
        self.resumed = False  # whether an engine has taken up what another has left at holders
        self.share: float | None = None
        self.reached: Counter[str] = Counter()
        self.replica_back = 0.1  # seconds until a replica that has ended is started again
        self._scenario = scenario
        self._setup = scenario.setup
        self._time = time
        self._hosts = hosts
        self._owner = owner
        self._disk = disk
        self._texts = texts
        self._journal: Journal | None = None
        self.replicas: ReplicaHosts | None = None
        self._names: dict[str, int] = {}  # of a port: its host
        self._lost: dict[int, Wake] = {}  # by host: that its port is lost

    @property
    def slices(self) -> int:
        """How many slices of batches this engine's replicas have computed."""
        worker = self.worker
        return sum(n for rank, n in worker.slices.items() if rank) if isinstance(worker, PipelineReplicas) else 0

    @property
    def alive(self) -> bool:
        return self.starts > 0 and self.process.alive

    def start(self) -> None:
        """A process starts."""
        self.starts += 1
        self.engine = None
        self.ports.clear()
        self._lost = {}
        self.replicas = None
        self.process = Process(self._time, f"engine-{self.starts}", lambda task, error: self._failed(error))
        self.process.start(self._live, "engine")

    def kill(self) -> None:
        """The process is gone at once; its machine closes what it had open."""
        self.process.kill()
        if self.engine is not None:
            counters = self.control.scheduler.counters
            self.reached += Counter({"preemptions": counters.preempted, "tokens rebuilt": counters.rebuilt_tokens})
        self.engine = None
        part(self.process, self._hosts)
        if self.replicas is not None:
            self.replicas.end()
        if (journal := self._journal) is not None:
            for descriptor in (journal._file, journal._lock):
                if descriptor is not None:
                    os.close(descriptor)
            journal._file = journal._lock = self._journal = None

    # In the process.

    def _failed(self, error: BaseException) -> None:
        self._owner.engine_failed(error)

    def _live(self) -> None:
        setup, process = self._setup, self.process
        config = kv_config(1000, setup.model)
        if self._disk is not None:
            try:
                self._journal = Journal(self._disk.folder, _FACTS, calls=self._disk)
            except JournalError as error:
                self._time.after(0.0, self._owner.engine_gave_up, str(error))
                return
        journal = self._journal
        identity = Identity(f"{self.starts:032x}" if setup.model_workers > 1 else None)
        if journal is not None:
            identity = Identity(journal.engine, _past_epochs(journal))
        peers = self._peers(config, identity) if setup.model_workers > 1 else []
        found: dict[int, tuple[RemoteAttention, Any]] = {}
        while not found:
            numbers = [number for number in range(len(self._hosts)) if number not in self.retired]
            if not numbers:
                break
            for task in [process.start(partial(self._first, n, identity, found), f"connect-{n}") for n in numbers]:
                task.join()
            if not found:
                process.sleep(self._setup.again)
        process.check()
        holders: dict[int, Holder] = {}
        ports: dict[int, AttentionPort] = {}
        kept = {}
        if setup.local_pages:
            own = kv_config(setup.local_pages, setup.model)
            self.local = AttentionWorker(own)
            holders[LOCAL], ports[LOCAL] = Holder(self.local.free_pages, fused=True), LocalAttention(self.local)
        for number, (host, (port, at)) in enumerate(sorted(found.items()), 1):
            holders[number], ports[number] = seated(at, port.page_layout), port
            holders[number].name = port.name
            if at.kept is not None:
                kept[number] = at.kept
            self.ports[host] = port
        limits = SchedulerConfig(
            max_batch_tokens=setup.max_batch_tokens,
            max_sequences=64,
            max_model_len=MAX_MODEL_LEN,
            page_size=PAGE_SIZE,
            page_groups=page_groups(config),
            prefix_cache=setup.prefix_cache,
            states=state_pools(config),
            snapshot_tokens=2 * PAGE_SIZE if setup.states and setup.prefix_cache else None,
            max_drafts=setup.drafts,
            redundancy=redundancy.parse(setup.redundancy),
        )
        decoder: Any = ChecksumDecoder(setup.model)  # it has what a model worker needs
        epoch = identity.past_epochs + 1
        if setup.model_workers > 1:
            here = {LOCAL: ports[LOCAL]} if LOCAL in ports else {}
            own = ModelWorker(decoder, config, here, 1, setup.timeout, process.monotonic, epoch)
            worker = self.worker = PipelineReplicas(
                own, peers, here=here, config=config, patience=setup.timeout, waits=waits(process)
            )
            for number, port in ports.items():
                if number not in here:
                    worker.join(number, port)
        else:
            worker = self.worker = ModelWorker(decoder, config, ports, 1, setup.timeout, process.monotonic, epoch)
        placement = CountedPlacement(
            self.reached,
            holders,
            heads=((KV_HEADS,) * len(pools(config)),),
            page_size=PAGE_SIZE,
            max_model_len=MAX_MODEL_LEN,
            shard=setup.shard,
            local_pools=(LOCAL,) if setup.local_pages and setup.workers else (),
            local_tier=setup.local_tier,
            states=state_pools(config),
            samples=learns(config),
        )
        self.control = ControlPlane(limits, placement, Wavering(setup))
        if self.share is not None and setup.local_tier:
            self.control.tuner.share = self.share
        recorder = None if journal is None else Recorder(journal, placement, worker.address)
        rng = random.Random(self._scenario.seed * 1000 + self.starts)
        self.engine = engine = SimulatedEngine(
            process,
            self._owner,
            worker,
            self.control,
            process.monotonic,
            recorder=recorder,
            wait=setup.wait,
            speculation=Always(setup.drafts) if setup.drafts else None,
            proposer=Guesses(self._texts, rng) if setup.drafts else None,
            reports=FailureReports(lost=self._lose),
        )
        if journal is not None and recorder is not None:
            self.resumed |= bool(recover(journal, engine, recorder, worker, placement, kept))
            self._time.after(CLAIM_S, self._disclaim, engine)
        for number in range(len(self._hosts)):
            self.watch(number, identity)
        for port in self.ports.values():
            port.watch(engine.leave)
        self._identity = identity
        self._owner.engine_up(engine)
        engine.run()

    def _peers(self, config: HolderConfig, identity: Identity) -> list[Peer]:
        """Start the replicas, and wait until all are ready."""
        setup, ready = self._setup, list[Peer]()
        news = Wake(self.process)

        def begin(rank: int) -> Begin:
            return Begin(
                rank, 1, "", "checksum", "", "float32", False, "", "cpu", "cpu", False, 1, config, setup.timeout,
                identity.engine or "", setup.linger, False, "grpc", setup.timeout, identity.past_epochs + 1,
            )  # fmt: skip

        def is_ready(peer: Peer) -> None:
            self._owner.say(f"replica {peer.rank} is ready")
            if self.engine is not None:
                self.engine.rank_back(peer)
            else:
                ready.append(peer)
                news.notify()

        def is_gone(rank: int) -> None:
            if self.engine is not None:
                self.engine.rank_gone(rank, "its process has ended", False)
            self._time.after(self.replica_back, replicas.start, rank)

        rng = random.Random(self._scenario.seed * 7 + self.starts)
        replicas = self.replicas = ReplicaHosts(
            self.process, self._time, rng, setup.latency, self._hosts, setup.model, begin, is_ready, is_gone
        )
        ranks = range(1, setup.model_workers)
        for rank in ranks:
            replicas.start(rank)
        while {peer.rank for peer in ready if not peer.closed} < set(ranks):
            news.wait()
        return list({peer.rank: peer for peer in ready}.values())

    def _disclaim(self, engine: SimulatedEngine) -> None:
        if self.engine is engine:
            engine.disclaim()

    # Workers.

    def joins(self, number: int) -> None:
        """There is one host more."""
        if self.alive and self.engine is not None:
            self.watch(number, self._identity)

    def watch(self, number: int, identity: Identity) -> None:
        """Be connected to that host from now on, whenever it can be."""
        self._lost[number] = Wake(self.process)
        self.process.start(lambda: self._keep(number, identity), f"keep-{number}")

    def _keep(self, number: int, identity: Identity) -> None:
        while number not in self.retired:
            if number not in self.ports:
                try:
                    port = self._connect(number, identity)
                    at = self._seat(port, identity)
                except LaminaError as error:
                    self._owner.say(f"worker {number}: {error}")
                    self.process.sleep(self._setup.again)
                    continue
                self.ports[number], self._lost[number] = port, Wake(self.process)
                engine = self.engine
                if engine is not None:
                    engine.join(port, seated(at, port.page_layout))
                    port.watch(engine.leave)
            self._lost[number].wait()
            self.ports.pop(number, None)
            self.process.sleep(self._setup.again)

    def _lose(self, name: str) -> None:
        self._owner.say(f"{name} is lost")
        if (wake := self._lost.get(self._names[name])) is not None:
            wake.set()

    def _first(self, number: int, identity: Identity, found: dict[int, Any]) -> None:
        with contextlib.suppress(LaminaError):
            port = self._connect(number, identity)
            found[number] = port, self._seat(port, identity)

    def _connect(self, number: int, identity: Identity) -> RemoteAttention:
        name = f"attention-{number}.{len(self._names)}"
        self._names[name] = number
        return connect(
            f"10.0.0.{number}:7000",
            name,
            kv_config(1000, self._setup.model),
            "float32",
            "checksum",
            SeatOptions(identity.engine, linger=self._setup.linger),
            ChannelOptions(
                local_channel=False, timeout=min(HANDSHAKE_S, 10 * self._setup.timeout), lost_after=self._setup.timeout
            ),
            edges(self.process, self._time, self._hosts),
        )

    def _seat(self, port: RemoteAttention, identity: Identity) -> Any:
        own = seat(0, port.capacity, kv_config(1000, self._setup.model))
        if not port.resumed:
            return own
        try:
            return own._replace(kept=survey(port, self._setup.timeout, identity.past_epochs))
        except HolderFault:
            port.close()
            raise
