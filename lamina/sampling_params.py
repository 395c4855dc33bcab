"""`SamplingParams`: how tokens are chosen and when a sample ends. Frozen, and checked once."""

from __future__ import annotations

import dataclasses
import difflib
import json
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

from lamina.errors import InvalidRequest, ModelFileError, cut

MAX_SAMPLES = 256
MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 4096  # tokens
MAX_STOP_STRINGS = 64
MAX_STOP_LENGTH = 1024  # characters
MAX_SCHEMA = 256 << 10  # characters of JSON
MAX_SCHEMA_DEPTH = 64
MAX_REGEX = 16 << 10  # characters
MAX_CHOICES = 4096
MAX_GRAMMAR = 512 << 10  # characters, also of all choices together
MAX_POLICY = 200  # characters
JSON_OBJECT = '{"type":"object"}'  # the `json_schema` of any JSON object
_CONSTRAINTS = ("json_schema", "regex", "choice", "grammar")

# What a model's generation_config.json may set, and the values if neither it nor the caller sets them. A temperature
# that is not set is 1, but counts only with `do_sample`: decoding is greedy by default.
_MODEL_DEFAULTS = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen, and when a sample ends. Raises `InvalidRequest` on any value that is not allowed.

    `None` in one of the first five fields means the model's own default (`with_defaults`), else greedy and neutral.
    Greedy is temperature 0. The filters apply after the temperature, in the order min_p, top_k, top_p.
    """

    temperature: float | None = None
    """0 to 100; 0, and anything below 1e-5, always takes the likeliest token."""
    top_p: float | None = None
    """Above 0, up to 1: keep the likeliest tokens that together reach this probability."""
    top_k: int | None = None
    """Keep the k likeliest tokens; 0 (or -1) keeps all."""
    min_p: float | None = None
    """0 to 1: drop tokens less likely than this share of the likeliest one."""
    repetition_penalty: float | None = None
    """0.01 to 100, 1 is neutral: divides positive logits of tokens in prompt or output, multiplies negative ones."""

    presence_penalty: float = 0.0
    """-2 to 2: subtracted from the logits of tokens in the output."""
    frequency_penalty: float = 0.0
    """-2 to 2: subtracted from a token's logit for each time it is in the output."""
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    """Token id to a value from -100 to 100 that is added to its logit; at most 4096. Kept as a copy."""
    seed: int | None = None
    """0 to 2**64 - 1: the same seed gives the same random numbers, whatever else runs. None draws one."""

    stop: str | Sequence[str] = ()
    """Strings that end a sample where they first appear; at most 64 of 1 to 1024 characters. Kept as a tuple."""
    stop_token_ids: Sequence[int] = ()
    """Token ids that end a sample, beside the model's own. Kept as a tuple."""
    max_tokens: int | None = 256
    """The most tokens to generate for a sample, 0 to 2**31 - 1; None: as many as the context has room for. With 0 the
    prompt is computed and nothing follows."""
    min_tokens: int = 0
    """Stop tokens are impossible and stop strings ignored before this many tokens; at most `max_tokens`."""
    ignore_eos: bool = False
    """Go on past the model's own end-of-text tokens."""
    n: int = 1
    """Samples for each prompt, 1 to 256."""
    logprobs: int | None = None
    """How many of the likeliest tokens to report beside the chosen one, 0 to 20. None reports nothing."""
    prompt_logprobs: int | None = None
    """How many of the likeliest tokens to report beside each token of the prompt, 0 to 20, with that token's own log
    probability. None reports nothing. The prompt is then computed whole, even where a prefix of it is cached."""
    json_schema: str | Mapping[str, Any] | None = None
    """The text is JSON that fits this JSON Schema: a mapping, or JSON of at most 256 Ki characters and 64 levels. Kept
    as JSON. At most one of `json_schema`, `regex`, `choice` and `grammar` may be given. A token after which the text
    could not be completed is impossible. A sample whose text can only end ends, with reason "stop", even before
    `min_tokens` or with `ignore_eos`. Stop strings and `max_tokens` end a sample although its text is incomplete."""
    regex: str | None = None
    """The whole text matches this regular expression: Rust's syntax, without look-around and
    back-references, of 1 to 16384 characters."""
    choice: Sequence[str] | None = None
    """The text is one of these strings: 1 to 4096, none empty. Kept as a tuple."""
    grammar: str | None = None
    """The text fits this grammar in llguidance's dialect of Lark, of 1 to 524288 characters."""
    policy: str | None = None
    """What is read and kept of this request's KV: "full", "auto", or one for all heads such as
    "streaming(sink=64, recent=1024)". None is the engine's own. Policies that choose need an engine whose own does, or
    that keeps `sketches`."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the text."""
    include_stop_str_in_output: bool = False
    """End the text after the stop string instead of before it."""

    def __post_init__(self) -> None:
        checked: dict[str, Any] = {
            "temperature": _optional(_real, "temperature", self.temperature, 0, 100),
            "top_p": _optional(_real, "top_p", self.top_p, 0, 1, above_low=True),
            "top_k": _optional(_integer, "top_k", self.top_k, -1),
            "min_p": _optional(_real, "min_p", self.min_p, 0, 1),
            "repetition_penalty": _optional(_real, "repetition_penalty", self.repetition_penalty, 0.01, 100),
            "presence_penalty": _real("presence_penalty", self.presence_penalty, -2, 2),
            "frequency_penalty": _real("frequency_penalty", self.frequency_penalty, -2, 2),
            "logit_bias": _logit_bias(self.logit_bias),
            "seed": _optional(_integer, "seed", self.seed, 0, 2**64 - 1),
            "stop": _stop_strings(self.stop),
            "stop_token_ids": _token_ids("stop_token_ids", self.stop_token_ids),
            "max_tokens": _optional(_integer, "max_tokens", self.max_tokens, 0),
            "min_tokens": _integer("min_tokens", self.min_tokens, 0),
            "ignore_eos": _flag("ignore_eos", self.ignore_eos),
            "n": _integer("n", self.n, 1, MAX_SAMPLES),
            "logprobs": _optional(_integer, "logprobs", self.logprobs, 0, MAX_LOGPROBS),
            "prompt_logprobs": _optional(_integer, "prompt_logprobs", self.prompt_logprobs, 0, MAX_LOGPROBS),
            "json_schema": _optional(_json_schema, "json_schema", self.json_schema),
            "regex": _optional(_text, "regex", self.regex, 1, MAX_REGEX),
            "choice": _optional(_choices, "choice", self.choice),
            "grammar": _optional(_text, "grammar", self.grammar, 1, MAX_GRAMMAR),
            "policy": _optional(_text, "policy", self.policy, 1, MAX_POLICY),
            "skip_special_tokens": _flag("skip_special_tokens", self.skip_special_tokens),
            "include_stop_str_in_output": _flag("include_stop_str_in_output", self.include_stop_str_in_output),
        }
        if checked["max_tokens"] is not None and checked["min_tokens"] > checked["max_tokens"]:
            raise _refused("min_tokens", self.min_tokens, f"at most max_tokens, which is {self.max_tokens}")
        constraints = [name for name in _CONSTRAINTS if checked[name] is not None]
        if constraints and checked["max_tokens"] == 0:
            raise _refused("max_tokens", 0, f"1 or more beside {constraints[0]}")
        if len(constraints) > 1:
            raise InvalidRequest(
                f"{' and '.join(constraints)} are given; allowed is at most one of {', '.join(_CONSTRAINTS)}"
            )
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    @property
    def constrained(self) -> bool:
        """Whether a schema, regex, choice or grammar limits the text."""
        return any(getattr(self, name) is not None for name in _CONSTRAINTS)

    @property
    def size(self) -> int:
        """About how many bytes these parameters take, but for a fixed part."""
        texts = (self.json_schema, self.regex, self.grammar, *(self.choice or ()), *self.stop)
        return sum(map(len, filter(None, texts))) + 8 * len(self.stop_token_ids) + 16 * len(self.logit_bias)

    @classmethod
    def from_keywords(cls, **keywords: Any) -> SamplingParams:
        """Like the constructor, but an unknown keyword is an `InvalidRequest` that names the nearest ones."""
        names = [f.name for f in dataclasses.fields(cls)]
        for name in keywords:
            if name not in names:
                near = difflib.get_close_matches(name, names, n=2)
                hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(names)}"
                raise InvalidRequest(f"unknown sampling parameter {name!r}: {hint}")
        return cls(**keywords)

    def with_defaults(self, generation_config: Mapping[str, Any]) -> SamplingParams:
        """Fill every field that is still None from a model's generation_config.json, else greedy and neutral.

        As in transformers, a config without `"do_sample": true` means greedy. Raises `ModelFileError` where the
        config holds a value that is not allowed here.
        """
        defaults: dict[str, Any] = _MODEL_DEFAULTS | {
            name: generation_config[name] for name in _MODEL_DEFAULTS if generation_config.get(name) is not None
        }
        if generation_config.get("do_sample") is not True:
            defaults["temperature"] = 0.0
        missing = {name: value for name, value in defaults.items() if getattr(self, name) is None}
        try:
            return dataclasses.replace(self, **missing)
        except InvalidRequest as error:  # the fields of self are checked already: only a default can be wrong
            raise ModelFileError(f"generation_config.json: {error}") from error


