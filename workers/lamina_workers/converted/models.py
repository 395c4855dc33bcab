"""A model's folder, whichever way Lamina runs it: by a native family where there is one, else converted.

A converted model is tried before it serves (`check`): outside of attention each token must be computed from itself
alone, and the model's slices must compute what its module computes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import torch

from lamina_workers.checkpoints.checkpoint import TensorSource
from lamina_workers.checkpoints.weight_loader import UNPACKED, Packing
from lamina_workers.converted.config import ConvertedConfig, converted_config
from lamina_workers.converted.decoder import ConvertedDecoder
from lamina_workers.converted.weights import ConvertedWeights, cut_live, load_converted
from lamina_workers.decoder.decoder_weights import DecoderWeights, load_weights
from lamina_workers.decoder.graphs import sliced
from lamina_workers.decoder.model import Batch, Decoder, Forward, KeyValueReady, QueryReady
from lamina_workers.decoder.shard import WHOLE, Collective, Shard, with_ranks
from lamina_workers.errors import RanksError, UnsupportedModelError
from lamina_workers.model_config.config import ModelConfig, read_config_json
from lamina_workers.model_config.families import FAMILIES

logger = logging.getLogger("lamina")

_CLOSE = 0.1
"""The mean difference of logits that counts as none, in their standard deviations: bfloat16 and another number of rows
make less, another token much more."""


@torch.inference_mode()
def check(decoder: ConvertedDecoder) -> None:
    """Run three tokens in two orders. Raises UnsupportedModelError where a token's logits depend on its neighbours.
    Where slices compute something else than the module, the module runs from now on."""
    vocabulary, context = decoder.config.vocab_size, decoder.config.max_position_embeddings
    ids = torch.tensor([number % vocabulary for number in (17, 5, 40)])
    positions = torch.tensor([number % context for number in (0, 6, 3)])
    order = torch.tensor([2, 0, 1])
    logits = _logits(decoder, ids, positions)
    if decoder.in_slices:
        module = _logits(decoder.as_module(), ids, positions)
        if not _close(logits, module):
            logger.warning("%s runs as its own module: its slices compute something else", decoder.config.architecture)
            decoder.give_up_slices()
            logits = module
    first = torch.tensor([number % context for number in range(3)])
    if not _close(_logits(decoder, ids, first), _attended(decoder, decoder.counted_by_model(ids.to(decoder.device)))):
        raise UnsupportedModelError(
            f"{decoder.config.architecture} counts positions in a way of its own, not from 0 for each sequence"
        )
    if not _close(logits[order], _logits(decoder, ids[order], positions[order])):
        raise UnsupportedModelError(
            f"{decoder.config.architecture} mixes tokens outside of attention, so it cannot run in batches of several"
        )


def _close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).abs().mean() <= _CLOSE * b.std())


def _logits(decoder: ConvertedDecoder, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Of a batch where every token attends itself alone, the more the better its query fits its key."""
    device = decoder.device
    batch = Batch(ids.to(device), positions.to(device), torch.arange(len(ids), device=device))
    return _attended(decoder, decoder.forward(batch))


def _attended(decoder: ConvertedDecoder, forward: Forward) -> torch.Tensor:
    event, q = next(forward), torch.empty(0)
    while True:
        try:
            if isinstance(event, KeyValueReady):
                spec = decoder.config.attentions.specs[event.layer]
                k, v = (x.repeat_interleave(spec.group, 1) for x in (event.k, event.v))
                event = forward.send((v * ((q * k).sum(-1, keepdim=True) * spec.scale).sigmoid()).flatten(1))
            elif isinstance(event, QueryReady):
                q, event = event.q, next(forward)
            else:
                raise TypeError(f"a converted model has attention alone, got {type(event).__name__}")
        except StopIteration as stop:
            logits: torch.Tensor = stop.value
            return logits.cpu()


_NATIVE_TYPES = [None, *(family.model_type for family in FAMILIES.values())]

Weights = DecoderWeights | ConvertedWeights


def model_config(folder: str | Path) -> ModelConfig:
    """The facts of the model in `folder`. Raises ModelFileError, and UnsupportedModelError where neither a native
    family nor the converter runs it."""
    raw = read_config_json(folder)
    native: ModelConfig | UnsupportedModelError
    try:
        native = ModelConfig.from_dict(raw)
    except UnsupportedModelError as error:
        native = error
    if isinstance(native, ModelConfig) and raw.get("model_type") in _NATIVE_TYPES:
        return native
    try:  # also a type that names a native class, such as exaone, and has names of its own for tensors
        return converted_config(raw)
    except UnsupportedModelError as error:
        if isinstance(native, ModelConfig):
            return native
        raise UnsupportedModelError(f"{native}. It is not converted either: {error}") from error


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
    config: ModelConfig, weights: Weights, shard: Shard = WHOLE, collective: Collective | None = None
) -> Decoder:
    """The decoder, in the way that is fastest on its device."""
    if isinstance(weights, ConvertedWeights):
        if not isinstance(config, ConvertedConfig):
            raise TypeError(f"{config.architecture} is native, its weights are converted")
        decoder = ConvertedDecoder(config, weights)
        check(decoder)
        return decoder
    return sliced(Decoder(config, weights, shard, collective))
