"""The arguments and options that commands share: their names, help and syntax.

A group of options is a frozen dataclass, and `flatten_options` gives its fields to Typer. `SamplingParams` and
`EngineConfig` check the values (`checked_by`), and what stands there below a field is its option's help, unless the
option has another form than the field (`helps`). None stands for their defaults, which `--help` shows.
"""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import os
import re
import sys
from collections.abc import Callable, Container, Mapping
from copy import copy
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, get_args, get_origin, get_type_hints

import typer
from typer.models import OptionInfo

from lamina.cli.terminal import decode_argument, read_all, read_lines
from lamina.config import DEFAULT_MODEL, EngineConfig
from lamina.errors import InvalidRequest
from lamina.sampling_params import SamplingParams


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not an integer") from None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a number") from None


MODELS = "A name from `lamina models ls`, a folder, a GGUF file or a hub id."


def complete_model(incomplete: str) -> list[str]:
    """For a shell that completes: the names of models that begin so."""
    from lamina.models.aliases import ALIASES
    from lamina.models.cache import kept_models

    return [name for name in dict.fromkeys([*ALIASES, *kept_models()]) if name.startswith(incomplete)]


_OF_FORM = ("json_schema", "regex", "choice", "grammar")
_OF_WORKERS = (
    *("kv_local", "attention_workers", "autoscale", "shard", "redundancy", "cluster", "local_share", "lanes"),
    *("query_first", "data_channel", "local_channel", "tls_dir", "token_file", "insecure"),
)
MOST_SHOWN = 25
"""Of a command's options, by `--help`."""
_RARE = frozenset({
    *("min_tokens", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "n", "logprobs"),
    *("ignore_eos", "regex", "grammar", "dtype", "weights", "attention_device", "force", "kv_local", "kv_cold"),
    *("kv_resident", "kv_dtype", "sketches", "num_speculative_tokens", "max_num_seqs", "sequence_tokens"),
    *("model_workers", "model_parallel", "shard", "redundancy", "cluster", "local_share", "lanes", "query_first"),
    *("data_channel", "local_channel", "tls_dir", "token_file", "insecure"),
    *("operator_key_file", "allow_origin", "max_requests", "request_timeout", "drain_timeout", "journal", "no_journal"),
    *("join_address", "log_format", "otlp_traces_endpoint", "kv_events", "kv_events_replay", "kv_events_name"),
    *("burstiness", "num_warmups", "range_ratio", "prefix_len", "num_prefixes", "trace_dir", "speed", "percentile"),
    *("save_detailed", "prefill", "efficiency", "acceptance", "proposed", "verify", "worker_restart", "think"),
})  # fmt: skip
"""Options that a command with more shows by `--help-all` alone."""
_SYNTAX: Mapping[Any, Mapping[str, Any]] = {
    int | None: {"parser": _integer, "metavar": "INTEGER"},
    float | None: {"parser": _number, "metavar": "NUMBER"},
}

JsonLines = Annotated[bool, typer.Option("--json", help="Print JSON, one object a line.")]
Model = Annotated[
    str | None, typer.Option("--model", "-m", help=MODELS, show_default=DEFAULT_MODEL, autocompletion=complete_model)
]
ModelName = Annotated[str, typer.Argument(metavar="MODEL", help=MODELS, autocompletion=complete_model)]
ModelNames = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="MODEL",
        help=f"{MODELS} Several: NAME=MODEL names one.",
        show_default=DEFAULT_MODEL,
        autocompletion=complete_model,
    ),
]
Threads = Annotated[
    int | None, typer.Option(help="CPU threads.", rich_help_panel="Engine", parser=_integer, metavar="INTEGER")
]
Slices = Annotated[bool, typer.Option("--slices", help="Also what lives across each attention, a token.")]


@dataclass(frozen=True, slots=True)
class _Flag:
    """Beside a type: the option's only name, so that there is no --no-NAME."""

    name: str


@dataclass(frozen=True, slots=True)
class _Form:
    """Beside a type: how the option's value is written."""

    metavar: str


