"""Prompts of a wanted number of tokens, made of words that are one token each in the served model's vocabulary.

Those words are found with a token counter: a tokenizer here, the server's /tokenize, or the usage that it reports. The
same nonce gives the same prompts.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from lamina.measure.bench.workloads import Item, Part

Count = Callable[[str], Awaitable[int]]
"""How many tokens a text has, with whatever comes around it."""

ENOUGH = 32
"""Words that are needed, so that prompts differ after few tokens."""
_MOST_CALLS = 96
_TEXT = """
a about after again all also an and any are as ask at away back be because been before best better big book both
but by call can car care case change child city close come could country course day did different do does down
each early earth end even every example eye face fact family far father feel few find first follow food for form
found four from full game gave general get give go good great group grow had hand hard has have he head health
hear help her here high him his history home hour house how however human idea if important in into is it its
job just keep kind know land large last late law lead learn left less let letter life light like line list
little live local long look lot love low made make man many may me mean men might mind moment money month more
morning most mother much must my name near need never new next night no not nothing now number of off often old
on once one only open or order other our out over own page part party pay people person place plan point power
public put question read real reason result right room run said same saw say school second see seem set she
should show side simple since small so social some something soon stand start state still stop story street
student study such sure system take talk team tell ten than that the their them then there these they thing
think this those thought three through time to today together too took top toward town true turn two under until
up us use very wait walk want war was watch water way we week well went were what when where which while who why
will with without woman word work world would write year yes yet you young your
"""
_WORDS = tuple(_TEXT.split())


@dataclass(frozen=True, slots=True)
class Words:
    """What prompts are made of. `tokens` is the mean number of tokens a word, 1 where that was checked; `source` names
    the token counter."""

    words: Sequence[str]
    tokens: float = 1.0
    source: str = ""

    @property
    def exact(self) -> bool:
        return self.tokens == 1.0


async def find_words(count: Count, source: str, candidates: Sequence[str] = _WORDS) -> Words:
    """The words that are one token each with a space before them, by `count`; where these are few, all words and their
    mean number of tokens. Raises what `count` raises."""
    total = await count(_text(candidates))
    around = max(0, 2 * total - await count(_text(candidates) * 2))  # special tokens, or a chat template's
    if total - around == len(candidates):
        return Words(candidates, 1.0, source)
    ratio = max(0.05, (total - around) / len(candidates))
    calls = 0
    single: list[str] = []
    groups = [candidates] if ratio < 2 else []  # with more, few words are single
    while groups and calls < _MOST_CALLS:
        group = groups.pop()
        calls += 1
        tokens = (await count(_text(group))) - around
        if tokens == len(group):
            single += group
        elif len(group) > 1:
            groups += [group[len(group) // 2 :], group[: len(group) // 2]]
    if len(single) >= ENOUGH:
        return Words(single, 1.0, source)
    return Words(candidates, 1.0 + 1e-9 if ratio == 1.0 else ratio, source)


def guessed_words() -> Words:
    """Without a token counter: common English words have about 1.1 tokens."""
    return Words(_WORDS, 1.1, "a guess")


@dataclass(slots=True)
class Writer:
    """Writes prompts. The texts of parts that several prompts begin with are kept."""

    words: Words
    nonce: int
    _kept: dict[Part, str] = field(default_factory=dict)

    def text(self, item: Item) -> str:
        """The prompt of a request: a space before each word, so that parts can be joined without changing tokens."""
        if len(item.parts) == 1:
            return self._write(item.parts[0])
        *shared, last = item.parts
        for part in shared:
            if part not in self._kept:
                self._kept[part] = self._write(part)
        return "".join([*(self._kept[part] for part in shared), self._write(last)])

    def _write(self, part: Part) -> str:
        name, tokens = part
        # Draws come one after another, so that a shorter part of the same name is the beginning of a longer one.
        rng = random.Random(f"{self.nonce} {name}")
        return _text(rng.choices(self.words.words, k=max(1, round(tokens / self.words.tokens))))


def _text(words: Sequence[str]) -> str:
    return "".join(f" {word}" for word in words)
