"""`lamina serve`: engines, the HTTP process and attention workers side by side, and started again when they die.

The death of one leaves the others. The listening socket is the supervisor's, so a new HTTP process goes on where the
old one ended. Each model has an engine process of its own, an `EngineRole`; which models are loaded, the HTTP process
asks for. No torch is loaded here.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import tempfile
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lamina.deploy.relayed_attention import Drained, Grow, Lost, Retire
from lamina.deploy.supervision import Backoff, Slot, SlotLoop
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
from lamina.server.processes.child_protocol import (
    FROM_CHILD,
    TO_ENGINE,
    TO_HTTP,
    Connected,
    DecideMachine,
    DrainRequests,
    EngineDead,
    EngineLoading,
    EnginePossible,
    EngineReady,
    EngineUnloaded,
    Failed,
    FromChild,
    Load,
    Possible,
    Prepare,
    Ready,
    Serving,
    StartEngine,
    StartHttp,
    Stop,
    ToHttp,
    Unload,
)
from lamina.server.processes.running import FOLDER, leave
from lamina.server.processes.server_plan import Reporter, ServerPlan
from lamina.system.child_process import ChildProcess, end_all, module_command
from lamina.system.logs import FORMAT_VARIABLE, LEVEL_VARIABLE
from lamina.system.private_folder import LOCK, for_sockets, lock, sweep
from lamina.system.progress import Progressed
from lamina_protocols.errors import ProtocolError
from lamina_workers.process.signals import answering_signals

ENGINE_MODULE = "lamina.server.processes.engine_main"
HTTP_MODULE = "lamina.server.processes.http_main"
_KINDS = {
    kind.__name__: kind
    for kind in (DiskFullError, InvalidRequest, JournalError, ModelFileError, PolicyError, UnsupportedModelError)
}  # errors that keep their type on the way from a child; all others become an EngineError
_FRESH = 10.0  # seconds that a supervisor may take from making its folder to locking it
_LONGEST_FOLDER = 80  # characters: a Unix socket's path has 108, its name included
_FORCED = 5.0  # seconds beyond the time to drain after which the HTTP process is killed
_SPARE_AFTER = 5.0  # seconds between the coming or going of a model and the start of a spare process
_LEAVING = 10.0  # seconds after which an engine that is unloaded is killed


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
        self.worker, self.facts, self.loading = worker, None, ""

    def ready(self, facts: dict[str, Any]) -> None:
        self.facts, self.fresh = facts, False

    def gone(self) -> None:
        """It is not loaded any more, and not started again."""
        self.give_up()
        self.facts, self.ending, self.loading = None, False, ""


class Supervisor(SlotLoop[ChildProcess]):
    """Runs one server until a signal, or until it cannot go on. For the main thread, which starts every child."""

    def __init__(self, plan: ServerPlan, report: Reporter) -> None:
        self._plan = plan
        self._report = report
        lone = len(plan.models) == 1
        self._engines = {
            name: EngineRole("engine" if lone else f"engine of {name}", number, model=name, source=source)
            for number, (name, source) in enumerate(plan.models.items())
        }
        self._http: Slot[ChildProcess] = Slot("http")
        self._spare: Slot[ChildProcess] = Slot("standby engine", due=None)  # it has imported all, without a model
        super().__init__([self._http, *self._engines.values(), self._spare])
        self._serves = False  # the HTTP process listens
        self._attention = AttentionRole(plan, report, self._calls.put, self._failed)
        self._machines = MachineRole(plan, report, self._calls.put, self._attention, self._say_http)
        self._secret = secrets.token_hex(32)
        self._folder = Path()
        self._socket: socket.socket | None = None
        self._announced = False
        self._failure: LaminaError | None = None  # why the server cannot go on

    def run(self) -> None:
        """Until a signal. Raises what the first model's engine raised where it did not start, EngineError where the
        engine of a lone model could not be started again, InvalidRequest where the address cannot be listened on."""
        sweep(Path(tempfile.gettempdir()), FOLDER, LOCK, time.time() - _FRESH)
        with (
            tempfile.TemporaryDirectory(prefix=FOLDER) as folder,
            os.fdopen(lock(Path(folder))),  # others may sweep it once this process is dead
            listening(self._plan.host, self._plan.port) as sock,
            answering_signals((signal.SIGTERM, signal.SIGINT), lambda: self._calls.put(self._stop)),
        ):
            self._folder, self._socket = Path(folder), sock
            if len(folder) > _LONGEST_FOLDER:
                raise InvalidRequest(f"TMPDIR makes {folder}; sockets want at most {_LONGEST_FOLDER} characters")
            try:
                self._attention.begin()
                self._machines.begin()
                next(iter(self._engines.values())).load()
                while not self._over():
                    self._turn()
            finally:
                end_all(slot.worker for slot in self._slots if slot.worker is not None)
                self._machines.close()
                self._attention.close()
        if self._failure is not None:
            raise self._failure

    @property
    def address(self) -> str:
        """Where the server listens."""
        return "" if self._socket is None else address_of(self._socket)

    # The loop.

    def _over(self) -> bool:
        return self._failure is not None or (self._closed.is_set() and self._http.worker is None)

    def _times(self) -> list[float | None]:
        return [*super()._times(), self._attention.relay.due]

    def _check_deadlines(self) -> None:
        super()._check_deadlines()
        self._attention.relay.introduce()

    def _late(self, slot: Slot[ChildProcess], worker: ChildProcess) -> None:
        worker.kill()

    def _launch(self, slot: Slot[ChildProcess]) -> ChildProcess | None:
        if isinstance(slot, EngineRole):
            return self._start_engine(slot)
        return self._start_http() if slot is self._http else self._start_spare()

    def _not_launched(self, slot: Slot[ChildProcess], error: OSError) -> None:
        if slot is self._spare:  # an engine does without
            return
        if slot.restarts == 0 and not self._announced:  # out of processes or memory, say
            raise EngineError(f"cannot start the {slot.base} process: {error}") from error
        self._restart(slot, f"the {slot.base} process cannot be started: {error}")

    def _wait_for_spare(self) -> None:
        """Models come or go: have a spare process in a while, when no start waits for a core."""
        if self._plan.settings.on_demand and "cluster" not in self._plan.engine and not self._closed.is_set():
            self._spare.due = self._clock() + _SPARE_AFTER

    def _start_spare(self) -> ChildProcess | None:
        """Start the process of the next engine: most of an engine's start is what every model needs."""
        self._spare.due = None
        if all(engine.loaded for engine in self._engines.values()):
            return None
        worker = self._spawn(self._spare.base, ENGINE_MODULE)
        worker.say(TO_ENGINE.line(Prepare(bool(self._plan.workers))))
        return worker

    def _start_engine(self, engine: EngineRole) -> ChildProcess:
        plan = self._plan
        engine.starts += 1
        worker = self._spare.worker or self._spawn(engine.base, ENGINE_MODULE)
        if worker is self._spare.worker:
            self._spare.give_up()
        engine.started(worker)
        keywords = self._journal(engine) | {name: value for name, value in plan.engine.items() if name != "journal"}
        if engine.restarts:  # it fitted, and KV that others keep for it takes memory now
            keywords["force"] = True
        socket_path, needs_workers = self._socket_of(engine), bool(plan.workers)
        order = StartEngine(engine.source, keywords, socket_path, self._secret, plan.waits, needs_workers)
        worker.say(TO_ENGINE.line(order))
        if plan.waits:
            self._attention.serve(worker)
        self._notify_http(engine)
        return worker

    def _journal(self, engine: EngineRole) -> dict[str, str]:
        """The engine's keyword for its journal, a folder of its own for each model."""
        option = self._plan.engine.get("journal")
        if option is None and not self._plan.journal:
            return {}
        folder = self._folder / "journal" if option is None else Path(option)
        return {"journal": str(folder if len(self._engines) == 1 else folder / engine.file_name)}

    def _socket_of(self, engine: EngineRole) -> str:
        return str(for_sockets(self._folder) / engine.socket_name)

    def _start_http(self) -> ChildProcess | None:
        if self._socket is None:
            return None
        self._serves = False
        worker = self._http.worker = self._spawn("http", HTTP_MODULE, self._socket.fileno())
        worker.say(TO_HTTP.line(StartHttp(asdict(self._plan.settings), self._socket.fileno(), self._secret)))
        for engine in self._engines.values():
            self._notify_http(engine)
        self._machines.tell()
        return worker

    def _spawn(self, name: str, module: str, *descriptors: int) -> ChildProcess:
        return ChildProcess(
            name,
            module_command(module),
            self._received,
            lambda child: self._calls.put(lambda: self._ended(child)),
            pass_fds=descriptors,
            environment={
                "PYTHONUNBUFFERED": "1",
                LEVEL_VARIABLE: self._plan.log_level,
                FORMAT_VARIABLE: self._plan.log_format,
            },
        )

    def _received(self, child: ChildProcess, text: str) -> None:
        """On a thread of the child's."""
        try:
            message = FROM_CHILD.parse(text)
        except ProtocolError as error:
            failure = EngineError(f"the {child.name} process sent what this version does not know: {error}")
            self._calls.put(lambda: self._failed(failure))
            return
        if message is not None:
            self._calls.put(lambda: self._take_message(child, message))

    def _take_message(self, child: ChildProcess, message: FromChild) -> None:
        engine = self._engine_of(child)
        if isinstance(message, Progressed):
            self._report.progress(message.what, message.done, message.total)
        if engine is not None:
            self._take_from_engine(engine, message)
        elif child is self._http.worker:
            self._take_from_http(message)

    def _take_from_engine(self, engine: EngineRole, message: FromChild) -> None:
        match message:
            case Progressed(what, done, total):
                if engine.facts is None:  # a ready one has progress too, when it computes lost KV again
                    engine.loading = f"{what}, {done} of {total}" if total else f"{what}, {done}"
                    self._notify_http(engine)
            case Ready(facts):
                engine.ready(facts | {"socket": self._socket_of(engine), "restarts": engine.restarts})
                self._notify_http(engine)
            case Failed(kind, why):
                self._not_loaded(engine, kind, why)
            case Possible(tokens):
                if engine.facts is not None:
                    engine.facts["possible"] = tokens
                    self._say_http(EnginePossible(engine.model, tokens))
            case Lost(name):
                self._attention.relay.take(message)
                self._machines.lost(name)
            case Grow() | Retire():
                self._attention.relay.take(message)
            case Drained(name):
                self._machines.released(name)

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

    def _take_from_http(self, message: FromChild) -> None:
        match message:
            case Failed(kind, why):
                self._failed(_KINDS.get(kind, EngineError)(why))
            case Serving():
                self._serves = True
            case Load(model):
                if not self._closed.is_set():
                    self._engines[model].load()
            case Unload(model):
                self._unload(self._engines[model])
            case Connected(model):
                self._connected(self._engines[model])
            case DecideMachine(id, accept):
                self._machines.decide(id, accept)

    def _connected(self, engine: EngineRole) -> None:
        self._wait_for_spare()
        self._leave_record()
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
        if child is self._spare.worker:
            self._spare.give_up()
        elif child is self._http.worker:
            self._http_ended(child)
        elif (engine := self._engine_of(child)) is not None:
            self._engine_ended(engine, child)

    def _http_ended(self, child: ChildProcess) -> None:
        self._http.worker = None
        if not self._closed.is_set() and not self._failure:
            self._died(self._http, child, self._serves)

    def _engine_ended(self, engine: EngineRole, child: ChildProcess) -> None:
        engine.worker, was_ready, engine.facts = None, engine.facts is not None, None
        self._leave_record()
        if self._closed.is_set() or self._failure:
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
        then = role.ended(self._clock())
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
            engine.worker.say(TO_ENGINE.line(Stop()))
            engine.deadline = self._clock() + _LEAVING

    def _unloaded(self, engine: EngineRole, why: str = "") -> None:
        """An engine is not started again before it is loaded. Its process, if there still is one, ends by itself."""
        engine.gone()
        self._leave_record()
        self._wait_for_spare()
        self._say_http(EngineUnloaded(engine.model, why))

    def _engine_of(self, child: ChildProcess) -> EngineRole | None:
        return next((engine for engine in self._engines.values() if engine.worker is child), None)

    def _leave_record(self) -> None:
        """For `lamina ps`."""
        loaded = {engine.model: engine.worker.pid if engine.worker else 0 for engine in self._engines.values()}
        leave(self._folder, self.address, loaded)

    def _notify_http(self, engine: EngineRole, dead: str = "") -> None:
        if engine.facts is not None:
            self._say_http(EngineReady(engine.model, engine.facts))
        elif dead:
            self._say_http(EngineDead(engine.model, dead))
        elif engine.loaded:
            self._say_http(EngineLoading(engine.model, engine.loading))
        else:
            self._say_http(EngineUnloaded(engine.model, ""))

    def _say_http(self, message: ToHttp) -> None:
        if self._http.worker is not None:
            self._http.worker.say(TO_HTTP.line(message))

    # The end.

    def _stop(self) -> None:
        """The first signal lets requests end, the second does not."""
        again, worker = self._closed.is_set(), self._http.worker
        self._closed.set()
        if worker is None:
            return
        if again or not self._serves:
            worker.kill()
            return
        self._report.said(f"ending once requests under way have ended, in {self._plan.drain:g} s at most")
        worker.say(TO_HTTP.line(DrainRequests(self._plan.drain)))
        self._http.deadline = self._clock() + self._plan.drain + _FORCED


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
