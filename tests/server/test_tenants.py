"""What one API key can do to another: each docstring says what it could before keys had shares."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
from server_rig import Reply, Rig, frontend_of, serving, until
from snapshots import holder, sequence, snapshot

from lamina import LLM
from lamina.errors import InvalidRequest
from lamina.messages.engine_request import EngineOutput, EngineRequest
from lamina.messages.snapshot import Snapshot
from lamina.server import service
from lamina.server.chat.preparing import MAX_CHARACTERS
from lamina.server.openai import answers
from lamina.server.settings import ServerSettings
from lamina_workers.decoder.logprobs import RowLogprobs

pytestmark = pytest.mark.data

TEXT = "/v1/completions"
KEYS = {"api_keys": ("a", "b"), "operator_keys": ("o",)}
GRAMMAR = {"structured_outputs": {"regex": "x+"}}


class Held:
    """An engine whose requests go on until `end`."""

    def __init__(self) -> None:
        self.alive, self.halted = True, False
        self.open: list[EngineRequest] = []
        self.seen: list[EngineRequest] = []

    def submit(self, request: EngineRequest) -> None:
        self.open.append(request)
        self.seen.append(request)

    def abort(self, request: EngineRequest, sample: int | None = None, reason: str = "abort") -> None:
        with suppress(ValueError):
            self.open.remove(request)

    def end(self) -> None:
        """End all requests."""
        ended, self.open = self.open, []
        for request in ended:
            request.sink(request, [EngineOutput(each, 1, "length") for each in range(request.request.n)])

    def write(self, tokens: int, finish: Any = None) -> None:
        """The newest request gets tokens, with the log probabilities of 20 others each."""
        row = RowLogprobs(-1.0, tuple((token, -2.0) for token in range(100, 120)))
        reasons = [None] * (tokens - 1) + [finish]
        outputs = [EngineOutput(0, 400 + index % 100, reason, row) for index, reason in enumerate(reasons)]
        self.open[-1].sink(self.open[-1], outputs)

    def snapshot(self, sink: Callable[[Snapshot], None]) -> None:
        sequences = tuple(sequence(request.id, {"h": 9}) for request in self.open)
        sink(snapshot(7, cached_pages={"h": 5}, holders=(holder("h", free_pages=50),), sequences=sequences))

    def close(self) -> None: ...


@pytest.fixture
def engine() -> Held:
    return Held()


@pytest.fixture
def rig(llm: LLM, engine: Held) -> Iterator[Rig]:
    with serving(None, frontend=frontend_of(llm, engine), max_requests=12, **KEYS) as rig:
        yield rig


class Asking:
    """A request of a key, under way on a thread of its own."""

    def __init__(self, rig: Rig, key: str, fields: dict[str, Any]) -> None:
        self._reply: list[Reply] = []
        self._thread = threading.Thread(target=lambda: self._reply.append(ask(rig, key, **fields)), daemon=True)
        self._thread.start()

    def reply(self) -> Reply:
        self._thread.join(30)
        return self._reply[0]


def ask(rig: Rig, key: str, path: str = TEXT, **fields: Any) -> Reply:
    given = {"prompt": "One", "max_tokens": 4} | fields if path == TEXT else None
    return rig.ask(path, given, Authorization=f"Bearer {key}")


def started(rig: Rig, engine: Held, key: str, **fields: Any) -> Asking:
    before = len(engine.seen)
    asking = Asking(rig, key, fields)
    assert until(lambda: len(engine.seen) > before)
    return asking


CHAT = {"messages": [{"role": "user", "content": "Hi"}], "logprobs": True, "top_logprobs": 20, "max_tokens": 3000}


@pytest.mark.fault("F23")
@pytest.mark.parametrize("path", [TEXT, "/v1/chat/completions"])
def test_a_long_answer_holds_up_nobody(rig: Rig, engine: Held, path: str) -> None:
    """The event loop read whole samples at once, and the interpreter stood still while their JSON was written: the
    rig's watch sees the former."""
    fields = {"prompt": "One", "logprobs": 20, "max_tokens": 3000} if path == TEXT else CHAT
    replies: list[Reply] = []
    thread = threading.Thread(target=lambda: replies.append(rig.ask(path, fields, Authorization="Bearer a")))
    thread.start()
    assert until(lambda: bool(engine.open))
    engine.write(3000, "length")
    thread.join(60)
    (choice,) = replies[0].json["choices"]
    written = choice["logprobs"]
    if path == TEXT:
        assert {name: len(column) for name, column in written.items()} == dict.fromkeys(written, 3000)
        assert "".join(written["tokens"]) == choice["text"]
    else:
        assert [len(token["top_logprobs"]) for token in written["content"]] == [20] * 3000
        assert "".join(token["token"] for token in written["content"]) == choice["message"]["content"]


@pytest.mark.parametrize("count", [0, 1, 64, 65, 1000])
def test_log_probabilities_are_written_in_small_pieces(count: int) -> None:
    """The interpreter stands still while json writes one."""
    pieces = list(answers.per_token(range(count), str))
    assert json.loads("".join(pieces)) == [str(index) for index in range(count)]
    assert max(piece.count('"') for piece in pieces) <= 2 * answers.PIECE


