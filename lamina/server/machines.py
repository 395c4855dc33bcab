"""The machines that join, for the operator: their list, and what is decided about each. The supervisor has them; this
is what it said last.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any

from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from lamina.joining.pairing import plain_code
from lamina.server.http.errors import ApiError, shown
from lamina.server.http.fields import Strict, read
from lamina.server.http.limits import BodyMemory, check_media_type, parse_object
from lamina.server.settings import TENANT, ServerSettings

_MAX_BODY = 1 << 10  # bytes
_BODIES = 1 << 16  # of all at a time
_DECIDED_S = 2.0  # for which an answer waits until a decision shows
_LOOK_S = 0.02

Decide = Callable[[str, bool], None]


class MachineDecision(Strict):
    """POST /joining/{machine_id}."""

    accept: bool = Field(description="false refuses a machine that waits, and removes one that was accepted.")
    code: str = Field("", max_length=16, description="The digits that it shows, by which it is accepted.")


class Machines:
    """The routes, for operators alone. `decide` passes a decision on; None: the server takes no machines."""

    def __init__(self, settings: ServerSettings, decide: Decide | None = None) -> None:
        self._settings = settings
        self._decide = decide
        self._machines: Sequence[dict[str, Any]] = ()
        self._bodies = BodyMemory(_BODIES)

    def update(self, machines: Sequence[dict[str, Any]]) -> None:
        """These are the machines now. For any thread."""
        self._machines = machines

    async def machines(self, service: object, request: Request) -> Response:
        """GET /joining: the machines that wait to be accepted, and those that were."""
        self._check_operator(request)
        return self._answer()

    async def decide(self, service: object, request: Request) -> Response:
        """POST /joining/{machine_id}: accept a machine, refuse it, or remove it. Answers as GET /joining does."""
        self._check_operator(request)
        check_media_type(request.headers.get("content-type", ""))
        async with self._bodies.body(request.receive, request.headers, _MAX_BODY) as body:
            decision = read(MachineDecision, parse_object(body))
        id = request.path_params["machine_id"]
        machine = self._machine(id)
        if not machine or self._decide is None:
            raise ApiError(404, f"there is no machine {shown(id)}; GET /joining lists them", code="machine_not_found")
        if not decision.accept or machine["state"] == "waiting":
            if decision.accept and plain_code(decision.code) != machine["code"]:
                about = f"code is {shown(decision.code)}; allowed is that of {machine['name']} at {machine['address']}"
                why = "If your machine shows another one than this server, a third is in between: accept none"
                raise ApiError(400, f"{about}. {why}", "code", "wrong_code")
            self._decide(id, decision.accept)
            end = time.monotonic() + _DECIDED_S
            while self._machine(id).get("state") == machine["state"] and time.monotonic() < end:
                await asyncio.sleep(_LOOK_S)
        return self._answer()

    def _machine(self, id: str) -> dict[str, Any]:
        return next((machine for machine in self._machines if machine["id"] == id), {})

    def _answer(self) -> Response:
        content = {"allowed": self._decide is not None, "machines": list(self._machines)}
        return JSONResponse(content, headers={"Cache-Control": "no-store"})

    def _check_operator(self, request: Request) -> None:
        if not self._settings.is_operator(request.scope[TENANT]):
            raise ApiError(403, "machines are taken with a key of the operator", code="operator_only")
