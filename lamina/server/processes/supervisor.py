"""`lamina serve`: the engine, the HTTP process and the attention workers side by side, and started again when they die.

The death of one leaves the others. The listening socket is the supervisor's, so a new HTTP process goes on where the
old one ended. No torch is loaded here.
"""

from __future__ import annotations

import os
import queue
import secrets
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from lamina.deploy.local_attention import LocalAttentionWorkers
from lamina.deploy.restarts import WORKERS_BACK, Slot
from lamina.deploy.worker_events import WorkerAddress
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
from lamina.server.processes.child_protocol import LOG_LEVEL, line, pack_worker, parse
from lamina.server.settings import ServerSettings
from lamina.system.child_process import ChildProcess, end_all, module_command
from lamina.system.private_folder import LOCK, lock, sweep
from lamina_protocols.layers import ColdTier

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


class Reporter(Protocol):
    """Shows people what happens."""

    def progress(self, what: str, done: int, total: int | None) -> None: ...

    def said(self, message: str) -> None: ...


@dataclass(frozen=True, slots=True)
class ServerPlan:
    """What is to run. `engine` are the keywords of `EngineConfig`, as JSON can hold them; `workers` how many attention
    workers the supervisor starts, each with `kv_memory` bytes of KV, which goes to `cold` when nobody reads it, and
    `threads` threads."""

    model: str
    engine: Mapping[str, Any]
    settings: ServerSettings
    host: str
    port: int
    workers: int = 0
    kv_memory: int = 0
    cold: ColdTier | None = None
    threads: int = 1
    drain: float = 30.0  # seconds that requests under way get after SIGTERM
    journal: bool = False  # in the supervisor's own folder, unless the engine's keywords name another
    log_level: str = "warning"


@dataclass(eq=False)
class _Role(Slot[ChildProcess]):
    """One of the two processes, "engine" or "http"."""

    ready: bool = False


