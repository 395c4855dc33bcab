"""From a model's name and a config to a running engine, in four steps: `load` the files, `size_kv`, `connect` the other
workers, `assemble` the engine."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from lamina.client.input_processor import InputProcessor
from lamina.config import EngineConfig
from lamina.deploy.local import LocalModelWorkers
from lamina.deploy.supervision import ModelSupervisor
from lamina.deploy.worker_events import AttentionWorkers
from lamina.engine.engine import Engine
from lamina.engine.failures import FailureReports
from lamina.errors import InvalidRequest, UnsupportedModelError
from lamina.journal.journal import Journal, Run
from lamina.journal.recorder import Recorder
from lamina.kv.placement import Holder, Placement
from lamina.kv.request import SchedulerConfig
from lamina.launch.attention_pool import LOCAL, AttentionPool, connect_attention
from lamina.launch.checks import check_redundancy, cut_options, unused_options
from lamina.launch.journal_setup import Identity, identify, open_journal, recover
from lamina.launch.kv_sizing import Sizes, check_room, indexed_pools, learns, size_kv
from lamina.launch.model_files import ModelFiles, load
from lamina.launch.model_pool import ModelWorkerPool, begins
from lamina.launch.speculation import DraftFiles, find_drafts, load_proposer
from lamina.messages.engine_request import EngineRequest
from lamina.scheduling.control_plane import ControlPlane
from lamina.scheduling.speculation import Speculation
from lamina.scheduling.step_tuner import StepTuner
from lamina.system.machine import this_machine
from lamina.system.progress import Progress
from lamina.text.tokenizer import Tokenizer
from lamina_protocols.messages.messages import Surveyed
from lamina_workers.attention_worker.device_worker import attention_worker
from lamina_workers.attention_worker.page_layout import page_counts
from lamina_workers.converted.decoder import ConvertedDecoder
from lamina_workers.converted.models import Weights, decoder_of
from lamina_workers.decoder.shard import Shard
from lamina_workers.model_config.config import ModelConfig
from lamina_workers.model_worker.interface import Workers
from lamina_workers.model_worker.model_worker import ModelWorker, prepare_kernels
from lamina_workers.parallel.peers import Peer
from lamina_workers.parallel.replicas import PipelineReplicas
from lamina_workers.parallel.tensor_parallel import TensorParallelWorkers
from lamina_workers.ports.port import LocalAttention

logger = logging.getLogger("lamina")

AUTO_LANES = 3  # the most that are tried: with more, too few sequences share each reading of the weights


@dataclass(frozen=True, slots=True)
class Pools:
    """What an engine has outside its own objects: its journal and the workers in other processes."""

    journal: Journal | None
    identity: Identity
    attention: AttentionPool | None
    models: ModelWorkerPool | None

    def begin(self, progress: Progress | None) -> None:
        """Start the workers, which come up while the model loads."""
        for pool in self._both:
            pool.begin(progress)

    def watch(self, engine: Engine) -> None:
        """Notify the engine from now on of workers that join, leave or are back."""
        for pool in self._both:
            pool.watch(engine)

    def close(self) -> None:
        """Let the workers go, once the engine has stopped."""
        for pool in self._both:
            pool.close()

    @property
    def _both(self) -> list[ModelWorkerPool | AttentionPool]:
        return [pool for pool in (self.models, self.attention) if pool is not None]


@dataclass(frozen=True, slots=True)
class Runtime:
    """A loaded model and the engine that runs it. `possible` is the most tokens of one sequence that can have KV,
    `unfinished` the requests that the previous engine left in the journal."""

    model_path: Path
    model: ModelConfig
    tokenizer: Tokenizer
    limits: SchedulerConfig
    possible: int
    inputs: InputProcessor
    engine: Engine
    thread: threading.Thread
    progress: Progress | None
    pools: Pools
    unfinished: tuple[EngineRequest, ...] = ()

    def stop(self) -> None:
        """Stop the engine, and wait until its thread is gone: the interpreter must not end while it is in torch."""
        self.engine.close()
        if self.thread is not threading.current_thread():
            self.thread.join()
        self.pools.close()
        self.tokenizer.close()

    def drain(self, worker: str) -> int:
        """Move an attention worker's KV to the others, and let it go. Returns and raises what `Drains.begin` says."""
        return self.engine.drain(worker).result()


