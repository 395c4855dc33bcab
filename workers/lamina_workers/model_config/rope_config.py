"""One RoPE, and its parameters as a config.json has them, checked once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lamina_workers.errors import ModelFileError, UnsupportedModelError
from lamina_workers.model_config.config_keys import Keys
from lamina_workers.model_config.family import Family

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
_RANGES = {
    "factor": (1.0, 1e6),
    "low_freq_factor": (1e-6, 1e6),
    "high_freq_factor": (1e-6, 1e6),
    "beta_fast": (1e-6, 1e6),
    "beta_slow": (1e-6, 1e6),
    "mscale": (0.0, 1e3),
    "mscale_all_dim": (0.0, 1e3),
    "attention_factor": (1e-6, 1e3),
}
_REQUIRED = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": (),
    "longrope": (),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
# "finetuned" says only how a checkpoint came to be; the rest is read by name.
_KEYS = {*_RANGES, "type", "rope_type", "rope_theta", "original_max_position_embeddings", "truncate"} | {
    *("partial_rotary_factor", "finetuned", "short_factor", "long_factor", "alpha")
}
_BESIDE = ("rope_theta", "original_max_position_embeddings", "partial_rotary_factor")
# Places of a picture's parts; of text alone, all three are a token's position.
_PLACES = ("mrope_section", "mrope_interleaved")
_FULL, _WINDOWED = "full_attention", "sliding_attention"  # kinds of layers, where each has RoPE of its own


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """One RoPE. A scaling reads the fields that its formula names, and ignores the others."""

    kind: str
    """One of `ROPE_TYPES`."""
    theta: float
    """The base."""
    positions: int
    """What the config calls max_position_embeddings."""
    original: int
    """The length of pre-training for yarn, longrope and llama3; elsewhere `positions`."""
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    attention_factor: float | None = None
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    turned: int = 0
    """The first numbers of each head, which are turned; 0: all."""
    interleaved: bool = False
    """Number 2i is turned against 2i + 1; False: i against i + turned / 2. Of both, `head_order` makes halves that are
    turned against each other."""

    @property
    def by_length(self) -> bool:
        """Whether a token's frequencies depend on the length of its sequence."""
        return self.kind in ("dynamic", "longrope")

    @property
    def context(self) -> int:
        """Positions that this RoPE is made for. Some configs already count the factor in, the others don't."""
        if self.kind in ("default", "llama3", "longrope"):
            return self.positions
        return int((self.original if self.kind == "yarn" else self.positions) * self.factor)


def read_ropes(keys: Keys, dim: int, family: Family) -> tuple[RopeConfig, RopeConfig | None]:
    """RoPE of a model whose heads have `dim` numbers, and that of its layers with a window where it is another.

    Parameters are where transformers 4 (`rope_scaling` beside `rope_theta`) or 5 (`rope_parameters`) puts them.
    """
    positions = keys.integer("max_position_embeddings", 1, 1 << 30)
    parameters = keys.table("rope_scaling") or keys.table("rope_parameters")
    if family.multimodal:
        parameters = {name: value for name, value in parameters.items() if name not in _PLACES}
    defaults = {name: keys.get(name) for name in _BESIDE if keys.given(name)}
    if keys.given("rotary_numbers"):
        defaults.setdefault("partial_rotary_factor", keys.integer("rotary_numbers", 2, dim) / dim)
    local = {"rope_theta": keys.get("rope_local_base_freq")} if keys.given("rope_local_base_freq") else None
    if _FULL in parameters or _WINDOWED in parameters:
        by_kind = Keys(parameters, {_FULL: {}, _WINDOWED: {}})
        parameters, local = by_kind.table(_FULL), {**(local or defaults), **by_kind.table(_WINDOWED)}
    rope = read_rope({**defaults, **parameters}, positions, dim, family)
    windowed = rope if local is None else read_rope(local, positions, dim, family)
    return rope, None if windowed == rope else windowed


def read_rope(parameters: Mapping[str, Any], positions: int, dim: int, family: Family) -> RopeConfig:
    """Check RoPE parameters. What is unknown is refused, since ignoring it would compute something else."""
    keys = Keys(parameters, {"rope_theta": 10_000.0, "partial_rotary_factor": 1.0})
    kind = keys.text("rope_type", keys.text("type", "default"))
    if kind not in ROPE_TYPES:
        raise UnsupportedModelError(f"RoPE type {kind!r} is not supported; supported: {', '.join(ROPE_TYPES)}")
    if unknown := sorted(parameters.keys() - _KEYS):
        raise UnsupportedModelError(
            f"RoPE parameter {unknown[0]!r} is not supported; supported: {', '.join(sorted(_KEYS))}"
        )
    if (partial := keys.number("partial_rotary_factor", 0.0, 1.0)) != 1.0 and not family.partial:
        raise UnsupportedModelError(f"partial_rotary_factor {partial:g} is not supported; supported for this model: 1")
    turned = int(dim * partial + 1e-6)
    if turned < 2 or turned % 2:
        raise ModelFileError(f"RoPE turns {turned} of a head's {dim} numbers; allowed is an even number of at least 2")
    original = keys.integer("original_max_position_embeddings", 1, 1 << 30, default=positions)
    theta = keys.number("rope_theta", 1.001, 1e15)
    if kind == "dynamic" and keys.given("alpha"):  # Hunyuan's: the base is another, whatever the length
        kind, theta = "default", theta * keys.number("alpha", 1e-6, 1e6) ** (dim / (dim - 2))
    numbers = {
        name: keys.number(name, *bounds)
        for name, bounds in _RANGES.items()
        if keys.given(name) or name in _REQUIRED[kind]
    }
    if kind in ("yarn", "longrope"):
        numbers.setdefault("factor", max(1.0, positions / original))
    if kind == "llama3" and not numbers["low_freq_factor"] < numbers["high_freq_factor"]:
        low, high = numbers["low_freq_factor"], numbers["high_freq_factor"]
        raise ModelFileError(f"high_freq_factor is {high:g}, expected more than low_freq_factor {low:g}")
    short, long = (
        keys.numbers(name, 1e-6, 1e6, turned // 2) if kind == "longrope" else ()
        for name in ("short_factor", "long_factor")
    )
    return RopeConfig(
        kind=kind,
        theta=theta,
        positions=positions,
        original=original,
        truncate=keys.flag("truncate", True),
        turned=turned,
        interleaved=family.interleaved,
        short_factor=short,
        long_factor=long,
        **numbers,
    )


def scaled_attention(factor: float, weight: float) -> float:
    """YaRN's factor of attention (arXiv 2309.00071, section 3.4) for a context `factor` times as long."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0
