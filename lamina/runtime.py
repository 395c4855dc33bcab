"""Puts an engine together: a name becomes files, files a decoder, and around it the workers of this process.

Knows every part by its constructor and no part's inside.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lamina.attach import LOCAL, Attachment, attach
from lamina.config import EngineConfig
from lamina.engine import Engine
from lamina.errors import InvalidRequest, ModelFileError, UnsupportedModelError
from lamina.intake import Intake
from lamina.lanes import Lanes
from lamina.machine import Machine, kv_share, native_dtype, this_machine
from lamina.members import Members
from lamina.model_cache import Progress
from lamina.models import resolve
from lamina.placement import Holder, Placement
from lamina.policy_choice import head_policies
from lamina.request import PageGroup, SchedulerConfig
from lamina.scheduler import Scheduler
from lamina.tokenizer import Tokenizer, read_json
from lamina.types import SamplingParams
from lamina_kernels import dense, sketches
from lamina_protocols.messages import HolderConfig
from lamina_workers.attention_port import AttentionPort, LocalAttention
from lamina_workers.attention_worker import AttentionWorker
from lamina_workers.layout import attention_kernels, page_cost, page_count, page_layout, sketched
from lamina_workers.model import Decoder
from lamina_workers.model_config import ModelConfig
from lamina_workers.model_worker import ModelWorker
from lamina_workers.policies.policy import LONGEST, Policy
from lamina_workers.retention import keepers
from lamina_workers.weights import Checkpoint, fingerprint

logger = logging.getLogger("lamina")

DEFAULT_BATCH_TOKENS = 1024
MAX_SEQUENCES = 256  # in one batch
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
    intake: Intake
    engine: Engine
    thread: threading.Thread
    progress: Progress | None
    attachment: Attachment | None = None

    def stop(self) -> None:
        """Stop the engine, and wait until its thread is gone: the interpreter must not end while it is in torch."""
        self.engine.close()
        if self.thread is not threading.current_thread():
            self.thread.join()
        if self.attachment is not None:
            self.attachment.close()
        self.tokenizer.close()

    def drain(self, worker: str) -> int:
        """Move an attention worker's KV to the others and let it go. Returns how many tokens moved.

        Raises InvalidRequest for an unknown worker or the last one, EngineError where it could not be done.
        """
        return self.engine.drain(worker).result()


def start(
    name: str | Path, config: EngineConfig, progress: Progress | None = None, members: Members | None = None
) -> Runtime:
    """Load a model by name and start its engine. Raises ModelFileError, UnsupportedModelError, InvalidRequest, or
    EngineError where attention workers do not come up. `members` are those workers, where the config does not say.

    Loading and running share one thread, because OpenMP keeps a team of workers for each thread that ever computed:
    with a second team its workers count as too many for the cores, and sleep after each operation (measured on two
    cores: 22 ms a step instead of 16).
    """
    loaded: Future[Runtime] = Future()
    thread = threading.Thread(
        target=_live, args=(loaded, name, config, progress, members), name="lamina-engine", daemon=True
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
    members: Members | None,
) -> None:
    """The life of the engine's thread."""
    try:
        runtime = _build(name, config, progress, members)
    except BaseException as error:  # noqa: BLE001  # it goes to whoever waits
        if loaded.set_running_or_notify_cancel():
            loaded.set_exception(error)
        return
    if loaded.set_running_or_notify_cancel():
        loaded.set_result(runtime)
        runtime.engine.run()


