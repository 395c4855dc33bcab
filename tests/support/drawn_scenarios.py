"""Drawn scenarios of a whole engine: its workers, its settings, its clients, and what happens meanwhile. A seed draws
the same scenario each time. `scenario_run.py` runs one.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from hybrid_families import FAMILIES
from small_grammars import EOS, VOCABULARY

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 1024,
    "bos_token_id": EOS - 1,
    "eos_token_id": EOS,
}
_EVEN = {"intermediate_size": 128}  # two ranks have the same blocks of packed weights as one
_LATENT = {"num_key_value_heads": 4, "kv_lora_rank": 32, "q_lora_rank": 24, "qk_nope_head_dim": 12, "v_head_dim": 20}
_WINDOWS = ["full_attention", "sliding_attention", "full_attention"]
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _COMMON | _EVEN),
    "windows": (
        "qwen3",
        _COMMON | _EVEN | {"head_dim": 16, "use_sliding_window": True, "sliding_window": 21, "layer_types": _WINDOWS},
    ),
    "latents": (
        "minicpm3",
        _COMMON | _LATENT | {"qk_rope_head_dim": 16, "scale_emb": 3.0, "scale_depth": 0.9, "dim_model_base": 40},
    ),
    "gated delta": ("qwen3_5_text", FAMILIES["qwen3_5"][1] | _COMMON),
    "mamba2 beside attention": ("falcon_h1", FAMILIES["falcon_h1"][1] | _COMMON),
}
"""Of models: transformers' type and its options, by name."""

STATES = ("gated delta", "mamba2 beside attention")
ONE_HEAD = ("latents",)
RANKS = ("llama", "windows")
SPARES = ("llama", "latents")
LONGEST_PROMPT, LONGEST_TEXT = 140, 48
CONTEXT = LONGEST_PROMPT + LONGEST_TEXT + 12
PACKED_TOKENS = 32
"""Tokens of a batch at most where weights are packed: some CPUs round nothing of what more tokens multiply."""
MEMORY = {"small": 288 << 10, "large": 16 << 20}
"""Bytes of KV of a holder: of one to two of the longest sequences, and of more than all."""

_CHANNELS: tuple[dict[str, Any], ...] = (
    {},
    {"local_channel": False, "data_channel": "tcp"},
    {"local_channel": False, "data_channel": "grpc"},
)
_SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "yy", None]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
_CONSTRAINTS: tuple[dict[str, Any], ...] = (
    {"regex": r"[a-f]{2,9}-[0-9]{1,3}"},
    {"regex": r"(ab|12|true)+"},
    {"choice": ["yes", "no", "abab", "true 12"]},
    {"json_schema": _SCHEMA},
)


@dataclass(frozen=True)
class Client:
    """A request that comes after `delay` seconds. Its client goes after the tokens in `leaves`; None: it stays."""

    prompt: tuple[int, ...]
    params: dict[str, Any]
    priority: int
    delay: float
    leaves: int | None


@dataclass(frozen=True)
class Event:
    """What happens to a worker after so many batches: it is killed ("kill") or stopped ("stop") for `seconds`, or
    drained ("drain")."""

    what: str
    worker: int
    batches: int
    seconds: float


@dataclass(frozen=True)
class Turn:
    """One engine: its model, its `EngineConfig`, whether it drafts whenever it can, and its clients."""

    kind: str
    options: dict[str, Any]
    always_drafts: bool
    exchange: str
    clients: tuple[Client, ...]
    events: tuple[Event, ...]

    @property
    def quantize(self) -> str | None:
        return self.options.get("quantize")


@dataclass(frozen=True)
class Scenario:
    """Engines that have the same attention workers one after another. memory: of each worker, a name in `MEMORY`."""

    seed: int
    workers: int
    memory: str
    turns: tuple[Turn, ...]


def draw(seed: int) -> Scenario:
    chance = random.Random(seed)
    workers = chance.choice((0, 1, 1, 2, 2, 2, 3, 3))
    memory = chance.choice(tuple(MEMORY))
    turns = tuple(_turn(chance, workers, memory) for _ in range(2 if chance.random() < 0.08 else 1))
    return Scenario(seed, workers, memory, turns)


