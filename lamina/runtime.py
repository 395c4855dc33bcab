"""Puts an engine together: a name becomes files, files a decoder, and around it the workers of this process.

Knows every part by its constructor and no part's inside.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lamina.config import EngineConfig
from lamina.engine import Engine
from lamina.errors import InvalidRequest, ModelFileError, UnsupportedModelError
from lamina.machine import Machine, native_dtype, this_machine
from lamina.model_cache import Progress
from lamina.models import resolve
from lamina.placement import Placement, Share
from lamina.request import SchedulerConfig
from lamina.scheduler import Scheduler
from lamina.tokenizer import Tokenizer, read_json
from lamina.types import SamplingParams
from lamina_protocols.messages import HolderConfig
from lamina_workers.attention_port import LocalAttention
from lamina_workers.attention_worker import AttentionWorker
from lamina_workers.layout import page_layout
from lamina_workers.model import Decoder
from lamina_workers.model_config import ModelConfig
from lamina_workers.model_worker import ModelWorker
from lamina_workers.weights import Checkpoint

logger = logging.getLogger("lamina")

DEFAULT_BATCH_TOKENS = 1024
MAX_SEQUENCES = 256  # in one batch
_KV_SHARE = 4  # of the available memory, one part in so many


@dataclass(frozen=True, slots=True)
class Runtime:
    """A loaded model and the engine that runs it."""

    model_path: Path
    model: ModelConfig
    generation_config: Mapping[str, Any]
    tokenizer: Tokenizer
    limits: SchedulerConfig
    engine: Engine
    thread: threading.Thread
    progress: Progress | None

    def stop(self) -> None:
        """Stop the engine, and wait until its thread is gone: the interpreter must not end while it is in torch."""
        self.engine.close()
        if self.thread is not threading.current_thread():
            self.thread.join()
        self.tokenizer.close()


def start(name: str | Path, config: EngineConfig, progress: Progress | None = None) -> Runtime:
    """Load a model by name and start its engine. Raises ModelFileError, UnsupportedModelError or InvalidRequest.

    Loading and running share one thread, because OpenMP keeps a team of workers for each thread that ever computed:
    with a second team its workers count as too many for the cores, and sleep after each operation (measured on two
    cores: 22 ms a step instead of 16).
    """
    loaded: Future[Runtime] = Future()
    thread = threading.Thread(target=_live, args=(loaded, name, config, progress), name="lamina-engine", daemon=True)
    thread.start()
    try:
        return loaded.result()
    except BaseException:  # Ctrl-C while it loads: nobody is there any more to stop the engine
        loaded.cancel()
        raise


def _live(loaded: Future[Runtime], name: str | Path, config: EngineConfig, progress: Progress | None) -> None:
    """The life of the engine's thread."""
    try:
        runtime = _build(name, config, progress)
    except BaseException as error:  # noqa: BLE001  # it goes to whoever waits
        if loaded.set_running_or_notify_cancel():
            loaded.set_exception(error)
        return
    if loaded.set_running_or_notify_cancel():
        loaded.set_result(runtime)
        runtime.engine.run()


def _build(name: str | Path, config: EngineConfig, progress: Progress | None) -> Runtime:
    path = resolve(name, progress)
    tokenizer = Tokenizer(path)
    model = ModelConfig.from_folder(path)
    if config.rope_scaling is not None:
        model = _rescaled(model, config.rope_scaling)
    machine = this_machine()
    threads = config.threads or machine.cores
    torch.set_num_threads(threads)
    device = _device(config.device)
    dtype = _dtype(config.dtype, device, machine)
    holder = HolderConfig(
        layers=model.layer_specs(),
        page_size=config.page_size,
        dtype=str(dtype).removeprefix("torch.") if config.kv_dtype == "auto" else config.kv_dtype,
        kv_memory=_kv_memory(config, machine),
    )
    limits = _limits(config, model, holder, machine)
    generation_config = read_json(path / "generation_config.json")
    SamplingParams().with_defaults(generation_config)  # what is wrong in it is said now, not at each request
    decoder = _load(model, path, dtype, device, progress)
    worker = ModelWorker(decoder, holder, [LocalAttention(AttentionWorker(holder, threads))], threads)
    share = Share(heads=tuple(range(model.num_key_value_heads)), lo=0, hi=limits.max_model_len, fused=True)
    logger.info(
        "%s: %s on %s, KV %s for %d tokens, %d threads",
        name, dtype, device, holder.dtype, limits.longest_possible(), threads,
    )  # fmt: skip
    engine = Engine(worker, Scheduler(limits), Placement((share,)), time.monotonic)
    return Runtime(path, model, generation_config, tokenizer, limits, engine, threading.current_thread(), progress)


