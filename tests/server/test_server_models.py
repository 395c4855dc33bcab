"""Several models over HTTP: one real engine stands for each of them, and this test for the supervisor."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from server_rig import MODEL, Rig, serving, until

from lamina import LLM
from lamina.server.frontend import Frontend, Served
from lamina.server.metrics.metrics import ServerMetrics
from lamina.server.models import Models

NAMES = ("first", "org/second")


class Supervisor:
    """Loads and unloads at once, unless it is `slow` or models are `broken`."""

    def __init__(self, llm: LLM) -> None:
        runtime = llm._runtime
        self.served = Served(runtime.engine, runtime.tokenizer, runtime.inputs)
        self.metrics = ServerMetrics(*NAMES)
        self.frontends = {name: Frontend(self.metrics.of(name)) for name in NAMES}
        self.slow, self.broken = False, ""
        self.models = Models(self.frontends, self)
        self.reset()

    def reset(self) -> None:
        self.slow, self.broken = False, ""
        self.frontends["first"].ready(self.served)
        self.frontends["org/second"].unloaded()

    def load(self, name: str) -> None:
        if self.broken:
            self.frontends[name].unloaded(self.broken)
        elif not self.slow:
            self.frontends[name].ready(self.served)

    def unload(self, name: str) -> None:
        self.frontends[name].unloaded()


@pytest.fixture(scope="module")
def supervisor(llm: LLM) -> Supervisor:
    return Supervisor(llm)


@pytest.fixture(scope="module")
def server(supervisor: Supervisor) -> Iterator[Rig]:
    names = {"model": NAMES[0], "others": NAMES[1:], "aliases": ("gpt-4o",)}
    with serving(None, supervisor.metrics, supervisor.models, **names) as rig:  # type: ignore[arg-type]
        yield rig


@pytest.fixture
def rig(server: Rig, supervisor: Supervisor) -> Rig:
    supervisor.reset()
    return server


def states(rig: Rig) -> dict[str, str]:
    return {card["id"]: card["state"] for card in rig.ask("/v1/models").json["data"]}


def test_a_request_loads_its_model_in_the_place_of_another(rig: Rig) -> None:
    assert states(rig) == {"first": "loaded", "org/second": "unloaded"}
    answer = rig.chat(model="org/second").json
    assert answer["model"] == "org/second"
    assert answer["usage"]["completion_tokens"] > 0
    assert states(rig) == {"first": "unloaded", "org/second": "loaded"}
    stream = rig.complete(stream=True).events  # without a name: the first model
    assert {event["model"] for event in stream} == {"first"}
    assert rig.ask("/health").status == 200
    assert until(lambda: all(model.users == 0 for model in rig.frontend))  # type: ignore[attr-defined]


def test_an_alias_is_a_name_too_and_other_names_are_refused_with_what_there_is(rig: Rig) -> None:
    assert rig.chat(model="gpt-4o").json["model"] == "first"
    card = rig.ask("/v1/models/gpt-4o").json
    assert (card["id"], card["aliases"], card["max_model_len"] > 0) == ("first", ["gpt-4o"], True)
    assert rig.ask("/v1/models/org/second").json["aliases"] == []
    refusal = rig.chat(model="third")
    assert (refusal.status, refusal.error["code"]) == (404, "model_not_found")
    assert refusal.error["message"] == "the model 'third' is not served here; 'first', 'org/second' are"


def test_an_operator_loads_and_unloads(rig: Rig) -> None:
    assert rig.ask("/v1/models/org/second/load", method="POST").json["state"] == "loaded"
    assert states(rig)["first"] == "unloaded"
    assert rig.ask("/v1/models/org/second/unload", method="POST").json["state"] == "unloaded"
    assert rig.ask("/v1/models/org/second/unload", method="POST").status == 200  # it is already
    assert rig.ask("/v1/models/third/load", method="POST").status == 404
    assert rig.ask("/v1/models/third/load").status == 404


def test_a_model_that_does_not_load_is_a_503_and_one_that_takes_too_long_a_504(
    rig: Rig, supervisor: Supervisor
) -> None:
    supervisor.broken = "12 GiB are needed, 8 GiB are there"
    refusal = rig.chat(model="org/second")
    assert (refusal.status, refusal.headers["retry-after"]) == (503, "1")
    assert "org/second: the model could not be loaded: 12 GiB are needed" in refusal.error["message"]
    supervisor.broken, supervisor.slow = "", True
    late = rig.ask("/v1/completions", {"model": "org/second", "prompt": "a"}, x_request_timeout="0.2")
    assert (late.status, late.error["code"]) == (504, "timeout")
    assert states(rig)["org/second"] == "loading"


def test_large_requests_that_wait_leave_room_for_those_that_arrive(rig: Rig, supervisor: Supervisor) -> None:
    supervisor.slow = True
    large = {"model": "org/second", "prompt": "a", "user": "x" * 4_000_000}
    waiting = supervisor.models["org/second"].waiting
    with ThreadPoolExecutor(8) as pool:
        asked = []
        for number in range(1, 9):
            asked.append(pool.submit(rig.ask, "/v1/completions", large, x_request_timeout="20"))
            assert until(lambda: len(waiting) == number)  # noqa: B023  # it is called at once
        assert rig.ask("/v1/completions", large | {"model": "third"}).status == 404
        refusal = rig.ask("/v1/completions", large)  # 32 MiB wait
        assert (refusal.status, refusal.error["message"][:14]) == (429, "8 requests wai")
        supervisor.frontends["org/second"].unloaded("no room")
        assert {each.result().status for each in asked} == {503}


def test_metrics_and_status_are_by_model(rig: Rig) -> None:
    rig.chat(model="org/second")
    lines = rig.ask("/metrics").body.decode().splitlines()
    assert 'lamina:model_state{engine="0",model_name="first",state="unloaded"} 1.0' in lines
    assert 'lamina:model_state{engine="0",model_name="org/second",state="loaded"} 1.0' in lines
    assert 'lamina:num_requests_waiting_for_model{engine="0",model_name="first"} 0.0' in lines
    assert sum(line.startswith("# TYPE lamina:model_state ") for line in lines) == 1
    shown = rig.ask("/lamina/status").json
    assert (shown["model"], shown["state"]) == ("org/second", "ready")
    assert shown["models"] == [{"id": "first", "state": "unloaded"}, {"id": "org/second", "state": "loaded"}]
    assert rig.ask("/lamina/status?model=first").json["state"] == "unloaded"


def test_only_the_operator_of_several_keys_unloads_and_a_lone_model_stays() -> None:
    keys = {"api_keys": ("a", "b"), "operator_keys": ("o",)}
    with serving(None, **keys) as rig:
        path = f"/v1/models/{MODEL}/unload"
        assert rig.ask(path, method="POST", Authorization="Bearer a").error["code"] == "operator_only"
        refusal = rig.ask(path, method="POST", Authorization="Bearer o")
        assert (refusal.status, refusal.error["code"]) == (409, "model_stays")
