"""Where KV lives: an arena of pages.

A page is `page_size` tokens of one layer and one KV head: its K block, then its V block, then, for dtypes that have
them, a scale per token for K and another for V; nothing else. Inside a block the order is that of the kernels which
read it. Of a latent V is the front of K, so its page has neither a V block nor scales of V.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch

from lamina_kernels.paged import memory

FLOATS = (torch.float32, torch.bfloat16, torch.float16)  # what q, k and v come in, and KV is kept in as it is
PEAKS = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}  # quantised: the code of a vector's largest number
DTYPES = (*FLOATS, *PEAKS)
MOST, MOST_OF_LATENT = 512, 576  # numbers of a vector; a latent of DeepSeek V3 has 512 and 64
MOST_TOKENS = 256  # of a page


class Order(Enum):
    """How numbers stand inside a block.

    CHANNELS: K as `[d_k / k_pack, token, k_pack]`, V as `[token / v_pack, d_v, v_pack]`. A vector register of the CPU
    takes 16 tokens of K, or 16 channels of V; so many neighbours stand together as one instruction multiplies and adds.
    TOKENS: K as `[token, d_k]`, V as `[token, d_v]`, as a GPU's tile loads want them.
    """

    CHANNELS = "channels"
    TOKENS = "tokens"


@dataclass(frozen=True, slots=True)
class PageLayout:
    """The shape of one page. `dtype` is what K and V are stored in. `latent`: V is the first `d_v` numbers of K.
    `d_index`: each K vector has so many numbers more behind its d_k, an index key, which attention does not multiply.

    Head sizes are multiples of 16: whole registers on a CPU, aligned loads on a GPU.
    """

    page_size: int
    d_k: int
    d_v: int
    dtype: torch.dtype
    order: Order = Order.CHANNELS
    latent: bool = False
    d_index: int = 0

    def __post_init__(self) -> None:
        channels = self.order is Order.CHANNELS
        for name in ("page_size", "d_k", "d_v"):
            value, step = getattr(self, name), 1 if name == "page_size" and not channels else 16
            limit = MOST_TOKENS if name == "page_size" else MOST_OF_LATENT if self.latent else MOST
            if value not in range(step, limit + 1, step):
                steps = f"a multiple of {step}" if step > 1 else "a whole number"
                raise ValueError(f"{name} must be {steps} from {step} to {limit}, got {value!r}")
        if self.latent and self.d_v > self.d_k:
            raise ValueError(f"d_v of a latent, which is a part of K, must be at most d_k {self.d_k}, got {self.d_v}")
        if self.d_index not in range(0, MOST + 1, 16):
            raise ValueError(f"d_index must be a multiple of 16 from 0 to {MOST}, got {self.d_index!r}")
        allowed = [dtype for dtype in DTYPES if dtype is not torch.float8_e4m3fn or not channels]
        if self.dtype not in allowed:
            raise ValueError(f"KV dtype must be one of {', '.join(map(str, allowed))}, got {self.dtype!r}")

    @property
    def key_width(self) -> int:
        """Numbers of a K vector."""
        return self.d_k + self.d_index

    @property
    def k_pack(self) -> int:
        """How many channels of a token stand side by side in a K block."""
        return 2 if self.order is Order.CHANNELS and self.dtype in (torch.bfloat16, torch.int8) else 1

    @property
    def v_pack(self) -> int:
        """How many tokens of a channel stand side by side in a V block."""
        return 4 if self.order is Order.CHANNELS and self.dtype is torch.int8 else self.k_pack

    @property
    def own_v(self) -> int:
        """How many numbers of V a token has beside K: those that are given and stored."""
        return 0 if self.latent else self.d_v

    @property
    def scaled(self) -> bool:
        """Whether each vector of K and of V has a scale, by which its stored numbers are to be multiplied."""
        return self.dtype in PEAKS

    @property
    def loaded(self) -> torch.dtype:
        """What stored numbers are read as."""
        return torch.float32 if self.scaled else self.dtype

    @property
    def k_bytes(self) -> int:
        """Bytes of a page's K block, which is where its V block begins."""
        return self.page_size * self.key_width * self.dtype.itemsize

    @property
    def kv_bytes(self) -> int:
        """Bytes of both blocks, which is where the scales begin: float32 `[2, page_size]`, those of K first; of a
        latent `[1, page_size]`."""
        return self.page_size * (self.key_width + self.own_v) * self.dtype.itemsize

    @property
    def scale_blocks(self) -> int:
        """How many scales a token has, where it has any."""
        return 1 if self.latent else 2

    @property
    def page_bytes(self) -> int:
        """Bytes of one page: exactly its K and V, and their scales."""
        return self.kv_bytes + self.scale_blocks * 4 * self.page_size * self.scaled


