"""The server as a Ray Serve application: its arguments, and a replica on a real Ray in a network namespace."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray_nodes import Namespaces, all_end, cluster

from lamina.errors import InvalidRequest
from lamina.server.ray_serve import ServePlan
from lamina.system.child_process import KEY_VARIABLE


def test_arguments_are_those_of_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "one two")
    plan = ServePlan.read(
        {
            "model": "m",
            "served_model_name": "name",
            "attention_workers": 3,
            "kv_memory": "2GiB",
            "max_requests": 7,
            "drain_timeout": 5,
            "shard": "sequence",
        }
    )
    assert (plan.model, plan.settings.model, plan.settings.max_requests) == ("m", "name", 7)
    assert (plan.config.cluster, plan.config.attention_workers, plan.config.shard) == ("auto", 3, "sequence")
    assert (plan.config.kv_memory, plan.drain_timeout) == (2 << 30, 5.0)
    assert plan.settings.api_keys == ()
    assert b"two" not in pickle.dumps(plan), "keys would be shown with Serve's configuration"
    assert plan.settings_here().api_keys == ("one", "two")


def test_text_stands_for_numbers() -> None:
    given = {"attention_workers": "2", "max_requests": "9", "request_timeout": "1.5", "open": "true", "threads": "1",
             "lanes": "auto", "prefix_cache": "false", "kv_memory": "1GiB"}  # fmt: skip
    plan = ServePlan.read(given)
    assert (plan.config.attention_workers, plan.config.threads, plan.config.lanes) == (2, 1, "auto")
    assert (plan.settings.max_requests, plan.settings.request_timeout, plan.open) == (9, 1.5, True)
    assert plan.config.prefix_cache is False


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attention_worker": 2}, "unknown argument 'attention_worker'; known are"),
        ({"api_keys": ["secret"]}, "unknown argument 'api_keys'"),
        ({"cluster": "auto"}, "unknown argument 'cluster'"),
        ({1: 2}, "unknown argument 1"),
        (["model"], r"args is \['model'\]"),
        ({"model": ""}, "model is ''"),
        ({"model": 5}, "model is 5"),
        ({"served_model_name": " "}, "served_model_name is ' '"),
        ({"api_key_file": 3}, "api_key_file is 3"),
        ({"attention_workers": -1}, "attention_workers is -1"),
        ({"attention_workers": ["a:1"]}, "cluster and addresses"),
        ({"attention_workers": True}, "attention_workers is True"),
        ({"threads": "many"}, "threads is 'many'"),
        ({"max_requests": 0}, "max_requests is 0"),
        ({"request_timeout": "never"}, "request_timeout is 'never'"),
        ({"open": "yes"}, "open is 'yes'; allowed is true or false"),
        ({"drain_timeout": -1}, "drain_timeout is -1"),
        ({"drain_timeout": float("nan")}, "drain_timeout is nan"),
    ],
)
def test_wrong_arguments_are_refused_by_name(arguments: Any, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        ServePlan.read(arguments)


@pytest.mark.fault("F21")
def test_without_a_key_nobody_is_let_in_unless_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    with pytest.raises(InvalidRequest, match=r"no API key: set \$LAMINA_API_KEY"):
        ServePlan.read({}).settings_here()
    assert ServePlan.read({"open": True}).settings_here().api_keys == ()
    (tmp_path / "keys").write_text("first\n\n second \n")
    assert ServePlan.read({"api_key_file": str(tmp_path / "keys")}).settings_here().api_keys == ("first", "second")
    (tmp_path / "keys").write_text("\n")
    with pytest.raises(InvalidRequest, match="holds no API key"):
        ServePlan.read({"api_key_file": str(tmp_path / "keys")}).settings_here()


# On a real Ray.

KEY = "a-key-of-the-tests"

PROGRAM = """
import http.client, subprocess, threading
from lamina.ray_cluster.connection import ray_module
ray = ray_module()  # which keeps Ray's news off stdout
from ray import serve
from lamina.ray_cluster.handle import engine_status
from lamina.server.ray_serve import build_app

ray.init(address="auto", log_to_driver=False, logging_level="ERROR")
serve.start(http_options={"host": "127.0.0.1", "port": 8000})
serve.run(build_app({"model": "smollm2-135m", "attention_workers": 1, "kv_memory": "128MiB", "threads": 1,
                     "max_requests": "4", "max_model_len": 2048,
                     "dtype": "float32"}), name="lamina", blocking=False)

def connect():
    return http.client.HTTPConnection("127.0.0.1", 8000, timeout=60)

def send(connection, path, body=None, key="a-key-of-the-tests"):
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    connection.request("GET" if body is None else "POST", path, body and json.dumps(body), headers)
    return connection.getresponse()

def ask(path, body=None, key="a-key-of-the-tests"):
    connection = connect()
    response = send(connection, path, body, key)
    text = response.read().decode()
    connection.close()
    return response.status, text

def chat(tokens, **more):
    return {"messages": [{"role": "user", "content": "Count to a hundred."}], "max_tokens": tokens, "temperature": 0,
            "ignore_eos": True} | more

def running():
    lines = ask("/metrics")[1].splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines
               if line.startswith(("lamina:num_requests_running{", "lamina:num_requests_waiting{")))

