"""Tokenizers from GGUF metadata give the ids that transformers gives; what cannot be built is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import AddedToken, Tokenizer
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer, GemmaTokenizer

from lamina.errors import LaminaError, ModelFileError, UnsupportedModelError
from lamina.models.gguf_conversion import tokenizer_files
from lamina.models.gguf_files import GgufFile

TEXTS = [
    "the hat's THE cat, 'll don't\n\n  the  end  ",
    "é 🎉🧑‍🚀 漢字かな ½",
    "  <s>the</s> <think>x",
    "<|end|>the<|end|>",
    "\t\r\n x",
    "      the\n\n\n  \u2581 the▁▁▁▁▁hat  ",
    " the <b>the</b>",
    "",
]
MERGES = ["Ġ t", "h e", "Ġt he", "t he", "1 2", "Ġ 1", "12 1", "' s", "a t"]
SPECIAL = ["<s>", "</s>", "<|end|>"]
USER_DEFINED = ["<think>"]


def byte_level(pre: str) -> dict[str, Any]:
    """A byte-level vocabulary: all bytes, a few merges, special tokens, and one token that only is found whole."""
    tokens = [*sorted(ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in MERGES)]
    kinds = [1] * len(tokens) + [3] * len(SPECIAL) + [4] * len(USER_DEFINED)
    tokens += SPECIAL + USER_DEFINED
    return {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": kinds,
        "merges": MERGES,
        "bos_token_id": tokens.index("<s>"),
        "eos_token_id": tokens.index("</s>"),
        "add_bos_token": False,
    }


def sentencepiece() -> dict[str, Any]:
    """A SentencePiece vocabulary: unknown, special, byte tokens, then words with their scores."""
    words = ["▁", "t", "h", "e", "a", "▁t", "he", "▁the", "▁th", "at", "hat", "▁hat", "▁▁", "c", "x", "'"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    return {
        "model": "llama",
        "tokens": tokens,
        "token_type": [2, 3, 3] + [6] * 256 + [1] * len(words),
        "scores": [0.0] * 259 + [-float(i) for i in range(len(words))],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        "add_bos_token": True,
    }


def gemma() -> dict[str, Any]:
    """Gemma's way of it: runs of spaces are user-defined tokens, written as spaces, whose scores are all one."""
    keys = sentencepiece()
    runs = [" " * length for length in (2, 3, 4)] + ["\n", "\n\n", "<b>"]
    keys["tokens"] = keys["tokens"][:259] + runs + [token for token in keys["tokens"][259:] if token != "▁▁"]
    keys["token_type"] = keys["token_type"][:259] + [4] * len(runs) + [1] * (len(keys["tokens"]) - 259 - len(runs))
    keys["scores"] = [-1000.0] * (259 + len(runs)) + [-float(i) for i in range(len(keys["tokens"]) - 259 - len(runs))]
    return keys | {"add_space_prefix": False}


def write(path: Path, keys: dict[str, Any], architecture: str = "llama") -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    for key, value in keys.items():
        name = f"tokenizer.ggml.{key}"
        match value:
            case bool():
                writer.add_bool(name, value)
            case int():
                writer.add_uint32(name, value)
            case str():
                writer.add_string(name, value)
            case _:
                writer.add_array(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def build(path: Path) -> Tokenizer:
    files = tokenizer_files(path, GgufFile(path).metadata)
    return Tokenizer.from_str(json.dumps(files["tokenizer.json"]))


@pytest.mark.parametrize("kind", ["smollm", "llama-bpe", "qwen2", "sentencepiece", "gemma3"])
def test_ids_and_text_are_those_of_transformers(tmp_path: Path, kind: str) -> None:
    keys = {"sentencepiece": sentencepiece, "gemma3": gemma}.get(kind, lambda: byte_level(kind))()
    path = write(tmp_path / "x.gguf", keys, "gemma3" if kind == "gemma3" else "llama")
    ours, theirs = build(path), AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    for text in TEXTS:
        ids = theirs(text).input_ids
        assert ours.encode(text).ids == ids, text
        assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids, clean_up_tokenization_spaces=False)