@dataclass(frozen=True, slots=True)
class Pages:
    """An arena of pages. arena: uint8 `[n_pages, page_bytes]`, contiguous, 64-byte aligned."""

    layout: PageLayout
    arena: torch.Tensor

    def __post_init__(self) -> None:
        check_arena(self.arena, self.layout.page_bytes)

    @classmethod
    def allocate(cls, layout: PageLayout, n_pages: int, device: torch.device | str = "cpu") -> Pages:
        """An arena of zeros. On the CPU its memory is taken only when touched, in huge pages where there are any."""
        if n_pages < 1:
            raise ValueError(f"n_pages must be at least 1, got {n_pages}")
        size = n_pages * layout.page_bytes
        if torch.device(device).type == "cpu":
            flat = memory.allocate(size)
        else:
            flat = torch.zeros(size, dtype=torch.uint8, device=device)
        return cls(layout, flat.view(n_pages, layout.page_bytes))

    @property
    def n_pages(self) -> int:
        return self.arena.shape[0]

    @property
    def slots(self) -> int:
        """How many tokens the arena keeps. A slot is numbered page * page_size + offset."""
        return self.n_pages * self.layout.page_size

    @property
    def k(self) -> torch.Tensor:
        """A view of every K block, as `[n_pages, page_size, key_width / k_pack, k_pack]` whatever the order is."""
        layout = self.layout
        block = self.arena[:, : layout.k_bytes].view(layout.dtype)
        if layout.order is Order.TOKENS:
            return block.view(-1, layout.page_size, layout.key_width, 1)
        return block.view(-1, layout.key_width // layout.k_pack, layout.page_size, layout.k_pack).transpose(1, 2)

    @property
    def v(self) -> torch.Tensor:
        """A view of every V block, as `[n_pages, page_size / v_pack, v_pack, d_v]` whatever the order in memory. Raises
        ValueError for latents, which have none."""
        layout = self.layout
        if layout.latent:
            raise ValueError("pages of latents have no V block: V is the front of K")
        block = self.arena[:, layout.k_bytes : layout.kv_bytes].view(layout.dtype)
        return block.view(-1, layout.page_size // layout.v_pack, layout.d_v, layout.v_pack).transpose(2, 3)

    @property
    def scales(self) -> torch.Tensor:
        """A view of every page's scales, float32 `[n_pages, 2, page_size]`: of K, of V; of latents `[n_pages, 1,
        page_size]`. Only of dtypes with scales."""
        layout = self.layout
        return self.arena[:, layout.kv_bytes :].view(torch.float32).view(-1, layout.scale_blocks, layout.page_size)


def quantise(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """x `[n, d]` as codes of `dtype` `[n, d]` and a scale for each vector, float32 `[n]`: x is about codes * scale.

    The largest number of a vector gets the largest code. A vector that is not finite has a scale that is not.
    """
    x = x.float()
    scale = x.abs().amax(-1) / PEAKS[dtype]
    codes = torch.where(scale.unsqueeze(-1) > 0, x / scale.unsqueeze(-1), 0.0).nan_to_num(0.0)
    if dtype is torch.int8:
        codes = codes.round()
    return codes.clamp(-PEAKS[dtype], PEAKS[dtype]).to(dtype), scale


@dataclass(frozen=True, slots=True)
class AppendPlan:
    """Where the K and V of a batch go in `pages`, in every layer: slots int64 `[layers, n]`."""

    pages: Pages
    slots: torch.Tensor


def check_order(pages: Pages, order: Order) -> None:
    """Raise ValueError unless the blocks of `pages` stand in the order that a kernel reads."""
    if pages.layout.order is not order:
        raise ValueError(f"these kernels read pages of {order}, got {pages.layout.order}")


def check_slots(pages: Pages, slots: torch.Tensor) -> None:
    """Raise ValueError unless slots is int64 `[layers, n]`, and every slot exists."""
    if slots.dtype != torch.int64 or slots.ndim != 2:
        raise ValueError(f"slots must be int64 [layers, n], got {slots.dtype} {list(slots.shape)}")
    check_range("slots", slots, pages.slots)


def check_append(pages: Pages, plan: AppendPlan, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
    """Raise ValueError unless the plan was made for `pages` and has that layer, k is `[n, key_width]` and v `[n, d_v]`,
    or `[n, 0]` of latents."""
    check_made_for(plan.pages, pages)
    layers, n = plan.slots.shape
    if not 0 <= layer < layers:
        raise ValueError(f"layer must be from 0 to {layers - 1}, got {layer}")
    check_vectors("k", k, n, pages.layout.key_width, pages.arena.device)
    check_vectors("v", v, n, pages.layout.own_v, pages.arena.device)


def check_made_for(planned: Pages, pages: Pages) -> None:
    """Raise ValueError unless a plan's pages are these: it has addresses in it."""
    if planned is not pages:
        raise ValueError("the plan was made for other pages")


def check_vectors(name: str, x: torch.Tensor, n: int, d: int, device: torch.device) -> None:
    """Raise ValueError unless x is `[n, d]` floats on `device`."""
    if x.shape != (n, d) or x.dtype not in FLOATS or x.device.type != device.type:
        allowed = ", ".join(map(str, FLOATS))
        raise ValueError(
            f"{name} must be [{n}, {d}] on {device} in one of {allowed}, got {x.dtype} {list(x.shape)} on {x.device}"
        )


def check_arena(arena: torch.Tensor, width: int) -> None:
    """Raise ValueError unless arena is uint8 `[n_pages, width]`, contiguous and 64-byte aligned."""
    if arena.dtype != torch.uint8 or arena.ndim != 2 or arena.shape[1] != width:
        raise ValueError(f"arena must be uint8 [n_pages, {width}], got {arena.dtype} {list(arena.shape)}")
    if not arena.is_contiguous() or arena.data_ptr() % 64:
        raise ValueError("arena must be contiguous and 64-byte aligned")


def check_range(name: str, numbers: torch.Tensor, end: int) -> None:
    """Raise ValueError unless all numbers are from 0 to end - 1."""
    if not numbers.numel():
        return
    low, high = (int(x) for x in numbers.aminmax())
    if low < 0 or high >= end:
        raise ValueError(f"{name} must be from 0 to {end - 1}, got {low if low < 0 else high}")


def gather(pages: Pages, table: torch.Tensor, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first `tokens` slots of the pages named in `table` (int `[pages]`), in the layout's `loaded` dtype.

    k `[tokens, key_width]`, v `[tokens, d_v]`.
    """
    layout = pages.layout
    if not 0 <= tokens <= len(table) * layout.page_size:
        raise ValueError(f"tokens must be from 0 to {len(table) * layout.page_size}, got {tokens}")
    index = table[: -(-tokens // layout.page_size)].long()
    check_range("table", index, pages.n_pages)
    k = pages.k[index].reshape(-1, layout.key_width)[:tokens]
    v = k if layout.latent else pages.v[index].reshape(-1, layout.d_v)[:tokens]
    if layout.scaled:
        scales = pages.scales[index].transpose(0, 1).reshape(layout.scale_blocks, -1, 1)[:, :tokens]
        k, v = k.float() * scales[0], v.float() * scales[-1]
    return k, v[:, : layout.d_v]


def gather_heads(pages: Pages, tables: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As `gather`, of all heads at once, each with as many pages (int64 `[heads, pages]`): k
    `[tokens, heads, key_width]`, v `[tokens, heads, d_v]`. Whole pages are copied as they are, and put in order then:
    ten times as fast."""
    layout = pages.layout
    heads, count = tables.shape
    check_range("tables", tables, pages.n_pages)
    if not count:
        k, v = (pages.arena.new_empty((0, heads, d), dtype=layout.loaded) for d in (layout.key_width, layout.d_v))
        return k, v
    selection = Pages(layout, pages.arena.index_select(0, tables.reshape(-1)))
    k = _heads_keys(selection, heads)
    if layout.latent:
        return k, k[..., : layout.d_v]
    if layout.scaled:
        v = selection.v.reshape(-1, layout.page_size, layout.d_v).float() * selection.scales.unsqueeze(-1)[:, 1]
        return k, v.view(heads, -1, layout.d_v).transpose(0, 1).contiguous()
    of_v = selection.arena[:, layout.k_bytes : layout.kv_bytes].view(layout.dtype)
    v = of_v.view(heads, count, layout.page_size // layout.v_pack, layout.d_v, layout.v_pack).permute(1, 2, 4, 0, 3)
    return k, v.reshape(count * layout.page_size, heads, layout.d_v)


def gather_keys(pages: Pages, tables: torch.Tensor) -> torch.Tensor:
    """The keys alone of all heads, as `gather_heads` returns them."""
    check_range("tables", tables, pages.n_pages)
    if not tables.numel():
        return pages.arena.new_empty((0, len(tables), pages.layout.key_width), dtype=pages.layout.loaded)
    return _heads_keys(Pages(pages.layout, pages.arena.index_select(0, tables.reshape(-1))), len(tables))


def _heads_keys(pages: Pages, heads: int) -> torch.Tensor:
    """Of all pages, head by head, the keys `[tokens, heads, key_width]`."""
    layout = pages.layout
    if layout.scaled:
        scaled = pages.k.reshape(-1, layout.page_size, layout.key_width).float() * pages.scales.unsqueeze(-1)[:, 0]
        return scaled.view(heads, -1, layout.key_width).transpose(0, 1).contiguous()
    # What stands side by side is one number.
    word = torch.int32 if layout.k_pack * layout.dtype.itemsize == 4 else layout.dtype
    words = layout.key_width * layout.dtype.itemsize // word.itemsize
    of_k = pages.arena[:, : layout.k_bytes].view(word)
    if layout.order is Order.TOKENS:
        k = of_k.view(heads, -1, layout.page_size, words).permute(1, 2, 0, 3)
    else:
        k = of_k.view(heads, -1, words, layout.page_size).permute(1, 3, 0, 2)
    return k.contiguous().view(layout.dtype).view(-1, heads, layout.key_width)


def whole(pages: Pages, index: torch.Tensor) -> torch.Tensor:
    """The pages `index`, int64 `[n]`, as they lie: uint8 `[n, page_bytes]`. Those below 0 are zeros."""
    present = index.clamp_min(0)
    if pages.arena.is_cuda:
        content = pages.arena[present]
    else:  # by one thread, which memory does not let wait for others
        content = torch.from_numpy(pages.arena.numpy().take(present.numpy(), axis=0))
    if bool((index < 0).any()):
        content[index < 0] = 0
    return content


def store_whole(pages: Pages, index: torch.Tensor, content: torch.Tensor) -> None:
    """Let the pages `index`, int64 `[n]`, all different, be `content`, uint8 `[n, page_bytes]`, as `whole` gave it."""
    shape = (len(index), pages.layout.page_bytes)
    if content.dtype != torch.uint8 or content.shape != shape:
        raise ValueError(f"pages must be uint8 {list(shape)}, got {content.dtype} {list(content.shape)}")
    check_range("index", index, pages.n_pages)
    if pages.arena.is_cuda:
        pages.arena[index] = content
    else:
        pages.arena.numpy()[index.numpy()] = content.numpy()


def copy(pages: Pages, src: torch.Tensor, dst: torch.Tensor) -> None:
    """Copy whole pages: page `src[i]` to page `dst[i]`, both int64 `[n]`; no page is in both."""
    for name, index in (("src", src), ("dst", dst)):
        if index.dtype != torch.int64 or index.shape != (len(src),):
            raise ValueError(f"{name} must be int64 [{len(src)}], got {index.dtype} {list(index.shape)}")
        check_range(name, index, pages.n_pages)
    pages.arena[dst] = pages.arena[src]
