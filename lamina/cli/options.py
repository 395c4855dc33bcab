"""The arguments and options of the commands, each described once, and how their numbers are read.

Knows names, help and syntax. Which values are allowed, `SamplingParams` and the engine say. None stands for the model's
own default, or Lamina's.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer


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


def _integer_option(help: str, panel: str = "Sampling") -> Any:
    return typer.Option(help=help, rich_help_panel=panel, parser=_integer, metavar="INTEGER")


def _number_option(help: str) -> Any:
    return typer.Option(help=help, rich_help_panel="Sampling", parser=_number, metavar="NUMBER")


def _engine_option(help: str) -> Any:
    return typer.Option(help=help, rich_help_panel="Engine")


def _worker_option(*names: str, help: str, **more: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel="Attention workers", **more)


_MODELS = "An alias, a folder, a GGUF file or a hub id."

JsonLines = Annotated[bool, typer.Option("--json", help="Print JSON, one object a line.")]
ModelName = Annotated[str, typer.Argument(metavar="MODEL", help=_MODELS)]

Prompts = Annotated[list[str] | None, typer.Argument(help="One or several prompts.", show_default=False)]
File = Annotated[str | None, typer.Option(help="A file with one prompt a line; - is stdin.")]
Chat = Annotated[bool | None, typer.Option("--chat/--raw", help="The chat template, or not. Default: if there is one.")]
Stream = Annotated[bool, typer.Option("--stream/--no-stream", help="Show one prompt's text as it comes.")]
System = Annotated[str | None, typer.Option(help="The system message.")]

Model = Annotated[str, typer.Option("--model", "-m", help=_MODELS)]
Threads = Annotated[int | None, _integer_option("CPU threads.", "Engine")]
KvMemory = Annotated[str | None, _engine_option("Memory for the KV cache of each holder: bytes, or such as 2GiB.")]

MaxTokens = Annotated[int | None, _integer_option("The most tokens to generate.")]
MinTokens = Annotated[int | None, _integer_option("Do not stop before this many tokens.")]
Temperature = Annotated[float | None, _number_option("0 always takes the likeliest token.")]
TopP = Annotated[float | None, _number_option("Keep the likeliest tokens that together reach this.")]
TopK = Annotated[int | None, _integer_option("Keep the k likeliest tokens; 0 keeps all.")]
MinP = Annotated[float | None, _number_option("Drop tokens less likely than this share of the likeliest.")]
RepetitionPenalty = Annotated[float | None, _number_option("Above 1 makes tokens seen before less likely.")]
PresencePenalty = Annotated[float | None, _number_option("-2 to 2, once for any token used.")]
FrequencyPenalty = Annotated[float | None, _number_option("-2 to 2, for each time a token was used.")]
Seed = Annotated[int | None, _integer_option("The same seed gives the same text.")]
Stop = Annotated[list[str] | None, typer.Option(help="End where this appears. Repeatable.", rich_help_panel="Sampling")]
Samples = Annotated[int | None, _integer_option("Samples for each prompt.")]
Logprobs = Annotated[int | None, _integer_option("With --json: report this many likeliest tokens too.")]
IgnoreEos = Annotated[
    bool | None, typer.Option("--ignore-eos", help="Go on past the end token.", rich_help_panel="Sampling")
]


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """The options of every command that loads a model: fields of `EngineConfig`, and a plan that has some of them."""

    dtype: Annotated[str | None, _engine_option("float32, bfloat16 or auto.")] = None
    device: Annotated[
        str | None, _engine_option("Of the dense layers: cpu, cuda, cuda:N or auto; with commas, one a model worker.")
    ] = None
    attention_device: Annotated[
        str | None, _engine_option("Of KV and attention: cpu, cuda, cuda:N or auto; with commas, one a worker.")
    ] = None
    compile: Annotated[bool | None, _engine_option("Send the dense layers through torch.compile.")] = None
    threads: Threads = None
    kv_memory: KvMemory = None
    kv_dtype: Annotated[str | None, _engine_option("Of the KV cache: float32, bfloat16, float16, int8 or auto.")] = None
    policy: Annotated[
        str | None, _engine_option("What each KV head reads and keeps: full, auto, a policy, or a .toml file.")
    ] = None
    max_model_len: Annotated[int | None, _integer_option("The longest context in tokens.", "Engine")] = None
    model_workers: Annotated[int | None, _integer_option("Processes that share the dense layers.", "Engine")] = None
    model_parallel: Annotated[
        str | None, _engine_option("How model workers share: tensor cuts each layer, replicas take batches in turn.")
    ] = None
    attention_workers: Annotated[
        list[str] | None,
        _worker_option(help="How many to start, or HOST:PORT of those that run: repeated, or with commas."),
    ] = None
    shard: Annotated[str | None, _worker_option(help="heads, sequence or heads+sequence.")] = None
    cluster: Annotated[str | None, _worker_option(help="Run on a Ray cluster: auto, or its address.")] = None
    local_share: Annotated[
        str | None, _worker_option(help="Of the KV, what stays in this process: 0 to 1 or auto.")
    ] = None
    lanes: Annotated[str | None, _worker_option(help="Batches under way at once: a number or auto.")] = None
    data_channel: Annotated[str | None, _worker_option(help="Between hosts: grpc or tcp.")] = None
    local_channel: Annotated[
        bool | None, _worker_option("--local-channel/--no-local-channel", help="A Unix socket on one host, or not.")
    ] = None
    tls_dir: Annotated[str | None, _worker_option(help="Folder with the workers' ca.pem.")] = None
    token_file: Annotated[str | None, _worker_option(help="File with the workers' token.")] = None
    insecure: Annotated[bool | None, _worker_option("--insecure", help="Use other hosts without TLS or token.")] = None
    plan: Annotated[
        Path | None,
        _engine_option("A file from `lamina plan`: its model and engine. Options given besides go before the plan's."),
    ] = None

    def config(self) -> dict[str, Any]:
        """What was given, as keywords for `LLM`."""
        given = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "plan"}
        given["attention_workers"] = _workers(self.attention_workers or [])
        for name in ("device", "attention_device"):
            if (names := given[name]) is not None and "," in names:
                given[name] = [part.strip() for part in names.split(",")]
        given["lanes"] = int(self.lanes) if self.lanes is not None and self.lanes.isdecimal() else self.lanes
        if self.local_share is not None and self.local_share != "auto":
            given["local_share"] = _number(self.local_share)
        return {name: value for name, value in given.items() if value is not None}


def _workers(words: list[str]) -> int | list[str] | None:
    """A number, or the addresses in words such as "a:1,b:2"."""
    items = [item.strip() for word in words for item in word.split(",")]
    if len(items) == 1 and items[0].isdecimal():
        return int(items[0])
    if wrong := [item for item in items if ":" not in item]:
        raise typer.BadParameter(f"--attention-workers has {wrong[0]!r}; allowed are a number, or HOST:PORT")
    return items or None


def engine_options(command: Callable[..., None]) -> Callable[..., None]:
    """The command with all of `EngineOptions` after its own options; it takes them together, as `engine`."""

    @functools.wraps(command)
    def taking_options(**given: Any) -> None:
        engine = EngineOptions(**{field.name: given.pop(field.name) for field in fields(EngineOptions)})
        command(**given, engine=engine)

    own = inspect.signature(command, eval_str=True).parameters.values()
    hints = get_type_hints(EngineOptions, include_extras=True)
    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [parameter.replace(kind=keyword) for parameter in own if parameter.name != "engine"]
    parameters += [
        inspect.Parameter(field.name, keyword, default=field.default, annotation=hints[field.name])
        for field in fields(EngineOptions)
    ]
    taking_options.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # what typer reads
    taking_options.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return taking_options
