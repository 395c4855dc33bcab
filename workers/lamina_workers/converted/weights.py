"""The weights of a converted model: transformers' module with them, and its forward pass cut into slices."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lamina_kernels.paged import memory
from lamina_workers.checkpoints.checkpoint import TensorSource
from lamina_workers.converted.config import ConvertedConfig
from lamina_workers.converted.cuts import Cuts, cut
from lamina_workers.converted.fusion import Joined, fused, joined_weights, plain_norms, plain_rope
from lamina_workers.converted.modeling import build, converting, load, model_class, read_config
from lamina_workers.converted.recording import NotRecorded, Recording, record
from lamina_workers.converted.slices import Slices
from lamina_workers.errors import UnsupportedModelError

logger = logging.getLogger("lamina")

_ALIGNMENT = 64  # bytes, one cache line


@dataclass(frozen=True, slots=True)
class ConvertedWeights:
    """`model`: transformers' module. `slices`: its forward pass; None where it cannot be recorded, so that the module
    itself runs."""

    model: torch.nn.Module
    slices: Slices | None
    dtype: torch.dtype
    device: torch.device


def load_converted(
    config: ConvertedConfig,
    checkpoint: TensorSource,
    dtype: torch.dtype,
    device: torch.device,
    progress: Callable[[int, int], None] | None = None,
) -> ConvertedWeights:
    """Read the weights and cut the forward pass. Raises ModelFileError where the checkpoint does not fit the config,
    UnsupportedModelError where the model computes something of one token from another outside of attention."""
    raw = json.loads(config.raw)
    kind, theirs = model_class(raw)[1], read_config(raw)
    cuts: tuple[Recording, Cuts] | None = None
    try:
        recording = _recorded(kind, theirs, dtype)
        cuts = recording, cut(recording)
    except NotRecorded as why:
        logger.info("%s runs as its own module, not in slices: %s", config.architecture, why)
    _check_greenlet(config.architecture)
    model = load(kind, theirs, checkpoint, dtype)
    together = [] if cuts is None else joined_weights(cuts[0])
    _settle(model, checkpoint, device, progress or (lambda done, total: None), together)
    slices = None if cuts is None else Slices(*cuts, model, device)
    return ConvertedWeights(model, slices, dtype, device)


def _recorded(kind: Any, config: Any, dtype: torch.dtype) -> Recording:
    with converting("cutting"), torch.inference_mode():
        model = build(kind, config, dtype)
        rope = plain_rope(model)
        return fused(record(model, plain_norms(model), rope), None if rope is None else rope[1])


def _check_greenlet(name: str) -> None:
    try:
        import lamina_workers.converted.coroutine  # noqa: F401
    except ImportError as error:
        raise UnsupportedModelError(f"{name} is converted, which needs greenlet: pip install greenlet") from error


def cut_live(config: ConvertedConfig, dtype: torch.dtype) -> tuple[tuple[str, ...], ...]:
    """What lives across each attention, as text for people. Raises UnsupportedModelError where nothing can be cut."""
    raw = json.loads(config.raw)
    try:
        cuts = cut(_recorded(model_class(raw)[1], read_config(raw), dtype))
    except NotRecorded as why:
        raise UnsupportedModelError(f"{config.architecture} is not cut into slices: {why}") from why
    return tuple(
        tuple(f"{part.width} x {str(part.dtype).removeprefix('torch.')}" for part in live) for live in cuts.live
    )


def _settle(
    model: torch.nn.Module,
    checkpoint: TensorSource,
    device: torch.device,
    progress: Callable[[int, int], None],
    together: Sequence[Joined],
) -> None:
    """Move the weights to where they stay: one block of huge pages, or the device. Each is there twice at most for a
    moment. Tables that are only looked up stay views of the file. `together`: weights that stand side by side."""
    if device.type != "cpu":
        model.to(device)
        return
    views = {checkpoint.tensor(name).data_ptr(): name for name in checkpoint.names() if checkpoint.packed(name) is None}
    looked_up = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    others = {
        id(parameter)
        for module in model.modules()
        if not isinstance(module, torch.nn.Embedding)
        for parameter in module.parameters(recurse=False)
    }
    weights = [p for p in model.parameters() if not (id(p) in looked_up - others and p.data_ptr() in views)]
    room = sum(math.prod(p.shape) * p.itemsize + _ALIGNMENT for p in weights)
    arena, used = memory.allocate(room), 0
    order = {
        id(model.get_parameter(name)): n
        for n, name in enumerate(name for joined in together for name in joined.weights)
    }
    weights.sort(key=lambda p: order.get(id(p), len(order)))
    for done, parameter in enumerate(weights):
        piece = arena[used : used + parameter.nbytes].view(parameter.dtype).view(parameter.shape)
        used += parameter.nbytes + -parameter.nbytes % _ALIGNMENT
        piece.copy_(parameter.data)
        name = views.get(parameter.data_ptr())
        parameter.data = piece
        if name is not None:
            checkpoint.release(name)
        progress(done + 1, len(weights))
