"""A GGUF file gets a folder as Hugging Face models have one: config, tokenizer, and a record of where its weights are.

The weights stay in the file. Names and layouts are those of llama.cpp's converter, for the families below. The
tokenizer is written as Hugging Face's tokenizer.json and its companions (`tokenizer_files`), from the file's metadata.
Supported are the vocabulary types and pre-tokenizers of llama.cpp that are listed here.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from lamina.models.cache import FileRecord, write_file
from lamina.models.gguf_files import GgufFile
from lamina_workers.checkpoints.gguf_checkpoint import RECORD, GgufEntry, GgufRecord
from lamina_workers.decoder.weight_names import norm_names, tensor_shapes
from lamina_workers.errors import ModelFileError, UnsupportedModelError
from lamina_workers.model_config.config import ModelConfig

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
}
_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_MAPS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_NORMS = ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm")  # in the order of `norm_names`
_QK_NORMS = ("attn_q_norm", "attn_k_norm")
_IN_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_ROPE_FACTORS = "rope_freqs.weight"
_MAX_LAYERS = 1024


@dataclass(frozen=True, slots=True)
class _Target:
    """One tensor: its name and shape, the GGUF tensor that it is, how many heads are permuted there (0: its rows are in
    order), and what was added to its values there."""

    name: str
    source: str
    shape: tuple[int, ...]
    permuted: int = 0
    added: float = 0.0


def convert(file: GgufFile, folder: Path, path: str) -> dict[str, FileRecord]:
    """Write what says how to run `file` into the empty folder `folder`. Returns a record of each file written, by name.
    `path`: where the file is found from there.

    Raises UnsupportedModelError for a model that Lamina cannot represent, ModelFileError where the file contradicts
    itself, and OSError as it comes.
    """
    config = _config(file)
    tensors = {target.name: _entry(file, target) for target in _targets(file, config)}
    record = GgufRecord(path, file.size, file.header, file.header_sha256(), tensors)
    contents = {"config.json": config, **tokenizer_files(file.path, file.metadata), RECORD: asdict(record)}
    return {
        name: write_file(folder / name, iter([json.dumps(content, indent=2, ensure_ascii=False).encode()]))
        for name, content in contents.items()
    }


def _entry(file: GgufFile, target: _Target) -> GgufEntry:
    tensor = file.tensors[target.source]
    return GgufEntry(tensor.kind.name, tensor.shape, tensor.offset, target.permuted, target.added)


def _config(file: GgufFile) -> dict[str, Any]:
    """The config.json of the model in `file`, as Hugging Face writes it for the family."""
    keys = _Keys(file)
    family = keys.family
    heads, hidden = keys.integer("attention.head_count"), keys.integer("embedding_length")
    head_dim = keys.integer("attention.key_length", default=hidden // max(heads, 1))
    if head_dim % 2:
        raise ModelFileError(f"{file.path} has a head_dim of {head_dim}; RoPE needs an even one")
    if keys.integer("rope.dimension_count", default=head_dim) != head_dim:
        raise UnsupportedModelError(f"{file.path} rotates only a part of each head; supported is all of it")
    if keys.integer("attention.value_length", default=head_dim) != head_dim:
        raise UnsupportedModelError(f"{file.path} has values of another length than its keys; supported is the same")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise ModelFileError(f"{file.path} has no tensor 'token_embd.weight'")
    window = keys.integer("attention.sliding_window", default=0)
    if family == "llama" and window:  # llama.cpp has no family of its own for Mistral
        family = "mistral"
    gemma3 = family == "gemma3"
    config: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[family]],
        "model_type": "gemma3_text" if gemma3 else family,
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden,
        "intermediate_size": keys.integer("feed_forward_length"),
        "num_hidden_layers": keys.integer("block_count", most=_MAX_LAYERS),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.integer("attention.head_count_kv", default=heads),
        "head_dim": head_dim,
        "hidden_activation" if gemma3 else "hidden_act": "gelu_pytorch_tanh" if gemma3 else "silu",
        "max_position_embeddings": keys.integer("context_length"),
        "rms_norm_eps": keys.real("attention.layer_norm_rms_epsilon"),
        "rope_theta": keys.real("rope.freq_base", default=1e6 if gemma3 else 1e4),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "torch_dtype": "bfloat16",
        "bos_token_id": file.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": file.metadata.get("tokenizer.ggml.eos_token_id"),
    }
    if family == "mistral":
        config["sliding_window"] = window or None
    if gemma3:
        config |= _gemma3(file, keys, config)
    if scaling := _rope_scaling(file, keys, config):
        config["rope_scaling"] = scaling
    return config


def _gemma3(file: GgufFile, keys: _Keys, config: Mapping[str, Any]) -> dict[str, Any]:
    """What the config of a Gemma 3 has beside the others'. Values without a key are llama.cpp's (`llama-model.cpp`)."""
    layers, every = config["num_hidden_layers"], keys.integer("attention.sliding_window_pattern", default=6)
    extra: dict[str, Any] = {
        "sliding_window": keys.integer("attention.sliding_window"),
        "layer_types": ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(layers)],
        "rope_local_base_freq": keys.real("rope.freq_base_swa", default=1e4),
        "query_pre_attn_scalar": config["head_dim"],
        "pad_token_id": file.metadata.get("tokenizer.ggml.padding_token_id"),
    }
    if layers == 62:  # the model of 27 billion parameters is the one that scales otherwise
        extra["query_pre_attn_scalar"] = config["hidden_size"] // config["num_attention_heads"]
    if "gemma3.final_logit_softcapping" in file.metadata:
        extra["final_logit_softcapping"] = keys.real("final_logit_softcapping")
    return extra


def _rope_scaling(file: GgufFile, keys: _Keys, config: Mapping[str, Any]) -> dict[str, Any] | None:
    if _ROPE_FACTORS in file.tensors:
        return _llama3_scaling(file, config)
    kind = keys.text("rope.scaling.type", default="none")
    if kind == "none":
        return None
    scaling: dict[str, Any] = {"rope_type": kind, "factor": keys.real("rope.scaling.factor")}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = keys.integer("rope.scaling.original_context_length")
    elif kind != "linear":
        raise UnsupportedModelError(
            f"{file.path} has RoPE scaling {kind!r:.80}; supported are none, linear, yarn, llama3"
        )
    return scaling


def _llama3_scaling(file: GgufFile, config: Mapping[str, Any]) -> dict[str, Any]:
    """Recover the parameters of llama3 scaling from the divisors of the frequencies, all that llama.cpp keeps of them.

    The divisors `[head_dim / 2]` reach the factor at low frequencies; the other parameters are the same in every
    model of the family, and are checked by computing the divisors from them.
    """
    half = config["head_dim"] // 2
    if (shape := file.tensors[_ROPE_FACTORS].shape) != (half,):  # before any is read: it may be as large as the file
        raise UnsupportedModelError(f"{file.path}: {_ROPE_FACTORS!r} has shape {list(shape)}; supported is [{half}]")
    factors = np.concatenate(list(file.rows(_ROPE_FACTORS)), axis=None)
    low, high, context = 1.0, 4.0, 8192
    factor = float(factors.max())
    wavelength = 2 * math.pi * config["rope_theta"] ** (np.arange(half) / half)
    smooth = np.clip((context / wavelength - low) / (high - low), 0, 1)
    if not np.allclose(factors, 1 / ((1 - smooth) / factor + smooth), rtol=1e-3):
        raise UnsupportedModelError(f"{file.path} has RoPE factors in {_ROPE_FACTORS!r} that are not those of Llama 3")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": context,
    }


def _targets(file: GgufFile, config: Mapping[str, Any]) -> Iterator[_Target]:
    """Every tensor that the family needs, each with the shape that the config wants. Other tensors are refused."""
    model = ModelConfig.from_dict(config)
    targets = [_target(model, name, shape) for name, shape in tensor_shapes(model).items()]
    unknown = file.tensors.keys() - {target.source for target in targets} - {_ROPE_FACTORS}
    if unknown:
        kind = model.family.model_type
        raise UnsupportedModelError(
            f"{file.path} has a tensor {min(unknown)!r:.80}, which family {kind!r} does not know"
        )
    for target in targets:
        if target.source not in file.tensors:
            raise ModelFileError(f"{file.path} has no tensor {target.source!r}")
        if (shape := file.tensors[target.source].shape) != target.shape:
            raise ModelFileError(
                f"{file.path}: tensor {target.source!r} has shape {list(shape)}, "
                f"but the metadata wants {list(target.shape)}"
            )
        yield target


def _target(model: ModelConfig, name: str, shape: tuple[int, ...]) -> _Target:
    """Where a tensor of the checkpoint comes from."""
    part, _, kind = name.rpartition(".")
    if (match := _IN_LAYER.fullmatch(part)) is None:
        source = f"{_TOP[part]}.{kind}"
    else:
        norms = dict(zip(norm_names(model.family), _NORMS, strict=True))
        qk_norms = {
            f"self_attn.{norm}": gguf_norm
            for norm, gguf_norm in zip(model.family.qk_norm_names, _QK_NORMS, strict=True)
        }
        source = f"blk.{match[1]}.{(_MAPS | norms | qk_norms)[match[2]]}.{kind}"
    permuted = 0
    if model.family.model_type in ("llama", "mistral") and kind == "weight":
        permuted = {"q_proj": model.num_attention_heads, "k_proj": model.num_key_value_heads}.get(part[-6:], 0)
    # What a family adds to the weights of norms when it computes, llama.cpp's converter adds before.
    added = model.family.norm_offset if part.endswith("norm") else 0.0
    return _Target(name, source, shape, permuted, added)


class _Keys:
    """Typed, bounded reads of one architecture's metadata."""

    def __init__(self, file: GgufFile) -> None:
        self._path, self._metadata = file.path, file.metadata
        self.family: str = self._read("general.architecture", str, None)
        if self.family not in _ARCHITECTURES:
            raise UnsupportedModelError(
                f"{file.path} has the GGUF architecture {self.family!r:.80}; supported are {', '.join(_ARCHITECTURES)}"
            )
        if self.integer("expert_count", default=0):
            raise UnsupportedModelError(f"{file.path} is a mixture of experts; as GGUF only dense models are supported")

    def integer(self, name: str, default: int | None = None, most: int = 1 << 30) -> int:
        value = self._read(f"{self.family}.{name}", int, default)
        if not 0 <= value <= most or (value == 0 and default != 0):
            raise ModelFileError(f"{self._path}: {self.family}.{name} is {value}; allowed is 1 to {most}")
        return int(value)

    def real(self, name: str, default: float | None = None) -> float:
        value = self._read(f"{self.family}.{name}", float, default)
        if not 0 < value < math.inf:
            raise ModelFileError(f"{self._path}: {self.family}.{name} is {value}; allowed is a number above 0")
        return float(str(np.float32(value)))  # 1e-05 rather than 9.99999974e-06: the same float32

    def text(self, name: str, default: str) -> str:
        return str(self._read(f"{self.family}.{name}", str, default))

    def _read(self, key: str, kind: type, default: Any) -> Any:
        return _value(self._path, self._metadata, key, kind, default)


