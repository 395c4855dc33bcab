"""What a reader makes of a batch's rows, against attention by its definition: policies, parts, shards, odd shapes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina_kernels.paged.pages import Pages, copy
from lamina_kernels.partial import Partial
from lamina_protocols.messages.layers import HolderConfig, LayerSpec
from lamina_protocols.messages.messages import Close, Open, Operation, Row, Usage
from lamina_workers.attention_worker.page_layout import attention_kernels, page_layout
from lamina_workers.attention_worker.paged_reader import PagedReader
from lamina_workers.errors import KVError
from lamina_workers.kv_pages.head_policies import HeadPolicies
from lamina_workers.kv_pages.kv_store import KVStore
from lamina_workers.policies.policy import Policy

LAYERS, KV_HEADS, GROUP, D_K, D_V, SIZE = 2, 3, 2, 16, 32, 16
TOKEN_BYTES = (D_K + D_V) * 4  # in one layer and KV head
ALL = tuple(range(KV_HEADS))
STATIC = (
    *("full", "streaming(sink=9, recent=21)", "span(alpha=30, beta=0.3)"),
    *("sharded(block=16, local=2, stride=3)", "dilated(block=16, sink=16, local=1, reach=7, dilation=2)"),
)
WHOLE = "page_top_k(sink=0, recent=1, budget=1)"  # chooses every page
TIGHT = "page_top_k(sink=16, recent=16, budget=0.1, least=1)"


class Rig:
    """A reader over a store of its own, and the keys and values of its parts: k, v `[layers, tokens, heads, d]`, of
    the positions from the part's first on."""

    def __init__(self, *policies: str, window: int | None = None, soft_cap: float | None = None) -> None:
        spec = LayerSpec(0, KV_HEADS * GROUP, KV_HEADS, D_K, D_V, 0.25, window, soft_cap, policies=policies)
        layers = tuple(dataclasses.replace(spec, kv_layer=layer) for layer in range(LAYERS))
        self.config = HolderConfig(layers, SIZE, "float32", 0)
        self.policies = HeadPolicies.of(self.config)
        self.kernels = attention_kernels()
        self.pages = Pages.allocate(page_layout(self.config), 1500)
        self.store = KVStore(self.config, self.policies, 1500)
        self.reader = PagedReader(self.config, self.policies, self.kernels, self.pages, self.store, threads=2)
        self.generator = torch.Generator().manual_seed(3)
        self.k: dict[int, torch.Tensor] = {}
        self.v: dict[int, torch.Tensor] = {}

    def tell(self, *operations: Operation, rows: Sequence[Row] = ()) -> None:
        """What an announcement does, and random KV of its rows."""
        reservation = self.store.update(operations, rows)
        for operation in operations:
            if isinstance(operation, Close):
                self.reader.forget(operation.handle)
            else:
                self.reader.opened(operation)
        if reservation.copies_from.size:
            pairs = (reservation.copies_from, reservation.copies_to)
            copy(self.pages, *(torch.from_numpy(x.astype(np.int64)) for x in pairs))
        sealed = self.reader.sealed(rows)
        for row in rows:
            self._append(row)
        for layer in range(LAYERS):
            self.reader.seal(sealed, layer)
        self.store.stored(rows)

    def _append(self, row: Row) -> None:
        part = self.store.part(row.handle)
        first, end = row.stored(part.lo, part.hi)
        for stored, d in ((self.k, D_K), (self.v, D_V)):
            before = stored.get(row.handle, torch.empty(LAYERS, 0, len(part.heads), d))[:, : first - part.lo]
            new = torch.randn(LAYERS, end - first, len(part.heads), d, generator=self.generator)
            stored[row.handle] = torch.cat([before, new], 1)
        slots = torch.from_numpy(self.store.slots(row).reshape(LAYERS, -1))
        places = self.kernels.plan_append(self.pages, slots)
        for layer in range(LAYERS):
            k, v = (x[row.handle][layer, first - part.lo :].flatten(0, 1) for x in (self.k, self.v))
            self.kernels.append(self.pages, places, layer, k, v)

    def part(self, handle: int, tokens: int, heads: tuple[int, ...] = ALL, lo: int = 0, policy: str = "") -> None:
        """A part of `tokens` positions from `lo` on."""
        self.tell(Open(handle, 0, heads, lo, 1 << 20, policy), rows=[Row(handle, lo, tokens, None, store=True)])

    def attend(self, rows: Sequence[Row]) -> list[list[Partial]]:
        """By layer and row: what its vectors get. Every layer has queries of its own, kept as `q`, `[layers, n, d]`."""
        self.counts = [row.count * len(self.store.part(row.handle).heads) * GROUP for row in rows]
        self.q = torch.randn(LAYERS, sum(self.counts), D_K, generator=self.generator)
        self.readings = self.reader.readings(rows)
        found = []
        for layer in range(LAYERS):
            reading = self.readings.of(layer)
            out, lse = self.reader.attend(reading, layer, self.q[layer])
            found.append([Partial(*x) for x in zip(out.split(self.counts), lse.split(self.counts), strict=True)])
        return found

    def dense(self, layer: int, row: Row, number: int) -> Partial:
        """The same of one row, the `number`-th of the batch, in float64."""
        part, spec = self.store.part(row.handle), self.config.layers[layer]
        q = self.q[layer].split(self.counts)[number].double().view(row.count, len(part.heads), GROUP, D_K)
        out = torch.empty(row.count, len(part.heads), GROUP, D_V, dtype=torch.float64)
        lse = torch.empty(out.shape[:3], dtype=torch.float64)
        for at, head in enumerate(part.heads):
            k, v = (x[row.handle][layer, :, at].double() for x in (self.k, self.v))
            logits = torch.einsum("tgd,kd->tgk", q[:, at], k) * spec.scale
            if spec.soft_cap is not None:
                logits = spec.soft_cap * torch.tanh(logits / spec.soft_cap)
            visible = seen(part.policies.reads[layer][head], row, part.lo, len(k))
            logits = logits.masked_fill(~visible[:, None], -torch.inf)
            out[:, at] = torch.softmax(logits, -1).nan_to_num(0) @ v
            lse[:, at] = torch.logsumexp(logits, -1)
        return Partial(out.view(-1, D_V).float(), lse.view(-1).float())

    def check(self, rows: Sequence[Row]) -> None:
        for layer, of_layer in enumerate(self.attend(rows)):
            for number, (row, found) in enumerate(zip(rows, of_layer, strict=True)):
                close(found, self.dense(layer, row, number))


