"""The built-in page in a real browser: Chromium, driven by Playwright, against an engine that is not there."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI
from snapshots import holder, snapshot
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send
from unobserved import Unobserved

from lamina.messages.snapshot import EXCHANGE_BUCKETS, SequenceSnapshot, Snapshot
from lamina.server.frontend import Frontend, Served
from lamina.server.models import Models
from lamina.server.page.page import PUBLIC_PATHS, add_page
from lamina.server.settings import ServerSettings
from lamina.server.shares import KeyShares

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = [pytest.mark.real, pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")]

ANSWER = ["Force", "is", "<b>mass</b>", "times", "acceleration", "<img", "src=x", "onerror=alert(1)>", "says", "Newton"]


class Engine:
    """Moves its counters by the clock: `rate` output tokens a second, spread over the holders."""

    alive = True
    halted = False

    def __init__(self, holders: int = 3, sequences: int = 5, pages: int = 400, rate: float = 100.0) -> None:
        self.began = time.monotonic()
        self.names = [f"attention-{index}" for index in range(holders)]
        self.sequences, self.pages, self.rate = sequences, pages, rate
        self.missing: tuple[str, ...] = ()

    def snapshot(self, sink: Callable[[Snapshot], None]) -> None:
        sink(self.look())

    def look(self) -> Snapshot:
        uptime = time.monotonic() - self.began
        names = [name for name in self.names if name not in self.missing]
        each = 4 + int(uptime) % 3
        sequences = [
            SequenceSnapshot(f"tenant-secret-{index}", 0, 16 * each, index == 0, dict.fromkeys(names, each))
            for index in range(self.sequences)
        ]
        used = self.sequences * each + 10
        counts = [0] * (len(EXCHANGE_BUCKETS) + 1)
        counts[len(counts) // 2] = int(uptime * 300)
        traffic = int(uptime * 2e6)
        same: dict[str, Any] = {"total_pages": self.pages, "free_pages": self.pages - used}
        same |= {"bytes_sent": traffic, "bytes_received": traffic, "exchange_counts": tuple(counts)}
        holders = [holder(name, address=f"127.0.0.1:{9000 + index}", **same) for index, name in enumerate(names)]
        counted = {"generation_tokens": int(uptime * self.rate), "prompt_tokens": int(uptime * 50)}
        times = {"uptime": uptime, "began": self.began, "model_seconds": uptime * 0.5}
        lost = {"lost_holders": len(self.missing), "missing": self.missing}
        kept = {"cached_pages": dict.fromkeys(names, 10), "holders": tuple(holders), "sequences": tuple(sequences)}
        times["attention_seconds"] = uptime * 0.25
        return snapshot(running=self.sequences, page_size=16, **counted, **times, **lost, **kept)


class InputProcessor:
    max_model_len = 8192


@dataclasses.dataclass
class World:
    """A server and what it was asked."""

    url: str
    frontend: Frontend
    asked: list[dict]
    gone: threading.Event  # a client left in the middle of an answer
    refuse: list[Response]  # instead of the next answer
    deltas: list[dict] = dataclasses.field(default_factory=list)  # of the next answers, instead of ANSWER
    machines: list[dict] = dataclasses.field(default_factory=list)  # that join
    answers: list[tuple[str, dict]] = dataclasses.field(default_factory=list)  # to machines: id and what was sent


class Loads:
    """Loads no model."""

    def load(self, name: str) -> None: ...

    def unload(self, name: str) -> None: ...


class Key:
    """ASGI middleware: the page's files are for anybody, the rest is for who has the key."""

    def __init__(self, app: FastAPI, settings: ServerSettings) -> None:
        self.app, self.settings = app, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in PUBLIC_PATHS:
            shown = Request(scope).headers.get("Authorization", "").removeprefix("Bearer ")
            if not self.settings.admits(shown):
                response = JSONResponse({"error": {"message": "this key is not known"}}, status_code=401)
                await response(scope, receive, send)
                return
        await self.app(scope, receive, send)