def test_gemma_4_has_merges_of_its_own(tmp_path: Path) -> None:
    """Ids are those of transformers' tokenizer of the same words and merges; a string that is there twice is the later
    token."""
    merges = ["▁ t", "h e", "▁t he", "\n \n", "▁ ▁", "▁▁ ▁▁", "a t"]
    words = ["'", *"▁theac\nx", *(merge.replace(" ", "") for merge in merges)]
    tokens = ["<unk>", "<eos>", "<bos>", "'", *(f"<0x{byte:02X}>" for byte in range(256)), *words, "<b>", "<turn|>"]
    kinds = [2, 3, 3, 1] + [6] * 256 + [1] * len(words) + [4, 3]
    keys = {"model": "gemma4", "tokens": tokens, "token_type": kinds, "merges": merges, "unknown_token_id": 0}
    keys |= {"bos_token_id": 2, "eos_token_id": 1, "add_bos_token": True, "add_space_prefix": False}
    path = write(tmp_path / "x.gguf", keys, "gemma4")
    ours = build(path)
    assert ours.token_to_id("'") == 260
    pairs = [tuple(merge.split(" ")) for merge in merges]
    theirs = GemmaTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=pairs)
    theirs.add_tokens([AddedToken("<b>", normalized=False), AddedToken("<turn|>", normalized=False, special=True)])
    for text in [*TEXTS, "the<turn|>\n"]:
        ids = theirs(text, add_special_tokens=False).input_ids
        assert ours.encode(text).ids == [2, *ids], text
        assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids, clean_up_tokenization_spaces=False)
    generation = tokenizer_files(path, GgufFile(path).metadata)["generation_config.json"]
    assert [tokens[index] for index in generation["eos_token_id"]] == ["<eos>", "<turn|>"]


def ends_of(tmp_path: Path, *tokens: str) -> list[str]:
    """What ends a text where a file names "</s>" alone and has these control tokens."""
    keys = byte_level("smollm")
    keys["tokens"], keys["token_type"] = [*keys["tokens"], *tokens], [*keys["token_type"], *[3] * len(tokens)]
    path = write(tmp_path / "x.gguf", keys)
    files = tokenizer_files(path, GgufFile(path).metadata)
    return [keys["tokens"][index] for index in files["generation_config.json"]["eos_token_id"]]


def test_known_ends_of_text_end_it_whatever_the_file_names(tmp_path: Path) -> None:
    coder = ("<|endoftext|>", "<|fim_prefix|>", "<|fim_pad|>", "<|file_sep|>")
    assert ends_of(tmp_path, *coder) == ["</s>", "<|endoftext|>", "<|end|>", "<|fim_pad|>", "<|file_sep|>"]
    assert ends_of(tmp_path, "<|return|>", "<|call|>") == ["</s>", "<|return|>", "<|call|>"]  # Harmony


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [("smollm", ["Ġ", "1", "2", "1", "x"]), ("qwen2", ["Ġ", "1", "2", "1", "x"]), ("llama-bpe", ["Ġ", "121", "x"])],
)
def test_digits_are_split_as_the_vocabulary_was_trained(tmp_path: Path, pre: str, pieces: list[str]) -> None:
    assert build(write(tmp_path / "x.gguf", byte_level(pre))).encode(" 121x").tokens == pieces


TEXT = "HelloWorld's 12345 a//\n\n 漢字かなe\u0301!?"
PIECES = {
    "llama-bpe": "HelloWorld|'s| |123|45| a|//\n\n| 漢字かなe|\u0301!?",
    "glm4": "HelloWorld|'s| |123|45| a|//\n\n| 漢字かなe|\u0301!?",
    "dbrx": "HelloWorld|'s| |123|45| a|//\n\n| 漢字かなe|\u0301!?",
    "qwen2": "HelloWorld|'s| |1|2|3|4|5| a|//\n\n| 漢字かなé|!?",
    "qwen35": "HelloWorld|'s| |1|2|3|4|5| a|//\n\n| 漢字かなé|!?",
    "gpt-4o": "Hello|World's| |123|45| a|//\n\n| 漢字かなe\u0301|!?",
    "tekken": "Hello|World|'s| |1|2|3|4|5| a|//\n\n| 漢字かなe\u0301|!?",
    "kimi-k2": "Hello|World's| |123|45| a|//\n\n| |漢字|かなe\u0301|!?",
    "deepseek-v3": "HelloWorld|'s| |123|45| a|//\n\n| |漢字かな|e\u0301|!?",
    "deepseek-llm": "HelloWorld|'|s| |1|2|3|4|5| a|//|\n|\n| |漢字かな|e|\u0301|!?",
    "deepseek-coder": "HelloWorld|'|s| |1|2|3|4|5| a|//|\n|\n| |漢字かな|e|\u0301|!?",
    "seed-coder": "HelloWorld|'s| |1|2|3|4|5| a|//|\n\n| 漢字かなe|\u0301!?",
    "command-r": "HelloWorld|'s| |1|2|3|4|5| a|//|\n\n| 漢字かなé|!?",
    "refact": "HelloWorld|'s| |1|2|3|4|5| a|//|\n\n| 漢字かなe|\u0301!?",
    "gpt-2": "HelloWorld|'s| 12345| a|//|\n\n| 漢字かなe|\u0301!?",
}


