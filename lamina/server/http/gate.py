"""ASGI middleware for every request (`Gate`): it refuses other origins and missing API keys, gives each request an id,
holds each key to its share of the connections and of the memory for answers (`_Answer`), counts responses, and answers
unexpected errors with status 500.

API keys come from the environment and from files, so that they do not appear among a program's arguments.
"""

from __future__ import annotations

import ipaddress
import logging
import re
import secrets
import time
from collections.abc import Collection, Mapping
from typing import Any, Protocol

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lamina.server.http.errors import ApiError, overloaded, shown
from lamina.server.http.limits import ClientGone
from lamina.server.models import ModelState
from lamina.server.request_log import begin_cost, log_request, note_error
from lamina.server.settings import TENANT, ServerSettings
from lamina.server.shares import KeyShares
from lamina.system.logs import request_id
from lamina_protocols.channels.channels import is_loopback

logger = logging.getLogger("lamina")

REQUEST_ID = "lamina.request_id"  # a key of a request's scope, like TENANT
AT_END = "lamina.at_end"  # a key of a request's scope: what to call once its response has ended, or waits to be read
MAX_ANSWERS = 64 << 20
"""Bytes of all answers above `PIECE` that wait for their clients to read them."""
PIECE = 1 << 16  # bytes of an answer that are sent at a time: of one that is not read, so much waits in its connection

_ID = re.compile(r"[A-Za-z0-9._:\-]{1,128}")
_HOST = re.compile(r"(\[[^\[\]]*\]|[^\[\]:]*)(:[0-9]{0,5})?")
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_READING = frozenset({"GET", "HEAD", "OPTIONS"})  # methods that change nothing; other origins do not see their answers
_OWN_SITES = frozenset({"same-origin", "none"})  # values of Sec-Fetch-Site that no web page of elsewhere can send
_COUNTED = frozenset({401, 413, 429, 503})  # statuses counted as rejections, by the error's code
_GONE = 499  # nginx's status for a request whose client disconnected before the response


class Metrics(Protocol):
    """Counts requests, and renders the counts."""

    def render(self, models: Mapping[str, ModelState]) -> tuple[bytes, str]:
        """The body and the content type of /metrics, from the present states of the models, by name."""

    def rejected(self, reason: str) -> None:
        """A request was refused: for its key or its size, or for lack of room or of an engine."""

    def http(self, handler: str, method: str, status: int, seconds: float) -> None:
        """A response has ended, after `seconds`. `handler` is the path of its route."""


class Gate:
    """The middleware. `public`: paths that need no key, as they reveal nothing; `probes`: the public paths that answer
    under any host name. It puts the request's id and tenant into its scope."""

    def __init__(
        self,
        app: ASGIApp,
        settings: ServerSettings,
        metrics: Metrics,
        public: Collection[str],
        probes: Collection[str] = (),
    ) -> None:
        self._app = app
        self._settings = settings
        self._metrics = metrics
        self._public = public
        self._probes = probes
        self._unread = KeyShares(MAX_ANSWERS, settings.tenants)
        # Requests whose responses have not ended: each has a connection.
        self._answered = KeyShares(settings.connections, settings.tenants)
        host = settings.host or "localhost"
        self._names = {"localhost", host.lower()}
        # A server that listens beyond loopback without keys was started with --open.
        self._any_name = settings.protected or (_is_address(host) and not is_loopback(host))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            else:
                await send({"type": "websocket.close", "code": 1008, "reason": "there are no websockets here"})
            return
        start = time.monotonic()
        given_id = _header(scope, b"x-request-id")
        shown_id = given_id if given_id is not None and _ID.fullmatch(given_id) else secrets.token_hex(16)
        scope[REQUEST_ID] = shown_id
        scope[AT_END] = []
        request_id.set(shown_id)
        cost = begin_cost()
        answer = _Answer(scope, send, self._unread, self._metrics)
        try:
            if (refusal := self._refusal(scope, given_id)) is not None:
                await answer.refuse(refusal)
            else:
                await self._answer(scope, receive, answer)
        except Exception:
            if answer.status:
                raise
            logger.exception("the request failed")
            await respond(ApiError(500, "the server could not go on with this request"), answer.send, scope["path"])
        finally:
            answer.end()
            method = scope["method"] if scope["method"] in _METHODS else "other"
            handler, status, seconds = _handler(scope), answer.status or _GONE, time.monotonic() - start
            self._metrics.http(handler, method, status, seconds)
            path = shown(scope["path"]) if handler == "none" else handler  # what a client made up is quoted
            quiet = scope["path"] in self._probes or (method in _READING and status < 400)  # pages and probes ask often
            log_request(method, path, status, seconds, cost, logging.DEBUG if quiet else logging.INFO)

    async def _answer(self, scope: Scope, receive: Receive, answer: _Answer) -> None:
        """Have the application answer, unless the key's requests would leave too few connections to the others."""
        key = scope[TENANT]
        if not self._answered.fits(key):
            count = self._answered.held(key)
            await answer.refuse(overloaded(f"{count} requests are being answered; read their answers first"))
            return
        with self._answered.taken(key):
            await self._app(scope, receive, answer.send)

    def _refusal(self, scope: Scope, given_id: str | None) -> ApiError | None:
        if given_id is not None and given_id != scope[REQUEST_ID]:
            return ApiError(
                400,
                f"X-Request-Id is {shown(given_id)}; allowed are 1 to 128 letters, digits, dots, colons, _ and -",
                "X-Request-Id",
            )
        scope[TENANT] = ""
        if (error := self._elsewhere(scope)) is not None:
            return error
        if not self._settings.protected or scope["path"] in self._public:
            return None
        key = _key(scope)
        if not key or not self._settings.admits(key):
            what = "the API key is not known" if key else "an API key is needed"
            return ApiError(
                401,
                f"{what}; send it as Authorization: Bearer KEY or X-Api-Key: KEY",
                headers={"WWW-Authenticate": "Bearer"},
            )
        scope[TENANT] = self._settings.tenant(key)
        return None

    def _elsewhere(self, scope: Scope) -> ApiError | None:
        """Refuse requests that a web page of another origin makes a browser on this network send: plain cross-site
        requests, and DNS rebinding, where a name of the page's own points to this host. Only browsers are checked."""
        host, origin = _header(scope, b"host"), _header(scope, b"origin")
        site = _header(scope, b"sec-fetch-site")  # which browsers send to https and loopback only
        foreign = site == "cross-site" and scope["path"] not in self._public
        if origin is not None and site not in _OWN_SITES and scope["method"] not in _READING:
            foreign = foreign or origin.partition("://")[2].lower() != (host or "").lower()
        if foreign and not self._settings.allows(origin):
            what = f"web pages of {shown(origin)} are" if origin else "web pages of elsewhere are"
            return ApiError(403, f"the request is cross-site; {what} refused without --allow-origin", code="cross_site")
        if self._any_name or scope["path"] in self._probes:
            return None
        if host is None or self._is_ours(host):
            return None
        return ApiError(
            403,
            f"Host is {shown(host)}; without API keys, allowed are {', '.join(sorted(self._names))} and IP addresses: "
            "give the server an --api-key to be reached by any name",
            code="host_not_allowed",
        )

    def _is_ours(self, host: str) -> bool:
        match = _HOST.fullmatch(host)
        if match is None:
            return False
        name = match[1].lower().removesuffix(".")
        return name in self._names or _is_address(name.removeprefix("[").removesuffix("]"))


