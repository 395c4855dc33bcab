"""Makers of prompts whose right answer lies far back. Deterministic by seed; prompts are token ids.

An `encode` turns text into ids without the special tokens around it; `begin` is the special tokens that a prompt
starts with. `haystack` is ids of a real text. A context counts prompt and answer together.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lamina.errors import InvalidRequest

Encode = Callable[[str], list[int]]
Ids = tuple[int, ...]

_GRASS = " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_CITIES = ("Berlin", "Paris", "London", "Rome", "Madrid", "Vienna", "Athens", "Dublin", "Lisbon", "Oslo")
_WORDS = (
    "apple river stone cloud bread horse chair green window garden market winter summer music paper table silver "
    "golden forest island engine doctor letter bridge castle mirror candle button basket bottle pencil carpet kitchen "
    "hammer needle pocket rabbit saddle shadow spider square street sugar ticket tunnel turtle valley velvet violin"
)


@dataclass(frozen=True, slots=True)
class Item:
    """A prompt and its one right answer.

    Where `scored` is None the model continues with its own likeliest tokens, and is right if all are the answer's.
    Otherwise it is fed the answer token by token, and each token of it that `scored` names is an answer of its own,
    right if the model found it likeliest.
    """

    task: str
    name: str
    prompt: Ids
    answer: Ids
    scored: Ids | None = None

    @property
    def asked(self) -> int:
        """How many answers it asks for."""
        return 1 if self.scored is None else len(self.scored)


def passkey(encode: Encode, begin: Sequence[int], context: int, depths: Sequence[float], seed: int) -> list[Item]:
    """A pass key of five digits at each depth (0: first, 1: last) of a text that repeats itself.

    Ends as the key's sentence begins, not with a question: small models continue better than they answer. A key of
    something is found better than a key alone.
    """
    grass = encode(_GRASS)
    hay = grass * (context // len(grass) + 1)
    return [
        _hidden(
            "passkey",
            encode,
            begin,
            hay,
            context,
            depth,
            "The pass key of the door is",
            random.Random(f"{seed} passkey {at}"),
        )
        for at, depth in enumerate(depths)
    ]


def needle(
    encode: Encode, begin: Sequence[int], haystack: Sequence[int], context: int, depths: Sequence[float], seed: int
) -> list[Item]:
    """A number of five digits at each depth of a real text, of which each item takes another piece."""
    items = []
    for at, depth in enumerate(depths):
        rng = random.Random(f"{seed} needle {at}")
        hay = _piece(haystack, context, rng)
        asked = f"The secret number of {rng.choice(_CITIES)} is"
        items.append(_hidden("needle", encode, begin, hay, context, depth, asked, rng))
    return items


def _hidden(
    task: str,
    encode: Encode,
    begin: Sequence[int],
    hay: Sequence[int],
    context: int,
    depth: float,
    asked: str,
    rng: random.Random,
) -> Item:
    if not 0 <= depth <= 1:
        raise InvalidRequest(f"a depth is {depth}; allowed are 0 to 1")
    number = str(rng.randint(10_000, 99_999))
    said, question, answer = encode(f"\n\n{asked} {number}.\n\n"), encode(f"\n\n{asked}"), encode(f" {number}")
    room = context - len(begin) - len(said) - len(question) - len(answer)
    _enough(task, room, context)
    before = int(depth * room)
    prompt = (*begin, *hay[:before], *said, *hay[before:room], *question)
    return Item(task, f"depth {depth:g}", prompt, tuple(answer))


def copying(
    begin: Sequence[int], haystack: Sequence[int], context: int, count: int, scored: int, seed: int
) -> list[Item]:
    """Random tokens of the haystack, all of them twice: the last `scored` of the second time.

    One token more is fed than scored, so that the first one scored is predicted in decode too.
    """
    used = sorted(set(haystack))
    length = (context - len(begin)) // 2
    _enough("copying", length - scored - 1, context)
    items = []
    for at in range(count):
        rng = random.Random(f"{seed} copying {at}")
        block = [rng.choice(used) for _ in range(length)]
        prompt, answer = (*begin, *block, *block[: -scored - 1]), tuple(block[-scored - 1 :])
        items.append(Item("copying", f"copy {at}", prompt, answer, tuple(range(1, scored + 1))))
    return items


def recall(
    encode: Encode,
    begin: Sequence[int],
    haystack: Sequence[int],
    context: int,
    count: int,
    seed: int,
    pairs: int = 8,
) -> list[Item]:
    """Multi-query associative recall (MQAR, arXiv 2312.04927) in words: `The key is value.` for each pair, spread over
    a real text, then all of them again in another order; asked for are the values."""
    words = [word for word in _WORDS.split() if len(encode(f" {word}")) == 1]
    if not 1 <= pairs <= len(words) // 2:
        raise InvalidRequest(f"pairs is {pairs}; allowed with this tokenizer are 1 to {len(words) // 2}")
    items = []
    for at in range(count):
        rng = random.Random(f"{seed} recall {at}")
        chosen = rng.sample(words, 2 * pairs)
        told = list(zip(chosen[:pairs], chosen[pairs:], strict=True))
        lines = [encode(f"\nThe {key} is {value}.\n") for key, value in told]
        answer: list[int] = []
        scored = []
        for key, value in rng.sample(told, pairs):
            asked = encode(f"\nThe {key} is")
            scored.append(len(answer) + len(asked))
            answer += asked + encode(f" {value}") + encode(".\n")
        room = context - len(begin) - sum(map(len, lines)) - len(answer)
        _enough("recall", room, context)
        hay, prompt = _piece(haystack, room, rng), list(begin)
        for number, line in enumerate(lines):
            prompt += line
            prompt += hay[room * number // pairs : room * (number + 1) // pairs]
        items.append(Item("recall", f"recall {at}", tuple(prompt), tuple(answer), tuple(scored)))
    return items


def windows(begin: Sequence[int], haystack: Sequence[int], context: int, count: int) -> list[Ids]:
    """`count` pieces of a text, evenly spread over it, each `context` tokens with `begin`."""
    length = context - len(begin)
    if count < 1 or length < 1 or len(haystack) < length:
        raise InvalidRequest(f"{count} pieces of {length} tokens are asked of a text of {len(haystack)}")
    last = len(haystack) - length
    starts = [last * at // max(1, count - 1) for at in range(count)]
    return [(*begin, *haystack[start : start + length]) for start in starts]


def _piece(haystack: Sequence[int], length: int, rng: random.Random) -> Sequence[int]:
    if len(haystack) < length:
        raise InvalidRequest(f"a piece of {length} tokens is asked of a text of {len(haystack)}")
    start = rng.randint(0, len(haystack) - length)
    return haystack[start : start + length]


def _enough(task: str, room: int, context: int) -> None:
    if room < 1:
        raise InvalidRequest(f"context is {context}; {task} needs at least {context - room + 1} tokens")
