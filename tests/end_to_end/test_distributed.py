"""One model over attention workers in processes of their own: the text depends on no shard, channel or lane."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from real_workers import (
    TOKEN_BYTES,
    WorkerProcess,
    all_pages_free,
    local_store,
    ports,
    until,
    worker_process,
    write_tiny_model,
)
from whole_engines import engine

from lamina import LLM
from lamina.errors import InvalidRequest
from lamina_workers.process.credentials import load_credentials, make_credentials

pytestmark = pytest.mark.real  # engine/test_one_text.py has what needs no process

rng = random.Random(23)
PROMPTS = [[rng.randrange(101) for _ in range(n)] for n in (1, 17, 70, 150)]
SHARDS = ("heads", "sequence", "heads+sequence")
CHANNELS: dict[str, dict[str, Any]] = {
    "local": {},
    "grpc": {"local_channel": False},
    "grpc+tls": {"local_channel": False, "tls": True},
    "tcp": {"local_channel": False, "data_channel": "tcp"},
    "tcp+tls": {"local_channel": False, "data_channel": "tcp", "tls": True},
}
SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "seeded": {"temperature": 0.9, "top_p": 0.9, "seed": 11},
}
FEW = [  # every value of each, most pairs of them
    ("heads", 1, "local", 1, "greedy"),
    ("heads", 2, "grpc", 2, "seeded"),
    ("heads", 3, "tcp+tls", "auto", "greedy"),
    ("sequence", 1, "tcp", 2, "seeded"),
    ("sequence", 2, "grpc+tls", 1, "greedy"),
    ("sequence", 3, "local", 2, "greedy"),
    ("heads+sequence", 2, "tcp", 1, "greedy"),
    ("heads+sequence", 3, "grpc", "auto", "seeded"),
    ("heads", 2, "local", 1, "seeded"),
]


@pytest.fixture(scope="module")
def secrets_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("credentials")
    make_credentials(folder, ["127.0.0.1"])
    return folder


@pytest.fixture(scope="module")
def workers(secrets_folder: Path) -> Iterator[dict[bool, list[WorkerProcess]]]:
    """Three workers without and three with TLS and a token. They serve one engine after another."""
    secret = load_credentials(secrets_folder, secrets_folder / "token")
    flags = ("--tls-dir", str(secrets_folder), "--token-file", str(secrets_folder / "token"))
    with contextlib.ExitStack() as stack:
        yield {
            False: [stack.enter_context(worker_process()) for _ in range(3)],
            True: [stack.enter_context(worker_process(*flags, credentials=secret)) for _ in range(3)],
        }


def running(model: Path, **options: Any) -> LLM:
    return engine(model, **{"kv_memory": "4MiB", "prefix_cache": False, **options})


def distributed(
    model: Path, workers: dict[bool, list[WorkerProcess]], secrets_folder: Path, count: int, **options: Any
) -> LLM:
    """An engine over `count` of the workers."""
    tls = options.pop("tls", False)
    if tls:
        options |= {"tls_dir": secrets_folder, "token_file": secrets_folder / "token"}
    return engine(model, workers[tls][:count], **{"kv_memory": "4MiB", "prefix_cache": False, **options})


def tokens(llm: LLM, sampling: dict[str, Any], max_tokens: int = 24) -> list[tuple[int, ...]]:
    return [c.token_ids for c in llm.generate(PROMPTS, max_tokens=max_tokens, **sampling)]


@pytest.fixture(scope="module")
def expected(model: Path) -> dict[str, list[tuple[int, ...]]]:
    with running(model) as llm:
        return {name: tokens(llm, sampling) for name, sampling in SAMPLINGS.items()}


@pytest.mark.parametrize(("shard", "count", "channel", "lanes", "sampling"), FEW)
def test_one_text(model, workers, secrets_folder, expected, shard, count, channel, lanes, sampling):
    options = CHANNELS[channel] | {"shard": shard, "lanes": lanes}
    with distributed(model, workers, secrets_folder, count, **options) as llm:
        assert {port.channel_kind for port in ports(llm)} == {channel.removesuffix("+tls")}
        assert len(ports(llm)) == count
        assert tokens(llm, SAMPLINGS[sampling]) == expected[sampling]
        if shard != "sequence":  # there the others' ranges begin above short sequences
            assert all(port.status().queries > 0 for port in ports(llm))
        until(lambda: all_pages_free(llm))


def test_one_kv_head_is_cut_by_ranges_only(workers, secrets_folder, tmp_path):
    folder = write_tiny_model(tmp_path / "model", num_key_value_heads=1)
    with pytest.raises(InvalidRequest, match=r"'heads' with 2 attention_workers.*one KV head.*shard='sequence'"):
        LLM(folder, attention_workers=2, shard="heads")
    with running(folder) as llm:
        expected = tokens(llm, SAMPLINGS["greedy"])
    with distributed(folder, workers, secrets_folder, 2, shard="sequence") as llm:
        assert tokens(llm, SAMPLINGS["greedy"]) == expected


def test_every_worker_works(model, workers, secrets_folder):
    """Each worker's CPU time grows; while tokens are decoded the engine's process keeps no KV."""
    chosen = workers[False]
    with distributed(model, workers, secrets_folder, 3, shard="heads+sequence") as llm:
        before = [(worker.cpu_seconds(), worker.status().queries) for worker in chosen]
        store = local_store(llm)
        for number, _ in enumerate(llm.stream(PROMPTS[3], max_tokens=400, temperature=0)):
            if number == 100:
                assert store.free_pages == store.n_pages
                held = [worker.status() for worker in chosen]
        for worker, (cpu, queries), state in zip(chosen, before, held, strict=True):
            assert state.parts > 0
            assert worker.cpu_seconds() >= cpu + 0.03, worker.address
            assert worker.status().queries > queries


@pytest.mark.parametrize("shard", ["sequence", "heads+sequence"])
def test_a_sequence_longer_than_any_workers_memory(model, workers, secrets_folder, shard):
    """Two workers with room for 128 tokens each serve 200."""
    prompt = PROMPTS[3]
    with running(model) as llm:
        (expected,) = llm.generate([prompt], max_tokens=50, temperature=0)
    small = str(128 * TOKEN_BYTES)
    with contextlib.ExitStack() as stack:
        both = [stack.enter_context(worker_process("--kv-memory", small)).address for _ in range(2)]
        if shard == "heads+sequence":  # two columns would be two workers with all positions each
            both += [stack.enter_context(worker_process("--kv-memory", small)).address for _ in range(2)]
        options = {"attention_workers": both, "shard": shard, "kv_memory": 128 * TOKEN_BYTES}
        llm = stack.enter_context(running(model, **options))
        (got,) = llm.generate([prompt], max_tokens=50, temperature=0)
        assert got.token_ids == expected.token_ids
        until(lambda: all_pages_free(llm))
    with (
        running(model, kv_memory=128 * TOKEN_BYTES) as alone,
        pytest.raises(InvalidRequest, match="the KV memory holds"),
    ):
        alone.generate(prompt, max_tokens=50)


def decode_bytes(llm: LLM, rows: int, steps: int) -> int:
    """Bytes of decode steps of `rows` sequences, both ways: the difference of two runs of unlike length. Each is the
    least of three, since a run takes a step more where a request comes after the first step."""

    def run(length: int) -> int:
        before = [(port.bytes_sent, port.bytes_received) for port in ports(llm)]
        llm.generate([PROMPTS[1]] * rows, max_tokens=length, temperature=0)
        until(lambda: all_pages_free(llm))
        after = [(port.bytes_sent, port.bytes_received) for port in ports(llm)]
        return sum(map(sum, after)) - sum(map(sum, before))

    return min(run(8 + steps) for _ in range(3)) - min(run(8) for _ in range(3))


@pytest.mark.parametrize("channel", ["local", "grpc", "tcp"])
def test_bytes_on_the_wire(model, workers, secrets_folder, channel):
    """By heads: (2 + 2/G) e d and 4 bytes of lse a query head, token and layer, and little more."""
    layers, heads, group, d, steps = 3, 6, 2, 16, 16
    payload = layers * heads * ((2 + 2 / group) * 4 * d + 4)  # a token
    with distributed(model, workers, secrets_folder, 1, **CHANNELS[channel]) as llm:
        few, many = decode_bytes(llm, 2, steps) / steps, decode_bytes(llm, 32, steps) / steps
    assert many == pytest.approx(32 * payload, rel=0.02)
    a_row = (many - few) / 30 - payload  # its row in the announcement, which all layers share
    messages = 2 * layers + 2
    assert (few - 2 * (payload + a_row)) / messages <= 72  # of gRPC some are pings, more where the machine is slow


def test_who_stops_listening_leaves_nothing_behind(model, workers, secrets_folder, expected):
    with distributed(model, workers, secrets_folder, 2, shard="heads+sequence", lanes=2) as llm:
        slow = llm.stream(PROMPTS[2], max_tokens=24, temperature=0)
        first = next(slow).token_id  # no further token is asked for
        for _ in range(3):
            gone = llm.stream(PROMPTS, max_tokens=200, temperature=0)
            for _ in range(5):
                next(gone)
            gone.close()
        assert tokens(llm, SAMPLINGS["greedy"]) == expected["greedy"]
        assert (first, *(event.token_id for event in slow)) == expected["greedy"][2]
        until(lambda: all_pages_free(llm))


@pytest.mark.soak
@pytest.mark.data
@pytest.mark.timeout(1800)
def test_two_workers_of_4000_tokens_serve_6000():
    prompt = [rng.randrange(100, 40000) for _ in range(5980)]
    with LLM("smollm2-135m", weights="float32", kv_memory="1GiB", prefix_cache=False) as llm:
        (expected,) = llm.generate([prompt], max_tokens=20, temperature=0)
    memory = 4000 * 30 * 3 * 2 * 64 * 4  # layers, heads, K and V, d, float32
    options = {
        "attention_workers": 2,
        "local_share": 0,
        "shard": "sequence",
        "kv_memory": memory,
        "prefix_cache": False,
    }
    with LLM("smollm2-135m", weights="float32", **options) as llm:
        (got,) = llm.generate([prompt], max_tokens=20, temperature=0)
        assert got.token_ids == expected.token_ids
        assert all(port.status().queries > 0 for port in ports(llm))
        until(lambda: all_pages_free(llm))
