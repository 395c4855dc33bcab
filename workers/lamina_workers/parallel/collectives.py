"""What the ranks of one model do together (`_Group`): add up their parts, and bring the logits to rank 0.

torch.distributed is used in this file alone: gloo on CPUs, NCCL on GPUs. No group is global: a group whose member died
is closed, and another one made in its place, in the same process, under the next generation.

On a CPU the parts travel in the model's dtype and are added in float32 in the order of the ranks, so each rank gets the
same bits, whatever else is in the batch. Parts of a decode step are some kilobytes, 60 and more a step. They go over
direct sockets (`Lines`), one for each pair of ranks; larger ones go over gloo. A rank sends to all sockets and reads
from all in its own thread. Gloo hands each message from thread to thread twice, and where every core computes, each
hand-over waits for a core.
"""

from __future__ import annotations

import contextlib
import json
import re
import secrets
import select
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from lamina_workers.decoder.shard import Alone, Collective
from lamina_workers.errors import RankLost

MOST_BYTES = 1 << 16
"""The longest message. Two of them fit into what a socket keeps, so sending never waits for the other's reading."""
_BUFFER = 4 * MOST_BYTES
_SPIN = 1e-4  # seconds of asking again before a thread sleeps: waking it takes longer than most messages
_CARD_BYTES = 256
_TOKEN_BYTES = 16


class Lines:
    """One rank's sockets. `swap` gives its bytes to all other ranks and returns theirs, by rank: how the ranks learn
    each other's ports, and the secrets by which a port knows them.

    `address`: where this rank listens until all are connected. Raises RankLost where one does not come in `timeout`
    seconds, and from then on where one is gone, or silent for that long.
    """

    def __init__(
        self, rank: int, ranks: int, address: str, swap: Callable[[bytes], Mapping[int, bytes]], timeout: float
    ) -> None:
        self._rank, self._ranks, self._timeout = rank, ranks, timeout
        self._sockets: dict[int, socket.socket] = {}
        token = secrets.token_bytes(_TOKEN_BYTES)
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket.create_server((address, 0), family=family) as listening:
            card = json.dumps([address, listening.getsockname()[1], token.hex()]).encode()
            cards = swap(card.ljust(_CARD_BYTES))
            try:
                self._connect({other: json.loads(card) for other, card in cards.items()})
                self._accept(listening, token)
            except OSError as error:
                self.close()
                raise RankLost(f"rank {rank} of {ranks} could not reach the others: {error}") from error
        for line in self._sockets.values():
            line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            line.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)
            line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
            line.setblocking(False)

    def exchange(self, out: memoryview, into: Mapping[int, memoryview]) -> None:
        """Send `out` to all other ranks and fill what `into` has for each: at most `MOST_BYTES` each."""
        peer = self._rank
        try:
            for peer in into:
                self._send(self._sockets[peer], out)
            for peer, view in into.items():
                self._fill(self._sockets[peer], view)
        except OSError as error:
            self.close()
            raise RankLost(f"rank {self._rank} lost rank {peer} of {self._ranks}: {error}") from error

    def close(self) -> None:
        for line in self._sockets.values():
            line.close()

    def _connect(self, cards: Mapping[int, tuple[str, int, str]]) -> None:
        """Connect to the ranks before this one. They need not accept yet: the system queues connections."""
        for other in range(self._rank):
            host, port, token = cards[other]
            line = socket.create_connection((host, port), self._timeout)
            self._sockets[other] = line
            line.sendall(bytes.fromhex(token) + self._rank.to_bytes(4, "little"))

    def _accept(self, listening: socket.socket, token: bytes) -> None:
        """Accept the ranks after this one. Strangers are turned away, and silent connections are not waited for."""
        deadline = time.monotonic() + self._timeout
        listening.setblocking(False)
        poll = select.poll()
        poll.register(listening, select.POLLIN)
        greeted: dict[int, tuple[socket.socket, bytearray]] = {}  # with their bytes so far, by descriptor
        try:
            while len(self._sockets) < self._ranks - 1:
                seconds_left = deadline - time.monotonic()
                events = poll.poll(seconds_left * 1e3) if seconds_left > 0 else ()
                if not events:
                    raise TimeoutError(f"not all came within {self._timeout:g} s")
                for number, _ in events:
                    if number == listening.fileno():
                        with contextlib.suppress(OSError):  # it has left again
                            line, _ = listening.accept()
                            line.setblocking(False)
                            greeted[line.fileno()] = line, bytearray()
                            poll.register(line, select.POLLIN)
                    elif self._heard(*greeted[number], token):
                        poll.unregister(number)
                        del greeted[number]
        finally:
            for line, _ in greeted.values():
                line.close()

    def _heard(self, line: socket.socket, said: bytearray, token: bytes) -> bool:
        """Whether a connection is identified now: another rank, or a stranger, which is turned away."""
        try:
            part = line.recv(_TOKEN_BYTES + 4 - len(said))
        except BlockingIOError:
            return False
        except OSError:
            part = b""
        said += part
        if part and len(said) < _TOKEN_BYTES + 4:
            return False
        other = int.from_bytes(said[_TOKEN_BYTES:], "little")
        authentic = secrets.compare_digest(bytes(said[:_TOKEN_BYTES]), token)
        if authentic and self._rank < other < self._ranks and other not in self._sockets:
            self._sockets[other] = line
        else:
            line.close()
        return True

    def _send(self, line: socket.socket, view: memoryview) -> None:
        while view:
            try:
                view = view[line.send(view) :]
            except BlockingIOError:
                self._wait(line, select.POLLOUT)

    def _fill(self, line: socket.socket, view: memoryview) -> None:
        until = time.perf_counter() + _SPIN
        while view:
            try:
                count = line.recv_into(view)
            except BlockingIOError:
                if time.perf_counter() > until:
                    self._wait(line, select.POLLIN)
                continue
            if not count:
                raise ConnectionError("it closed the connection")
            view = view[count:]

    def _wait(self, line: socket.socket, event: int) -> None:
        poll = select.poll()
        poll.register(line, event)
        if not poll.poll(self._timeout * 1e3):
            raise TimeoutError(f"nothing for {self._timeout:g} s")


