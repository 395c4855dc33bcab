"""Constrained decoding: from a schema, regular expression, choice or grammar to the tokens that may come next.

llguidance compiles. Where the engine is in another process, that happens twice: first beside the caller, which gets
the errors, then beside the engine, never on the thread of its step loop.

Compiling is bounded. Texts are bounded by their size (`lamina.sampling_params`) and by how many parts they have:
llguidance's compiler recurses along chains of references, and with a stack of 8 MiB a chain of 500 to 4,000 overflowed,
which ends the process. So its thread gets a large stack. The work is bounded by llguidance's own limits, which are
deterministic, so both compilations have the same result.
"""

from __future__ import annotations

import json
import math
import os
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer, regex_to_lark
from numpy.typing import NDArray

from lamina.errors import EngineError, InvalidRequest, LaminaError

if TYPE_CHECKING:
    from lamina.sampling_params import SamplingParams

T = TypeVar("T")

MAX_CONTAINERS = 4096  # braces and brackets: levels that a chain of references in a schema can have
MAX_COLONS = 4096  # rules that a chain in a grammar can have, and keys of schemas
MAX_OPTIONS = 4096  # "?", "*", "+", "{" and "|" of a regex or grammar: n optional parts in a row take 2 n^2 bytes
MAX_REMAINDERS = 100_000  # of all `multipleOf`: 10 us and 350 bytes each, which no limit of llguidance's counts
MASK_SECONDS = 1.0  # of a processor, for the masks of a sample in all, beside MASK_SECONDS_A_TOKEN
MASK_SECONDS_A_TOKEN = 0.02
_SLOW = 0.002  # seconds
_STACK = 256 << 20  # bytes, reserved but used only as far as a chain goes; 6 KB a level were measured
_STACK_SIZE = threading.Lock()
_NICE = 10  # of a thread that compiles: others' steps go first
_KEPT = 4  # compiled constraints; a hostile one takes some 100 MB
_MULTIPLE = re.compile(r'"multipleOf"\s*:\s*(\d+(?:\.\d+)?(?:[eE][+-]?\d{1,9})?)', re.ASCII)
_DIGITS = 18  # of such a number: llguidance refuses more
_LARGE = 10**200  # which no common multiple of numbers that are allowed is
_ESCAPE = re.compile(r"\\u(00[0-7][0-9a-fA-F])")
_EXCERPT = re.compile(r"\s*(\d+ \| .*|\^*)$")
_MAX_REASON = 300  # characters of an error of llguidance

# At most one space, or a line break and its indentation: without a limit a model may write whitespace for ever.
_WHITESPACE = {"whitespace_pattern": r"[ ]|\r?\n[ \t]{0,64}"}

# llguidance does not look ahead for text that can go on in one way only: that took 6 ms a token for 16,000 letters,
# and a second for a{4000000000}, where 10 us are enough.
_NO_FORCING = '%llguidance {"no_forcing": true}'

# Lower than llguidance's own where a hostile grammar took seconds for one token: "e: e e e | e e | /[a-z]/" now ends
# with an error after 0.1 s at most. An object may have some 250 optional properties.
_LIMITS = LLParserLimits(
    max_items_in_row=1000,
    step_max_items=10_000,
    step_lexer_fuel=100_000,
    max_lexer_states=10_000,  # some 2 KB each, in every sample; schemas and choices have hundreds
    max_grammar_size=20_000,  # compiling so many alternatives of one rule takes half a second; it is quadratic
    verbose_errors=False,
)


def check_json_schema(name: str, schema: str, lenient: bool = False) -> float:
    """Check that a JSON Schema (as JSON) can be enforced, as far as that does not depend on the tokenizer. `lenient`
    ignores keywords that cannot be enforced. Returns the seconds of a processor that it took. Raises InvalidRequest,
    whose text names `name`."""

    def validate() -> tuple[bool, list[str], float]:
        wrong, reasons = LLMatcher.validate_grammar_with_warnings(definition, None, limits=_LIMITS)
        return wrong, reasons, time.thread_time()  # the thread is new

    try:
        definition = _definition("json_schema", schema, lenient)
        wrong, reasons, seconds = _on_deep_stack(validate)
    except InvalidRequest as error:
        raise InvalidRequest(f"{name}: {error}") from error
    if wrong:
        raise _unusable(name, "; ".join(reasons))
    return seconds


def json_options(lenient: bool = False) -> dict[str, Any]:
    """Keys that a schema within a grammar (`%json`) needs, to be treated like any other schema."""
    return {"x-guidance": {**_WHITESPACE, "lenient": lenient}}


