"""The arguments and options of the commands, each described once, and how their numbers are read.

Knows names, help and syntax. Which values are allowed, `SamplingParams` and the engine say. None stands for the model's
own default, or Lamina's.
"""

from __future__ import annotations

from typing import Annotated, Any

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


_MODELS = "An alias, a folder, a GGUF file or a hub id."

JsonLines = Annotated[bool, typer.Option("--json", help="Print JSON, one object a line.")]
ModelName = Annotated[str, typer.Argument(metavar="MODEL", help=_MODELS)]

Prompts = Annotated[list[str] | None, typer.Argument(help="One or several prompts.", show_default=False)]
File = Annotated[str | None, typer.Option(help="A file with one prompt a line; - is stdin.")]
Chat = Annotated[bool | None, typer.Option("--chat/--raw", help="The chat template, or not. Default: if there is one.")]
Stream = Annotated[bool, typer.Option("--stream/--no-stream", help="Show one prompt's text as it comes.")]
System = Annotated[str | None, typer.Option(help="The system message.")]

Model = Annotated[str, typer.Option("--model", "-m", help=_MODELS)]
Dtype = Annotated[str, _engine_option("float32, bfloat16 or auto.")]
Device = Annotated[str, _engine_option("cpu, cuda or auto.")]
Threads = Annotated[int | None, _integer_option("CPU threads.", "Engine")]
KvMemory = Annotated[str | None, _engine_option("Memory for the KV cache: bytes, or such as 2GiB.")]
MaxModelLen = Annotated[int | None, _integer_option("The longest context in tokens.", "Engine")]

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