def _value(path: Path, metadata: Mapping[str, Any], key: str, kind: type, default: Any) -> Any:
    """The value of a key, which must be of that type."""
    value = metadata.get(key, default)
    if type(value) is not kind:
        raise ModelFileError(f"{path}: {key} is {value!r:.80}; expected a {kind.__name__}")
    return value


_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # tokenizer.ggml.token_type
_MAX_TOKEN = 1024  # characters; the longest of known vocabularies have some hundred, and time grows with their square
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
_MAX_MERGES = 1 << 27  # bytes about of the merges that a vocabulary implies; the largest known ones have 40 MB
_MERGE = 64  # bytes of a merge beside its characters
_SPACE = "\u2581"  # what SentencePiece writes for a space


def tokenizer_files(path: Path, metadata: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """tokenizer.json, tokenizer_config.json and generation_config.json for `metadata`, read from `path`.

    Raises UnsupportedModelError for a vocabulary that Lamina cannot build, ModelFileError for a malformed one.
    """
    vocabulary = _Vocabulary(path, metadata)
    try:
        tokenizer = _build(vocabulary)
    except (UnsupportedModelError, ModelFileError):
        raise
    except Exception as error:  # tokenizers raises nothing narrower
        raise ModelFileError(f"{path} has a malformed tokenizer: {error!s:.200}") from error
    special = {name: vocabulary.token(vocabulary.special(key)) for name, key in _SPECIAL_KEYS.items()}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata.get(f"{metadata.get('general.architecture')}.context_length"),
        "chat_template": metadata.get("tokenizer.chat_template"),
        **special,
    }
    stops = (vocabulary.special(key) for key in ("eos", "eot", "eom"))
    generation = {
        "bos_token_id": vocabulary.special("bos"),
        "eos_token_id": list(dict.fromkeys(stop for stop in stops if stop is not None)),
        "pad_token_id": vocabulary.special("padding"),
    }
    return {
        "tokenizer.json": json.loads(tokenizer.to_str()),
        "tokenizer_config.json": _without_none(config),
        "generation_config.json": _without_none(generation),
    }


