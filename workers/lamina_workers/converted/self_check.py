"""What a converted model must hold before it serves: outside of attention each token is computed from itself alone, and
slices compute what the module computes."""

from __future__ import annotations

import logging

import torch

from lamina_workers.converted.decoder import ConvertedDecoder
from lamina_workers.decoder.model import Batch, Forward, KeyValueReady, QueryReady
from lamina_workers.errors import UnsupportedModelError

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
