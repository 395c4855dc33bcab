"""A decoder's weights: under which names a checkpoint has them, their shapes, and how they are kept.

Knows names, shapes, dtypes and devices. Knows nothing of files' formats, and computes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from lamina_kernels import memory
from lamina_kernels.dense import Linear, repacks
from lamina_workers.errors import ModelFileError
from lamina_workers.model_config import ModelConfig
from lamina_workers.moe import Experts, Mlp

_ALIGNMENT = 64  # bytes, one cache line
_EMBEDDING, _HEAD, _NORM = "model.embed_tokens", "lm_head", "model.norm"


class TensorSource(Protocol):
    """Named tensors of a checkpoint. A tensor may be a view of a file; `release` says that its pages may leave
    memory. A view stays valid after that, and reads them again where it must."""

    def names(self) -> Iterable[str]: ...

    def shape(self, name: str) -> Sequence[int]: ...

    def tensor(self, name: str) -> torch.Tensor: ...

    def release(self, name: str) -> None: ...


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer. qkv maps to `(heads + 2 * kv_heads) * d`, in the order q, k, v. Norms: `[hidden]`, `[d]`."""

    input_norm: torch.Tensor
    qkv: Linear
    qk_norms: tuple[torch.Tensor, torch.Tensor] | None
    output: Linear
    post_norm: torch.Tensor
    mlp: Mlp | Experts


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    """All layers, and what stands around them. embedding: `[vocab, hidden]`, perhaps in another dtype than the rest."""

    embedding: torch.Tensor
    layers: tuple[LayerWeights, ...]
    norm: torch.Tensor
    head: Linear


