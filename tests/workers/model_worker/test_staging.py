"""Tensors between a device and its host: what is waited for, what is used again. On a device that only pretends."""

from __future__ import annotations

import ast
import random
from collections.abc import Callable, Generator
from pathlib import Path

import pytest
import torch
from engine_rig import DEVICE, BytesPort, Rig
from fake_device import FakeDevice
from pairwise import crossing

from lamina_workers.attention_worker.attention_worker import AttentionWorker
from lamina_workers.attention_worker.device_worker import DeviceWorker
from lamina_workers.decoder.model import Decoder
from lamina_workers.devices import staging
from lamina_workers.devices.staging import DIRECT, LEAST, Staged, staging_for
from lamina_workers.model_worker import attention_merge
from lamina_workers.ports.port import AttentionPort, LocalAttention

rng = random.Random(3)
PROMPTS = [[rng.randrange(101) for _ in range(n)] for n in (1, 17, 40, 90)]
GREEDY = {"max_tokens": 20, "temperature": 0}
ROOT = Path(__file__).parents[3]


@pytest.fixture
def fake() -> FakeDevice:
    return FakeDevice()


@pytest.fixture
def way(fake: FakeDevice) -> Staged:
    way = Staged(fake)
    way.turn()
    return way


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


class TestDown:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_vectors_are_there_once_they_have_landed(self, way: Staged, dtype: torch.dtype) -> None:
        q, index = numbers(5, 3, 16, dtype=dtype), torch.tensor([14, 0, 3])
        whole, some, flat = way.down(q), way.down(q, index), way.down(numbers(7))
        assert not torch.equal(whole, q.view(15, 16))
        way.landed()
        assert torch.equal(whole, q.view(15, 16))
        assert torch.equal(some, q.view(15, 16)[index])
        assert torch.equal(flat, numbers(7))

    def test_what_was_given_stays_for_one_turn_more(self, way: Staged) -> None:
        first = way.down(numbers(4, 8))
        way.landed()
        way.turn()
        way.down(numbers(4, 8) + 1)
        way.landed()
        assert torch.equal(first, numbers(4, 8))
        way.turn()
        second = way.down(numbers(4, 8) + 2)
        way.landed()
        assert first.data_ptr() == second.data_ptr()

    def test_nothing_is_allocated_once_the_largest_was_seen(self, way: Staged, fake: FakeDevice) -> None:
        def layer(tokens: int) -> None:
            way.turn()
            way.down(numbers(tokens, 3, 16), torch.arange(tokens))
            way.landed()
            way.up(numbers(tokens, 16))

        layer(40), layer(40)
        before = list(fake.allocated)
        for tokens in (1, 40, 7, 39, 2) * 4:
            layer(tokens)
        assert fake.allocated == before

    def test_buffers_are_doubled(self, way: Staged, fake: FakeDevice) -> None:
        for tokens in (1, 65, 66, 128, 129):  # 64 bytes each, LEAST holds 64
            way.turn(), way.turn()
            way.down(numbers(tokens, 16))
        assert fake.allocated == [LEAST, 2 * LEAST, 4 * LEAST]

    def test_no_buffer_is_kept_above_the_most(
        self, way: Staged, fake: FakeDevice, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(staging, "MOST", 1 << 12)
        x, index = numbers(65, 16), torch.arange(65).flip(0)
        assert torch.equal(way.down(x), x)
        assert torch.equal(way.down(x, index), x[index])
        assert torch.equal(way.up(x), x)
        assert fake.allocated == []

    def test_an_empty_tensor(self, way: Staged) -> None:
        assert way.down(numbers(0, 3, 16)).shape == (0, 16)
        assert way.up(numbers(0, 16)).shape == (0, 16)


class TestUp:
    def test_a_buffer_is_not_used_again_before_its_copy_is_over(self, way: Staged, fake: FakeDevice) -> None:
        fake.log.clear()
        kept = [way.up(numbers(4, 8))]
        way.turn()
        kept.append(way.up(numbers(4, 8) + 1))
        assert fake.log == ["up on default", "record on default"] * 2
        way.turn()
        assert fake.log[-1] == "wait"
        assert torch.equal(kept[0], numbers(4, 8))
        way.up(numbers(4, 8) + 2)  # the fake looks whether the first copy saw what it should
        way.turn()

    def test_a_target_takes_what_comes_and_needs_no_memory_of_the_device(self, way: Staged, fake: FakeDevice) -> None:
        target = torch.empty(4, 8)
        assert way.up(numbers(4, 8), target) is target
        assert torch.equal(target, numbers(4, 8))
        assert fake.allocated == [LEAST]

    def test_what_was_given_may_change(self, way: Staged) -> None:
        x = numbers(4, 8)
        up = way.up(x)
        x.zero_()
        way.turn(), way.turn()
        assert torch.equal(up, numbers(4, 8))

    def test_the_fake_sees_a_buffer_that_is_written_too_early(self, fake: FakeDevice) -> None:
        host, memory, event = fake.host(64), fake.memory(64), fake.event()
        fake.copy(memory, host)
        fake.record(event)
        host.zero_()
        with pytest.raises(RuntimeError, match="before its copy was over"):
            fake.wait(event)


class TestDriven:
    def test_a_run_has_a_stream_of_its_own_while_it_goes(self, way: Staged, fake: FakeDevice) -> None:
        def run() -> Generator[str, None, str]:
            yield fake.current().name
            yield fake.current().name
            return fake.current().name

        fake.log.clear()
        driven = way.driven(run())
        mine = next(driven)
        assert mine != "default"
        assert fake.current().name == "default"  # while it is suspended, others go on
        assert next(driven) == mine
        with pytest.raises(StopIteration) as stop:
            next(driven)
        assert stop.value.value == mine
        assert fake.log == [f"{mine} follows default", f"default follows {mine}"]
        assert next(Staged(fake).driven(run())) not in (mine, "default")

    def test_a_run_that_is_closed_ends_and_is_followed(self, way: Staged, fake: FakeDevice) -> None:
        ended = []

        def run() -> Generator[None, None, None]:
            try:
                yield
            finally:
                ended.append(fake.current().name)

        driven = way.driven(run())
        next(driven)
        driven.close()
        assert len(ended) == 1
        assert fake.log[-1].startswith("default follows")

    def test_an_error_comes_through(self, way: Staged, fake: FakeDevice) -> None:
        def run() -> Generator[None, None, None]:
            yield
            raise KeyError("lost")

        driven = way.driven(run())
        next(driven)
        with pytest.raises(KeyError, match="lost"):
            next(driven)
        assert fake.current().name == "default"


def test_a_cpu_copies_nothing() -> None:
    way, x = staging_for(torch.device("cpu"))(), numbers(5, 3, 16)
    assert way is DIRECT
    assert way.down(x).data_ptr() == way.up(x).data_ptr() == x.data_ptr()
    target = torch.empty_like(x)
    assert torch.equal(way.up(x, target), x)
    assert torch.equal(target, x)
    assert torch.equal(way.down(x[0, 0]), x[0, 0])

    def run() -> Generator[None, None, None]:
        yield

    going = run()
    assert way.driven(going) is going


PORTS: dict[str, Callable[[FakeDevice], Callable[[AttentionWorker], AttentionPort]]] = {
    "model on the device": lambda fake: BytesPort,
    "holders on the device": lambda fake: lambda worker: LocalAttention(DeviceWorker(worker.config, 1, fake)),
    "each on its own": lambda fake: lambda worker: BytesPort(DeviceWorker(worker.config, 1, FakeDevice())),
}
SHARDS = {
    "fused": {},
    "heads": {"shard": "heads", "weights": (1, 1)},
    "ranges, prompts local": {"shard": "sequence", "weights": (1, 2), "local_pool": 500},
}


@pytest.mark.skipif(DEVICE != "cpu", reason="the device that only pretends is a CPU")
@crossing(place=tuple(PORTS), shard=tuple(SHARDS), lanes={"one": {}, "two, query first": {"lanes": 2, "fuses": False}})
def test_one_text_wherever_it_is_computed(
    place: str, shard: str, lanes: dict[str, int], decoder: Decoder, expected: list[list[list[int]]],
    fake: FakeDevice, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """What was not waited for is poison, and shows in the text."""
    if place != "holders on the device":
        monkeypatch.setattr(attention_merge, "staging_for", lambda device: lambda: Staged(fake))
    rig = Rig(decoder, port=PORTS[place](fake), **SHARDS[shard], **lanes)  # type: ignore[arg-type]
    assert rig.generate(PROMPTS, **GREEDY) == expected
    rig.close()
    assert {line.split()[0] for line in fake.log} >= {"down", "up", "record", "wait"}


@pytest.fixture(scope="module")
def expected(decoder: Decoder) -> list[list[list[int]]]:
    rig = Rig(decoder)
    texts = rig.generate(PROMPTS, **GREEDY)
    rig.close()
    return texts


def test_no_device_is_waited_for_as_a_whole() -> None:
    """Not where batches are run; a calibration may."""
    for folder in ("workers", "kernels", "protocols"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Attribute) and node.attr == "synchronize":
                    assert ast.unparse(node.value) != "torch.cuda", f"{path}:{node.lineno}"
