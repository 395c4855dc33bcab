"""`vllm serve` with its KV on two attention workers, as the openai client sees it, and what it does when they die."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
from openai import APIError, OpenAI
from vllm_processes import NEEDED, listening, save_tiny, save_tokenizer, serving

from lamina.behind import SWITCH

pytestmark = [pytest.mark.real, pytest.mark.timeout(1200), NEEDED]
STREAMS = [" ".join(f"w{(seed * place + seed) % 509}" for place in range(25 * seed)) for seed in range(1, 9)]
NEXT = " ".join(f"w{(17 * place) % 509}" for place in range(180))
TOKENS = 160


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_tiny(folder, "llama", max_position_embeddings=1024)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def right(model: Path) -> Iterator[dict[str, str]]:
    """What `vllm serve` says alone."""
    with serving(model, {}) as (url, _), connected(url) as client:
        yield {prompt: whole(client, prompt) for prompt in [*STREAMS, NEXT]}


def connected(url: str) -> OpenAI:
    return OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120.0)


def whole(client: OpenAI, prompt: str) -> str:
    answer = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": prompt}], max_tokens=TOKENS, temperature=0.0,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    return answer.choices[0].message.content or ""


def streamed(client: OpenAI, prompt: str, begun: threading.Semaphore | None = None) -> str:
    """The text of a stream. `begun`: released once there is some."""
    pieces = []
    for chunk in client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": prompt}], max_tokens=TOKENS, temperature=0.0, stream=True,
        extra_body={"ignore_eos": True},
    ):  # fmt: skip
        if not chunk.choices or not chunk.choices[0].delta.content:
            continue
        pieces.append(chunk.choices[0].delta.content)
        if begun is not None and len(pieces) == 8:
            begun.release()
    return "".join(pieces)


def test_the_openai_client_gets_the_texts_of_vllm_alone(model: Path, right: dict[str, str]) -> None:
    with ExitStack() as stack, ThreadPoolExecutor(16) as pool:
        addresses = [listening(stack)[1] for _ in range(2)]
        url, _ = stack.enter_context(serving(model, {SWITCH: ",".join(addresses)}))
        client = stack.enter_context(connected(url))
        texts = list(pool.map(lambda prompt: whole(client, prompt), right))
        assert texts == list(right.values())
        answers = list(pool.map(lambda prompt: streamed(client, prompt), right))
        assert answers == list(right.values())


@pytest.mark.fault("F01")
@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.soak)])
def test_streams_go_on_when_a_worker_is_killed_under_them(kills: int, model: Path, right: dict[str, str]) -> None:
    with ExitStack() as stack, ThreadPoolExecutor(16) as pool:
        workers = [listening(stack) for _ in range(2)]
        url, run = stack.enter_context(serving(model, {SWITCH: ",".join(address for _, address in workers)}))
        client = stack.enter_context(connected(url))
        for kill in range(kills):
            begun = threading.Semaphore(0)
            streams = [pool.submit(streamed, client, prompt, begun) for prompt in STREAMS]
            assert all(begun.acquire(timeout=40.0) for _ in STREAMS), run.said()[-6000:]
            child, address = workers[kill % 2]
            child.kill()
            child.wait()
            workers[kill % 2] = listening(stack, address)
            assert streamed(client, NEXT) == right[NEXT]
            assert {prompt: stream.result() for prompt, stream in zip(STREAMS, streams, strict=True)} == {
                prompt: right[prompt] for prompt in STREAMS
            }
        assert run.process.poll() is None
        assert run.said().count("computed again") >= kills


@pytest.mark.fault("F01")
def test_requests_end_with_an_error_where_no_worker_comes_back_and_the_engine_lives(
    model: Path, right: dict[str, str]
) -> None:
    with ExitStack() as stack, ThreadPoolExecutor(16) as pool:
        child, address = listening(stack)
        environment = {SWITCH: address, "LAMINA_BEHIND_RECOVERY_TIMEOUT": "1"}
        url, run = stack.enter_context(serving(model, environment))
        client = stack.enter_context(connected(url))
        begun = threading.Semaphore(0)
        streams = [pool.submit(streamed, client, prompt, begun) for prompt in STREAMS]
        assert all(begun.acquire(timeout=40.0) for _ in STREAMS), run.said()[-6000:]
        child.kill()
        child.wait()
        for stream in streams:
            with pytest.raises(APIError):
                stream.result()
        with pytest.raises(APIError):
            whole(client, NEXT)
        listening(stack, address)
        assert whole(client, NEXT) == right[NEXT]
        assert run.process.poll() is None
