"""A model's folder, read: config, tokenizer, sampling defaults; and its weights, on a device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from lamina_workers.checkpoints.model_checkpoint import fingerprint, open_checkpoint
from lamina_workers.checkpoints.weight_loader import Packing, kept_bytes, packed_kind
from lamina_workers.converted.models import Weights, for_ranks, load_model, model_config, way
from lamina_workers.decoder.shard import Shard
from lamina_workers.devices.available import room_for
from lamina_workers.model_config.config import ModelConfig


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """What the files at `path` say. `model` is the config as the engine runs it, cut among its ranks."""

    path: Path
    fingerprint: str
    model: ModelConfig
    tokenizer: Tokenizer
    generation_config: Mapping[str, Any]

    def weights(
        self, dtype: torch.dtype, packing: Packing, device: torch.device, shard: Shard, progress: Progress | None
    ) -> Weights:
        """The weights of one rank. Raises ModelFileError, UnsupportedModelError, NotEnoughMemory."""
        report = unwatched if progress is None else partial(progress, "loading")
        with (
            open_checkpoint(self.path) as checkpoint,
            torch.inference_mode(),
            room_for("the weights", lambda: kept_bytes(checkpoint, dtype, packing) // shard.ranks, device),
        ):
            return load_model(self.model, checkpoint, dtype, device, report, shard, packing)

    def kept_bytes(self, dtype: torch.dtype, packing: Packing) -> int:
        """Bytes that the weights take once they are loaded."""
        with open_checkpoint(self.path) as checkpoint:
            return kept_bytes(checkpoint, dtype, packing)

    def packing(self, config: EngineConfig, devices: Sequence[torch.device], dtype: torch.dtype) -> Packing:
        """Which weights stay packed, or become so, on these devices. Raises InvalidRequest where what the config asks
        for is not possible."""
        with open_checkpoint(self.path) as checkpoint:
            kind = packed_kind(checkpoint)
        option = f"quantize is {config.quantize!r}" if config.quantize else f"weights is {config.weights!r}"
        obstacle = self._obstacle(devices, dtype)
        if config.quantize:
            if kind is not None:
                raise InvalidRequest(f"{option}, but the weights are packed already, as {kind}; allowed is None")
            if obstacle:
                raise InvalidRequest(f"{option}, but {obstacle}; allowed here is None")
            return Packing(quantize=config.quantize)
        if config.weights == "packed" and (obstacle or kind is None):
            why = obstacle or "the checkpoint has floats, which quantize=... would pack"
            raise InvalidRequest(f"{option}, but {why}; allowed here are auto, bfloat16 and float32")
        return Packing(packed=config.weights in ("auto", "packed") and kind is not None and not obstacle)

    def _obstacle(self, devices: Sequence[torch.device], dtype: torch.dtype) -> str:
        """Why packed weights cannot be multiplied; "": they can."""
        if way(self.model) == "converted":
            return f"{self.model.architecture} is converted, which runs unpacked weights only"
        if others := [str(device) for device in devices if device.type != "cpu"]:
            return f"there are no kernels for packed weights on {others[0]} (Lamina has no extra with torchao's yet)"
        if dtype not in (torch.bfloat16, torch.float32):
            return f"packed weights are multiplied in bfloat16 or float32, and dtype is {dtype}".replace("torch.", "")
        return ""


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
