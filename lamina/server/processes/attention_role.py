"""A server's attention workers: the supervisor starts them, and the engine that is loaded gets them.

Machines of the same network that join a server: the supervisor takes them, the HTTP process shows them and says what
the operator decides, and their attention workers go to the engine as those that are started here.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lamina.deploy.local import LocalAttentionWorkers
from lamina.deploy.supervision import WORKERS_BACK
from lamina.deploy.worker_events import WorkerAddress
from lamina.errors import EngineError, InvalidRequest
from lamina.server.processes.child_protocol import line, pack_worker
from lamina.server.processes.server_plan import Reporter, ServerPlan
from lamina.system.child_process import ChildProcess
from lamina_protocols.channels.channels import join_address

if TYPE_CHECKING:
    from lamina.joining.server import JoinServer

_AGAIN = 1.0  # seconds until the next look for workers, where none is there


class AttentionRole:
    """The attention workers of one server. `post` has a call made on the supervisor's thread, for which all other
    methods are; `failed` gets the error of a start."""

    def __init__(
        self,
        plan: ServerPlan,
        report: Reporter,
        post: Callable[[Callable[[], None]], None],
        failed: Callable[[EngineError], None],
    ) -> None:
        self.due: float | None = None  # when the engine gets the workers that are there
        self._plan = plan
        self._report = report
        self._post = post
        self._failed = failed
        self._processes: LocalAttentionWorkers | None = None
        self._workers: dict[str, WorkerAddress] = {}
        self._count = plan.workers  # that there are to be
        self._up = False  # the first start is over
        self._engine: ChildProcess | None = None  # the engine that has the workers, or waits for them

    def begin(self) -> None:
        """Start the workers, on a thread: it takes seconds."""
        plan = self._plan
        most = max(plan.workers, plan.most_workers)
        if not most:
            self._up = True
            return
        processes = self._processes = LocalAttentionWorkers(
            plan.workers, kv_memory=plan.kv_memory, threads=plan.threads, most=most, cold=plan.cold
        )

        def start() -> None:
            try:
                result: tuple[WorkerAddress, ...] | EngineError = processes.start(self._report.progress)
            except EngineError as error:
                result = error
            self._post(lambda: self._started(result))

        threading.Thread(target=start, name="lamina-workers", daemon=True).start()

    def close(self) -> None:
        """End the workers."""
        if self._processes is not None:
            self._processes.close()

    def serve(self, engine: ChildProcess) -> None:
        """A new engine is to get the workers: once all are there, or some after a while."""
        self._engine = engine
        if self._up:
            self.due = time.monotonic() + WORKERS_BACK
            self.introduce()

    def introduce(self) -> None:
        """Send a new engine the workers that are there, if it is time."""
        if self.due is None or self._engine is None:
            return
        now = time.monotonic()
        if len(self._workers) >= self._count or (self._workers and now >= self.due):
            self.due = None
            self._engine.say(line("workers", [pack_worker(worker) for worker in self._workers.values()]))
        elif now >= self.due:
            self.due = now + _AGAIN

    def lost(self, name: str) -> None:
        """The engine has given up a worker."""
        self._workers.pop(name, None)
        if self._processes is not None:
            self._processes.lost(name)

    def grow(self, count: int) -> None:
        """The engine wants so many workers. They are the supervisor's, and stay when another engine comes."""
        if self._processes is not None and count > self._count:
            self._count = min(count, self._plan.most_workers)
            self._processes.grow(self._count)

    def retire(self, name: str) -> None:
        """The engine has drained a worker, which is not needed any more."""
        if self._processes is not None and self._workers.pop(name, None) is not None:
            self._count -= 1
            self._processes.retire(name)

    def joined(self, worker: WorkerAddress) -> None:
        """A worker is there."""
        self._workers[worker.name] = worker
        self._report.said(f"attention worker {worker.name} is there")
        self._notify("joined", pack_worker(worker))

    def drain(self, name: str) -> bool:
        """Have the engine move what a worker holds elsewhere, and say "drained" then. Whether there is an engine that
        has it."""
        return name in self._workers and self._notify("drain", name)

    def left(self, name: str) -> None:
        """A worker is gone."""
        self._workers.pop(name, None)
        self._notify("left", name)

    def _started(self, result: tuple[WorkerAddress, ...] | EngineError) -> None:
        if isinstance(result, EngineError):
            self._failed(result)
            return
        self._up = True
        self._workers |= {worker.name: worker for worker in result}
        self.due = time.monotonic() + WORKERS_BACK
        if self._processes is not None:
            self._processes.watch(
                lambda worker: self._post(lambda: self.joined(worker)), lambda name: self._post(lambda: self.left(name))
            )

    def _notify(self, word: str, *items: object) -> bool:
        """Send the engine a message, unless it waits for all workers. Whether it was sent."""
        if not self._up or self._engine is None or self.due is not None or self._engine.status is not None:
            return False
        self._engine.say(line(word, *items))
        return True


class MachineRole:
    """The machines of one server; none where its plan takes none. `post` has a call made on the supervisor's thread,
    for which its methods are; `say_http` sends the HTTP process a message."""

    def __init__(
        self,
        plan: ServerPlan,
        report: Reporter,
        post: Callable[[Callable[[], None]], None],
        attention: AttentionRole,
        say_http: Callable[..., None],
    ) -> None:
        self._plan = plan
        self._report = report
        self._post = post
        self._attention = attention
        self._say_http = say_http
        self._server: JoinServer | None = None

    def begin(self) -> None:
        """Take machines. Raises InvalidRequest where the address or the folder cannot be used."""
        if (joining := self._plan.joining) is not None:
            from lamina.joining.server import JoinServer  # TLS and certificates are loaded only where they are wanted

            self._server = JoinServer(joining.host, joining.port, joining.folder, self, _api_option(self._plan))
            self._server.start()
            self._report.said(f"machines may join at {self._server.address}: run `lamina join` on each of them")

    def tell(self) -> None:
        """Send a new HTTP process the machines."""
        if self._server is not None:
            self._say_http("machines", self._server.machines)

    def decide(self, id: str, accept: bool) -> None:
        """The operator's decision."""
        if self._server is not None:
            try:
                self._server.decide(id, accept)
            except InvalidRequest as error:  # it could not be written down
                self._report.said(str(error))

    def released(self, name: str) -> None:
        """A worker that wants to go is drained, or cannot be."""
        if self._server is not None:
            self._server.released(name)

    def lost(self, name: str) -> None:
        """The engine has given up a worker. No effect for those of others."""
        if self._server is not None:
            self._server.lost(name)

    def close(self) -> None:
        """Take no more."""
        if self._server is not None:
            self._server.close()

    # Events, on threads of the server's.

    def joined(self, worker: WorkerAddress) -> None:
        self._post(lambda: self._attention.joined(worker))

    def left(self, name: str) -> None:
        self._post(lambda: self._attention.left(name))

    def leaving(self, name: str) -> None:
        self._post(lambda: None if self._attention.drain(name) else self.released(name))

    def changed(self, machines: list[dict[str, Any]]) -> None:
        self._post(lambda: self._say_http("machines", machines))

    def said(self, message: str) -> None:
        self._post(lambda: self._report.said(message))


def _api_option(plan: ServerPlan) -> str:
    """What `lamina joining` needs on this machine to find the API of the server: nothing at its default address."""
    here = plan.host if plan.host not in ("0.0.0.0", "::", "localhost") else "127.0.0.1"
    usual = (here, plan.port) == ("127.0.0.1", 8000)
    return "" if usual or plan.port == 0 else f" --url http://{join_address(here, plan.port)}"