@contextlib.contextmanager
def serving(
    engine: Engine | None = None, keys: tuple[str, ...] = (), pause: float = 0.02, others: tuple[str, ...] = ()
) -> Iterator[World]:
    app, frontend = FastAPI(), Frontend(Unobserved())
    settings = ServerSettings(model="some-model", api_keys=keys, others=others)
    models = Models(
        {settings.model: frontend} | {name: Frontend(Unobserved()) for name in others}, Loads() if others else None
    )
    add_page(app, models, settings, KeyShares(settings.max_requests, settings.tenants))
    for name in others:
        models[name].frontend.unloaded()
    if engine is not None:
        frontend.ready(Served(engine, None, InputProcessor()))
    listener = socket.create_server(("127.0.0.1", 0))
    world = World(f"http://127.0.0.1:{listener.getsockname()[1]}/", frontend, [], threading.Event(), [])

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        world.asked.append(await request.json())
        if world.refuse:
            return world.refuse.pop()

        async def chunks():
            begun = time.monotonic()
            try:
                for delta in world.deltas or [{"content": f"{word} "} for word in ANSWER]:
                    choice = {"index": 0, "delta": delta, "finish_reason": None}
                    yield f"data: {json.dumps({'choices': [choice]})}\n\n"
                    frontend.observer.next_tokens(max(time.monotonic() - begun, 0.001), 1)
                    await asyncio.sleep(pause)
            except (asyncio.CancelledError, GeneratorExit):
                world.gone.set()
                raise
            yield f"data: {json.dumps({'choices': [{'index': 0, 'delta': {}, 'finish_reason': 'stop'}]})}\n\n"
            usage = {"completion_tokens": len(ANSWER)}
            yield f"data: {json.dumps({'choices': [], 'usage': usage})}\n\ndata: [DONE]\n\n"

        return StreamingResponse(chunks(), media_type="text/event-stream")

    @app.post("/v1/models/{name}/load")
    async def load(name: str) -> Response:
        world.answers.append((name, {}))
        return JSONResponse({"error": {"message": "there is no room"}}, 409)

    @app.get("/joining")
    async def joining() -> Response:
        return JSONResponse({"allowed": True, "machines": world.machines})

    @app.post("/joining/{machine}")
    async def accept(machine: str, request: Request) -> Response:
        world.answers.append((machine, decision := await request.json()))
        if decision["code"] != "314 159":
            return JSONResponse({"error": {"message": "another code"}}, 400)
        world.machines = [each | {"state": "serving"} for each in world.machines]
        return JSONResponse({})

    config = uvicorn.Config(Key(app, settings), log_level="warning", ws="none", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])))
    thread.start()
    try:
        yield world
    finally:
        server.should_exit = server.force_exit = True
        thread.join(20)
        listener.close()
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def chromium():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Tab:
    """A page that notes what it should not do."""

    def __init__(self, browser, world: World, size: tuple[int, int], dark: bool) -> None:
        self.context = browser.new_context(
            viewport={"width": size[0], "height": size[1]}, color_scheme="dark" if dark else "light"
        )
        self.page = self.context.new_page()
        self.page.set_default_timeout(15_000)
        self.errors: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self._said(message.type, message.text))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.unasked = lambda dialog: self.errors.append(dialog.message)
        self.page.on("dialog", self.unasked)
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(world.url)
        self.url = world.url

    def _said(self, kind: str, text: str) -> None:
        own = ("Failed to load resource: the server responded", "Failed to load resource: net::ERR_CONNECTION_REFUSED")
        if kind in ("error", "warning") and not text.startswith(own):  # of a status, and of a server that has ended
            self.errors.append(text)

    def wait(self, condition: str) -> None:
        deadline = time.monotonic() + 15  # Playwright's own way evaluates in the page, where the policy forbids it
        while not self.page.evaluate(condition):
            assert time.monotonic() < deadline, condition
            self.page.wait_for_timeout(30)

    def ask(self, text: str) -> None:
        """Send a message with the Enter key."""
        self.page.fill("#text", text)
        self.page.press("#text", "Enter")

    def text(self, selector: str) -> str:
        return self.page.inner_text(selector)

    def number(self, selector: str) -> float:
        return float(self.text(selector).replace(",", "").removesuffix(" %"))

    def check(self) -> None:
        assert self.errors == []
        assert [url for url in self.asked if not url.startswith(self.url)] == []


@pytest.fixture
def tab(chromium):
    """Opens a world's page; in the end, none may have had an error or asked another server."""
    tabs: list[Tab] = []

    def opened(world: World, size: tuple[int, int] = (1280, 900), dark: bool = False) -> Tab:
        tabs.append(Tab(chromium, world, size, dark))
        return tabs[-1]

    yield opened
    for each in tabs:
        if not each.page.is_closed():
            each.page.wait_for_timeout(50)  # for what is on its way
        each.check()
        each.context.close()


def pixels(tab: Tab, selector: str) -> str:
    return tab.page.eval_on_selector(selector, "canvas => canvas.toDataURL()")


READY = "document.querySelector('#output').textContent !== '–'"


