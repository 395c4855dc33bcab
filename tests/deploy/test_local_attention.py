"""Child processes as attention workers. Most of them are a few lines of Python in the place of a worker."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lamina.deploy.listed_attention import ListedWorkers, answers
from lamina.deploy.local import LocalAttentionWorkers, attention_command
from lamina.deploy.worker_events import WorkerAddress
from lamina.errors import EngineError
from lamina_protocols.channels.grpc_client import WorkerClient, WorkerRefused
from lamina_protocols.messages.layers import ColdTier

FAKE = """
import os, sys
print("loading", flush=True)
print("listening 127.0.0.1:%d" % (40000 + os.getpid() % 20000), flush=True)
sys.stdin.read()
"""


def fake(name: str) -> list[str]:
    return [sys.executable, "-c", FAKE, name]


@contextmanager
def cluster(
    count: int, command: Callable[[str], list[str]] = fake, **options: float
) -> Iterator[LocalAttentionWorkers]:
    made = LocalAttentionWorkers(count, kv_memory=1 << 20, threads=1, command=command, **options)  # type: ignore[arg-type]
    try:
        yield made
    finally:
        made.close()


class Changes:
    """The events that `watch` delivered."""

    def __init__(self, workers: LocalAttentionWorkers | ListedWorkers) -> None:
        self._queue: queue.SimpleQueue[WorkerAddress | str] = queue.SimpleQueue()
        workers.watch(self._queue.put, self._queue.put)

    def next(self) -> WorkerAddress | str:
        return self._queue.get(timeout=20)

    def none_within(self, seconds: float) -> bool:
        time.sleep(seconds)
        return self._queue.empty()


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{process}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] != "Z"


def wait_until(condition: Callable[[], bool], seconds: float = 15) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


def processes(workers: LocalAttentionWorkers) -> list[int]:
    return [status.process for status in workers.status() if status.process is not None]


def test_workers_are_up_after_start_and_gone_after_close() -> None:
    steps: list[tuple[str, int, int | None]] = []
    with cluster(3) as workers:
        started = workers.start(lambda *step: steps.append(step))
        assert [worker.name for worker in started] == ["attention-0", "attention-1", "attention-2"]
        assert {worker.address.partition(":")[0] for worker in started} == {"127.0.0.1"}
        assert {worker.capacity for worker in started} == {1 << 20}
        assert [status.state for status in workers.status()] == ["up"] * 3
        running = processes(workers)
        assert len(set(running)) == 3
    assert [done for _, done, _ in steps] == [1, 2, 3]
    assert not any(map(is_alive, running))


def test_events_before_watch_are_delivered_first() -> None:
    with cluster(1) as workers:
        workers.start()
        os.kill(processes(workers)[0], signal.SIGKILL)
        assert wait_until(lambda: workers.status()[0].name == "attention-0.1" and workers.status()[0].state == "up")
        changes = Changes(workers)
        assert changes.next() == "attention-0"
        joined = changes.next()
        assert isinstance(joined, WorkerAddress)
        assert joined.name == "attention-0.1"


def test_worker_that_the_engine_gave_up_is_replaced_without_a_leave_event() -> None:
    with cluster(1) as workers:
        workers.start()
        changes = Changes(workers)
        old = processes(workers)[0]
        os.kill(old, signal.SIGSTOP)  # a stopped process must go too
        workers.lost("attention-0")
        joined = changes.next()
        assert isinstance(joined, WorkerAddress)
        assert joined.name == "attention-0.1"
        assert not is_alive(old)
        workers.lost("attention-0")  # the name of the previous process: no worker of this name is up
        assert changes.none_within(0.3)


def test_supervision_goes_on_when_a_listener_raises(caplog: pytest.LogCaptureFixture) -> None:
    with cluster(1) as workers:
        workers.start()
        joined: queue.SimpleQueue[WorkerAddress] = queue.SimpleQueue()

        def fail(name: str) -> None:
            raise RuntimeError(name)

        workers.watch(joined.put, fail)
        os.kill(processes(workers)[0], signal.SIGKILL)
        assert joined.get(timeout=20).name == "attention-0.1"
        assert "could not be taken" in caplog.text


def test_start_shows_the_output_of_a_worker_that_dies_at_once() -> None:
    with cluster(2, lambda name: [sys.executable, "-c", "import sys; sys.exit('no memory here')"]) as workers:
        with pytest.raises(EngineError, match=r"attention-\d did not start, exit status 1\s+no memory here"):
            workers.start()
        assert wait_until(lambda: not processes(workers))


def test_start_ends_a_silent_worker_at_the_deadline() -> None:
    silent = [sys.executable, "-c", "import time; print('still loading', flush=True); time.sleep(60)"]
    with (
        cluster(1, lambda name: silent, timeout=0.5) as workers,
        pytest.raises(EngineError, match=r"killed by SIGKILL\s+still loading\s+.*within 0.5 s"),
    ):
        workers.start()


def test_close_does_not_wait_forever_for_a_stopped_child(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lamina.system.child_process.GRACE", 0.2)
    with cluster(1) as workers:
        workers.start()
        process = processes(workers)[0]
        os.kill(process, signal.SIGSTOP)
    assert not is_alive(process)


def test_command_line_of_a_worker_names_attention() -> None:
    assert attention_command("w", 1, 1)[3] == "lamina_workers.attention_main"
    assert "--kv-cold" not in attention_command("w", 1, 1)
    assert attention_command("w", 100, 1, ColdTier("/d", 0.25))[-4:] == ["--kv-cold", "/d", "--kv-resident", "25"]


PARENT = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # where tests run in the background it is ignored
sys.path[:0] = {paths!r}
from lamina.deploy.local import LocalAttentionWorkers
{setup}
cluster = LocalAttentionWorkers(2, kv_memory=1 << 24, threads=1, **options)
cluster.start()
print(*(status.process for status in cluster.status()), flush=True)
time.sleep(60)
"""


