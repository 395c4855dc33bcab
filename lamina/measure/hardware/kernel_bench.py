"""What the engine's kernels do on this machine, each alone: reading, multiplying, dense layers, attention.

Everything is called as the engine calls it, with the weights of a real model, which caches don't hold. On a GPU
reading, multiplying and dense layers can be measured; that was written for one and never run on one.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from lamina.measure.hardware.decode_bench import Held, attention_alone, by_part, decode_batch, load
from lamina.measure.hardware.reading import Bandwidth, synchronise
from lamina.system.machine import this_machine
from lamina_kernels.dense.dense import Linear
from lamina_workers.attention_worker.attention_worker import AttentionWorker
from lamina_workers.ports.port import LocalAttention

READ = 1 << 29  # bytes through which the bandwidth's loops go
_QUICK_READ = 1 << 26
_VARIANTS = ((1, 0, 1), (4, 1024, 16), (8, 4096, 16))  # of `reading.VARIANTS`, the fastest in one state or another
WIDTH, TOKENS = 4096, 1024  # of the matrix product that counts as the peak


class KernelBench:
    """Answers one measurement at a time; times are seconds. `cells`: the (batch, context) that attention will be
    measured with, for which there must be room."""

    def __init__(self, model: str, cells: list[list[int]], device: str = "cpu", quick: bool = False) -> None:
        self._device = torch.device(device)
        self._quick = quick
        self._loaded = load(model, cells, device)
        self._bandwidth = Bandwidth(
            _QUICK_READ if quick else READ, self._device, self._loaded.threads, _VARIANTS, 3 if quick else 7
        )
        self._sequences: Held | None = None

    def about(self) -> dict[str, Any]:
        """What this machine and the measured model are; `memory`: bytes that nothing else takes."""
        machine = this_machine()
        name, memory = machine.processor, machine.memory_available or machine.memory
        if self._device.type == "cuda":
            gpu = torch.cuda.get_device_properties(self._device)
            name, memory = gpu.name, torch.cuda.mem_get_info(self._device)[0]
        return {
            "processor": name,
            "cores": machine.cores,
            "memory": memory,
            "threads": self._loaded.threads,
            "dtype": str(self._loaded.dtype).removeprefix("torch."),
            "rates": self._bandwidth.rates,
            "cuda": torch.cuda.is_available() and self._device.type == "cpu",
        }

    def read(self) -> float:
        """Bytes a second of a plain read, now."""
        return self._bandwidth.settled()

    def peak(self) -> float:
        """FLOP/s of a large matrix product in the model's dtype, as the engine multiplies."""
        width, tokens = (512, 64) if self._quick else (WIDTH, TOKENS)
        weight = torch.randn(width, width, device=self._device).to(self._loaded.dtype)
        x = torch.randn(tokens, width, device=self._device).to(self._loaded.dtype)
        linear = Linear(weight)
        best = min(self._timed(lambda: linear(x)) for _ in range(4))
        return 2.0 * width * width * tokens / best

    @torch.inference_mode()
    def dense(self, rows: int, times: int) -> dict[str, list[float]]:
        """`linears`: of all linear maps of a step (with the MLPs' gates). `forward`: of the whole pass with attention
        left out. In turns, after one of each that doesn't count."""
        device, dtype, config = self._device, self._loaded.dtype, self._loaded.config
        x = torch.randn(rows, config.hidden_size, device=device).to(dtype)
        heads = config.num_attention_heads * config.v_head_dim
        attended = torch.randn(rows, heads, device=device).to(dtype)
        batch = decode_batch(rows, 0, device)
        weights, decoder = self._loaded.weights, self._loaded.decoder

        def linears() -> None:
            for layer in weights.layers:
                layer.qkv(x)
                layer.output(attended)
                for entry in layer.mlps:
                    entry.mlp(x)
            weights.head.float32(x)

        def forward() -> None:
            run = decoder.forward(batch)
            try:
                next(run)
                while True:
                    run.send(None)
                    run.send(attended)
            except StopIteration:
                pass

        seconds: dict[str, list[float]] = {"linears": [], "forward": []}
        for _ in range(times + 1):
            seconds["linears"].append(self._timed(linears))
            seconds["forward"].append(self._timed(forward))
        return {name: values[1:] for name, values in seconds.items()}

    @torch.inference_mode()
    def attention(self, batch: int, context: int, steps: int) -> list[float]:
        """Of one layer: storing each sequence's new key and value and attending, with nothing between two layers."""
        sequences = self._filled(batch, context)
        layers, dtype = self._loaded.holder.layers, self._loaded.dtype
        seconds = [sequences.step(attention_alone(layers, batch, dtype)).run / len(layers) for _ in range(steps + 2)]
        return seconds[2:]

    @torch.inference_mode()
    def layers(self, batch: int, context: int, steps: int) -> dict[str, list[float]]:
        """Of steps of the model's own forward pass, attended in this process: "announce" and "run", as in `Seconds`."""
        sequences, seconds = self._filled(batch, context), []
        for _ in range(steps + 2):
            run = self._loaded.decoder.forward(decode_batch(batch, context, self._device))
            seconds.append(sequences.step(run))
        return by_part(seconds[2:])

    def _filled(self, batch: int, context: int) -> Held:
        """Sequences at a holder in this process."""
        if self._sequences is None:
            loaded = self._loaded
            ports = {0: LocalAttention(AttentionWorker(loaded.holder, loaded.threads))}
            every = tuple(range(loaded.config.num_key_value_heads))
            self._sequences = Held(loaded.holder, ports, {0: every}, dtype=loaded.dtype, threads=loaded.threads)
        self._sequences.fill(batch, context)
        return self._sequences

    def _timed(self, call: Any) -> float:
        start = time.perf_counter()
        call()
        synchronise(self._device)
        return time.perf_counter() - start