def seen(policy: Policy, row: Row, lo: int, keys: int) -> torch.Tensor:
    """Which of a part's keys each query of a row sees by position, bool `[count, keys]`; `lo` is the first's."""
    assert row.read is not None
    key = torch.arange(lo, lo + keys)
    within = (key >= row.read[0]) & (key < row.read[1])
    masks = []
    for view in policy.views(row.start, row.count):
        for p in range(view.start, view.start + view.count):
            near = torch.zeros(keys, dtype=torch.bool)
            for first, end in view.seen(p):
                near |= (key >= first) & (key < end)
            masks.append(within & near)
    return torch.stack(masks)


def close(found: Partial, wanted: Partial) -> None:
    torch.testing.assert_close(found.out, wanted.out, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.lse, wanted.lse, rtol=1e-4, atol=1e-4)


@st.composite
def batches(draw: st.DrawFn) -> list[tuple[int, tuple[int, ...], int, Row]]:
    """Parts, each with one row: lo, heads, tokens held, and the row. Some rows read their own tokens too."""
    made = []
    for handle in range(draw(st.integers(1, 3))):
        lo = SIZE * draw(st.integers(0, 4))
        heads = draw(st.sampled_from([ALL, (1,), (2, 0)]))
        held = draw(st.integers(1, 150))
        start = lo + held - draw(st.integers(0, min(held - 1, 30)))  # some past is held that the row is before
        decode = draw(st.booleans())
        count = 1 if decode else draw(st.integers(1, 40))
        fused = start + count <= lo + held and draw(st.booleans())
        read = lo, start + count * fused
        made.append((lo, heads, held, Row(handle, start, count, read, store=False, chooses=decode)))
    return made


