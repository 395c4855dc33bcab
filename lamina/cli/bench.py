"""`lamina bench`: load a server and report latencies, or time decode steps of an engine in this process.

`lamina.measure.bench` does the measuring. It is imported when a command runs.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lamina.cli import options as opt
from lamina.cli.terminal import ProgressBars, print_json
from lamina.errors import InvalidRequest
from lamina.system.child_process import KEY_VARIABLE

if TYPE_CHECKING:
    from lamina.measure.bench.serve import Result

bench_app = typer.Typer(no_args_is_help=True, help="Measure a server, or the decode steps of an engine.")

KEYS = (KEY_VARIABLE, "OPENAI_API_KEY")
_SERVER, _LOAD, _WORKLOAD, _OUTPUT = "Server", "Load", "Workload", "Output"


def _option(help: str, panel: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, **more)


SaveResult = Annotated[Path | None, _option("Write everything that was found here, as JSON.", _OUTPUT)]


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """The server to load."""

    base_url: Annotated[str, _option("Any server with OpenAI's API.", _SERVER)] = "http://127.0.0.1:8000"
    model: Annotated[str | None, _option("Its name there. Default: the first it lists.", _SERVER, "--model", "-m")] = (
        None
    )
    api_key: Annotated[str | None, _option(f"Default: {' or '.join(KEYS)} of the environment.", _SERVER)] = field(
        default=None, repr=False
    )
    endpoint: Annotated[str, _option("chat or completions.", _SERVER)] = "chat"
    tokenizer: Annotated[
        str | None, _option("A folder or alias to count tokens with. Default: the server is asked.", _SERVER)
    ] = None
    max_model_len: Annotated[int | None, _option("The server's context, for traces. Default: as it says.", _SERVER)] = (
        None
    )
    timeout: Annotated[float, _option("Seconds that one request may take.", _SERVER)] = 600.0


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How many requests there are, and when they are sent."""

    num_prompts: Annotated[int, _option("How many requests.", _LOAD)] = 100
    request_rate: Annotated[
        float | None, _option("Requests a second; inf: all at once. Default: inf, or a trace's own times.", _LOAD)
    ] = None
    burstiness: Annotated[
        float, _option("Of arrivals: 1 is Poisson, below comes in bursts, above regularly.", _LOAD)
    ] = 1.0
    max_concurrency: Annotated[int | None, _option("Requests under way at most; others wait here.", _LOAD)] = None
    num_warmups: Annotated[int, _option("Requests before, which are not counted.", _LOAD)] = 1


@dataclass(frozen=True, slots=True)
class WorkloadOptions:
    """The prompts, and the lengths of answers."""

    dataset: Annotated[str, _option("random, shared-prefix or trace.", _WORKLOAD)] = "random"
    input_len: Annotated[int, _option("Tokens of a prompt.", _WORKLOAD)] = 256
    output_len: Annotated[int, _option("Tokens of an answer.", _WORKLOAD)] = 128
    range_ratio: Annotated[float, _option("Lengths are from 1 - this to 1 + this times as long.", _WORKLOAD)] = 0.0
    prefix_len: Annotated[int, _option("Of shared-prefix: tokens that come before.", _WORKLOAD)] = 256
    num_prefixes: Annotated[int, _option("Of shared-prefix: how many different ones.", _WORKLOAD)] = 4
    trace: Annotated[str, _option("A published trace by name, or a file in its format.", _WORKLOAD)] = "azure-conv"
    trace_dir: Annotated[
        Path | None, _option("Where files of published traces are. Default: they are drawn.", _WORKLOAD)
    ] = None
    speed: Annotated[float, _option("A trace comes so many times as fast.", _WORKLOAD)] = 1.0
    ignore_eos: Annotated[bool, _option("Go on past the end token (vLLM and Lamina).", _WORKLOAD, "--ignore-eos")] = (
        False
    )
    seed: Annotated[
        int | None, _option("Of everything drawn. Default: lengths and times of seed 0, new words.", _WORKLOAD)
    ] = None


@dataclass(frozen=True, slots=True)
class OutputOptions:
    """What is reported of a run, and where."""

    goodput: Annotated[
        list[str] | None, _option("Limits in milliseconds, such as ttft:500 tpot:50 e2el:5000.", _OUTPUT)
    ] = None
    percentile: Annotated[str, _option("Which to report, with commas.", _OUTPUT)] = "90,99"
    save_result: SaveResult = None
    save_detailed: Annotated[bool, _option("With the times of each request.", _OUTPUT, "--save-detailed")] = False
    plot: Annotated[Path | None, _option("Draw latencies and the run over time here, as PNG.", _OUTPUT)] = None
    as_json: opt.JsonLines = False

    def check(self) -> None:
        """Raises InvalidRequest for a file that could not be written, before the run and not after it."""
        _writable("save-result", self.save_result, ".json")
        _writable("plot", self.plot, ".png")
        if self.save_detailed and self.save_result is None:
            raise InvalidRequest("--save-detailed was given; it needs --save-result")


