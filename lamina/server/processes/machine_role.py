"""Machines of the same network that join a server: the supervisor takes them, the HTTP process shows them and says what
the operator decides, and their attention workers go to the engine as those that are started here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lamina.deploy.worker_events import WorkerAddress
from lamina.errors import InvalidRequest
from lamina.server.processes.attention_role import AttentionRole
from lamina.server.processes.server_plan import Reporter, ServerPlan
from lamina_protocols.channels.channels import join_address

if TYPE_CHECKING:
    from lamina.joining.server import JoinServer


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
