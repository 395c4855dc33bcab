"""Puts an engine together: a name becomes files, files a decoder, and around it the workers of this process.

Knows every part by its constructor and no part's inside.
"""

from __future__ import annotations

import logging
import math
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lamina.client.input_processor import InputProcessor
from lamina.config import EngineConfig
from lamina.deploy.local_models import LocalModelWorkers
from lamina.deploy.worker_events import AttentionWorkers, ModelWorkerProcesses
from lamina.engine.engine import Engine
from lamina.errors import InvalidRequest, ModelFileError, UnsupportedModelError
from lamina.journal.journal import Run
from lamina.journal.recorder import Recorder
from lamina.launch.attention_pool import LOCAL, AttentionPool, connect_attention
from lamina.launch.journal_setup import open_journal, past_epochs, recover
from lamina.launch.kv_sizing import attention_devices, check_room, divided, holder_config, limits_of
from lamina.launch.model_pool import ModelWorkerPool, begins, rank_holders
from lamina.messages.engine_request import EngineRequest
from lamina.models.resolve import resolve
from lamina.sampling_params import SamplingParams
from lamina.scheduling.lane_tuner import LaneTuner
from lamina.scheduling.local_share import LocalShare
from lamina.scheduling.placement import Holder, Placement
from lamina.scheduling.request import SchedulerConfig
from lamina.scheduling.scheduler import Scheduler
from lamina.system.machine import Machine, native_dtype, this_machine
from lamina.system.progress import Progress
from lamina.text.tokenizer import Tokenizer, read_json
from lamina_protocols.messages import Surveyed
from lamina_workers.attention_worker.device_worker import attention_worker
from lamina_workers.attention_worker.head_policies import HeadPolicies
from lamina_workers.attention_worker.page_layout import page_count
from lamina_workers.decoder.checkpoint import Checkpoint, fingerprint
from lamina_workers.decoder.config import ModelConfig
from lamina_workers.decoder.decoder_weights import DecoderWeights, load_weights, tensor_shapes
from lamina_workers.decoder.graphs import sliced
from lamina_workers.decoder.model import Decoder
from lamina_workers.decoder.shard import Shard, with_ranks
from lamina_workers.devices.available import find_each, room_for
from lamina_workers.model_worker.interface import Workers
from lamina_workers.model_worker.model_worker import ModelWorker
from lamina_workers.model_worker.warmup import prepare_kernels
from lamina_workers.parallel.peers import Peer
from lamina_workers.parallel.replicas import PipelineReplicas
from lamina_workers.parallel.tensor_parallel import TensorParallelWorkers
from lamina_workers.ports.port import AttentionPort, LocalAttention

logger = logging.getLogger("lamina")

HERE = 1  # the number of the holder that keeps whole sequences in the engine's process
AUTO_LANES = 3  # that are tried: more share the weights' reading among too few sequences each
_KV_PROJECTION = 2 << 20  # bytes of weights: 80 us at 25 GB/s. An estimate: no model at hand is large enough


@dataclass(frozen=True, slots=True)
class Runtime:
    """A loaded model and the engine that runs it. `possible` is the most tokens of one sequence that can have KV."""

    model_path: Path
    model: ModelConfig
    generation_config: Mapping[str, Any]
    tokenizer: Tokenizer
    limits: SchedulerConfig
    possible: int
    inputs: InputProcessor
    engine: Engine
    thread: threading.Thread
    progress: Progress | None
    attachment: AttentionPool | None = None
    unfinished: tuple[EngineRequest, ...] = ()  # of an engine before, by the journal
    ranks: ModelWorkerPool | None = None

    def stop(self) -> None:
        """Stop the engine, and wait until its thread is gone: the interpreter must not end while it is in torch."""
        self.engine.close()
        if self.thread is not threading.current_thread():
            self.thread.join()
        if self.ranks is not None:
            self.ranks.close()
        if self.attachment is not None:
            self.attachment.close()
        self.tokenizer.close()

    def drain(self, worker: str) -> int:
        """Move an attention worker's KV to the others and let it go. Returns how many tokens moved.

        Raises InvalidRequest for an unknown worker or the last one, EngineError where it could not be done.
        """
        return self.engine.drain(worker).result()


def start(
    name: str | Path,
    config: EngineConfig,
    progress: Progress | None = None,
    members: AttentionWorkers | None = None,
    run: Run | None = None,
    model_members: ModelWorkerProcesses | None = None,
) -> Runtime:
    """Load a model by name and start its engine. Raises ModelFileError, UnsupportedModelError, InvalidRequest, or
    EngineError where other workers do not come up. `members` are the attention workers, where the config does not say;
    `run` is which engine this is, where its journal may be elsewhere; `model_members` has model workers started where
    that is not on this machine.

    Loading and running share one thread, because OpenMP keeps a team of workers for each thread that ever computed:
    with a second team its workers count as too many for the cores, and sleep after each operation (measured on two
    cores: 22 ms a step instead of 16).
    """
    loaded: Future[Runtime] = Future()
    thread = threading.Thread(
        target=_live,
        args=(loaded, name, config, progress, members, run, model_members),
        name="lamina-engine",
        daemon=True,
    )
    thread.start()
    try:
        return loaded.result()
    except BaseException:  # Ctrl-C while it loads: nobody is there any more to stop the engine
        loaded.cancel()
        raise