def _turn(chance: random.Random, workers: int, memory: str) -> Turn:
    kind = chance.choice(tuple(KINDS))
    options: dict[str, Any] = {
        "page_size": chance.choice((16, 32)),
        "max_batch_tokens": chance.choice((3, 7, 16, 50, 64, 256, 1024)),
        "max_num_seqs": chance.choice((1, 2, 4, 8, 64)),
        "prefix_cache": chance.random() < 0.6,
        "lanes": chance.choice((1, 2, 3, "auto")),
        "max_model_len": CONTEXT,
        "kv_memory": MEMORY[memory],
    }
    if kind not in STATES and chance.random() < 0.35:
        options |= {"speculate": "ngram", "num_speculative_tokens": chance.randint(1, 16)}
    if kind in RANKS and chance.random() < 0.12:
        options["quantize"] = chance.choice(("int4", "int8"))
        options["max_batch_tokens"] = min(options["max_batch_tokens"], PACKED_TOKENS)
    events: tuple[Event, ...] = ()
    if workers:
        events = _beside_workers(chance, kind, workers, memory, options)
    if kind in RANKS and chance.random() < 0.08:
        options |= {"model_workers": 2, "lanes": 1}
        if workers and chance.random() < 0.3:
            options |= {"model_parallel": "replicas", "lanes": chance.choice((1, 2, 3, "auto"))}
            options["local_share"] = chance.choice((0, "auto"))
    exact = options.get("quantize") is None
    roots = [_tokens(chance, LONGEST_PROMPT) for _ in range(2)]
    clients = tuple(_client(chance, roots, exact) for _ in range(chance.randint(4, 20)))
    always_drafts, exchange = chance.random() < 0.5, "python" if chance.random() < 0.15 else ""
    return Turn(kind, options, always_drafts, exchange, clients, events)


def _beside_workers(
    chance: random.Random, kind: str, workers: int, memory: str, options: dict[str, Any]
) -> tuple[Event, ...]:
    """Adds what attention workers have of settings, and draws what happens to them."""
    shards = ("heads", "sequence", "heads+sequence")
    options["shard"] = "sequence" if kind in ONE_HEAD else chance.choice(shards)
    options["local_share"] = chance.choice((0, 0, 0.5, 1, "auto"))
    options["query_first"] = chance.choice(("always", "never", "auto"))
    options |= chance.choice(_CHANNELS)
    if kind in SPARES and workers > 1 and chance.random() < 0.4:
        options["redundancy"] = chance.choice(("replica", "replica(2)", "parity")[: 1 if workers < 3 else 3])
    if chance.random() < 0.7:
        return ()
    options["worker_timeout"] = 2.0
    whats = ("kill", "stop", "drain") if workers > 1 else ("kill", "stop")
    return tuple(
        sorted(
            (
                Event(chance.choice(whats), chance.randrange(workers), chance.randint(1, 80), chance.uniform(0.1, 3.0))
                for _ in range(chance.randint(1, 3))
            ),
            key=lambda event: event.batches,
        )
    )


def _tokens(chance: random.Random, count: int) -> tuple[int, ...]:
    return tuple(chance.randrange(256) for _ in range(count))


def _client(chance: random.Random, roots: list[tuple[int, ...]], exact: bool) -> Client:
    length = chance.choice((chance.randint(1, 12), chance.randint(1, LONGEST_PROMPT)))
    shared = chance.randint(0, length - 1) if chance.random() < 0.6 else 0
    prompt = chance.choice(roots)[:shared] + _tokens(chance, length - shared)
    if chance.random() < 0.15:  # drafts are found
        prompt = (prompt[:9] * length)[:length]
    leaves = chance.randint(0, 20) if chance.random() < 0.12 else None
    delay = chance.choice((0.0, chance.uniform(0, 0.5)))
    return Client(prompt, _params(chance, exact), chance.choice((0, 0, 0, -1, 2)), delay, leaves)


def _params(chance: random.Random, exact: bool) -> dict[str, Any]:
    """Fields of `SamplingParams`. Not `exact`: rounding depends on the batch, so only greedy tokens can be compared."""
    params: dict[str, Any] = {
        "temperature": 0.0,
        "max_tokens": chance.choice((1, 2, *(chance.randint(3, LONGEST_TEXT) for _ in range(6)))),
        "ignore_eos": chance.random() < 0.7,
    }
    if chance.random() < 0.4:
        params["logprobs"] = chance.randint(0, 4)
    if chance.random() < 0.2:
        params["prompt_logprobs"] = chance.randint(0, 3)
        if chance.random() < 0.3:
            return params | {"max_tokens": 0}
    if not exact:
        return params
    if chance.random() < 0.5:
        params |= {"temperature": chance.uniform(0.3, 1.5), "seed": chance.getrandbits(40)}
        params |= chance.choice(
            ({}, {"top_k": chance.randint(1, 40)}, {"top_p": chance.uniform(0.3, 1)}, {"min_p": chance.uniform(0, 0.3)})
        )
        params["n"] = chance.choice((1, 1, 2, 3))
    drawn: tuple[dict[str, Any], ...] = (
        {"repetition_penalty": chance.uniform(0.8, 1.4)},
        {"presence_penalty": chance.uniform(-1, 1), "frequency_penalty": chance.uniform(-1, 1)},
        {"logit_bias": {chance.randrange(256): chance.uniform(-5, 5) for _ in range(5)}},
        {"min_tokens": chance.randint(0, params["max_tokens"])},
        {"stop_token_ids": [chance.randrange(256) for _ in range(12)]},
        {"stop": [chr(chance.randrange(97, 123)), "12"], "include_stop_str_in_output": chance.random() < 0.5},
    )
    for fields in drawn:
        if chance.random() < 0.15:
            params |= fields
    if chance.random() < 0.15:
        params |= chance.choice(_CONSTRAINTS)
    return params