_c10d: Any = torch.distributed  # whose names are not all in its types
_SUM, _GATHER, _READY = 1, 2, 3  # tags: what a message is for


@dataclass(frozen=True, slots=True)
class Meeting:
    """Where the ranks of a group find each other.

    On one host `path`, the beginning of a file's name in a private folder; else `host`:`port`, where rank 0 listens as
    long as the group lives. `address` is this rank's own, at which the others reach it; nothing listens anywhere else.
    Every connection to these addresses is trusted, so they belong on a private network.
    `generation` counts the groups that were made at the same place.
    """

    generation: int
    path: str = ""
    host: str = "127.0.0.1"
    port: int = 0
    address: str = "127.0.0.1"

    def __post_init__(self) -> None:
        if bool(self.path) == bool(self.port):
            raise ValueError(f"a meeting has a path or a port, got path {self.path!r} and port {self.port}")

    @property
    def file(self) -> Path | None:
        """The file by which ranks on one host meet."""
        return Path(f"{self.path}.{self.generation}") if self.path else None

    def over(self) -> None:
        """The group that met here is no more. A rank that was killed has left the file behind."""
        if self.file is not None:
            self.file.unlink(missing_ok=True)


def join(rank: int, ranks: int, meeting: Meeting, timeout: float, device: torch.device | str = "cpu") -> Collective:
    """Wait for the other ranks and be one of them. `timeout`, in seconds, holds for this and for each later message.

    Raises RankLost where the others do not come.
    """
    if ranks == 1:
        return Alone()
    if torch.device(device).type == "cpu":
        return CpuGroup(rank, ranks, meeting, timeout)
    return GpuGroup(rank, ranks, meeting, timeout, torch.device(device))


class _Group(ABC):
    """The common part of groups, however they are connected: a `Collective`."""

    def __init__(self, rank: int, ranks: int) -> None:
        self.rank, self.ranks = rank, ranks
        self.seconds = 0.0

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        start_time = time.perf_counter()
        if x.numel():
            self._add_up(x)
        self.seconds += time.perf_counter() - start_time
        return x

    def gather_columns(self, x: torch.Tensor, widths: Sequence[int]) -> torch.Tensor | None:
        start_time = time.perf_counter()
        gathered = None
        if self.rank:
            if x.numel():
                self._give(x.contiguous())
        else:
            parts = [x, *(x.new_empty(len(x), width) for width in widths[1:])]
            self._take({other: part for other, part in enumerate(parts) if other and part.numel()})
            gathered = torch.cat(parts, 1)
        self.seconds += time.perf_counter() - start_time
        return gathered

    @abstractmethod
    def close(self) -> None:
        """Leave; the others notice. Closing again does nothing."""

    @abstractmethod
    def _add_up(self, x: torch.Tensor) -> None:
        """The sum over all ranks of x, in place of x, which is not empty."""

    @abstractmethod
    def _give(self, x: torch.Tensor) -> None:
        """Send x to rank 0."""

    @abstractmethod
    def _take(self, parts: Mapping[int, torch.Tensor]) -> None:
        """Fill `parts` with what those ranks give."""

    @contextlib.contextmanager
    def _joining(self, timeout: float) -> Iterator[None]:
        """Connect to the others, or leave and raise RankLost."""
        try:
            yield
        except RankLost:
            self.close()
            raise
        except (OSError, RuntimeError) as error:  # torch has no narrower one for it
            self.close()
            raise RankLost(
                f"rank {self.rank} of {self.ranks} could not meet the others within {timeout:g} s: {_cause(error)}"
            ) from error


