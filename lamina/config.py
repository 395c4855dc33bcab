"""`EngineConfig`: the settings of an engine. Frozen, and checked once: errors name the value and what is allowed.

What a setting leaves to the machine, `lamina.launch.kv_sizing` decides.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from lamina.errors import InvalidRequest
from lamina.kv import redundancy
from lamina.kv.kv_shares import SHARDS
from lamina.scheduling.speculation import MAX_DRAFTS
from lamina.system.text_files import parse_size
from lamina_protocols.messages.layers import ColdTier
from lamina_workers.devices.names import check_names
from lamina_workers.errors import DeviceError

DEFAULT_MODEL = "smollm2-135m"
DTYPES = ("auto", "float32", "bfloat16", "float16")
KV_DTYPES = ("auto", "float32", "bfloat16", "float16", "int8", "float8_e4m3fn")
PAGE_SIZES = (16, 32, 64, 128, 256)
WEIGHTS = ("auto", "packed", "bfloat16", "float32")
QUANTIZE = ("int4", "int8", None)
DATA_CHANNELS = ("grpc", "tcp")
MODEL_PARALLEL = ("tensor", "replicas")
QUERY_FIRST = ("auto", "always", "never")
_CHOICES: dict[str, tuple[Any, ...]] = {
    "dtype": DTYPES, "kv_dtype": KV_DTYPES, "page_size": PAGE_SIZES, "shard": SHARDS, "model_parallel": MODEL_PARALLEL,
    "query_first": QUERY_FIRST,
    "data_channel": DATA_CHANNELS, "weights": WEIGHTS, "quantize": QUANTIZE,
}  # fmt: skip
_SECONDS = (("worker_timeout", 0.1, 86400), ("recovery_timeout", 0.1, 86400), ("worker_linger", 0, 3600))
_INTEGERS = (
    ("max_model_len", 2**24),
    ("sequence_tokens", 2**24),
    ("max_batch_tokens", 2**20),
    ("max_num_seqs", 2**16),
    ("threads", 1024),
    ("num_speculative_tokens", MAX_DRAFTS),
)
_UNMEASURED: dict[str, Any] = {"lanes": 1, "query_first": "never", "local_share": 0}  # instead of "auto"
DEFAULT_DRAFTS = 8
MAX_WORKERS = 1024
MAX_LANES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """The keywords of `LLM(...)`. None and "auto" leave a choice to the machine or the model."""

    dtype: str = "auto"
    """Of computing, and of weights that are not packed; auto: bfloat16 where the device has it, else float32."""
    weights: str = "auto"
    """How weights that the model's files have in few bits (GGUF, GPTQ, AWQ, compressed-tensors) are kept: packed, or as
    numbers of bfloat16 or float32, which is then the dtype of computing too; auto: packed on a CPU, where Lamina has
    the model's family."""
    quantize: str | None = None
    """On a CPU, pack weights that the files have as floats while they are loaded: int4 (the embedding and the head
    int8) or int8."""
    device: str | Sequence[str] = "auto"
    """Of the dense layers: cpu, cuda (one GPU for each model worker) or cuda:N, or a name for each model worker; auto:
    cuda if there are enough GPUs, else cpu."""
    attention_device: str | Sequence[str] = "auto"
    """Where KV is kept and attention is computed, by attention workers that are started here, or else by the engine:
    cpu, cuda (one GPU for each worker) or cuda:N, or a name for each worker; auto: cpu."""
    max_model_len: int | None = None
    """The longest sequence in tokens; None: the model's context, or as many as `kv_memory` holds if that is less."""
    kv_memory: int | str | None = None
    """Bytes of KV for the engine and each attention worker, or text such as "2GiB"; None: together a quarter of the
    memory that is available, or half of what the weights leave of it, if that is less."""
    force: bool = False
    """Load a model whose weights and KV may take more memory than is available on this machine."""
    kv_local: int | str | None = None
    """Beside attention workers, bytes of KV of the engine's own process, for prompts that are being computed and the
    local share; of all its ranks together. None: `kv_memory`."""
    kv_cold: str | Path | None = None
    """A folder on a disk: KV pages that were not read for a while move there, and come back when they are read. With
    several machines it is a folder of each. None: all KV is in memory."""
    kv_resident: int | str | None = None
    """With `kv_cold`, the bytes of `kv_memory` that each of them should keep in memory, or text such as "2GiB": beyond
    them what was not read for longest leaves sooner. None: a quarter of the memory that is available."""
    kv_dtype: str = "auto"
    """Of stored K and V; auto: as `dtype`. int8 and float8_e4m3fn have a scale for each token and head; the CPU kernels
    have no float8."""
    page_size: int = 32
    """Tokens of a KV page."""
    sequence_tokens: int | None = None
    """The length of a usual sequence in tokens: for it `kv_memory` is dealt among layers that keep different things,
    such as KV and recurrent states. None: `max_model_len`, but 4096 at most."""
    max_batch_tokens: int | None = None
    """Tokens of a batch, of prefill chunks and decode together; None: 1024."""
    max_num_seqs: int | None = None
    """Sequences of a batch, at most; None: 256."""
    threads: int | None = None
    """CPU threads of one step; None: one for each core."""
    prefix_cache: bool = True
    """Keep the KV of prompts and answers, so that shared prefixes are computed once."""
    deterministic: bool = False
    """The same request, alone in the engine, gets the same text whatever ran before it, in bfloat16 too. Then prompts
    are computed each time (no prefix cache), and what is "auto" is not measured: one lane, q, k and v together, and no
    KV in the engine's process beside attention workers. How many drafts there are follows from the text alone."""
    policy: str | Path | None = None
    """What each KV head reads and keeps: "full" for everything, "auto" for the keys that matter, another policy for all
    heads such as "streaming(sink=64, recent=256)", or the path of a policy file, which ends in .toml; None: "full"."""
    sketches: bool = False
    """Keep sketches of all pages of KV, so that requests may name policies that choose by them, such as "auto", where
    `policy` does not choose. They take a part of `kv_memory`."""
    speculate: str | Path | None = None
    """What proposes drafts, the next tokens of each sequence, which the model verifies together: "ngram" for what
    followed the same tokens earlier in the text, "mtp" for the head for a token more that some models have, or a
    smaller model of the same vocabulary (an alias, a folder, a GGUF file or a hub id). The text stays the same. None:
    nothing does."""
    num_speculative_tokens: int | None = None
    """The most drafts of a sequence in a step, 1 to 16; as many are made as pay by what is measured. None: 8."""
    rope_scaling: Mapping[str, Any] | None = None
    """Overrides the RoPE scaling of the model's config, for contexts longer than it allows."""
    model_workers: int = 1
    """How many processes compute the dense layers: this one, and others that are started beside it."""
    model_parallel: str = "tensor"
    """How they share the work: "tensor" cuts each layer among them, "replicas" gives each the whole model, and batches
    go to them in turn."""
    attention_workers: int | Sequence[str] = 0
    """How many attention workers to start, or the "host:port" of each one that runs elsewhere. 0: attention is computed
    in the engine's process."""
    autoscale: tuple[int, int] | None = None
    """The least and the most attention workers that are started here or on the cluster: more before KV would fill those
    that are there, fewer when they are not needed. It begins with `attention_workers`, or the least. None: their number
    stays."""
    shard: str = "heads"
    """How attention workers share a sequence: "heads", "sequence" (ranges of positions) or "heads+sequence"."""
    redundancy: str = "none"
    """What is kept in case that an attention worker is lost, so that its KV need not be computed again: "none",
    "replica" or "replica(N)" (N copies at other workers, of 1 by default), "parity" or "parity(K)" (one XOR of the KV
    of K workers, of 2 by default)."""
    local_share: str | float = "auto"
    """With attention workers, the share (0 to 1) of the KV that decoding reads which is kept and attended in the
    engine's process; auto: the share with the shortest steps, as measured."""
    cluster: str | None = None
    """The address of the Ray cluster, or "auto", on which engine and attention workers run; None: this machine."""
    lanes: int | str = "auto"
    """How many batches are under way at a time, so that one computes while another waits for attention; auto: as
    measured. With replicas at most one more than there are; with tensor-parallel model workers one, because they add up
    their parts of one batch at a time."""
    query_first: str = "auto"
    """Whether q leaves for the attention workers before k and v are computed, in decode: "always", "never", or "auto",
    which measures both and keeps the faster one."""
    worker_timeout: float = 10.0
    """Seconds without a heartbeat, or beyond what its work should take, after which an attention worker is lost."""
    recovery_timeout: float = 60.0
    """Seconds that requests wait for an attention worker to join if none is left."""
    journal: str | Path | None = None
    """A folder for the engine's journal. After the death of its process, another engine with the same folder goes on
    with the unfinished requests. None: no journal."""
    worker_linger: float = 60.0
    """Seconds that attention workers keep the KV of an engine with a journal after it is gone."""
    local_channel: bool = True
    """Use a Unix socket to an attention worker on the same host."""
    data_channel: str = "grpc"
    """How batches travel to an attention worker on another host: grpc or tcp."""
    tls_dir: str | Path | None = None
    """A folder with ca.pem, and cert.pem and key.pem if attention workers ask for a certificate."""
    token_file: str | Path | None = None
    """A file with the token that attention workers ask for."""
    insecure: bool = False
    """Allow attention workers on other hosts without TLS and token, and a Ray cluster without token authentication."""

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            value = getattr(self, name)
            if value not in allowed or isinstance(value, bool):
                raise InvalidRequest(f"{name} is {value!r:.80}; allowed are {', '.join(map(str, allowed))}")
        for name in ("device", "attention_device"):
            try:
                object.__setattr__(self, name, check_names(name, getattr(self, name)))
            except DeviceError as error:
                raise InvalidRequest(str(error)) from error
        for name, low, high in _SECONDS:
            value = getattr(self, name)
            if type(value) not in (int, float) or not low <= value <= high:
                raise InvalidRequest(f"{name} is {value!r:.80}; allowed are {low} to {high} seconds")
        for name, what in (
            ("journal", "a folder, or None"),
            ("kv_cold", "a folder on a disk, or None"),
            ("policy", '"auto", a policy, or a file ending in .toml'),
            ("speculate", '"ngram", "mtp", a model, or None'),
        ):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, (str, Path)) and str(value).strip()):
                raise InvalidRequest(f"{name} is {value!r:.80}; allowed is {what}")
        self._check_workers()
        for name, high in _INTEGERS:
            value = getattr(self, name)
            if value is not None and (type(value) is not int or not 1 <= value <= high):
                raise InvalidRequest(f"{name} is {value!r:.80}; allowed is an integer from 1 to {high}, or None")
        for name in ("force", "prefix_cache", "deterministic", "sketches", "local_channel", "insecure"):
            if type(getattr(self, name)) is not bool:
                raise InvalidRequest(f"{name} is {getattr(self, name)!r:.80}; allowed is True or False")
        if self.rope_scaling is not None and not isinstance(self.rope_scaling, Mapping):
            raise InvalidRequest(f"rope_scaling is {self.rope_scaling!r:.80}; allowed is a mapping as in config.json")
        self._check_weights()
        for name in ("kv_memory", "kv_local", "kv_resident"):
            if (size := getattr(self, name)) is not None:
                object.__setattr__(self, name, parse_size(name, size))
        if self.deterministic:
            object.__setattr__(self, "prefix_cache", False)
            for name, fixed in _UNMEASURED.items():
                if getattr(self, name) == "auto":
                    object.__setattr__(self, name, fixed)
        if self.autoscale is not None:
            self._check_autoscale()
        workers = self.most_workers if isinstance(self.attention_workers, int) else len(self.attention_workers)
        if (spares := redundancy.parse(self.redundancy)) and workers:  # without any now, some may still join
            redundancy.check_workers(spares, workers)

    @property
    def ranks(self) -> int:
        """How many model workers share each layer."""
        return self.model_workers if self.model_parallel == "tensor" else 1

    @property
    def replicas(self) -> int:
        """How many model workers have all of the model."""
        return self.model_workers if self.model_parallel == "replicas" else 1

    @property
    def most_drafts(self) -> int:
        """The most drafts of a sequence in a step; 0 without speculation."""
        return 0 if self.speculate is None else self.num_speculative_tokens or DEFAULT_DRAFTS

    @property
    def first_workers(self) -> int:
        """How many attention workers are started at first, here or on the cluster."""
        count = self.attention_workers if isinstance(self.attention_workers, int) else 0
        return count or (0 if self.autoscale is None else self.autoscale[0])

    @property
    def most_workers(self) -> int:
        """How many attention workers may be started, here or on the cluster."""
        return self.first_workers if self.autoscale is None else self.autoscale[1]

    @property
    def holders_here(self) -> int:
        """How many holders of KV this machine may have: the engine's own, and attention workers that are started
        here."""
        return 1 + (0 if self.cluster else self.most_workers)

    def cold_tier(self, kv_memory: int, share: int) -> ColdTier | None:
        """Where KV goes that nobody reads, of a holder with `kv_memory` bytes, of which `share` may be in memory where
        nothing else is said."""
        folder = None if self.kv_cold is None else str(Path(self.kv_cold).absolute())
        return ColdTier.of(folder, self.kv_resident if isinstance(self.kv_resident, int) else share, kv_memory)

    def _check_weights(self) -> None:
        if self.weights in ("bfloat16", "float32"):
            if self.dtype not in ("auto", self.weights):
                raise InvalidRequest(
                    f"weights is {self.weights!r} and dtype {self.dtype!r}; allowed are the same for both, or one of "
                    "them left auto"
                )
            if self.quantize is not None:
                raise InvalidRequest(
                    f"weights is {self.weights!r} and quantize {self.quantize!r}; allowed beside quantize are auto and "
                    "packed"
                )
            object.__setattr__(self, "dtype", self.weights)

    def _check_workers(self) -> None:
        if type(self.model_workers) is not int or not 1 <= self.model_workers <= MAX_WORKERS:
            raise InvalidRequest(f"model_workers is {self.model_workers!r:.80}; allowed are 1 to {MAX_WORKERS}")
        if self.ranks > 1 and self.lanes not in ("auto", 1):
            raise InvalidRequest(
                f"lanes is {self.lanes!r:.80} with {self.ranks} tensor-parallel model_workers; allowed are 1 and "
                '"auto", or model_parallel="replicas"'
            )
        workers = self.attention_workers
        if isinstance(workers, Sequence) and not isinstance(workers, str):
            for address in workers:
                if not isinstance(address, str) or not re.fullmatch(r"\S+:\d{1,5}", address):
                    raise InvalidRequest(f'attention_workers names {address!r:.80}; allowed is "host:port"')
            if len(set(workers)) != len(workers) or not 1 <= len(workers) <= MAX_WORKERS:
                raise InvalidRequest(
                    f"attention_workers names {len(workers)} addresses; allowed are 1 to {MAX_WORKERS}, different"
                )
            object.__setattr__(self, "attention_workers", tuple(workers))
            if self.cluster is not None:
                raise InvalidRequest("cluster and addresses of attention_workers were given; allowed is one of the two")
        elif type(workers) is not int or not 0 <= workers <= MAX_WORKERS:
            raise InvalidRequest(
                f'attention_workers is {workers!r:.80}; allowed are 0 to {MAX_WORKERS}, or a list of "host:port"'
            )
        limit = self.replicas + 1 if self.replicas > 1 else MAX_LANES
        if self.lanes != "auto" and (type(self.lanes) is not int or not 1 <= self.lanes <= limit):
            reason = f" with {self.replicas} replicas" if self.replicas > 1 else ""
            raise InvalidRequest(f'lanes is {self.lanes!r:.80}{reason}; allowed are 1 to {limit}, or "auto"')
        share = self.local_share
        number = isinstance(share, (int, float)) and not isinstance(share, bool)
        if share != "auto" and not (number and 0 <= float(share) <= 1):
            raise InvalidRequest(f'local_share is {share!r:.80}; allowed are 0 to 1, or "auto"')
        if self.replicas > 1 and share not in ("auto", 0):
            raise InvalidRequest(
                f"local_share is {share!r:.80} with {self.replicas} replicas, of which one could read what is here; "
                'allowed are 0 and "auto"'
            )
        if self.cluster is not None and (not isinstance(self.cluster, str) or not self.cluster):
            raise InvalidRequest(f'cluster is {self.cluster!r:.80}; allowed is "auto", "host:port" or None')

    def _check_autoscale(self) -> None:
        value, workers = self.autoscale, self.attention_workers
        pair = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else ()
        if (
            len(pair) != 2
            or any(type(number) is not int for number in pair)
            or not 0 <= pair[0] <= pair[1] <= MAX_WORKERS
        ):
            raise InvalidRequest(
                f"autoscale is {value!r:.80}; allowed are two numbers, the least and the most attention workers, from "
                f"0 to {MAX_WORKERS}, the second not below the first"
            )
        object.__setattr__(self, "autoscale", pair)
        minimum, maximum = pair
        if not isinstance(workers, int) or (workers and not minimum <= workers <= maximum):
            raise InvalidRequest(
                f"autoscale is {minimum} to {maximum} and attention_workers {workers!r:.80}; allowed beside autoscale "
                "is a number in its range, with which it begins; addresses name workers that other programs start"
            )
        if not minimum and not workers and (self.local_share == 0 or self.model_workers > 1):
            what = "local_share is 0" if self.local_share == 0 else f"model_workers is {self.model_workers}"
            raise InvalidRequest(
                f"autoscale begins with 0 attention workers and {what}, so nothing could hold KV before one starts; "
                "allowed are 1 or more"
            )