def test_figures_move_while_the_engine_works(tab):
    with serving(Engine(rate=100.0)) as world:
        it = tab(world)
        it.wait(READY)
        before = {name: pixels(it, name) for name in ("#strips", "#maps canvas")}
        it.wait("document.querySelector('#tier-words').textContent.includes('idle 25 %')")
        it.page.wait_for_timeout(2500)
        assert 80 <= it.number("#output") <= 120
        assert 40 <= it.number("#prompt") <= 60
        assert it.number("#running") == 5
        assert it.text("#state") == "ready"
        assert it.text("#model") == "some-model"
        assert it.text("#context") == "8,192 tokens"
        assert "dense layers 50 %" in it.text("#tier-words")
        assert "attention 25 %" in it.text("#tier-words")
        assert it.page.locator("#maps figure").count() == 3
        rows = it.page.locator("#workers tbody tr").all_inner_texts()
        assert [row[:11] for row in rows] == ["attention-0", "attention-1", "attention-2"]
        assert all("2.0 MB/s" in row and "127.0.0.1:900" in row and " ms" in row for row in rows)
        for name, drawn in before.items():
            it.wait(f"document.querySelector('{name}').toDataURL() !== '{drawn}'")
        assert "secret" not in it.page.content()


def test_a_lost_holder_is_told(tab):
    with serving(engine := Engine()) as world:
        it = tab(world)
        it.wait("document.querySelectorAll('#maps figure').length === 3")
        engine.missing = ("attention-1",)
        it.wait("document.querySelectorAll('#maps figure').length === 2")
        row = it.text("#workers tbody tr.lost")
        assert "attention-1" in row
        assert "lost" in row
        assert "127.0.0.1:9001" in row  # what was known of it
        assert it.text("#state") == "ready, 1 attention worker lost"
        assert it.text("#holders-up") == "2 of 3 up"
        assert it.text("#newest-events").startswith("attention-1 lost at ")
        engine.missing = ()
        it.wait("document.querySelector('#newest-events').textContent.includes('; back at ')")
        assert it.text("#state") == "ready"


def test_an_answer_streams_and_is_only_text(tab):
    with serving(Engine()) as world:
        it = tab(world)
        it.wait(READY)
        it.page.fill("#text", "What is force?")
        it.page.fill("#temperature", "0.5")
        it.page.fill("#max-tokens", "33")
        it.page.press("#text", "Enter")
        it.wait("document.querySelector('.assistant .said').textContent.includes('Force')")
        it.wait("document.querySelector('.assistant .about')")
        assert it.text(".assistant .said").strip() == " ".join(ANSWER)
        assert it.page.locator("#messages img, #messages .said b").count() == 0
        assert it.text(".assistant .about").startswith(f"{len(ANSWER)} tokens, ")
        assert "tokens/s, first after " in it.text(".assistant .about")
        it.page.fill("#text", "And mass?")
        it.page.click("#send")
        it.wait("document.querySelectorAll('.assistant .about').length === 2")
    first, second = world.asked
    assert first["model"] == "some-model"
    assert (first["temperature"], first["max_tokens"], first["stream"]) == (0.5, 33, True)
    assert [message["role"] for message in second["messages"]] == ["user", "assistant", "user"]


MARKDOWN = """# Title
A **bold** word, `code`, [a link](https://example.com) and [a trap](javascript:alert(1)).

```python
print("<b>")
```

| a | b |
| - | - |
| 1 | 2 |

![a picture](https://example.com/x.png)
<script>alert(1)</script>
"""


def test_answers_are_markdown_with_reasoning_folded(tab):
    with serving(Engine()) as world:
        thoughts = [{"reasoning_content": f"step {n}. "} for n in range(4)]
        world.deltas = [*thoughts, *({"content": MARKDOWN[i : i + 7]} for i in range(0, len(MARKDOWN), 7))]
        it = tab(world)
        it.context.grant_permissions(["clipboard-read", "clipboard-write"])
        it.ask("Think.")
        it.wait("document.querySelector('.reasoning:not([hidden])')")
        it.wait("document.querySelector('.assistant .about')")
        assert not it.page.is_visible(".thought")
        it.page.click(".reasoning summary")
        assert it.text(".thought").strip() == "step 0. step 1. step 2. step 3."
        said = ".assistant .said"
        assert it.text(f"{said} h1") == "Title"
        assert it.text(f"{said} strong") == "bold"
        assert it.page.get_attribute(f"{said} a[href]", "rel") == "noopener noreferrer nofollow"
        assert it.page.locator(f"{said} a[href]").count() == 1  # not the trap
        assert it.page.locator(f"{said} td").count() == 2
        assert it.page.locator(f"{said} img, {said} script").count() == 0
        assert "<script>alert(1)</script>" in it.text(said)
        assert it.text(f"{said} .code span") == "python"
        it.page.click(f"{said} .code button")
        it.wait("document.querySelector('.said .copy').textContent === 'Copied'")
        assert it.page.evaluate("navigator.clipboard.readText()") == 'print("<b>")'
        it.page.click(".about .copy")
        it.wait("document.querySelector('.about .copy').textContent === 'Copied'")
        assert it.page.evaluate("navigator.clipboard.readText()") == MARKDOWN
        it.ask("And?")
        it.wait("document.querySelectorAll('.assistant .about').length === 2")
        assert world.asked[1]["messages"][1] == {"role": "assistant", "content": MARKDOWN}