def as_rule(name: str, value: Any, lenient: bool = False) -> str:
    """The expression in llguidance's Lark that fits a constraint of `SamplingParams`, for use within a grammar."""
    if name == "choice":
        return f"({' | '.join(map(json.dumps, value))})"
    if name == "regex":
        return f"/{regex_to_lark(value, use_ascii='')}/"
    if name == "grammar":
        return f"%lark {{\n{value}\n}}"
    try:
        schema = json.loads(value) if isinstance(value, str) else dict(value)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{name} is no JSON: {_short(str(error))}") from error
    return f"%json {json.dumps(schema | json_options(lenient))}"


class Constraint:
    """The tokens that may come next in one sample, `allowed`; `finished` says that the sample has to end. `spent` is
    how much time its masks have taken, in seconds of a processor."""

    def __init__(self, matcher: LLMatcher, shape: _Shape, pace: _Pace) -> None:
        self.finished = False
        self.spent = 0.0
        self._tokens = 0
        self._pace = pace
        self._matcher = matcher
        self._shape = shape
        self._mask = np.zeros(max(shape.words, len(shape.eos)), np.int32)
        self.allowed: NDArray[np.int32] = self._mask[: shape.words]
        """One bit a token, int32 `[ceil(V / 32)]` for V logits; token t is bit t % 32 of word t // 32. An end-of-text
        token is allowed exactly where the text may end. The next `advance` overwrites it."""
        self.foreseen: tuple[NDArray[np.int32], ...] = ()
        """The same after each of the tokens that `foresee` got last. The next `advance` forgets them."""
        self._go_on(())

    @property
    def slow(self) -> bool:
        """Whether the last mask by this schema or grammar took long, in this sample or another."""
        return self._pace.slow

    def foresee(self, *tokens: int) -> None:
        """Note in `foreseen` what may come after each of some tokens, up to one that is not allowed, or that none may
        follow. Their masks do not count as spent."""
        masks: list[NDArray[np.int32]] = []
        with suppress(InvalidRequest):
            ahead = Constraint(self._matcher.deep_copy(), self._shape, self._pace)
            for token in tokens:
                if self.slow:
                    break
                ahead.advance(token)
                if ahead.finished:
                    break
                masks.append(ahead.allowed.copy())
        self.foreseen = tuple(masks)

    def advance(self, *tokens: int) -> None:
        """Add sampled tokens. Raises InvalidRequest where one was not allowed, or the masks cost too much: the next
        one, or all so far."""
        self._tokens += len(tokens)
        self.foreseen = ()
        self._go_on(tokens)
        if self.spent > (limit := MASK_SECONDS + MASK_SECONDS_A_TOKEN * self._tokens):
            raise InvalidRequest(
                f"the text cannot be held to what is asked for any further: the masks of {self._tokens} tokens took "
                f"{self.spent:.1f} s; allowed are {MASK_SECONDS:g} s and {MASK_SECONDS_A_TOKEN:g} s a token, here "
                f"{limit:.1f} s. Ask for a less ambiguous schema or grammar"
            )

    def after(self, drafts: int) -> NDArray[np.int32]:
        """`allowed`, or what it will be after so many of the foreseen tokens."""
        return self.foreseen[drafts - 1] if drafts else self.allowed

    def impossible(self, tokens: Sequence[int], ignore_eos: bool, drafts: int = 0) -> tuple[int, ...]:
        """`tokens` and, with `ignore_eos`, the end-of-text tokens; none of them where only they are allowed, after so
        many of the foreseen tokens."""
        unwanted = (*tokens, *self._shape.eos_ids) if ignore_eos else tuple(tokens)
        if not unwanted:
            return ()
        mask = self.after(drafts).view(np.uint32).copy()
        for token in unwanted:
            mask[token // 32] &= np.uint32(~(1 << token % 32) & 0xFFFFFFFF)
        return unwanted if mask.any() else ()

    def _go_on(self, tokens: Sequence[int]) -> None:
        began = time.thread_time()
        try:
            for token in tokens:
                if not self._consume(token):
                    raise self._failure()
            self._look()
        finally:
            took = time.thread_time() - began
            self.spent += took
            self._pace.slow = took > _SLOW

    def _consume(self, token: int) -> bool:
        """Whether the token is allowed. llguidance keeps the interpreter to itself for one matcher, but not for two."""
        if not self._pace.slow:
            return self._matcher.consume_token(token)
        pair = [(self._matcher, token), (self._shape.other.deep_copy(), token)]
        return self._shape.executor.consume_token_par(pair)[0]

    def _look(self) -> None:
        matcher, mask, shape = self._matcher, self._mask, self._shape
        if not matcher.is_stopped():
            matcher.unsafe_compute_mask_ptr(mask.ctypes.data, shape.eos.nbytes)
        if matcher.is_error():
            raise self._failure()
        if matcher.is_stopped():  # perhaps since the mask: some ends show only when no token can follow
            mask[: len(shape.eos)] = shape.eos
            self.finished = True
        if shape.last:
            self.allowed[-1] &= shape.last

    def _failure(self) -> InvalidRequest:
        reason = _short(self._matcher.get_error())
        if "NoExtension" in reason:
            reason = "no token of this model can come next"
        return InvalidRequest(f"the text cannot be held to what is asked for any further: {reason}")


@dataclass(slots=True)
class _Pace:
    """What the constraints by one schema or grammar share: whether its last mask was `slow`."""

    slow: bool = False


@dataclass(frozen=True, slots=True)
class _Shape:
    """What all constraints of a model share: the `words` of a mask for the logits; `eos`, a mask of the end-of-text
    tokens, int32 `[ceil(tokens / 32)]`; `last`, the bits of the last word that have a logit, 0 where all have one;
    `executor`, and a matcher `other` that takes no token."""

    words: int
    eos: NDArray[np.int32]
    eos_ids: tuple[int, ...]
    last: np.int32
    executor: LLExecutor
    other: LLMatcher


class Grammars:
    """Makes constraints for one model. Safe to use from several threads.

    `tokenizer_json` returns the text of a tokenizer.json; it is called for the first constraint. `vocab_size` is how
    many logits a row has: tokens from there on are impossible, and so are logits beyond the tokenizer's last token.
    """

    def __init__(self, tokenizer_json: Callable[[], str], eos_ids: Sequence[int], vocab_size: int) -> None:
        self._tokenizer_json = tokenizer_json
        self._eos_ids = tuple(token for token in eos_ids if token < vocab_size)
        self._vocab_size = vocab_size
        self._lock = threading.Lock()
        self._loaded: tuple[LLTokenizer, _Shape] | None = None
        self._compiled: OrderedDict[tuple[str, object], tuple[LLMatcher, _Pace]] = OrderedDict()

    def load(self) -> None:
        """Load the tokenizer now, not for the first constraint: the interpreter stands still meanwhile, for some tenths
        of a second. An error comes with the first constraint."""
        with self._lock, suppress(LaminaError):
            self._loaded = self._loaded or self._load()

    def constraints(self, params: SamplingParams, count: int) -> tuple[Constraint, ...]:
        """One for each of `count` samples, none where `params` have no constraint. Raises InvalidRequest where it
        cannot be enforced. Takes a millisecond mostly, a second at worst, and the first time a tokenizer's loading."""
        if not params.constrained:
            return ()
        language = _asked(params)
        with self._lock:
            tokenizer, shape = self._loaded = self._loaded or self._load()
            entry = self._compiled.pop(language, None)
            matcher, pace = entry or (_on_deep_stack(lambda: _compile(tokenizer, *language)), _Pace())
            self._compiled[language] = matcher, pace
            if len(self._compiled) > _KEPT:
                self._compiled.popitem(last=False)
            copies = [matcher.deep_copy() for _ in range(count)]
        try:
            return tuple(Constraint(copy, shape, pace) for copy in copies)
        except InvalidRequest as error:
            reason = str(error)
        # Who keeps the error would keep all that its traceback names, and a matcher can have 50 MB.
        del matcher, copies, entry
        self._compiled.pop(language, None)
        raise InvalidRequest(f"{language[0]} cannot be used: {reason}")

    def _load(self) -> tuple[LLTokenizer, _Shape]:
        if not self._eos_ids:
            raise InvalidRequest("the model has no end-of-text token; no schema or grammar can be held to")
        try:
            tokenizer = _on_deep_stack(lambda: LLTokenizer(self._tokenizer_json(), eos_token=list(self._eos_ids)))
        except (ValueError, RuntimeError) as error:
            raise InvalidRequest(
                f"no schema or grammar can be held to with this model: {_short(str(error))}"
            ) from error
        eos = np.zeros(-(-tokenizer.vocab_size // 32), np.uint32)
        for token in self._eos_ids:
            eos[token // 32] |= np.uint32(1 << token % 32)
        ends_within = self._vocab_size < tokenizer.vocab_size and self._vocab_size % 32
        last = np.int32((1 << ends_within) - 1) if ends_within else np.int32(0)
        other = LLMatcher(tokenizer, LLMatcher.grammar_from_regex("a"), log_level=0)
        other.consume_token(self._eos_ids[0])  # not allowed, so no other token is from now on
        words = -(-self._vocab_size // 32)
        return tokenizer, _Shape(words, eos.view(np.int32), self._eos_ids, last, LLExecutor(1), other)


def _asked(params: SamplingParams) -> tuple[str, object]:
    """The name and the value of the field that has a constraint."""
    names = ("json_schema", "regex", "choice", "grammar")
    return next((name, value) for name in names if (value := getattr(params, name)) is not None)


def _compile(tokenizer: LLTokenizer, name: str, value: Any) -> LLMatcher:
    matcher = LLMatcher(tokenizer, _definition(name, value), limits=_LIMITS, log_level=0)
    if matcher.is_error():
        raise _unusable(name, matcher.get_error())
    return matcher


def _definition(name: str, value: Any, lenient: bool = False) -> str:
    """The grammar that llguidance compiles. Raises InvalidRequest where it has too many parts."""
    if name == "choice":
        text = "start: TEXT\nTEXT: " + " | ".join(map(json.dumps, value))  # of a rule, 1000 could be open
    elif name == "regex":
        text = f"start: {as_rule(name, value)}"
    elif name == "grammar":
        text = value
    else:
        text = f"start: {as_rule(name, value, lenient)}"
    if name in ("regex", "grammar") and (count := sum(map(value.count, "?*+{|"))) > MAX_OPTIONS:
        raise InvalidRequest(f"{name} has {count} times ?, *, +, {{ or |; allowed are {MAX_OPTIONS}")
    if name in ("json_schema", "grammar"):  # the others are flat
        if (count := text.count("{") + text.count("[")) > MAX_CONTAINERS:
            raise InvalidRequest(f"{name} has {count} opening braces and brackets; allowed are {MAX_CONTAINERS}")
        if (count := text.count(":")) > MAX_COLONS:
            raise InvalidRequest(f"{name} has {count} colons; allowed are {MAX_COLONS}")
        _check_multiples(name, text)
    return LLMatcher.grammar_from_lark(f"{text}\n{_NO_FORCING}")


def _check_multiples(name: str, text: str) -> None:
    """Raises InvalidRequest where the multiples in a text have too many remainders; several may be of one number."""
    multiples = _MULTIPLE.findall(_ESCAPE.sub(lambda escape: chr(int(escape[1], 16)), text))
    common = 1
    for number in multiples:
        common = math.lcm(common, _whole(number))
        if common > _LARGE:
            break
    while common % 10 == 0:  # the last digits alone tell multiples of 10
        common //= 10
    if common * len(multiples) > MAX_REMAINDERS:
        raise InvalidRequest(
            f"{name} has multipleOf {len(multiples)} times; allowed is a least common multiple of "
            f"{MAX_REMAINDERS // len(multiples)}, without zeros at its end and its point"
        )


def _whole(number: str) -> int:
    """A multiple times a power of 10 that makes all whole, as far as llguidance takes their digits."""
    _, digits, exponent = Decimal(number).as_tuple()
    scale = _DIGITS + max(-_DIGITS, min(_DIGITS, int(exponent)))
    return int("".join(map(str, digits[:_DIGITS]))) * 10**scale or 1


def _on_deep_stack(function: Callable[[], T]) -> T:
    """Call `function` on a thread with a large stack; returns or raises what it does."""
    done: Future[T] = Future()

    def run() -> None:
        with suppress(OSError, AttributeError):  # elsewhere than on Linux
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
        try:
            done.set_result(function())
        except InvalidRequest as error:
            done.set_exception(error.with_traceback(None))  # it would keep what was compiled
        except Exception as error:  # noqa: BLE001  # raised again by `result`
            done.set_exception(error)
        except BaseException as error:  # noqa: BLE001  # a panic in Rust
            done.set_exception(InvalidRequest(f"llguidance failed: {_short(str(error))}"))

    with _STACK_SIZE:  # it is a setting of the whole process, for threads that start from now on
        before = threading.stack_size(_STACK)
        try:
            thread = threading.Thread(target=run, name="lamina-grammar", daemon=True)
            thread.start()
        except RuntimeError as error:
            raise EngineError(f"no room for a thread that compiles a schema or grammar: {error}") from error
        finally:
            threading.stack_size(before)
    thread.join()
    return done.result()


def _unusable(name: str, reason: str) -> InvalidRequest:
    return InvalidRequest(f"{name} cannot be used: {_short(reason)}")


def _short(reason: str) -> str:
    """An error of llguidance on one line of bounded length, without its excerpts of a grammar."""
    lines = [line for line in reason.splitlines() if not _EXCERPT.match(line)]
    line = " ".join(" ".join(lines).replace("<non-verbose/>", "").split())
    line = line.rpartition("failed to compile JSON schema: ")[2]
    pattern, _, error = line.rpartition(" error: ")  # of a regular expression, which may be long
    if pattern:
        line = f"{pattern[:80]}: {error}"
    return line if len(line) <= _MAX_REASON else f"{line[:_MAX_REASON]}..."
