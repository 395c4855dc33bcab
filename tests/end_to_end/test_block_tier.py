"""Workers behind another engine: real processes and channels, heads dealt among them, against attention in float64."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch
from attention_servers import WAYS, running
from block_engines import BlockEngine, Step
from fake_device import FakeDevice

from lamina.behind.block_tier import BlockTier, TierWorker, room
from lamina.errors import InvalidRequest
from lamina_protocols.messages.layers import BlockConfig, LayerSpec
from lamina_workers.devices.staging import Staged
from lamina_workers.errors import HolderLost
from lamina_workers.ports.data_channel import ChannelOptions

FULL = LayerSpec(kv_layer=0, heads=6, kv_heads=2, d_k=16, d_v=32, scale=0.3)
MEMORY = 1 << 22


def config(*layers: LayerSpec, tables: tuple[int, ...] = (), blocks: int = 40) -> BlockConfig:
    numbered = tuple(dataclasses.replace(spec, kv_layer=number) for number, spec in enumerate(layers))
    return BlockConfig(numbered, 16, "float32", 0, blocks=blocks, tables=tables or (0,) * len(layers))


PLAIN = config(FULL, dataclasses.replace(FULL, window=20))
HYBRID = config(*(FULL, dataclasses.replace(FULL, window=20)) * 2, tables=(0, 1, 0, 1), blocks=80)


@contextmanager
def tier(holder: BlockConfig, workers: int = 1, **channel: object) -> Iterator[BlockTier]:
    with ExitStack() as stack:
        addresses = [stack.enter_context(running(kv_memory=MEMORY))[1] for _ in range(workers)]
        client = BlockTier([TierWorker(a) for a in addresses], holder, "float32", "m", ChannelOptions(**channel))  # type: ignore[arg-type]
        stack.callback(client.close)
        yield client


def compute(client: BlockTier, engine: BlockEngine, step: Step) -> None:
    for table in range(engine.tables):
        message = engine.announcement(step, table)
        client.announce(table, message.query_start_loc, message.seq_lens, message.block_table)
    for layer in range(len(client.holder.layers)):
        q, k, v, right = engine.layer(step, layer)
        out = client.attend(layer, q, k, v)
        torch.testing.assert_close(out.view(right.shape).double(), right, atol=1e-4, rtol=1e-4)
    engine.done(step)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("holder", [PLAIN, HYBRID], ids=["plain", "hybrid"])
def test_any_engine_gets_its_attention_from_workers_elsewhere(holder: BlockConfig, workers: int) -> None:
    with tier(holder, workers) as client:
        engine = BlockEngine(holder, workers)
        for _ in range(25):
            compute(client, engine, engine.drawn())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("switch", ["compiled", "python"])
def test_every_channel_and_side_gives_the_same(way: str, switch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if switch == "python":
        monkeypatch.setattr("lamina_workers.model_worker.compiled_exchange.enabled", lambda: False)
    with tier(PLAIN, 2, **WAYS[way]) as client:
        engine = BlockEngine(PLAIN, 5)
        for _ in range(8):
            compute(client, engine, engine.drawn())


@pytest.mark.parametrize("switch", ["compiled", "python"])
def test_from_a_device_a_layer_is_three_copies_one_wait_and_one_copy_back(
    switch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer is that of tensors on the host. What is read before it has come is poison."""
    if switch == "python":
        monkeypatch.setattr("lamina_workers.model_worker.compiled_exchange.enabled", lambda: False)
    fake = FakeDevice()
    with ExitStack() as stack:
        clients = []
        for staging_of in ({}, {"staging_of": lambda device: lambda: Staged(fake)}):
            workers = [TierWorker(stack.enter_context(running(kv_memory=MEMORY))[1]) for _ in range(2)]
            clients.append(BlockTier(workers, HYBRID, "float32", "m", **staging_of))  # type: ignore[arg-type]
            stack.callback(clients[-1].close)
        engine, largest, steady = BlockEngine(HYBRID, 3), 0, 0
        for number in range(12):
            step, before = engine.drawn(), len(fake.allocated)
            for table in range(engine.tables):
                message = engine.announcement(step, table)
                for client in clients:
                    client.announce(table, message.query_start_loc, message.seq_lens, message.block_table)
            for layer in range(len(HYBRID.layers)):
                q, k, v, _ = engine.layer(step, layer)
                right = clients[0].attend(layer, q, k, v)
                fake.log.clear()
                target = torch.full_like(right, torch.nan)
                assert clients[1].attend(layer, q, k, v, target=target) is target
                assert torch.equal(target, right)
                if number:
                    assert fake.log == [
                        "wait",  # for the answer of the layer before the last one, whose buffer comes next
                        *["down on default"] * 3,
                        "record on default",
                        "wait",
                        "up on default",
                        "record on default",
                    ]
            engine.done(step)
            if step.tokens <= largest:
                steady += 1
                assert len(fake.allocated) == before
            largest = max(largest, step.tokens)
        assert steady > 3


def test_blocks_that_the_memory_has_room_for_are_counted() -> None:
    with ExitStack() as stack:
        addresses = [stack.enter_context(running(kv_memory=MEMORY))[1] for _ in range(2)]
        workers = [TierWorker(address) for address in addresses]
        assert room(workers, PLAIN) == 2 * room(workers[:1], PLAIN) == 2 * MEMORY // (2 * 2 * 16 * 48 * 4)
        with pytest.raises(InvalidRequest, match="3 attention workers for layers of 2 KV heads"):
            room([*workers, workers[0]], PLAIN)


def test_a_worker_that_is_lost_comes_back_empty() -> None:
    with ExitStack() as stack:
        (server, address), (_, other) = (stack.enter_context(running(kv_memory=MEMORY)) for _ in range(2))
        client = BlockTier([TierWorker(address), TierWorker(other)], PLAIN, "float32", "m")
        stack.callback(client.close)
        engine = BlockEngine(PLAIN, 7)
        compute(client, engine, engine.drawn())
        server.stop(0)
        with pytest.raises(HolderLost):
            compute(client, engine, engine.drawn())
        with pytest.raises(HolderLost, match="does not come back"):
            client.restore(0.2)
        stack.enter_context(running(kv_memory=MEMORY, listen=address))
        client.restore(10.0)
        fresh = BlockEngine(PLAIN, 8)
        for _ in range(5):
            compute(client, fresh, fresh.drawn())


def test_a_bad_table_ends_the_session_with_its_reason_and_the_worker_lives() -> None:
    with ExitStack() as stack:
        _, address = stack.enter_context(running(kv_memory=MEMORY))
        for _ in range(2):
            client = BlockTier([TierWorker(address)], PLAIN, "float32", "m")
            client.announce(0, *(torch.tensor(x, dtype=torch.int32) for x in ([0, 1], [1], [[40]])))
            q, k, v = torch.zeros(1, 6, 16), torch.zeros(1, 2, 16), torch.zeros(1, 2, 32)
            with pytest.raises(Exception, match="names block 40, allowed: 0 to 39"):
                client.attend(0, q, k, v)
            client.close()


def test_the_reference_client_needs_nothing_of_lamina() -> None:
    """It also says, in its docstring, what crosses."""
    script = Path(__file__).parents[2] / "scripts/reference_client.py"
    assert not re.findall(r"^(?:from|import) lamina", script.read_text(), re.MULTILINE)
    with running(kv_memory=MEMORY) as (_, address):
        child = subprocess.run([sys.executable, str(script), address], capture_output=True, text=True, timeout=60)
    assert child.returncode == 0, child.stderr
    assert "14 steps; the largest difference to float64 is" in child.stdout