@bench_app.command()
@opt.flatten_options
def serve(
    more_goodput: Annotated[list[str] | None, typer.Argument(hidden=True, metavar="")] = None,
    *,
    server: ServerOptions,
    load: LoadOptions,
    workload: WorkloadOptions,
    output: OutputOptions,
) -> None:
    """Send requests to a server and report latencies (TTFT, TPOT, ITL, E2EL), throughput and goodput."""
    from lamina.measure.bench.measures import parse_percentiles, parse_slo
    from lamina.measure.bench.running import run_loop
    from lamina.measure.bench.serve import Settings, bench

    if more_goodput and not output.goodput:  # further words are for --goodput, as vLLM takes them
        raise InvalidRequest(f"{more_goodput[0]!r:.80} was given; allowed are options alone")
    given = asdict(server) | asdict(load) | asdict(workload)
    given["api_key"] = server.api_key or _key_of_the_environment()
    slo = parse_slo([*(output.goodput or []), *(more_goodput or [])])
    settings = Settings(**given, slo=slo, percentiles=parse_percentiles(output.percentile))
    output.check()
    with ProgressBars() as progress:
        result = run_loop(bench(settings, progress))
    _report(result, output)
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
    from datetime import datetime, timezone

    from lamina.measure.bench.decode import bench, record, table
    from lamina.system.machine import this_machine
    from lamina.system.text_files import write_text
    from lamina.version import __version__

    batches, contexts = _numbers("batch", batch, 4096), _numbers("context", context, 1 << 24)
    for name, value, most in (("steps", steps, 4096), ("rounds", rounds, 100)):
        if not 2 <= value <= most and not (name == "rounds" and value == 1):
            raise InvalidRequest(f"{name} is {value}; allowed are {'1' if name == 'rounds' else '2'} to {most}")
    _writable("save-result", save_result, ".json")
    if engine.plan is not None:
        raise InvalidRequest("--plan was given; `lamina plan --check` measures the steps of a plan")
    with ProgressBars() as progress:
        found = bench(
            model, engine.config(), [(b, c) for c in contexts for b in batches], steps=steps, rounds=rounds,
            progress=progress,
        )  # fmt: skip
    fields = record(found, this_machine(), date=datetime.now(timezone.utc).isoformat(), version=__version__)
    if save_result is not None:
        write_text(save_result, _json(fields))
    if as_json:
        print_json(fields)
    else:
        typer.echo(table(found), nl=False)


def _report(result: Result, output: OutputOptions) -> None:
    from datetime import datetime, timezone

    from lamina.measure.bench.report import record, text
    from lamina.system.machine import this_machine
    from lamina.system.text_files import write_text
    from lamina.version import __version__

    def fields(detailed: bool) -> dict[str, Any]:
        date = datetime.now(timezone.utc).isoformat(timespec="seconds")
        return record(result, this_machine(), date=date, version=__version__, detailed=detailed)

    if output.as_json:
        print_json(fields(False))
    else:
        typer.echo(text(result), nl=False)
    if output.save_result is not None:
        write_text(output.save_result, _json(fields(output.save_detailed)))
    if output.plot is not None and result.summary.completed:
        from lamina.measure.bench.plots import save_plot

        save_plot(result, output.plot)


def _key_of_the_environment() -> str | None:
    """The first key: LAMINA_API_KEY may hold several, as a server takes them."""
    return next((word for name in KEYS for word in os.environ.get(name, "").split()), None)


def _writable(name: str, path: Path | None, suffix: str) -> None:
    """Raises InvalidRequest where `path` has another suffix, or no folder to be written in."""
    if path is None:
        return
    if path.suffix != suffix:
        raise InvalidRequest(f"--{name} is {str(path)!r:.200}; allowed are names that end in {suffix}")
    if not path.absolute().parent.is_dir():
        raise InvalidRequest(f"--{name} is {str(path)!r:.200}; its folder does not exist")
    if name == "plot":
        from lamina.system.figures import needs_matplotlib

        needs_matplotlib()


def _numbers(name: str, words: str, most: int) -> list[int]:
    try:
        found = [int(word) for word in words.split(",")]
    except ValueError:
        found = []
    if not 1 <= len(found) <= 32 or not all(1 <= number <= most for number in found):
        raise InvalidRequest(f"{name} is {words!r:.80}; allowed are 1 to 32 numbers from 1 to {most}, such as 1,4,16")
    return list(dict.fromkeys(found))


def _json(fields: dict[str, Any]) -> str:
    import json

    return json.dumps(fields, indent=1, allow_nan=False) + "\n"
