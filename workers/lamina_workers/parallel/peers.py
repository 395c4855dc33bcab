"""Model worker 0's end of the channels to the model workers beyond it: admits their processes, has them load, and sorts
their reports.

A process connects once with a secret that it got when it was invited, and once more for its heartbeats. The ranks of
one model form a new group after each failure (`RankGroup`).
"""

from __future__ import annotations

import contextlib
import hmac
import secrets
import shutil
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from lamina_protocols.channels.channels import (
    SECRET_SIZE,
    Channel,
    ChannelClosed,
    Credentials,
    join_address,
    server_context,
)
from lamina_protocols.channels.sockets import Listener, listen_tcp, listen_unix
from lamina_protocols.channels.versions import PROTOCOL_VERSION, check_neighbours, shared
from lamina_protocols.errors import LaminaError, ProtocolError
from lamina_workers.decoder.shard import Collective
from lamina_workers.errors import HolderFault, HolderLost, RankLost
from lamina_workers.parallel import collectives, peer_messages

UNIX = "unix:"
_LOADING_S = 600.0  # without a word
_READING_S = 60.0  # until a command is read: while a worker computes it reads none
_GOODBYE_S = 5.0

R = TypeVar("R", bound=peer_messages.Report)


class Peer:
    """One model worker beyond 0 that is ready. For one thread; `close` may come from any.

    `rank` is its number, `name` that of its process, `ready` its own report. `on_given_up` is called with the name when
    this side gives it up: its process may be stuck. Once closed it stays so.
    """

    def __init__(
        self,
        rank: int,
        name: str,
        channel: Channel,
        ready: peer_messages.Ready,
        on_given_up: Callable[[str], None] = lambda name: None,
    ) -> None:
        self.rank = rank
        self.name = name
        self.said = ready
        self.lost: set[int] = set()  # holders of this worker that are gone
        self._channel = channel
        self._on_given_up = on_given_up
        self._failure = ""  # why
        self._waiting: dict[int, deque[peer_messages.Report]] = {}  # by batch under way
        self._answers: deque[peer_messages.Report] = deque()  # to what names no batch

    @property
    def closed(self) -> bool:
        """Whether it is lost for good."""
        return bool(self._failure)

    @property
    def channel(self) -> Channel:
        """The channel of commands and reports."""
        return self._channel

    def close(self, reason: str = "closed on this side") -> None:
        """Let it go: its process, which sees that, ends."""
        self._failure = self._failure or reason
        self._channel.close()

    def see_off(self, seconds: float) -> None:
        """Wait until it has closed its end, so long at most."""
        with contextlib.suppress(LaminaError, TimeoutError):
            while not self._failure:
                self._channel.receive(max(0.0, seconds))
        self.close()

    def tell(self, command: peer_messages.Command, timeout: float = _READING_S) -> None:
        """Raises RankLost where it is lost, or does not read the command within `timeout` seconds."""
        try:
            peer_messages.send(self._channel, command, timeout)
        except ChannelClosed as error:
            raise self.give_up(str(error)) from error

    def expect(self, batch: int) -> None:
        """Keep its reports on this batch until `forget`."""
        self._waiting.setdefault(batch, deque())

    def forget(self, batch: int | None = None) -> None:
        """Drop its further reports on this batch, None: on any."""
        if batch is None:
            self._waiting.clear()
        else:
            self._waiting.pop(batch, None)

    def ready(self, batch: int) -> bool:
        """Whether `take` would not wait."""
        return self._comes(self._waiting[batch])

    def faults(self, batch: int) -> list[peer_messages.BatchFailed]:
        """The failures of an expected batch that it has reported by now."""
        return [report for report in self._waiting.get(batch, ()) if isinstance(report, peer_messages.BatchFailed)]

    def take(self, kind: type[R], batch: int, timeout: float) -> R:
        """Its next report on a batch that is expected; waits for it.

        Raises HolderFault where the batch failed at one of its holders, HolderLost where one of those is gone,
        RankLost where this worker is, where its report is of another kind, or after `timeout` seconds without one.
        """
        answers = self._waiting[batch]
        while not answers:
            self._receive(timeout)
        report = answers.popleft()
        if isinstance(report, peer_messages.BatchFailed):
            raise (HolderLost if report.lost else HolderFault)(f"model worker {self.rank}: {report.reason}")
        if not isinstance(report, kind):
            raise self.give_up(f"{kind.__name__} of batch {batch} was due, got {type(report).__name__}")
        return report

    def answer(self, kind: type[R], timeout: float) -> R | peer_messages.Failed:
        """The answer to the oldest command that names no batch and was not answered yet. Raises as `take` does."""
        while not self._answers:
            self._receive(timeout)
        report = self._answers.popleft()
        if not isinstance(report, (kind, peer_messages.Failed)):
            raise self.give_up(f"{kind.__name__} was due, got {type(report).__name__}")
        return report

    def answered(self) -> bool:
        """Whether `answer` would not wait."""
        return self._comes(self._answers)

    def ask(self, command: peer_messages.Command, kind: type[R], timeout: float) -> R | peer_messages.Failed:
        """Send a command, and wait for the answer."""
        self.tell(command)
        return self.answer(kind, timeout)

    def _comes(self, reports: deque[peer_messages.Report]) -> bool:
        """Whether some of these is there, or an error in its place."""
        while not reports:
            try:
                if not self._channel.ready():
                    return False
                self._receive(0)
            except RankLost:
                return True
        return True

    def _receive(self, timeout: float) -> None:
        try:
            report: Any = peer_messages.receive(self._channel, timeout)
        except TimeoutError as error:
            raise self.give_up(f"it has said nothing for {timeout:g} s") from error
        except (ChannelClosed, ProtocolError) as error:
            raise self.give_up(str(error)) from error
        if isinstance(report, peer_messages.BatchFailed):
            self.lost.update(report.lost)
        if hasattr(report, "batch"):  # of a batch that is not expected any more it is dropped
            if report.batch in self._waiting:
                self._waiting[report.batch].append(report)
        else:
            self._answers.append(report)

    def give_up(self, reason: str) -> RankLost:
        """It cannot be used any more; the error says so."""
        if not self._failure:
            self._on_given_up(self.name)
        self.close(reason)
        return RankLost(f"model worker {self.rank} ({self.name}) is lost: {self._failure}")


