"""What other holders fetch of a worker's parts: keys and values of a range, or whole pages as they lie."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from lamina_kernels.paged.pages import Pages, gather, gather_heads, whole
from lamina_protocols.errors import ProtocolError
from lamina_protocols.messages.layers import HolderConfig
from lamina_protocols.messages.messages import Fetch, Fetched, FetchedPages, FetchPages, FreshPages
from lamina_workers.attention_worker.kv_parts import Part
from lamina_workers.attention_worker.kv_store import KVStore
from lamina_workers.attention_worker.paged_reader import PagedReader
from lamina_workers.errors import KVError


class KvFetch:
    """Answers `Fetch` and `FetchPages` for one pool of a worker, whose pages lie on `device`."""

    def __init__(
        self, config: HolderConfig, store: KVStore, pages: Pages, reader: PagedReader, device: torch.device
    ) -> None:
        self._config = config
        self._store = store
        self._pages = pages
        self._reader = reader
        self._device = device

    def fetch_pages(self, message: FetchPages) -> FetchedPages:
        """Raises KVError where a part has not what is asked for, ProtocolError for layers that are not there."""
        part = self._held(message)
        slots = page_slots(part.lo, message.lo, message.hi, self._config.page_size)
        tables = part.table[layers_of(message, self._config), :, slots]
        if self._reader.keeps_means(part) and (tables < 0).any():
            pages = torch.empty(0, 0, dtype=torch.uint8)
        else:
            pages = whole(self._pages, indices(tables.reshape(-1)).to(self._device)).cpu()
        return FetchedPages(message.epoch, message.batch, message.layer, pages)

    def fetch(self, layer: int, message: Fetch) -> Fetched:
        """`layer`: the number of the message's layer within the pool. Raises KVError as `fetch_pages`."""
        part, lo, hi = self._held(message), message.lo, message.hi
        spec, size = self._config.layers[layer], self._config.page_size
        first = (lo - part.lo) // size
        tables = part.table[spec.kv_layer, :, first : -(-(hi - part.lo) // size)]
        skip = lo - part.lo - first * size
        if (tables >= 0).all():
            all_k, all_v = gather_heads(self._pages, indices(tables).to(self._device))
            some = slice(skip, skip + hi - lo)
            flat_k, flat_v = (x[some].flatten(0, 1).cpu() for x in (all_k, all_v[..., : spec.own_v]))
            return Fetched(message.epoch, message.batch, message.layer, flat_k, flat_v)
        k = torch.empty(hi - lo, len(part.heads), spec.key_width, dtype=self._pages.layout.loaded)
        v = torch.empty(hi - lo, len(part.heads), spec.own_v, dtype=self._pages.layout.loaded)
        for head, table in enumerate(tables):
            pages = torch.from_numpy(np.maximum(table, 0))
            of_k, of_v = (x.cpu() for x in gather(self._pages, pages, hi - lo + skip))
            gone = torch.from_numpy(np.repeat(table < 0, size)[: hi - lo + skip, None])
            for_k, for_v = self._reader.mean(message.handle, spec.kv_layer, head)
            k[:, head] = torch.where(gone, for_k.to(of_k.dtype), of_k)[skip:]
            v[:, head] = torch.where(gone, for_v.to(of_v.dtype), of_v)[skip:, : spec.own_v]
        return Fetched(message.epoch, message.batch, message.layer, k.flatten(0, 1), v.flatten(0, 1))

    def _held(self, message: Fetch | FetchPages) -> Part:
        """The part of a request. Raises KVError unless it holds the positions that are asked for."""
        part, lo, hi = self._store.part(message.handle), message.lo, message.hi
        if not part.lo <= lo <= hi <= part.stored:
            raise KVError(f"[{lo}, {hi}) of part {message.handle} asked for, it holds [{part.lo}, {part.stored})")
        return part


def layers_of(message: FetchPages | FreshPages, config: HolderConfig) -> slice:
    """The layers with KV that a message of pages is about. Raises ProtocolError where some are not there."""
    first, end = message.layer, message.layer + message.layers
    there = 1 + max(spec.kv_layer for spec in config.layers)
    if not 0 <= first < end <= there:
        raise ProtocolError(f"KV of layers [{first}, {end}), there are {there}")
    return slice(first, end)


def page_slots(begin: int, lo: int, hi: int, size: int) -> slice:
    """The slots of positions [lo, hi) in a part which begins at `begin`. Raises KVError where `lo` is inside a page."""
    first, inside = divmod(lo - begin, size)
    if inside:
        raise KVError(f"pages from position {lo} on, which is number {inside} of its page")
    return slice(first, -(-(hi - begin) // size))


def indices(pages: npt.NDArray[np.int32]) -> torch.Tensor:
    """Numbers of pages as torch takes them."""
    return torch.from_numpy(pages.astype(np.int64))
