"""Ray, for real: a head and a second node, each in a network namespace of its own, and programs that use them.

Every program runs in the head's namespace and prints one line of JSON. Without root there are no namespaces, and the
tests are skipped: two nodes of one host would share an address.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from ray_nodes import GENERATE, HEAD, OTHER, PORT, Namespaces, all_end, cluster, join

from lamina.errors import EngineError
from lamina.ray_cluster.connection import compare_versions, explain
from lamina_protocols.channels.versions import PREVIOUS, PROTOCOL_VERSION


def test_a_version_that_is_no_neighbour_is_refused_by_both_names() -> None:
    compare_versions({"a": PROTOCOL_VERSION, "b": PREVIOUS, "c": PROTOCOL_VERSION + 1})
    said = rf"node b has another Lamina\. .*the engine has {PROTOCOL_VERSION}, this worker {PREVIOUS - 1}"
    with pytest.raises(EngineError, match=said):
        compare_versions({"a": PROTOCOL_VERSION, "b": PREVIOUS - 1})
    with pytest.raises(EngineError, match=r"node b has no Lamina; this process has Lamina \d"):
        compare_versions({"b": None})


def test_an_error_of_ray_is_told_in_one_line() -> None:
    error = RuntimeError("Ray's page\nof explanations")
    assert explain(error) == "Ray's page"
    error.cause = ValueError("what was raised there")  # type: ignore[attr-defined]
    assert explain(error) == "ValueError: what was raised there"


@pytest.fixture(scope="module")
def facts(nodes: Namespaces) -> Any:
    """What one program finds out: the errors without a cluster, with too few nodes and without a model, and the folders
    that a process on the cluster imports from."""
    return nodes.run("""
import lamina
from lamina.ray_cluster.connection import connect, ray_module, require

def error_of(call, *given, **options):
    start = time.monotonic()
    try:
        call(*given, **options)
    except lamina.LaminaError as error:
        return str(error), time.monotonic() - start

nowhere = error_of(connect, "10.77.0.1:1")
connect("auto")
path = ray_module().remote(num_cpus=0)(lambda: __import__("sys").path).remote()
say(nowhere=nowhere, too_few=error_of(require, {"lamina_attention": 5}, 1.0), path=ray_module().get(path),
    folder=os.getcwd(), no_model=error_of(lamina.LLM, "no-such-model", cluster="auto", attention_workers=1))
""")


@pytest.mark.real
def test_errors_of_a_cluster_say_what_to_start(facts: Any) -> None:
    error, seconds = facts["too_few"]
    assert "the cluster has 2 lamina_attention; asked for are 5" in error
    assert """--resources='{"lamina_attention": 1}'""" in error
    assert seconds < 10
    error, _ = facts["nowhere"]
    assert "no Ray cluster at '10.77.0.1:1'" in error
    assert "ray start --head" in error


@pytest.mark.real
def test_a_model_that_is_not_there_is_the_same_error_as_beside_it(facts: Any) -> None:
    assert "no model 'no-such-model'" in facts["no_model"][0]


@pytest.mark.real
def test_no_process_on_the_cluster_imports_from_the_working_folder(facts: Any) -> None:
    """Ray has the processes of a job search the folder where its program began before all others."""
    assert facts["folder"] not in facts["path"]


@pytest.mark.real
def test_a_cluster_that_lets_everybody_in_is_refused(nodes: Namespaces, tmp_path: Path) -> None:
    """Whoever reached the head of a cluster without authentication ran programs on all nodes, and nothing said so. What
    this process would show does not count, as the head may not look."""
    code = """
from lamina.ray_cluster.connection import connect, require_authentication
from lamina.errors import EngineError
connect("auto")
try:
    require_authentication()
    say(error="")
except EngineError as error:
    say(error=str(error))
"""
    assert nodes.run(code)["error"] == ""
    with cluster(tmp_path, {}, RAY_AUTH_MODE="disabled") as unlocked:
        said = unlocked.run(code)["error"]
    assert f"the Ray cluster at {HEAD}:{PORT} runs programs of everybody who reaches it" in said


@pytest.mark.fault("F31")
@pytest.mark.real
def test_a_node_with_another_version_is_refused_before_anything_starts(nodes: Namespaces, tmp_path: Path) -> None:
    (tmp_path / "lamina_protocols" / "channels").mkdir(parents=True)
    (tmp_path / "lamina_protocols" / "channels" / "versions.py").write_text("PROTOCOL_VERSION = 99\n")
    join(nodes, """{"odd_one": 1}""", PYTHONPATH=str(tmp_path))
    said = nodes.run("""
from lamina.ray_cluster.connection import connect, require
from lamina.errors import EngineError
connect("auto")
try:
    require({"odd_one": 1})
except EngineError as error:
    say(error=str(error))
""")
    assert f"node {OTHER} has another Lamina. " in said["error"]
    assert "this worker 99" in said["error"]


@pytest.mark.real
def test_workers_come_up_refuse_strangers_and_are_replaced(nodes: Namespaces) -> None:
    said = nodes.run("""