_SPECIAL_KEYS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


class _Vocabulary:
    """The `tokenizer.ggml` keys, checked: tokens are strings, ids are inside the vocabulary."""

    def __init__(self, path: Path, metadata: Mapping[str, Any]) -> None:
        self.path = path
        self._metadata = metadata
        self.model = self.get("model", str, None)
        self.pre = self.get("pre", str, "default")
        self.tokens: list[str] = self._list("tokens", str)
        self.kinds: list[int] = self._list("token_type", int) or [_NORMAL] * len(self.tokens)
        self.is_gemma = str(metadata.get("general.architecture")).startswith("gemma")
        if self.is_gemma:
            self._spell_runs_of_spaces()
        self.ids = {token: index for index, token in enumerate(self.tokens)}
        if not self.tokens or len(self.ids) != len(self.tokens) or len(self.kinds) != len(self.tokens):
            raise ModelFileError(f"{path} has no tokens, repeats one, or has another number of token types than tokens")
        if (longest := max(map(len, self.tokens))) > _MAX_TOKEN:
            raise ModelFileError(f"{path} has a token of {longest} characters; allowed are {_MAX_TOKEN}")

    def get(self, key: str, kind: type, default: Any) -> Any:
        return _value(self.path, self._metadata, f"tokenizer.ggml.{key}", kind, default)

    def special(self, name: str) -> int | None:
        """The id of the special token `name` (bos, eos, unknown ...), or None."""
        index = self.get(f"{name}_token_id", int, -1)
        if index == -1 or index == 0xFFFFFFFF:  # llama.cpp writes -1 for none
            return None
        if not 0 <= index < len(self.tokens):
            raise ModelFileError(f"{self.path}: the {name} token is {index}; allowed is 0 to {len(self.tokens) - 1}")
        return int(index)

    def token(self, index: int | None) -> str | None:
        return None if index is None else self.tokens[index]

    def _spell_runs_of_spaces(self) -> None:
        """Write Gemma's tokens of two spaces and more as SentencePiece does: merges of spaces, not words of their own.

        llama.cpp's converter turns them into plain spaces, which the text has no longer when merges are looked for.
        """
        for i, token in enumerate(self.tokens):
            if token and not token.strip(" "):
                self.tokens[i] = _SPACE * len(token)
                if i < len(self.kinds):
                    self.kinds[i] = _NORMAL

    def scores(self) -> list[float]:
        scores = self._list("scores", float)
        if len(scores) != len(self.tokens):
            raise ModelFileError(f"{self.path} has {len(scores)} scores for {len(self.tokens)} tokens")
        return scores

    def merges(self) -> list[tuple[str, str]]:
        merges = []
        for merge in self._list("merges", str):
            first, _, second = merge.partition(" ")
            merges.append((first, second))
        return merges

    def _list(self, key: str, kind: type) -> list[Any]:
        value = self.get(key, list, [])
        if any(type(item) is not kind for item in value):
            raise ModelFileError(f"{self.path}: tokenizer.ggml.{key} must hold only {kind.__name__}")
        return list(value)


