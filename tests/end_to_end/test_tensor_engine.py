"""One model over several ranks in processes of their own: the text stays the same whichever process dies."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from real_workers import until, worker_process, write_tiny_model

import lamina.llm
from lamina import LLM
from lamina.config import EngineConfig
from lamina.deploy.local import LocalModelWorkers, model_command
from lamina.errors import EngineError, InvalidRequest, LaminaError
from lamina.launch.builder import start
from lamina_protocols.channels.channels import ChannelClosed, split_address
from lamina_protocols.channels.sockets import connect_tcp
from lamina_workers.parallel.tensor_parallel import TensorParallelWorkers
from lamina_workers.process.credentials import load_credentials, make_credentials

rng = random.Random(29)
PROMPTS = [[rng.randrange(101) for _ in range(n)] for n in (1, 17, 70, 150)]
SHARED = [rng.randrange(101) for _ in range(80)]
SAMPLING: dict[str, Any] = {"max_tokens": 24, "ignore_eos": True}
LONG: dict[str, Any] = {"max_tokens": 400, "ignore_eos": True}


def engine(model: Path, **config: Any) -> LLM:
    """Small pools, float32: texts can be compared."""
    return LLM(model, **{"dtype": "float32", "kv_memory": "16MiB", "max_model_len": 1024, "local_share": 0, **config})


def texts(llm: LLM, prompts: list[list[int]] = PROMPTS, **sampling: Any) -> list[str]:
    completions = llm.generate(prompts, **{**SAMPLING, **sampling})
    if not isinstance(completions, list):
        raise TypeError("one completion for several prompts")
    return [completion.text for completion in completions]


def scores(llm: LLM) -> list[float]:
    """The log probabilities of all tokens of the prompts that follow others, then an embedding of each."""
    found: list[float] = []
    for prompt in PROMPTS:
        completion = llm.generate(prompt, prompt_logprobs=1, max_tokens=0)
        if isinstance(completion, list) or completion.prompt_logprobs is None:
            raise TypeError("one prompt has one completion, with what was asked for")
        found += [entry.logprob for entry in completion.prompt_logprobs if entry is not None]
    embedded = llm.embed(PROMPTS, pooling="mean")
    return found + [value for each in (embedded if isinstance(embedded, list) else []) for value in each.embedding]


@pytest.fixture(scope="module")
def alone(model: Path) -> Iterator[LLM]:
    """One process, without attention workers."""
    with engine(model) as llm:
        yield llm


def process(llm: LLM, rank: int = 1) -> int | None:
    """The process id of a rank, while it has one."""
    ranks = llm._runtime.pools.models  # type: ignore[union-attr]
    status = ranks._processes.status()[rank - 1]  # type: ignore[union-attr]
    return status.process


def workers(llm: LLM) -> TensorParallelWorkers:
    worker = llm._runtime.engine._worker  # type: ignore[union-attr]
    if not isinstance(worker, TensorParallelWorkers):
        raise TypeError(f"{worker} is not several ranks")
    return worker


def met(llm: LLM) -> set[str]:
    """The files through which ranks have met."""
    ranks = llm._runtime.pools.models  # type: ignore[union-attr]
    return {path.name for path in ranks._listener.folder.glob("group*")}  # type: ignore[union-attr]


def returned(llm: LLM) -> int:
    return llm._runtime.engine._stats.returned_workers  # type: ignore[union-attr]


@pytest.mark.real
def test_two_ranks_give_the_text_of_one_and_survive_a_death(alone: LLM, model: Path) -> None:
    penalised: dict[str, Any] = {"temperature": 0.9, "seed": 5, "repetition_penalty": 1.2, "logprobs": 2}
    with engine(model, model_workers=2) as llm:
        assert texts(llm) == texts(alone)
        assert texts(llm, **penalised) == texts(alone, **penalised)
        assert scores(llm) == pytest.approx(scores(alone), abs=1e-4)
        before = process(llm)
        os.kill(before or 0, signal.SIGKILL)
        assert texts(llm) == texts(alone)
        assert process(llm) not in (None, before)
        assert returned(llm) == 1
        assert workers(llm).missing == ()
        assert met(llm) == {"group.2"}
    with pytest.raises(ProcessLookupError):
        os.kill(before or 0, 0)


@pytest.mark.soak
def test_three_ranks_and_repeated_heads_give_the_text_of_one(model: Path, tmp_path: Path) -> None:
    few = write_tiny_model(tmp_path / "few", num_key_value_heads=1)
    for folder in (model, few):
        with engine(folder) as llm:
            expected = texts(llm)
        with engine(folder, model_workers=3, policy="streaming(sink=4, recent=512)") as llm:
            assert texts(llm) == expected


@pytest.mark.real
@pytest.mark.parametrize("attention", [0, 1])
def test_prefixes_and_preemption_with_two_ranks(alone: LLM, model: Path, attention: int) -> None:
    prompts = [SHARED + [at] * (at + 1) for at in range(6)]
    expected = texts(alone, prompts, max_tokens=200)
    # Room for about three of the six at a time: a token takes 1,152 bytes.
    small = {"kv_memory": 900 * 1152, "max_model_len": 512}
    with engine(model, model_workers=2, attention_workers=attention, **small) as llm:
        assert texts(llm, prompts, max_tokens=200) == expected
        counters = llm._runtime.engine._scheduler.counters  # type: ignore[union-attr]
        assert counters.preempted > 0
        assert texts(llm, prompts, max_tokens=200) == expected
        assert counters.reused_tokens > 0
        if attention:  # each rank has a seat at the only attention worker
            assert llm._runtime.engine._holders.names == {2: "attention-0", 3: "attention-0"}  # type: ignore[union-attr]
            with pytest.raises(InvalidRequest, match="only attention worker"):
                llm._runtime.drain("attention-0")  # type: ignore[union-attr]


@pytest.mark.real
@pytest.mark.parametrize(
    ("attention", "shard"), [(0, "heads"), pytest.param(1, "heads", marks=pytest.mark.soak), (2, "sequence")]
)
@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.soak)])
def test_a_rank_killed_at_any_step_changes_no_text(
    alone: LLM, model: Path, attention: int, shard: str, seed: int
) -> None:
    expected = texts(alone, **LONG)
    chance = random.Random(seed)
    with engine(model, model_workers=2, attention_workers=attention, shard=shard) as llm:
        computed = llm._runtime.engine._scheduler.counters  # type: ignore[union-attr]
        ended = threading.Event()

        def kill() -> None:
            while not ended.wait(chance.uniform(0.05, 0.6)):
                if (victim := process(llm)) is not None and not workers(llm).missing:
                    os.kill(victim, signal.SIGKILL)
                    kills.append(victim)
                    if len(kills) == 2:
                        return

        kills: list[int] = []
        killer = threading.Thread(target=kill)
        killer.start()
        got = texts(llm, **LONG)
        ended.set()
        killer.join()
        assert got == expected
        assert kills
        until(lambda: not workers(llm).missing)
        assert returned(llm) >= 1
        if attention:  # their seats were there: nothing is computed again
            assert (computed.rebuilt_tokens, computed.admitted) == (0, len(PROMPTS))


@pytest.mark.soak
def test_a_rank_that_is_stopped_is_replaced(alone: LLM, model: Path) -> None:
    expected = texts(alone, **LONG)
    with engine(model, model_workers=2, attention_workers=1, worker_timeout=1.0) as llm:
        stopped = process(llm) or 0
        killer = threading.Timer(0.5, os.kill, [stopped, signal.SIGSTOP])
        killer.start()
        assert texts(llm, **LONG) == expected
        assert process(llm) != stopped


@pytest.mark.soak
def test_draining_moves_the_heads_of_all_ranks(alone: LLM, model: Path) -> None:
    expected = texts(alone, **LONG)
    with engine(model, model_workers=2, attention_workers=2) as llm:
        drained: list[int] = []

        def drain() -> None:
            time.sleep(0.5)
            drained.append(llm._runtime.drain("attention-0"))  # type: ignore[union-attr]

        thread = threading.Thread(target=drain)
        thread.start()
        got = texts(llm, **LONG)
        thread.join()
        assert got == expected
        assert drained[0] > 0
        assert set(llm._runtime.engine._holders.names.values()) == {"attention-1"}  # type: ignore[union-attr]


class TlsMembers(LocalModelWorkers):
    """Ranks that connect as ranks on other hosts do: over TCP with TLS, each with a secret of its own."""

    host = "127.0.0.1"

    def __init__(self, count: int, folder: Path) -> None:
        def command(name: str, address: str) -> list[str]:
            self.addresses.append(address)
            return [*model_command(name, address, 1), "--tls-dir", str(folder), "--address", "127.0.0.1"]

        super().__init__(count, threads=1, command=command)
        self.credentials = load_credentials(folder, server=True)
        self.addresses: list[str] = []


@pytest.mark.real
def test_ranks_over_tcp_with_tls_give_the_text_of_one(
    alone: LLM, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Peers and attention worker, as between hosts. Sums among ranks go in the clear, as `Meeting` says."""
    folder = tmp_path / "tls"
    credentials = make_credentials(folder, ["127.0.0.1"])
    flags = ["--tls-dir", str(folder), "--token-file", str(folder / "token"), "--no-local-channel"]
    members = TlsMembers(2, folder)
    monkeypatch.setattr(lamina.llm, "_start_runtime", lambda *given: start(*given, model_workers=members))
    with (
        worker_process(*flags, credentials=credentials) as worker,
        engine(
            model, model_workers=2, attention_workers=[worker.address], data_channel="tcp", local_channel=False,
            tls_dir=folder, token_file=folder / "token",
        ) as llm,
    ):  # fmt: skip
        assert texts(llm) == texts(alone)
        status = worker.status()
        assert (status.seats, status.channels, status.channel) == (2, 2, "tcp")
        assert met(llm) == set()
        assert {address.startswith("127.0.0.1:") for address in members.addresses} == {True}
        with pytest.raises(ChannelClosed):  # who speaks no TLS is not heard
            connect_tcp("127.0.0.1", split_address(members.addresses[0])[1], bytes(32), 5.0)


