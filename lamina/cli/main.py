"""The command `lamina`: the list of its commands, their exit codes, and the commands around text and models.

stdout carries answers and nothing else; progress, statistics and errors go to stderr. Exit codes: 0, 1 for a failure,
2 for bad input, 130 after Ctrl-C. torch is imported when a model is needed, so that `--help` is quick.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from lamina.cli import options as opt
from lamina.cli.bench import bench_app
from lamina.cli.cluster import attention_worker, cluster_app, credentials
from lamina.cli.policy import calibrate, policy_app
from lamina.cli.printing import print_as_it_comes, print_as_they_finish, print_json_lines
from lamina.cli.serve import serve
from lamina.cli.simulate import calibrate_hardware, plan, simulate
from lamina.cli.terminal import (
    ProgressBars,
    close_stdout,
    decode_argument,
    iter_lines,
    print_json,
    print_rows,
    show_bytes,
    write,
)
from lamina.config import DEFAULT_MODEL
from lamina.errors import InvalidRequest, LaminaError, ModelFileError, PolicyError, UnsupportedModelError
from lamina.sampling_params import SamplingParams
from lamina_workers.errors import DiskFullError

if TYPE_CHECKING:
    from lamina.llm import LLM

BAD_INPUT = (InvalidRequest, ModelFileError, PolicyError, UnsupportedModelError)


class Commands(TyperGroup):
    """The commands. Each way to end becomes an exit code and at most one line on stderr."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(130) from None
        except BrokenPipeError:  # the reader of our output, such as head, has enough
            close_stdout()
            raise typer.Exit(1) from None
        except typer.BadParameter as error:
            typer.echo(f"error: {error.format_message()}", err=True)
            raise typer.Exit(2) from None
        except (LaminaError, OSError) as error:
            typer.echo(f"error: {' '.join(str(error).split())}", err=True)  # a template's text may have several lines
            raise typer.Exit(exit_code(error)) from error


def exit_code(error: LaminaError | OSError) -> int:
    """2 for bad input, 1 for everything else, such as a full disk or a folder that cannot be written."""
    unwritable = isinstance(error.__cause__, PermissionError) or getattr(error.__cause__, "errno", 0) == errno.EROFS
    return 1 if isinstance(error, DiskFullError) or unwritable or not isinstance(error, BAD_INPUT) else 2


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Run large language models with attention cut off from the dense layers.",
)
models_app = typer.Typer(no_args_is_help=True, help="List, fetch and describe models.")
app.add_typer(models_app, name="models")
app.add_typer(bench_app, name="bench")
app.add_typer(policy_app, name="policy")
app.add_typer(cluster_app, name="cluster", short_help="Look at a Ray cluster, end its engines, drain a worker.")


def main() -> None:
    app(prog_name="lamina")


