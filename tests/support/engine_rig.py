"""A tiny random model, and an engine around it whose every part can be replaced."""

from __future__ import annotations

import os
import queue
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from lamina.text.structured_output import Grammars

from scripted_drafts import Always

from lamina.engine.drafting import Proposer
from lamina.engine.engine import Engine
from lamina.kv.placement import Holder, Placement
from lamina.kv.request import Request as TokenRequest
from lamina.kv.request import SchedulerConfig
from lamina.launch.kv_sizing import RequestPolicies, indexed_pools, learns, page_groups, state_pools
from lamina.messages.engine_request import EngineOutput, EngineRequest
from lamina.sampling_params import SamplingParams
from lamina.scheduling.control_plane import ControlPlane
from lamina.scheduling.step_tuner import MeasuredBatch, StepTuner
from lamina_protocols.channels.versions import FEATURES
from lamina_protocols.errors import LaminaError
from lamina_protocols.frames import codec
from lamina_protocols.messages.layers import HolderConfig
from lamina_protocols.messages.messages import Fault, Message, Reply, Request, answered
from lamina_protocols.messages.pools import pools
from lamina_workers.attention_worker.attention_worker import AttentionWorker
from lamina_workers.attention_worker.device_worker import attention_worker
from lamina_workers.attention_worker.page_layout import page_cost
from lamina_workers.decoder.decoder_weights import published_shapes
from lamina_workers.decoder.model import Decoder
from lamina_workers.decoder.weight_names import tensor_shapes
from lamina_workers.errors import HolderLost
from lamina_workers.model_config.config import ModelConfig
from lamina_workers.model_worker.model_worker import ModelWorker
from lamina_workers.ports.port import AttentionPort, LocalAttention

DEVICE = os.environ.get("LAMINA_TEST_DEVICE", "cuda" if torch.cuda.is_available() else "cpu")
"""Where tests compute what they can compute on any device."""


TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
}


class Tensors:
    """A checkpoint in memory: random weights of a config."""

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._tensors = {
            name: torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator) * 0.3
            for name, shape in published_shapes(config, tensor_shapes(config)).items()
        }

    def names(self) -> Iterable[str]:
        return self._tensors

    def shape(self, name: str) -> Sequence[int]:
        return self._tensors[name].shape

    def tensor(self, name: str) -> torch.Tensor:
        return self._tensors[name]

    def packed(self, name: str) -> None:
        return None

    def release(self, name: str) -> None:
        pass


def tiny_decoder(**overrides: Any) -> Decoder:
    """A float32 decoder of `TINY`, some fields of its config replaced."""
    config = ModelConfig.from_dict(TINY | overrides)
    return Decoder.load(config, Tensors(config), torch.float32, DEVICE)


def holder_config(
    decoder: Decoder, pages: int = 2000, page_size: int = 16, policy: str = "", sketches: bool = False
) -> HolderConfig:
    """What a holder of that decoder's KV is built from, with room for `pages`, where all heads have that policy."""
    specs = tuple(decoder.config.layer_specs())
    layers = tuple(replace(spec, policies=(policy,) * spec.kv_heads) for spec in specs) if policy else specs
    config = HolderConfig(layers, page_size, "float32", 1 << 30, sketches=sketches, sequence_tokens=256)
    return replace(config, kv_memory=pages * sum(page_cost(pool.config) for pool in pools(config)))


class Unnoticed(Exception):
    """A message is lost on its way."""


