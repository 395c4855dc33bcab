"""The one thread of an attention worker's process that computes: it builds seats, and serves all their channels.

OpenMP keeps a team for each thread that ever computed, so there is one. Channels with a message take turns, a message
each. The thread waits for no channel, neither to send nor to read.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import queue
from collections.abc import Callable
from typing import TYPE_CHECKING

from lamina_protocols.channels.channels import Channel
from lamina_protocols.channels.control import CORRUPT, FAREWELL
from lamina_protocols.channels.waiting import Waiter
from lamina_protocols.errors import CorruptFrame, LaminaError, ProtocolError
from lamina_protocols.frames import codec
from lamina_protocols.messages.messages import Fault
from lamina_workers.attention_server.layer_server import LayerServer
from lamina_workers.attention_server.session import EngineSeat, Session

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("lamina")


class ComputeLoop:
    """`run` belongs to its thread; the rest may be called from any thread, and is done in the order of the calls.

    Callbacks, all on the loop's thread: `over(session, why)` when a session cannot go on, `failed(seat, why)` when a
    seat cannot, `freed(seat)` when it has ended.
    """

    def __init__(
        self,
        threads: int,
        name: str,
        device: torch.device,
        over: Callable[[Session, str], None],
        failed: Callable[[EngineSeat, str], None],
        freed: Callable[[EngineSeat], None],
    ) -> None:
        self._threads = threads
        self._name = name
        self._device = device
        self._over = over
        self._failed = failed
        self._freed = freed
        self._jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._layers = LayerServer()
        self._waiter = Waiter(self._layers)
        self._sessions: dict[Channel, Session] = {}
        self._stopping = False

    def run(self) -> None:
        """Serve until `stop`."""
        while not self._stopping:
            for channel in self._waiter.wait():
                self._serve(channel)
            with contextlib.suppress(queue.Empty):
                while True:
                    self._jobs.get_nowait()()
        self._waiter.close()

    def build(self, seat: EngineSeat) -> None:
        """Make its worker, and complete `seat.built`."""
        self._do(lambda: self._build(seat))

    def serve(self, session: Session) -> None:
        """Read its channel from now on."""
        self._do(lambda: self._add(session))

    def drop(self, session: Session) -> None:
        """Read its channel no more."""
        self._do(lambda: self._remove(session))

    def free(self, seat: EngineSeat) -> None:
        """Let its worker go."""
        self._do(lambda: self._free(seat))

    def stop(self) -> None:
        """Do what was asked for, then let `run` return."""
        self._do(lambda: setattr(self, "_stopping", True))

    def _do(self, job: Callable[[], None]) -> None:
        self._jobs.put(job)
        self._waiter.wake()

    def _serve(self, channel: Channel) -> None:
        session = self._sessions[channel]
        try:
            session.step()
        except LaminaError as error:
            self._farewell(session, channel, str(error), CORRUPT if isinstance(error, CorruptFrame) else FAREWELL)
            self._over(session, str(error))
        except Exception as error:  # the engine gets its kind, the log the rest
            logger.exception("session %.8s failed", session.id)
            self._farewell(session, channel, type(error).__name__)
            self._failed(session.seat, type(error).__name__)

    def _farewell(self, session: Session, channel: Channel, reason: str, ending: tuple[int, int] = FAREWELL) -> None:
        """Tell the engine why, if it is still there."""
        self._remove(session)
        with contextlib.suppress(LaminaError):
            channel.post(codec.encode(Fault(*ending, reason)))

    def _build(self, seat: EngineSeat) -> None:
        if seat.ended:
            seat.built.set_exception(ProtocolError(f"place {seat.number} is gone: {seat.ended}"))
            return
        try:
            seat.build(self._threads, self._name, self._device, self._layers)
        except Exception as error:  # noqa: BLE001  # any error goes to the engine, and the server lives on
            self._failed(seat, f"no worker could be made: {error}")
            seat.built.set_exception(error)
        else:
            seat.built.set_result(None)

    def _add(self, session: Session) -> None:
        channel = session.channel
        if channel is not None and not session.ended:
            self._sessions[channel] = session
            with contextlib.suppress(ValueError):  # closed just now: the session is over, and will be dropped
                self._waiter.add(channel)
                self._layers.attach(channel)

    def _remove(self, session: Session) -> None:
        channel = session.channel
        if channel is not None and self._sessions.pop(channel, None) is not None:
            self._waiter.remove(channel)
            session.seat.traffic.add(session.traffic)

    def _free(self, seat: EngineSeat) -> None:
        seat.free()
        self._freed(seat)
        gc.collect()  # KV is large: a cycle that holds it must not outlive the seat
