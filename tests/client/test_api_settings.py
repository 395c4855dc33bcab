"""What `configure` and the environment say of the models that `lamina.generate` loads."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import lamina
from lamina import InvalidRequest, api
from lamina.messages.snapshot import Snapshot

SMALL: dict[str, Any] = {"dtype": "float32", "kv_memory": "16M", "threads": 1}


@pytest.fixture(autouse=True)
def afresh() -> Iterator[None]:
    yield
    lamina.configure()
    lamina.close()


def test_generate_has_the_workers_that_configure_names(model: Path) -> None:
    lamina.configure(attention_workers=1, **SMALL)
    first = lamina.generate([3, 1, 4], max_tokens=6, ignore_eos=True, model=model)
    kept = api._llm(model)
    snapshots: queue.SimpleQueue[Snapshot] = queue.SimpleQueue()
    kept._runtime.engine.snapshot(snapshots.put)
    assert [holder.name for holder in snapshots.get(timeout=60).holders] == ["local", "attention-0"]
    lamina.configure(attention_workers=1, **SMALL)
    assert api._llm(model) is kept
    lamina.configure(**SMALL)
    assert not kept.alive
    assert lamina.generate([3, 1, 4], max_tokens=6, ignore_eos=True, model=model).token_ids == first.token_ids


def test_the_environment_names_what_configure_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    words = {
        "THREADS": "2", "KV_MEMORY": "16M", "PREFIX_CACHE": "false", "WORKER_TIMEOUT": "2.5", "DEVICE": "cpu",
        "ATTENTION_WORKERS": "a:1, b:2", "POLICY": "auto",
    }  # fmt: skip
    for name, text in words.items():
        monkeypatch.setenv(f"LAMINA_{name}", text)
    made: list[dict[str, Any]] = []

    class Loaded:
        alive = True

        def __init__(self, model: object, **options: Any) -> None:
            made.append(options)

        def close(self) -> None: ...

        def check_process(self) -> None: ...

    monkeypatch.setattr(api, "LLM", Loaded)
    lamina.configure(threads=1)
    api._llm("m")
    assert made == [
        {
            "threads": 1, "kv_memory": "16M", "prefix_cache": False, "worker_timeout": 2.5, "device": "cpu",
            "attention_workers": ["a:1", "b:2"], "policy": "auto",
        }
    ]  # fmt: skip
    for text, workers in (("4", 4), ("a:1", ["a:1"])):
        monkeypatch.setenv("LAMINA_ATTENTION_WORKERS", text)
        assert api._from_environment()["attention_workers"] == workers
    monkeypatch.setenv("LAMINA_ATTENTION_WORKERS", "2")
    monkeypatch.setenv("LAMINA_AUTOSCALE", "0:3")
    assert api._from_environment()["autoscale"] == [0, 3]


def test_a_wrong_setting_is_refused_when_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidRequest, match="shard is 'by halves'"):
        lamina.configure(shard="by halves")
    for text in ("many", "08"):
        monkeypatch.setenv("LAMINA_THREADS", text)
        with pytest.raises(InvalidRequest, match=f"threads is '{text}'"):
            lamina.configure()
    monkeypatch.delenv("LAMINA_THREADS")