def _live(
    loaded: Future[Runtime],
    name: str | Path,
    config: EngineConfig,
    progress: Progress | None,
    members: AttentionWorkers | None,
    run: Run | None,
    model_members: ModelWorkerProcesses | None,
) -> None:
    """The life of the engine's thread."""
    try:
        runtime = _build(name, config, progress, members, run, model_members)
    except BaseException as error:  # noqa: BLE001  # it goes to whoever waits
        if loaded.set_running_or_notify_cancel():
            loaded.set_exception(error)
        return
    if loaded.set_running_or_notify_cancel():
        loaded.set_result(runtime)
        runtime.engine.run()


def _build(
    name: str | Path,
    config: EngineConfig,
    progress: Progress | None,
    members: AttentionWorkers | None,
    run: Run | None,
    model_members: ModelWorkerProcesses | None,
) -> Runtime:
    path = resolve(name, progress)
    tokenizer = Tokenizer(path)
    model = with_ranks(rescaled(ModelConfig.from_folder(path), config.rope_scaling), config.ranks)
    machine = this_machine()
    threads = config.threads or machine.cores
    own_threads = max(1, threads // config.model_workers) if config.cluster is None else threads
    torch.set_num_threads(own_threads)
    alike = config.cluster is not None and isinstance(config.device, str)  # each has that of its own node
    devices = find_each("device", config.device, 1 if alike else config.model_workers)
    devices *= config.model_workers if alike else 1
    device, attention_device = devices[0], attention_devices(config)[0]
    dtype = _dtype(config.dtype, device, machine)
    dtype_name = str(dtype).removeprefix("torch.")
    holder = holder_config(path, model, config, dtype, machine)
    for each in attention_devices(config):
        HeadPolicies.of(holder).check(each)
    limits = limits_of(config, model, holder, machine)
    own, *_ = rank_configs = rank_holders(holder, model, config.ranks)
    heads = [config_of.layers[0].kv_heads for config_of in rank_configs]
    generation_config = read_json(path / "generation_config.json")
    SamplingParams().with_defaults(generation_config)  # what is wrong in it is said now, not at each request
    journal = open_journal(config, fingerprint(path), holder, run)
    known_as = journal.engine if journal is not None else secrets.token_hex(16) if config.model_workers > 1 else None
    past = past_epochs(journal)
    attachment: AttentionPool | None = None
    ranks: ModelWorkerPool | None = None
    try:
        attachment = connect_attention(
            config, holder, fingerprint(path), dtype_name, threads, members, known_as, own, heads, past
        )
        if attachment is None and config.replicas > 1:
            raise InvalidRequest(
                f"model_workers is {config.replicas} replicas without attention_workers; allowed are 1 or more, "
                'which all replicas can reach, or model_parallel="tensor"'
            )
        early_query = attachment is not None and _query_goes_first(model, dtype)
        if config.model_workers > 1:
            beside = model_members or LocalModelWorkers(config.model_workers, threads=own_threads)
            told = begins(
                config,
                rank_configs,
                folder=str(path),
                fingerprint=fingerprint(path),
                dtype=dtype_name,
                devices=[str(each) for each in devices],
                attention_device=str(attention_device),
                threads=own_threads,
                early_query=early_query,
                engine=known_as or "",
                epoch=past + 1,
            )
            ranks = ModelWorkerPool(beside, told)
            ranks.begin(progress)
        if attachment is not None:
            attachment.begin(progress)  # they come up while the model loads
        prepare_kernels(own, dtype, (device, attention_device), progress)
        weights = _load(model, path, dtype, device, progress, Shard(0, config.ranks))
        # Prompts are read from the local holder while they fit; without attention workers it keeps everything.
        own, rest = divided(config, own) if attachment is not None else (own, None)
        ports: dict[int, AttentionPort] = {LOCAL: LocalAttention(attention_worker(own, own_threads, attention_device))}
        holders = {
            rank: Holder(page_count(config_of, attention_device), fused=True, rank=rank)
            for rank, config_of in enumerate([own, *rank_configs[1:]])
        }
        if rest is not None:  # besides, a holder here that keeps whole sequences
            ports[HERE] = LocalAttention(attention_worker(rest, own_threads, attention_device), "here")
            holders[HERE] = Holder(page_count(rest, attention_device), fused=True)
        group = None if ranks is None or config.replicas > 1 else ranks.group(device, config.worker_timeout)
        with torch.inference_mode():
            decoder = Decoder(model, weights, Shard(0, config.ranks), None if group is None else group.meet())
        decoder = sliced(decoder, config.compile)
        alone = ModelWorker(decoder, own, ports, own_threads, config.worker_timeout, early_query, epoch=past + 1)
        worker: Workers[Peer] = alone
        if group is not None:
            worker = TensorParallelWorkers(
                alone,
                decoder,
                group,
                pools={rank: rank for rank in range(1, config.ranks)},
                heads=heads,
                config=own,
            )
        elif ranks is not None:
            worker = PipelineReplicas(alone, ranks.mates(), here=ports, config=own, patience=config.worker_timeout)
        names: dict[int, str] = {}
        kept: dict[int, Surveyed] = {}
        if attachment is not None:
            for number, called, remote, had in attachment.seats(worker, 2 * config.ranks):
                names[number], holders[number] = called, remote
                if had is not None:
                    kept[number] = had
        scratch = () if attachment is None else tuple(range(config.ranks))
        placement = Placement(
            holders,
            heads=heads,
            page_size=config.page_size,
            max_model_len=limits.max_model_len,
            layers=len({spec.kv_layer for spec in holder.layers}),
            shard=config.shard,
            scratch=scratch,
            here=() if rest is None else (HERE,),
        )
        scheduler = Scheduler(limits, placement)
        possible = scheduler.longest_possible()
        check_room(config, holder, possible)
        prefix = "" if journal is None else f"{journal.starts}-"  # ids are never used again
        inputs = InputProcessor(tokenizer, limits.max_model_len, possible, model.vocab_size, generation_config, prefix)
        recorder = None if journal is None else Recorder(journal, placement, worker.address)
        engine = Engine(
            worker,
            scheduler,
            placement,
            time.monotonic,
            names=names,
            scratch=scratch,
            lanes=_lanes(config, attachment),
            balance=LocalShare(None if config.local_share == "auto" else float(config.local_share)),
            grammars=inputs.grammars,
            hope=config.recovery_timeout,
            recorder=recorder,
            on_rebuilt=_rebuild_report(progress),
            on_lost=None if attachment is None else attachment.members.lost,
        )
        unfinished: tuple[EngineRequest, ...] = ()
        if journal is not None and recorder is not None:
            unfinished = recover(journal, engine, recorder, worker, placement, kept)
        if attachment is not None:
            attachment.watch(engine)
        if ranks is not None:
            ranks.watch(engine)
    except BaseException:
        if ranks is not None:
            ranks.close()
        if attachment is not None:
            attachment.close()
        if journal is not None:
            journal.close()
        raise
    logger.info("%s: %s on %s, KV %s for %d tokens, %d threads", name, dtype, device, holder.dtype, possible, threads)
    return Runtime(
        path, model, generation_config, tokenizer, limits, possible, inputs, engine, threading.current_thread(),
        progress, attachment, unfinished, ranks,
    )  # fmt: skip


def _query_goes_first(model: ModelConfig, dtype: torch.dtype) -> bool:
    """Whether computing k and v takes so long that q should leave before: longer than three more calls a layer."""
    kv_bytes = 2 * model.num_key_value_heads * model.head_dim * model.hidden_size * dtype.itemsize
    return kv_bytes > _KV_PROJECTION


def _rebuild_report(progress: Progress | None) -> Callable[[int, int], None]:
    def report(done: int, total: int) -> None:
        if progress is not None:
            progress("rebuilding lost KV", done, total)

    return report


def _lanes(config: EngineConfig, attachment: AttentionPool | None) -> LaneTuner:
    if config.ranks > 1:
        return LaneTuner(1)
    if isinstance(config.lanes, int):
        return LaneTuner(config.lanes)
    if config.replicas > 1:
        return LaneTuner.auto(config.replicas + 1, config.replicas)
    return LaneTuner.auto(AUTO_LANES) if attachment is not None else LaneTuner(1)  # nobody to wait for


def rescaled(model: ModelConfig, scaling: Mapping[str, Any] | None) -> ModelConfig:
    """The model with another RoPE scaling, where one is given. Raises InvalidRequest."""
    if scaling is None:
        return model
    try:
        return model.with_rope_scaling(scaling)
    except (ModelFileError, UnsupportedModelError) as error:
        raise InvalidRequest(f"rope_scaling: {error}") from error


def _load(
    model: ModelConfig, path: Path, dtype: torch.dtype, device: torch.device, progress: Progress | None, shard: Shard
) -> DecoderWeights:
    def report(done: int, total: int) -> None:
        if progress is not None:
            progress("loading", done, total)

    size = sum(map(math.prod, tensor_shapes(model).values())) * dtype.itemsize // shard.ranks
    with room_for("the weights", size, device), Checkpoint(path) as checkpoint, torch.inference_mode():
        return load_weights(model, checkpoint, dtype, device, report, shard)


def _dtype(name: str, device: torch.device, machine: Machine) -> torch.dtype:
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else native_dtype(machine)[0]
    dtype: torch.dtype = getattr(torch, name)
    return dtype
