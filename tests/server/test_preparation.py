"""Who gets a thread to prepare a request, and what happens to work that nobody waits for."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from lamina.server.http.errors import ApiError
from lamina.server.preparation import PreparationPool, go_on

PATIENCE = 10.0


@pytest.fixture
def pool() -> Iterator[PreparationPool]:
    pool = PreparationPool("test", 4, 64, 2)
    yield pool
    pool.close()


async def until(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + PATIENCE
    while not condition() and time.monotonic() < end:
        await asyncio.sleep(0.005)
    return condition()


def test_a_key_leaves_a_thread_to_others(pool: PreparationPool) -> None:
    """Four requests of one key held all four threads, and every other key waited for seconds."""
    go = threading.Event()

    async def main() -> str:
        slow = [asyncio.ensure_future(pool.run("a", go.wait)) for _ in range(12)]
        await asyncio.sleep(0.05)
        try:
            return await asyncio.wait_for(pool.run("b", lambda: "done"), PATIENCE)
        finally:
            go.set()
            await asyncio.gather(*slow)

    assert asyncio.run(main()) == "done"


def test_keys_take_turns() -> None:
    """Work was done as it came: one key's after all of another key's queue."""
    order: list[str] = []
    one = PreparationPool("test", 1, 64, 2)

    async def main() -> None:
        work = [one.run(key, lambda key=key: order.append(key)) for key in "aaaaaabbb"]
        await asyncio.gather(*work)

    asyncio.run(main())
    one.close()
    assert order.index("b") <= 2
    assert "".join(order[:6]).count("b") >= 2


def test_work_that_nobody_waits_for_ends_and_its_thread_is_free(pool: PreparationPool) -> None:
    """A client that had left was worked for to the end: its thread was taken for 28 s."""
    parts: list[int] = []
    begun = threading.Event()

    def work() -> None:
        for part in range(100_000):
            go_on()
            parts.append(part)
            begun.set()
            time.sleep(0.001)

    async def main() -> None:
        left = [asyncio.ensure_future(pool.run("a", work)) for _ in range(8)]  # more than its threads
        assert await until(begun.is_set)
        for each in left:
            each.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        assert await until(lambda: pool._threads.held("a") == 0)
        assert await asyncio.gather(*(pool.run("a", lambda: 7) for _ in range(8))) == [7] * 8

    asyncio.run(main())
    assert len(parts) < 50_000


def test_a_full_queue_is_full_for_its_key_only() -> None:
    """The queue was one for all keys."""
    pool, go = PreparationPool("test", 2, 8, 2), threading.Event()

    async def main() -> None:
        waiting = [asyncio.ensure_future(pool.run("a", go.wait)) for _ in range(6)]
        await asyncio.sleep(0.05)
        with pytest.raises(ApiError, match="6 requests are being prepared") as refusal:
            await pool.run("a", go.wait)
        assert refusal.value.status == 429
        other = asyncio.ensure_future(pool.run("b", go.wait))
        go.set()
        assert all(await asyncio.gather(*waiting, other))

    asyncio.run(main())
    pool.close()


def test_errors_are_raised_where_the_work_is_waited_for(pool: PreparationPool) -> None:
    def work() -> None:
        raise KeyError("here")

    with pytest.raises(KeyError, match="here"):
        asyncio.run(pool.run("a", work))


def test_outside_of_a_pool_work_goes_on() -> None:
    go_on()
