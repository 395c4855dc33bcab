"""A hostile engine that owns its blocks, at a worker's process over TCP, with and without TLS. What it sends is refused
by name and ends its session at most; memory stays small, and the worker serves the next engine."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from attention_servers import process
from block_engines import BlockEngine

from lamina.behind.block_tier import BlockTier, TierWorker
from lamina_protocols.channels.grpc_client import WorkerRefused
from lamina_protocols.messages.layers import BlockConfig, HolderConfig, LayerSpec
from lamina_protocols.messages.messages import Announced, Attended, BlockTables, Exchange, Fault, Query, Reply, Survey
from lamina_workers.errors import HolderLost
from lamina_workers.ports.data_channel import ChannelOptions
from lamina_workers.ports.remote import RemoteAttention, SeatOptions, connect
from lamina_workers.process.credentials import load_credentials, make_credentials

SPEC = LayerSpec(kv_layer=0, heads=2, kv_heads=1, d_k=16, d_v=16, scale=0.25)
MEMORY = 64 << 20
BLOCKS = MEMORY // (2 * 16 * 32 * 4)
GROWTH = 96 << 20  # bytes that a worker's process may take beyond its KV


def config(count: int = 2, **changes: object) -> BlockConfig:
    specs = tuple(dataclasses.replace(SPEC, kv_layer=number) for number in range(count))
    return dataclasses.replace(BlockConfig(specs, 16, "float32", 0, blocks=BLOCKS, tables=(0,) * count), **changes)


@dataclasses.dataclass
class Victim:
    """A worker's process, and how it is reached."""

    pid: int
    address: str
    channel: ChannelOptions

    def attacked(self, holder: HolderConfig, **seat: str) -> RemoteAttention:
        return connect(self.address, "w", holder, "float32", "m", SeatOptions(**seat), self.channel)

    def memory(self) -> int:
        """Bytes of its process that are in memory."""
        return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * 4096

    def serves(self) -> None:
        """The next engine gets its attention."""
        holder = config(blocks=40)
        tier = BlockTier([TierWorker(self.address, self.channel.credentials)], holder, "float32", "m", self.channel)
        try:
            engine = BlockEngine(holder, 1)
            for _ in range(3):
                step = engine.drawn()
                message = engine.announcement(step, 0)
                tier.announce(0, message.query_start_loc, message.seq_lens, message.block_table)
                for layer in range(2):
                    q, k, v, right = engine.layer(step, layer)
                    out = tier.attend(layer, q, k, v).view(right.shape).double()
                    torch.testing.assert_close(out, right, atol=1e-4, rtol=1e-4)
                engine.done(step)
        finally:
            tier.close()


@pytest.fixture(scope="module", params=["tcp", "tls"])
def victim(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victim]:
    flags, credentials = ["--kv-memory", str(MEMORY), "--no-local-channel", "--listen", "127.0.0.1:0"], None
    if request.param == "tls":
        folder = tmp_path_factory.mktemp("tls")
        make_credentials(folder, ["localhost", "127.0.0.1"])
        flags += ["--tls-dir", str(folder), "--token-file", str(folder / "token")]
        credentials = load_credentials(folder, folder / "token")
    with process(*flags) as child:
        assert child.stdout is not None
        address = str(child.stdout.readline().split()[1])
        channel = ChannelOptions(credentials, local_channel=False, data_channel="tcp", lost_after=60.0)
        victim = Victim(child.pid, address, channel)
        victim.serves()
        yield victim
        assert child.poll() is None


@contextmanager
def survived(victim: Victim) -> Iterator[None]:
    before = victim.memory()
    yield
    victim.serves()
    assert victim.memory() - before < GROWTH + MEMORY


def tables(starts: list[int], lengths: list[int], blocks: list[list[int]], **changes: object) -> BlockTables:
    arrays = (torch.tensor(x, dtype=torch.int32) for x in (starts, lengths, blocks))
    return dataclasses.replace(BlockTables(1, 1, 0, *arrays), **changes)  # type: ignore[arg-type]


def one(**changes: object) -> BlockTables:
    return tables([0, 1], [1], [[3]], **changes)


def exchange(batch: int = 1, layer: int = 0, tokens: int = 1, dtype: torch.dtype = torch.float32) -> Exchange:
    q, k, v = (torch.ones(tokens * heads, 16, dtype=dtype) for heads in (2, 1, 1))
    return Exchange(1, batch, layer, q, k, v)


def zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int32)


