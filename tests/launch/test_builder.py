"""A start that fails leaves nothing behind, whichever of its steps fails."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from lamina.config import EngineConfig
from lamina.errors import EngineError, InvalidRequest, LaminaError
from lamina.launch.builder import Pools, start
from lamina.launch.journal_setup import Identity


class Workers:
    """Attention workers, or the processes of model workers, that do not start. `log` has what they were asked for."""

    host = None
    credentials = None

    def __init__(self, name: str, log: list[str], fails: bool = True) -> None:
        self._name = name
        self._log = log
        self._fails = fails

    def begin(self, progress: Any) -> None:
        self._log.append(f"{self._name} begin")

    def watch(self, engine: Any) -> None:
        self._log.append(f"{self._name} watch")

    def start(self, *given: Any) -> Any:
        self._log.append(f"{self._name} start")
        if self._fails:
            raise EngineError(f"the {self._name} workers do not start")

    def lost(self, name: str) -> None:
        self._log.append(f"{self._name} lost {name}")

    def close(self) -> None:
        self._log.append(f"{self._name} close")


def failed(model: Path, raises: type[LaminaError], says: str, *given: Any, **settings: Any) -> None:
    config = EngineConfig(**{"dtype": "float32", "kv_memory": "16MiB", "max_model_len": 1024, **settings})
    before = threading.enumerate()  # a pool of the kernels may be there from other tests
    with pytest.raises(raises, match=says):
        start(model, config, None, *given)
    left = [thread.name for thread in threading.enumerate() if thread not in before]
    assert [name for name in left if name.startswith("lamina-")] == []


def test_attention_workers_that_do_not_start_are_closed_with_the_journal(model: Path, tmp_path: Path) -> None:
    for _ in range(2):  # the second start would find the journal in use
        log: list[str] = []
        failed(model, EngineError, "attention workers do not start", Workers("attention", log), journal=tmp_path)
        assert log == ["attention start", "attention close"]


def test_model_workers_that_do_not_start_are_closed_before_the_attention_workers(model: Path) -> None:
    log: list[str] = []
    attention, models = Workers("attention", log, fails=False), Workers("model", log)
    failed(model, EngineError, "model workers do not start", attention, None, models, model_workers=2)
    assert log == ["model start", "model close", "attention close"]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"model_workers": 2, "model_parallel": "replicas"}, "replicas without attention_workers"),
        ({"kv_memory": 1000}, "kv_memory is 1000 bytes"),
        ({"rope_scaling": {"rope_type": "mystery"}}, "mystery"),
        ({"max_model_len": 1 << 20}, "the model's context"),
        ({"kv_memory": "64KiB"}, "holds [0-9]+ tokens"),
        ({"attention_workers": ["192.0.2.1:7"]}, "on another host"),
    ],
)
def test_settings_that_contradict_the_model_or_one_another_are_refused(
    model: Path, tmp_path: Path, settings: dict[str, Any], says: str
) -> None:
    for _ in range(2):
        failed(model, InvalidRequest, says, journal=tmp_path, **settings)


@pytest.mark.parametrize("there", [(True, True), (True, False), (False, True), (False, False)])
def test_pools_begin_watch_and_close_the_workers_that_there_are(there: tuple[bool, bool]) -> None:
    log: list[str] = []
    attention, models = (
        Workers(name, log) if is_there else None for name, is_there in zip(("attention", "models"), there, strict=True)
    )
    pools = Pools(None, Identity(), cast(Any, attention), cast(Any, models))
    steps: list[tuple[str, Callable[[], None]]] = [
        ("begin", lambda: pools.begin(None)),
        ("watch", lambda: pools.watch(cast(Any, None))),
        ("close", pools.close),
    ]
    for step, do in steps:
        log.clear()
        do()
        expected = {f"{name} {step}" for name, is_there in zip(("attention", "models"), there, strict=True) if is_there}
        assert set(log) == expected
