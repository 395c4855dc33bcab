"""A fake device: CPU tensors stand for it, and a copy from it arrives only after its event was waited for.

A copy to it is checked when its event happens: the host's buffer must not have been written meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

POISON = 0xA5


@dataclass(eq=False)
class Stream:
    """Its work: what is still to do, in order."""

    name: str
    work: list[Callable[[], None]] = field(default_factory=list)
    done: int = 0

    def run(self, end: int) -> None:
        while self.done < end:
            self.work[self.done]()
            self.done += 1


@dataclass(eq=False)
class Event:
    stream: Stream | None = None
    end: int = 0


class FakeDevice:
    """In place of `staging.Cuda`. `log` is what was done, `allocated` the bytes of each block of memory."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.log: list[str] = []
        self.allocated: list[int] = []
        self._streams = 0
        self._current = self._stream("default")
        self._blocks: list[torch.Tensor] = []  # of the host: kept, so that an address names one

    def host(self, n_bytes: int) -> torch.Tensor:
        block = self.memory(n_bytes)
        self._blocks.append(block)
        return block

    def memory(self, n_bytes: int) -> torch.Tensor:
        self.allocated.append(n_bytes)
        return torch.full((n_bytes,), POISON, dtype=torch.uint8)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        if self._is_host(target):
            self.log.append(f"down on {self._current.name}")
            target.view(-1).view(torch.uint8).fill_(POISON)
            arriving = source.clone()
            self._current.work.append(lambda: target.copy_(arriving))
            return
        if not self._is_host(source):
            raise RuntimeError("copied from memory that is not page-locked")
        self.log.append(f"up on {self._current.name}")
        target.copy_(source)
        left = source.clone()

        def check() -> None:
            if not torch.equal(left.view(-1).view(torch.uint8), source.reshape(-1).view(torch.uint8)):
                raise RuntimeError("a buffer was written to before its copy was over")

        self._current.work.append(check)

    def here(self, x: torch.Tensor) -> bool:
        return False

    def keep(self, x: torch.Tensor) -> None:
        raise RuntimeError("nothing is on this device")

    def stream(self) -> Stream:
        return self._stream(f"stream {self._streams}")

    def current(self) -> Stream:
        return self._current

    @contextmanager
    def using(self, stream: Stream) -> Iterator[None]:
        before, self._current = self._current, stream
        try:
            yield
        finally:
            self._current = before

    def follow(self, stream: Stream, other: Stream) -> None:
        if stream is not other:
            self.log.append(f"{stream.name} follows {other.name}")

    def event(self) -> Event:
        return Event()

    def record(self, event: Event) -> None:
        self.log.append(f"record on {self._current.name}")
        event.stream, event.end = self._current, len(self._current.work)

    def wait(self, event: Event) -> None:
        if event.stream is None:
            raise RuntimeError("waited for what was never recorded")
        self.log.append("wait")
        event.stream.run(event.end)

    def _stream(self, name: str) -> Stream:
        self._streams += 1
        return Stream(name)

    def _is_host(self, x: torch.Tensor) -> bool:
        address = x.untyped_storage().data_ptr()
        return any(block.untyped_storage().data_ptr() == address for block in self._blocks)