@given(
    batches(),
    st.lists(st.sampled_from([*STATIC, WHOLE]), min_size=KV_HEADS, max_size=KV_HEADS),
    st.sampled_from([None, 25]),
    st.sampled_from([None, 3.0]),
)
@settings(max_examples=60, deadline=None)
def test_reader_agrees_with_dense_attention_whatever_rows_and_policies_meet(
    made: list[tuple[int, tuple[int, ...], int, Row]], policies: list[str], window: int | None, soft_cap: float | None
) -> None:
    rig = Rig(*policies, window=window, soft_cap=soft_cap)
    for lo, heads, held, row in made:
        rig.part(row.handle, held, heads, lo)
    rig.check([row for *_, row in made])


@given(batches(), st.lists(st.sampled_from([*STATIC, WHOLE, TIGHT]), min_size=KV_HEADS, max_size=KV_HEADS))
@settings(max_examples=60, deadline=None)
def test_every_vector_is_planned_or_chosen_for_and_never_both(
    made: list[tuple[int, tuple[int, ...], int, Row]], policies: list[str]
) -> None:
    rig, n = Rig(*policies), 0
    for lo, heads, held, row in made:
        rig.part(row.handle, held, heads, lo)
        n += row.count * len(heads) * GROUP
    for reading in rig.reader.readings([row for *_, row in made]).each:
        planned = torch.arange(n) if reading.vectors is None else reading.vectors
        chosen = [group.vectors for group in reading.groups]
        assert torch.cat([planned, *chosen]).sort().values.tolist() == list(range(n))
        assert (reading.plan is None) == (len(planned) == 0)


def test_only_parts_whose_policy_was_named_are_counted() -> None:
    rig = Rig()
    rig.part(1, 200)
    rig.part(2, 200, policy=STATIC[1])
    rig.attend([Row(n, 200, 1, (0, 200), store=False, chooses=True) for n in (1, 2)])
    rig.reader.end(rig.readings.each)
    assert rig.readings.counted
    assert rig.reader.usage(1) == Usage(0, 0, 0.0, 0, 0.0, 0, 0, 0)
    usage = rig.reader.usage(2)
    assert (usage.read, usage.whole) == tuple(LAYERS * KV_HEADS * n * TOKEN_BYTES for n in (9 + 20, 200))


def test_a_chooser_lives_as_long_as_a_part_has_its_policy() -> None:
    rig = Rig("retrieval", "full", "full")
    adaptive = rig.reader._adaptive
    assert adaptive is not None
    for handle in (1, 2):
        rig.part(handle, 40, policy=TIGHT)
    for handle in (1, 2):
        assert [policy.name for policy in adaptive._choosers] == ["retrieval", "page_top_k"]
        rig.tell(Close(handle))
    assert [policy.name for policy in adaptive._choosers] == ["retrieval"]
    rig.part(3, 400)
    rig.check([Row(3, 400, 1, (3 * SIZE, 390), store=False, chooses=True)])  # the worker's own is still there


def test_nothing_is_chosen_when_a_row_reads_less_than_its_part_has() -> None:
    rig = Rig(TIGHT, "retrieval", "full")
    rig.part(1, 400, lo=SIZE)
    rows = [Row(1, 400, 1, (3 * SIZE, 390), store=False, chooses=True)]
    rig.check(rows)
    assert all(reading.groups == () for reading in rig.readings.each)


def test_reader_refuses_what_no_batch_can_have() -> None:
    rig = Rig(*STATIC[:KV_HEADS])
    assert not rig.reader.readings([]).each
    rig.part(1, 40)
    row = Row(1, 40, 1, (0, 40), store=False)
    with pytest.raises(KVError, match="no part has handle 7"):
        rig.reader.readings([dataclasses.replace(row, handle=7)])
    (reading,) = rig.reader.readings([row]).each
    with pytest.raises(ValueError, match="q must be"):
        rig.reader.attend(reading, 0, torch.zeros(5, D_K))