def until(condition, seconds):
    start = time.monotonic()
    while not condition():
        if time.monotonic() - start > seconds:
            return None
        time.sleep(0.05)
    return time.monotonic() - start

def engine_processes():
    [status] = engine_status(ray).values()
    return [status["process"], *(row["process"] for row in status["workers"])]

def others_than(processes):
    try:
        return not set(processes) & set(engine_processes())
    except (ValueError, ray.exceptions.RayError):  # there is none, or it is just ending
        return False

def replica_process():
    found = subprocess.run(["pgrep", "-f", "ray::[S]erveReplica"], capture_output=True, text=True).stdout.split()
    here = os.readlink("/proc/self/ns/net")
    [process] = [int(each) for each in found if os.readlink(f"/proc/{each}/ns/net") == here]
    return process
"""


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Namespaces]:
    """A Ray head with what an engine and one attention worker want, in a namespace of its own."""
    pytest.importorskip("ray.serve")
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")  # there is no network to fetch a model from
    resources = {"lamina_model": 1, "lamina_attention": 1}
    with cluster(tmp_path_factory.mktemp("ray"), resources, XDG_CACHE_HOME=cache, LAMINA_API_KEY=KEY) as made:
        yield made


@pytest.mark.real
@pytest.mark.data
@pytest.mark.timeout(300)
def test_a_replica_answers_streams_aborts_and_is_replaced(node: Namespaces) -> None:
    said = node.run(
        PROGRAM
        + """
facts = {"health": ask("/health")[0], "models": json.loads(ask("/v1/models")[1])["data"][0]["id"],
         "no_key": ask("/v1/models", key="wrong")[0]}
facts["whole"] = json.loads(ask("/v1/chat/completions", chat(24))[1])["choices"][0]["message"]["content"]

connection = connect()
response = send(connection, "/v1/chat/completions", chat(24, stream=True))
times, text, last = [], "", ""
while line := response.readline().decode():
    if line.startswith("data: {"):
        times.append(time.monotonic())
        delta = json.loads(line[6:])["choices"][0]["delta"]
        text += delta.get("content") or ""
    last = line.strip() or last
facts |= {"streamed": text, "type": response.getheader("content-type"), "chunks": len(times), "last": last,
          "spread": times[-1] - times[0]}
connection.close()

leaving = []
for stream in (True, True, False):
    connection = connect()
    body = json.dumps(chat(1500, stream=stream))
    connection.request("POST", "/v1/chat/completions", body,
                       {"Content-Type": "application/json", "Authorization": "Bearer a-key-of-the-tests"})
    response = connection.getresponse() if stream else None
    leaving.append((connection, response, response and response.readline()))
facts["began"] = until(lambda: running() == 3, 20)
for connection, response, _ in leaving:
    connection.close()
    if response is not None:
        response.close()  # it holds the socket
facts["aborted"] = until(lambda: running() == 0, 20)

facts["first_processes"] = engine_processes()
connection = connect()
response = send(connection, "/v1/chat/completions", chat(200, stream=True))
response.readline()
os.kill(facts["first_processes"][0], signal.SIGKILL)
facts["went_on"] = response.read().decode()
facts["after"] = json.loads(ask("/v1/chat/completions", chat(24))[1])["choices"][0]["message"]["content"]

facts["processes"] = engine_processes()
os.kill(replica_process(), signal.SIGKILL)
facts["lost"] = until(lambda: others_than(facts["processes"]), 120)
facts["back"] = until(lambda: ask("/health")[0] == 200 and ask("/v1/chat/completions", chat(24))[0] == 200, 120)
facts["again"] = json.loads(ask("/v1/chat/completions", chat(24))[1])["choices"][0]["message"]["content"]
facts["new_processes"] = engine_processes()

connection = connect()
response = send(connection, "/v1/chat/completions", chat(200, stream=True))
response.readline()
ending = threading.Thread(target=serve.delete, args=("lamina",))
ending.start()
facts["drained"] = response.read().decode().rstrip().endswith("data: [DONE]")
ending.join()
serve.shutdown()
say(**facts)
""",
        280,
    )
    assert said["health"] == 200
    assert said["models"] == "smollm2-135m"
    assert said["no_key"] == 401
    assert said["streamed"] == said["whole"] == said["after"] == said["again"] != ""
    assert said["went_on"].rstrip().endswith("data: [DONE]"), "a stream ended with the engine's process"
    assert '"error"' not in said["went_on"]
    assert said["first_processes"][0] != said["processes"][0]
    assert said["first_processes"][1:] == said["processes"][1:], "the attention worker was started again"
    assert said["type"].startswith("text/event-stream")
    assert said["last"] == "data: [DONE]"
    assert said["chunks"] > 10
    assert said["spread"] > 0, "the chunks came all at once"
    assert said["began"] is not None
    assert said["aborted"] is not None
    assert said["aborted"] < 5
    assert said["lost"] is not None
    assert said["back"] is not None
    assert said["drained"], "a stream was cut off when the application was deleted"
    assert not set(said["processes"]) & set(said["new_processes"])
    assert all_end(said["processes"] + said["new_processes"])