def children_of_a_parent(setup: str) -> tuple[subprocess.Popen[str], list[int]]:
    code = PARENT.format(paths=[str(Path(__file__).parent), str(Path(__file__).parents[1] / "support")], setup=setup)
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    return parent, [int(word) for word in parent.stdout.readline().split()]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_children_end_when_their_parent_is_killed(how: signal.Signals) -> None:
    parent, children = children_of_a_parent(
        "import test_local_attention; options = {'command': test_local_attention.fake}"
    )
    with parent:
        assert len(children) == 2
        assert all(map(is_alive, children))
        parent.send_signal(how)
        parent.wait()
    assert wait_until(lambda: not any(map(is_alive, children)))


@pytest.mark.real
def test_real_workers_end_when_their_parent_is_killed() -> None:
    parent, children = children_of_a_parent("options = {}")
    with parent:
        assert len(children) == 2
        for child in children:
            assert b"attention" in Path(f"/proc/{child}/cmdline").read_bytes()
        parent.kill()
        parent.wait()
    assert wait_until(lambda: not any(map(is_alive, children)))


@pytest.mark.real
def test_real_workers_answer_their_parent_and_refuse_others() -> None:
    workers = LocalAttentionWorkers(1, kv_memory=1 << 24, threads=1)
    try:
        [worker] = workers.start()
        assert answers(worker)
        with WorkerClient(worker.address, worker.credentials) as client:
            assert client.status().name == "attention-0"
        with WorkerClient(worker.address) as stranger, pytest.raises(WorkerRefused, match="token"):
            stranger.status()
    finally:
        workers.close()
    with pytest.raises(ConnectionRefusedError):
        answers(worker, 0.5)


class Hosts:
    """Addresses that answer or do not. `begun`: when the worker at each has started, 0 where that was long ago."""

    def __init__(self, *up: str) -> None:
        self.up = set(up)
        self.begun: dict[str, float] = {}

    def __call__(self, worker: WorkerAddress) -> float | None:
        return time.monotonic() - self.begun.get(worker.address, 0.0) if worker.address in self.up else None


def listed(hosts: Hosts, *addresses: str, timeout: float = 0.3) -> ListedWorkers:
    return ListedWorkers(
        addresses, credentials=lambda: None, answers=hosts, clock=time.monotonic, timeout=timeout, interval=0.02
    )


def test_start_fails_when_a_listed_address_does_not_answer() -> None:
    with pytest.raises(EngineError, match=r"no attention worker answers at b:2 within 0\.3 s"):
        listed(Hosts("a:1"), "a:1", "b:2").start()


def test_start_fails_sooner_where_nothing_listens_at_a_port() -> None:
    def refuse(worker: WorkerAddress) -> float | None:
        raise ConnectionRefusedError

    workers = ListedWorkers(
        ["a:1"], credentials=lambda: None, answers=refuse, clock=time.monotonic, timeout=60, refused=0.1, interval=0.02
    )
    with pytest.raises(EngineError, match=r"at a:1 within 0\.1 s: nothing listens at that port"):
        workers.start()


def test_listed_address_joins_again_when_it_answers() -> None:
    hosts = Hosts("a:1", "b:2")
    workers = listed(hosts, "a:1", "b:2")
    assert [worker.address for worker in workers.start()] == ["a:1", "b:2"]
    try:
        changes = Changes(workers)
        hosts.up.remove("b:2")
        workers.lost("b:2")
        assert changes.none_within(0.1)
        assert [status.state for status in workers.status()] == ["up", "lost"]
        hosts.up.add("b:2")
        assert changes.next() == WorkerAddress("b:2.1", "b:2", place="b:2")
        assert [status.state for status in workers.status()] == ["up", "up"]
    finally:
        workers.close()


@pytest.mark.fault("F18")
def test_a_drained_worker_is_not_taken_again_and_the_next_process_at_its_address_is() -> None:
    hosts = Hosts("a:1", "b:2")
    workers = listed(hosts, "a:1", "b:2")
    workers.start()
    try:
        changes = Changes(workers)
        workers.drained("b:2")
        assert changes.none_within(0.1)
        assert [status.state for status in workers.status()] == ["up", "lost"]
        hosts.begun["b:2"] = time.monotonic()  # between two looks: nobody has seen the port closed
        assert changes.next() == WorkerAddress("b:2.1", "b:2", place="b:2")
    finally:
        workers.close()
