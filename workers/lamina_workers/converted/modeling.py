"""The edge to transformers: its configs, its model classes, its weights. It is imported when a model needs it.

Only code that is part of transformers runs: `auto_map` and everything else by which a config.json asks for code,
kernels or other files is dropped or refused.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from lamina_protocols.errors import LaminaError
from lamina_workers.checkpoints.checkpoint import TensorSource
from lamina_workers.checkpoints.packed_tensors import EVERY, unpack_into
from lamina_workers.checkpoints.quantization import quantization_of
from lamina_workers.converted.attention_calls import MASKED, NAME, attend, masked_as
from lamina_workers.converted.recording import experts
from lamina_workers.errors import ModelFileError, UnsupportedModelError

DEADLINE = 50.0
"""Seconds that building, cutting and checking may each take."""

_MAX_LAYERS = 1024
_MAX_INTEGER = 1 << 40
_MAX_BUFFERS = 2 << 30  # bytes of tables that a model computes for itself, such as masks of all positions
_DROPPED = {"auto_map", "attn_implementation", "experts_implementation", "fusion_config", "transformers_weights",
            "torch_dtype", "dtype", "name_or_path", "transformers_version",
            "quantization_config", "compression_config"}  # fmt: skip
_INTERFACE = "transformers' attention interface, so it cannot be cut"
_NEEDS = "a model that Lamina has no class for needs transformers and greenlet: pip install transformers greenlet"


def transformers() -> Any:
    """The module. Raises UnsupportedModelError where it is not installed."""
    try:
        import transformers as module
    except ImportError as error:
        raise UnsupportedModelError(f"{_NEEDS} ({error})") from error
    if not hasattr(module, "AttentionMaskInterface"):
        raise UnsupportedModelError(f"transformers {module.__version__} is too old: {_NEEDS}")
    module.AttentionInterface.register(NAME, attend)
    module.AttentionInterface.register(MASKED, attend)
    module.AttentionMaskInterface.register(MASKED, masked_as)
    module.integrations.moe.ALL_EXPERTS_FUNCTIONS.register(NAME, experts)
    return module


def model_class(raw: Mapping[str, Any]) -> tuple[str, Any]:
    """The name of the model's class, and the class, that transformers has for a config.json. Raises
    UnsupportedModelError where it has none."""
    module, kind = transformers(), raw.get("model_type")
    names = module.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    named = raw.get("architectures")
    architecture = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else None
    if not isinstance(kind, str) or kind not in names or kind not in module.CONFIG_MAPPING:
        why = " and its code is remote, which is never run" if raw.get("auto_map") else ""
        raise UnsupportedModelError(
            f"neither Lamina nor transformers {module.__version__} has a causal language model for model_type "
            f"{kind!r}, architecture {architecture!r}{why}"
        )
    name = names[kind]
    if (
        architecture is not None
        and architecture != name
        and hasattr(module, architecture)
        and architecture in set(names.values())
    ):
        name = architecture
    return name, getattr(module, name)


def read_config(raw: Mapping[str, Any]) -> Any:
    """transformers' config of a config.json. Raises ModelFileError for numbers that no model has, UnsupportedModelError
    for what is not run."""
    _check_numbers(raw, "")
    quantization_of(raw)
    if raw.get("is_encoder_decoder"):
        raise UnsupportedModelError(f"model_type {raw.get('model_type')!r} is an encoder and a decoder")
    kind = transformers().CONFIG_MAPPING[raw["model_type"]]
    try:
        config = kind.from_dict(_plain(raw))
    except Exception as error:
        raise ModelFileError(
            f"config.json is refused by transformers: {_first_line(error.__cause__ or error)}"
        ) from error
    text = config.get_text_config(decoder=True)
    if text is not config:
        raise UnsupportedModelError(f"model_type {raw['model_type']!r} is more than a language model")
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"model_type {raw['model_type']!r} is an encoder and a decoder")
    return config


def build(kind: Any, config: Any, dtype: torch.dtype, masked: bool = False) -> torch.nn.Module:
    """The model without weights, on the meta device; `masked`: it makes masks. Raises UnsupportedModelError where it
    cannot be built."""
    with converting("building"), torch.device("meta"):
        model: torch.nn.Module = kind._from_config(
            config, dtype=dtype, attn_implementation=MASKED if masked else NAME, experts_implementation=NAME
        )
    if getattr(model, "_is_stateful", False):
        raise UnsupportedModelError(f"{type(model).__name__} has layers that keep a state, not keys and values")
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    if buffers > _MAX_BUFFERS:
        raise ModelFileError(f"the config asks for {buffers} bytes of tables; allowed are {_MAX_BUFFERS}")
    return _quiet(model)


def load(kind: Any, config: Any, checkpoint: TensorSource, dtype: torch.dtype) -> torch.nn.Module:
    """The model with the weights of a checkpoint, unpacked. What has the same dtype and name there is a view of the
    file.

    Raises ModelFileError naming tensors that are missing, unexpected or of another shape.
    """
    names = [name for name in checkpoint.names() if not name.endswith("rotary_emb.inv_freq")]
    _check_size(build(kind, config, dtype), {name: math.prod(checkpoint.shape(name)) for name in names})
    with converting("loading", seconds=3600.0):
        model, report = kind.from_pretrained(
            None,
            config=config,
            state_dict={name: _unpacked(checkpoint, name, dtype) for name in names},
            dtype=dtype,
            attn_implementation=NAME,
            experts_implementation=NAME,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            local_files_only=True,
            trust_remote_code=False,
            use_kernels=False,
        )
    for problem, key in (
        ("lacks", "missing_keys"),
        ("has unexpected", "unexpected_keys"),
        ("has of another shape", "mismatched_keys"),
        ("cannot give", "error_msgs"),
    ):
        if wrong := sorted(map(str, report.get(key) or ())):
            more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
            raise ModelFileError(f"the checkpoint {problem} {', '.join(wrong[:5])}{more}")
    return _quiet(model)


def _unpacked(checkpoint: TensorSource, name: str, dtype: torch.dtype) -> torch.Tensor:
    if (packed := checkpoint.packed(name)) is None:
        return checkpoint.tensor(name)
    floats = torch.empty(packed.shape, dtype=dtype)
    unpack_into(floats, packed, torch.arange(packed.shape[0]), EVERY)
    checkpoint.release(name)
    return floats.view(tuple(checkpoint.shape(name)))


@contextmanager
def converting(what: str, seconds: float = DEADLINE) -> Iterator[None]:
    """Whatever transformers raises in here is raised as an UnsupportedModelError, and so is a deadline that passes."""
    module = transformers()
    level, has_progress = module.logging.get_verbosity(), module.logging.is_progress_bar_enabled()
    module.logging.set_verbosity_error()
    module.logging.disable_progress_bar()
    try:
        with _Deadline(what, seconds):
            yield
    except (LaminaError, MemoryError):
        raise
    except KeyError as error:
        if error.args[0] not in (NAME, MASKED):
            raise UnsupportedModelError(f"{what} the model failed: {error!r}") from error
        raise UnsupportedModelError(f"the model attends by code of its own, not by {_INTERFACE}") from error
    except Exception as error:
        raise UnsupportedModelError(f"{what} the model failed: {type(error).__name__}: {_first_line(error)}") from error
    finally:
        module.logging.set_verbosity(level)
        if has_progress:
            module.logging.enable_progress_bar()


class _Deadline(TorchFunctionMode):
    """Ends code that calls torch when its time is over."""

    def __init__(self, what: str, seconds: float) -> None:
        super().__init__()
        self._what, self._seconds = what, seconds
        self._until = time.monotonic() + seconds

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if time.monotonic() > self._until:
            raise UnsupportedModelError(f"{self._what} the model takes longer than {self._seconds:g} seconds")
        return func(*args, **(kwargs or {}))


def _quiet(model: Any) -> torch.nn.Module:
    """A model that does not look at token ids for padding, which there never is."""
    for module in model.modules():
        if hasattr(module, "warn_if_padding_and_no_attention_mask"):
            module.warn_if_padding_and_no_attention_mask = lambda *_: None
    quiet: torch.nn.Module = model.eval().requires_grad_(False)
    return quiet


def _check_size(model: torch.nn.Module, given: Mapping[str, int]) -> None:
    """Raise ModelFileError where a checkpoint is smaller than its model, before memory is taken for what it lacks."""
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}  # tied ones once
    if sum(sizes.values()) > sum(given.values()):
        lacks = sorted(sizes.keys() - given.keys())[:5]
        raise ModelFileError(
            f"the checkpoint has {sum(given.values())} weights, the config wants {sum(sizes.values())}; "
            f"it lacks {', '.join(lacks)}"
        )


def _plain(value: Any) -> Any:
    """A config.json without what asks for more than numbers."""
    if isinstance(value, Mapping):
        return {
            key: _plain(item) for key, item in value.items() if key not in _DROPPED and not str(key).startswith("_")
        }
    return value


def _check_numbers(value: Any, name: str) -> None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            _check_numbers(item, str(key))
    elif isinstance(value, list):
        if len(value) > (1 << 16):
            raise ModelFileError(f"{name} has {len(value)} entries; allowed are {1 << 16}")
        for item in value:
            _check_numbers(item, name)
    elif isinstance(value, int) and not isinstance(value, bool):
        layers = name.endswith(("layers", "n_layer"))
        limit = _MAX_LAYERS if layers else _MAX_INTEGER
        if abs(value) > limit:
            raise ModelFileError(f"{name} is {value}; allowed are at most {limit}")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:600]
