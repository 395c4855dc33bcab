"""Requests under way at an engine, while its holders change."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from engine_rig import Rig

from lamina.sampling_params import SamplingParams


class Streams:
    """Requests of which each has its first `begun` of so many tokens."""

    def __init__(self, rig: Rig, prompts: Sequence[Sequence[int]], tokens: int, begun: int = 1) -> None:
        params = SamplingParams(max_tokens=tokens).with_defaults({})
        self._inboxes = [rig.submit(prompt, params)[1] for prompt in prompts]
        self._tokens: list[list[int]] = [[] for _ in prompts]
        self._whole = tokens
        self.read(begun)

    def read(self, count: int) -> None:
        """Wait until each request has so many tokens."""
        for tokens, inbox in zip(self._tokens, self._inboxes, strict=True):
            while len(tokens) < count:
                for output in inbox.get(timeout=60):
                    if output.error is not None:
                        raise output.error
                    tokens.append(output.token)

    def tokens(self) -> list[list[int]]:
        """All of them, once the requests have ended."""
        self.read(self._whole)
        return self._tokens


@contextmanager
def held(rig: Rig) -> Iterator[None]:
    """The engine stands still between two batches; what is asked of it meanwhile comes at once."""
    stands, goes = threading.Event(), threading.Event()
    rig.engine.snapshot(lambda _: (stands.set(), goes.wait(60)))
    assert stands.wait(60)
    yield
    goes.set()
