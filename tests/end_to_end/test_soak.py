"""Many short requests, some of them aborted: nothing grows."""

from __future__ import annotations

import gc
import random
import threading

import pytest

from lamina import LLM

pytestmark = [pytest.mark.data, pytest.mark.soak]


def resident() -> int:
    """Resident memory of this process in KiB."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))


@pytest.mark.fault("F29")
@pytest.mark.timeout(900)
def test_memory_pages_and_threads_stay_as_they_are():
    rng = random.Random(3)
    with LLM(max_model_len=256, kv_memory="64MiB", prefix_cache=False) as llm:
        sizes = {}
        threads = 0
        for count in range(1, 2001):
            prompt = [rng.randrange(100, 40000) for _ in range(rng.randint(1, 24))]
            events = llm.stream(prompt, max_tokens=rng.randint(1, 4), n=rng.choice((1, 1, 2)), temperature=1.0)
            if rng.random() < 0.3:
                next(events)
                events.close()
            else:
                list(events)
            if count in (200, 2000):
                gc.collect()
                sizes[count], threads = resident(), threads or threading.active_count()
        llm.generate("x", max_tokens=1)
        assert threading.active_count() == threads
        assert not llm._runtime.engine._registry.requests
    assert sizes[2000] <= sizes[200] * 1.02, sizes
