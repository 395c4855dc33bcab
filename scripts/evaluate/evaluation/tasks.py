"""One long prompt, and what is asked at its end: tasks whose tokens are given one by one, each in a fork of the prompt.

The prompt is a real text with hidden sentences in it: pass keys at many depths, pairs of words, and a piece of code. An
`encode` turns text into ids without the special tokens around it; `begin` is the special tokens that a prompt starts
with. Deterministic by seed.
"""

from __future__ import annotations

import inspect
import random
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lamina.errors import InvalidRequest

Encode = Callable[[str], list[int]]
Ids = tuple[int, ...]

TASKS = ("text", "passkeys", "code", "switch", "recall", "changes")
CODE_DEPTH = 0.3
PHASES = 8  # lengths of what stands between two questions of `changes`
QUOTE = 48  # tokens of each passage of `switch`
_COLOURS = ("red", "blue", "green", "white", "black", "yellow", "brown", "orange")
_DOORS = ("door", "gate", "chest", "garden", "tower", "cellar", "bridge", "office")
_WORDS = (
    "apple river stone cloud bread horse chair green window garden market winter summer music paper table silver "
    "golden forest island engine doctor letter bridge castle mirror candle button basket bottle pencil carpet kitchen "
    "hammer needle pocket rabbit saddle shadow spider square street sugar ticket tunnel turtle valley velvet violin"
)


@dataclass(frozen=True, slots=True)
class Task:
    """Tokens that follow the prompt. `answers` has the places among them of each answer's tokens: the model is right
    where it finds all of them likeliest."""

    name: str
    tokens: Ids
    answers: tuple[Ids, ...] = ()


@dataclass(frozen=True, slots=True)
class Prompt:
    """`tokens`, and tasks of which each begins where they end."""

    tokens: Ids
    tasks: tuple[Task, ...]

    @property
    def tokens_fed(self) -> int:
        """With all its tasks."""
        return len(self.tokens) - 1 + sum(len(task.tokens) for task in self.tasks)


@dataclass(frozen=True, slots=True)
class _Fact:
    """A sentence that is told once: `asked` is how it begins, `answer` how it goes on."""

    asked: Ids
    answer: Ids
    end: Ids

    @property
    def told(self) -> Ids:
        return self.asked + self.answer + self.end


def make_prompt(
    encode: Encode,
    begin: Sequence[int],
    text: Sequence[int],
    context: int,
    steps: int,
    depths: int,
    pairs: int,
    names: Sequence[str],
    seed: int,
) -> Prompt:
    """A prompt from the beginning of `text` that is `context` tokens long with its longest task. `steps` tokens are
    asked of tasks that could be of any length; `depths` pass keys and `pairs` of words are hidden. `names` of TASKS."""
    rng = random.Random(f"{seed} prompt")
    keys = _passkeys(encode, depths, rng)
    words = _pairs(encode, pairs, rng)
    code = tuple(encode("\n\n" + inspect.getsource(textwrap.TextWrapper)))[: steps + QUOTE]
    hidden = [((at + 0.5) / depths, key.told) for at, key in enumerate(keys)]
    hidden += [((at + 0.2) / pairs, pair.told) for at, pair in enumerate(words)]
    hidden.append((CODE_DEPTH, code))
    asked = {
        "passkeys": _asked("passkeys", rng.sample(keys, depths), (), rng),
        "recall": _asked("recall", rng.sample(words, pairs), (), rng),
        "changes": _asked("changes", rng.sample([*keys, *words], min(2 * PHASES, depths + pairs)), text[-1000:], rng),
        "code": Task("code", code[:steps]),
    }
    longest = max([steps, *(len(asked[name].tokens) for name in names if name in asked)])
    room = context - longest - len(begin) - sum(len(told) for _, told in hidden)
    if room < max(len(hidden), 10 * QUOTE):
        raise InvalidRequest(
            f"context is {context}; {depths} pass keys, {pairs} pairs and {steps} steps need at least "
            f"{context - room + 10 * QUOTE} tokens"
        )
    if room + steps > len(text):
        raise InvalidRequest(f"context is {context}; the text has {len(text)} tokens, and {room + steps} are needed")
    tokens, last = list(begin), 0
    for depth, told in sorted(hidden):
        at = int(depth * room)
        tokens += [*text[last:at], *told]
        last = at
    tokens += text[last:room]
    asked["text"] = Task("text", tuple(text[room : room + steps]))
    asked["switch"] = Task("switch", _quotes(encode, text[:room], steps, rng))
    return Prompt(tuple(tokens), tuple(asked[name] for name in TASKS if name in names))


def _passkeys(encode: Encode, count: int, rng: random.Random) -> list[_Fact]:
    """`The key of the red door is 12345.`, each of another door."""
    doors = [f"{colour} {door}" for colour in _COLOURS for door in _DOORS]
    if not 1 <= count <= len(doors):
        raise InvalidRequest(f"depths is {count}; allowed are 1 to {len(doors)}")
    facts = []
    for door in rng.sample(doors, count):
        number = str(rng.randint(10_000, 99_999))
        asked, answer = encode(f"\n\nThe key of the {door} is"), encode(f" {number}")
        facts.append(_Fact(tuple(asked), tuple(answer), tuple(encode(".\n\n"))))
    return facts


def _pairs(encode: Encode, count: int, rng: random.Random) -> list[_Fact]:
    """`The key is value.`: multi-query associative recall (MQAR, arXiv 2312.04927) in words."""
    words = [word for word in _WORDS.split() if len(encode(f" {word}")) == 1]
    if not 1 <= count <= len(words) // 2:
        raise InvalidRequest(f"pairs is {count}; allowed with this tokenizer are 1 to {len(words) // 2}")
    chosen = rng.sample(words, 2 * count)
    return [
        _Fact(tuple(encode(f"\nThe {key} is")), tuple(encode(f" {value}")), tuple(encode(".\n")))
        for key, value in zip(chosen[:count], chosen[count:], strict=True)
    ]


def _asked(name: str, facts: Sequence[_Fact], between: Sequence[int], rng: random.Random) -> Task:
    """All facts once more, one after the other. With `between`, 0 to 7 tokens of it stand before each: so the place
    that a query needs changes at every distance from the last one."""
    tokens: list[int] = []
    answers = []
    for number, fact in enumerate(facts):
        if between:
            count = number % PHASES
            start = rng.randrange(len(between) - count)
            tokens += between[start : start + count]
        at = len(tokens) + len(fact.asked)
        answers.append(tuple(range(at, at + len(fact.answer))))
        tokens += fact.told
    return Task(name, tuple(tokens), tuple(answers))


def _quotes(encode: Encode, text: Sequence[int], steps: int, rng: random.Random) -> Ids:
    """Passages of the text, each from another place, so that the topic changes with each."""
    count = -(-steps // QUOTE)
    places = [int(at * (len(text) - QUOTE) / count) for at in range(count)]
    gap, tokens = encode("\n\n"), []
    for at in rng.sample(places, count):
        tokens += [*gap, *text[at : at + QUOTE - len(gap)]]
    return tuple(tokens[:steps])
