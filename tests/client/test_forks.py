"""A program that forks while an LLM lives: the child gets an error at once, and nothing of the parent's ends."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lamina import LLM, EngineError
from lamina import llm as llm_module
from lamina_protocols.channels.sockets import SocketChannel

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


@pytest.fixture(scope="module")
def llm(model: Path) -> Iterator[LLM]:
    with LLM(model, dtype="float32", kv_memory="16M", threads=1) as llm:
        yield llm


def in_child(do: Callable[[], object], seconds: float = 30.0) -> str:
    """What `do` gives in a forked child, or its EngineError, as text. A child that hangs is an error."""
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        try:
            os.write(writing, str(do()).encode())
        except EngineError as error:
            os.write(writing, str(error).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as said:
        if not select.select([said], [], [], seconds)[0]:
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        assert status == 0, "the child hung"
        return said.read()


def test_a_forked_child_gets_an_error_and_ends_nothing(llm: LLM) -> None:
    assert f"this LLM was made in process {os.getpid()}" in in_child(lambda: llm.generate([1], max_tokens=1))
    assert in_child(lambda: llm._stop.peek()[1]()) == "None"  # type: ignore[index]  # as when the child ends
    assert in_child(lambda: llm.alive) == "False"
    assert llm.alive


def test_calls_from_before_the_fork_do_not_hang_in_the_child(llm: LLM) -> None:
    """A stream that was made before a fork waited for ever in the child: the engine's thread is not there."""
    made, begun = llm.stream([1], max_tokens=20), llm.stream([1], max_tokens=20)
    first = next(begun)
    said = f"this call was made in process {os.getpid()}, and this is "
    assert said in in_child(lambda: list(made))
    assert said in in_child(lambda: list(begun))
    later = llm.agenerate([1], max_tokens=1)
    assert "this LLM was made in" in in_child(lambda: asyncio.run(later))  # type: ignore[arg-type]
    later.close()
    tokens = [first.token_id, *(event.token_id for event in begun)]
    assert tokens == [event.token_id for event in made]  # the child has aborted nothing


def test_a_child_may_make_an_llm_of_its_own(llm: LLM, model: Path) -> None:
    def new() -> object:
        with LLM(model, dtype="float32", kv_memory="16M", threads=1) as own:
            return own.generate([1, 2], max_tokens=5, temperature=0)

    assert in_child(new) == str(llm.generate([1, 2], max_tokens=5, temperature=0))


def test_a_child_cannot_reach_workers_where_its_parent_did(monkeypatch: pytest.MonkeyPatch) -> None:
    """gRPC's connections of a forked child hang, or are refused after half a minute."""
    monkeypatch.setattr(llm_module, "_reached_in", 17)
    with pytest.raises(EngineError, match=rf"process 17 had an LLM .* before this one, {os.getpid()}, was forked"):
        LLM("anything", attention_workers=1)


def test_a_child_keeps_no_connection_open() -> None:
    """The worker would not see that its engine has ended while a child of the engine's program lived."""
    here, there = socket.socketpair()
    channel = SocketChannel(here, False)
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        there.close()
        os.close(writing)
        os.read(reading, 1)  # until the parent is done
        os._exit(0)
    channel._socket.close()  # as when the process dies: without shutdown
    there.settimeout(10)
    assert there.recv(1) == b""
    os.close(writing)
    os.waitpid(child, 0)
    os.close(reading)
    there.close()


@pytest.mark.real
def test_a_fork_beside_attention_workers(model: Path) -> None:
    options = {"dtype": "float32", "kv_memory": "16M", "threads": 1, "attention_workers": 2}
    with LLM(model, **options) as llm:  # type: ignore[arg-type]
        stream = llm.stream([1], max_tokens=20, temperature=0)
        first = next(stream)
        assert "this call was made in" in in_child(lambda: list(stream))
        assert "gRPC does not work after that" in in_child(lambda: LLM(model, **options))  # type: ignore[arg-type]
        tokens = (first.token_id, *(event.token_id for event in stream))
        assert llm.generate([1], max_tokens=20, temperature=0).token_ids == tokens  # type: ignore[union-attr]