def _build(vocabulary: _Vocabulary) -> Tokenizer:
    builders = {"gpt2": _byte_level, "llama": _sentencepiece}
    if vocabulary.model not in builders:
        raise UnsupportedModelError(
            f"{vocabulary.path} has the vocabulary type {vocabulary.model!r:.80}; supported are {', '.join(builders)}"
        )
    tokenizer = builders[vocabulary.model](vocabulary)
    tokenizer.add_tokens(  # all in one call, since each one builds the search for all of them anew
        [
            AddedToken(token, special=kind == _CONTROL, normalized=False)
            for token, kind in zip(vocabulary.tokens, vocabulary.kinds, strict=True)
            if kind in (_CONTROL, _USER_DEFINED)
        ]
    )
    bos = vocabulary.special("bos")
    if bos is not None and vocabulary.get("add_bos_token", bool, _adds_bos(vocabulary)):
        token = vocabulary.tokens[bos]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[token, "$A"], pair=[token, "$A", token, "$B:1"], special_tokens=[(token, bos)]
        )
    return tokenizer


def _adds_bos(vocabulary: _Vocabulary) -> bool:
    """Whether llama.cpp puts the bos token first where the file does not say (llama-vocab.cpp, `load`)."""
    return vocabulary.model == "llama" or vocabulary.pre in ("llama3", "llama-v3", "llama-bpe")


