"""The arguments and options that commands share: their names, help and syntax.

A group of options is a frozen dataclass, and `flatten_options` gives its fields to Typer. `SamplingParams` and
`EngineConfig` check the values (`checked_by`). None stands for their defaults, which `--help` shows.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, get_args, get_type_hints

import typer

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


def _integer_option(help: str, panel: str = "Sampling", **more: Any) -> Any:
    return typer.Option(help=help, rich_help_panel=panel, parser=_integer, metavar="INTEGER", **more)


def _number_option(help: str) -> Any:
    return typer.Option(help=help, rich_help_panel="Sampling", parser=_number, metavar="NUMBER")


def _form_option(help: str, *names: str) -> Any:
    return typer.Option(*names, help=help, rich_help_panel="Form of the text")


def _engine_option(help: str) -> Any:
    return typer.Option(help=help, rich_help_panel="Engine")


def _worker_option(*names: str, help: str, **more: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel="Attention workers", **more)


MODELS = "A name from `lamina models ls`, a folder, a GGUF file or a hub id."


def complete_model(incomplete: str) -> list[str]:
    """For a shell that completes: the names of models that begin so."""
    from lamina.models.aliases import ALIASES
    from lamina.models.cache import kept_models

    return [name for name in dict.fromkeys([*ALIASES, *kept_models()]) if name.startswith(incomplete)]


JsonLines = Annotated[bool, typer.Option("--json", help="Print JSON, one object a line.")]
Model = Annotated[
    str | None,
    typer.Option("--model", "-m", help=MODELS, show_default=DEFAULT_MODEL, autocompletion=complete_model),
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
Slices = Annotated[bool, typer.Option("--slices", help="Also what lives across each attention, a token.")]
Threads = Annotated[int | None, _integer_option("CPU threads.", "Engine")]


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
    max_tokens: Annotated[
        int | None,
        _integer_option(
            "The most tokens to generate. Default: 256; for `lamina chat` what the context has room for.",
            show_default=False,
        ),
    ] = None
    min_tokens: Annotated[int | None, _integer_option("Do not stop before this many tokens.")] = None
    temperature: Annotated[float | None, _number_option("0 always takes the likeliest token.")] = None
    top_p: Annotated[float | None, _number_option("Keep the likeliest tokens that together reach this.")] = None
    top_k: Annotated[int | None, _integer_option("Keep the k likeliest tokens; 0 keeps all.")] = None
    min_p: Annotated[float | None, _number_option("Drop tokens less likely than this share of the likeliest.")] = None
    repetition_penalty: Annotated[float | None, _number_option("Above 1 makes tokens seen before less likely.")] = None
    presence_penalty: Annotated[float | None, _number_option("-2 to 2, once for any token used.")] = None
    frequency_penalty: Annotated[float | None, _number_option("-2 to 2, for each time a token was used.")] = None
    seed: Annotated[
        int | None, _integer_option("The same seed gives the same text, up to rounding: see --deterministic.")
    ] = None
    stop: Annotated[
        list[str] | None, typer.Option(help="End where this appears. Repeatable.", rich_help_panel="Sampling")
    ] = None
    n: Annotated[int | None, _integer_option("Samples for each prompt.")] = None
    logprobs: Annotated[int | None, _integer_option("With --json: report this many likeliest tokens too.")] = None
    ignore_eos: Annotated[
        bool | None, typer.Option("--ignore-eos", help="Go on past the end token.", rich_help_panel="Sampling")
    ] = None

    json_schema: Annotated[str | None, _form_option("JSON that fits this JSON Schema: its text, or @FILE.")] = None
    regex: Annotated[str | None, _form_option("All of it matches this regular expression.")] = None
    choice: Annotated[list[str] | None, _form_option("It is one of these. Repeatable.")] = None
    grammar: Annotated[str | None, _form_option("It fits this grammar (Lark, llguidance's dialect), or @FILE.")] = None

    def params(self, **defaults: Any) -> SamplingParams:
        """The options that were given over `defaults`, checked. Raises InvalidRequest."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        given = {name: value for name, value in given.items() if value not in (None, [])}
        for name in ("json_schema", "grammar"):
            if name in given and given[name].startswith("@"):
                given[name] = read_all(given[name][1:])
        return SamplingParams(**(defaults | given))


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """The options of every command that loads a model: fields of `EngineConfig`, and a plan file with some of them."""

    checked_by: ClassVar[type] = EngineConfig
    dtype: Annotated[str | None, _engine_option("float32, bfloat16 or auto.")] = None
    weights: Annotated[
        str | None, _engine_option("Weights that the files have in few bits: packed, bfloat16, float32 or auto.")
    ] = None
    quantize: Annotated[str | None, _engine_option("Pack weights that the files have as floats: int4 or int8.")] = None
    device: Annotated[
        str | None, _engine_option("Of the dense layers: cpu, cuda, cuda:N or auto; with commas, one a model worker.")
    ] = None
    attention_device: Annotated[
        str | None, _engine_option("Of KV and attention: cpu, cuda, cuda:N or auto; with commas, one a worker.")
    ] = None
    compile: Annotated[bool | None, _engine_option("Send the dense layers through torch.compile.")] = None
    threads: Threads = None
    kv_memory: Annotated[
        str | None, _engine_option("Memory for the KV cache of each holder: bytes, or such as 2GiB.")
    ] = None
    kv_local: Annotated[
        str | None, _worker_option(help="Memory for the KV of the engine's own process. Default: kv-memory.")
    ] = None
    kv_cold: Annotated[str | None, _engine_option("A folder on a disk, for the KV that nobody reads for long.")] = None
    kv_resident: Annotated[
        str | None, _engine_option("Of kv-memory, what to keep in memory beside kv-cold: bytes, or such as 2GiB.")
    ] = None
    kv_dtype: Annotated[str | None, _engine_option("Of the KV cache: float32, bfloat16, float16, int8 or auto.")] = None
    deterministic: Annotated[
        bool | None,
        _engine_option("One text for a request that runs alone, in bfloat16 too; computes shared prefixes each time."),
    ] = None
    policy: Annotated[
        str | None, _engine_option("What each KV head reads and keeps: full, auto, a policy, or a .toml file.")
    ] = None
    sketches: Annotated[
        bool | None, _engine_option("Keep sketches of KV, so that requests may name policies that choose by them.")
    ] = None
    speculate: Annotated[
        str | None, _engine_option("Draft tokens to be verified together: ngram, or a smaller model.")
    ] = None
    num_speculative_tokens: Annotated[int | None, _integer_option("The most drafts of a sequence.", "Engine")] = None
    max_model_len: Annotated[int | None, _integer_option("The longest context in tokens.", "Engine")] = None
    max_num_seqs: Annotated[int | None, _integer_option("Sequences of a batch, at most.", "Engine")] = None
    sequence_tokens: Annotated[
        int | None, _integer_option("A usual length in tokens, to deal memory among unlike layers.", "Engine")
    ] = None
    model_workers: Annotated[int | None, _integer_option("Processes that share the dense layers.", "Engine")] = None
    model_parallel: Annotated[
        str | None, _engine_option("How model workers share: tensor cuts each layer, replicas take batches in turn.")
    ] = None
    attention_workers: Annotated[
        list[str] | None,
        _worker_option(help="How many to start, or HOST:PORT of running ones: repeated, or with commas."),
    ] = None
    autoscale: Annotated[
        str | None, _worker_option(help="The least and the most to have, as KV grows.", metavar="MIN:MAX")
    ] = None
    shard: Annotated[str | None, _worker_option(help="heads, sequence or heads+sequence.")] = None
    redundancy: Annotated[
        str | None, _worker_option(help="Copies of KV for a loss: none, replica, replica(N), parity or parity(K).")
    ] = None
    cluster: Annotated[str | None, _worker_option(help="Run on a Ray cluster: auto, or its address.")] = None
    local_share: Annotated[
        str | None, _worker_option(help="Of the KV, what stays in this process: 0 to 1 or auto.")
    ] = None
    lanes: Annotated[str | None, _worker_option(help="Batches under way at once: a number or auto.")] = None
    query_first: Annotated[
        str | None, _worker_option(help="Whether q leaves before k and v: always, never or auto.")
    ] = None
    data_channel: Annotated[str | None, _worker_option(help="Between hosts: grpc or tcp.")] = None
    local_channel: Annotated[
        bool | None, _worker_option("--local-channel/--no-local-channel", help="A Unix socket on one host, or not.")
    ] = None
    tls_dir: Annotated[str | None, _worker_option(help="Folder with the workers' ca.pem.")] = None
    token_file: Annotated[str | None, _worker_option(help="File with the workers' token.")] = None
    insecure: Annotated[
        bool | None, _worker_option("--insecure", help="Use other hosts without TLS or token, Ray without token.")
    ] = None
    plan: Annotated[
        Path | None,
        _engine_option("A file from `lamina plan`: its model and engine. Options given beside it override its own."),
    ] = None

    def config(self) -> dict[str, Any]:
        """The options that were given, as keywords for `LLM`."""
        given = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "plan"}
        given["attention_workers"] = _workers(self.attention_workers or [])
        given["autoscale"] = None if self.autoscale is None else _range(self.autoscale)
        for name in ("device", "attention_device"):
            if (names := given[name]) is not None and "," in names:
                given[name] = [part.strip() for part in names.split(",")]
        given["lanes"] = int(self.lanes) if self.lanes is not None and self.lanes.isdecimal() else self.lanes
        if self.local_share is not None and self.local_share != "auto":
            given["local_share"] = _number(self.local_share)
        return {name: value for name, value in given.items() if value is not None}


