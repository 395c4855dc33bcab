"""Shared by the tests of whole engines: attention workers in processes of their own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
from real_workers import WorkerProcess, worker_process


@pytest.fixture(scope="session")
def workers() -> Iterator[list[WorkerProcess]]:
    """Two that serve one engine after another."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(worker_process()) for _ in range(2)]