@dataclass(frozen=True, slots=True)
class PromptOptions:
    """The prompts of `lamina generate`."""

    prompts: Annotated[
        list[str] | None, typer.Argument(help="One or several prompts. Default: one, from stdin.", show_default=False)
    ] = None
    file: Annotated[str | None, typer.Option(help="A file with one prompt a line; - is stdin.")] = None
    chat: Annotated[
        bool | None, typer.Option("--chat/--raw", help="The chat template, or not. Default: if there is one.")
    ] = None

    def texts(self) -> list[str]:
        """All prompts in order; blank lines of a file are none. Where none is given, stdin is one, if it is no
        terminal. Raises InvalidRequest for no prompt, for an empty one, and for bytes that are not UTF-8."""
        texts = [decode_argument(prompt) for prompt in self.prompts or []]
        if self.file is not None:
            texts += filter(str.strip, read_lines(self.file))
        elif not texts and sys.stdin is not None and not sys.stdin.isatty():
            texts = [text] if (text := read_all("-").strip("\r\n")) else []
        if not texts:
            raise InvalidRequest(
                "no prompt given: write one after `lamina generate`, send it to stdin, or name a file with --file"
            )
        if "" in texts:
            raise InvalidRequest(
                f"prompt {texts.index('') + 1} of {len(texts)} is empty; at least one character is needed"
            )
        return texts


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """How tokens are chosen: fields of `SamplingParams`."""

    checked_by: ClassVar[type] = SamplingParams
    panels: ClassVar[Mapping[str, str]] = {"": "Sampling"} | dict.fromkeys(_OF_FORM, "Form of the text")
    helps: ClassVar[Mapping[str, str]] = {
        "max_tokens": "The most tokens to generate. Default: 256; for `lamina chat` what the context has room for.",
        "seed": "The same seed gives the same text, up to rounding: see --deterministic.",
        "stop": "End where this appears. Repeatable.",
        "logprobs": "With --json: report this many likeliest tokens too.",
        "json_schema": "JSON that fits this JSON Schema: its text, or @FILE.",
        "choice": "The text is one of these. Repeatable.",
        "grammar": "The text fits this grammar (Lark, llguidance's dialect), or @FILE.",
    }
    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    stop: list[str] | None = None
    n: int | None = None
    logprobs: int | None = None
    ignore_eos: Annotated[bool | None, _Flag("--ignore-eos")] = None
    json_schema: str | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None

    def params(self, **defaults: Any) -> SamplingParams:
        """The options that were given over `defaults`, checked. Raises InvalidRequest."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values = {name: value for name, value in values.items() if value not in (None, [])}
        for name in ("json_schema", "grammar"):
            if name in values and values[name].startswith("@"):
                values[name] = read_all(values[name][1:])
        return SamplingParams(**(defaults | values))


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """The options of every command that loads a model: fields of `EngineConfig`, and a plan file with some of them."""

    checked_by: ClassVar[type] = EngineConfig
    panels: ClassVar[Mapping[str, str]] = {"": "Engine"} | dict.fromkeys(_OF_WORKERS, "Attention workers")
    helps: ClassVar[Mapping[str, str]] = {
        "attention_workers": "How many to start, or HOST:PORT of running ones: repeated, or with commas.",
        "autoscale": "The least and the most attention workers, as KV grows.",
        "device": "Of the dense layers: cpu, cuda, cuda:N or auto; with commas, one a model worker.",
        "attention_device": "Of KV and attention: cpu, cuda, cuda:N or auto; with commas, one a worker.",
        "kv_local": "Memory for the KV of the engine's own process. Default: kv-memory.",
        "plan": "A file from `lamina plan`: its model and engine. Options given beside it override its own.",
    }
    dtype: str | None = None
    weights: str | None = None
    quantize: str | None = None
    device: str | None = None
    attention_device: str | None = None
    threads: int | None = None
    kv_memory: str | None = None
    force: Annotated[bool | None, _Flag("--force")] = None
    kv_local: str | None = None
    kv_cold: str | None = None
    kv_resident: str | None = None
    kv_dtype: str | None = None
    deterministic: bool | None = None
    policy: str | None = None
    sketches: bool | None = None
    speculate: str | None = None
    num_speculative_tokens: int | None = None
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    sequence_tokens: int | None = None
    model_workers: int | None = None
    model_parallel: str | None = None
    attention_workers: list[str] | None = None
    autoscale: Annotated[str | None, _Form("MIN:MAX")] = None
    shard: str | None = None
    redundancy: str | None = None
    cluster: str | None = None
    local_share: str | None = None
    lanes: str | None = None
    query_first: str | None = None
    data_channel: str | None = None
    local_channel: bool | None = None
    tls_dir: str | None = None
    token_file: str | None = None
    insecure: Annotated[bool | None, _Flag("--insecure")] = None
    plan: Path | None = None

    def config(self) -> dict[str, Any]:
        """The options that were given, as keywords for `LLM`."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "plan"}
        values["attention_workers"] = _workers(self.attention_workers or [])
        values["autoscale"] = None if self.autoscale is None else _range(self.autoscale)
        for name in ("device", "attention_device"):
            if (names := values[name]) is not None and "," in names:
                values[name] = [part.strip() for part in names.split(",")]
        values["lanes"] = int(self.lanes) if self.lanes is not None and self.lanes.isdecimal() else self.lanes
        if self.local_share is not None and self.local_share != "auto":
            values["local_share"] = _number(self.local_share)
        return {name: value for name, value in values.items() if value is not None}


