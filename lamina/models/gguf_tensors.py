"""Where each tensor of a native model lies in a GGUF file, by the names and layouts of llama.cpp's converter."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from contextlib import suppress

from lamina.models.gguf_architectures import LONG_FACTORS, ROPE_FACTORS, Architecture
from lamina.models.gguf_files import GgufFile, GgufTensor
from lamina_workers.checkpoints.gguf_checkpoint import FLOATS, GgufEntry, GgufPart
from lamina_workers.checkpoints.packed_tensors import READABLE
from lamina_workers.decoder.mtp import mtp_config, mtp_shapes, name_behind
from lamina_workers.decoder.weight_names import CHOICE_BIAS, norm_names, tensor_shapes
from lamina_workers.errors import ModelFileError, UnsupportedModelError
from lamina_workers.model_config.config import ModelConfig

_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_STEMS = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "qkv_proj": "attn_qkv",
    "q_a_proj": "attn_q_a",
    "q_a_layernorm": "attn_q_a_norm",
    "q_b_proj": "attn_q_b",
    "kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "kv_a_layernorm": "attn_kv_a_norm",
    "kv_b_proj": "attn_kv_b",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
    "gate_up_proj": "ffn_up",
    "fc1_latent_proj": "ffn_latent_down",
    "fc2_latent_proj": "ffn_latent_up",
    "in_proj": "ssm_in",
    "in_proj_qkvz": "ssm_in",
    "in_proj_ba": "ssm_ba",
    "in_proj_qkv": "attn_qkv",
    "in_proj_z": "attn_gate",
    "in_proj_b": "ssm_beta",
    "in_proj_a": "ssm_alpha",
    "b_proj": "ssm_beta",
    "out_proj": "ssm_out",
    "conv1d": "ssm_conv1d",
} | {f"{part}_conv1d": f"ssm_conv1d_{part}" for part in "qkv"}
_STEMS |= {name: f"nextn.{name}" for name in ("eh_proj", "enorm", "hnorm")} | {"norm": "nextn.shared_head_norm"}
_STEMS |= {f"{gate}_{end}_proj": f"ssm_{gate}_{end}" for gate in "fg" for end in "ab"}
_INDEX = {"wq_b": "attn_q_b", "wk": "attn_k", "weights_proj": "proj", "k_norm": "k_norm"}
_ALONE = {"A_log": "ssm_a", "D": "ssm_d", "dt_bias": "ssm_dt.bias", "sinks": "attn_sinks.weight"}
_ALONE |= {CHOICE_BIAS: "exp_probs_b.bias"}  # names that no kind follows
_NORMS = ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm")  # in the order of `norm_names`
_IN_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_BLOCK = re.compile(r"blk\.(\d+)\.")
_EXPERT = re.compile(r"experts\.(\d+)\.")
_VALUES = ("in_proj_z", "in_proj_b", "in_proj_a", "A_log", "dt_bias")  # of each value head


def entries(file: GgufFile, architecture: Architecture, model: ModelConfig) -> dict[str, GgufEntry]:
    """Of every tensor that the model needs, what it is made of. Other tensors are refused, as are kinds that cannot be
    read, and shapes that are not those of the config."""
    check_kinds(file)
    layout = _Layout(file, architecture, model)
    result = {name: layout.entry(name, shape) for name, shape in tensor_shapes(model).items()}
    if f"blk.{model.num_hidden_layers}.nextn.eh_proj.weight" in file.tensors:
        with suppress(ModelFileError):  # a head of another kind is not needed
            result |= layout.head()
    for name in sorted(file.tensors.keys() - layout.read - {ROPE_FACTORS, *LONG_FACTORS.values()}):
        match = _BLOCK.match(name)
        if match is None or int(match[1]) < model.num_hidden_layers:  # those behind predict further tokens
            raise UnsupportedModelError(
                f"{file.path} has a tensor {name!r:.80}, which family {model.family.model_type!r} does not know"
            )
    return result


def check_kinds(file: GgufFile) -> None:
    """Raise UnsupportedModelError for a kind of a tensor that cannot be read."""
    for name, tensor in file.tensors.items():
        if tensor.kind.name not in FLOATS and tensor.kind.name not in READABLE:
            raise UnsupportedModelError(
                f"{file.path}: tensor {name!r:.80} is quantised as {tensor.kind.name}; supported are "
                f"{', '.join((*FLOATS, *READABLE))}"
            )


class _Layout:
    """Of one file. `read`: the names of the tensors that entries were made of."""

    def __init__(self, file: GgufFile, architecture: Architecture, model: ModelConfig) -> None:
        self._file = file
        self._architecture = architecture
        self._model = model
        self.read: set[str] = set()
        family, names = model.family, list(_NORMS)
        if architecture.norm_behind:
            names[2] = names[1]
        own_norms = zip(reversed(norm_names(family)), reversed(names), strict=True)  # the first counts
        self._stems = dict(own_norms) | dict(zip(family.qk_norm_names, ("attn_q_norm", "attn_k_norm"), strict=True))
        self._router = f"{family.experts.block}.{family.experts.router}"
        self._state_norm = "" if family.states is None else f"{family.states.module}.{family.states.norm}"

    def entry(self, name: str, shape: tuple[int, ...]) -> GgufEntry:
        part, _, kind = name.rpartition(".")
        if (match := _IN_LAYER.fullmatch(name)) is None:
            return self._plain(f"{_TOP[part]}.{kind}", shape, part)
        block, path = f"blk.{match[1]}.", match[2]
        module, _, last = path.rpartition(".")
        if last in _ALONE:
            return self._plain(block + _ALONE[last], shape, last)
        if (expert := _EXPERT.search(path)) is not None:
            return self._expert(block, module.rpartition(".")[2], kind, int(expert[1]), shape)
        stem, last = self._stem(module), module.rpartition(".")[2]
        experts, shared = self._model.family.experts, f"{block}ffn_down_shexp.weight" in self._file.tensors
        if module == f"{experts.shared}_gate" or (shared and module.rpartition(".")[0] == experts.shared):
            stem += "_shexp"
        source = f"{block}{stem}.{kind}"
        gate, z, k_b = (source.replace("_up", "_gate"), f"{block}attn_gate.weight", f"{block}attn_k_b.weight")
        if last == "gate_up_proj" and gate in self._file.tensors:
            rows = shape[0] // 2
            return GgufEntry(shape, tuple(self._part(name, (rows, shape[1])) for name in (gate, source)))
        if last == "kv_b_proj" and k_b in self._file.tensors and self._model.latent is not None:
            heads, latent = self._model.num_attention_heads, self._model.latent
            keys = self._part(k_b, (heads * latent.rank, latent.plain), by_head=heads)
            values = self._part(f"{block}attn_v_b.weight", (heads * latent.value, latent.rank))
            return GgufEntry(shape, (keys, values), heads)
        if last == "in_proj_qkvz" and z in self._file.tensors:
            return self._of_key_heads(f"{block}attn_qkv.weight", z, shape)
        if last in ("in_proj_qkv", "conv1d") and self._tiles() and kind == "weight":
            return self._with_values(source, shape)
        return self._plain(source, shape, last)

    def head(self) -> dict[str, GgufEntry]:
        """What a head for a token more (MTP) is made of, under its names behind the last layer."""
        shapes = {name_behind(self._model, name): shape for name, shape in mtp_shapes(mtp_config(self._model)).items()}
        return {name: self.entry(name, shape) for name, shape in shapes.items()}

    def _stem(self, module: str) -> str:
        """What a map or a norm of a layer is called."""
        if module == self._state_norm:
            return "ssm_norm"
        if module in (self._router, f"{self._model.family.experts.shared}_gate"):
            return "ffn_gate_inp"
        last = module.rpartition(".")[2]
        if ".indexer." in module:
            return f"indexer.{_INDEX[last]}"
        return self._stems.get(last) or _STEMS[last]

    def _plain(self, source: str, shape: tuple[int, ...], last: str) -> GgufEntry:
        """One tensor of the file."""
        family, rows = self._model.family, _as_rows(shape)
        turned: tuple[int, ...] = ()
        heads = {"q_proj": self._model.num_attention_heads, "k_proj": self._model.num_key_value_heads}.get(last)
        if heads and self._architecture.interleaved:
            turned = (heads, rows[0] // heads // 2, 2)
        if last in _VALUES:
            turned = self._tiles()
        # What a family adds to the weights of norms when it computes, llama.cpp's converter adds before.
        added = family.norm_offset if last.endswith("norm") and "ssm_norm" not in source else 0.0
        columns = self._tiles() if last == "out_proj" and source.endswith("weight") else ()
        return GgufEntry(shape, (self._part(source, rows, turned=turned),), 1, columns, added, negated=last == "A_log")

    def _expert(self, block: str, last: str, kind: str, number: int, shape: tuple[int, ...]) -> GgufEntry:
        """A part of an expert, which is some rows of the tensor of all."""
        gate, up, _ = self._model.family.experts.maps
        count = self._model.moe.experts if self._model.moe else 0
        source = f"{block}ffn_{'gate' if last == gate else 'up' if last == up else 'down'}_exps.{kind}"
        rows, first, rows_of_one = _as_rows(shape), 0, shape[0]
        if (joined := f"{block}ffn_gate_up_exps.{kind}") in self._file.tensors and last in (gate, up):
            source, rows_of_one, first = joined, 2 * shape[0], shape[0] * (last == up)
        first += number * rows_of_one
        return GgufEntry(shape, (self._part(source, rows, first, count * rows_of_one),))

    def _of_key_heads(self, qkv: str, z: str, shape: tuple[int, ...]) -> GgufEntry:
        """Of each key head its rows of q, k, v and z, which stand one behind the other in the file."""
        keys, widths = self._widths()
        total, first, parts = sum(widths), 0, []
        for rows in widths:
            parts.append(self._part(qkv, (rows, shape[1]), first, total))
            first += rows
        return GgufEntry(shape, (*parts, self._part(z, (widths[2], shape[1]))), keys)

    def _with_values(self, source: str, shape: tuple[int, ...]) -> GgufEntry:
        """q and k as they are, and v in the order of the groups."""
        _, (q, k, v) = self._widths()
        width = shape[-1]
        before = self._part(source, (q + k, width), 0, q + k + v)
        return GgufEntry(shape, (before, self._part(source, (v, width), q + k, q + k + v, turned=self._tiles())))

    def _widths(self) -> tuple[int, tuple[int, int, int]]:
        """The key heads of a state layer, and the rows of its q, k and v."""
        states = self._model.states
        if states is None:
            raise ValueError(f"{self._model.architecture} has no layers with a state")
        keys = states.key_heads * states.d_k
        return states.key_heads, (keys, keys, states.heads * states.d_v)

    def _tiles(self) -> tuple[int, ...]:
        """How value heads are `turned` in the file."""
        states = self._model.states
        if states is None or not self._architecture.tiled or states.heads == states.key_heads:
            return ()
        return 1, states.heads // states.key_heads, states.key_heads

    def _part(
        self,
        name: str,
        rows: tuple[int, int],
        first: int = 0,
        total: int = 0,
        turned: tuple[int, ...] = (),
        by_head: int = 0,
    ) -> GgufPart:
        """Rows from `first` on of a tensor that has `total` of them; 0: these alone."""
        if name not in self._file.tensors and (bare := name.removesuffix(".weight")) in self._file.tensors:
            name = bare  # Falcon-H1's `ffn_norm`
        if (tensor := self._file.tensors.get(name)) is None:
            raise ModelFileError(f"{self._file.path} has no tensor {name!r}")
        total = total or rows[0]
        if not _fits(tensor, total, rows[1]):
            raise ModelFileError(
                f"{self._file.path}: tensor {name!r} has shape {list(tensor.shape)}, but the metadata wants "
                f"{[total, rows[1]] if rows[1] > 1 else [total]}"
            )
        self.read.add(name)
        return GgufPart(tensor.kind.name, rows, tensor.offset + tensor.nbytes // total * first, turned, by_head)


def _as_rows(shape: Sequence[int]) -> tuple[int, int]:
    """A tensor as a matrix; a vector is a column."""
    return (shape[0], 1) if len(shape) == 1 else (math.prod(shape[:-1]), shape[-1])


def _fits(tensor: GgufTensor, rows: int, width: int) -> bool:
    """Whether a tensor has so many rows; what is a vector is written as `[n]`, `[n, 1]`, or as a matrix of groups."""
    sizes = [size for size in tensor.shape if size != 1]
    same_width = width == tensor.shape[-1] or (tensor.kind.name in FLOATS and (len(sizes) < 2 or width == 1))
    return same_width and math.prod(sizes) == rows * width