class BytesPort:
    """A port that turns every message into bytes and back, both ways: nothing else crosses the cut.

    `before(request)` may raise a LaminaError: the message is lost, and a fault takes the place of the next reply; a
    HolderLost closes the port. Where it raises `Unnoticed`, a message without a reply is lost and nothing tells so.
    `bend(reply)` gives what is received in place of a reply.
    """

    def __init__(
        self,
        worker: AttentionWorker,
        before: Callable[[Request], None] = lambda request: None,
        bend: Callable[[Reply], Reply] = lambda reply: reply,
    ) -> None:
        self.name = "bytes"
        self.closed = False
        self._inner = LocalAttention(worker)
        self.page_layout = self._inner.page_layout
        self.features = FEATURES
        self.before = before
        self._bend = bend
        self._lost = ""
        self._replies: deque[bytearray] = deque()

    def send(self, request: Request) -> None:
        if self.closed:
            raise HolderLost(f"{self.name} is closed")
        try:
            self.before(request)
        except Unnoticed:
            if not answered(request):
                return
        except HolderLost:
            self.closed = True
            raise
        except LaminaError as error:
            self._lost = str(error)
        if not self._lost:
            self._inner.send(codec.decode(_frame(request)))  # type: ignore[arg-type]  # a request comes back as one
        if not answered(request):
            return
        lost = Fault(request.epoch, request.batch, self._lost)
        self._replies.append(_frame(lost if self._lost else self._inner.receive()))
        self._lost = ""

    def receive(self, timeout: float | None = None) -> Reply:
        if self.closed or not self._replies:
            raise HolderLost(f"{self.name} has nothing to say")
        return self._bend(codec.decode(self._replies.popleft()))  # type: ignore[arg-type]  # a reply comes back as one

    def ready(self) -> bool:
        return self.closed or bool(self._replies)

    def close(self) -> None:
        self.closed = True


def _frame(message: Message) -> bytearray:
    return bytearray(b"".join(codec.encode(message)))


LOCAL = 0  # the number of the pool beside the model


class Restless(StepTuner):
    """A local share that changes every few batches."""

    def __init__(self, seed: int, often: float = 0.3, lanes: int = 1) -> None:
        super().__init__((lanes,), 0.5)
        self._rng = random.Random(seed)
        self._often = often

    def completed(self, batch: MeasuredBatch, moving: bool = False) -> None:
        if self._rng.random() < self._often:
            self.share = self._rng.choice((0.0, 0.3, 0.7, 1.0))


