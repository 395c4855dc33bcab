"""The built-in page: its files, and the route of the data it shows (`add_page`).

The page is plain HTML, CSS and JavaScript under a strict Content-Security-Policy. It sends requests only to its own
server.

Among the data is a short list of what has happened to an engine and its holders (`Events`). It is found by comparing
two looks at them. A look happens only when the page asks. So an event has two times: it happened after `since`, the
look before, and not later than `at`.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib import resources
from typing import Any, Literal

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from lamina.messages.snapshot import Snapshot
from lamina.server.frontend import STATES, Frontend
from lamina.server.models import Models, ServedModel
from lamina.server.page.status import SECONDS, Labels, RecentLatencies, Server, of_one, percentiles, status
from lamina.server.settings import TENANT, ServerSettings
from lamina.server.shares import KeyShares
from lamina.version import __version__

MOST = 64
"""Events kept; older ones are forgotten."""

What = Literal["lost", "joined", "dead", "halted", "restarted"]

ENGINE = "engine"
AWAY: tuple[What, ...] = ("lost", "dead", "halted")
"""What lasts until something is back."""


@dataclass(slots=True)
class Event:
    """`subject` is a holder's name, or "engine". `back`, where it is lost, dead or halted: when it was seen again.
    `tokens`: KV of so many tokens was computed again since. Times are in seconds since 1970."""

    subject: str
    what: What
    since: float
    at: float
    why: str = ""
    tokens: int = 0
    back: float | None = None


class Events:
    """`clock` gives seconds since 1970. The first look compares with a server that has just started."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._events: deque[Event] = deque(maxlen=MOST)
        self._looked = clock()
        self._restarts = 0
        self._last: Snapshot | None = None

    def look(self, state: str, why: str, restarts: int, snapshot: Snapshot | None) -> list[dict[str, Any]]:
        """Compare with the last look. Returns all events as plain data, the newest first. `why` is that of a state
        other than "ready"."""
        now = self._clock()
        self._engine(state, why, restarts, now)
        if snapshot is not None and state != "dead":  # a dead engine's snapshot is an old one
            self._holders(snapshot, now)
        self._looked = now
        return [asdict(event) for event in reversed(self._events)]

    def _engine(self, state: str, why: str, restarts: int, now: float) -> None:
        died = self._open(ENGINE, "dead")
        if state == "dead" and died is None:
            self._add(ENGINE, "dead", now, why)
        elif state == "halted" and self._open(ENGINE, "halted") is None:
            self._add(ENGINE, "halted", now, why)
        elif state == "ready":
            self._came_back(ENGINE, now)
            if restarts - self._restarts > (died is not None):
                self._add(ENGINE, "restarted", now)
            self._restarts = restarts

    def _holders(self, snapshot: Snapshot, now: float) -> None:
        before = self._last if self._last is not None and self._last.began == snapshot.began else None
        self._last = snapshot
        names = {holder.name for holder in snapshot.holders}
        names_before = {holder.name for holder in before.holders} if before else names
        lost = [name for name in snapshot.missing if self._open(name, "lost") is None]
        away = {event.subject for event in self._events if event.what == "lost" and event.back is None}
        replaced = {name for name in away.difference(snapshot.missing) if self._came_back(name, now)}
        for name in lost:
            self._add(name, "lost", now)
        for name in sorted(names - names_before):
            if name not in replaced and name.rpartition(".")[0] not in replaced:  # a worker starts again as NAME.1
                self._add(name, "joined", now)
        unseen = snapshot.lost_holders - (before.lost_holders if before else 0) - len(lost)
        if unseen > 0:  # lost and back between two looks
            self._add("1 attention worker" if unseen == 1 else f"{unseen} attention workers", "lost", now).back = now
        again = snapshot.rebuilt_tokens - (before.rebuilt_tokens if before else 0)
        cause = next((event for event in reversed(self._events) if event.what in ("lost", "dead", "restarted")), None)
        if again > 0 and cause is not None:
            cause.tokens += again

    def _open(self, subject: str, what: What) -> Event | None:
        events = (event for event in self._events if (event.subject, event.what, event.back) == (subject, what, None))
        return next(events, None)

    def _came_back(self, subject: str, now: float) -> bool:
        """Whether something of that name was lost, dead or halted, and no longer is."""
        away = [event for what in AWAY if (event := self._open(subject, what)) is not None]
        for event in away:
            event.back = now
        return bool(away)

    def _add(self, subject: str, what: What, now: float, why: str = "") -> Event:
        event = Event(subject, what, self._looked, now, why)
        self._events.append(event)
        return event


