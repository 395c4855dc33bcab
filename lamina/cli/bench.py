"""`lamina bench`: load a server and report latencies, or time decode steps of an engine in this process.

`lamina.measure.bench` does the measuring. It is imported when a command runs, but for its settings.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from lamina.cli import options as opt
from lamina.cli.terminal import ProgressBars, print_json
from lamina.errors import InvalidRequest
from lamina.measure.bench.workloads import Settings
from lamina.system.child_process import KEY_VARIABLE

bench_app = typer.Typer(no_args_is_help=True, help="Measure a server, or the decode steps of an engine.")

KEYS = (KEY_VARIABLE, "OPENAI_API_KEY")
_SERVER, _LOAD, _WORKLOAD, _OUTPUT = "Server", "Load", "Workload", "Output"


def _option(help: str, panel: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, **more)


SaveResult = Annotated[Path | None, _option("Write everything that was found here, as JSON.", _OUTPUT)]


_SETTINGS = opt.Described({
    "base_url": _option("Any server with OpenAI's API.", _SERVER),
    "model": _option("Its name there. Default: the first it lists.", _SERVER, "--model", "-m"),
    "api_key": _option(f"Default: {' or '.join(KEYS)} of the environment.", _SERVER),
    "endpoint": _option("chat or completions.", _SERVER),
    "tokenizer": _option("A folder or alias to count tokens with. Default: the server is asked.", _SERVER),
    "max_model_len": _option("The server's context, for traces. Default: as it says.", _SERVER),
    "timeout": _option("Seconds that one request may take.", _SERVER),
    "num_prompts": _option("How many requests.", _LOAD),
    "request_rate": _option("Requests a second; inf: all at once. Default: inf, or a trace's own times.", _LOAD),
    "burstiness": _option("Of arrivals: 1 is Poisson, below comes in bursts, above regularly.", _LOAD),
    "max_concurrency": _option("Requests under way at most; others wait here.", _LOAD),
    "num_warmups": _option("Requests before, which are not counted.", _LOAD),
    "dataset": _option("random, shared-prefix or trace.", _WORKLOAD),
    "input_len": _option("Tokens of a prompt.", _WORKLOAD),
    "output_len": _option("Tokens of an answer.", _WORKLOAD),
    "range_ratio": _option("Lengths are from 1 - this to 1 + this times as long.", _WORKLOAD),
    "prefix_len": _option("Of shared-prefix: tokens that come before.", _WORKLOAD),
    "num_prefixes": _option("Of shared-prefix: how many different ones.", _WORKLOAD),
    "trace": _option("A published trace by name, or a file in its format.", _WORKLOAD),
    "trace_dir": _option(
        "Folder of files of published traces. Azure's are built in; Mooncake's is drawn without its file.", _WORKLOAD
    ),
    "speed": _option("A trace comes so many times as fast.", _WORKLOAD),
    "ignore_eos": _option("Go on past the end token (vLLM and Lamina).", _WORKLOAD, "--ignore-eos"),
    "seed": _option("Of everything drawn. Default: lengths and times of seed 0, new words.", _WORKLOAD),
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class OutputOptions:
    """What is reported of a run, and where."""

    goodput: Annotated[
        list[str] | None, _option("Limits in milliseconds, such as ttft:500 tpot:50 e2el:5000.", _OUTPUT)
    ] = None
    percentile: Annotated[str, _option("Which to report, with commas.", _OUTPUT)] = "90,99"
    save_result: SaveResult = None
    save_detailed: Annotated[bool, _option("With the times of each request.", _OUTPUT, "--save-detailed")] = False
    as_json: opt.JsonLines = False

    def check(self) -> None:
        """Raises InvalidRequest for a file that could not be written, before the run and not after it."""
        opt.check_output("save-result", self.save_result, ".json")
        if self.save_detailed and self.save_result is None:
            raise InvalidRequest("--save-detailed was given; it needs --save-result")


@bench_app.command()
@opt.flatten_options
def serve(
    more_goodput: Annotated[list[str] | None, typer.Argument(hidden=True, metavar="NAME:MS")] = None,
    *,
    settings: Annotated[Settings, _SETTINGS],
    output: OutputOptions,
) -> None:
    """Send requests to a server and report latencies (TTFT, TPOT, ITL, E2EL), throughput and goodput."""
    from lamina.measure.bench.measures import parse_percentiles, parse_slo
    from lamina.measure.bench.report import record, text
    from lamina.measure.bench.running import run_loop
    from lamina.measure.bench.serve import bench

    if more_goodput and not output.goodput:  # further words are for --goodput, as vLLM takes them
        raise InvalidRequest(f"{more_goodput[0]!r:.80} was given; allowed are options alone")
    # LAMINA_API_KEY may hold several, as a server takes them
    environment = (word for name in KEYS for word in os.environ.get(name, "").split())
    settings = replace(
        settings,
        api_key=settings.api_key or next(environment, None),
        slo=parse_slo([*(output.goodput or []), *(more_goodput or [])]),
        percentiles=parse_percentiles(output.percentile),
    )
    output.check()
    with ProgressBars() as progress:
        result = run_loop(bench(settings, progress))
    _give(record(result, detailed=output.save_detailed), text(result), output.as_json, output.save_result)
    if result.run.unfinished:
        raise KeyboardInterrupt
    if not result.summary.completed:
        raise typer.Exit(1)


@bench_app.command()
@opt.flatten_options
def decode(
    model: opt.ModelName,
    batch: Annotated[str, typer.Option(help="How many sequences, with commas.")] = "1,4,16",
    context: Annotated[str, typer.Option(help="Tokens of each prompt, with commas.")] = "512,2048",
    steps: Annotated[int, typer.Option(help="Decode steps that are timed in each round.")] = 48,
    rounds: Annotated[int, typer.Option(help="How often each is measured; the median counts.")] = 3,
    save_result: SaveResult = None,
    as_json: opt.JsonLines = False,
    *,
    engine: opt.EngineOptions,
) -> None:
    """Time decode steps without a server: milliseconds, tokens a second, bytes read beside what memory gives."""
    from lamina.measure.bench.decode import bench, record, table

    batches, contexts = _numbers("batch", batch, 4096), _numbers("context", context, 1 << 24)
    for name, value, limit in (("steps", steps, 4096), ("rounds", rounds, 100)):
        if not 2 <= value <= limit and not (name == "rounds" and value == 1):
            raise InvalidRequest(f"{name} is {value}; allowed are {'1' if name == 'rounds' else '2'} to {limit}")
    opt.check_output("save-result", save_result, ".json")
    if engine.plan is not None:
        raise InvalidRequest("--plan was given; `lamina plan --check` measures what a plan promises")
    with ProgressBars() as progress:
        result = bench(
            model,
            engine.config(),
            [(b, c) for c in contexts for b in batches],
            steps=steps,
            rounds=rounds,
            progress=progress,
        )
    _give(record(result), table(result), as_json, save_result)


def _give(record: dict[str, Any], text: str, as_json: bool, path: Path | None) -> None:
    """Print a result, and write it where that was asked for: its JSON with this machine, date and version."""
    import json
    from datetime import datetime, timezone

    from lamina.system.machine import this_machine
    from lamina.system.text_files import write_text
    from lamina.version import __version__

    machine, now = this_machine(), datetime.now(timezone.utc)
    about = {"processor": machine.processor, "cores": machine.cores, "memory": machine.memory}
    fields = {**record, "date": now.isoformat(timespec="seconds"), "lamina_version": __version__, "machine": about}
    if as_json:
        print_json({name: value for name, value in fields.items() if name != "requests"})  # which are for the file
    else:
        typer.echo(text, nl=False)
    if path is not None:
        write_text(path, json.dumps(fields, indent=1, allow_nan=False) + "\n")


def _numbers(name: str, words: str, most: int) -> list[int]:
    try:
        numbers = [int(word) for word in words.split(",")]
    except ValueError:
        numbers = []
    if not 1 <= len(numbers) <= 32 or not all(1 <= number <= most for number in numbers):
        raise InvalidRequest(f"{name} is {words!r:.80}; allowed are 1 to 32 numbers from 1 to {most}, such as 1,4,16")
    return list(dict.fromkeys(numbers))