def check_output(option: str, path: Path | None, suffix: str) -> None:
    """That a file's name ends so, and that it can be written: before the work whose result it is to hold. Raises
    InvalidRequest."""
    if path is None:
        return
    if path.suffix != suffix:
        raise InvalidRequest(f"--{option} is {str(path)!r:.200}; allowed are names that end in {suffix}")
    if path.is_dir() or not path.parent.is_dir():
        wrong = "a folder" if path.is_dir() else f"in {str(path.parent)!r:.200}, which is no folder"
        raise InvalidRequest(f"--{option} is {str(path)!r:.200}, {wrong}; allowed are files in folders that there are")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise InvalidRequest(f"--{option} is {str(path)!r:.200}, which may not be written; allowed are others")


def make_folder(option: str, path: Path | None) -> None:
    """Make the folder that files will be written to, unless it is there. Raises InvalidRequest."""
    if path is None:
        return
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidRequest(f"--{option} is {str(path)!r:.200}: {error.strerror}; allowed is a folder") from error
    if not os.access(path, os.W_OK):
        raise InvalidRequest(f"--{option} is {str(path)!r:.200}, which may not be written; allowed is a folder")


def _workers(words: list[str]) -> int | list[str] | None:
    """A number, or the addresses in words such as "a:1,b:2"."""
    items = [item.strip() for word in words for item in word.split(",")]
    if len(items) == 1 and items[0].isdecimal():
        return int(items[0])
    if wrong := [item for item in items if ":" not in item]:
        raise typer.BadParameter(f"--attention-workers has {wrong[0]!r}; allowed are a number, or HOST:PORT")
    return items or None


def _range(text: str) -> tuple[int, int]:
    """The numbers of MIN:MAX."""
    lowest, _, highest = text.partition(":")
    if not (lowest.strip().isdecimal() and highest.strip().isdecimal()):
        raise typer.BadParameter(f"--autoscale is {text!r:.80}; allowed is MIN:MAX, two whole numbers")
    return int(lowest), int(highest)


@dataclass(frozen=True, slots=True)
class Without:
    """Beside a group in `Annotated`: the fields that the command does not take. They keep their defaults."""

    names: frozenset[str]


@dataclass(frozen=True, slots=True)
class Described:
    """Beside a group in `Annotated`: the fields that the command takes, in their order, each with its option. For a
    dataclass that knows nothing of Typer; fields that are not named keep their defaults."""

    options: Mapping[str, Any]


def _setting_docs(checked_by: type) -> dict[str, str]:
    """The first sentence of what stands below each field of a class of settings: the option's help. Empty where there
    is no source, as in an installation of compiled files alone."""
    try:
        tree = ast.parse(inspect.getsource(sys.modules[checked_by.__module__]))
    except OSError:
        return {}
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == checked_by.__name__)
    docs: dict[str, str] = {}
    for field, doc in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(doc, ast.Expr):
            text = " ".join(str(ast.literal_eval(doc.value)).split())
            docs[field.target.id] = re.sub(r"(?<=\.) .*", "", text).replace("None: ", "default: ")
    return {name: re.sub(r"`(\w+)`", lambda word: _shown(word[1], docs), text) for name, text in docs.items()}