def _print_version(wanted: bool) -> None:
    if wanted:
        from lamina.version import __version__

        typer.echo(f"lamina {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None: ...


@app.command()
@opt.flatten_options
def generate(
    ctx: typer.Context,
    prompts: opt.PromptOptions,
    model: opt.Model = DEFAULT_MODEL,
    as_json: opt.JsonLines = False,
    stream: Annotated[bool, typer.Option("--stream/--no-stream", help="Show one prompt's text as it comes.")] = True,
    *,
    sampling: opt.SamplingOptions,
    engine: opt.EngineOptions,
) -> None:
    """Answer one prompt as it is generated, or several together, each printed when it is finished."""
    texts, params, load = prompts.texts(), sampling.params(), engine.config()  # checked before a model is loaded
    with ProgressBars() as progress, _open(ctx, model, engine.plan, progress=progress, **load) as llm:
        use_template = llm.has_chat_template if prompts.chat is None else prompts.chat
        if use_template:
            events = llm.stream_chat([[{"role": "user", "content": text}] for text in texts], params)
        else:
            events = llm.stream(texts, params)
        if as_json:
            print_json_lines(events, texts, params.n, progress)
        elif len(texts) == params.n == 1 and stream:
            print_as_it_comes(events, progress)
        else:
            print_as_they_finish(events, texts, params.n, progress)


_BATCH_SAMPLING = ("min_tokens", "presence_penalty", "frequency_penalty", "n", "logprobs", "ignore_eos")


@app.command()
@opt.flatten_options
def chat(
    ctx: typer.Context,
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    model: opt.Model = DEFAULT_MODEL,
    *,
    sampling: Annotated[opt.SamplingOptions, opt.Without(frozenset(_BATCH_SAMPLING))],
    engine: opt.EngineOptions,
) -> None:
    """Talk with a model, a line at a time. /reset forgets the conversation, /quit leaves."""
    params, load = sampling.params(), engine.config()
    opening = [] if system is None else [{"role": "system", "content": decode_argument(system)}]
    with ProgressBars() as progress, _open(ctx, model, engine.plan, progress=progress, **load) as llm:
        progress.hide()
        history = list(opening)
        for line in _spoken_lines():
            if line == "/quit":
                break
            if line == "/reset":
                history = list(opening)
            elif line.strip():
                history = _take_turn(llm, history, line, params, progress)


def _take_turn(
    llm: LLM, history: list[dict[str, str]], line: str, params: SamplingParams, progress: ProgressBars
) -> list[dict[str, str]]:
    """The conversation after one more question and its answer. At a terminal a turn that fails leaves it unchanged."""
    asked = [*history, {"role": "user", "content": line}]
    answer = ""
    try:
        for event in llm.stream_chat(asked, params):
            answer += event.text
            write(event.text, progress)
    except KeyboardInterrupt:  # ends this answer, not the conversation
        if not sys.stdin.isatty():
            raise
    except InvalidRequest as error:
        if not sys.stdin.isatty():
            raise
        progress.hide()
        typer.echo(f"error: {error}", err=True)
        return history
    write("\n", progress)
    return [*asked, {"role": "assistant", "content": answer}]


def _spoken_lines() -> Iterator[str]:
    """The lines typed at a terminal, with editing and history, or the lines of stdin."""
    if not sys.stdin.isatty():
        yield from iter_lines(sys.stdin.buffer, "stdin")
        return
    import readline  # noqa: F401  (input() edits lines once it is imported)

    while True:
        try:
            yield input("> ")
        except EOFError:
            typer.echo()
            return
        except UnicodeDecodeError as error:
            raise InvalidRequest(f"what was typed is not UTF-8: {error}") from error


def _open(ctx: typer.Context, model: str, plan: Path | None, **options: Any) -> LLM:
    """The model, loaded by `LLM`, or by the class that a caller of `app` gave as `ctx.obj`. Options of the command line
    override those of a plan."""
    make: Any = ctx.obj
    if make is None:
        from lamina.llm import LLM

        make = LLM
    if plan is None:
        opened: LLM = make(model, **options)
        return opened
    source = ctx.get_parameter_source("model")
    chosen = None if source is None or source.name == "DEFAULT" else model
    planned: LLM = make.from_plan(plan, model=chosen, **options)
    return planned


@models_app.command("ls")
def list_models(as_json: opt.JsonLines = False) -> None:
    """The models that have a short name, and the converted ones on this machine."""
    from lamina.models.aliases import ALIASES
    from lamina.models.cache import cache_folder, is_whole, read_manifest

    rows: list[dict[str, Any]] = [{"model": name, "about": alias.about} for name, alias in ALIASES.items()]
    folders = sorted(cache_folder().iterdir()) if cache_folder().is_dir() else []
    for folder in filter(is_whole, folders):
        size = sum(record.size for record in read_manifest(folder).values())
        rows.append({"model": str(folder), "about": f"converted, {show_bytes(size)}", "bytes": size})
    if as_json:
        print_json(*rows)
    else:
        print_rows((row["model"], row["about"]) for row in rows)


@models_app.command()
def pull(model: opt.ModelName) -> None:
    """Fetch and convert a model, if that is still to do, and print its folder."""
    from lamina.models.resolve import resolve

    with ProgressBars() as progress:
        folder = resolve(decode_argument(model), progress)
    typer.echo(folder)


@models_app.command()
def show(model: opt.ModelName, as_json: opt.JsonLines = False, slices: opt.Slices = False) -> None:
    """Describe a model; fetches it first where it is not here yet."""
    from lamina.models.resolve import resolve
    from lamina.models.weight_memory import weight_memory
    from lamina_workers.converted.models import live_across, model_config, way

    with ProgressBars() as progress:
        folder = resolve(decode_argument(model), progress)
    config = model_config(folder)
    weights = weight_memory(folder)
    windows = sorted({window for window in config.windows if window is not None})
    facts = {
        "folder": str(folder),
        "architecture": config.architecture,
        "parameters": weights.parameters,
        "weight_bytes": weights.stored,
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "query_heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "sliding_windows": windows,
        "context": config.max_position_embeddings,
        "vocabulary": config.vocab_size,
        "runs": way(config),
        **_kept(folder),
    }
    live = live_across(config) if slices else []
    if as_json:
        print_json(facts | {"weight_memory": weights.ways} | ({"live_across": live} if slices else {}))
        return
    kept = (
        (f"weights, {name}", f"{show_bytes(count)}, {count / weights.parameters:.3g} bytes each")
        for name, count in weights.ways.items()
    )
    print_rows([*((name, str(value)) for name, value in facts.items()), *kept, *_live_rows(live)])


def _kept(folder: Path) -> dict[str, Any]:
    """What the model keeps of a token and of a sequence, in 16 bits; nothing where its layers are not described."""
    from lamina.simulator.costs.model_configs import from_folder

    try:
        shape = from_folder(folder)
    except InvalidRequest:
        return {}
    return {"kv_bytes_per_token": int(shape.kv_bytes_per_token()), "state_bytes_per_sequence": shape.state_bytes_held}


def _live_rows(live: Sequence[str]) -> Iterator[tuple[str, str]]:
    """What lives across each attention, a row for neighbours that are alike."""
    for what, group in groupby(enumerate(live), lambda item: item[1]):
        layers = [layer for layer, _ in group]
        last = f"-{layers[-1]}" if len(layers) > 1 else ""
        yield f"live across attention {layers[0]}{last}", f"{what}, a token"


@app.command()
def doctor(as_json: opt.JsonLines = False) -> None:
    """What this machine has, what will be used, and why."""
    from lamina.cli.doctor import as_json as report
    from lamina.cli.doctor import examine

    findings = list(examine())
    if as_json:
        print_json(report(findings))
    else:
        print_rows((each.section, each.name, each.shown or str(each.value)) for each in findings)


app.command()(serve)
app.command("attention-worker")(attention_worker)
app.command()(credentials)
app.command()(calibrate)
app.command()(plan)
app.command()(simulate)
app.command("calibrate-hardware")(calibrate_hardware)
