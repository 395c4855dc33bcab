"""What the layers of a model are: attention, a state, both, or an MLP alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from lamina_workers.decoder.config_keys import Keys
from lamina_workers.decoder.family import Family
from lamina_workers.errors import ModelFileError, UnsupportedModelError

Mixers = tuple[Literal["attention", "state"], ...]
"""What a layer has of attention and state, in the order in which a forward pass comes to it."""

ATTENTION: Mixers = ("attention",)
_STATE: Mixers = ("state",)
_KINDS: Mapping[str, Mixers] = {
    "full_attention": ATTENTION,
    "linear_attention": _STATE,
    "attention": ATTENTION,
    "mamba": _STATE,
}
_MLPS: Mapping[str, Mixers] = {"mlp": (), "moe": ()}  # in place of a mixer
_LETTERS = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}
_NAMES = ("layer_types", "layers_block_type")


def read_kinds(keys: Keys, family: Family) -> tuple[tuple[Mixers, ...], tuple[bool, ...] | None]:
    """The mixers of each layer, and which layers have experts, where the kinds of layers say that, else None.

    Raises UnsupportedModelError for another kind of layer, ModelFileError where kinds and num_hidden_layers differ.
    """
    if family.states is None or family.mixers == "both":
        both: Mixers = ATTENTION if family.states is None else ("state", "attention")
        return (both,) * keys.integer("num_hidden_layers", 1, 1024), None
    if (kinds := _given(keys)) is None:
        every = keys.integer("full_attention_interval", 1, 1024)
        layers = keys.integer("num_hidden_layers", 1, 1024)
        return tuple(_STATE if (layer + 1) % every else ATTENTION for layer in range(layers)), None
    if len(kinds) != keys.integer("num_hidden_layers", 1, 1024, default=min(len(kinds), 1024)):
        raise ModelFileError(f"num_hidden_layers is {keys.get('num_hidden_layers')}, expected {len(kinds)} as kinds")
    allowed = {**_KINDS, **(_MLPS if family.mixers == "alternating" else {})}
    for kind in kinds:
        if not isinstance(kind, str) or kind not in allowed:
            raise UnsupportedModelError(f"layer_types has {kind!r:.80}; allowed: {', '.join(map(repr, allowed))}")
    if not kinds or kinds[0] in _MLPS:
        raise UnsupportedModelError(f"the first layer is {next(iter(kinds), None)!r}; allowed: attention or a state")
    sparse = tuple(kind == "moe" for kind in kinds) if family.mixers == "alternating" else None
    return tuple(allowed[str(kind)] for kind in kinds), sparse


def _given(keys: Keys) -> Sequence[object] | None:
    if keys.given("hybrid_override_pattern"):
        return [_LETTERS.get(letter, letter) for letter in keys.text("hybrid_override_pattern")]
    if not keys.given("layer_types") and (full := keys.table("linear_attn_config").get("full_attn_layers")) is not None:
        layers = keys.integer("num_hidden_layers", 1, 1024)  # Kimi counts them from 1
        return [
            "full_attention" if isinstance(full, list) and i in full else "linear_attention"
            for i in range(1, layers + 1)
        ]
    name = next((name for name in _NAMES if keys.given(name)), None)
    if name is None and keys.given("full_attention_interval"):
        return None
    kinds = keys.get(name or _NAMES[0])
    if not isinstance(kinds, list):
        raise ModelFileError(f"{name or _NAMES[0]} is {kinds!r:.80}, expected a list of kinds, one a layer")
    return kinds
