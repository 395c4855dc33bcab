"""TLS of an attention worker: its gRPC server and its socket listener show the newest certificate that can be used."""

from __future__ import annotations

import logging
from collections.abc import Callable

from lamina_protocols.channels.channels import Credentials, TlsContext, server_context
from lamina_protocols.channels.grpc_core import grpc
from lamina_protocols.channels.grpc_server import server_credentials
from lamina_protocols.channels.sockets import Listener

logger = logging.getLogger("lamina")


class ServerCertificates:
    """The certificate in use, if there is one. `renewed` gives new credentials, None where they are as before. Raises
    ValueError for a first certificate that cannot be used.

    `context` is that of sockets, None without TLS. What is connected keeps the certificate that it was shown.
    """

    def __init__(self, first: Credentials, mutual: bool, renewed: Callable[[], Credentials | None]) -> None:
        self._mutual = mutual
        self._renewed = renewed
        self._newest = first
        self.context = self._context_of(first) if first.cert else None

    def bind(self, server: grpc.Server, address: str) -> int:
        """Have a gRPC server listen. The port. Raises RuntimeError where it cannot."""
        if self.context is None:
            return int(server.add_insecure_port(address))
        return int(server.add_secure_port(address, server_credentials(lambda: self._newest, self._mutual)))

    def renew(self, listener: Listener | None) -> None:
        """Take a new certificate where there is one, for the listener too."""
        if self.context is None or (found := self._renewed()) is None:
            return
        try:
            self.context = self._context_of(found)
        except ValueError as error:  # between the writing of a certificate and that of its key
            logger.warning("the certificate from before stays in use: %s", error)
            return
        self._newest = found
        if listener is not None:
            listener.tls = self.context
        logger.info("there is a new certificate, which new connections are shown")

    def _context_of(self, credentials: Credentials) -> TlsContext:
        try:
            return server_context(credentials, self._mutual)
        except (OSError, ValueError) as error:  # the first: of ssl
            raise ValueError(f"the certificate or its key cannot be used: {error}") from error