class Supervisor:
    """Runs one server until a signal, or until it cannot go on. For the main thread, which starts every child."""

    def __init__(self, plan: ServerPlan, report: Reporter) -> None:
        self._plan = plan
        self._report = report
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()  # events, for the main thread
        self._engine = _Role("engine")
        self._http = _Role("http")
        self._secret = secrets.token_hex(32)
        self._folder = Path()
        self._socket: socket.socket | None = None
        self._attention: LocalAttentionWorkers | None = None
        self._workers: dict[str, WorkerAddress] = {}
        self._workers_due: float | None = None  # when the engine gets the workers that are there
        self._facts: dict[str, Any] | None = None  # of the engine that is ready
        self._loading = ""
        self._announced = False
        self._stopping = False
        self._kill_at: float | None = None  # when an HTTP process that drains is not waited for any longer
        self._failure: LaminaError | None = None  # why the server cannot go on

    def run(self) -> None:
        """Until a signal. Raises what the engine raised where it did not start, EngineError where it could not be
        started again, InvalidRequest where the address cannot be listened on."""
        sweep(Path(tempfile.gettempdir()), _FOLDER, LOCK, time.time() - _FRESH)
        with (
            tempfile.TemporaryDirectory(prefix=_FOLDER) as folder,
            os.fdopen(lock(Path(folder))),  # others may sweep it once this process is dead
            self._listening() as sock,
            _signals(lambda: self._calls.put(self._stop)),
        ):
            self._folder, self._socket = Path(folder), sock
            if len(folder) > _LONGEST_FOLDER:
                raise InvalidRequest(f"TMPDIR makes {folder}; sockets want at most {_LONGEST_FOLDER} characters")
            try:
                self._begin_workers()
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
        host, port = (
            (self._socket.getsockname()[:2]) if self._socket is not None else (self._plan.host, self._plan.port)
        )
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    @property
    def _engine_socket(self) -> str:
        """A new one for each start, so that no client reaches an engine by the name of the previous one."""
        return str(self._folder / f"{self._engine.name}.sock")

    @contextmanager
    def _listening(self) -> Iterator[socket.socket]:
        host, port = self._plan.host, self._plan.port
        try:
            family, kind, _, _, address = socket.getaddrinfo(
                host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
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

    def _begin_workers(self) -> None:
        plan = self._plan
        if not plan.workers:
            return
        workers = self._attention = LocalAttentionWorkers(
            plan.workers, kv_memory=plan.kv_memory, threads=plan.threads, cold=plan.cold
        )

        def start() -> None:
            try:
                result: tuple[WorkerAddress, ...] | EngineError = workers.start(self._report.progress)
            except EngineError as error:
                result = error
            self._calls.put(lambda: self._workers_started(result))

        threading.Thread(target=start, name="lamina-workers", daemon=True).start()

    # The loop.

    def _over(self) -> bool:
        gone = self._http.worker is None and self._engine.worker is None
        return self._failure is not None or (self._stopping and (self._http.worker is None or gone))

    def _start_due(self) -> None:
        if self._stopping:
            return
        now = time.monotonic()
        for role, start in ((self._engine, self._start_engine), (self._http, self._start_http)):
            if role.is_due(now):
                role.ready = False
                try:
                    start()
                except OSError as error:  # out of processes or memory, say
                    if role.restarts == 0:
                        raise EngineError(f"cannot start the {role.base} process: {error}") from error
                    self._restart(role, f"the {role.base} process cannot be started: {error}")

    def _start_engine(self) -> None:
        plan = self._plan
        self._engine.worker = self._spawn(self._engine, ENGINE_MODULE)
        own = {"journal": str(self._folder / "journal")} if plan.journal else {}
        engine = own | dict(plan.engine)
        self._engine.worker.say(
            line("engine", plan.model, engine, self._engine_socket, self._secret, bool(plan.workers))
        )
        if plan.workers and self._engine.restarts:
            self._workers_due = time.monotonic() + WORKERS_BACK
            self._introduce_workers()

    def _start_http(self) -> None:
        if self._socket is None:
            return
        self._http.worker = self._spawn(self._http, HTTP_MODULE, self._socket.fileno())
        given = self._plan.settings
        settings = asdict(given) | {"api_keys": list(given.api_keys), "operator_keys": list(given.operator_keys)}
        self._http.worker.say(line("http", settings, self._socket.fileno(), self._secret))
        self._notify_http()

    def _spawn(self, role: _Role, module: str, *descriptors: int) -> ChildProcess:
        return ChildProcess(
            role.base,
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
            self._introduce_workers()

    def _take_message(self, child: ChildProcess, word: str, *items: Any) -> None:
        if word == "progress":
            self._report.progress(*items)
            what, done, total = items
            if self._facts is None:  # a ready engine has progress too, when it computes lost KV again
                self._loading = f"{what}, {done} of {total}" if total else f"{what}, {done}"
                self._notify_http()
        elif word == "ready" and child is self._engine.worker:
            self._engine.ready = True
            self._facts = items[0] | {"socket": self._engine_socket, "restarts": self._engine.restarts}
            self._notify_http()
        elif word == "failed" and child is self._engine.worker:
            kind, why = items
            if self._engine.restarts == 0:
                self._failure = _KINDS.get(kind, EngineError)(why)
            elif kind in _KINDS:  # it would fail in the same way again
                self._failure = EngineError(f"the engine could not start again: {why}")
            else:
                self._report.said(f"the engine could not start again: {why}")
        elif word == "failed" and child is self._http.worker:
            kind, why = items
            self._failure = _KINDS.get(kind, EngineError)(why)
        elif word == "lost" and self._attention is not None:
            self._workers.pop(items[0], None)
            self._attention.lost(items[0])
        elif word == "serving" and child is self._http.worker:
            self._http.ready = True
        elif word == "connected" and not self._announced:
            self._announced = True
            context = min(self._facts["context"], self._facts["possible"] + 1) if self._facts else 0
            about = f"(up to {context} tokens; Ctrl-C ends it)"
            self._report.said(f"serving {self._plan.settings.model} at {self.address}  {about}")
        elif word == "connected":
            self._report.said("serving again")

    def _ended(self, child: ChildProcess) -> None:
        role = self._engine if child is self._engine.worker else self._http
        role.worker = None
        if self._stopping or self._failure:
            return
        how = f"the {role.base} process ended, {child.how()}"
        was_ready, role.ready = role.ready, False
        if role is self._engine:
            self._facts = None
            self._notify_http(how)
        if not was_ready and role.restarts == 0:
            self._failure = EngineError(f"{how}, before it had started")
            return
        self._restart(role, how)

    def _restart(self, role: _Role, how: str) -> None:
        then = role.ended(time.monotonic())
        if role.due is None:
            self._failure = EngineError(f"{how}, too often to start it again")
        else:
            self._report.said(f"{how}; {then}")

    # Attention workers, and what the engine and the HTTP process know.

    def _workers_started(self, result: tuple[WorkerAddress, ...] | EngineError) -> None:
        if isinstance(result, EngineError):
            self._failure = result
            return
        self._workers = {worker.name: worker for worker in result}
        self._workers_due = time.monotonic() + WORKERS_BACK
        if self._attention is not None:
            self._attention.watch(
                lambda worker: self._calls.put(lambda: self._joined(worker)),
                lambda name: self._calls.put(lambda: self._left(name)),
            )

    def _joined(self, worker: WorkerAddress) -> None:
        self._workers[worker.name] = worker
        self._report.said(f"attention worker {worker.name} is there")
        self._notify_engine("joined", pack_worker(worker))

    def _left(self, name: str) -> None:
        self._workers.pop(name, None)
        self._notify_engine("left", name)

    def _introduce_workers(self) -> None:
        """Send a new engine the workers that are there: once all are, or some after a while."""
        if self._workers_due is None or self._engine.worker is None:
            return
        enough = len(self._workers) >= self._plan.workers
        if enough or (self._workers and time.monotonic() >= self._workers_due):
            self._workers_due = None
            self._engine.worker.say(line("workers", [pack_worker(worker) for worker in self._workers.values()]))

    def _notify_engine(self, word: str, *items: Any) -> None:
        if self._engine.worker is not None and self._workers_due is None:
            self._engine.worker.say(line(word, *items))

    def _notify_http(self, dead: str = "") -> None:
        if self._http.worker is None:
            return
        if self._facts is not None:
            self._http.worker.say(line("ready", self._facts))
        elif dead:
            self._http.worker.say(line("dead", dead))
        else:
            self._http.worker.say(line("loading", self._loading))

    # Time, and the end.

    def _until_next(self) -> float | None:
        times = [role.next_start for role in (self._engine, self._http) if not self._stopping]
        times += [self._workers_due, self._kill_at]
        due = [each for each in times if each is not None]
        return max(0.0, min(due) - time.monotonic()) if due else None

    def _check_deadlines(self) -> None:
        now = time.monotonic()
        if self._workers_due is not None and now >= self._workers_due:
            self._introduce_workers()
            if self._workers_due is not None:  # no worker is there: look again later
                self._workers_due = now + 1.0
        if self._kill_at is not None and now >= self._kill_at and self._http.worker is not None:
            self._kill_at = None
            self._http.worker.kill()

    def _stop(self) -> None:
        """The first signal lets requests end, the second does not."""
        if self._stopping or self._http.worker is None or not self._http.ready:
            self._stopping = True
            if self._http.worker is not None:
                self._http.worker.kill()
            return
        self._stopping = True
        self._report.said(f"ending once requests under way have ended, in {self._plan.drain:g} s at most")
        self._http.worker.say(line("drain", self._plan.drain))
        self._kill_at = time.monotonic() + self._plan.drain + _FORCED

    def _end(self) -> None:
        end_all(role.worker for role in (self._http, self._engine) if role.worker is not None)
        if self._attention is not None:
            self._attention.close()


@contextmanager
def _signals(on_signal: Callable[[], None]) -> Iterator[None]:
    """SIGTERM and SIGINT call `on_signal`, which may be interrupted by itself."""
    before = {number: signal.signal(number, lambda *_: on_signal()) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
