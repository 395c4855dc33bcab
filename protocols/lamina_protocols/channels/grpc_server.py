"""The server's side of the gRPC service: what a worker implements, its handlers, and the check of the token.

All calls but those of the standard health service need the token, where there is one. An error becomes the status of
its call.

Whoever has no token gets an answer before a message of the call is read: gRPC gives each call that waits for one a
thread, so strangers could else take all of them by calls that they begin and do not go on with.
"""

from __future__ import annotations

import hmac
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, Protocol, TypeVar

from lamina_protocols.channels import control
from lamina_protocols.channels.channels import Credentials
from lamina_protocols.channels.grpc_client import (
    CHECKSUM_KEY,
    KEEPALIVE_MS,
    SERVICE,
    SESSION_KEY,
    Busy,
    GrpcChannel,
    channel_options,
)
from lamina_protocols.channels.grpc_core import grpc
from lamina_protocols.errors import LaminaError
from lamina_protocols.frames.frames import Arriving

logger = logging.getLogger("lamina")

HEALTH = "grpc.health.v1.Health"
_SERVING, _NOT_SERVING = b"\x08\x01", b"\x08\x02"  # a HealthCheckResponse of protobuf
_MESSAGE_S = 5.0  # for the message of a call to come
_QUIET_S = 10.0  # after a refusal was logged
_MOST_CALLS = 16  # at once over one connection; an engine has a stream and a unary call or two
_HANDSHAKE_MS = 10_000  # for TLS and the begin of HTTP/2
_IDLE_MS = 60_000  # without any call; an engine sends heartbeats

T = TypeVar("T")


class AttentionService(Protocol):
    """What a worker implements. A LaminaError becomes the status of the call, with its text as details.

    `remaining`: the seconds for which the caller still waits.
    """

    def hello(self, hello: control.Hello, remaining: float) -> control.Welcome: ...

    def heartbeat(self, heartbeat: control.Heartbeat) -> control.Alive: ...

    def goodbye(self, goodbye: control.Goodbye) -> control.Alive: ...

    def status(self) -> control.WorkerStatus: ...

    @property
    def serving(self) -> bool:
        """Whether a new engine may come, as the health service says it."""

    def attach(self, session: str, channel: GrpcChannel) -> None:
        """Take over the channel of this session's stream."""


class TokenInterceptor(grpc.ServerInterceptor):  # type: ignore[misc]  # grpc ships no types
    """Refuses every call without the token, streams too. The health service is open: it reveals no more than a ping."""

    def __init__(self, token: str) -> None:
        self._expected = f"Bearer {token}".encode()
        self._quiet_until = 0.0

    def intercept_service(self, continuation: Callable[[Any], Any], details: Any) -> Any:
        tokens = [value for key, value in details.invocation_metadata if key == "authorization"]
        matches = [hmac.compare_digest(_encoded(value), self._expected) for value in tokens]
        if any(matches) or details.method == f"/{HEALTH}/Check":
            return continuation(details)
        reason = "the token is wrong" if tokens else "a token is needed"

        def refuse(_: Any, context: grpc.ServicerContext) -> Any:
            if (now := time.monotonic()) > self._quiet_until:  # strangers cannot fill the log
                self._quiet_until = now + _QUIET_S
                logger.warning("%s refused to %s: %s", details.method, context.peer(), reason)
            _abort(context, grpc.StatusCode.UNAUTHENTICATED, reason)

        return grpc.stream_stream_rpc_method_handler(refuse)  # whatever the call is: it waits for no message


def handlers(service: AttentionService, max_message: int, max_frame: int, arriving: Arriving | None = None) -> Any:
    """The generic handlers of the service, to be added to a server."""

    def unary(cls: type[T], act: Callable[[T, float], Any]) -> Any:
        def call(incoming: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
            data = _message(incoming, context)
            try:
                return control.pack(act(control.unpack(cls, data), context.time_remaining() or 60.0))
            except Busy as error:
                _abort(context, grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))
            except LaminaError as error:
                _abort(context, grpc.StatusCode.FAILED_PRECONDITION, str(error))
            except Exception as error:  # the client gets its type only, the log gets the rest
                logger.exception("a call failed")
                _abort(context, grpc.StatusCode.INTERNAL, type(error).__name__)

        return grpc.stream_unary_rpc_method_handler(call)

    def batch(incoming: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        metadata = dict(context.invocation_metadata())
        channel = GrpcChannel(metadata.get(CHECKSUM_KEY) == "1", max_message, max_frame, arriving)
        try:
            service.attach(metadata.get(SESSION_KEY, ""), channel)
        except LaminaError as error:
            _abort(context, grpc.StatusCode.FAILED_PRECONDITION, str(error))
        channel.start(incoming, context.cancel, serves=True)
        yield from channel.outgoing()

    return grpc.method_handlers_generic_handler(
        SERVICE,
        {
            "Hello": unary(control.Hello, service.hello),
            "Heartbeat": unary(control.Heartbeat, lambda message, _: service.heartbeat(message)),
            "Goodbye": unary(control.Goodbye, lambda message, _: service.goodbye(message)),
            "Status": unary(control.StatusRequest, lambda *_: service.status()),
            "Batch": grpc.stream_stream_rpc_method_handler(batch),
        },
    )


def health_handlers(service: AttentionService) -> Any:
    """The generic handlers of the standard health service: `Check`, with one answer whichever service is asked for."""

    def check(_: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        return _SERVING if service.serving else _NOT_SERVING

    return grpc.method_handlers_generic_handler(HEALTH, {"Check": grpc.stream_unary_rpc_method_handler(check)})


def _message(incoming: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
    """The message of a unary call. The call ends where none comes in time."""
    late = threading.Timer(_MESSAGE_S, context.cancel)
    late.daemon = True
    late.start()
    try:
        return next(incoming)
    except StopIteration:
        _abort(context, grpc.StatusCode.INVALID_ARGUMENT, "a call without a message")
    finally:
        late.cancel()


def server_credentials(newest: Callable[[], Credentials], mutual: bool) -> grpc.ServerCredentials:
    """TLS of a server; with `mutual`, clients must show a certificate of the CA. Each connection gets the certificate
    that is the `newest` then."""
    current = newest()

    def configuration() -> grpc.ServerCertificateConfiguration:
        return grpc.ssl_server_certificate_configuration([(current.key, current.cert)], current.ca if mutual else None)

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        nonlocal current
        if (latest := newest()) is current:
            return None
        current = latest
        return configuration()

    return grpc.dynamic_ssl_server_credentials(configuration(), fetch, mutual)


def server_options(max_message: int) -> list[tuple[str, int]]:
    return [
        *channel_options(max_message),
        ("grpc.so_reuseport", 0),  # a port in use is an error
        ("grpc.max_concurrent_streams", _MOST_CALLS),
        ("grpc.server_handshake_timeout_ms", _HANDSHAKE_MS),
        ("grpc.max_connection_idle_ms", _IDLE_MS),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", KEEPALIVE_MS // 2),
    ]


def _abort(context: grpc.ServicerContext, code: grpc.StatusCode, details: str) -> NoReturn:
    context.abort(code, details)
    raise RuntimeError("a call went on after it was ended")  # abort raises


def _encoded(value: str | bytes) -> bytes:
    return value if isinstance(value, bytes) else value.encode()
