"""A model's folder, read: config, tokenizer, sampling defaults; and its weights, on a device."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lamina.config import EngineConfig
from lamina.errors import InvalidRequest, ModelFileError, UnsupportedModelError
from lamina.messages.engine_request import unwatched
from lamina.models.resolve import resolve
from lamina.sampling_params import SamplingParams
from lamina.system.progress import Progress
from lamina.text.tokenizer import Tokenizer, read_json
from lamina_workers.converted.models import Weights, for_ranks, load_model, model_config
from lamina_workers.decoder.checkpoint import Checkpoint, fingerprint
from lamina_workers.decoder.config import ModelConfig
from lamina_workers.decoder.shard import Shard
from lamina_workers.devices.available import room_for


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """What the files at `path` say. `model` is the config as the engine runs it, cut among its ranks."""

    path: Path
    fingerprint: str
    model: ModelConfig
    tokenizer: Tokenizer
    generation_config: Mapping[str, Any]

    def weights(self, dtype: torch.dtype, device: torch.device, shard: Shard, progress: Progress | None) -> Weights:
        """The weights of one rank. Raises ModelFileError, UnsupportedModelError, NotEnoughMemory."""
        report = unwatched if progress is None else partial(progress, "loading")
        with Checkpoint(self.path) as checkpoint, torch.inference_mode():
            shapes = (checkpoint.shape(name) for name in checkpoint.names())
            with room_for("the weights", sum(map(math.prod, shapes)) * dtype.itemsize // shard.ranks, device):
                return load_model(self.model, checkpoint, dtype, device, report, shard)


def load(name: str | Path, config: EngineConfig, progress: Progress | None) -> ModelFiles:
    """The files of a model, downloaded and converted if they have to be. Raises ModelFileError, UnsupportedModelError,
    InvalidRequest."""
    path = resolve(name, progress)
    tokenizer = Tokenizer(path)
    model = for_ranks(rescaled(model_config(path), config.rope_scaling), config.ranks)
    generation_config = read_json(path / "generation_config.json")
    SamplingParams().with_defaults(generation_config)  # an error in it is raised now, not at each request
    return ModelFiles(path, fingerprint(path), model, tokenizer, generation_config)


def rescaled(model: ModelConfig, scaling: Mapping[str, Any] | None) -> ModelConfig:
    """The model with another RoPE scaling, if one is given. Raises InvalidRequest."""
    if scaling is None:
        return model
    try:
        return model.with_rope_scaling(scaling)
    except (ModelFileError, UnsupportedModelError) as error:
        raise InvalidRequest(f"rope_scaling: {error}") from error