def check_suffix(option: str, path: Path | None, suffix: str) -> None:
    """Raise InvalidRequest where a file is to be written under a name with another suffix."""
    if path is not None and path.suffix != suffix:
        raise InvalidRequest(f"--{option} is {str(path)!r:.200}; allowed are names that end in {suffix}")


def check_output(option: str, path: Path | None, suffix: str) -> None:
    """`check_suffix`, and that the file can be written: before the work whose result it is to hold. Raises
    InvalidRequest."""
    check_suffix(option, path, suffix)
    if path is None:
        return
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
    least, _, most = text.partition(":")
    if not (least.strip().isdecimal() and most.strip().isdecimal()):
        raise typer.BadParameter(f"--autoscale is {text!r:.80}; allowed is MIN:MAX, two whole numbers")
    return int(least), int(most)


@dataclass(frozen=True, slots=True)
class Without:
    """Beside a group in `Annotated`: the fields that the command does not take. They keep their defaults."""

    names: frozenset[str]


@dataclass(frozen=True, slots=True)
class Described:
    """Beside a group in `Annotated`: the fields that the command takes, in their order, each with its option. For a
    dataclass that knows nothing of Typer; fields that are not named keep their defaults."""

    options: Mapping[str, Any]


def _show_defaults(group: Any, hints: Mapping[str, Any]) -> None:
    """Have `--help` show the default of the class that checks a group, for options that are None by themselves, but
    not where the help says it in words."""
    defaults = {field.name: field.default for field in fields(getattr(group, "checked_by", group))}
    for name, hint in hints.items():
        default, option = defaults.get(name), get_args(hint)[1]
        shown = isinstance(default, str | int | float) and not isinstance(default, bool)
        if shown and hasattr(group, "checked_by") and option.show_default is not False:
            option.show_default = str(default)


