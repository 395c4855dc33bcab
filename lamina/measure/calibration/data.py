"""What calibration reads: a text in two halves, documents with hidden passkeys, and random tokens that repeat.

The same seed gives the same tokens.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lamina.errors import InvalidRequest
from lamina.system.text_files import read_text
from lamina.text.tokenizer import Tokenizer

_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")
_NEEDLE = "\n\nRemember this: the {} passkey to the vault is:"
_QUESTION = "\n\nQuestion: what is the {} passkey to the vault? Answer: the {} passkey to the vault is:"
MAX_NEEDLES = len(_ORDINALS)
_MOST_TEXT = 256 << 20  # bytes
TAIL = 512  # tokens that the questions may take


@dataclass(frozen=True, slots=True)
class Corpus:
    """Token ids of a text: what heads are judged by, and what the choice is checked with. They do not overlap."""

    calibration: tuple[int, ...]
    held_out: tuple[int, ...]


def corpus(tokenizer: Tokenizer, text: Path | None, needed: int) -> Corpus:
    """The halves of a text file; without one, of Python's own help topics. Raises InvalidRequest where a half has
    fewer than `needed` tokens."""
    if text is None:
        import pydoc_data.topics

        content, name = "\n\n".join(pydoc_data.topics.topics.values()), "Python's help topics"
    else:
        name = str(text)
        try:
            content = read_text(text, _MOST_TEXT)
        except InvalidRequest as error:
            raise InvalidRequest(f"text {name!r:.200}: {error}") from error
    ids = tokenizer.encode(content)
    half = len(ids) // 2
    if half < needed:
        raise InvalidRequest(f"half of {name:.200} is {half} tokens; at least {needed} are needed for this context")
    return Corpus(tuple(ids[:half]), tuple(ids[half:]))


@dataclass(frozen=True, slots=True)
class Passkeys:
    """A document with needles, and the questions about them with their answers.

    `answers` are ranges [first, end) of `tail`: the words that were hidden.
    """

    document: tuple[int, ...]
    tail: tuple[int, ...]
    answers: tuple[tuple[int, int], ...]

    def question(self, number: int) -> Passkeys:
        """The document with one of its questions alone."""
        begin = self.answers[number - 1][1] if number else 0
        first, end = self.answers[number]
        return Passkeys(self.document, self.tail[begin:end], ((first - begin, end - begin),))


def passkeys(
    tokenizer: Tokenizer, text: Sequence[int], length: int, needles: int, words: int, generator: random.Random
) -> Passkeys:
    """`length` tokens of text and needles, each of `words` random words, at depths from 5 % to 95 % (DuoAttention,
    arXiv 2410.10819, section 2.3); the tail asks for all of them in random order.

    Raises InvalidRequest where that many do not fit.
    """
    if not 1 <= needles <= MAX_NEEDLES or words < 1:
        raise InvalidRequest(f"{needles} needles of {words} words; allowed are 1 to {MAX_NEEDLES}, of 1 word or more")
    vocabulary = vocabulary_words(tokenizer)
    keys = [generator.sample(vocabulary, words) for _ in range(needles)]
    hidden = [
        [*tokenizer.encode(_NEEDLE.format(_ORDINALS[number])), *key, *tokenizer.encode(".\n\n")]
        for number, key in enumerate(keys)
    ]
    around = length - sum(map(len, hidden))
    if not needles <= around <= len(text):
        raise InvalidRequest(f"{needles} needles and {len(text)} tokens of text do not make {length} tokens")
    depths = sorted(round(around * (0.05 + 0.9 * (number + generator.random()) / needles)) for number in range(needles))
    document: list[int] = []
    before = 0
    for depth, needle in zip(depths, hidden, strict=True):
        document += [*text[before:depth], *needle]
        before = depth
    document += text[before:around]
    tail: list[int] = []
    answers = []
    for number in generator.sample(range(needles), needles):
        tail += tokenizer.encode(_QUESTION.format(*[_ORDINALS[number]] * 2))
        answers.append((len(tail), len(tail) + words))
        tail += keys[number]
    if len(tail) > TAIL:
        raise InvalidRequest(f"{needles} questions about {words} words are {len(tail)} tokens; allowed are {TAIL}")
    return Passkeys(tuple(document), tuple(tail), tuple(answers))


def vocabulary_words(tokenizer: Tokenizer) -> list[int]:
    """Tokens that are a word of their own: a space, then at least four lower-case letters.

    Raises InvalidRequest where the tokenizer has fewer than 100 of them.
    """
    tokens = list(_words(tokenizer))
    if len(tokens) < 100:
        raise InvalidRequest(f"the tokenizer has {len(tokens)} tokens that are whole words; passkeys need 100")
    return tokens


def _words(tokenizer: Tokenizer) -> Iterator[int]:
    anchor = tokenizer.encode("a")[-1]  # some tokenizers drop a leading space at the beginning of a text
    before = tokenizer.decode([anchor])
    for token in range(tokenizer.vocab_size):
        text = tokenizer.decode([anchor, token]).removeprefix(before)
        if len(text) >= 5 and text[0] == " " and text[1:].isascii() and text[1:].isalpha() and text[1:].islower():
            yield token


def repeated(vocab_size: int, unit: int, repeats: int, first: int | None, generator: random.Random) -> list[int]:
    """`unit` random tokens, all different where the vocabulary allows it, `repeats` times; `first` stands before them
    (RazorAttention, arXiv 2407.15891, section 3.3)."""
    tokens = (
        generator.sample(range(vocab_size), unit)
        if unit <= vocab_size
        else generator.choices(range(vocab_size), k=unit)
    )
    return [*([] if first is None else [first]), *(tokens * repeats)]