def chosen_params(params: SamplingParams | None, keywords: Mapping[str, Any]) -> SamplingParams:
    """What a call was given: `params`, or their fields as keywords. Raises InvalidRequest."""
    if params is None:
        return SamplingParams.from_keywords(**keywords)
    if keywords:
        raise InvalidRequest(f"both params and {', '.join(keywords)} were given; allowed is one of the two")
    if not isinstance(params, SamplingParams):
        raise InvalidRequest(f"params is {params!r:.80}; allowed is a SamplingParams")
    return params


class SamplingKeywords(TypedDict, total=False):
    """The keywords of `LLM.generate` and its like for editors and type checkers: the fields of `SamplingParams`."""

    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    seed: int | None
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    max_tokens: int | None
    min_tokens: int
    ignore_eos: bool
    n: int
    logprobs: int | None
    prompt_logprobs: int | None
    json_schema: str | Mapping[str, Any] | None
    regex: str | None
    choice: Sequence[str] | None
    grammar: str | None
    policy: str | None
    skip_special_tokens: bool
    include_stop_str_in_output: bool


def _refused(name: str, value: object, allowed: str) -> InvalidRequest:
    return InvalidRequest(f"{name} is {cut(value)}; allowed is {allowed}")


def _optional(check: Callable[..., Any], name: str, value: object, *limits: float, **options: bool) -> Any:
    return None if value is None else check(name, value, *limits, **options)