STEPS: dict[str, tuple[Callable[[], BlockTables], str]] = {
    "a block beyond": (lambda: tables([0, 1], [20], [[3, BLOCKS]]), f"names block {BLOCKS}, allowed: 0 to"),
    "a negative block": (lambda: tables([0, 1], [20], [[3, -(1 << 31)]]), "names block -2147483648"),
    "a block in two rows": (lambda: tables([0, 1, 2], [3, 3], [[5], [5]]), "block 5 is to be written 2 times"),
    "more writes than blocks": (
        lambda: tables([0, 1 << 18, 1 << 19], [1 << 18] * 2, [list(range(BLOCKS))] * 2),
        "32768 blocks are to be written in one step; allowed: each of the 16384 once",
    ),
    "the longest sequence": (lambda: tables([0, 1], [(1 << 31) - 1], [[0]]), "needs 134217728 blocks of 16"),
    "a negative length": (lambda: tables([0, 1], [-(1 << 31)], [[0]]), "a sequence of -2147483648 tokens"),
    "starts that wrap": (lambda: tables([0, (1 << 31) - 1, -(1 << 31)], [1, 1], [[0], [1]]), "each larger than"),
    "a table that is not there": (lambda: one(table=1), "block table 1, there are 1"),
    "a table below zero": (lambda: one(table=-1), r"from 0 to 2\^62, got -1"),
    "no rows": (lambda: one(query_start_loc=zeros(1), seq_lens=zeros(0), block_table=zeros(0, 0)), "at least one"),
    "nothing at all": (lambda: one(query_start_loc=zeros(0), seq_lens=zeros(0), block_table=zeros(0, 0)), "at least"),
    "a table without columns": (lambda: one(block_table=zeros(1, 0)), "its table has 0"),
    "a table of very many empty rows": (lambda: one(block_table=zeros(1 << 30, 0)), "block_table of 1073741824"),
    "other numbers": (lambda: one(seq_lens=torch.ones(1)), "seq_lens is torch.float32"),
    "another shape": (lambda: one(block_table=zeros(1)), "block_table is torch.int32 .* of 2 dimensions"),
    "an epoch beyond 64 bits": (lambda: one(epoch=(1 << 64) - 1), "18446744073709551615"),
    "a batch beyond 64 bits": (lambda: one(batch=(1 << 64) - 1), "18446744073709551615"),
}


@pytest.mark.parametrize("name", STEPS)
def test_a_bad_step_is_refused_by_name_and_ends_its_session(name: str, victim: Victim) -> None:
    make, reason = STEPS[name]
    with survived(victim):
        port = victim.attacked(config())
        try:
            port.send(make())
            said = _until_lost(port)
            assert re.search(reason, "\n".join(said)), said
        finally:
            port.close()


def _until_lost(port: RemoteAttention) -> list[str]:
    """What a worker says until the session has ended: reasons of faults, and why it ended."""
    said = []
    while True:
        try:
            reply = port.receive(20)
        except HolderLost as error:
            return [*said, str(error)]
        assert isinstance(reply, Fault), reply
        said.append(reply.reason)


