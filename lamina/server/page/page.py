"""The built-in page: its files, and the route of the data it shows.

The page is plain HTML, CSS and JavaScript under a strict Content-Security-Policy. It sends requests only to its own
server.
"""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import replace
from importlib import resources

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from lamina.messages.snapshot import Snapshot
from lamina.server.frontend import STATES, Frontend
from lamina.server.models import Models, ServedModel
from lamina.server.page.events import Events
from lamina.server.page.recent_latencies import SECONDS, RecentLatencies
from lamina.server.page.status import Labels, Server, of_one, percentiles, status
from lamina.server.settings import TENANT, ServerSettings
from lamina.server.shares import KeyShares
from lamina.version import __version__

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
        asked = request.query_params.get("model")
        found = None if asked is None else settings.named(asked)
        model = models.shown if found is None else models[found]
        frontend, seen = model.frontend, watched[model.name]
        snapshot = await frontend.snapshot(_SNAPSHOT_TIMEOUT)
        server, tenant = _server(model, settings, seen.recent), request.scope.get(TENANT, "")
        happened = seen.events.look(server.state, frontend.why or server.message, server.restarts, snapshot)
        operator = settings.is_operator(tenant)
        if not operator:
            server, snapshot = _own(tenant, frontend, samples, server, snapshot)
        content = status(server, snapshot, seen.labels[tenant])
        content["events"] = happened if operator else []
        content["models"] = [{"id": each.name, "state": each.residence} for each in models]
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
    held = samples.held(tenant)
    server = replace(server, active=held, max_requests=samples.most, first_token=None, next_token=None)
    if snapshot is not None:
        mine = [each for each in snapshot.sequences if frontend.owners.get(each.request) == tenant]
        snapshot = of_one(snapshot, mine, held)
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
