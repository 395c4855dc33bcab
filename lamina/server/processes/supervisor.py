"""`lamina serve`: engines, the HTTP process and attention workers side by side, and started again when they die.

The death of one leaves the others. The listening socket is the supervisor's, so a new HTTP process goes on where the
old one ended. Each model has an engine process of its own; which models are loaded, the HTTP process asks for. No torch
is loaded here.

The engine process of one model: started on demand, started again when it dies, ended when it is not needed.

What the operating system gives a supervisor: the socket that the server listens on, and the signals that end it.
"""

from __future__ import annotations

import os
import queue
import secrets
import signal
import socket
import tempfile
import time
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lamina.deploy.supervision import Backoff, Slot
from lamina.errors import (
    DiskFullError,
    EngineError,
    InvalidRequest,
    JournalError,
    LaminaError,
    ModelFileError,
    PolicyError,
    UnsupportedModelError,
)
from lamina.server.processes.attention_role import AttentionRole, MachineRole
from lamina.server.processes.child_protocol import LOG_LEVEL, line, parse
from lamina.server.processes.server_plan import Reporter, ServerPlan
from lamina.system.child_process import ChildProcess, end_all, module_command
from lamina.system.private_folder import LOCK, for_sockets, lock, sweep


@dataclass(eq=False)
class EngineRole(Slot[ChildProcess]):
    """The engine of the model that is served as `model`, which is loaded from `source`. Not loaded at first."""

    model: str = ""
    source: str = ""
    due: float | None = None
    starts: int = 0  # of all processes so far
    loads: int = 0  # how often it was loaded
    fresh: bool = True  # no process has been ready since it was last loaded
    ending: bool = False  # it is being unloaded
    facts: dict[str, Any] | None = None  # of the engine that is ready
    loading: str = ""  # how far the start is

    @property
    def loaded(self) -> bool:
        """Whether it is loaded, or to be."""
        return self.worker is not None or self.due is not None

    @property
    def socket_name(self) -> str:
        """Of each start another, so that no client reaches an engine by the name of the previous one."""
        return f"engine-{self.number}.{self.starts}.sock"

    @property
    def file_name(self) -> str:
        """The model's name as a name in a folder: no two names have the same."""
        return urllib.parse.quote(self.model, safe="").replace(".", "%2E")

    def load(self) -> None:
        """Have it started; without effect where it is, or is about to be."""
        if not self.loaded:
            self.due, self.fresh, self.backoff = 0.0, True, Backoff(self.backoff.first)
            self.loads += 1

    def started(self, worker: ChildProcess) -> None:
        """A process runs."""
        self.worker, self.facts, self.loading = worker, None, ""

    def ready(self, facts: dict[str, Any]) -> None:
        """The process serves."""
        self.facts, self.fresh = facts, False

    def gone(self) -> None:
        """It is not loaded any more, and not started again."""
        self.give_up()
        self.facts, self.ending, self.loading = None, False, ""


@contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that listens there. Raises InvalidRequest."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[
            0
        ]
        sock = socket.socket(family, kind)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
            sock.listen(2048)
        except OSError:
            sock.close()
            raise
    except (OSError, OverflowError) as error:
        raise InvalidRequest(
            f"cannot listen on {host}:{port}: {error}; --host and --port choose another place, port 0 a free one"
        ) from error
    with sock:
        yield sock


def address_of(sock: socket.socket) -> str:
    """The URL of a listening socket."""
    host, port = sock.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