def test_deep_markdown_is_shown_and_harms_nothing(tab):
    with serving(Engine()) as world:
        world.deltas = [{"content": "> " * 20000 + "deep"}]
        it = tab(world)
        it.ask("Go deep.")
        it.wait("document.querySelector('.assistant .about')")
        assert "deep" in it.text(".assistant .said")


def test_models_are_switched(tab):
    with serving(Engine(), others=("another",)) as world:
        it = tab(world)
        it.wait("document.querySelector('#models').value === 'some-model'")
        assert it.page.locator("#models option").all_inner_texts() == ["some-model (loaded)", "another (unloaded)"]
        it.page.select_option("#models", "another")
        it.wait("document.querySelector('#state').textContent === 'unloaded'")
        it.page.click("#load")
        it.wait("document.querySelector('#chat-words').textContent === 'there is no room'")
        it.ask("Hello?")
        it.wait("document.querySelector('.assistant .about')")
        assert world.asked[0]["model"] == "another"
        it.page.select_option("#models", "some-model")
        it.wait(READY)


def test_a_machine_is_accepted(tab):
    with serving(Engine()) as world:
        machine = {"id": "m1", "name": "attic", "code": "314159", "address": "192.168.1.7", "memory": 16 << 30}
        world.machines = [machine | {"since": 0, "state": "waiting"}]
        it = tab(world, size=(390, 844))
        it.wait("document.querySelector('#joining .code-of')?.textContent === '314159'")
        assert "attic asks to join (192.168.1.7, 16 GiB of memory)" in it.text("#joining")
        typed, asked = ["", "271828", "314 159"], []

        def type_code(dialog: Any) -> None:
            asked.append(dialog.message)
            dialog.accept(code) if (code := typed.pop(0)) else dialog.dismiss()

        it.page.remove_listener("dialog", it.unasked)
        it.page.on("dialog", type_code)
        it.page.click("#joining button.main")
        it.page.click("#joining button.main")
        it.wait("document.querySelector('#joining .wrong')?.textContent === 'another code'")
        it.page.click("#joining button.main")
        it.wait("document.querySelector('#joining').textContent.includes('joined and serves')")
        assert it.text("#spoken") == "attic at 192.168.1.7 with the code 314 159 is accepted"
    assert asked == ["Which code does your machine show? The one that asks is attic at 192.168.1.7."] * 3
    assert world.answers == [("m1", {"accept": True, "code": code}) for code in ("271828", "314 159")]


def test_stop_ends_the_answer_at_the_server_too(tab):
    with serving(Engine(), pause=0.5) as world:
        it = tab(world)
        it.page.fill("#text", "What is force?")
        it.page.click("#send")
        it.wait("document.querySelector('.assistant .said')?.textContent.includes('Force')")
        it.page.click("#stop")
        it.wait("document.querySelector('.assistant .about')?.textContent.includes('stopped by you')")
        assert world.gone.wait(5)
        assert it.page.is_visible("#send")
        assert not it.page.is_visible("#stop")
        assert "Newton" not in it.text(".assistant .said")


def test_refusals_are_told_in_words_and_the_question_kept(tab):
    full = JSONResponse({"error": {"message": "too many requests"}}, 429, {"Retry-After": "7"})
    broken = StreamingResponse(
        iter(['data: {"error": {"message": "the worker died"}}\n\n']), media_type="text/event-stream"
    )
    with serving(Engine()) as world:
        it = tab(world)
        it.wait(READY)
        for refusal, words in (
            (full, "busy; try again in 7 s: too many requests"),
            (broken, "broke off: the worker died"),
        ):
            world.refuse.append(refusal)
            it.ask("What is force?")
            it.wait(f"[...document.querySelectorAll('.wrong')].some(e => e.textContent.includes('{words}'))")
            assert it.page.input_value("#text") == "What is force?"
        it.page.fill("#max-tokens", "0")
        it.page.press("#text", "Enter")
        it.wait("document.querySelector('#chat-words').textContent.startsWith('max tokens:')")
        assert len(world.asked) == 2


