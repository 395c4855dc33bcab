"""How tensors cross between a device and the memory of its host, for one run at a time.

Where both ends are on one device nothing is copied (`Direct`). Elsewhere (`Staged`) tensors pass through page-locked
buffers that are used again: copies are asynchronous on the run's own stream, and only events are waited for, never a
whole device.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar

import torch

MOST = 64 << 20  # bytes of a buffer that is kept: a larger tensor is copied plainly, which waits, and takes memory
LEAST = 1 << 12  # bytes that a buffer begins with

Y = TypeVar("Y")
R = TypeVar("R")


class Cuda:
    """The operations of a GPU that staging needs. None of this has been run on one."""

    def __init__(self, device: torch.device) -> None:
        self.device = device if device.index is not None else torch.device("cuda", torch.cuda.current_device())

    def host(self, n_bytes: int) -> torch.Tensor:
        """uint8 `[n_bytes]` in page-locked memory of the host."""
        return torch.empty(n_bytes, dtype=torch.uint8, pin_memory=True)

    def memory(self, n_bytes: int) -> torch.Tensor:
        """uint8 `[n_bytes]` on the device."""
        return torch.empty(n_bytes, dtype=torch.uint8, device=self.device)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copy between page-locked memory and the device, in the order of the current stream; returns at once."""
        target.copy_(source, non_blocking=True)

    def here(self, x: torch.Tensor) -> bool:
        """Whether x is on the device."""
        return x.device == self.device

    def keep(self, x: torch.Tensor) -> None:
        """Keep the memory of x, which was made on another stream, until the current one is done with it."""
        x.record_stream(self.current())

    def stream(self) -> torch.cuda.Stream:
        """A new stream."""
        return torch.cuda.Stream(self.device)

    def current(self) -> torch.cuda.Stream:
        """The stream that work is put on now."""
        return torch.cuda.current_stream(self.device)

    def using(self, stream: torch.cuda.Stream) -> AbstractContextManager[Any]:
        """Put work on that stream meanwhile."""
        return torch.cuda.stream(stream)

    def follow(self, stream: torch.cuda.Stream, other: torch.cuda.Stream) -> None:
        """Work put on `stream` from now on runs after all work on `other`. Does not wait for either."""
        if stream != other:
            stream.wait_stream(other)  # by an event: neither the host nor the device stops for it

    def event(self) -> torch.cuda.Event:
        """Something to `record` and `wait` for."""
        return torch.cuda.Event()

    def record(self, event: torch.cuda.Event) -> None:
        """The event happens once all work on the current stream is done."""
        event.record(self.current())

    def wait(self, event: torch.cuda.Event) -> None:
        """Have this thread wait until the event has happened."""
        event.synchronize()


class Staging(Protocol):
    """Moves the tensors of one run. A tensor that it returns may be used until the second `turn` after it."""

    def turn(self) -> None:
        """Tensors from before the last turn are not needed any more."""

    def index(self, index: torch.Tensor | None) -> torch.Tensor | None:
        """An index, int64 `[n]` on the host, on the side where `down` and kernels read it."""

    def down(self, x: torch.Tensor, index: torch.Tensor | None = None) -> torch.Tensor:
        """The vectors of x `[..., d]`, all of them or the ones that `index` picks, as flat `[n, d]` on the host. To be
        read once `landed`."""

    def landed(self) -> None:
        """Wait until all tensors on their way down have come."""

    def up(self, x: torch.Tensor, target: torch.Tensor | None = None) -> torch.Tensor:
        """x on the device, in `target` where that is given. x may change as soon as this returns."""

    def driven(self, run: Generator[Y, None, R]) -> Generator[Y, None, R]:
        """The run, on a stream of its own where there are any."""