class _Invited(NamedTuple):
    """A process that may connect once with this secret: as model worker `rank`, or then for its heartbeats."""

    rank: int
    name: str
    secret: bytes
    beats: bool = False


class PeerListener:
    """Where the processes of model workers connect: at `address`, each with a secret of its own, once; and once more
    for its heartbeats. Where these cease for the `lost_after` of its `Begin`, it is given up.

    `begin(rank)` gives what the worker of that number loads. `on_ready` gets each worker that is ready; `on_failed` the
    rank of one that does not become so and its report, whose `kind` is "" where there was none. `progress` gets rank,
    what, done and total while they load. These are called on threads of the listener. `on_given_up` gets the names of
    the processes that must be ended, on the thread that finds it out.

    On one host it listens at a Unix socket in a private folder. With `host` it listens at a TCP port there, with TLS
    where `credentials` has a certificate.
    """

    def __init__(
        self,
        begin: Callable[[int], peer_messages.Begin],
        on_ready: Callable[[Peer], None],
        on_failed: Callable[[int, peer_messages.Failed], None],
        on_given_up: Callable[[str], None],
        progress: Callable[[int, str, int, int], None],
        host: str | None = None,
        credentials: Credentials | None = None,
    ) -> None:
        self._begin = begin
        self._on_ready = on_ready
        self._on_failed = on_failed
        self._on_given_up = on_given_up
        self._progress = progress
        self._lock = threading.Lock()
        self._invited: dict[str, _Invited] = {}  # by name
        self._peers: dict[int, Peer] = {}
        self.folder = Path(tempfile.mkdtemp(prefix="lamina-"))  # of mode 0700
        tls = server_context(credentials, mutual=False) if credentials is not None and credentials.cert else None
        if host is None:
            path = str(self.folder / "peers")
            self._listener = Listener(listen_unix(path), self._admits, self._arrived, tls)
            self.address = f"{UNIX}{path}"
        else:
            self._listener = Listener(listen_tcp(host, 0), self._admits, self._arrived, tls)
            self.address = join_address(host, self._listener.port)

    def invite(self, rank: int, name: str) -> bytes:
        """The secret with which a process of that name, never used before, may connect once, as model worker `rank`."""
        secret = secrets.token_bytes(SECRET_SIZE)
        with self._lock:
            self._invited[name] = _Invited(rank, name, secret)
        return secret

    def absent(self) -> list[str]:
        """The names of the processes that were invited and have not connected yet."""
        with self._lock:
            return [name for name, invited in self._invited.items() if not invited.beats]

    def revoke(self, name: str) -> None:
        """The process of that name has ended: it may not connect any more, and its worker is lost."""
        with self._lock:
            self._invited.pop(name, None)
            revoked = [peer for peer in self._peers.values() if peer.name == name]
        for peer in revoked:
            peer.close("its process has ended")

    def close(self) -> None:
        """Let all go, and wait a while until they have let go of their holders. No peer may be used any more."""
        self._listener.close()
        for peer in self._peers.values():
            with contextlib.suppress(RankLost):
                peer.tell(peer_messages.Stop(), _GOODBYE_S)
        deadline = time.monotonic() + _GOODBYE_S
        for peer in self._peers.values():
            peer.see_off(deadline - time.monotonic())
        shutil.rmtree(self.folder, ignore_errors=True)

    # On threads of the listener.

    def _admits(self, secret: bytes) -> bool:
        with self._lock:
            return self._invited_by(secret) is not None

    def _invited_by(self, secret: bytes) -> _Invited | None:
        """What that secret is for, where it was not used yet."""
        invitations = self._invited.values()
        return next((invited for invited in invitations if hmac.compare_digest(secret, invited.secret)), None)

    def _arrived(self, channel: Channel, secret: bytes) -> None:
        with self._lock:
            invited = self._invited_by(secret)
            if invited is not None and invited.beats:
                del self._invited[invited.name]
            elif invited is not None:
                self._invited[invited.name] = invited._replace(secret=beats_secret(secret), beats=True)
        if invited is None:  # it came twice
            channel.close()
            return
        task, what = (self._follow, "beats") if invited.beats else (self._enlist, "loading")
        threading.Thread(
            target=task, args=(invited.rank, invited.name, channel), name=f"lamina-{invited.name}-{what}", daemon=True
        ).start()

    def _follow(self, rank: int, name: str, channel: Channel) -> None:
        """Give a worker up once its heartbeats cease: that wakes whatever sends to it, or waits for it."""
        seconds = self._begin(rank).lost_after
        try:
            while True:
                channel.receive(seconds)
        except TimeoutError:
            with self._lock:
                peer = self._peers.get(rank)
            if peer is not None and peer.name == name:
                peer.give_up(f"no heartbeat for {seconds:g} s")
        except LaminaError:  # its process ends, which its other channel tells
            pass
        finally:
            channel.close()

    def _enlist(self, rank: int, name: str, channel: Channel) -> None:
        try:
            answer = self._load(rank, name, channel)
        except TimeoutError:
            answer = peer_messages.Failed("", f"it has said nothing for {_LOADING_S:g} s")
            self._on_given_up(name)  # it may stand still, and would not see that its channel is closed
        except LaminaError as error:
            answer = peer_messages.Failed("", str(error))
        if isinstance(answer, peer_messages.Failed):
            channel.close()
            self._on_failed(rank, answer)
            return
        peer = Peer(rank, name, channel, answer, self._on_given_up)
        with self._lock:
            self._peers[rank] = peer
        self._on_ready(peer)

    def _load(self, rank: int, name: str, channel: Channel) -> peer_messages.Ready | peer_messages.Failed:
        hello = peer_messages.receive(channel, _LOADING_S)
        if not isinstance(hello, peer_messages.Hello) or hello.name != name:
            raise ProtocolError(f"expected the Hello of {name}, got {type(hello).__name__}")
        check_neighbours(PROTOCOL_VERSION, hello.protocol)
        peer_messages.send(channel, replace(self._begin(rank), features=tuple(sorted(shared(hello.features)))))
        while True:
            report = peer_messages.receive(channel, _LOADING_S)
            match report:
                case peer_messages.Progress(what, done, total):
                    self._progress(rank, what, done, total)
                case peer_messages.Ready() | peer_messages.Failed():
                    return report
                case _:
                    raise ProtocolError(f"{type(report).__name__} from a model worker that loads")


