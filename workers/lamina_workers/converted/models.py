"""A model's folder, whichever way Lamina runs it: by a native family where there is one, else converted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from lamina_workers.checkpoints.checkpoint import TensorSource
from lamina_workers.checkpoints.weight_loader import UNPACKED, Packing
from lamina_workers.converted.config import ConvertedConfig, converted_config
from lamina_workers.converted.decoder import ConvertedDecoder
from lamina_workers.converted.self_check import check
from lamina_workers.converted.weights import ConvertedWeights, cut_live, load_converted
from lamina_workers.decoder.decoder_weights import DecoderWeights, load_weights
from lamina_workers.decoder.graphs import sliced
from lamina_workers.decoder.model import Decoder
from lamina_workers.decoder.shard import WHOLE, Collective, Shard, with_ranks
from lamina_workers.errors import RanksError, UnsupportedModelError
from lamina_workers.model_config.config import ModelConfig, read_config_json
from lamina_workers.model_config.families import FAMILIES

_NATIVE_TYPES = [None, *(family.model_type for family in FAMILIES.values())]

Weights = DecoderWeights | ConvertedWeights


def model_config(folder: str | Path) -> ModelConfig:
    """The facts of the model in `folder`. Raises ModelFileError, and UnsupportedModelError where neither a native
    family nor the converter runs it."""
    raw = read_config_json(folder)
    found: ModelConfig | UnsupportedModelError
    try:
        found = ModelConfig.from_dict(raw)
    except UnsupportedModelError as error:
        found = error
    if isinstance(found, ModelConfig) and raw.get("model_type") in _NATIVE_TYPES:
        return found
    try:  # also a type that names a native class, such as exaone, and has names of its own for tensors
        return converted_config(raw)
    except UnsupportedModelError as error:
        if isinstance(found, ModelConfig):
            return found
        raise UnsupportedModelError(f"{found}. It is not converted either: {error}") from error


def way(config: ModelConfig) -> str:
    """How the model runs: "native" or "converted"."""
    return "converted" if isinstance(config, ConvertedConfig) else "native"


def live_across(config: ModelConfig, dtype: torch.dtype = torch.bfloat16) -> list[str]:
    """What lives across each attention beside token ids and positions, a token, where weights are of `dtype`. Raises
    UnsupportedModelError for a converted model that is not cut into slices."""
    if isinstance(config, ConvertedConfig):
        return [" + ".join(live) or "nothing" for live in cut_live(config, dtype)]
    # Across the second mixer of a layer, what the first one gave too.
    vectors = [config.hidden_size * (i + 1) for kinds in config.mixers for i in range(len(kinds))]
    return [f"{count} x {str(dtype).removeprefix('torch.')}" for count in vectors]


def for_ranks(config: ModelConfig, ranks: int) -> ModelConfig:
    """The model as `ranks` ranks can share it. Raises RanksError where they cannot."""
    if isinstance(config, ConvertedConfig):
        if ranks != 1:
            raise RanksError(f"{config.architecture} is converted, so it runs on 1 rank; {ranks} were asked for")
        return config
    return with_ranks(config, ranks)


def load_model(
    config: ModelConfig,
    checkpoint: TensorSource,
    dtype: torch.dtype,
    device: torch.device,
    progress: Callable[[int, int], None] | None = None,
    shard: Shard = WHOLE,
    packing: Packing = UNPACKED,
) -> Weights:
    """The weights of `shard`, and what computes with them; a converted model's are unpacked. Raises ModelFileError,
    UnsupportedModelError."""
    if isinstance(config, ConvertedConfig):
        return load_converted(config, checkpoint, dtype, device, progress)
    return load_weights(config, checkpoint, dtype, device, progress, shard, packing=packing)


def decoder_of(
    config: ModelConfig,
    weights: Weights,
    shard: Shard = WHOLE,
    collective: Collective | None = None,
    compile: bool = False,
) -> Decoder:
    """The decoder, in the way that is fastest on its device; `compile`: through torch.compile, where it is native."""
    if isinstance(weights, ConvertedWeights):
        if not isinstance(config, ConvertedConfig):
            raise TypeError(f"{config.architecture} is native, its weights are converted")
        decoder = ConvertedDecoder(config, weights)
        check(decoder)
        return decoder
    return sliced(Decoder(config, weights, shard, collective), compile)