from lamina.ray_cluster.connection import connect
from lamina.ray_cluster.attention import RayAttentionWorkers
from lamina_protocols.channels.channels import Credentials
from lamina_protocols.errors import LaminaError
from lamina_protocols.channels.grpc_client import WorkerClient

connect("auto")
cluster = RayAttentionWorkers(2, kv_memory=1 << 24, threads=1)
progress = []
started = cluster.start(lambda *told: progress.append(told))
addresses = sorted(member.address.partition(":")[0] for member in started)

def answer(address, credentials):
    try:
        with WorkerClient(address, credentials) as client:
            return client.status(3.0).name
    except LaminaError as error:
        return type(error).__name__

first, second = started
right = second.credentials
answers = [answer(second.address, each) for each in (
    right, Credentials(ca=right.ca), Credentials(ca=right.ca, token="wrong"),
    Credentials(ca=first.credentials.ca, token=right.token), None,
)]

news = queue.SimpleQueue()
cluster.watch(news.put, news.put)
os.kill(cluster.status()[1].process, signal.SIGKILL)
killed = [news.get(timeout=30), news.get(timeout=30).name]
os.kill(cluster.status()[0].process, signal.SIGSTOP)
cluster.lost("attention-0")
given_up = [news.get(timeout=40).name]
states = [status.state for status in cluster.status()]
processes = [status.process for status in cluster.status()]
cluster.close()
say(addresses=addresses, answers=answers, killed=killed, given_up=given_up, states=states, progress=progress,
    processes=processes)
""")
    assert said["addresses"] == [HEAD, OTHER]
    assert said["answers"] == ["attention-1", *["WorkerRefused"] * 2, *["WorkerUnreachable"] * 2]
    assert said["killed"] == ["attention-1", "attention-1.1"]
    assert said["given_up"] == ["attention-0.1"]
    assert said["states"] == ["up", "up"]
    assert said["progress"][-1] == ["attention workers", 2, 2]
    assert all_end(said["processes"])


@pytest.mark.real
def test_workers_end_with_the_program_that_started_them(nodes: Namespaces) -> None:
    with nodes.program("""
from lamina.ray_cluster.connection import connect
from lamina.ray_cluster.attention import RayAttentionWorkers
connect("auto")
cluster = RayAttentionWorkers(2, kv_memory=1 << 24, threads=1)
cluster.start()
say(processes=[status.process for status in cluster.status()])
time.sleep(60)
""") as program:
        processes = program.hear()["processes"]
        pids = subprocess.run(["ip", "netns", "pids", nodes.names[0]], capture_output=True, text=True, check=True)
        assert str(program.process.pid) in pids.stdout.split()  # ip has become the program
        program.process.kill()
    assert all_end(processes)


@pytest.mark.real
def test_a_model_on_the_cluster_gives_the_same_tokens(nodes: Namespaces, model: Path) -> None:
    code = """
sampling = {"max_tokens": 24, "temperature": 1.0, "seed": 5, "ignore_eos": True, "n": 2}
greedy = {"max_tokens": 12, "ignore_eos": True}

def tokens(llm):
    completions = llm.generate(["the 1 2", "12 12 the the 12", "a"], **sampling)
    return [[sample.token_ids for sample in completion.samples] for completion in completions]

with here() as llm:
    expected = tokens(llm)
progress = set()
with on_cluster(progress=lambda *told: progress.add(told[0])) as llm:
    got = tokens(llm)
    streamed = [event.token_id for event in llm.stream("the 1 2", **greedy)]
    whole = llm.generate("the 1 2", **greedy).token_ids
    try:
        llm.generate("x", max_tokens=10**6)
    except lamina.InvalidRequest as error:
        refused = str(error)
say(same=got == expected, progress=sorted(progress), streamed=streamed, whole=whole, refused=refused)
"""
    said = nodes.run(GENERATE.format(model=str(model)) + code)
    assert said["same"]
    assert {"attention workers", "loading"} <= set(said["progress"])
    assert said["streamed"] == said["whole"]
    assert "1000000" in said["refused"]


@pytest.mark.fault("F18")
@pytest.mark.real
def test_the_command_line_sees_drains_and_ends_an_engine(nodes: Namespaces, model: Path) -> None:
    code = """
llm = on_cluster()
stream = llm.stream("the 1 2", max_tokens=100, ignore_eos=True)
first = next(stream).token_id
say(ready=True)
sys.stdin.readline()
rest = [event.token_id for event in stream]
with here() as beside:
    say(same=(first, *rest) == beside.generate("the 1 2", max_tokens=100, ignore_eos=True).token_ids)
while llm.alive:
    time.sleep(0.1)
try:
    llm.generate("x", max_tokens=4)
except lamina.EngineError as error:
    say(error=str(error))