def beats_secret(secret: bytes) -> bytes:
    """With what the process that was invited with `secret` connects for its heartbeats."""
    return hmac.digest(secret, b"heartbeats", "sha256")


SLACK = 5.0  # seconds for an answer beyond the time in which the rank itself may wait for others


class RankGroup:
    """The ranks beyond 0, and the groups that they form with rank 0: after each failure another one.

    `meeting(generation)` says where. `timeout`: seconds that a rank may wait for another one's part of a sum, which is
    as long as that one may wait for its holders.
    """

    def __init__(
        self, peers: Sequence[Peer], meeting: Callable[[int], collectives.Meeting], device: torch.device, timeout: float
    ) -> None:
        self.peers = {peer.rank: peer for peer in peers}
        self.timeout = timeout
        self._meeting = meeting
        self._device = device
        self._generation = 0
        self._current: Collective | None = None
        self._met: collectives.Meeting | None = None  # where the last one met

    @property
    def missing(self) -> tuple[int, ...]:
        return tuple(rank for rank, peer in self.peers.items() if peer.closed)

    def form(self) -> Collective:
        """A new group of all ranks. Raises RankLost where one does not come."""
        self.leave()
        self._generation += 1
        meeting = self._met = self._meeting(self._generation)
        command = peer_messages.JoinGroup(self._generation, meeting.path, meeting.host, meeting.port, self.timeout)
        for peer in self.peers.values():
            peer.tell(command)
        cause: RankLost | None = None
        try:
            self._current = group = collectives.join(0, 1 + len(self.peers), meeting, self.timeout, self._device)
        except RankLost as error:
            cause = error
        for peer in self.peers.values():  # each answer is read, or it would be taken for one to the next meeting
            try:
                met = peer.answer(peer_messages.JoinedGroup, self.timeout + SLACK)
            except RankLost as error:
                cause = error
                continue
            if isinstance(met, peer_messages.Failed) or met.generation != self._generation:
                cause = peer.give_up(f"it met another group than {self._generation}")
            elif met.reason:
                cause = cause or RankLost(met.reason)
        if cause is not None:
            self.leave()
            raise cause
        return group

    def leave(self) -> None:
        """Leave the group, where there is one. It wakes the ranks that wait for this one."""
        if self._current is not None:
            self._current.close()
            self._current = None
        if self._met is not None:
            self._met.over()
            self._met = None

    def disband(self, wait: float) -> None:
        """Have all leave the group and wait for commands: then all their reports are here.

        Raises RankLost where one is gone, or does not come back within `wait` seconds.
        """
        loss: RankLost | None = None
        peers = []
        for peer in self.peers.values():
            try:
                peer.tell(peer_messages.LeaveGroup())
                peers.append(peer)
            except RankLost as error:
                loss = error
        for peer in peers:
            try:
                peer.answer(peer_messages.LeftGroup, wait)
            except RankLost as error:
                loss = error
        if loss is not None:
            raise loss