@contextmanager
def signals(on_signal: Callable[[], None]) -> Iterator[None]:
    """SIGTERM and SIGINT call `on_signal`, which may be interrupted by itself."""
    before = {number: signal.signal(number, lambda *_: on_signal()) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


ENGINE_MODULE = "lamina.server.processes.engine_main"
HTTP_MODULE = "lamina.server.processes.http_main"
_KINDS = {
    kind.__name__: kind
    for kind in (DiskFullError, InvalidRequest, JournalError, ModelFileError, PolicyError, UnsupportedModelError)
}  # errors that keep their type on the way from a child; all others become an EngineError
_FOLDER = "lamina-serve-"  # begin of its name
_FRESH = 10.0  # seconds that a supervisor may take from making its folder to locking it
_LONGEST_FOLDER = 80  # characters: a Unix socket's path has 108, its name included
_FORCED = 5.0  # seconds beyond the time to drain after which the HTTP process is killed
_SPARE_AFTER = 5.0  # seconds between the coming or going of a model and the start of a spare process
_LEAVING = 10.0  # seconds after which an engine that is unloaded is killed


class Supervisor:
    """Runs one server until a signal, or until it cannot go on. For the main thread, which starts every child."""

    def __init__(self, plan: ServerPlan, report: Reporter) -> None:
        self._plan = plan
        self._report = report
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()  # events, for the main thread
        lone = len(plan.models) == 1
        self._engines = {
            name: EngineRole("engine" if lone else f"engine of {name}", number, model=name, source=source)
            for number, (name, source) in enumerate(plan.models.items())
        }
        self._http: Slot[ChildProcess] = Slot("http")
        self._serves = False  # the HTTP process listens
        self._attention = AttentionRole(plan, report, self._calls.put, self._failed)
        self._machines = MachineRole(plan, report, self._calls.put, self._attention, self._say_http)
        self._spare: ChildProcess | None = None  # an engine process that has imported everything, without a model
        self._spare_due: float | None = None
        self._secret = secrets.token_hex(32)
        self._folder = Path()
        self._socket: socket.socket | None = None
        self._announced = False
        self._stopping = False
        self._kills: dict[ChildProcess, float] = {}  # when children that are to end are not waited for any longer
        self._failure: LaminaError | None = None  # why the server cannot go on

    def run(self) -> None:
        """Until a signal. Raises what the first model's engine raised where it did not start, EngineError where the
        engine of a lone model could not be started again, InvalidRequest where the address cannot be listened on."""
        sweep(Path(tempfile.gettempdir()), _FOLDER, LOCK, time.time() - _FRESH)
        with (
            tempfile.TemporaryDirectory(prefix=_FOLDER) as folder,
            os.fdopen(lock(Path(folder))),  # others may sweep it once this process is dead
            listening(self._plan.host, self._plan.port) as sock,
            signals(lambda: self._calls.put(self._stop)),
        ):
            self._folder, self._socket = Path(folder), sock
            if len(folder) > _LONGEST_FOLDER:
                raise InvalidRequest(f"TMPDIR makes {folder}; sockets want at most {_LONGEST_FOLDER} characters")
            try:
                self._attention.begin()
                self._machines.begin()
                next(iter(self._engines.values())).load()
                while not self._over():
                    self._start_due()
                    self._take()
            finally:
                self._end()
        if self._failure is not None:
            raise self._failure

    @property
    def address(self) -> str:
        """Where the server listens."""
        return "" if self._socket is None else address_of(self._socket)

    # The loop.

    def _over(self) -> bool:
        return self._failure is not None or (self._stopping and self._http.worker is None)

    def _start_due(self) -> None:
        if self._stopping:
            return
        now = time.monotonic()
        if self._http.is_due(now):
            self._start(self._http, self._start_http)
        for engine in self._engines.values():
            if engine.is_due(now):
                self._start(engine, lambda engine=engine: self._start_engine(engine))  # type: ignore[misc]
        if self._spare_due is not None and now >= self._spare_due:
            self._start_spare()

    def _wait_for_spare(self) -> None:
        """Models come or go: have a spare process in a while, when nobody waits for a core."""
        if self._plan.settings.on_demand and "cluster" not in self._plan.engine and not self._stopping:
            self._spare_due = time.monotonic() + _SPARE_AFTER

    def _start_spare(self) -> None:
        """Start the process of the next engine: most of an engine's start is what every model needs."""
        self._spare_due = None
        if self._spare is None and any(not engine.loaded for engine in self._engines.values()):
            with suppress(OSError):  # an engine does without
                self._spare = self._spawn("spare engine", ENGINE_MODULE)
                self._spare.say(line("prepare", bool(self._plan.workers)))

    def _start(self, role: Slot[ChildProcess], start: Callable[[], None]) -> None:
        try:
            start()
        except OSError as error:  # out of processes or memory, say
            if role.restarts == 0 and not self._announced:
                raise EngineError(f"cannot start the {role.base} process: {error}") from error
            self._restart(role, f"the {role.base} process cannot be started: {error}")

    def _start_engine(self, engine: EngineRole) -> None:
        plan = self._plan
        engine.starts += 1
        worker, self._spare = self._spare or self._spawn(engine.base, ENGINE_MODULE), None
        engine.started(worker)
        keywords = self._journal(engine) | {name: value for name, value in plan.engine.items() if name != "journal"}
        waits = plan.waits, bool(plan.workers)
        worker.say(line("engine", engine.source, keywords, self._socket_of(engine), self._secret, *waits))
        if plan.waits:
            self._attention.serve(worker)
        self._notify_http(engine)

    def _journal(self, engine: EngineRole) -> dict[str, str]:
        """The engine's keyword for its journal, a folder of its own for each model."""
        given = self._plan.engine.get("journal")
        if given is None and not self._plan.journal:
            return {}
        folder = self._folder / "journal" if given is None else Path(given)
        return {"journal": str(folder if len(self._engines) == 1 else folder / engine.file_name)}

    def _socket_of(self, engine: EngineRole) -> str:
        return str(for_sockets(self._folder) / engine.socket_name)

    def _start_http(self) -> None:
        if self._socket is None:
            return
        self._serves = False
        worker = self._http.worker = self._spawn("http", HTTP_MODULE, self._socket.fileno())
        worker.say(line("http", asdict(self._plan.settings), self._socket.fileno(), self._secret))
        for engine in self._engines.values():
            self._notify_http(engine)
        self._machines.tell()

    def _spawn(self, name: str, module: str, *descriptors: int) -> ChildProcess:
        return ChildProcess(
            name,
            module_command(module),
            self._received,
            lambda child: self._calls.put(lambda: self._ended(child)),
            pass_fds=descriptors,
            environment={"PYTHONUNBUFFERED": "1", LOG_LEVEL: self._plan.log_level},
        )

    def _received(self, child: ChildProcess, text: str) -> None:
        """On a thread of the child's."""
        if (message := parse(text)) is not None:
            self._calls.put(lambda: self._take_message(child, *message))

    def _take(self) -> None:
        """Take the next event, or what is due before it."""
        try:
            call = self._calls.get(timeout=self._until_next())
        except queue.Empty:
            self._check_deadlines()
        else:
            call()
            self._attention.introduce()

    def _take_message(self, child: ChildProcess, word: str, *items: Any) -> None:
        engine = self._engine_of(child)
        if word == "progress":
            self._report.progress(*items)
        if engine is not None:
            self._take_from_engine(engine, word, *items)
        elif child is self._http.worker:
            self._take_from_http(word, *items)

    def _take_from_engine(self, engine: EngineRole, word: str, *items: Any) -> None:
        if word == "progress" and engine.facts is None:  # a ready one has progress too, when it computes lost KV again
            what, done, total = items
            engine.loading = f"{what}, {done} of {total}" if total else f"{what}, {done}"
            self._notify_http(engine)
        elif word == "ready":
            engine.ready(items[0] | {"socket": self._socket_of(engine), "restarts": engine.restarts})
            self._notify_http(engine)
        elif word == "failed":
            self._not_loaded(engine, *items)
        elif word == "possible" and engine.facts is not None:
            engine.facts["possible"] = items[0]
            self._say_http("possible", engine.model, items[0])
        elif word == "lost":
            self._attention.lost(items[0])
            self._machines.lost(items[0])
        elif word == "grow":
            self._attention.grow(items[0])
        elif word == "retire":
            self._attention.retire(items[0])
        elif word == "drained":
            self._machines.released(items[0])

    def _not_loaded(self, engine: EngineRole, kind: str, why: str) -> None:
        """An engine could not load its model; its process is about to end."""
        if self._begins(engine):
            self._failed(_KINDS.get(kind, EngineError)(why))
        elif self._plan.settings.on_demand and (engine.fresh or kind in _KINDS):
            self._report.said(f"{engine.model} could not be loaded: {why}")
            self._unloaded(engine, why)
        elif kind in _KINDS:  # it would fail in the same way again
            self._failed(EngineError(f"the engine could not start again: {why}"))
        else:
            self._report.said(f"the engine could not start again: {why}")

    def _begins(self, engine: EngineRole) -> bool:
        """Whether it is the first start of the first model: without it there is no server."""
        return engine.number == 0 and engine.loads == 1 and engine.restarts == 0

    def _take_from_http(self, word: str, *items: Any) -> None:
        if word == "failed":
            kind, why = items
            self._failed(_KINDS.get(kind, EngineError)(why))
        elif word == "serving":
            self._serves = True
        elif word == "load" and not self._stopping:
            self._engines[items[0]].load()
        elif word == "unload":
            self._unload(self._engines[items[0]])
        elif word == "connected":
            self._connected(self._engines[items[0]])
        elif word == "machine":
            self._machines.decide(*items)

    def _connected(self, engine: EngineRole) -> None:
        """The HTTP process reaches an engine."""
        self._wait_for_spare()
        if not self._announced:
            self._announced = True
            context = min(engine.facts["context"], engine.facts["possible"] + 1) if engine.facts else 0
            names = [name for name in self._engines if name != engine.model]
            others = f"; on demand: {', '.join(names)}" if names else ""
            about = f"(up to {context} tokens{others}; Ctrl-C ends it)"
            self._report.said(f"serving {engine.model} at {self.address}  {about}")
        elif self._plan.settings.on_demand:
            self._report.said(f"{engine.model} is loaded")
        else:
            self._report.said("serving again")

    def _ended(self, child: ChildProcess) -> None:
        self._kills.pop(child, None)
        if child is self._spare:
            self._spare = None
        elif child is self._http.worker:
            self._http_ended(child)
        elif (engine := self._engine_of(child)) is not None:
            self._engine_ended(engine, child)

    def _http_ended(self, child: ChildProcess) -> None:
        self._http.worker = None
        if not self._stopping and not self._failure:
            self._died(self._http, child, self._serves)

    def _engine_ended(self, engine: EngineRole, child: ChildProcess) -> None:
        engine.worker, was_ready, engine.facts = None, engine.facts is not None, None
        if self._stopping or self._failure:
            return
        if engine.ending:
            self._report.said(f"{engine.model} is unloaded")
            self._unloaded(engine)
        elif engine.fresh and self._plan.settings.on_demand and not self._begins(engine):
            self._unloaded(engine, f"its process ended, {child.how()}, before it was loaded")
        else:
            self._notify_http(engine, f"the {engine.base} process ended, {child.how()}")
            self._died(engine, child, was_ready)

    def _died(self, role: Slot[ChildProcess], child: ChildProcess, served: bool) -> None:
        how = f"the {role.base} process ended, {child.how()}"
        if not served and role.restarts == 0:
            self._failed(EngineError(f"{how}, before it had started"))
            return
        self._restart(role, how)

    def _restart(self, role: Slot[ChildProcess], how: str) -> None:
        then = role.ended(time.monotonic())
        if role.due is not None:
            self._report.said(f"{how}; {then}")
        elif isinstance(role, EngineRole) and self._plan.settings.on_demand:
            self._report.said(f"{how}, too often to start it again")
            self._unloaded(role, how)
        else:
            self._failed(EngineError(f"{how}, too often to start it again"))

    def _failed(self, error: LaminaError) -> None:
        self._failure = self._failure or error

    # Models that come and go, and what the HTTP process knows.

    def _unload(self, engine: EngineRole) -> None:
        """End an engine in order: it leaves its attention workers, which are free for the next one."""
        if engine.worker is None:  # it is not loaded, or waits for its restart
            self._unloaded(engine)
        elif not engine.ending:
            engine.ending = True
            engine.worker.say(line("stop"))
            self._kills[engine.worker] = time.monotonic() + _LEAVING

    def _unloaded(self, engine: EngineRole, why: str = "") -> None:
        """An engine is not started again before it is loaded. Its process, if there still is one, ends by itself."""
        engine.gone()
        self._wait_for_spare()
        self._say_http("unloaded", engine.model, why)

    def _engine_of(self, child: ChildProcess) -> EngineRole | None:
        return next((engine for engine in self._engines.values() if engine.worker is child), None)

    def _notify_http(self, engine: EngineRole, dead: str = "") -> None:
        if engine.facts is not None:
            self._say_http("ready", engine.model, engine.facts)
        elif dead:
            self._say_http("dead", engine.model, dead)
        elif engine.loaded:
            self._say_http("loading", engine.model, engine.loading)
        else:
            self._say_http("unloaded", engine.model, "")

    def _say_http(self, word: str, *items: Any) -> None:
        if self._http.worker is not None:
            self._http.worker.say(line(word, *items))

    # Time, and the end.

    def _until_next(self) -> float | None:
        roles: list[Slot[ChildProcess]] = [] if self._stopping else [self._http, *self._engines.values()]
        times = [*(role.next_start for role in roles), self._attention.due, self._spare_due, *self._kills.values()]
        due = [each for each in times if each is not None]
        return max(0.0, min(due) - time.monotonic()) if due else None

    def _check_deadlines(self) -> None:
        self._attention.introduce()
        now = time.monotonic()
        for child in [child for child, at in self._kills.items() if now >= at]:
            del self._kills[child]
            child.kill()

    def _stop(self) -> None:
        """The first signal lets requests end, the second does not."""
        again, self._stopping, self._spare_due = self._stopping, True, None
        if again or self._http.worker is None or not self._serves:
            if self._http.worker is not None:
                self._http.worker.kill()
            return
        self._report.said(f"ending once requests under way have ended, in {self._plan.drain:g} s at most")
        self._http.worker.say(line("drain", self._plan.drain))
        self._kills[self._http.worker] = time.monotonic() + self._plan.drain + _FORCED

    def _end(self) -> None:
        roles: list[Slot[ChildProcess]] = [self._http, *self._engines.values()]
        children = [self._spare, *(role.worker for role in roles)]
        end_all(child for child in children if child is not None)
        self._machines.close()
        self._attention.close()
