"""KV and samples of queries on their way from one holder to another, through the model worker.

A transfer is a run that is suspended after each frame that it has asked for, so that batches go on meanwhile: little
enough is on its way at a time that their messages do not wait long behind it.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterable, Mapping, Sequence
from typing import TypeVar

import torch

from lamina_protocols.messages.layers import STATES, HolderConfig
from lamina_protocols.messages.messages import (
    Fetch,
    Fetched,
    FetchedPages,
    FetchedSample,
    FetchPages,
    FetchSample,
    Fresh,
    FreshPages,
    Sample,
)
from lamina_protocols.messages.pools import Pool, pools
from lamina_protocols.messages.routes import Route
from lamina_workers.attention_worker.page_layout import page_bytes
from lamina_workers.errors import HolderFault
from lamina_workers.model_worker.interface import Waiting
from lamina_workers.model_worker.kv_copy import Copy, Move
from lamina_workers.model_worker.prompt_samples import check_sample, moved_sample
from lamina_workers.ports.port import Replies

_AHEAD = 4  # layers that are asked for before the first of them has come
_FRAME = 256 << 10  # bytes of pages that are asked for at a time, about: each costs 0.1 ms besides what it carries
_FRAMES_AHEAD = 8  # of them are asked for before the first has come, where another process makes them meanwhile

R = TypeVar("R", Fetched, FetchedPages, FetchedSample)


class KvTransfer:
    """The copies of one batch that the targets have accepted. ids: its epoch and number; `patience`: seconds that a
    holder may take for an answer. Raises HolderFault, HolderLost."""

    def __init__(
        self, holder: HolderConfig, replies: Mapping[int, Replies], patience: float, ids: tuple[int, int]
    ) -> None:
        self._holder = holder
        self._replies = replies
        self._patience = patience
        self._ids = ids
        self._batch = ids[1]

    def run(
        self, moves: Sequence[Move], holders: Collection[int], sampling: Mapping[tuple[int, int], Route]
    ) -> Generator[Waiting, None, None]:
        """Make the moves between these holders. `sampling` has the routes of the parts whose holders want samples of
        queries too, by holder and part."""
        names = {self._replies[number].port.page_layout for number in holders}
        alike = len(names) == 1 and names != {""}
        for number, pool in enumerate(pools(self._holder)):
            if pool_moves := [move for move in moves if move.pool == number]:
                yield from self._pool(Copy(pool_moves), number, pool, alike)
                yield from self._samples(pool_moves, pool, sampling)

    def _arrived(self, kind: type[R], origins: Iterable[int], layer: int) -> Generator[Waiting, None, list[R]]:
        """The next answer of each of these holders. It is suspended even where that is there: what follows takes
        time."""
        arrived = []
        for origin in origins:
            replies = self._replies[origin]
            yield Waiting(replies, self._batch)
            arrived.append(replies.take(kind, self._batch, layer, self._patience))
        return arrived

    def _pool(self, copy: Copy, number: int, pool: Pool, alike: bool) -> Generator[Waiting, None, None]:
        """Copy what one pool keeps. `alike`: the holders lay out their pages alike."""
        if copy.xor and not (copy.paged and alike):
            raise HolderFault("pages are to be XORed of attention workers that lay them out differently")
        if (copy.paged and alike) or pool.config.layers[0].kind in STATES:  # states have no vectors
            yield from self._pages(copy, number, pool.config)
        else:
            yield from self._vectors(copy, pool.layers)

    def _samples(
        self, moves: Sequence[Move], pool: Pool, sampling: Mapping[tuple[int, int], Route]
    ) -> Generator[Waiting, None, None]:
        """Copy what is kept of prompts' queries, for the parts whose holders want it."""
        targets: dict[tuple[int, int], list[Move]] = {}
        for move in moves:
            if (move.to, move.target) in sampling:
                targets.setdefault((move.to, move.target), []).append(move)
        for number, spec in zip(pool.layers, pool.config.layers, strict=True):
            ids = (*self._ids, number)
            for target, target_moves in targets.items():
                for move in target_moves:
                    self._send(move.origin, FetchSample(*ids, move.source, move.lo, move.hi))
                arrived = yield from self._arrived(FetchedSample, (move.origin for move in target_moves), number)
                for move, reply in zip(target_moves, arrived, strict=True):
                    check_sample(self._replies[move.origin], reply, spec, sampling[target].row.prompt)
                if (sample := moved_sample(ids, sampling[target], spec, arrived)) is not None:
                    self._send(target[0], sample)

    def _vectors(self, copy: Copy, layers: Sequence[int]) -> Generator[Waiting, None, None]:
        """Copy these layers token by token."""
        next_request = 0
        for number, layer in enumerate(layers):
            for ahead in layers[next_request : number + _AHEAD]:
                for origin, handle, lo, hi in copy.sources:
                    self._send(origin, Fetch(*self._ids, ahead, handle, lo, hi))
            next_request = max(next_request, number + _AHEAD)
            arrived = yield from self._arrived(Fetched, (origin for origin, *_ in copy.sources), layer)
            for source, reply in zip(copy.sources, arrived, strict=True):
                self._check(layer, *source, copy, reply)
            for target, k, v in copy.filled(arrived):
                self._send(target, Fresh(*self._ids, layer, k, v))

    def _check(self, layer: int, origin: int, handle: int, lo: int, hi: int, copy: Copy, reply: Fetched) -> None:
        """Raise HolderLost unless the vectors of one layer are those that were asked of a part."""
        spec, vectors = self._holder.layers[layer], (hi - lo) * copy.heads[origin, handle]
        shapes = tuple(reply.k.shape), tuple(reply.v.shape)
        floats = reply.k.is_floating_point() and reply.k.dtype == reply.v.dtype
        if not floats or shapes != ((vectors, spec.key_width), (vectors, spec.own_v)):
            raise self._replies[origin].unfit(f"{vectors} vectors of K and of V were due, got {reply.k.dtype} {shapes}")

    def _pages(self, copy: Copy, pool: int, config: HolderConfig) -> Generator[Waiting, None, None]:
        """Copy all layers of a pool with KV page by page."""
        states, count = config.layers[0].kind in STATES, 1 + max(spec.kv_layer for spec in config.layers)
        of_page = page_bytes(config)
        pages = [
            copy.heads[origin, handle] * (1 if states else -(-(hi - lo) // config.page_size))
            for origin, handle, lo, hi in copy.sources
        ]
        step = max(1, _FRAME // (sum(pages) * of_page))
        frames = [(first, min(step, count - first)) for first in range(0, count, step)]
        in_process = any(self._replies[origin].here is not None for origin, *_ in copy.sources)
        window = 1 if in_process or copy.circular else _FRAMES_AHEAD  # else both could wait for the other to read
        next_request = 0
        for number, (first, layers) in enumerate(frames):
            if next_request < number + (window + 1) // 2:  # several at once: each time a process is woken
                for ahead in frames[next_request : number + window]:
                    for origin, handle, lo, hi in copy.sources:
                        self._send(origin, FetchPages(*self._ids, *ahead, handle, lo, hi))
                next_request = number + window
            arrived = yield from self._arrived(FetchedPages, (origin for origin, *_ in copy.sources), first)
            for reply, due, (origin, *_) in zip(arrived, pages, copy.sources, strict=True):
                shapes = reply.pages.dtype, tuple(reply.pages.shape)
                if shapes != (torch.uint8, (layers * due, of_page)):
                    raise self._replies[origin].unfit(f"pages [{layers * due}, {of_page}] were due, got {shapes}")
            for target, content in copy.pages(arrived, layers):
                self._send(target, FreshPages(*self._ids, pool, first, layers, content))

    def _send(self, number: int, message: Fetch | Fresh | FetchPages | FetchSample | FreshPages | Sample) -> None:
        self._replies[number].port.send(message)
