"""A server's attention workers: the supervisor starts them, and the engine that is loaded gets them.

Beside them are the workers of machines of the same network that join the server: the supervisor takes the machines, the
HTTP process shows them and sends what the operator decides, and their attention workers go to the engine as well.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lamina.deploy.local import LocalAttentionWorkers
from lamina.deploy.relayed_attention import AttentionRelay
from lamina.deploy.worker_events import WorkerAddress
from lamina.errors import EngineError, InvalidRequest
from lamina.server.processes.child_protocol import TO_ENGINE, DrainWorker, MachinesChanged, ToHttp, Workers
from lamina.server.processes.server_plan import Reporter, ServerPlan
from lamina.system.child_process import ChildProcess
from lamina_protocols.channels.channels import join_address

if TYPE_CHECKING:
    from lamina.joining.server import JoinServer


class AttentionRole:
    """The attention workers of one server: started here, and brought to its engines by `relay`. Its methods are for the
    supervisor's thread, on which `post` has a call made; `failed` gets the error of a start."""

    def __init__(
        self,
        plan: ServerPlan,
        report: Reporter,
        post: Callable[[Callable[[], None]], None],
        failed: Callable[[EngineError], None],
    ) -> None:
        self._plan = plan
        self._report = report
        self._post = post
        self._failed = failed
        self._pool: LocalAttentionWorkers | None = None
        self._limit = max(plan.workers, plan.most_workers)
        self.relay = AttentionRelay(plan.workers, self._limit)
        self._engine: ChildProcess | None = None  # the engine that has the workers, or waits for them

    def begin(self) -> None:
        """Start the workers, on a thread: it takes seconds."""
        plan = self._plan
        if not self._limit:
            self.relay.begin(None, ())
            return
        pool = self._pool = LocalAttentionWorkers(
            plan.workers, kv_memory=plan.kv_memory, threads=plan.threads, most=self._limit, cold=plan.cold
        )

        def start() -> None:
            try:
                workers = pool.start(self._report.progress)
            except EngineError as error:
                failure = error
                self._post(lambda: self._failed(failure))
            else:
                self._post(lambda: self._started(pool, workers))

        threading.Thread(target=start, name="lamina-workers", daemon=True).start()

    def close(self) -> None:
        if self._pool is not None:
            self._pool.close()

    def serve(self, engine: ChildProcess) -> None:
        """A new engine is to get the workers: once all are there, or some after a while."""
        self._engine = engine
        self.relay.serve(lambda workers: engine.say(TO_ENGINE.line(Workers(workers))))

    def joined(self, worker: WorkerAddress) -> None:
        self._report.said(f"attention worker {worker.name} is there")
        self.relay.joined(worker)

    def drain(self, name: str) -> bool:
        """Have the engine move what a worker holds elsewhere, and send "drained" then. Whether there is an engine that
        has it."""
        if self._engine is None or self._engine.status is not None or not self.relay.has(name):
            return False
        self._engine.say(TO_ENGINE.line(DrainWorker(name)))
        return True

    def _started(self, pool: LocalAttentionWorkers, workers: tuple[WorkerAddress, ...]) -> None:
        self.relay.begin(pool, workers)
        pool.watch(
            lambda worker: self._post(lambda: self.joined(worker)),
            lambda name: self._post(lambda: self.relay.left(name)),
        )


class MachineRole:
    """The machines of one server; none where its plan takes none. `post` has a call made on the supervisor's thread,
    for which its methods are; `say_http` sends the HTTP process a message."""

    def __init__(
        self,
        plan: ServerPlan,
        report: Reporter,
        post: Callable[[Callable[[], None]], None],
        attention: AttentionRole,
        say_http: Callable[[ToHttp], None],
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
            self._say_http(MachinesChanged(self._server.machines))

    def decide(self, id: str, accept: bool) -> None:
        if self._server is not None:
            try:
                self._server.decide(id, accept)
            except InvalidRequest as error:  # it could not be written down
                self._report.said(str(error))

    def released(self, name: str) -> None:
        """A worker that is to go is drained, or cannot be."""
        if self._server is not None:
            self._server.released(name)

    def lost(self, name: str) -> None:
        """The engine has given up a worker. No effect for those of others."""
        if self._server is not None:
            self._server.lost(name)

    def close(self) -> None:
        if self._server is not None:
            self._server.close()

    # Events, on threads of the server's.

    def joined(self, worker: WorkerAddress) -> None:
        self._post(lambda: self._attention.joined(worker))

    def left(self, name: str) -> None:
        self._post(lambda: self._attention.relay.left(name))

    def leaving(self, name: str) -> None:
        self._post(lambda: None if self._attention.drain(name) else self.released(name))

    def changed(self, machines: list[dict[str, Any]]) -> None:
        self._post(lambda: self._say_http(MachinesChanged(machines)))

    def said(self, message: str) -> None:
        self._post(lambda: self._report.said(message))


def _api_option(plan: ServerPlan) -> str:
    """What `lamina joining` needs on this machine to find the API of the server: nothing at its default address."""
    host = plan.host if plan.host not in ("0.0.0.0", "::", "localhost") else "127.0.0.1"
    usual = (host, plan.port) == ("127.0.0.1", 8000)
    return "" if usual or plan.port == 0 else f" --url http://{join_address(host, plan.port)}"