LAYERS: dict[str, tuple[Callable[[], Exchange | Query], str]] = {
    "a batch that was not announced": (lambda: exchange(batch=2), "batch 2"),
    "a layer that was not opened": (lambda: exchange(layer=7), "layer 7"),
    "another dtype": (lambda: exchange(dtype=torch.float16), "float16"),
    "more vectors": (lambda: exchange(tokens=3), "fresh vectors of batch 1"),
    "none": (lambda: exchange(tokens=0), "fresh vectors of batch 1"),
    "more queries": (lambda: Query(1, 1, 0, torch.ones(6, 16)), "query of batch 1"),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_bad_layer_is_refused_by_name(name: str, victim: Victim) -> None:
    make, reason = LAYERS[name]
    with survived(victim):
        port = victim.attacked(config())
        try:
            port.send(one())
            assert isinstance(port.receive(20), Announced)
            port.send(make())
            try:
                reply: Reply | str = port.receive(20)
            except HolderLost as error:
                reply = str(error)
            assert reason in (reply.reason if isinstance(reply, Fault) else str(reply))
        finally:
            port.close()


HELLOS: dict[str, tuple[Callable[[], HolderConfig], str]] = {
    "more blocks than its memory has": (lambda: config(blocks=BLOCKS + 1), f"allowed: up to {BLOCKS}"),
    "more blocks than there may be": (lambda: config(blocks=1 << 61), "allowed: up to 16777216"),
    "layers and blocks without end": (lambda: config(4096, blocks=1 << 24), "bytes of KV memory; allowed: up to"),
    "tables with a gap": (lambda: config(tables=(0, 2)), "one number a layer, from 0 on"),
    "a table too few": (lambda: config(tables=(0,)), "one number a layer"),
    "a layer of another table's KV": (
        lambda: config(layers=(SPEC, SPEC), tables=(0, 1)),
        "layer 1 reads the KV of layer 0; allowed: a layer of the same shape and block table",
    ),
    "states": (
        lambda: config(1, layers=(dataclasses.replace(SPEC, heads=1, kind="mamba2", key_heads=1),)),
        "layers with a state, which blocks do not keep",
    ),
    "pages of no tokens": (lambda: config(page_size=0), "page"),
}


@pytest.mark.parametrize("name", HELLOS)
def test_a_worker_that_cannot_be_is_refused_by_name(name: str, victim: Victim) -> None:
    make, reason = HELLOS[name]
    with survived(victim), pytest.raises(WorkerRefused, match=reason):
        victim.attacked(make())


def test_64_tables_of_small_pages_take_what_their_blocks_take(victim: Victim) -> None:
    """Each table has a pool, whose pages were counted once more for each of them."""
    holder = config(64, dtype="bfloat16", blocks=4 * BLOCKS, tables=tuple(range(64)))
    with survived(victim):
        before = victim.memory()
        port = victim.attacked(holder)
        try:
            assert victim.memory() - before < 8 << 20  # the blocks themselves are not in memory yet
        finally:
            port.close()


def test_rows_that_all_begin_alike_are_told_apart_at_once(victim: Victim) -> None:
    """Many rows that share their first block, then as many others: to look for each among all would take a minute."""
    rows = 7_000
    starts, lengths = torch.arange(rows + 1).int(), torch.full((rows,), 17, dtype=torch.int32)
    with survived(victim):
        port = victim.attacked(config(1, blocks=2 * BLOCKS))
        try:
            for batch in (1, 2):
                blocks = torch.stack([zeros(rows), torch.arange(rows).int() + 1 + (batch - 1) * rows], 1)
                port.send(BlockTables(1, batch, 0, starts, lengths, blocks))
                reply = port.receive(15)
                assert isinstance(reply, Announced)
                assert reply.accepted, reply.reason
        finally:
            port.close()


def test_steps_that_are_refused_again_and_again_leave_nothing(victim: Victim) -> None:
    """Rows beyond what parts may take: their parts were kept to be taken back, which never came."""
    rows = 10_000
    arguments = torch.arange(rows + 1).int(), torch.ones(rows, dtype=torch.int32), torch.arange(rows).int()[:, None]
    with survived(victim):
        port = victim.attacked(config(1, blocks=rows))
        try:
            for batch in range(1, 7):
                port.send(BlockTables(1, batch, 0, *arguments))
                reply = port.receive(30)
                assert isinstance(reply, Announced)
                assert "is one too many" in reply.reason
                if batch == 1:
                    before = victim.memory()
            assert victim.memory() - before < 32 << 20
        finally:
            port.close()


def test_sequences_that_are_ever_new_leave_nothing(victim: Victim) -> None:
    with survived(victim):
        before, port = victim.memory(), victim.attacked(config())
        try:
            for batch in range(1, 2001):
                port.send(tables([0, 1], [1], [[batch]], batch=batch))
                assert isinstance(port.receive(20), Announced)
                if batch % 2:  # the others are given up
                    for layer in range(2):
                        port.send(exchange(batch, layer))
                        assert isinstance(port.receive(20), Attended)
                if batch == 500:
                    before = victim.memory()
            assert victim.memory() - before < 16 << 20
        finally:
            port.close()


def test_a_step_that_another_one_follows_is_over(victim: Victim) -> None:
    port = victim.attacked(config())
    try:
        port.send(one())
        assert isinstance(port.receive(20), Announced)
        port.send(exchange())
        assert isinstance(port.receive(20), Attended)
        port.send(one(batch=2))
        assert isinstance(port.receive(20), Announced)
        port.send(exchange(1, 1))
        fault = port.receive(20)
        assert isinstance(fault, Fault)
        assert "batch 1" in fault.reason
        for layer in range(2):
            port.send(exchange(2, layer))
            assert isinstance(port.receive(20), Attended)
    finally:
        port.close()
    victim.serves()


def test_an_engine_does_not_take_the_place_of_another(victim: Victim) -> None:
    port = victim.attacked(config())
    try:
        other = dataclasses.replace(victim, channel=dataclasses.replace(victim.channel, timeout=1.0))
        with pytest.raises(WorkerRefused, match="engine"):
            other.attacked(config())
        port.send(one())
        assert isinstance(port.receive(20), Announced)
    finally:
        port.close()
        port.parted()
    victim.serves()


def test_a_step_of_blocks_at_a_worker_that_owns_its_pages(victim: Victim) -> None:
    with survived(victim):
        port = victim.attacked(HolderConfig(config().layers, 16, "float32", 0))
        try:
            port.send(one())
            assert any("said nothing of blocks" in text for text in _until_lost(port))
        finally:
            port.close()
        port = victim.attacked(config())
        try:
            port.send(Survey(0, 1))
            assert any("owns its blocks" in text for text in _until_lost(port))
        finally:
            port.close()