"""
    assert nodes.lamina("cluster", "status").stdout == "no engine runs on this cluster\n"
    with nodes.program(GENERATE.format(model=str(model)) + code) as program:
        assert program.hear() == {"ready": True}
        shown = nodes.lamina("cluster", "status").stdout.splitlines()
        assert shown[0].startswith("engine-")
        assert [line.split()[0] for line in shown[2:]] == ["attention-0", "attention-1"]
        report = json.loads(nodes.lamina("cluster", "status", "--json").stdout)
        assert [row["worker"]["session"] for row in report["workers"]] == [True, True]
        wrong = nodes.lamina("cluster", "drain", "attention-7")
        assert wrong.returncode == 2
        assert "'attention-7'" in wrong.stderr
        drained = nodes.lamina("cluster", "drain", "attention-1")
        assert drained.returncode == 0, drained.stderr
        program.tell()
        assert program.hear() == {"same": True}
        assert nodes.lamina("cluster", "down").stdout.startswith("ended engine-")
        assert "error" in program.hear()
    assert nodes.lamina("cluster", "status").stdout == "no engine runs on this cluster\n"


@pytest.mark.fault("F16")
@pytest.mark.real
def test_an_engine_and_its_workers_end_with_the_program_that_started_them(nodes: Namespaces, model: Path) -> None:
    code = """
llm = on_cluster()
say(ready=True)
time.sleep(60)
"""
    with nodes.program(GENERATE.format(model=str(model)) + code) as program:
        assert program.hear() == {"ready": True}
        report = json.loads(nodes.lamina("cluster", "status", "--json").stdout)
        program.process.kill()
    assert all_end([report["process"], *(row["process"] for row in report["workers"])])


@pytest.mark.real
def test_a_server_on_the_cluster_answers_comes_back_and_leaves_nothing(nodes: Namespaces, model: Path) -> None:
    said = nodes.run(
        f"MODEL = {str(model)!r}\n"
        + """
import re, subprocess, urllib.error, urllib.request
from lamina.ray_cluster.connection import connection
from lamina.ray_cluster.handle import engine_status, engines

server = subprocess.Popen(
    [sys.executable, "-m", "lamina", "serve", MODEL, "--port", "0", "--cluster", "auto", "--attention-workers", "2",
     "--local-share", "0",
     "--kv-memory", "64MiB", "--threads", "1"], stderr=subprocess.PIPE, text=True)
while not (found := re.search(r"serving .* at (http\\S+)", line := server.stderr.readline())):
    if not line:
        raise SystemExit(f"it ended with {server.wait()}")
    print(line, file=sys.stderr)

def ask(path, **body):
    data = json.dumps(body).encode() if body else None
    request = urllib.request.Request(found[1] + path, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()

def text():
    body = {"prompt": [5, 6, 7], "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    status, answer = ask("/v1/completions", **body)
    return json.loads(answer)["choices"][0]["text"] if status == 200 else answer

facts = {"text": text(), "holders": len(json.loads(ask("/lamina/status")[1])["engine"]["holders"])}
children = subprocess.run(["pgrep", "-P", str(server.pid), "-f", "engine_main"], capture_output=True, text=True)
os.kill(int(children.stdout), signal.SIGKILL)
deadline = time.monotonic() + 60
while ask("/health")[0] == 200 and time.monotonic() < deadline:
    time.sleep(0.02)
while ask("/health")[0] != 200 and time.monotonic() < deadline:
    time.sleep(0.1)
facts["again"] = text()
with connection("auto") as ray:
    facts["engines"] = len(engines(ray))
server.send_signal(signal.SIGTERM)
facts["status"] = server.wait(30)
with connection("auto") as ray:
    while (left := len(engines(ray))) and time.monotonic() < deadline + 20:
        time.sleep(0.2)
facts["left"] = left
say(**facts)
"""
    )
    assert said["text"] == said["again"]
    assert said["holders"] == 3
    assert (said["engines"], said["status"], said["left"]) == (1, 0, 0)


@pytest.mark.fault("F16")
@pytest.mark.real
def test_a_node_that_dies_under_load_costs_no_token(nodes: Namespaces, model: Path) -> None:
    """The last one: the second node is gone afterwards."""
    code = """
import logging
told, got = [], []

class Listener(logging.Handler):
    def emit(self, record):
        told.append((len(got), record.getMessage()))

logging.getLogger("lamina").addHandler(Listener(logging.WARNING))
with here() as llm:
    expected = llm.generate("the 1 2", max_tokens=1000, ignore_eos=True).token_ids
llm = on_cluster()
for event in llm.stream("the 1 2", max_tokens=1000, ignore_eos=True):
    got.append(event.token_id)
    if len(got) == 20:
        say(ready=True)
say(same=tuple(got) == expected, tokens=len(got), told=told)
"""
    with nodes.program(GENERATE.format(model=str(model)) + code) as program:
        assert program.hear() == {"ready": True}
        nodes.kill(1)
        said = program.hear()
    assert (said["same"], said["tokens"]) == (True, 1000)
    losses = [count for count, message in said["told"] if "is lost" in message]
    assert losses, said["told"]
    assert 20 <= losses[0] < 1000
