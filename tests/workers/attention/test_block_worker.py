"""A worker whose blocks an engine elsewhere owns: drawn engines against attention by its definition, and bad tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from block_engines import BlockEngine
from engine_rig import DEVICE

from lamina_protocols.errors import ProtocolError
from lamina_protocols.messages.layers import BlockConfig, ColdTier, HolderConfig, LayerSpec
from lamina_protocols.messages.messages import Announced, Announcement, Attended, BlockTables, Exchange, Survey
from lamina_workers.attention_worker.device_worker import attention_worker
from lamina_workers.errors import KVError, UnsupportedModelError

FULL = LayerSpec(kv_layer=0, heads=6, kv_heads=2, d_k=16, d_v=32, scale=0.3)
WIDE = LayerSpec(kv_layer=0, heads=4, kv_heads=1, d_k=32, d_v=32, scale=0.2)


def config(*layers: LayerSpec, tables: tuple[int, ...] = (), blocks: int = 40, **others: object) -> BlockConfig:
    numbered = tuple(dataclasses.replace(spec, kv_layer=number) for number, spec in enumerate(layers))
    settings = {"page_size": 16, "dtype": "float32", "kv_memory": 1 << 26, **others}
    return BlockConfig(numbered, blocks=blocks, tables=tables or (0,) * len(layers), **settings)  # type: ignore[arg-type]


WINDOWED = dataclasses.replace(FULL, window=21)
CONFIGS = {
    "one table": config(FULL, FULL),
    "windows and a soft cap": config(FULL, WINDOWED, dataclasses.replace(FULL, soft_cap=5.0)),
    "two tables": config(FULL, WINDOWED, FULL, WINDOWED, WINDOWED, tables=(0, 1, 0, 1, 1), blocks=80),
    "two shapes in a table": config(FULL, WIDE, FULL, tables=(0, 0, 1), blocks=80),
    "bfloat16": config(FULL, FULL, dtype="bfloat16"),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("seed", range(3))
def test_any_engine_gets_the_attention_of_its_blocks(name: str, seed: int) -> None:
    holder = CONFIGS[name]
    worker, engine = attention_worker(holder, device=torch.device(DEVICE)), BlockEngine(holder, seed)
    tolerance = 1e-4 if holder.dtype == "float32" else 0.1
    for _ in range(25):
        step = engine.drawn()
        batches = {}
        for table in range(engine.tables):
            message = engine.announcement(step, table)
            batches[table] = message.batch
            reply = worker.handle(message)
            assert isinstance(reply, Announced)
            assert reply.accepted
            worker.check_integrity()
        for layer, table in enumerate(holder.tables):
            q, k, v, right = engine.layer(step, layer)
            flat = (x.to(DEVICE).flatten(0, 1) for x in (q, k, v))
            answer = worker.handle(Exchange(1, batches[table], layer, *flat))
            assert isinstance(answer, Attended)
            out = answer.out.cpu().view(right.shape).double()
            torch.testing.assert_close(out, right, atol=tolerance, rtol=tolerance)
        engine.done(step)
    assert len(worker._batches) <= 2 * engine.tables


def test_a_decode_step_goes_on_from_the_last_one() -> None:
    """Plans and compiled work are made once for rows that grow, across blocks too."""
    holder = CONFIGS["one table"]
    worker, engine = attention_worker(holder), BlockEngine(holder, 1)
    engine.sequences = [engine._new() for _ in range(3)]
    works = set()
    for number in range(60):
        step = dataclasses.replace(_decode(engine, 5 if number == 0 else 1))
        assert isinstance(worker.handle(engine.announcement(step, 0)), Announced)
        for layer in range(2):
            q, k, v, right = engine.layer(step, layer)
            answer = worker.handle(Exchange(1, engine.batch, layer, *(x.flatten(0, 1) for x in (q, k, v))))
            assert isinstance(answer, Attended)
            torch.testing.assert_close(answer.out.view(right.shape).double(), right, atol=1e-4, rtol=1e-4)
        if number > 1:
            works.add(id(worker.layer_work(engine.batch, 0)))
        engine.done(step)
    assert len(works) <= 4


def _decode(engine: BlockEngine, count: int):  # type: ignore[no-untyped-def]
    from block_engines import Step

    for sequence in engine.sequences:
        assert engine._grow(sequence, sequence.length + count)
    return Step([(sequence, sequence.length, count) for sequence in engine.sequences])


def tables(starts: list[int], lengths: list[int], blocks: list[list[int]], **changes: object) -> BlockTables:
    arrays = (torch.tensor(x, dtype=torch.int32) for x in (starts, lengths, blocks))
    return dataclasses.replace(BlockTables(1, 1, 0, *arrays), **changes)  # type: ignore[arg-type]


BAD: dict[str, tuple[Callable[[], BlockTables], str]] = {
    "a block beyond": (lambda: tables([0, 1], [20], [[3, 40]]), "names block 40, allowed: 0 to 39"),
    "a negative block": (lambda: tables([0, 1], [20], [[3, -1]]), "names block -1"),
    "one block in two rows": (lambda: tables([0, 1, 2], [3, 3], [[5], [5]]), "block 5 is to be written 2 times"),
    "one block twice in a row": (lambda: tables([0, 20], [20], [[5, 5]]), "block 5 is to be written 2 times"),
    "a table too short": (lambda: tables([0, 1], [33], [[1, 2]]), "needs 3 blocks of 16; its table has 2"),
    "a table too long": (lambda: tables([0, 1], [16 * 41], [list(range(41))]), "needs 41 blocks of 16"),
    "no rows": (lambda: tables([0], [], [[]]), "at least one"),
    "too few starts": (lambda: tables([0, 1], [1, 1], [[1], [2]]), "query_start_loc of 2, seq_lens of 2"),
    "no queries": (lambda: tables([0, 0], [5], [[1]]), "each larger than the last"),
    "starts above zero": (lambda: tables([1, 2], [5], [[1]]), "from 0 on"),
    "more queries than tokens": (lambda: tables([0, 4], [3], [[1]]), "row 0 has 4 queries, and a sequence of 3"),
    "another table": (lambda: tables([0, 1], [1], [[1]], table=1), "block table 1, there are 1"),
    "other numbers": (lambda: tables([0, 1], [1], [[1]], seq_lens=torch.tensor([1.0])), "float32"),
    "another shape": (lambda: tables([0, 1], [1], [[1]], block_table=torch.zeros(1, dtype=torch.int32)), "dimensions"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_tables_are_refused_by_name_and_change_nothing(name: str) -> None:
    worker = attention_worker(CONFIGS["one table"])
    make, reason = BAD[name]
    with pytest.raises(ProtocolError, match=reason):
        worker.handle(make())
    assert isinstance(worker.handle(tables([0, 1], [1], [[1]])), Announced)
    with pytest.raises(ProtocolError, match="not newer"):
        worker.handle(tables([0, 1], [1], [[1]]))
    worker.check_integrity()


def test_messages_of_the_other_kind_of_engine_are_refused() -> None:
    worker = attention_worker(CONFIGS["one table"])
    for message in (Announcement(1, 1, 0, (), ()), Survey(0, 1)):
        with pytest.raises(ProtocolError, match="owns its blocks"):
            worker.handle(message)
    plain = CONFIGS["one table"]
    other = attention_worker(HolderConfig(plain.layers, plain.page_size, plain.dtype, plain.kv_memory))
    with pytest.raises(ProtocolError, match="said nothing of blocks"):
        other.handle(tables([0, 1], [1], [[1]]))


def test_what_a_worker_cannot_keep_is_refused() -> None:
    with pytest.raises(
        KVError, match="4000000 blocks of 12288 bytes in 67108864 bytes of KV memory; allowed: up to 5461"
    ):
        attention_worker(config(FULL, FULL, blocks=4_000_000))
    with pytest.raises(UnsupportedModelError, match="kv-cold"):
        attention_worker(config(FULL, cold=ColdTier("/tmp")))


def test_a_policy_chooses_pages_of_blocks() -> None:
    """With a budget of all pages it reads what is there; with less it reports what it has missed."""
    for keep, exact in ((1.0, True), (0.2, False)):
        chosen = dataclasses.replace(FULL, policies=(f"page_top_k(budget={keep}, least=0, sink=16, recent=16)",) * 2)
        holder = config(chosen, blocks=100, sketches=True)
        worker, engine = attention_worker(holder), BlockEngine(holder, 3)
        engine.sequences = [engine._new()]
        for count in (900, 1, 1, 1):
            step = _decode(engine, count)
            reply = worker.handle(engine.announcement(step, 0))
            q, k, v, right = engine.layer(step, 0)
            answer = worker.handle(Exchange(1, engine.batch, 0, *(x.flatten(0, 1) for x in (q, k, v))))
            assert isinstance(answer, Attended)
            if exact:
                torch.testing.assert_close(answer.out.view(right.shape).double(), right, atol=1e-3, rtol=1e-3)
            engine.done(step)
        assert isinstance(reply, Announced)
        usage = reply.usages[0]
        assert (usage.read < usage.whole) != exact or usage.whole == 0
