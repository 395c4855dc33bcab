"""KV and samples of queries on their way from one holder to another, through the model worker."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch

from lamina_protocols.layers import STATES, HolderConfig
from lamina_protocols.messages import Fetch, Fetched, FetchedPages, FetchPages, Fresh, FreshPages
from lamina_protocols.pools import Pool, pools
from lamina_protocols.query_samples import FetchedSample, FetchSample, Sample
from lamina_protocols.routes import Route
from lamina_workers.attention_worker.page_layout import page_bytes
from lamina_workers.model_worker.kv_copy import Copy, Move
from lamina_workers.model_worker.prompt_samples import check_sample, moved_sample
from lamina_workers.ports.port import InProcess, Replies

_AHEAD = 8  # layers that are asked for before the first of them has come
_FRAME = 2 << 20  # bytes of pages that are asked for at a time, about: each costs 0.1 ms besides what it carries
_FRAMES_AHEAD = 8  # of them are asked for before the first has come, where another process makes them meanwhile


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

    def run(self, moves: Sequence[Move], holders: Collection[int], sampling: Mapping[tuple[int, int], Route]) -> None:
        """Make the moves between these holders. `sampling` has the routes of the parts whose holders want samples of
        queries too, by holder and part."""
        names = {self._replies[number].port.page_layout for number in holders}
        alike = len(names) == 1 and names != {""}
        for number, pool in enumerate(pools(self._holder)):
            if own := [move for move in moves if move.pool == number]:
                self._pool(Copy(own), number, pool, alike)
                self._samples(own, pool, sampling)

    def _pool(self, copy: Copy, number: int, pool: Pool, alike: bool) -> None:
        """Copy what one pool keeps. `alike`: the holders lay out their pages alike."""
        left = set(range(len(pool.layers)))
        if (copy.paged and alike) or pool.config.layers[0].kind in STATES:  # states have no vectors
            left = self._pages(copy, number, pool.config)
        layers = zip(pool.layers, pool.config.layers, strict=True)
        self._vectors(copy, [layer for layer, spec in layers if spec.kv_layer in left])

    def _samples(self, moves: Sequence[Move], pool: Pool, sampling: Mapping[tuple[int, int], Route]) -> None:
        """Copy what is kept of prompts' queries, for the parts whose holders want it."""
        targets: dict[tuple[int, int], list[Move]] = {}
        for move in moves:
            if (move.to, move.target) in sampling:
                targets.setdefault((move.to, move.target), []).append(move)
        for number, spec in zip(pool.layers, pool.config.layers, strict=True):
            ids = (*self._ids, number)
            for target, those in targets.items():
                for move in those:
                    self._send(move.origin, FetchSample(*ids, move.source, move.lo, move.hi))
                arrived = [
                    self._replies[m.origin].take(FetchedSample, self._batch, number, self._patience) for m in those
                ]
                for move, reply in zip(those, arrived, strict=True):
                    check_sample(self._replies[move.origin], reply, spec, sampling[target].row.prompt)
                if (sample := moved_sample(ids, sampling[target], spec, arrived)) is not None:
                    self._send(target[0], sample)

    def _vectors(self, copy: Copy, layers: Sequence[int]) -> None:
        """Copy these layers token by token."""
        asked = 0
        for number, layer in enumerate(layers):
            for ahead in layers[asked : number + _AHEAD]:
                for origin, handle, lo, hi in copy.sources:
                    self._send(origin, Fetch(*self._ids, ahead, handle, lo, hi))
            asked = max(asked, number + _AHEAD)
            arrived = [self._fetched(layer, *source, copy) for source in copy.sources]
            for target, k, v in copy.filled(arrived):
                self._send(target, Fresh(*self._ids, layer, k, v))

    def _fetched(self, layer: int, origin: int, handle: int, lo: int, hi: int, copy: Copy) -> Fetched:
        """The vectors of one layer that were asked of one part. Raises HolderFault, HolderLost."""
        spec, replies = self._holder.layers[layer], self._replies[origin]
        reply = replies.take(Fetched, self._batch, layer, self._patience)
        vectors = (hi - lo) * copy.heads[origin, handle]
        found = tuple(reply.k.shape), tuple(reply.v.shape)
        floats = reply.k.is_floating_point() and reply.k.dtype == reply.v.dtype
        if not floats or found != ((vectors, spec.key_width), (vectors, spec.own_v)):
            raise replies.unfit(f"{vectors} vectors of K and of V were due, got {reply.k.dtype} {found}")
        return reply

    def _pages(self, copy: Copy, pool: int, config: HolderConfig) -> set[int]:
        """Copy all layers of a pool with KV page by page. Returns those of which an origin has not all pages."""
        states, count = config.layers[0].kind in STATES, 1 + max(spec.kv_layer for spec in config.layers)
        of_page = page_bytes(config)
        pages = [
            copy.heads[origin, handle] * (1 if states else -(-(hi - lo) // config.page_size))
            for origin, handle, lo, hi in copy.sources
        ]
        step = max(1, _FRAME // (sum(pages) * of_page))
        frames = [(first, min(step, count - first)) for first in range(0, count, step)]
        here = any(isinstance(self._replies[origin].port, InProcess) for origin, *_ in copy.sources)
        most = 1 if here else _FRAMES_AHEAD
        asked = 0
        left: set[int] = set()
        for number, (first, layers) in enumerate(frames):
            if asked < number + (most + 1) // 2:  # several at once: each time a process is woken
                for ahead in frames[asked : number + most]:
                    for origin, handle, lo, hi in copy.sources:
                        self._send(origin, FetchPages(*self._ids, *ahead, handle, lo, hi))
                asked = number + most
            arrived = [
                self._replies[origin].take(FetchedPages, self._batch, first, self._patience)
                for origin, *_ in copy.sources
            ]
            for reply, due, (origin, *_) in zip(arrived, pages, copy.sources, strict=True):
                found = reply.pages.dtype, tuple(reply.pages.shape)
                if (reply.pages.numel() or states) and found != (torch.uint8, (layers * due, of_page)):
                    raise self._replies[origin].unfit(f"pages [{layers * due}, {of_page}] were due, got {found}")
            if all(reply.pages.numel() for reply in arrived):
                for target, content in copy.pages(arrived, layers):
                    self._send(target, FreshPages(*self._ids, pool, first, layers, content))
            else:
                left.update(range(first, first + layers))
        return left

    def _send(self, number: int, message: Fetch | Fresh | FetchPages | FetchSample | FreshPages | Sample) -> None:
        self._replies[number].port.send(message)
