"""Devices by name, the memory that is lacking there, and an engine whose parts are on unlike ones."""

from __future__ import annotations

import dataclasses
import errno
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
import typer
from typer.testing import CliRunner

from lamina.cli import options as cli_options
from lamina.config import EngineConfig
from lamina.deploy.local import LocalAttentionWorkers
from lamina.errors import InvalidRequest
from lamina.launch import attention_pool
from lamina_protocols.messages.layers import HolderConfig, LayerSpec
from lamina_workers.attention_server.attention_server import AttentionServer, ServerConfig
from lamina_workers.attention_worker.attention_worker import AttentionWorker
from lamina_workers.attention_worker.device_worker import DeviceWorker, attention_worker
from lamina_workers.attention_worker.page_layout import page_cost
from lamina_workers.devices import available as devices
from lamina_workers.devices.available import find, find_each, memory_available, room_for
from lamina_workers.errors import DeviceError, KernelsUnavailable, NotEnoughMemory, PolicyError
from lamina_workers.kv_pages.head_policies import HeadPolicies

CPU = torch.device("cpu")
SPEC = LayerSpec(kv_layer=0, heads=4, kv_heads=2, d_k=16, d_v=16, scale=0.25)
CONFIG = HolderConfig(layers=(SPEC,), page_size=16, dtype="float32", kv_memory=1 << 20)


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets how many GPUs torch is said to find."""

    def said(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return said


def cuda(*numbers: int) -> tuple[torch.device, ...]:
    return tuple(torch.device("cuda", number) for number in numbers)


class TestNames:
    @pytest.mark.parametrize("name", ["tpu", "cuda:", "cuda:-1", "cuda:64", "cuda:0 ", "CPU", "", "cpu:0", 3, None])
    @pytest.mark.parametrize("field", ["device", "attention_device"])
    def test_what_is_no_name_is_refused(self, field: str, name: object) -> None:
        with pytest.raises(InvalidRequest) as refused:
            EngineConfig(**{field: name})  # type: ignore[arg-type]
        assert str(refused.value).startswith(f"{field} is {name!r}; allowed are auto, cpu, cuda and cuda:N")

    def test_names_of_several_workers(self) -> None:
        config = EngineConfig(device="cuda:1", attention_device=["cpu", "cuda:3"])
        assert (config.device, config.attention_device) == ("cuda:1", ("cpu", "cuda:3"))
        for names, message in (((), "names no device"), (("cpu", "gpu"), "attention_device is 'gpu'")):
            with pytest.raises(InvalidRequest, match=message):
                EngineConfig(attention_device=names)

    def test_flags_say_the_same(self) -> None:
        found = []

        @cli_options.flatten_options
        def command(engine: cli_options.EngineOptions) -> None:
            found.append(engine.config())

        app = typer.Typer()
        app.command()(command)
        flags = ["--device", "cuda:1", "--attention-device", "cpu, cuda:0"]
        result = CliRunner().invoke(app, flags)
        assert result.exit_code == 0, result.output
        assert found == [{"device": "cuda:1", "attention_device": ["cpu", "cuda:0"]}]


class TestFind:
    @pytest.mark.parametrize(
        ("there", "names", "count", "prefer_gpu", "found"),
        [
            (0, "auto", 2, True, (CPU, CPU)),
            (2, "auto", 2, True, cuda(0, 1)),
            (1, "auto", 2, True, (CPU, CPU)),
            (2, "auto", 1, False, (CPU,)),
            (2, "cpu", 3, True, (CPU, CPU, CPU)),
            (3, "cuda", 2, True, cuda(0, 1)),
            (3, "cuda:2", 1, False, cuda(2)),
            (3, ("cuda:2", "cpu", "cuda:0"), 3, True, (*cuda(2), CPU, *cuda(0))),
            (3, ["auto", "cpu", "cpu"], 3, True, (*cuda(0), CPU, CPU)),
        ],
    )
    def test_each_worker_has_one(
        self,
        there: int,
        names: str | list[str],
        count: int,
        prefer_gpu: bool,
        found: tuple[torch.device, ...],
        gpus: Callable[[int], None],
    ) -> None:
        gpus(there)
        assert find_each("device", names, count, prefer_gpu) == found

    @pytest.mark.parametrize(
        ("there", "names", "count", "message"),
        [
            (0, "cuda", 1, "device is 'cuda' for 1 worker, a GPU each; torch finds no GPU here; allowed are cpu and"),
            (0, "cuda:0", 1, "device is 'cuda:0'; torch finds no GPU here; allowed are cpu and auto"),
            (1, "cuda:1", 1, "device is 'cuda:1'; torch finds 1 GPU here; allowed are auto, cpu, cuda and cuda:0"),
            (2, "cuda", 3, "3 workers, a GPU each; torch finds 2 GPUs here; allowed are auto, cpu, cuda and cuda:0"),
            (2, "cuda:1", 2, "device is 'cuda:1' for 2 workers; allowed are cpu, cuda, or a name for each worker"),
            (2, ("cuda:1", "cuda:1"), 2, "device names cuda:1 more than once; allowed is one worker a GPU"),
            (2, ("cuda:0", "cuda:2"), 2, "device is 'cuda:2'; torch finds 2 GPUs"),
            (2, ("cpu",), 2, "device names 1 devices for 2 workers"),
        ],
    )  # fmt: skip
    def test_what_is_not_there_is_named(
        self, there: int, names: str | tuple[str, ...], count: int, message: str, gpus: Callable[[int], None]
    ) -> None:
        gpus(there)
        with pytest.raises(DeviceError) as refused:
            find_each("device", names, count)
        assert message in str(refused.value)

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_an_engine_and_a_worker_say_so(self) -> None:
        with pytest.raises(DeviceError, match="device is 'cuda:3'; torch finds no GPU here"):
            find_each("device", EngineConfig(device="cuda:3").device, 1)
        with pytest.raises(DeviceError, match="attention_device is 'cuda' for 2 workers"):
            attention_pool.attention_devices(EngineConfig(attention_workers=2, attention_device="cuda"))
        with pytest.raises(DeviceError, match="device is 'cuda'"):
            AttentionServer(ServerConfig(name="a", kv_memory=1 << 20, device="cuda"))
        with pytest.raises(DeviceError, match="torch finds no GPU"):
            find("device", "cuda")


class TestWorkers:
    def test_the_holder_here_is_with_the_first_worker(self, gpus: Callable[[int], None]) -> None:
        gpus(3)
        assert attention_pool.attention_devices(EngineConfig()) == (CPU,)
        assert attention_pool.attention_devices(EngineConfig(attention_device="cuda")) == cuda(0)
        assert attention_pool.attention_devices(EngineConfig(attention_device="cuda:2")) == cuda(2)
        assert attention_pool.attention_devices(EngineConfig(attention_workers=3, attention_device="cuda")) == cuda(
            0, 1, 2
        )
        elsewhere = EngineConfig(attention_workers=["a:1", "b:2"], attention_device="cuda:1")
        assert attention_pool.attention_devices(elsewhere) == cuda(1)

    def test_children_are_told_theirs(self) -> None:
        code = "import sys; print(sys.argv[1:], file=sys.stderr)"
        cluster = LocalAttentionWorkers(
            2,
            kv_memory=1 << 20,
            threads=1,
            devices=["cpu", "cuda:1"],
            command=lambda name: [sys.executable, "-c", code],
        )
        assert cluster._placed(0) == ["--device", "cpu"]
        assert cluster._placed(1) == ["--device", "cuda:1"]

    def test_a_cpu_has_the_plain_worker(self) -> None:
        assert type(attention_worker(CONFIG)) is AttentionWorker
        assert not isinstance(attention_worker(CONFIG), DeviceWorker)

    def test_what_searches_an_index_of_keys_is_refused_on_a_gpu(self) -> None:
        def policies(text: str) -> HeadPolicies:
            spec = dataclasses.replace(SPEC, policies=(text,) * 2)
            return HeadPolicies.of(dataclasses.replace(CONFIG, layers=(spec,)))

        policies("retrieval(index=graph)").check(CPU)
        for text in ("page_top_k(budget=0.5)", "retrieval", "heavy_hitter", "recycled", "streaming", "full"):
            policies(text).check(torch.device("cuda:1"))
        with pytest.raises(PolicyError, match=r"the policy retrieval.* attention on cuda:1 cannot search"):
            policies("retrieval(index=graph)").check(torch.device("cuda:1"))

    def test_pages_of_any_device_cost_the_same(self) -> None:
        try:
            assert page_cost(CONFIG, torch.device("cuda")) == page_cost(CONFIG, CPU)
        except KernelsUnavailable as error:
            pytest.skip(str(error))


LIMITED = """
import resource, sys
from lamina_protocols.errors import LaminaError
from lamina_protocols.messages.layers import HolderConfig, LayerSpec
from lamina_workers.attention_worker.attention_worker import AttentionWorker
spec = LayerSpec(kv_layer=0, heads=4, kv_heads=2, d_k=16, d_v=16, scale=0.25)
config = HolderConfig(layers=(spec,), page_size=16, dtype="float32", kv_memory=1 << 45)
resource.setrlimit(resource.RLIMIT_AS, (1 << 36, 1 << 36))
try:
    AttentionWorker(config)