def _build(name: str | Path, config: EngineConfig, progress: Progress | None, members: Members | None) -> Runtime:
    path = resolve(name, progress)
    tokenizer = Tokenizer(path)
    model = rescaled(ModelConfig.from_folder(path), config.rope_scaling)
    machine = this_machine()
    threads = config.threads or machine.cores
    torch.set_num_threads(threads)
    device = _device(config.device)
    dtype = _dtype(config.dtype, device, machine)
    dtype_name = str(dtype).removeprefix("torch.")
    holder = holder_config(path, model, config, dtype, machine)
    limits = _limits(config, model, holder, machine)
    generation_config = read_json(path / "generation_config.json")
    SamplingParams().with_defaults(generation_config)  # what is wrong in it is said now, not at each request
    attachment = attach(config, holder, fingerprint(path), dtype_name, threads, members)
    try:
        if attachment is not None:
            attachment.begin(progress)  # they come up while the model loads
        _prepare(holder, dtype, device, progress)
        decoder = _load(model, path, dtype, device, progress)
        # Prompts are read from the local holder while they fit; without attention workers it keeps everything.
        ports: dict[int, AttentionPort] = {LOCAL: LocalAttention(AttentionWorker(holder, threads))}
        holders = {LOCAL: Holder(page_count(holder), fused=True)}
        if attachment is not None:
            for number, (port, remote) in enumerate(attachment.ports(), LOCAL + 1):
                ports[number], holders[number] = port, remote
        placement = Placement(
            holders,
            heads=(model.num_key_value_heads,),
            page_size=config.page_size,
            max_model_len=limits.max_model_len,
            layers=len({spec.kv_layer for spec in holder.layers}),
            shard=config.shard,
            scratch=() if attachment is None else (LOCAL,),
        )
        scheduler = Scheduler(limits, placement)
        possible = scheduler.longest_possible()
        _check_room(config, holder, possible)
        intake = Intake(tokenizer, limits.max_model_len, possible, model.vocab_size, generation_config)
        engine = Engine(
            ModelWorker(
                decoder,
                holder,
                ports,
                threads,
                config.worker_timeout,
                early_query=attachment is not None and _query_goes_first(model, dtype),
            ),
            scheduler,
            placement,
            time.monotonic,
            names={number: port.name for number, port in ports.items() if number != LOCAL},
            scratch=() if attachment is None else (LOCAL,),
            lanes=_lanes(config, attachment),
            grammars=intake.grammars,
            hope=config.recovery_timeout,
            on_rebuilt=_rebuild_report(progress),
            on_lost=None if attachment is None else attachment.members.lost,
        )
        if attachment is not None:
            attachment.watch(engine)
    except BaseException:
        if attachment is not None:
            attachment.close()
        raise
    logger.info("%s: %s on %s, KV %s for %d tokens, %d threads", name, dtype, device, holder.dtype, possible, threads)
    return Runtime(
        path, model, generation_config, tokenizer, limits, possible, intake, engine, threading.current_thread(),
        progress, attachment,
    )  # fmt: skip


def _prepare(holder: HolderConfig, dtype: torch.dtype, device: torch.device, progress: Progress | None) -> None:
    """Load the kernels. The first time on a machine they are compiled, which takes some seconds."""
    stages = [("attention kernels", attention_kernels().prepare(page_layout(holder)))]
    if sketched(holder):
        stages.append(("sketch kernels", sketches.prepare(page_layout(holder))))
    stages.append(("dense kernels", dense.prepare(dtype, device)))
    for what, steps in stages:
        for done, total in steps:
            if progress is not None:
                progress(what, done, total)


def _query_goes_first(model: ModelConfig, dtype: torch.dtype) -> bool:
    """Whether computing k and v takes so long that q should leave before: longer than three more calls a layer."""
    kv_bytes = 2 * model.num_key_value_heads * model.head_dim * model.hidden_size * dtype.itemsize
    return kv_bytes > _KV_PROJECTION


def _rebuild_report(progress: Progress | None) -> Callable[[int, int], None]:
    def report(done: int, total: int) -> None:
        if progress is not None:
            progress("rebuilding lost KV", done, total)

    return report


def _lanes(config: EngineConfig, attachment: Attachment | None) -> Lanes:
    if isinstance(config.lanes, int):
        return Lanes(config.lanes)
    return Lanes.auto(AUTO_LANES) if attachment is not None else Lanes(1)  # nobody to wait for


