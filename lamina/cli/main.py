"""The command `lamina`: the list of its commands, and their exit codes.

stdout carries answers and nothing else; progress, statistics and errors go to stderr. Exit codes: 0, 1 for a failure,
2 for bad input, 130 after Ctrl-C. torch is imported when a model is needed, so that `--help` is quick.
"""

from __future__ import annotations

import errno
import re
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from lamina.cli import options as opt
from lamina.cli.bench import bench_app
from lamina.cli.chat import chat
from lamina.cli.cluster import attention_worker, cluster_app, credentials
from lamina.cli.doctor import models_app
from lamina.cli.join import join, joining_app
from lamina.cli.policy import calibrate, policy_app
from lamina.cli.printing import generate
from lamina.cli.serve import ps, serve
from lamina.cli.simulate import calibrate_hardware, plan, simulate
from lamina.cli.terminal import close_stdout, print_json, print_rows
from lamina.errors import InvalidRequest, LaminaError, ModelFileError, PolicyError, UnsupportedModelError
from lamina_workers.errors import DiskFullError

BAD_INPUT = (InvalidRequest, ModelFileError, PolicyError, UnsupportedModelError)
_OTHER_WORDS = {
    **dict.fromkeys(("run", "talk"), "lamina chat MODEL` or `lamina generate PROMPT"),
    **dict.fromkeys(("list", "ls", "search"), "lamina models ls"),
    **dict.fromkeys(("pull", "download", "show", "rm"), "lamina models pull`, `show` or `rm"),
    **dict.fromkeys(("stop", "kill"), "kill PID` with a number from `lamina ps"),
    **dict.fromkeys(("server", "start", "launch", "api"), "lamina serve MODEL"),
    **dict.fromkeys(("status", "top"), "lamina ps"),
    **dict.fromkeys(("create", "import"), "lamina serve FILE.gguf"),
    **dict.fromkeys(("complete", "completion"), "lamina generate PROMPT"),
    "benchmark": "lamina bench serve",
    "version": "lamina --version",
}
"""Words of ollama, llama.cpp and vLLM, and what does the same here."""
UsageError: Any = typer.BadParameter.__mro__[1]  # click's, or Typer's own copy of it in newer versions


class Commands(TyperGroup):
    """The commands. Each way to end becomes an exit code and at most one line on stderr."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        _join_lines(self)

    def make_context(self, *args: Any, **extra: Any) -> Any:
        try:
            return super().make_context(*args, **extra)
        except UsageError as error:
            raise _refused(error) from None

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(130) from None
        except BrokenPipeError:  # the reader of our output, such as head, has enough
            close_stdout()
            raise typer.Exit(1) from None
        except UsageError as error:
            raise _refused(error) from None
        except (LaminaError, OSError) as error:
            typer.echo(f"error: {' '.join(str(error).split())}", err=True)  # a template's text may have several lines
            raise typer.Exit(exit_code(error)) from error


def _join_lines(group: Any) -> None:
    """Have lists of commands show the first paragraph of each without the line breaks of its docstring."""
    for command in group.commands.values():
        command.short_help = command.short_help or " ".join((command.help or "").split("\n\n")[0].split())
        if hasattr(command, "commands"):
            _join_lines(command)


def _refused(error: Any) -> Exception:
    """How a command line that cannot be read ends. A group without a command shows its help."""
    if message := " ".join(error.format_message().split()).rstrip("."):  # else the help was printed instead
        hint = "" if error.ctx is None or message.endswith("?") else f"; see `{error.ctx.command_path} --help`"
        if (word := re.match(r"No such command '(\w+)'", message)) and word[1] in _OTHER_WORDS and not error.ctx.parent:
            message, hint = f"there is no `lamina {word[1]}`", f"; it is `{_OTHER_WORDS[word[1]]}` here"
        typer.echo(f"error: {message}{hint}", err=True)
    return typer.Exit(2)


def exit_code(error: LaminaError | OSError) -> int:
    """2 for bad input, 1 for everything else, such as a full disk or a folder that cannot be written."""
    unwritable = isinstance(error.__cause__, PermissionError) or getattr(error.__cause__, "errno", 0) == errno.EROFS
    return 1 if isinstance(error, DiskFullError) or unwritable or not isinstance(error, BAD_INPUT) else 2


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    help="Run large language models with attention cut off from the dense layers.",
)
app.add_typer(models_app, name="models")
app.add_typer(bench_app, name="bench")
app.add_typer(policy_app, name="policy")
app.add_typer(joining_app, name="joining")
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


def doctor(
    as_json: opt.JsonLines = False,
    tls_dir: Annotated[Path | None, typer.Option(help="Folder of certificates, to see when they end.")] = None,
) -> None:
    """What this machine has, what will be used, and why."""
    from lamina.cli.doctor import as_json as report
    from lamina.cli.doctor import examine

    findings = list(examine(tls_dir))
    if as_json:
        print_json(report(findings))
    else:
        print_rows((finding.section, finding.name, finding.shown or str(finding.value)) for finding in findings)


app.command()(generate)
app.command()(chat)
app.command()(serve)
app.command()(ps)
app.command()(doctor)
app.command("attention-worker")(attention_worker)
app.command()(join)
app.command()(credentials)
app.command()(calibrate)
app.command()(plan)
app.command()(simulate)
app.command("calibrate-hardware")(calibrate_hardware)
