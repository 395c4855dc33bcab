"""The built-in page's files and its data, without a browser."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from collections.abc import Callable
from importlib import resources

import httpx
import pytest
import snapshots
from fastapi import FastAPI
from snapshots import holder, sequence
from unobserved import Unobserved

from lamina.errors import InvalidRequest
from lamina.messages.snapshot import HolderSnapshot, SequenceSnapshot, Snapshot
from lamina.server.frontend import Frontend, Served
from lamina.server.models import Models
from lamina.server.page.page import MOST, PUBLIC_PATHS, Events, add_page
from lamina.server.page.status import (
    MAX_SEQUENCES,
    SECONDS,
    Labels,
    Percentiles,
    RecentLatencies,
    Server,
    percentiles,
    status,
)
from lamina.server.settings import ServerSettings
from lamina.server.shares import KeyShares

SERVER = Server(
    model="some-model",
    version="1",
    state="ready",
    message="",
    restarts=0,
    active=2,
    max_requests=256,
    max_model_len=4096,
    seconds=30.0,
    first_token=Percentiles(3, 0.1, 0.2),
    next_token=None,
)


def snapshot(sequences: list[SequenceSnapshot], holders: tuple[HolderSnapshot, ...] = (), **changes) -> Snapshot:
    return snapshots.snapshot(
        1, **{"cached_pages": {"b": 5}, "holders": holders, "sequences": tuple(sequences), **changes}
    )


def test_ids_of_requests_stay_here():
    shown = status(SERVER, snapshot([sequence("tenant-secret-7", {"a": 3})], (holder("a"),)), Labels())
    assert "secret" not in json.dumps(shown)
    assert shown["engine"]["sequences"] == [{"label": 1, "tokens": 48, "prefill": False}]


def test_pages_stand_in_the_order_of_sequences():
    sequences = [sequence("x", {"a": 3, "b": 4}), sequence("y", {"b": 2}), sequence("y", {"a": 1}, sample=1)]
    shown = status(SERVER, snapshot(sequences, (holder("a"), holder("b"))), Labels())["engine"]
    assert [one["pages"] for one in shown["holders"]] == [[3, 0, 1], [4, 2, 0]]
    assert [one["cached_pages"] for one in shown["holders"]] == [0, 5]


def test_labels_last_as_long_as_sequences():
    labels = Labels()
    x, y, z = (sequence(name, {}) for name in "xyz")
    assert labels.of([x, y]) == [1, 2]
    assert labels.of([z, y]) == [3, 2]
    assert labels.of([x]) == [4]
    assert labels.of([]) == []


def test_the_same_sequence_twice_has_one_label():
    assert Labels().of([sequence("x", {}), sequence("x", {})]) == [1, 1]


def test_too_many_sequences_are_summed():
    sequences = [sequence(str(number), {"a": 2}) for number in range(MAX_SEQUENCES + 7)]
    shown = status(SERVER, snapshot(sequences, (holder("a"),)), Labels())["engine"]
    (one,) = shown["holders"]
    assert len(shown["sequences"]) == len(one["pages"]) == MAX_SEQUENCES
    assert one["other_pages"] == 14


def test_json_carries_all_of_it():
    whole = snapshot([sequence("x", {"a": 1})], (holder("a"),), missed_mass=float("nan"), missing=("c",))
    shown = json.loads(json.dumps(status(SERVER, whole, Labels()), allow_nan=False))
    assert shown["engine"]["missed_mass"] is None
    assert shown["engine"]["missing"] == ["c"]
    assert shown["first_token"] == {"count": 3, "p50": 0.1, "p99": 0.2}
    assert len(shown["engine"]["exchange_buckets"]) + 1 == len(shown["engine"]["holders"][0]["exchange_counts"])


def test_nothing_known_is_null():
    assert status(SERVER, None, Labels())["engine"] is None


@pytest.mark.parametrize(
    ("values", "p50", "p99"),
    [([4.0], 4.0, 4.0), ([3.0, 1.0, 2.0], 2.0, 3.0), ([float(n) for n in range(200, 0, -1)], 100.0, 198.0)],
)
def test_percentiles_by_nearest_rank(values, p50, p99):
    assert percentiles(values) == Percentiles(len(values), p50, p99)


def test_percentiles_of_nothing():
    assert percentiles([]) is None


def test_events_are_found_by_comparing_looks():
    now = [100.0]
    events = Events(lambda: now[0])

    def look(state: str = "ready", why: str = "", restarts: int = 0, **changes) -> list[tuple]:
        now[0] += 1
        zeros = {"lost_holders": 0, "rebuilt_tokens": 0, "began": 1.0}
        up = tuple(holder(name) for name in ("a", "b") if name not in changes.get("missing", ()))
        found = events.look(state, why, restarts, snapshot([], **(zeros | {"holders": up} | changes)))
        return [(e["subject"], e["what"], e["at"], e["tokens"], e["back"]) for e in found]

    assert look() == []
    assert look(missing=("b",), lost_holders=1) == [("b", "lost", 102.0, 0, None)]
    assert look(missing=("b",), lost_holders=1, rebuilt_tokens=76) == [("b", "lost", 102.0, 76, None)]
    assert look(lost_holders=1, rebuilt_tokens=76) == [("b", "lost", 102.0, 76, 104.0)]
    (seen, _) = look(lost_holders=2, rebuilt_tokens=76)  # lost and back between two looks
    assert seen == ("1 attention worker", "lost", 105.0, 0, 105.0)
    assert look(missing=("b",), lost_holders=3, rebuilt_tokens=76)[0] == ("b", "lost", 106.0, 0, None)
    again = (holder("a"), holder("b.1"))
    assert look(lost_holders=3, rebuilt_tokens=76, holders=again)[0] == ("b", "lost", 106.0, 0, 107.0)
    joined = (holder("a"), holder("b.1"), holder("c"))
    assert look(lost_holders=3, rebuilt_tokens=76, holders=joined)[0] == ("c", "joined", 108.0, 0, None)
    assert look("dead", "signal 9")[0] == ("engine", "dead", 109.0, 0, None)
    again = look(restarts=1, began=2.0, rebuilt_tokens=9)  # its counters begin anew
    assert again[0] == ("engine", "dead", 109.0, 9, 110.0)
    assert look(restarts=2, began=3.0)[0] == ("engine", "restarted", 111.0, 0, None)
    for _ in range(2 * MOST):
        look("halted")
        look(restarts=2)
    assert len(look(restarts=2)) == MOST


class Heard:
    def __init__(self) -> None:
        self.calls: list[tuple[str, object]] = []

    def first_token(self, seconds):
        self.calls.append(("first", seconds))

    def next_tokens(self, seconds, count):
        self.calls.append(("next", (seconds, count)))

    def ended(self, ticket, completion, seconds):
        self.calls.append(("ended", seconds))

    def failed(self, ticket, error):
        self.calls.append(("failed", str(error)))


def test_latencies_are_passed_on_and_forgotten():
    now, heard = [100.0], Heard()
    recent = RecentLatencies(heard, lambda: now[0])
    recent.first_token(0.5)
    recent.next_tokens(0.3, 3)
    now[0] += SECONDS - 1
    recent.first_token(0.7)
    recent.ended(None, None, 2.0)
    recent.failed(None, InvalidRequest("no"))
    assert recent.lately() == ([0.5, 0.7], [pytest.approx(0.1)])
    now[0] += 2
    assert recent.lately() == ([0.7], [])
    assert heard.calls == [("first", 0.5), ("next", (0.3, 3)), ("first", 0.7), ("ended", 2.0), ("failed", "no")]


class Engine:
    alive = True
    halted = False

    def snapshot(self, sink: Callable[[Snapshot], None]) -> None:
        if self.alive:
            sink(snapshot([sequence("secret", {"a": 3})], (holder("a"),)))


class InputProcessor:
    max_model_len = 333


def page() -> tuple[FastAPI, Frontend]:
    app, frontend = FastAPI(), Frontend(Unobserved())
    add_page(app, Models({"some-model": frontend}), ServerSettings(model="some-model"), KeyShares(1024, 1))
    return app, frontend


def client(app: FastAPI) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost")


def get(app: FastAPI, *paths: str) -> list[httpx.Response]:
    async def ask() -> list[httpx.Response]:
        async with client(app) as browser:
            return [await browser.get(path) for path in paths]

    return asyncio.run(ask())


def test_files_come_under_a_strict_policy():
    app, _ = page()
    for path, response in zip(PUBLIC_PATHS, get(app, *PUBLIC_PATHS), strict=True):
        assert response.status_code == 200, path
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        policy = response.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "script-src 'self'" in policy
        assert "unsafe" not in policy
        assert "*" not in policy


def test_the_page_needs_nothing_from_elsewhere():
    static = resources.files("lamina.server.page") / "static"
    files = {item.name: item.read_text() for item in static.iterdir() if item.is_file()}
    asked = set(re.findall(r'(?:src|href)="(lamina/[^"]+)"', files["index.html"]))
    for name, text in files.items():
        assert "//" not in re.sub(r"(^|\s)// .*|http://www.w3.org/2000/svg", "", text), name  # no address with a host
        asked |= {f"lamina/{other}" for other in re.findall(r'from "\./([^"]+)"', text)}
    assert {f"/{path}" for path in asked} | {"/"} == PUBLIC_PATHS
    scripts = [item for item in (static / "vendor").iterdir() if item.name.endswith(".js")]
    assert len(files) + len(scripts) == len(PUBLIC_PATHS)


def test_the_page_has_nothing_inline():
    static = resources.files("lamina.server.page") / "static"
    html = (static / "index.html").read_text()
    assert not re.search(r"<style|\sstyle=|\son\w+=|javascript:", html)
    assert all("src=" in tag for tag in re.findall(r"<script[^>]*>", html))
    for script in static.iterdir():
        if script.is_file():
            assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", script.read_text())


def test_files_of_others_are_as_they_published_them():
    vendor = resources.files("lamina.server.page") / "static" / "vendor"
    rows = re.findall(
        r"^\| (\S+\.js) \| .* (\S+\.LICENSE) \| ([0-9a-f]{64}) \|$", (vendor / "README.md").read_text(), re.M
    )
    assert {name for name, _, _ in rows} == {item.name for item in vendor.iterdir() if item.name.endswith(".js")}
    for name, licence, digest in rows:
        assert hashlib.sha256((vendor / name).read_bytes()).hexdigest() == digest
        assert (vendor / licence).is_file()


def test_status_through_the_life_of_an_engine():
    app, frontend = page()
    engine = Engine()

    async def seen(browser: httpx.AsyncClient) -> dict:
        response = await browser.get("/lamina/status")
        assert response.status_code == 200
        assert response.headers["Cache-Control"] == "no-store"
        return response.json()

    async def live() -> None:
        async with client(app) as browser:
            frontend.loading = "weights"
            loading = await seen(browser)
            assert (loading["state"], loading["engine"], loading["max_model_len"]) == ("loading", None, None)
            assert "weights" in loading["message"]

            frontend.ready(Served(engine, None, InputProcessor()))
            ready = await seen(browser)
            told = (ready["state"], ready["message"], ready["restarts"], ready["max_model_len"])
            assert told == ("ready", "", 0, 333)
            assert ready["engine"]["holders"][0]["pages"] == [3]

            frontend.lost("signal 9")
            dead = await seen(browser)
            assert dead["state"] == "dead"
            assert "signal 9" in dead["message"]
            assert dead["engine"] is not None  # the last that was seen

            frontend.ready(Served(engine, None, InputProcessor()), restarts=1)
            assert (await seen(browser))["restarts"] == 1
            engine.alive = False
            stopped = await seen(browser)
            assert (stopped["state"], stopped["message"]) == ("dead", "the engine is dead")

    asyncio.run(live())


def test_another_engine_is_asked_where_the_last_one_never_answered():
    app, frontend = page()
    silent, engine = Engine(), Engine()
    silent.alive = False

    async def live() -> None:
        async with client(app) as browser:
            frontend.ready(Served(silent, None, InputProcessor()))
            assert (await browser.get("/lamina/status")).json()["engine"] is None
            frontend.lost("signal 9")
            frontend.ready(Served(engine, None, InputProcessor()))
            assert (await browser.get("/lamina/status")).json()["engine"] is not None

    asyncio.run(live())


def test_latencies_are_those_of_the_frontend():
    app, frontend = page()
    frontend.observer.first_token(0.25)
    frontend.observer.next_tokens(0.02, 2)
    (response,) = get(app, "/lamina/status")
    assert response.json()["first_token"] == {"count": 1, "p50": 0.25, "p99": 0.25}
    assert response.json()["next_token"]["p50"] == pytest.approx(0.01)