def _real(name: str, value: Any, low: float, high: float, *, above_low: bool = False) -> float:
    allowed = f"a number {'above' if above_low else 'from'} {low} to {high}"
    if isinstance(value, bool) or not isinstance(value, numbers.Real):  # numpy's numbers are Real
        raise _refused(name, value, allowed)
    number: Any = value
    if not low <= number <= high or (above_low and number == low):  # NaN compares false
        raise _refused(name, value, allowed)
    return float(number)


def _integer(name: str, value: Any, low: int, high: int = 2**31 - 1) -> int:
    if not isinstance(value, bool) and isinstance(value, numbers.Integral) and low <= int(value) <= high:
        return int(value)
    raise _refused(name, value, f"an integer from {low} to {high}")


def _flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise _refused(name, value, "True or False")
    return value


def _sequence(name: str, value: object, allowed: str) -> Sequence[object]:
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        raise _refused(name, value, allowed)
    return value


def _token_ids(name: str, value: object) -> tuple[int, ...]:
    return tuple(_integer(f"{name}[{i}]", v, 0) for i, v in enumerate(_sequence(name, value, "a list of token ids")))


def _stop_strings(value: object) -> tuple[str, ...]:
    strings = (value,) if isinstance(value, str) else _sequence("stop", value, "a string or a list of strings")
    if len(strings) > MAX_STOP_STRINGS:
        raise InvalidRequest(f"stop has {len(strings)} strings; allowed are at most {MAX_STOP_STRINGS}")
    return tuple(_text("stop", string, 1, MAX_STOP_LENGTH, "a string") for string in strings)


