"""Models by name: presets of published configs, and any folder or file with a config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from lamina.errors import InvalidRequest
from lamina.simulator.costs.model_configs import from_config, from_folder
from lamina.simulator.costs.shapes import LayerGroup, ModelShape
from lamina.system.text_files import read_toml

__all__ = ["PRESETS", "LayerGroup", "ModelShape", "from_config", "from_folder", "model"]


def model(name: str | Path) -> ModelShape:
    """A preset by its name, in any case; or the shape of a folder or config.json, which `./` sets apart from presets.

    Raises InvalidRequest, which lists the presets where the name means nothing.
    """
    text = str(name)
    if (preset := PRESETS.get(text.lower())) is not None:
        return preset
    try:
        is_path = "/" in text or "\\" in text or Path(text).exists()
    except (OSError, ValueError):  # too long, a null character
        is_path = False
    if text and is_path:
        return from_folder(text)
    raise InvalidRequest(f"unknown model {text!r:.200}; known are {', '.join(PRESETS)}, or a path to a config.json")


def _presets() -> dict[str, ModelShape]:
    tables = read_toml(Path(__file__).with_name("models.toml"))
    return {
        name: replace(from_config(config, name), published_weight_bytes=config.get("weight_bytes"))
        for name, config in tables.items()
    }


PRESETS: Mapping[str, ModelShape] = _presets()
"""The models of `models.toml`, by name."""