except LaminaError as error:
    print(type(error).__name__, error)
"""


class TestMemory:
    def test_pages_that_do_not_fit(self) -> None:
        ran = subprocess.run([sys.executable, "-c", LIMITED], capture_output=True, text=True, timeout=100)
        kind, _, message = ran.stdout.strip().partition(" ")
        assert kind == "NotEnoughMemory", ran.stderr
        assert message.startswith(f"not enough memory on cpu for KV pages: {1 << 45} bytes wanted, ")
        assert message.endswith(" bytes are there")

    @pytest.mark.parametrize(
        "error",
        [
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
            MemoryError(),
            OSError(errno.ENOMEM, "Cannot allocate memory"),
            RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: not enough memory: you tried to"),
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes"),
        ],
    )
    def test_whatever_says_so(self, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(devices, "memory_available", lambda device: 77)
        message = "not enough memory on cuda:1 for the weights: 123 bytes wanted, 77 bytes are there"
        gpu = torch.device("cuda:1")
        with pytest.raises(NotEnoughMemory, match=message) as raised, room_for("the weights", 123, gpu):
            raise error
        assert raised.value.__cause__ is error

    @pytest.mark.parametrize("error", [OSError(errno.ENOENT, "no file"), RuntimeError("shapes differ"), KeyError("x")])
    def test_other_errors_stay(self, error: Exception) -> None:
        with pytest.raises(type(error)) as raised, room_for("the weights", 1, CPU):
            raise error
        assert raised.value is error

    @pytest.mark.fault("F12")
    def test_torch_lacks_memory_on_this_cpu(self) -> None:
        with pytest.raises(NotEnoughMemory), room_for("the weights", 1 << 60, CPU):
            torch.empty(1 << 60, dtype=torch.uint8)

    def test_what_is_there_is_a_number(self) -> None:
        there = memory_available(CPU)
        assert there is None or there > 1 << 20