def flatten_options(command: Callable[..., None]) -> Callable[..., None]:
    """The command as Typer reads it, with one parameter for each field in the place of a parameter that is a dataclass.

    A field has its option or argument in its `Annotated` type, or in `Described`, and Typer gets its default. The
    command gets instances.
    """
    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters: list[inspect.Parameter] = []
    groups: dict[str, tuple[Any, list[str]]] = {}
    for own in inspect.signature(command, eval_str=True).parameters.values():
        group, *marks = get_args(own.annotation) or (own.annotation,)
        if not is_dataclass(group):
            parameters.append(own.replace(kind=keyword))
            continue
        typed = get_type_hints(group, include_extras=True)
        hints = {field.name: typed[field.name] for field in fields(group)}
        for mark in marks:
            if isinstance(mark, Described):
                hints = {name: Annotated[hints[name], option] for name, option in mark.options.items()}
            elif isinstance(mark, Without):
                hints = {name: hint for name, hint in hints.items() if name not in mark.names}
        _show_defaults(group, hints)
        every = {field.name: field for field in fields(group)}
        taken = [every[name] for name in hints]
        groups[own.name] = group, [field.name for field in taken]
        for field in taken:
            default = inspect.Parameter.empty if field.default is MISSING else field.default
            parameters.append(inspect.Parameter(field.name, keyword, default=default, annotation=hints[field.name]))

    @functools.wraps(command)
    def flat(**given: Any) -> None:
        values = {
            name: group(**{field: given.pop(field) for field in taken}) for name, (group, taken) in groups.items()
        }
        command(**given, **values)

    flat.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # what Typer reads
    flat.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return flat
