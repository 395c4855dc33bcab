"""The same function of many things, on all cores: by processes that are forked off this one, and end with the last."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any, TypeVar

A = TypeVar("A")
B = TypeVar("B")

_todo: tuple[Callable[[Any], Any], list[Any]]  # of a process of the pool


def on_all_cores(function: Callable[[A], B], items: Iterable[A]) -> Iterator[B]:
    """As `map`: the results in order, each as soon as those before it are there. What the function changes in memory is
    lost. One after another where there is one core, or one thing; and on systems where a fork is not safe."""
    every = list(items)
    processes = min(len(every), _cores())
    if processes < 2 or not sys.platform.startswith("linux"):
        yield from map(function, every)
        return
    # A fork has function and items as they are, closures too; results alone are sent.
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(processes, context, _begin, (function, every))
    try:
        yield from pool.map(_do, range(len(every)), chunksize=max(1, len(every) // (16 * processes)))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _begin(function: Callable[[Any], Any], items: list[Any]) -> None:
    global _todo
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; this one's parent ends it
    _todo = function, items


def _do(number: int) -> Any:
    function, items = _todo
    return function(items[number])