class _Answer:
    """Sends one response, in pieces: what the client has not read yet counts as its key's. `unread` has the bytes of
    all keys. A response that finds no room becomes status 429; one that has begun is cut off."""

    def __init__(self, scope: Scope, send: Send, unread: KeyShares, metrics: Metrics) -> None:
        self.status = 0
        self._scope = scope
        self._send = send
        self._unread = unread
        self._metrics = metrics
        self._head: Message | None = None  # until it is known that the body has room
        self._refused = False

    async def send(self, message: Message) -> None:
        """Takes the application's messages. Raises ClientGone where a response that has begun finds no room."""
        if self._refused:
            return
        if message["type"] == "http.response.start":
            self.status, self._head = message["status"], message
            shown_id = (b"x-request-id", self._scope[REQUEST_ID].encode())
            message["headers"] = [*message.get("headers", ()), shown_id]
            return
        body, key = message.get("body", b""), self._scope.get(TENANT, "")
        size = min(len(body), self._unread.most) if len(body) > PIECE else 0  # a lone one may always go
        if not self._unread.fits(key, size):
            if self._head is None:
                raise ClientGone
            await self.refuse(overloaded(f"{self._unread.held(key)} bytes of answers wait to be read; read them first"))
            return
        if not message.get("more_body"):
            self.end()
        with self._unread.taken(key, size):
            if self._head is not None:
                head, self._head = self._head, None
                await self._send(head)
            # Each piece waits until the client has read most of what came before it, and so does the end of the last.
            for begin in range(0, len(body), PIECE) if size else ():
                piece = body[begin : begin + PIECE]
                await self._send({"type": "http.response.body", "body": piece, "more_body": True})
            await self._send({**message, "body": b""} if size else message)

    async def refuse(self, error: ApiError) -> None:
        """Answer with an error, whatever the application sends."""
        count_rejection(self._metrics, error)
        await respond(error, self.send, self._scope["path"])
        self._refused = True

    def end(self) -> None:
        """Nothing more is made for this response: call what is to be called then, once."""
        while self._scope[AT_END]:
            self._scope[AT_END].pop()()


def _key(scope: Scope) -> str:
    """The API key that a request shows, as OpenAI's clients or as Anthropic's send it; "" without one."""
    scheme, _, key = (_header(scope, b"authorization") or "").partition(" ")
    if key.strip():
        return key.strip() if scheme.lower() == "bearer" else ""
    return (_header(scope, b"x-api-key") or "").strip()


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def count_rejection(metrics: Metrics, error: ApiError) -> None:
    """Count an error as a rejection, if its status is counted. The request's log line has it."""
    note_error(str(error))
    if error.status in _COUNTED and error.code is not None:
        metrics.rejected(error.code)


async def respond(error: ApiError, send: Send, path: str) -> None:
    """Send an error as the whole response, in the shape of the path's clients."""
    body = error.body(path)
    headers: list[Any] = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(name.lower().encode(), value.encode()) for name, value in error.headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _header(scope: Scope, name: bytes) -> str | None:
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), None)


def _handler(scope: Scope) -> str:
    """The path of the route, never the path that a client made up."""
    route = scope.get("route")
    if route is not None:
        return str(route.path)
    return str(scope["path"]) if "endpoint" in scope else "none"