def test_a_key_is_asked_for_and_kept_for_the_tab(tab):
    with serving(Engine(), keys=("right",)) as world:
        it = tab(world)
        it.wait("document.querySelector('#access-words').textContent === 'This server needs an API key.'")
        it.page.fill("#key", "wrong")
        it.page.press("#key", "Enter")
        it.wait("document.querySelector('#access-words').textContent === 'The server did not accept this API key.'")
        it.ask("What is force?")
        it.wait("document.querySelector('.wrong')?.textContent.includes('did not accept the API key')")
        it.page.fill("#key", "right")
        it.page.press("#key", "Enter")
        it.wait(READY)
        assert not it.page.is_visible("#access")
        it.page.press("#text", "Enter")
        it.wait("document.querySelector('.assistant .about')")
        assert it.page.evaluate("[localStorage.length, document.cookie]") == [0, ""]
        it.page.reload()
        it.wait(READY)


def test_loading_dead_and_gone_are_told(tab):
    with serving() as world:
        it = tab(world)
        world.frontend.loading = "weights"
        it.wait("document.querySelector('#state').textContent === 'loading'")
        it.wait("document.querySelector('#notice').textContent.includes('weights')")
        world.frontend.ready(Served(Engine(), None, InputProcessor()))
        it.wait(READY)
        assert not it.page.is_visible("#notice")
        world.frontend.lost("signal 9")
        it.wait("document.querySelector('#state').textContent === 'dead'")
        assert "signal 9" in it.text("#notice")
        assert "last that were seen" in it.text("#notice")
        assert "answers under way wait" in it.text("#notice")
        world.frontend.ready(Served(Engine(), None, InputProcessor()), restarts=1)
        it.wait("document.querySelector('#restarts').textContent === '1'")
        assert it.text("#state") == "ready"
        assert "signal 9); serving again at " in it.text("#newest-events")
    it.wait("document.querySelector('#notice').textContent.includes('does not answer')")


@pytest.mark.parametrize("size", [(1280, 900), (390, 844)])
@pytest.mark.parametrize(("holders", "sequences"), [(1, 0), (64, 256)])
def test_everything_fits(tab, size, holders, sequences):
    with serving(Engine(holders, sequences, pages=2000)) as world:
        it = tab(world, size, dark=size[0] == 390)
        it.wait(READY)
        assert it.page.locator("#maps figure").count() == holders
        assert it.page.locator("#workers tbody tr").count() == holders
        it.page.click("#by-sequence summary")
        it.wait(f"document.querySelectorAll('#by-sequence tbody tr').length === {max(1, sequences)}")
        assert it.page.evaluate("document.documentElement.scrollWidth") == size[0]
        for section in it.page.locator("section:visible").all():
            box = section.bounding_box()
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= size[0]


def test_keys_and_pointer_tell_what_a_map_shows(tab):
    with serving(Engine(sequences=2)) as world:
        it = tab(world)
        it.wait(READY)
        it.page.focus("#maps canvas")
        spoken = []
        for _ in range(4):
            it.page.keyboard.press("ArrowRight")
            spoken.append(it.page.text_content("#spoken"))
        assert spoken[0].startswith("#1: ")
        assert "reads its prompt" in spoken[0]
        assert "decodes" in spoken[1]
        assert "prefix cache" in spoken[2]
        assert spoken[3].endswith(" free")
        it.page.hover("#maps canvas", position={"x": 3, "y": 3})
        it.wait("document.querySelector('#tip').textContent.startsWith('#1: ')")
        it.page.focus("#strips")
        it.page.keyboard.press("ArrowLeft")
        it.wait("document.querySelector('#spoken').textContent.startsWith('−0:05: ')")


def test_a_hidden_tab_asks_nothing(tab):
    with serving(Engine()) as world:
        it = tab(world)
        it.wait(READY)
        it.page.evaluate(
            """Object.defineProperty(document, "hidden", { value: true, configurable: true });
            document.dispatchEvent(new Event("visibilitychange"));"""
        )
        it.page.wait_for_timeout(300)  # a poll may be under way
        before = len(it.asked)
        it.page.wait_for_timeout(2500)
        assert len(it.asked) == before
        polls = [url for url in it.asked if url.endswith("lamina/status")]
        it.page.evaluate("delete document.hidden; document.dispatchEvent(new Event('visibilitychange'));")
        it.page.wait_for_timeout(500)
        assert [url for url in it.asked if url.endswith("lamina/status")] == [*polls, polls[0]]