def start(
    name: str | Path,
    config: EngineConfig,
    progress: Progress | None = None,
    attention_workers: AttentionWorkers | None = None,
    run: Run | None = None,
    model_workers: ModelSupervisor[Any] | None = None,
) -> Runtime:
    """Load a model by name and start its engine. Raises ModelFileError, UnsupportedModelError, InvalidRequest, or
    EngineError where other workers do not start.

    `attention_workers` replace those of the config, `model_workers` start processes elsewhere than on this machine, and
    `run` says which engine this is where its journal may be on another machine.

    Loading and running share one thread, because OpenMP keeps a team of workers for each thread that ever computed:
    with a second team its workers count as too many for the cores, and sleep after each operation (measured on two
    cores: 22 ms a step instead of 16).
    """
    loaded: Future[Runtime] = Future()
    build = partial(_build, name, config, progress, attention_workers, run, model_workers)
    thread = threading.Thread(target=_live, args=(loaded, build), name="lamina-engine", daemon=True)
    thread.start()
    try:
        return loaded.result()
    except BaseException:  # Ctrl-C while it loads: no caller is left to stop the engine
        loaded.cancel()
        raise


def _live(loaded: Future[Runtime], build: Callable[[], Runtime]) -> None:
    try:
        runtime = build()
    except BaseException as error:  # noqa: BLE001  # it is raised in the thread that waits
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
    attention_workers: AttentionWorkers | None,
    run: Run | None,
    model_workers: ModelSupervisor[Any] | None,
) -> Runtime:
    files = load(name, config, progress)
    sizes = size_kv(files, config, this_machine())
    drafts = find_drafts(files, sizes, config, progress)
    torch.set_num_threads(sizes.own_threads)
    relayed = attention_workers is not None
    for warning in chain(unused_options(config, sizes.holder, relayed), cut_options(config, sizes.limits)):
        logger.warning("%s", warning)
    with ExitStack() as undo:
        journal = open_journal(config, files.fingerprint, sizes.holder, run)
        if journal is not None:
            undo.callback(journal.close)
        pools = connect(files, sizes, config, journal, attention_workers, model_workers, undo)
        pools.begin(progress)
        runtime = assemble(files, sizes, pools, config, progress, drafts)
        undo.pop_all()
    logger.info(
        "%s: %s on %s, KV %s for %d tokens, %d threads",
        name,
        sizes.dtype,
        sizes.device,
        sizes.holder.dtype,
        runtime.possible,
        sizes.threads,
    )
    return runtime


def connect(
    files: ModelFiles,
    sizes: Sizes,
    config: EngineConfig,
    journal: Journal | None,
    attention_workers: AttentionWorkers | None,
    model_workers: ModelSupervisor[Any] | None,
    undo: ExitStack,
) -> Pools:
    """The other workers of the engine, not started yet; `undo` closes them. Raises InvalidRequest where the config
    leaves replicas without attention workers."""
    identity = identify(config, journal)
    attention = connect_attention(config, files, sizes, identity, attention_workers)
    if attention is None and config.replicas > 1:
        raise InvalidRequest(
            f"model_workers is {config.replicas} replicas without attention_workers; allowed are 1 or more, "
            'which all replicas can reach, or model_parallel="tensor"'
        )
    if attention is not None:
        undo.callback(attention.close)
    models: ModelWorkerPool | None = None
    if config.model_workers > 1:
        processes = model_workers or LocalModelWorkers(config.model_workers, threads=sizes.own_threads)
        models = ModelWorkerPool(processes, begins(config, files, sizes, identity))
        undo.callback(models.close)
    return Pools(journal, identity, attention, models)