@pytest.mark.fault("F23")
def test_log_probabilities_of_long_answers_have_bounds(llm: LLM, engine: Held, monkeypatch: pytest.MonkeyPatch) -> None:
    """768 samples of 8,000 tokens with 20 of them each took gigabytes."""
    monkeypatch.setattr(service, "MAX_PARAMETERS", 2_400_000)  # 600,000 are each key's own, 1,200,000 are open to all
    fields = {"logprobs": 20, "max_tokens": 3000}
    with serving(None, frontend=frontend_of(llm, engine), api_keys=("a", "b")) as rig:
        first = started(rig, engine, "a", **fields)
        engine.write(512)  # of 2,016 bytes
        second = started(rig, engine, "a", **fields)
        engine.write(512)
        assert (refusal := second.reply()).status == 429, refusal.body
        assert until(lambda: len(engine.open) == 1)
        engine.write(1, "length")
        assert first.reply().status == 200
        alone = started(rig, engine, "a", **fields)
        engine.write(1000)
        assert (refusal := alone.reply()).status == 400, refusal.body
        assert "more than 1800000 bytes" in refusal.error["message"]


@pytest.mark.fault("F11")
def test_a_key_leaves_samples_to_others(rig: Rig, engine: Held) -> None:
    """Four requests of 256 samples took all room: every other key was answered with 429 for ten minutes."""
    first = started(rig, engine, "a", n=8, temperature=1)  # of 12: 2 are its own, 6 are open to all
    refusal = ask(rig, "a", n=4, temperature=1)
    assert (refusal.status, refusal.error["code"]) == (429, "too_many_requests")
    assert "8 of 8 samples are under way, and there is no room for 4 more" in refusal.error["message"]
    others = [started(rig, engine, key, n=2, temperature=1) for key in "bo"]
    engine.end()
    assert [each.reply().status for each in (first, *others)] == [200] * 3
    assert ask(rig, "a", n=9, temperature=1).error["message"].endswith("allowed are 8")


def test_a_key_leaves_room_for_the_grammars_of_others(llm: LLM, engine: Held, monkeypatch: pytest.MonkeyPatch) -> None:
    """500 prompts with a grammar of 512 KB took 1.4 GB of the engine's process, and 768 requests with one each did."""
    monkeypatch.setattr(service, "MAX_PARAMETERS", 1200)  # 200 are each key's own, 600 are open to all
    fields = {"structured_outputs": {"regex": "x" * 350}}
    with serving(None, frontend=frontend_of(llm, engine), **KEYS) as rig:
        first = [started(rig, engine, "a", **fields) for _ in range(2)]
        refusal = ask(rig, "a", **fields)
        assert (refusal.status, refusal.error["code"]) == (429, "too_many_requests")
        other = [started(rig, engine, "b", structured_outputs={"regex": "x" * 190}), started(rig, engine, "a")]
        engine.end()
        assert [each.reply().status for each in (*first, *other)] == [200] * 4
        last = started(rig, engine, "a", **fields)
        engine.end()
        assert last.reply().status == 200


def test_a_request_is_its_keys_in_the_engine_too(rig: Rig, engine: Held) -> None:
    """The engine served requests as they came, those of a key that sends many before all others."""
    asking = [started(rig, engine, key) for key in ("a", "a", "b")]
    first, second, other = (each.request.tenant for each in engine.seen)
    assert first == second != other
    engine.end()
    assert [each.reply().status for each in asking] == [200] * 3


@pytest.mark.parametrize(("key", "status"), [("a", 400), ("b", 400), ("o", 200)])
def test_only_the_operator_goes_before_others(rig: Rig, engine: Held, key: str, status: int) -> None:
    """512 samples of priority -2^31 kept the requests of every other key from the engine."""
    asking = Asking(rig, key, {"priority": -(2**31)})
    if status == 200:
        assert until(lambda: bool(engine.open))
        assert engine.open[0].request.priority == -(2**31)
        engine.end()
    reply = asking.reply()
    assert reply.status == status
    if status == 400:
        assert reply.error["param"] == "priority"
        assert reply.error["message"].startswith("priority is -2147483648; allowed is 0 or more")
    later = started(rig, engine, key, priority=3)
    assert engine.open[0].request.priority == 3
    engine.end()
    assert later.reply().status == 200


def test_a_lone_key_is_the_operators() -> None:
    for keys in ((), ("a",), ("a", "a")):
        settings = ServerSettings(model="m", api_keys=keys)
        assert settings.is_operator(settings.tenant("a"))
    settings = ServerSettings(model="m", api_keys=("a", "b"))
    assert not settings.is_operator(settings.tenant("a"))
    assert settings.protected
    assert settings.admits("b")
    with pytest.raises(InvalidRequest):
        ServerSettings(model="m", operator_keys=("\n",))


# Preparation.