def _shown(word: str, settings: Container[str]) -> str:
    """A name in a help text: that of a setting is an option here."""
    return "--" + word.replace("_", "-") if word in settings else word


def _checked_options(group: Any, hints: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a group whose values another class checks: help from that class's own words, its defaults, a
    syntax by type."""
    docs = _setting_docs(group.checked_by)
    helps = docs | group.helps
    defaults = {field.name: field.default for field in fields(group.checked_by)}
    options: dict[str, Any] = {}
    for name, hint in hints.items():
        kind, *marks = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        forms = ({"metavar": mark.metavar} for mark in marks if isinstance(mark, _Form))
        syntax = next(forms, _SYNTAX.get(kind, {}))
        default = defaults.get(name)
        shows_default = (
            isinstance(default, str | int | float) and not isinstance(default, bool) and name not in group.helps
        )
        options[name] = Annotated[
            kind,
            typer.Option(
                *(mark.name for mark in marks if isinstance(mark, _Flag)),
                help=helps[name] if docs else helps.get(name),  # a setting without a word about it is a mistake
                rich_help_panel=group.panels.get(name, group.panels[""]),
                show_default=str(default) if shows_default else False,
                **syntax,
            ),
        ]
    return options


def flatten_options(command: Callable[..., None]) -> Callable[..., None]:
    """The command as Typer reads it, with one parameter for each field in the place of a parameter that is a dataclass.

    A field has its option or argument in its `Annotated` type, or in `Described`, and Typer gets its default. The
    command gets instances.
    """
    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters: list[inspect.Parameter] = []
    groups: dict[str, tuple[Any, list[str]]] = {}
    for argument in inspect.signature(command, eval_str=True).parameters.values():
        group, *marks = get_args(argument.annotation) or (argument.annotation,)
        if not is_dataclass(group):
            parameters.append(argument.replace(kind=keyword))
            continue
        typed = get_type_hints(group, include_extras=True)
        hints = {field.name: typed[field.name] for field in fields(group)}
        for mark in marks:
            if isinstance(mark, Described):
                hints = {name: Annotated[hints[name], option] for name, option in mark.options.items()}
            elif isinstance(mark, Without):
                hints = {name: hint for name, hint in hints.items() if name not in mark.names}
        if hasattr(group, "checked_by"):
            hints = _checked_options(group, hints)
        every = {field.name: field for field in fields(group)}
        group_fields = [every[name] for name in hints]
        groups[argument.name] = group, [field.name for field in group_fields]
        for field in group_fields:
            default = inspect.Parameter.empty if field.default is MISSING else field.default
            parameters.append(inspect.Parameter(field.name, keyword, default=default, annotation=hints[field.name]))

    _hide_rare(parameters)

    @functools.wraps(command)
    def flat(**given: Any) -> None:
        given.pop("help_all", None)
        values = {
            name: group(**{field: given.pop(field) for field in names}) for name, (group, names) in groups.items()
        }
        command(**given, **values)

    flat.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # what Typer reads
    flat.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return flat


def _hide_rare(parameters: list[inspect.Parameter]) -> None:
    """Where a command has many options, hide the rare ones, and add the one that shows them."""
    options = {
        place: info
        for place, parameter in enumerate(parameters)
        for info in get_args(parameter.annotation)
        if isinstance(info, OptionInfo)
    }
    if len(options) + 1 <= MOST_SHOWN:  # with --help
        return
    rare = [place for place in options if parameters[place].name in _RARE]
    for place in rare:
        info = copy(options[place])
        info.hidden = True
        kind = get_args(parameters[place].annotation)[0]
        parameters[place] = parameters[place].replace(annotation=Annotated[kind, info])
    text = f"Show {len(rare)} more options, for rare cases."
    more = Annotated[bool, typer.Option("--help-all", help=text, is_eager=True, callback=_show_all)]
    parameters.append(inspect.Parameter("help_all", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=more))


def _show_all(ctx: typer.Context, wanted: bool) -> None:
    if wanted:
        for parameter in ctx.command.params:
            if parameter.name in _RARE:
                parameter.hidden = False  # type: ignore[attr-defined]  # of options
        typer.echo(ctx.get_help(), color=ctx.color)
        raise typer.Exit
