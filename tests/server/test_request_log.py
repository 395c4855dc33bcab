"""Log lines of a server: one for each request, with its id and what it cost, as text and as JSON."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import Iterator
from typing import Any

import pytest
from scripted_reply import ticket
from starlette.testclient import TestClient
from unobserved import NoMetrics, Unobserved

from lamina.completions import Completion, Sample, Timing, Usage
from lamina.errors import EngineError
from lamina.server.http.gate import Gate
from lamina.server.request_log import CostObserver
from lamina.server.settings import ServerSettings
from lamina.system.logs import configure

COMPLETION = Completion((Sample(0, "a secret", (1, 2, 3), "stop", None),), Usage(812, 3, 640), Timing(0.1, 0.3, 0.4, 3))


@pytest.fixture
def unconfigured() -> Iterator[None]:
    """The root logger is as it was afterwards."""
    root, logger = logging.getLogger(), logging.getLogger("lamina")
    before = root.handlers[:], root.level, logger.level
    yield
    root.handlers[:], root.level = before[:2]
    logger.setLevel(before[2])


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Answers as if two prompts had been computed; /broken as if the engine had failed."""
    observer = CostObserver(Unobserved())

    async def generate() -> None:  # a task of its own, as those of streams are
        if scope["path"] == "/broken":
            observer.failed(ticket(), EngineError("the engine\n\x1b[31mstopped"))
        else:
            observer.ended(ticket(), COMPLETION, 0.5)
            observer.ended(ticket(), COMPLETION, 0.5)

    await asyncio.create_task(generate())
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"a secret"})


def ask(path: str, method: str = "POST", form: str = "text", level: str = "info") -> None:
    configure("http", level, form)
    gate = Gate(app, ServerSettings(model="m"), NoMetrics(), public=("/health",), probes=("/health",))
    TestClient(gate, base_url="http://localhost").request(method, path, headers={"x-request-id": "mine"})


@pytest.mark.usefixtures("unconfigured")
def test_a_request_has_one_line_with_its_id_and_its_cost(capsys: pytest.CaptureFixture[str]) -> None:
    ask("/v1/completions")
    [line] = capsys.readouterr().err.splitlines()
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} INFO http \[mine\]: POST '/v1/completions' 200 in \d+\.\d\d s: "
        r"1624 prompt tokens \(1280 cached\), first token after 0\.30 s, 6 tokens, 20\.0 a second",
        line,
    )


@pytest.mark.usefixtures("unconfigured")
def test_a_line_of_json_has_the_same_as_fields(capsys: pytest.CaptureFixture[str]) -> None:
    ask("/v1/completions", form="json")
    [line] = map(json.loads, capsys.readouterr().err.splitlines())
    assert (line["level"], line["process"], line["request_id"], line["status"]) == ("info", "http", "mine", 200)
    assert (line["prompt_tokens"], line["cached_tokens"], line["tokens"]) == (1624, 1280, 6)
    assert (line["first_token"], line["tokens_per_second"]) == (0.3, pytest.approx(20))
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"])
    assert "secret" not in str(line)


@pytest.mark.usefixtures("unconfigured")
def test_the_line_says_why_a_request_failed_and_a_path_cannot_forge_one(capsys: pytest.CaptureFixture[str]) -> None:
    ask("/broken")
    assert capsys.readouterr().err.endswith("s; the engine  [31mstopped\n")
    ask("/a%0A2026-12-02 ERROR forged")
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.usefixtures("unconfigured")
def test_probes_and_pages_are_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    ask("/health", "GET")
    ask("/", "GET")
    ask("/v1/completions", level="warning")
    assert capsys.readouterr().err == ""
    ask("/health", "GET", level="debug")
    assert "DEBUG http [mine]: GET" in capsys.readouterr().err


@pytest.mark.usefixtures("unconfigured")
def test_a_traceback_is_a_field_of_json(capsys: pytest.CaptureFixture[str]) -> None:
    configure("engine", "info", "json")
    try:
        raise ValueError("odd")
    except ValueError:
        logging.getLogger("lamina").exception("a fault of ours")
    [line] = map(json.loads, capsys.readouterr().err.splitlines())
    assert line["message"] == "a fault of ours"
    assert line["traceback"].endswith("ValueError: odd")
