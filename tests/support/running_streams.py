"""Requests under way at an engine, while its holders change."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import cycle
from typing import Any

from engine_rig import Rig

from lamina.sampling_params import SamplingParams


class Streams:
    """Requests of which each has its first `begun` of so many tokens. The `samplings` take turns."""

    def __init__(
        self,
        rig: Rig,
        prompts: Sequence[Sequence[int]],
        tokens: int,
        begun: int = 1,
        samplings: Sequence[Mapping[str, Any]] = ({},),
    ) -> None:
        params = [
            SamplingParams(max_tokens=tokens, **sampling).with_defaults({"do_sample": True} if sampling else {})
            for sampling in samplings
        ]
        self._inboxes = [rig.submit(prompt, one)[1] for prompt, one in zip(prompts, cycle(params))]
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