@pytest.mark.soak
def test_a_rank_that_keeps_ending_ends_the_engine(model: Path) -> None:
    config = EngineConfig(dtype="float32", kv_memory="16MiB", max_model_len=1024, model_workers=2)
    ends = threading.Event()

    def command(name: str, address: str) -> list[str]:
        return ["false"] if ends.is_set() else model_command(name, address, 1)

    members = LocalModelWorkers(2, threads=1, command=command)
    for slot in members._slots:  # so that the test need not wait for the delays of six restarts
        slot.backoff.first, slot.backoff.limit = 0.1, 2
    runtime = start(model, config, model_workers=members)
    try:
        ends.set()
        os.kill(members.status()[0].process or 0, signal.SIGKILL)
        until(lambda: not runtime.engine.alive)
    finally:
        runtime.stop()


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"model_workers": 7}, "7 ranks: it has 6 query heads"),
        ({"model_workers": 2, "device": "cuda:5"}, "cuda:5"),
        ({"model_workers": 2, "lanes": 2}, "lanes is 2 with 2 tensor-parallel model_workers; allowed are 1"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(model: Path, config: dict[str, Any], says: str) -> None:
    with pytest.raises(LaminaError, match=says) as error:
        engine(model, **config)
    assert isinstance(error.value, ValueError)


def test_a_rank_that_dies_while_it_loads_is_named_with_what_it_said(model: Path) -> None:
    config = EngineConfig(dtype="float32", kv_memory="16MiB", model_workers=2)
    says = "import sys; print('the last words', file=sys.stderr); sys.exit(3)"
    members = LocalModelWorkers(2, threads=1, command=lambda name, address: ["python3", "-c", says])
    with pytest.raises(EngineError, match=r"model worker 1 did not start, exit status 3\n  the last words"):
        start(model, config, model_workers=members)
