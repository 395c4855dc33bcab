"""The share of KV that is attended in the engine's process, through `LLM` over a real worker process."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from real_workers import WorkerProcess, worker_process, write_tiny_model

from lamina import LLM
from lamina.cli.options import EngineOptions
from lamina.config import EngineConfig
from lamina.errors import InvalidRequest
from lamina.messages.snapshot import Snapshot

chance = random.Random(3)
PROMPTS = [[chance.randrange(101) for _ in range(n)] for n in (5, 60, 33, 90, 48, 71)]
TOKENS = 60


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def worker() -> Iterator[WorkerProcess]:
    with worker_process() as one:
        yield one


def running(model: Path, **options: Any) -> LLM:
    defaults = {"dtype": "float32", "threads": 1, "page_size": 16, "kv_memory": "16MiB", "prefix_cache": False}
    return LLM(model, **{**defaults, "max_batch_tokens": 128, "lanes": 1, **options})


def tokens(llm: LLM) -> list[list[int]]:
    found: list[list[int]] = [[] for _ in PROMPTS]
    for event in llm.stream(PROMPTS, max_tokens=TOKENS, temperature=0, ignore_eos=True):
        found[event.prompt_index].append(event.token_id)
    return found


@pytest.fixture(scope="module")
def expected(model: Path) -> list[list[int]]:
    with running(model) as llm:
        return tokens(llm)


def look(llm: LLM) -> Snapshot:
    seen: list[Snapshot] = []
    there = threading.Event()
    llm._runtime.engine.snapshot(lambda taken: (seen.append(taken), there.set())[1])  # type: ignore[union-attr]
    assert there.wait(30)
    return seen[0]


@pytest.mark.parametrize("share", [0, 0.5, 1, "auto"])
def test_text_stays_the_same_at_any_local_share(model, worker, expected, share):
    with running(model, attention_workers=[worker.address], local_share=share) as llm:
        assert tokens(llm) == expected
        names = [holder.name for holder in look(llm).holders]
        assert ("here" in names) == (share != 0)


def test_fixed_local_share_is_kept(model, worker):
    with running(model, attention_workers=[worker.address], local_share=0.5) as llm:
        shares = []
        for count, _ in enumerate(llm.stream(PROMPTS, max_tokens=TOKENS, temperature=0, ignore_eos=True)):
            if count > 30 and count % 10 == 0 and count < TOKENS * 5:
                shares.append(look(llm).local_share)
        assert all(0.3 < share < 0.7 for share in shares)


@pytest.mark.parametrize(("share", "queries"), [(1, False), (0, True)])
def test_worker_is_asked_only_when_the_local_share_is_below_one(model, worker, share, queries):
    with running(model, attention_workers=[worker.address], local_share=share) as llm:
        tokens(llm)
        exchanges = {holder.name: sum(holder.exchange_counts) for holder in look(llm).holders if not holder.local}
        assert all((count > 0) == queries for count in exchanges.values())


@pytest.mark.parametrize("share", [-0.1, 1.1, "half", True, None, float("nan")])
def test_config_refuses_a_local_share_out_of_range_and_names_it(share):
    with pytest.raises(InvalidRequest, match=r'local_share is .*; allowed are 0 to 1, or "auto"'):
        EngineConfig(local_share=share)


def test_command_line_passes_the_local_share_on():
    assert EngineOptions(local_share="0.25").config()["local_share"] == 0.25
    assert EngineOptions(local_share="auto").config()["local_share"] == "auto"
    assert "local_share" not in EngineOptions().config()


def test_local_memory_goes_to_prompts_when_there_is_too_little_for_both(model, worker):
    least = 3 * 3 * 2 * 16 * 4 * 16  # a page for each layer and head
    with running(model, attention_workers=[worker.address], kv_memory=3 * least) as llm:
        assert "here" not in [holder.name for holder in look(llm).holders]


@pytest.mark.real
@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.soak) for n in range(1, 6))])
def test_text_stays_the_same_when_a_worker_is_killed_during_moves(model, expected, seed):
    """One of two workers is killed at a random moment, while the wanted share changes all the time."""
    rng = random.Random(seed)
    with worker_process() as one, worker_process() as two:
        options = {"attention_workers": [one.address, two.address], "worker_timeout": 3.0}
        with running(model, local_share=0.5, lanes=1 + seed % 2, **options) as llm:
            engine = llm._runtime.engine  # type: ignore[union-attr]
            over = threading.Event()

            def change() -> None:
                while not over.wait(rng.random() * 0.02):
                    engine._control.local_share.share = rng.choice((0.0, 0.5, 1.0))

            changing = threading.Thread(target=change)
            changing.start()
            try:
                found: list[list[int]] = [[] for _ in PROMPTS]
                last = rng.randrange(TOKENS * 4)
                for count, event in enumerate(llm.stream(PROMPTS, max_tokens=TOKENS, temperature=0, ignore_eos=True)):
                    found[event.prompt_index].append(event.token_id)
                    if count == last:
                        one.process.send_signal(signal.SIGKILL)
                        time.sleep(0.01)
            finally:
                over.set()
                changing.join()
            assert found == expected
            engine._scheduler.check_integrity()