class EngineKeywords(TypedDict, total=False):
    """The keywords of `LLM(...)` for editors and type checkers: the fields of `EngineConfig`."""

    dtype: str
    weights: str
    quantize: str | None
    device: str | Sequence[str]
    attention_device: str | Sequence[str]
    max_model_len: int | None
    kv_memory: int | str | None
    force: bool
    kv_local: int | str | None
    kv_cold: str | Path | None
    kv_resident: int | str | None
    kv_dtype: str
    page_size: int
    sequence_tokens: int | None
    max_batch_tokens: int | None
    max_num_seqs: int | None
    threads: int | None
    prefix_cache: bool
    deterministic: bool
    policy: str | Path | None
    sketches: bool
    speculate: str | Path | None
    num_speculative_tokens: int | None
    rope_scaling: Mapping[str, Any] | None
    model_workers: int
    model_parallel: str
    attention_workers: int | Sequence[str]
    autoscale: tuple[int, int] | None
    shard: str
    redundancy: str
    local_share: str | float
    cluster: str | None
    lanes: int | str
    query_first: str
    worker_timeout: float
    recovery_timeout: float
    journal: str | Path | None
    worker_linger: float
    local_channel: bool
    data_channel: str
    tls_dir: str | Path | None
    token_file: str | Path | None
    insecure: bool