def assemble(
    files: ModelFiles,
    sizes: Sizes,
    pools: Pools,
    config: EngineConfig,
    progress: Progress | None,
    drafts: DraftFiles | None = None,
) -> Runtime:
    """Load the model, join the workers and put the engine together; it runs once its thread calls `run`. Raises
    EngineError where workers do not start, InvalidRequest where the KV memory is too small."""
    prepare_kernels(sizes.ranks[0], sizes.dtype, (sizes.device, sizes.attention_device), progress)
    weights = files.weights(sizes.dtype, sizes.packing, sizes.device, Shard(0, config.ranks), progress)
    worker = _model_workers(files, sizes, pools, config, weights)
    proposer = load_proposer(drafts, sizes, config, progress, weights)
    holders = {
        rank: Holder(page_counts(holder, sizes.attention_device), fused=True, rank=rank)
        for rank, holder in enumerate(sizes.ranks)
    }
    local_pools = () if pools.attention is None else tuple(holders)
    states = sizes.limits.states
    local_tier = bool(local_pools) and config.local_share != 0 and config.model_workers == 1
    surveys: dict[int, Surveyed] = {}
    if pools.attention is not None:
        for number, name, holder, surveyed in pools.attention.join(worker, len(holders)):
            holder.name, holders[number] = name, holder
            if surveyed is not None:
                surveys[number] = surveyed
    for number, holder in holders.items():
        holder.features = worker.features(number)
    place = partial(
        Placement,
        heads=sizes.heads,
        page_size=config.page_size,
        max_model_len=sizes.limits.max_model_len,
        shard=config.shard,
        local_pools=local_pools,
        local_tier=local_tier,
        states=states,
        indexed=indexed_pools(sizes.holder),
        samples=learns(sizes.holder),
    )
    placement = place(holders)
    check_redundancy(config, sizes.limits, placement, pools.attention is not None)
    control = ControlPlane(sizes.limits, placement, _tuner(config, pools.attention is not None, local_tier))
    if config.autoscale is not None:
        parts = (*enumerate(sizes.ranks), *list(enumerate(sizes.seats)) * config.most_workers)
        all_holders = [Holder(page_counts(part, sizes.attention_device), fused=True, rank=rank) for rank, part in parts]
        control.scheduler.admission.expect(place(dict(enumerate(all_holders))))
    possible = control.scheduler.admission.most_hoped()
    check_room(config, sizes, placement, possible)
    prefix = "" if pools.journal is None else f"{pools.journal.starts}-"  # ids are never used again
    inputs = InputProcessor(
        files.tokenizer, sizes.limits.max_model_len, possible, files.model.vocab_size, files.generation_config, prefix
    )
    recorder = None if pools.journal is None else Recorder(pools.journal, placement, worker.address)
    engine = Engine(
        worker,
        control,
        time.monotonic,
        grammars=inputs.grammars,
        recorder=recorder,
        wait=config.recovery_timeout,
        speculation=_speculation(config, sizes) if proposer is not None else None,
        proposer=proposer,
        reports=FailureReports(
            lost=None if pools.attention is None else pools.attention.lost,
            held_back=None if pools.attention is None else pools.attention.held_back,
            rebuilt=None if progress is None else partial(progress, "rebuilding lost KV"),
            room=lambda tokens: inputs.has_room(max(possible, tokens)),
            drained=None if pools.attention is None else pools.attention.workers.drained,
        ),
    )
    unfinished: tuple[EngineRequest, ...] = ()
    if pools.journal is not None and recorder is not None:
        unfinished = recover(pools.journal, engine, recorder, worker, placement, surveys)
    pools.watch(engine)
    return Runtime(
        files.path,
        files.model,
        files.tokenizer,
        sizes.limits,
        possible,
        inputs,
        engine,
        threading.current_thread(),
        progress,
        pools,
        unfinished,
    )


def _model_workers(
    files: ModelFiles, sizes: Sizes, pools: Pools, config: EngineConfig, weights: Weights
) -> Workers[Peer]:
    """All model workers as one, once those in other processes are ready."""
    group = None
    if pools.models is not None and config.replicas == 1:
        group = pools.models.group(sizes.device, config.worker_timeout)
    with torch.inference_mode():
        collective = None if group is None else group.form()
        decoder = decoder_of(files.model, weights, Shard(0, config.ranks), collective)
    epoch = pools.identity.past_epochs + 1
    holder = sizes.ranks[0]
    ports = {LOCAL: LocalAttention(attention_worker(holder, sizes.own_threads, sizes.attention_device))}
    worker = ModelWorker(decoder, holder, ports, sizes.own_threads, config.worker_timeout, epoch=epoch)
    if group is not None:
        others = {rank: rank for rank in range(1, config.ranks)}
        return TensorParallelWorkers(worker, decoder, group, pools=others, heads=sizes.first_heads, config=holder)
    if pools.models is not None:
        if isinstance(decoder, ConvertedDecoder) and not decoder.in_slices:
            name, replicas = files.model.architecture, config.replicas
            raise UnsupportedModelError(f"{name} is not cut into slices, so it runs on 1 replica, not {replicas}")
        peers = pools.models.peers()
        return PipelineReplicas(worker, peers, here=ports, config=holder, patience=config.worker_timeout)
    return worker


def _speculation(config: EngineConfig, sizes: Sizes) -> Speculation | None:
    """How many drafts there are; None where the model's states allow none."""
    drafts = sizes.limits.max_drafts
    return Speculation(drafts, measured=not config.deterministic) if drafts else None


def _tuner(config: EngineConfig, beside_others: bool, local_tier: bool) -> StepTuner:
    """`beside_others`: there are attention workers; without them nothing is waited for, so one lane is enough, and
    everything is stored and attended in one call. `local_tier`: whole sequences may stay in this process."""
    lanes: Sequence[int] = range(1, config.replicas + 2 if config.replicas > 1 else AUTO_LANES + 1)
    if config.ranks > 1 or not beside_others:
        lanes = (1,)
    if isinstance(config.lanes, int):
        lanes = (config.lanes,)
    share = (None if config.local_share == "auto" else float(config.local_share)) if local_tier else 0.0
    orders = {"auto": (True, False), "never": (True,), "always": (False,)}[config.query_first]
    return StepTuner(lanes, share, orders if beside_others else (True,), config.replicas)