def holder_config(
    path: Path, model: ModelConfig, config: EngineConfig, dtype: torch.dtype, machine: Machine
) -> HolderConfig:
    """What holders of the KV of that model, whose files are at `path`, are built from. `dtype` is that of computing.

    Raises PolicyError for a policy that is unknown or does not fit the model.
    """
    layers = model.layer_specs()
    if (policies := head_policies(config.policy, model, fingerprint(path))) is not None:
        layers = tuple(replace(spec, policies=texts) for spec, texts in zip(layers, policies, strict=True))
    return HolderConfig(
        layers=layers,
        page_size=config.page_size,
        dtype=str(dtype).removeprefix("torch.") if config.kv_dtype == "auto" else config.kv_dtype,
        kv_memory=config.kv_memory if isinstance(config.kv_memory, int) else kv_share(machine, config.holders_here),
    )


def rescaled(model: ModelConfig, scaling: Mapping[str, Any] | None) -> ModelConfig:
    """The model with another RoPE scaling, where one is given. Raises InvalidRequest."""
    if scaling is None:
        return model
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


def _limits(config: EngineConfig, model: ModelConfig, holder: HolderConfig, machine: Machine) -> SchedulerConfig:
    """What the scheduler may plan with. Raises InvalidRequest where settings contradict the model or the machine."""
    context = model.max_position_embeddings
    asked = config.max_model_len
    if asked is not None and asked > context:
        raise InvalidRequest(f"max_model_len is {asked}; the model's context is {context} (see rope_scaling)")
    page_bytes = page_cost(holder)
    groups = page_groups(holder)
    least = sum(group.cells(tuple(range(model.num_key_value_heads))) for group in groups) * page_bytes
    most = machine.memory or 1 << 50
    if not least <= holder.kv_memory <= most:
        raise InvalidRequest(
            f"kv_memory is {holder.kv_memory} bytes; allowed are {least} (a page for each layer and KV head) to {most}"
        )
    return SchedulerConfig(
        max_batch_tokens=config.max_batch_tokens or DEFAULT_BATCH_TOKENS,
        max_sequences=min(MAX_SEQUENCES, config.max_batch_tokens or MAX_SEQUENCES),
        max_model_len=asked or context,
        page_size=config.page_size,
        page_groups=groups,
        prefix_cache=config.prefix_cache and not _keys_depend_on_length(model, asked or context),
    )


def _check_room(config: EngineConfig, holder: HolderConfig, possible: int) -> None:
    asked = config.max_model_len
    if possible < 1:
        raise InvalidRequest(f"kv_memory of {holder.kv_memory} bytes holds not one token")
    if asked is not None and asked > possible:
        where = "kv_memory of" if not config.attention_workers else "the attention workers, with kv_memory of"
        raise InvalidRequest(f"max_model_len is {asked}; {where} {holder.kv_memory} bytes holds {possible} tokens")


def page_groups(holder: HolderConfig) -> tuple[PageGroup, ...]:
    """What the layers that keep KV of their own keep of it, counted by policy and heads."""
    groups: Counter[tuple[Policy | None, frozenset[int]]] = Counter()
    for layer in keepers(holder):
        heads: dict[Policy | None, set[int]] = {}
        for head, policy in enumerate(layer):
            heads.setdefault(policy if policy.seen_from(LONGEST) > 0 else None, set()).add(head)
        groups.update((policy, frozenset(those)) for policy, those in heads.items())
    return tuple(PageGroup(layers, policy, heads) for (policy, heads), layers in groups.items())


def _keys_depend_on_length(model: ModelConfig, length: int) -> bool:
    """Dynamic RoPE turns keys by their prompt's length, so prompts of unlike lengths cannot share them."""
    return model.rope.kind == "dynamic" and length > model.rope.positions
