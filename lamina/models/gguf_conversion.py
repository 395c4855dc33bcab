"""A GGUF file gets a folder as Hugging Face models have one: config, tokenizer, and a record of where its weights are.

The weights stay in the file (config: `gguf_architectures`; names and layouts: `gguf_tensors`). The tokenizer is written
as Hugging Face's tokenizer.json and its companions (`tokenizer_files`), from the file's metadata.
Supported are the vocabulary types and pre-tokenizers of llama.cpp that are listed here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from lamina.models import gguf_gemma4
from lamina.models.cache import FileRecord, write_file
from lamina.models.gguf_architectures import config_of, value_of
from lamina.models.gguf_files import GgufFile
from lamina.models.gguf_tensors import check_kinds, entries
from lamina_workers.checkpoints.gguf_checkpoint import RECORD, GgufRecord
from lamina_workers.errors import ModelFileError, UnsupportedModelError
from lamina_workers.model_config.config import ModelConfig


def convert(file: GgufFile, folder: Path, path: str, sampling: Mapping[str, float]) -> dict[str, FileRecord]:
    """Write what says how to run `file` into the empty folder `folder`. Returns a record of each file written, by name.
    `path`: where the file is found from there. `sampling`: the maker's values, where the file has none.

    Raises UnsupportedModelError for a model that Lamina cannot represent, ModelFileError where the file contradicts
    itself, and OSError as it comes.
    """
    if file.metadata.get("general.architecture") == "gemma4":
        check_kinds(file)
        config = gguf_gemma4.config_of(file)
        tensors = gguf_gemma4.entries(file, config)
    else:
        architecture, config = config_of(file)
        tensors = entries(file, architecture, ModelConfig.from_dict(config))
    record = GgufRecord(path, file.size, file.header, file.header_sha256(), tensors)
    files = {"config.json": config, **tokenizer_files(file.path, file.metadata)}
    for name in ("temp", "top_k", "top_p", "min_p", "penalty_repeat"):  # as llama.cpp keeps what a maker advises
        if (key := f"general.sampling.{name}") in file.metadata:
            value = value_of(file.path, file.metadata, key, int if name == "top_k" else float, None)
            sampling = {**sampling, _SAMPLING.get(name, name): round(value, 6)}  # from float32
    if sampling:
        files["generation_config.json"] |= {"do_sample": True, **sampling}
    texts = {name: json.dumps(content, indent=2, ensure_ascii=False) for name, content in files.items()}
    texts[RECORD] = record.to_json()
    return {name: write_file(folder / name, iter([text.encode()])) for name, text in texts.items()}


_SAMPLING = {"temp": "temperature", "penalty_repeat": "repetition_penalty"}
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # tokenizer.ggml.token_type
_MAX_TOKEN = 1024  # characters; the longest of known vocabularies have some hundred, and time grows with their square
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_PUNCTUATION = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_PUNCTUATION}|{_SPACES}"
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_MARKS = _QWEN2.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(r"[^\s\p{L}\p{N}]", r"[^\s\p{L}\p{M}\p{N}]")
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+_|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*_"  # _: an ending
_TEKKEN = rf"{_CASED.replace('_', '')}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
_O200K = _TEKKEN.replace(_CASED.replace("_", ""), _CASED.replace("_", f"{_CONTRACTIONS}?")).replace("N}|", "N}{1,3}|")
_KIMI = "[\\p{Han}]+|" + _O200K.replace("/", "").replace(r"\p{M}]", r"\p{M}&&[^\p{Han}]]")
_SEED = _QWEN2.replace(_PUNCTUATION, r" ?[^\s\p{L}\p{N}\r\n]+")
_ASCII = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    rf"{_ASCII}|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}",
)
_DEEPSEEK = (
    r"[\r\n]",
    r"\s?[\p{Lu}\p{Ll}\p{Lt}]+",
    "\\s?[!-/:-~！-／：-～‘-‟　-。]+",
    r"\s+$",
    "[一-龥ࠀ-一가-퟿]+",
    r"\p{N}",
)
_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}")


@dataclass(frozen=True, slots=True)
class _Split:
    """How a text is split before merges, by one pattern after the other, and at last perhaps as GPT-2 splits. words:
    whole words are looked up before merges are, which do not reach all of them. bos: llama.cpp puts that token first
    where the file does not say (llama-vocab.cpp, `load`). nfc: characters are composed before."""

    patterns: tuple[str, ...]
    gpt2: bool = False
    words: bool = False
    bos: bool = False
    nfc: bool = False


_LLAMA = _Split((_LLAMA3,), words=True, bos=True)
_CODE = _Split((r"\p{N}",), gpt2=True)
_SPLITS = (
    dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral"), _LLAMA)
    | dict.fromkeys(("qwen2", "deepseek-r1-qwen", "hunyuan", "megrez"), _Split((_QWEN2,), nfc=True))
    | dict.fromkeys(("smollm", "refact", "starcoder"), _CODE)
    | dict.fromkeys(("gpt-2", "olmo"), _Split((), gpt2=True))
    | dict.fromkeys(("dbrx", "smaug-bpe", "glm4", "chatglm-bpe"), _Split((_LLAMA3,)))
    | dict.fromkeys(("gpt-4o", "llama4", "minimax-m2"), _Split((_O200K,)))
    | dict.fromkeys(("deepseek-v3", "hunyuan-dense"), _Split(_DEEPSEEK3))
    | {
        "qwen35": _Split((_MARKS,), nfc=True),
        "command-r": replace(_CODE, nfc=True),
        "tekken": _Split((_TEKKEN,), words=True, bos=True),
        "deepseek-llm": _Split(_DEEPSEEK),
        "deepseek-coder": _Split(_CODER),
        "kimi-k2": _Split((_KIMI,)),
        "seed-coder": _Split((_SEED,)),
    }
)
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
    generation = {
        "bos_token_id": vocabulary.special("bos"),
        "eos_token_id": vocabulary.ends(),
        "pad_token_id": vocabulary.special("padding"),
    }
    return {
        "tokenizer.json": json.loads(tokenizer.to_str()),
        "tokenizer_config.json": _without_none(config),
        "generation_config.json": _without_none(generation),
    }


_ENDS = (
    "<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<end_of_utterance>",
    "<turn|>", "<eos>", "[EOT]", "[EOS]",
    "<｜end▁of▁sentence｜>", "<EOT>", "<|return|>", "<|call|>", "<|end|>",
    "<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<|repo_name|>", "<|file_sep|>", "<|file_separator|>",
)  # fmt: skip
"""Control tokens that end a text, whatever a file says: files name the end of a chat's turn alone, and a text that is
no chat ends by others, as does code that was filled in (llama-vocab.cpp, `load`)."""
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
        if self.model == "gemma4":  # of a string that is there twice llama.cpp takes the later token
            last = {token: index for index, token in enumerate(self.tokens)}
            self.tokens = [token if last[token] == i else f"<repeated {i}>" for i, token in enumerate(self.tokens)]
        self.ids = {token: index for index, token in enumerate(self.tokens)}
        if not self.tokens or len(self.ids) != len(self.tokens) or len(self.kinds) != len(self.tokens):
            raise ModelFileError(f"{path} has no tokens, repeats one, or has another number of token types than tokens")
        if (longest := max(map(len, self.tokens))) > _MAX_TOKEN:
            raise ModelFileError(f"{path} has a token of {longest} characters; allowed are {_MAX_TOKEN}")

    def get(self, key: str, kind: type, default: Any) -> Any:
        return value_of(self.path, self._metadata, f"tokenizer.ggml.{key}", kind, default)

    def special(self, name: str) -> int | None:
        """The id of the special token `name` (bos, eos, unknown ...), or None."""
        index = self.get(f"{name}_token_id", int, -1)
        if index == -1 or index == 0xFFFFFFFF:  # llama.cpp writes -1 for none
            return None
        if not 0 <= index < len(self.tokens):
            raise ModelFileError(f"{self.path}: the {name} token is {index}; allowed is 0 to {len(self.tokens) - 1}")
        return int(index)

    def ends(self) -> list[int]:
        """The ids that end a text: what the file names, then those of `_ENDS`. In Harmony `<|end|>` ends a part."""
        named = (self.special(key) for key in ("eos", "eot", "eom"))
        listed = (self.ids[token] for token in _ENDS if token in self.ids and self.kinds[self.ids[token]] == _CONTROL)
        ends = dict.fromkeys(index for index in (*named, *listed) if index is not None)
        if "<|return|>" in self.ids and "<|call|>" in self.ids:
            ends.pop(self.ids.get("<|end|>", -1), None)
        return list(ends)

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
    builders = {"gpt2": _byte_level, "llama": _sentencepiece, "gemma4": _sentencepiece}
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
    adds = _SPLITS[vocabulary.pre].bos if vocabulary.model == "gpt2" else True
    if bos is not None and vocabulary.get("add_bos_token", bool, adds):
        token = vocabulary.tokens[bos]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[token, "$A"], pair=[token, "$A", token, "$B:1"], special_tokens=[(token, bos)]
        )
    return tokenizer


def _byte_level(vocabulary: _Vocabulary) -> Tokenizer:
    """Byte-level BPE (GPT-2's), with the split of text that the vocabulary's merges were learned on."""
    if (split := _SPLITS.get(vocabulary.pre)) is None:
        raise UnsupportedModelError(
            f"{vocabulary.path} has the pre-tokenizer {vocabulary.pre!r:.80}; supported are {', '.join(_SPLITS)}"
        )
    tokenizer = Tokenizer(models.BPE(vocabulary.ids, vocabulary.merges(), ignore_merges=split.words))
    steps = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in split.patterns]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split.gpt2)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    if split.nfc:
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def _sentencepiece(vocabulary: _Vocabulary) -> Tokenizer:
    """SentencePiece BPE (Llama 2, Mistral, Gemma): spaces are part of tokens, bytes stand in for unknown characters.

    Gemma 4's files have the merges. Else their order is transformers' (`generate_merges`): by score, of Gemma by id,
    since its scores leave out some.
    """
    if vocabulary.model == "gemma4":
        merges = vocabulary.merges()
    else:
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