@pytest.fixture
def tokenised(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The characters of each text that was tokenised. It takes a tenth of a second at least."""
    tokenizer, lengths = llm._runtime.tokenizer, []
    encode = tokenizer.encode

    def counted(text: str, add_special_tokens: bool = True) -> list[int]:
        lengths.append(len(text))
        time.sleep(0.1)
        return encode(text, add_special_tokens)

    monkeypatch.setattr(tokenizer, "encode", counted)
    return lengths


@pytest.mark.fault("F24")
def test_prompts_are_measured_before_any_is_tokenised(rig: Rig, llm: LLM, tokenised: list[int]) -> None:
    """Each prompt was measured when those before it had been tokenised, and their sum was not: 16 MB for 40 s."""
    long = "x" * (60 * llm._runtime.inputs.max_model_len)
    reply = ask(rig, "a", prompt=[long] * (MAX_CHARACTERS // len(long) + 1))
    assert (reply.status, reply.error["param"]) == (400, "prompt")
    assert f"characters in all its texts; allowed are {MAX_CHARACTERS}" in reply.error["message"]
    assert not tokenised


@pytest.mark.fault("F24")
def test_a_prompt_of_too_many_tokens_is_not_tokenised_to_its_end(rig: Rig, llm: LLM, tokenised: list[int]) -> None:
    """A text was tokenised whole where it had 64 characters for each token of the context: 524,288 digits for 5 s."""
    limit = llm._runtime.inputs.max_model_len
    reply = ask(rig, "a", prompt="7" * (60 * limit))
    assert (reply.status, reply.error["code"]) == (400, "context_length_exceeded")
    assert f"prompt has more than {2 * limit} tokens" in reply.error["message"]
    assert sum(tokenised) < 2 * limit + (1 << 14) + 1


def test_a_long_prompt_that_fits_is_tokenised(rig: Rig, engine: Held, llm: LLM) -> None:
    limit = llm._runtime.inputs.max_model_len
    text = " " * (20 * limit)  # many characters a token
    asking = started(rig, engine, "a", prompt=text)
    assert list(engine.open[0].request.prompt) == llm._runtime.tokenizer.encode(text)
    engine.end()
    assert asking.reply().status == 200


@pytest.mark.fault("F14")
def test_work_for_a_client_that_left_stops(rig: Rig, engine: Held, tokenised: list[int]) -> None:
    """All prompts of a client that had left were tokenised: another key's request was answered after 28 s."""
    head = f"POST {TEXT} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer o\r\nContent-Type: application/json\r\n"
    body = json.dumps({"prompt": ["text"] * 8, "max_tokens": 1}).encode()
    with socket.create_connection(("127.0.0.1", rig.port)) as connection:
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        assert until(lambda: len(tokenised) > 0)
    count = len(tokenised)
    time.sleep(1.0)
    assert count <= len(tokenised) < 8


@pytest.mark.fault("F23")
def test_grammars_wait_for_grammars_only(rig: Rig, engine: Held, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Grammars were compiled one at a time on the threads that tokenise: seven of them, and a plain request of another
    key was answered after 21 s."""
    go = threading.Event()
    monkeypatch.setattr(llm._runtime.inputs, "compile", lambda params: go.wait(20))
    asking = [Asking(rig, "a", GRAMMAR) for _ in range(6)]
    time.sleep(0.2)
    plain = [started(rig, engine, key) for key in "ab"]
    engine.end()
    assert [each.reply().status for each in plain] == [200, 200]
    go.set()
    assert until(lambda: len(engine.open) == 6)
    engine.end()
    assert [each.reply().status for each in asking] == [200] * 6


# What keys see.


@pytest.mark.fault("F30")
def test_status_shows_a_key_its_own(rig: Rig, engine: Held) -> None:
    """It showed every key the sequences of all, and how many tokens had been found in the prefix cache."""
    asking = started(rig, engine, "a", n=2, temperature=1)
    whole, own, nothing = (ask(rig, key, "/lamina/status").json for key in "oab")
    assert whole["engine"]["prefix_hits"] == 7
    assert (whole["active"], own["active"], nothing["active"]) == (2, 2, 0)
    assert [len(each["engine"]["sequences"]) for each in (whole, own, nothing)] == [1, 1, 0]
    assert (own["engine"]["running"], own["engine"]["waiting"]) == (1, 1)
    assert [each["engine"]["holders"][0]["free_pages"] for each in (whole, own, nothing)] == [50, 91, 100]
    engine.end()
    assert asking.reply().status == 200
    time.sleep(0.3)  # as long as a snapshot is used again
    idle = ask(rig, "b", "/lamina/status").json
    assert idle == nothing  # whatever others do
    assert own["events"] == nothing["events"] == []  # of the machines, which is for the operator


@pytest.mark.fault("F30")
def test_metrics_are_the_operators(rig: Rig) -> None:
    """Any key saw what all keys had done."""
    assert ask(rig, "o", "/metrics").status == 200
    refusal = ask(rig, "a", "/metrics")
    assert (refusal.status, refusal.error["code"]) == (403, "operator_only")