@pytest.mark.parametrize("pre", PIECES)
def test_texts_are_split_as_the_vocabulary_was_trained(tmp_path: Path, pre: str) -> None:
    tokenizer = build(write(tmp_path / "x.gguf", byte_level(pre)))
    text = TEXT if tokenizer.normalizer is None else tokenizer.normalizer.normalize_str(TEXT)
    pieces = [text[begin:end] for _, (begin, end) in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
    assert "|".join(pieces) == PIECES[pre]


def test_qwen2_composes_characters_first(tmp_path: Path) -> None:
    tokenizer = build(write(tmp_path / "x.gguf", byte_level("qwen2")))
    assert tokenizer.encode("e\u0301").ids == tokenizer.encode("\u00e9").ids


def test_companion_files_name_special_tokens(tmp_path: Path) -> None:
    keys = byte_level("smollm")
    keys |= {"eot_token_id": keys["tokens"].index("<|end|>"), "add_bos_token": True}
    path = write(tmp_path / "x.gguf", keys)
    files = tokenizer_files(path, GgufFile(path).metadata | {"tokenizer.chat_template": "{{ messages }}"})
    assert files["generation_config.json"]["eos_token_id"] == [keys["eos_token_id"], keys["eot_token_id"]]
    assert files["tokenizer_config.json"]["bos_token"] == "<s>"
    assert files["tokenizer_config.json"]["chat_template"] == "{{ messages }}"
    assert build(path).encode("x").tokens == ["<s>", "x"]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": "bert"}, UnsupportedModelError, "'bert'; supported are gpt2, llama"),
        ({"pre": "falcon"}, UnsupportedModelError, "'falcon'; supported are llama-bpe, .*smollm"),
        ({"bos_token_id": 1 << 20}, ModelFileError, r"bos token is 1048576; allowed is 0 to \d+"),
        ({"merges": ["no such"]}, ModelFileError, "malformed tokenizer"),
        ({"merges": ["one"]}, ModelFileError, "malformed tokenizer"),
        ({"tokens": ["a", "a"]}, ModelFileError, "repeats"),
        ({"token_type": [1]}, ModelFileError, "token types"),
        ({"tokens": [1, 2]}, ModelFileError, "only str"),
    ],
)
def test_what_cannot_be_built_is_named(
    tmp_path: Path, change: dict[str, Any], error: type[LaminaError], message: str
) -> None:
    with pytest.raises(error, match=message):
        build(write(tmp_path / "x.gguf", byte_level("smollm") | change))


@pytest.mark.fault("F26")
def test_a_long_token_is_refused_before_its_parts_are_looked_for(tmp_path: Path) -> None:
    """The time for a token grew with the square of its length: one of 16 MiB, which was allowed, took a day."""
    keys = sentencepiece()
    keys["tokens"][-1] = "c" * 1024
    assert build(write(tmp_path / "long.gguf", keys)).token_to_id("c" * 1024) == len(keys["tokens"]) - 1
    keys["tokens"][-1] = "c" * 1025
    with pytest.raises(ModelFileError, match="a token of 1025 characters; allowed are 1024"):
        build(write(tmp_path / "longer.gguf", keys))


def test_tokens_of_tokens_of_tokens_are_refused(tmp_path: Path) -> None:
    """Each token that is a run of one character can be made of two others in as many ways as it is long."""
    keys = sentencepiece()
    runs = ["q" * length for length in range(1, 1025)]
    for name, more in (("tokens", runs), ("token_type", [1] * len(runs)), ("scores", [-99.0] * len(runs))):
        keys[name] = keys[name] + more
    with pytest.raises(ModelFileError, match="made of one another in too many ways"):
        build(write(tmp_path / "runs.gguf", keys))