_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/lamina/page.css": ("page.css", "text/css; charset=utf-8"),
    "/lamina/icon.svg": ("icon.svg", "image/svg+xml"),
    **{
        f"/lamina/{name}.js": (f"{name}.js", "text/javascript; charset=utf-8")
        for name in ("page", "chart", "holders", "chat", "markdown", "events", "joining", "models", "units")
    },
    **{  # of others, as they publish them: see static/vendor/README.md
        f"/lamina/vendor/{name}": (f"vendor/{name}", "text/javascript; charset=utf-8")
        for name in ("marked.esm.js", "purify.min.js")
    },
}

PUBLIC_PATHS = frozenset(_FILES)
"""Paths that need no API key: the files of the page, which are the same on every server."""

_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # another version of the server has other files
}

_SNAPSHOT_TIMEOUT = 1.0  # seconds for which a page waits for the engine


class _Watched:
    """What the page keeps of one model. The frontend's observer is wrapped."""

    def __init__(self, frontend: Frontend) -> None:
        self.recent = frontend.observer = RecentLatencies(frontend.observer, time.monotonic)
        self.events = Events(time.time)
        self.labels: defaultdict[str, Labels] = defaultdict(Labels)  # by tenant


def add_page(app: FastAPI, models: Models, settings: ServerSettings, samples: KeyShares) -> None:
    """Serve the page at `/`, its files below `/lamina/`, and its data at `/lamina/status`, which needs an API key and
    shows what that key does, or all of them to the operator: of `?model=NAME`, else of one that is loaded. The
    frontends' observers are wrapped, so they must be set before."""
    watched = {model.name: _Watched(model.frontend) for model in models}
    folder = resources.files("lamina.server.page") / "static"

    async def show_status(request: Request) -> Response:
        model_name = request.query_params.get("model")
        served_name = None if model_name is None else settings.named(model_name)
        model = models.shown if served_name is None else models[served_name]
        frontend, watch = model.frontend, watched[model.name]
        snapshot = await frontend.snapshot(_SNAPSHOT_TIMEOUT)
        server, tenant = _server(model, settings, watch.recent), request.scope.get(TENANT, "")
        happened = watch.events.look(server.state, frontend.why or server.message, server.restarts, snapshot)
        operator = settings.is_operator(tenant)
        if not operator:
            server, snapshot = _own(tenant, frontend, samples, server, snapshot)
        content = status(server, snapshot, watch.labels[tenant])
        content["events"] = happened if operator else []
        content["models"] = [{"id": entry.name, "state": entry.residence} for entry in models]
        content["on_demand"] = operator and models.on_demand
        return JSONResponse(content, headers={"Cache-Control": "no-store"})

    def add_file(path: str, body: bytes, media_type: str) -> None:
        async def show(request: Request) -> Response:
            return Response(body, media_type=media_type, headers=_HEADERS)

        app.router.routes.append(Route(path, show, methods=["GET"], include_in_schema=False))

    for path, (name, media_type) in _FILES.items():
        add_file(path, folder.joinpath(*name.split("/")).read_bytes(), media_type)
    app.router.routes.append(Route("/lamina/status", show_status, methods=["GET"], include_in_schema=False))


def _own(
    tenant: str, frontend: Frontend, samples: KeyShares, server: Server, snapshot: Snapshot | None
) -> tuple[Server, Snapshot | None]:
    """What a tenant may see: the server as it would be without the others."""
    count = samples.held(tenant)
    server = replace(server, active=count, max_requests=samples.most, first_token=None, next_token=None)
    if snapshot is not None:
        mine = [sequence for sequence in snapshot.sequences if frontend.owners.get(sequence.request) == tenant]
        snapshot = of_one(snapshot, mine, count)
    return server, snapshot


def _server(model: ServedModel, settings: ServerSettings, recent: RecentLatencies) -> Server:
    frontend = model.frontend
    first, following = recent.lately()
    state = frontend.state
    return Server(
        model=model.name,
        version=__version__,
        state=state,
        message=frontend.unavailable or ("" if state == "ready" else STATES[state]),
        restarts=max(0, frontend.restarts),
        active=frontend.active,
        max_requests=settings.max_requests,
        max_model_len=frontend.max_model_len,
        seconds=SECONDS,
        first_token=percentiles(first),
        next_token=percentiles(following),
    )