def _rescaled(model: ModelConfig, scaling: Mapping[str, Any]) -> ModelConfig:
    try:
        return model.with_rope_scaling(scaling)
    except (ModelFileError, UnsupportedModelError) as error:
        raise InvalidRequest(f"rope_scaling: {error}") from error


def _load(
    model: ModelConfig, path: Path, dtype: torch.dtype, device: torch.device, progress: Progress | None
) -> Decoder:
    def report(done: int, total: int) -> None:
        if progress is not None:
            progress("loading", done, total)

    with Checkpoint(path) as checkpoint, torch.inference_mode():
        return Decoder.load(model, checkpoint, dtype, device, report)


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    elif name == "cuda" and not torch.cuda.is_available():
        raise InvalidRequest("device is 'cuda', but torch finds no GPU here; allowed are cpu and auto")
    return torch.device(name)


def _dtype(name: str, device: torch.device, machine: Machine) -> torch.dtype:
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else native_dtype(machine)[0]
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _kv_memory(config: EngineConfig, machine: Machine) -> int:
    if isinstance(config.kv_memory, int):
        return config.kv_memory
    return max(1 << 28, (machine.memory_available or 4 << 30) // _KV_SHARE)


def _limits(config: EngineConfig, model: ModelConfig, holder: HolderConfig, machine: Machine) -> SchedulerConfig:
    """What the scheduler may plan with. Raises InvalidRequest where settings contradict the model or the machine."""
    groups: dict[int | None, int] = {}
    for spec in holder.layers:
        groups[spec.window] = groups.get(spec.window, 0) + spec.kv_heads
    context = model.max_position_embeddings
    asked = config.max_model_len
    if asked is not None and asked > context:
        raise InvalidRequest(f"max_model_len is {asked}; the model's context is {context} (see rope_scaling)")
    page_bytes = page_layout(holder).page_bytes
    least = sum(groups.values()) * page_bytes
    most = machine.memory or 1 << 50
    if not least <= holder.kv_memory <= most:
        raise InvalidRequest(
            f"kv_memory is {holder.kv_memory} bytes; allowed are {least} (a page for each layer and KV head) to {most}"
        )
    limits = SchedulerConfig(
        max_batch_tokens=config.max_batch_tokens or DEFAULT_BATCH_TOKENS,
        max_sequences=min(MAX_SEQUENCES, config.max_batch_tokens or MAX_SEQUENCES),
        max_model_len=asked or context,
        page_size=config.page_size,
        page_groups=tuple((units, window) for window, units in groups.items()),
        total_pages=holder.kv_memory // page_bytes,
        prefix_cache=config.prefix_cache and not _keys_depend_on_length(model, asked or context),
    )
    if asked is not None and asked > limits.longest_possible():
        raise InvalidRequest(
            f"max_model_len is {asked}; kv_memory of {holder.kv_memory} bytes holds {limits.longest_possible()} tokens"
        )
    return limits


def _keys_depend_on_length(model: ModelConfig, length: int) -> bool:
    """Dynamic RoPE turns keys by their prompt's length, so prompts of unlike lengths cannot share them."""
    return model.rope.kind == "dynamic" and length > model.rope.positions