def load_weights(
    config: ModelConfig,
    source: TensorSource,
    dtype: torch.dtype,
    device: torch.device,
    progress: Callable[[int, int], None] | None = None,
) -> DecoderWeights:
    """Check all of `source` against `config`, then convert and pack tensor by tensor, releasing each.

    On a CPU an embedding that is nothing else stays the source's view in the source's dtype, so that only rows that
    occur take memory.
    `progress(done, total)` counts tensors. Raises ModelFileError naming tensors that are missing, unexpected, or of
    another shape.
    """
    wanted = tensor_shapes(config)
    check_tensors(source, wanted, ignored={f"{_HEAD}.weight"} if config.tie_word_embeddings else set())
    load = _Loader(source, dtype, device, progress or (lambda done, total: None), wanted)
    # The largest tensor first, while the copy that is made of it stands beside little else.
    if config.tie_word_embeddings:
        weight = load.copy(f"{_EMBEDDING}.weight")
        head, embedding = Linear(weight), source.tensor(f"{_EMBEDDING}.weight") if repacks(weight) else weight
        del weight
    else:
        head = load.linear([_HEAD])
        embedding = (load.view if device.type == "cpu" else load.copy)(f"{_EMBEDDING}.weight")
    layers = tuple(_load_layer(config, load, layer) for layer in range(config.num_hidden_layers))
    return DecoderWeights(embedding, layers, load.copy(f"{_NORM}.weight"), head)


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint of `config`, by the name under which Hugging Face models are published."""
    hidden, d = config.hidden_size, config.head_dim
    q, kv = config.num_attention_heads * d, config.num_key_value_heads * d
    shapes: dict[str, tuple[int, ...]] = {f"{_NORM}.weight": (hidden,)}

    def linear(name: str, n_out: int, n_in: int, bias: bool = False) -> None:
        shapes[f"{name}.weight"] = (n_out, n_in)
        if bias:
            shapes[f"{name}.bias"] = (n_out,)

    for name in (_EMBEDDING,) if config.tie_word_embeddings else (_EMBEDDING, _HEAD):
        linear(name, config.vocab_size, hidden)
    for layer in range(config.num_hidden_layers):
        at = f"model.layers.{layer}"
        shapes[f"{at}.input_layernorm.weight"] = shapes[f"{at}.post_attention_layernorm.weight"] = (hidden,)
        for name, width in (("q_proj", q), ("k_proj", kv), ("v_proj", kv)):
            linear(f"{at}.self_attn.{name}", width, hidden, config.qkv_bias)
        linear(f"{at}.self_attn.o_proj", hidden, q, config.o_bias)
        if config.qk_norm:
            shapes[f"{at}.self_attn.q_norm.weight"] = shapes[f"{at}.self_attn.k_norm.weight"] = (d,)
        router, mlps = _mlp_names(config, layer)
        size, bias = config.intermediate_size, config.mlp_bias
        if router is not None and config.moe is not None:
            size, bias = config.moe.intermediate_size, False
            linear(router, config.moe.experts, hidden)
        for gate, up, down in mlps:
            linear(gate, size, hidden, bias)
            linear(up, size, hidden, bias)
            linear(down, hidden, size, bias)
    return shapes


def check_tensors(source: TensorSource, wanted: dict[str, tuple[int, ...]], ignored: set[str]) -> None:
    """Raise ModelFileError unless `source` has exactly the tensors `wanted`. Takes no memory for any."""
    found = set(source.names())
    unexpected = found - wanted.keys() - ignored
    unexpected = {name for name in unexpected if not name.endswith("rotary_emb.inv_freq")}  # older files, computed here
    for problem, names in (("lacks", wanted.keys() - found), ("has unexpected", unexpected)):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise ModelFileError(f"the checkpoint {problem} {', '.join(sorted(names)[:5])}{more}")
    for name, shape in wanted.items():
        if (given := tuple(source.shape(name))) != shape:
            raise ModelFileError(f"tensor {name} has shape {list(given)}, the config wants {list(shape)}")


def _mlp_names(config: ModelConfig, layer: int) -> tuple[str | None, list[tuple[str, str, str]]]:
    """The router's name, if any, and (gate, up, down) of the layer's MLP or of each of its experts."""
    at = f"model.layers.{layer}.mlp"
    block, names = at, ("gate_proj", "up_proj", "down_proj")
    if config.architecture == "MixtralForCausalLM":
        block, names = f"model.layers.{layer}.block_sparse_moe", ("w1", "w3", "w2")
    if config.moe is None or not config.sparse[layer]:
        return None, [(f"{at}.gate_proj", f"{at}.up_proj", f"{at}.down_proj")]
    gate, up, down = names
    experts = [f"{block}.experts.{expert}" for expert in range(config.moe.experts)]
    return f"{block}.gate", [(f"{expert}.{gate}", f"{expert}.{up}", f"{expert}.{down}") for expert in experts]


def _load_layer(config: ModelConfig, load: _Loader, layer: int) -> LayerWeights:
    at = f"model.layers.{layer}"
    attention = f"{at}.self_attn"
    router, names = _mlp_names(config, layer)
    bias = config.mlp_bias and router is None
    mlps = [Mlp(load.linear([gate, up], bias), load.linear([down], bias)) for gate, up, down in names]
    mlp: Mlp | Experts = mlps[0]
    if router is not None and config.moe is not None:
        mlp = Experts(load.linear([router]), mlps, config.moe.top_k, config.moe.normalize)
    qk_norms = None
    if config.qk_norm:
        qk_norms = load.copy(f"{attention}.q_norm.weight"), load.copy(f"{attention}.k_norm.weight")
    return LayerWeights(
        input_norm=load.copy(f"{at}.input_layernorm.weight"),
        qkv=load.linear([f"{attention}.{part}_proj" for part in "qkv"], config.qkv_bias),
        qk_norms=qk_norms,
        output=load.linear([f"{attention}.o_proj"], config.o_bias),
        post_norm=load.copy(f"{at}.post_attention_layernorm.weight"),
        mlp=mlp,
    )


class _Loader:
    """Takes tensors out of a source one by one; holds no more than one of them twice."""

    def __init__(
        self,
        source: TensorSource,
        dtype: torch.dtype,
        device: torch.device,
        progress: Callable[[int, int], None],
        names: Collection[str],
    ) -> None:
        self._source = source
        self._dtype = dtype
        self._device = device
        self._progress = progress
        self._done, self._total = 0, len(names)
        # Weights are streamed in every step, so on a CPU they lie in one block of huge pages.
        room = sum(math.prod(source.shape(name)) * dtype.itemsize + _ALIGNMENT for name in names)
        self._arena = memory.allocate(room) if device.type == "cpu" else None
        self._used = 0

    def linear(self, names: Sequence[str], bias: bool = False) -> Linear:
        """One map out of those called `names`, their outputs side by side."""
        weight = self._join([f"{name}.weight" for name in names])
        return Linear(weight, self._join([f"{name}.bias" for name in names]) if bias else None)

    def copy(self, name: str) -> torch.Tensor:
        return self._join([name])

    def view(self, name: str) -> torch.Tensor:
        """The source's own tensor, in its dtype."""
        tensor = self._tensor(name)
        self._count(name)
        return tensor

    def _join(self, names: Sequence[str]) -> torch.Tensor:
        """The tensors `names`, concatenated along their first dimension in a copy of the loader's dtype."""
        shapes = [self._source.shape(name) for name in names]
        joined = self._empty((sum(s[0] for s in shapes), *shapes[0][1:]))
        first = 0
        for name, shape in zip(names, shapes, strict=True):
            joined[first : first + shape[0]].copy_(self._tensor(name))
            first += shape[0]
            self._count(name)
        return joined

    def _empty(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Room for a tensor: for good where it will be kept, for the moment where `Linear` makes its own copy."""
        if self._arena is not None:
            end = self._used + math.prod(shape) * self._dtype.itemsize
            kept = self._arena[self._used : end].view(self._dtype).view(shape)
            if kept.ndim != 2 or not repacks(kept):
                self._used = end + -end % _ALIGNMENT
                return kept
        return torch.empty(shape, dtype=self._dtype, device=self._device)

    def _tensor(self, name: str) -> torch.Tensor:
        tensor = self._source.tensor(name)
        if not tensor.is_floating_point():
            raise ModelFileError(f"tensor {name} holds {tensor.dtype}, expected floating point")
        return tensor

    def _count(self, name: str) -> None:
        self._source.release(name)
        self._done += 1
        self._progress(self._done, self._total)