def _text(name: str, value: object, low: float, high: float, kind: str = "text") -> str:
    if not isinstance(value, str) or not low <= len(value) <= high:
        raise _refused(name, value, f"{kind} of {low} to {high} characters")
    if not _is_unicode(value):
        raise _refused(name, value, "valid Unicode, without half of a surrogate pair")
    return value


def _is_unicode(text: str) -> bool:
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)


def _choices(name: str, value: object) -> tuple[str, ...]:
    choices = _sequence(name, value, f"a list of 1 to {MAX_CHOICES} strings")
    if not 1 <= len(choices) <= MAX_CHOICES:
        raise InvalidRequest(f"{name} has {len(choices)} strings; allowed are 1 to {MAX_CHOICES}")
    texts = tuple(_text(f"{name}[{index}]", choice, 1, MAX_GRAMMAR) for index, choice in enumerate(choices))
    if (total := sum(map(len, texts))) > MAX_GRAMMAR:
        raise InvalidRequest(f"{name} has {total} characters; allowed are {MAX_GRAMMAR}")
    return texts


def _json_schema(name: str, value: object) -> str:
    """A JSON Schema as JSON text. Only its form as JSON is checked here, not its meaning as a schema."""
    allowed = f"a JSON Schema of at most {MAX_SCHEMA} characters and {MAX_SCHEMA_DEPTH} levels: a mapping, or JSON"
    if not isinstance(value, str | Mapping):
        raise _refused(name, value, allowed)
    try:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, allow_nan=False)
        if len(text) > MAX_SCHEMA:
            raise InvalidRequest(f"{name} has {len(text)} characters; allowed is {allowed}")
        schema = json.loads(text, parse_constant=_no_json)
    except RecursionError:
        raise InvalidRequest(f"{name} is nested too deeply; allowed is {allowed}") from None
    except InvalidRequest:
        raise
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"{name} is no JSON: {str(error)[:200]}; allowed is {allowed}") from error
    if not isinstance(schema, dict):
        raise _refused(name, value, allowed)
    if (depth := json_depth(schema, MAX_SCHEMA_DEPTH)) > MAX_SCHEMA_DEPTH:
        raise InvalidRequest(f"{name} has {depth} levels or more; allowed is {allowed}")
    if not _is_unicode(text):
        raise _refused(name, value, "valid Unicode, without half of a surrogate pair")
    return text


def _no_json(literal: str) -> None:
    raise TypeError(f"there is {literal} in it")


def json_depth(value: object, most: int) -> int:
    """How deep lists and mappings are nested in a JSON value, counted up to `most` + 1."""
    level, depth = [value], 0
    while level and depth <= most:
        nested = [item for item in level if isinstance(item, dict | list)]
        depth += bool(nested)
        level = [child for item in nested for child in (item.values() if isinstance(item, dict) else item)]
    return depth


def _logit_bias(value: object) -> dict[int, float]:
    if not isinstance(value, Mapping):
        raise _refused("logit_bias", value, "a mapping of token ids to numbers")
    if len(value) > MAX_LOGIT_BIAS:
        raise InvalidRequest(f"logit_bias has {len(value)} tokens; allowed are {MAX_LOGIT_BIAS}")
    return {
        _integer("a token id in logit_bias", token, 0): _real(f"logit_bias[{token!r}]", bias, -100, 100)
        for token, bias in value.items()
    }