class CpuGroup(_Group):
    """A rank's end of a group over gloo, with lines beside it. For tensors on the CPU."""

    def __init__(self, rank: int, ranks: int, meeting: Meeting, timeout: float) -> None:
        super().__init__(rank, ranks)
        self._others = [other for other in range(ranks) if other != rank]
        self._lines: Lines | None = None
        options = _c10d.ProcessGroupGloo._Options()
        options._timeout = timedelta(seconds=timeout)
        options._threads = 1  # for gloo's own sums, of which none is used
        self._group: Any = None
        with self._joining(timeout):
            options._devices = [_c10d.ProcessGroupGloo.create_device(hostname=meeting.address)]
            store = _store(rank, ranks, meeting, timeout)
            self._group = _c10d.ProcessGroupGloo(store, rank, ranks, options)
            self._lines = Lines(rank, ranks, meeting.address, self._swap, timeout)

    def close(self) -> None:
        """Leave; the others' next message, or the one that they wait for, fails. Closing again does nothing."""
        self._group = None
        if self._lines is not None:
            self._lines.close()

    def _add_up(self, x: torch.Tensor) -> None:
        if x.nbytes <= MOST_BYTES:
            self._reduce_over_lines(x)
        else:
            self._reduce_in_pieces(x.view(-1))

    def _give(self, x: torch.Tensor) -> None:
        self._run([(self._send, x, 0, _GATHER)])

    def _take(self, parts: Mapping[int, torch.Tensor]) -> None:
        self._run([(self._receive, part, other, _GATHER) for other, part in parts.items()])

    def _reduce_over_lines(self, x: torch.Tensor) -> None:
        """Each rank sends all of x to all."""
        if self._group is None or self._lines is None:
            raise RankLost(f"rank {self.rank} has left its group")
        parts = [x] * self.ranks
        for other in self._others:
            parts[other] = torch.empty_like(x)
        try:
            self._lines.exchange(_bytes(x), {other: _bytes(parts[other]) for other in self._others})
        except RankLost:
            self.close()
            raise
        _add(parts, x)

    def _reduce_in_pieces(self, x: torch.Tensor) -> None:
        """Each rank adds up one piece of x `[n]` and sends the sum to all: the same bits, in less traffic."""
        pieces = list(x.tensor_split(self.ranks))
        piece = pieces[self.rank]
        parts = [piece] * self.ranks
        for other in self._others:
            parts[other] = torch.empty_like(piece)
        self._exchange(_SUM, [pieces[other] for other in self._others], [parts[other] for other in self._others])
        _add(parts, piece)
        self._exchange(_SUM, [piece] * (self.ranks - 1), [pieces[other] for other in self._others])

    def _swap(self, card: bytes) -> dict[int, bytes]:
        card_bytes = torch.frombuffer(bytearray(card), dtype=torch.uint8)
        cards = [torch.empty_like(card_bytes) for _ in self._others]
        self._exchange(_READY, [card_bytes] * (self.ranks - 1), cards)
        return {other: bytes(_bytes(received)) for other, received in zip(self._others, cards, strict=True)}

    def _exchange(self, tag: int, out: Sequence[torch.Tensor], into: Sequence[torch.Tensor]) -> None:
        """Send `out` to the other ranks, in their order, while `into` is filled by them."""
        receives = [(self._receive, x, other, tag) for x, other in zip(into, self._others, strict=True)]
        self._run(receives + [(self._send, x, other, tag) for x, other in zip(out, self._others, strict=True)])

    def _run(self, messages: Sequence[tuple[Any, torch.Tensor, int, int]]) -> None:
        """Begin all of `messages` and wait for them in reverse order: sends are quick, and by then most of what is
        received is there."""
        if self._group is None:
            raise RankLost(f"rank {self.rank} has left its group")
        works: list[Any] = []
        waited = 0
        try:
            for begin, x, peer, tag in messages:
                works.append(begin(x, peer, tag))
            for work in reversed(works):
                work.wait()
                waited += 1
        except RuntimeError as error:  # torch has no narrower one for it
            index = len(works) if len(works) < len(messages) else len(works) - 1 - waited
            message = f"rank {self.rank} lost rank {messages[index][2]} of {self.ranks}: {_cause(error)}"
            work = None
            works.clear()
            self.close()
            raise RankLost(message) from None  # its traceback would keep the group, and so the connections, alive

    def _send(self, x: torch.Tensor, peer: int, tag: int) -> Any:
        return self._group.send([x], peer, tag)

    def _receive(self, x: torch.Tensor, peer: int, tag: int) -> Any:
        return self._group.recv([x], peer, tag)


