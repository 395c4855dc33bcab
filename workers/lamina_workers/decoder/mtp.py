"""Heads for a token more (MTP): a layer of attention behind the model's own, that some checkpoints have. It reads the
last hidden states of the model and the tokens that followed them, and says what comes behind these."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from lamina_kernels.dense.dense import Linear
from lamina_workers.checkpoints.checkpoint import Renamed, TensorSource, check_tensors
from lamina_workers.checkpoints.weight_loader import ALIGNMENT, Loader, Packing
from lamina_workers.decoder.decoder_weights import (
    DecoderWeights,
    SeparateExperts,
    found_stacked,
    load_mixers,
    published_shapes,
)
from lamina_workers.decoder.model import Decoder
from lamina_workers.decoder.shard import WHOLE, rank_shape
from lamina_workers.decoder.weight_names import EMBEDDING, HEAD, NORM, tensor_shapes
from lamina_workers.errors import UnsupportedModelError
from lamina_workers.model_config.config import ModelConfig

_LAYER = "model.layers.0."
_EMBEDDING_NORM, _HIDDEN_NORM, _JOIN = (f"{_LAYER}{name}" for name in ("enorm", "hnorm", "eh_proj"))
_QWEN = {
    "mtp.layers.0.": _LAYER,
    "mtp.norm.": f"{NORM}.",
    "mtp.pre_fc_norm_embedding.": f"{_EMBEDDING_NORM}.",
    "mtp.pre_fc_norm_hidden.": f"{_HIDDEN_NORM}.",
    "mtp.fc.": f"{_JOIN}.",
}


def mtp_config(config: ModelConfig) -> ModelConfig:
    """The head's layer as a model of one layer."""
    return replace(
        config,
        num_hidden_layers=1,
        windows=(None,),
        rotary=(True,),
        sparse=config.sparse[-1:],
        mixers=(("attention",),),
        indexed=config.indexed[-1:],
    )


def mtp_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The tensors of the head of a model with that `mtp_config`, by the names of such a model."""
    shared, hidden = (f"{EMBEDDING}.weight", f"{HEAD}.weight"), config.hidden_size
    shapes = {name: shape for name, shape in tensor_shapes(config).items() if name not in shared}
    return shapes | {
        f"{_EMBEDDING_NORM}.weight": (hidden,),
        f"{_HIDDEN_NORM}.weight": (hidden,),
        f"{_JOIN}.weight": (hidden, 2 * hidden),
    }


def name_behind(config: ModelConfig, name: str) -> str:
    """How most files call a tensor of the head: behind the layers of the model `config`."""
    prefix = f"model.layers.{config.num_hidden_layers}."
    return name.replace(f"{NORM}.", f"{prefix}shared_head.norm.").replace(_LAYER, prefix)


def mtp_tensors(config: ModelConfig, source: TensorSource) -> TensorSource:
    """The tensors of the first head of the model `config`, by those names. Raises UnsupportedModelError where there is
    none that is known."""
    if config.family.renamed:
        source = Renamed(source, config.family.renamed)
    norm, layer = name_behind(config, f"{NORM}."), name_behind(config, _LAYER)
    for renamed, prefix in ((_QWEN, "mtp."), ({norm: f"{NORM}.", layer: _LAYER}, layer)):
        tensors = Renamed(source, renamed, prefix)
        if f"{_JOIN}.weight" in tensors.names():
            return tensors
    raise UnsupportedModelError(f"the files of this {config.architecture} have no head for a token more (MTP)")


@dataclass(frozen=True, slots=True)
class MtpWeights:
    """`one` as of a model of one layer, with the embedding and the head of the whole model; what norms an embedding and
    a hidden state, and `join`, which makes of both what enters the layer."""

    one: DecoderWeights
    embedding_norm: torch.Tensor
    hidden_norm: torch.Tensor
    join: Linear


def load_mtp(
    config: ModelConfig,
    source: TensorSource,
    weights: DecoderWeights,
    packing: Packing,
    progress: Callable[[int, int], None] | None = None,
) -> MtpWeights:
    """The first head of the model `config`, whose `weights` are there. Raises what `load_weights` raises."""
    tensors, dtype = mtp_tensors(config, source), weights.norm.dtype
    one = found_stacked(mtp_config(config), tensors.names())
    shapes = mtp_shapes(one)
    shared = {f"{_LAYER}embed_tokens.weight", f"{_LAYER}shared_head.head.weight"}  # copies of the model's own
    further = {name for name in tensors.names() if name.startswith("mtp.layers.")}
    check_tensors(tensors, published_shapes(one, shapes), shared | further)
    if one.moe is not None and one.moe.stacked:
        tensors = SeparateExperts(tensors, one, shapes)
    room = sum(2 * math.prod(shape) * dtype.itemsize + 8 * ALIGNMENT for shape in shapes.values())
    load = Loader(
        tensors, dtype, weights.norm.device, progress or (lambda done, total: None), len(shapes), room, packing
    )
    offset = config.family.norm_offset
    layers = tuple(load_mixers(one, load, WHOLE, rank_shape(one, WHOLE)))
    return MtpWeights(
        DecoderWeights(weights.embedding, layers, load.norm(NORM, offset), weights.head),
        load.norm(_EMBEDDING_NORM, offset),
        load.norm(_HIDDEN_NORM, offset),
        load.linear([_JOIN]),
    )


class MtpDecoder(Decoder):
    """The head as a decoder. `given`: the hidden states that come with the tokens of the next batch, `[T, hidden]`."""

    def __init__(self, config: ModelConfig, weights: MtpWeights) -> None:
        super().__init__(config, weights.one)
        self._mtp = weights
        self.given = torch.empty(0)

    def _embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        embedded = self._norm(super()._embed(token_ids), self._mtp.embedding_norm)
        return self._mtp.join(torch.cat((embedded, self._norm(self.given, self._mtp.hidden_norm)), -1))
