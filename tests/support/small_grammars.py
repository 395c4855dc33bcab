"""A small tokenizer and the grammars over it."""

from __future__ import annotations

import json

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from lamina.text.structured_output import Grammars

VOCABULARY = 300  # of the model: more than the tokenizer has tokens


def small_tokenizer() -> Tokenizer:
    """A token for each byte, some pairs, and two special tokens: 257 is the end of a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("a", "b"), ("1", "2"), ('"', ":"), ("t", "r"), ("tr", "u"), ("tru", "e"), ("}", "}")]
    words = {symbol: index for index, symbol in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(words | {a + b: 258 + i for i, (a, b) in enumerate(merges)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    padding = [(256, "<pad>"), (257, "<eos>")]
    words |= {text: index for index, text in padding} | {a + b: 258 + i for i, (a, b) in enumerate(merges)}
    described = json.loads(tokenizer.to_str())
    described["model"]["vocab"] = words
    described["added_tokens"] = [
        {"id": index, "content": text, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": True}
        for index, text in padding
    ]  # fmt: skip
    return Tokenizer.from_str(json.dumps(described))


TOKENIZER = small_tokenizer()


EOS = 257


GRAMMARS = Grammars(TOKENIZER.to_str, [EOS], VOCABULARY)