class GpuGroup(_Group):
    """A rank's end of a group over NCCL, each rank on a GPU of its own. Nothing here waits for the GPU, so a rank that
    died shows as a RankLost of a later call, or not before the owner of the group calls `close`."""

    def __init__(self, rank: int, ranks: int, meeting: Meeting, timeout: float, device: torch.device) -> None:
        super().__init__(rank, ranks)
        self._group: Any = None
        with self._joining(timeout):
            options = _c10d.ProcessGroupNCCL.Options()
            options._timeout = timedelta(seconds=timeout)
            self._store = _store(rank, ranks, meeting, timeout)  # NCCL connects at its first use
            self._group = _c10d.ProcessGroupNCCL(self._store, rank, ranks, options)
            self.all_reduce(torch.zeros(1, device=device))
            torch.cuda.current_stream(device).synchronize()

    def close(self) -> None:
        """Leave, also while the GPU waits for another rank. Closing again does nothing."""
        if self._group is not None:
            self._group.abort()
            self._group = None

    def _add_up(self, x: torch.Tensor) -> None:
        # NCCL rounds after each addition; two parts are added once.
        wide = x if self.ranks == 2 or x.dtype == torch.float32 else x.float()
        self._run("allreduce", [wide], _c10d.AllreduceOptions())
        if wide is not x:
            x.copy_(wide)

    def _give(self, x: torch.Tensor) -> None:
        self._run("send", [x], 0, _GATHER)

    def _take(self, parts: Mapping[int, torch.Tensor]) -> None:
        for other, part in parts.items():
            self._run("recv", [part], other, _GATHER)

    def _run(self, operation: str, *arguments: Any) -> None:
        if self._group is None:
            raise RankLost(f"rank {self.rank} has left its group")
        try:
            getattr(self._group, operation)(*arguments).wait()  # the stream waits, not this thread
        except RuntimeError as error:
            self.close()
            raise RankLost(f"rank {self.rank} lost another of {self.ranks}: {_cause(error)}") from error


def _add(parts: Sequence[torch.Tensor], into: torch.Tensor) -> None:
    """The sum of `parts`, of which `into` may be one, in their order, in float32, rounded once."""
    if len(parts) == 2 or into.dtype == torch.float32:
        # Two halves are added in float32 and rounded once by torch itself.
        total = torch.add(parts[0], parts[1])
        for part in parts[2:]:
            total.add_(part)
    else:
        total = parts[0].float()
        for part in parts[1:]:
            total.add_(part)
    into.copy_(total)


def _bytes(x: torch.Tensor) -> memoryview:
    """The memory of x, which must be contiguous."""
    return x.view(-1).view(torch.uint8).numpy().data


def _store(rank: int, ranks: int, meeting: Meeting, timeout: float) -> Any:
    limit = timedelta(seconds=timeout)
    if meeting.file is not None:
        store = _c10d.FileStore(str(meeting.file), ranks)
    elif rank == 0:
        # By itself the store would listen at every address of the host.
        listening = socket.create_server((meeting.host, meeting.port))
        store = _c10d.TCPStore(
            meeting.host, meeting.port, ranks, True, limit, wait_for_workers=False, master_listen_fd=listening.detach()
        )
    else:
        store = _c10d.TCPStore(meeting.host, meeting.port, ranks, False, limit, wait_for_workers=False)
    store.set_timeout(limit)
    return _c10d.PrefixStore(f"{meeting.generation}", store)


def _cause(error: BaseException) -> str:
    """What torch says, without the place in its source and without its advice."""
    line = str(error).partition("\n")[0]
    return re.sub(r"^\[\S+\] ", "", line).partition(". This is")[0]