def _flat(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(0, -2) if x.ndim > 1 else x


class Direct:
    """Both ends are on one device: tensors are handed over as they are."""

    def turn(self) -> None:
        pass

    def index(self, index: torch.Tensor | None) -> torch.Tensor | None:
        return index

    def down(self, x: torch.Tensor, index: torch.Tensor | None = None) -> torch.Tensor:
        flat = _flat(x)
        return flat if index is None else flat[index]

    def landed(self) -> None:
        pass

    def up(self, x: torch.Tensor, target: torch.Tensor | None = None) -> torch.Tensor:
        return x if target is None else target.copy_(x)

    def driven(self, run: Generator[Y, None, R]) -> Generator[Y, None, R]:
        return run


class _Buffer:
    """Memory that is used again, and doubled until the largest tensor fits."""

    def __init__(self, allocate: Callable[[int], torch.Tensor]) -> None:
        self._allocate = allocate
        self._bytes: torch.Tensor | None = None

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor | None:
        """A tensor in it, of any content; None where it would take more than `MOST`."""
        byte_count = dtype.itemsize
        for size in shape:
            byte_count *= size
        if byte_count > MOST:
            return None
        if self._bytes is None or len(self._bytes) < byte_count:
            self._bytes = self._allocate(max(LEAST, 1 << (byte_count - 1).bit_length()))
        return self._bytes[:byte_count].view(dtype).view(*shape)


class _Set:
    """The buffers of one turn, in the order in which they are asked for, and the event after which they are free."""

    def __init__(self, runtime: Cuda) -> None:
        self._runtime = runtime
        self._host: list[_Buffer] = []
        self._memory: list[_Buffer] = []
        self._hosts = self._memories = 0  # taken in this turn
        self._event = runtime.event()
        self._recorded = False

    def begin(self) -> None:
        """Wait until its buffers are free, and take them again from the first."""
        self.wait()
        self._hosts = self._memories = 0

    def host(self, like: torch.Tensor) -> torch.Tensor | None:
        if self._hosts == len(self._host):
            self._host.append(_Buffer(self._runtime.host))
        self._hosts += 1
        return self._host[self._hosts - 1].take(like.shape, like.dtype)

    def memory(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor | None:
        if self._memories == len(self._memory):
            self._memory.append(_Buffer(self._runtime.memory))
        self._memories += 1
        return self._memory[self._memories - 1].take(shape, dtype)

    def record(self) -> None:
        self._runtime.record(self._event)
        self._recorded = True

    def wait(self) -> None:
        if self._recorded:
            self._runtime.wait(self._event)
            self._recorded = False


class Staged:
    """Over page-locked buffers, two sets in turn: a holder in this process may read those of one turn until the next
    reaches it. Once each set has seen the largest tensors, nothing allocates."""

    def __init__(self, runtime: Cuda) -> None:
        self._runtime = runtime
        self._stream = runtime.stream()
        self._now, self._other = _Set(runtime), _Set(runtime)

    def turn(self) -> None:
        self._now, self._other = self._other, self._now
        self._now.begin()

    def index(self, index: torch.Tensor | None) -> torch.Tensor | None:
        return None if index is None else index.to(self._runtime.device)

    def down(self, x: torch.Tensor, index: torch.Tensor | None = None) -> torch.Tensor:
        flat = _flat(x)
        if index is not None:
            picked = self._now.memory((len(index), flat.shape[1]), flat.dtype)
            flat = flat[index] if picked is None else torch.index_select(flat, 0, index, out=picked)
        host = self._now.host(flat)
        if host is None:
            return flat.cpu()
        self._runtime.copy(host, flat)
        return host

    def landed(self) -> None:
        self._now.record()
        self._now.wait()

    def up(self, x: torch.Tensor, target: torch.Tensor | None = None) -> torch.Tensor:
        host = self._now.host(x)
        memory = self._now.memory(x.shape, x.dtype) if target is None else target
        if host is None or memory is None:
            return x.to(self._runtime.device) if target is None else target.copy_(x)
        host.copy_(x)
        self._runtime.copy(memory, host)
        self._now.record()
        return memory

    def driven(self, run: Generator[Y, None, R]) -> Generator[Y, None, R]:
        self._runtime.follow(self._stream, self._runtime.current())
        try:
            while True:
                with self._runtime.using(self._stream):
                    try:
                        waiting = next(run)
                    except StopIteration as stop:
                        result: R = stop.value
                        return result
                yield waiting
        finally:
            run.close()
            self._runtime.follow(self._runtime.current(), self._stream)


DIRECT = Direct()


def staging_for(device: torch.device) -> Callable[[], Staging]:
    """Makes the staging between a device and its host for one more run."""
    if device.type == "cpu":
        return lambda: DIRECT
    runtime = Cuda(device)
    return lambda: Staged(runtime)