def _byte_level(vocabulary: _Vocabulary) -> Tokenizer:
    """Byte-level BPE (GPT-2's), with the split of text that the vocabulary's merges were learned on."""
    split: Any
    normalizer = None
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    match vocabulary.pre:
        case "smollm":
            split = pre_tokenizers.Digits(individual_digits=True)
            byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        case "llama3" | "llama-v3" | "llama-bpe":
            split = pre_tokenizers.Split(Regex(_LLAMA3_SPLIT), behavior="isolated")
        case "qwen2" | "deepseek-r1-qwen":
            split = pre_tokenizers.Split(Regex(_QWEN2_SPLIT), behavior="isolated")
            normalizer = normalizers.NFC()
        case other:
            raise UnsupportedModelError(
                f"{vocabulary.path} has the pre-tokenizer {other!r:.80}; supported are smollm, llama-bpe and qwen2"
            )
    # Llama 3 has words that its merges do not reach; it looks whole words up first.
    whole_words = vocabulary.pre in ("llama3", "llama-v3", "llama-bpe")
    tokenizer = Tokenizer(models.BPE(vocabulary.ids, vocabulary.merges(), ignore_merges=whole_words))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    return tokenizer


def _sentencepiece(vocabulary: _Vocabulary) -> Tokenizer:
    """SentencePiece BPE (Llama 2, Mistral, Gemma): spaces are part of tokens, bytes stand in for unknown characters.

    The order of merges is transformers' (`generate_merges`): by score, of Gemma by id, since its scores leave out some.
    """
    scores = [-float(i) for i in range(len(vocabulary.tokens))] if vocabulary.is_gemma else vocabulary.scores()
    merges = sorted(
        _implied_merges(vocabulary),
        key=lambda merge: (-scores[vocabulary.ids["".join(merge)]], -len(merge[0]), -len(merge[1])),
    )
    unknown = vocabulary.token(vocabulary.special("unknown"))
    tokenizer = Tokenizer(models.BPE(vocabulary.ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix = vocabulary.get("add_space_prefix", bool, True)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(_SPACE, "first" if prefix else "never", split=False)
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def _implied_merges(vocabulary: _Vocabulary) -> Iterator[tuple[str, str]]:
    """Every way to make a token of two others. SentencePiece keeps no merges: it takes the pair of highest score."""
    ids, budget = vocabulary.ids, _MAX_MERGES
    for token in ids:
        ways = [(token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in ids and token[i:] in ids]
        budget -= len(ways) * (_MERGE + len(token))
        if budget < 0:
            raise ModelFileError(f"{vocabulary.path}: its tokens are made of one another in too many ways")
        yield from sorted(ways, key=lambda way: (ids[way[0]], ids[way[1]]))


def _without_none(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}
