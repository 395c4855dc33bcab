"""What a model keeps of a sequence, and how much of it a system has room for, in words. KV and states stand apart."""

from __future__ import annotations

from lamina.simulator.costs.capacity import UNBOUNDED
from lamina.simulator.costs.mixers import STATE_RECORDS
from lamina.simulator.costs.shapes import ModelShape
from lamina.simulator.costs.systems import System

_UNITS = ("B", "KB", "MB", "GB", "TB")


def kept(shape: ModelShape, element: float = 2.0) -> str:
    """Such as "24.6 KB of KV a token (12 layers); 162 MB of states a sequence (36 layers, 2 records of 80.8 MB)"."""
    said = []
    if shape.attentions:
        said.append(f"{in_bytes(shape.kv_bytes_per_token(element))} of KV a token ({_layers(shape.attentions)})")
    if shape.states:
        records = f"{STATE_RECORDS} records of {in_bytes(shape.state_bytes)}"
        said.append(f"{in_bytes(shape.state_bytes_held)} of states a sequence ({_layers(shape.states)}, {records})")
    return "; ".join(said) or "nothing"


def room(system: System) -> str:
    """Such as "room for 1,394,000 tokens of KV and 340 sequences' states"."""
    capacity = system.capacity
    said = []
    if capacity.tokens < UNBOUNDED:
        said.append(f"{capacity.tokens:,} tokens of KV")
    if capacity.sequences < UNBOUNDED:
        said.append(f"{capacity.sequences:,} sequences' states")
    return f"room for {' and '.join(said) or 'any number of sequences'}"


def in_bytes(count: float) -> str:
    """Three digits and a decimal unit."""
    power = 0
    while count >= 999.5 and power + 1 < len(_UNITS):
        count, power = count / 1000, power + 1
    return f"{count:.3g} {_UNITS[power]}"


def _layers(count: int) -> str:
    return f"{count} layer{'s' if count != 1 else ''}"