class Rig:
    """An engine around a tiny decoder: answers prompts with token ids.

    `shard=None` is one holder that fuses, as in one process. Otherwise there are holders without fusing, one for each
    number in `weights`, and where `local_pool` gives pages a local one for copies of prompts, and with a `local_tier`
    for whole sequences. Without `fuses` q goes first in decode, to ports that are not in this
    process. With a `proposer` sequences get up to `drafts` drafts whenever they can. `policy` is that of all heads,
    where a request has none.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        shard: str | None = None,
        weights: Sequence[int] = (1,),
        local_pool: int = 0,
        local_tier: bool = False,
        tuner: StepTuner | None = None,
        pages: int = 2000,
        page_size: int = 16,
        max_batch_tokens: int = 512,
        prefix_cache: bool = False,
        max_model_len: int = 2048,
        lanes: int = 1,
        wait: float = 60.0,
        fuses: bool = True,
        grammars: Grammars | None = None,
        proposer: Proposer | None = None,
        drafts: int = 4,
        policy: str = "",
        sketches: bool = False,
        port: Callable[[AttentionWorker], AttentionPort] = LocalAttention,
        around: Callable[[ModelWorker, dict[int, AttentionPort]], Any] = lambda worker, ports: worker,
    ) -> None:
        self.pages = pages
        self._port = port
        self.holder = holder_config(decoder, pages, page_size, policy, sketches)
        states = state_pools(self.holder)
        limits = SchedulerConfig(
            max_batch_tokens=max_batch_tokens,
            max_sequences=64,
            max_model_len=max_model_len,
            page_size=page_size,
            page_groups=page_groups(self.holder),
            prefix_cache=prefix_cache,
            states=states,
            snapshot_tokens=2 * page_size if states and prefix_cache else None,
            max_drafts=0 if proposer is None else drafts,
            of_policy=RequestPolicies(self.holder, partial(page_groups, self.holder)),
        )
        # What chooses runs on CPUs alone.
        self._device = torch.device("cpu" if learns(self.holder) else DEVICE)
        self._fused = shard is None
        self.workers = {
            number: attention_worker(self.holder, device=self._device) for number in range(1, len(weights) + 1)
        }
        self.ports = {number: port(worker) for number, worker in self.workers.items()}
        holders = {number: self._holder(number, weight) for number, weight in enumerate(weights, 1)}
        ports = dict(self.ports)
        if local_pool:
            local = holder_config(decoder, local_pool, page_size, policy, sketches)
            self.workers[LOCAL] = attention_worker(local, device=self._device)
            holders[LOCAL] = Holder(_page_counts(self.workers[LOCAL]), fused=True)
            ports[LOCAL] = LocalAttention(self.workers[LOCAL])
        self.placement = Placement(
            holders,
            heads=(tuple(pool.config.layers[0].kv_heads for pool in pools(self.holder)),),
            page_size=page_size,
            max_model_len=max_model_len,
            shard=shard or "heads",
            local_pools=(LOCAL,) if local_pool else (),
            local_tier=local_tier,
            states=states,
            indexed=indexed_pools(self.holder),
            samples=learns(self.holder),
        )
        tuner = tuner or StepTuner((lanes,), None if local_tier else 0.0, (fuses,))
        control = ControlPlane(limits, self.placement, tuner)
        self.scheduler = control.scheduler
        worker = around(ModelWorker(decoder, self.holder, ports), self.ports)
        self.engine = Engine(
            worker,
            control,
            time.monotonic,
            grammars=grammars,
            wait=wait,
            speculation=None if proposer is None else Always(drafts),
            proposer=proposer,
        )
        self._thread = threading.Thread(target=self.engine.run, daemon=True)
        self._thread.start()
        self._submitted = 0

    def _holder(self, number: int, weight: int = 1) -> Holder:
        """That worker as placement sees it."""
        counts = _page_counts(self.workers[number])
        return Holder(counts, weight, fused=self._fused, name=f"worker-{number}")

    def join(self, port: Callable[[AttentionWorker], Any] | None = None) -> int:
        """One worker more, of as many pages. Returns its number."""
        number = max(self.workers) + 1
        self.workers[number] = attention_worker(self.holder, device=self._device)
        self.ports[number] = (port or self._port)(self.workers[number])
        self.ports[number].name = f"worker-{number}"
        self.engine.join(self.ports[number], self._holder(number))
        return number

    def submit(self, prompt: Sequence[int], params: SamplingParams, priority: int = 0) -> tuple[EngineRequest, Any]:
        """Queue one prompt; its outputs come through the queue that is returned."""
        inbox: queue.SimpleQueue[list[EngineOutput]] = queue.SimpleQueue()
        self._submitted += 1
        ticket = EngineRequest(
            request=TokenRequest(
                id=str(self._submitted),
                prompt=tuple(prompt),
                max_tokens=params.max_tokens,
                min_tokens=params.min_tokens,
                stop_token_ids=frozenset(params.stop_token_ids),
                n=params.n,
                priority=priority,
                policy=params.policy or "",
            ),
            params=params,
            seed=params.seed or 0,
            sink=lambda _ticket, outputs: inbox.put(outputs),
            submitted=0.0,
        )
        self.engine.submit(ticket)
        return ticket, inbox

    def generate(self, prompts: Sequence[Sequence[int]], **sampling: Any) -> list[list[list[int]]]:
        """The output tokens of each sample of each prompt. Raises what the engine reports."""
        params = SamplingParams(**sampling).with_defaults({"do_sample": True} if "temperature" in sampling else {})
        return [collect(inbox, params.n) for _, inbox in [self.submit(prompt, params) for prompt in prompts]]

    def close(self) -> None:
        """Stop, and check that every page came back."""
        self.engine.close()
        self._thread.join()
        self.scheduler.check_integrity()
        for worker in self.workers.values():
            for pool in worker.pools:
                pool.check_integrity()


def one_process(decoder: Decoder, prompts: Sequence[Sequence[int]], **sampling: Any) -> list[list[list[int]]]:
    """The output tokens of each sample of each prompt in one process, to which nothing happens."""
    rig = Rig(decoder)
    texts = rig.generate(prompts, **sampling)
    rig.close()
    return texts


def _page_counts(worker: AttentionWorker) -> tuple[int, ...]:
    return tuple(pool.n_pages for pool in worker.pools)


def collect(inbox: Any, n: int = 1) -> list[list[int]]:
    """The tokens of every sample, read until all have ended."""
    tokens: list[list[int]] = [[] for _ in range(n)]
    ended = 0
    while ended < n:
        for output in inbox.get(timeout=60):
            if output.error is not None:
                raise output.error
            if output.token is not None:
                tokens[output.sample].append(output.token)
            ended += output.finish_reason is not None
    return tokens
