"""The command `chat`: a conversation at a terminal, or one over stdin."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Annotated

import typer

from lamina.cli import options as opt
from lamina.cli.printing import open_llm
from lamina.cli.terminal import ProgressBars, decode_argument, iter_lines, write
from lamina.config import DEFAULT_MODEL
from lamina.errors import ContextTooLong, InvalidRequest
from lamina.sampling_params import SamplingParams
from lamina.system.private_folder import state_folder

if TYPE_CHECKING:
    from lamina.llm import LLM

_BATCH_SAMPLING = ("min_tokens", "presence_penalty", "frequency_penalty", "n", "logprobs", "ignore_eos")
_HELP = """\
/reset  forget the conversation
/quit   leave; so does Ctrl-D
/help   this
Ctrl-C ends an answer. Pasted lines are one message."""
_COMMAND = re.compile(r"/[a-z]+")  # not a path, nor a sentence that begins with one
_FORGET = "/reset forgets the conversation"
_MOST_LINES = 1000  # of what was typed, kept for the next time


@opt.flatten_options
def chat(
    ctx: typer.Context,
    model_name: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help=opt.MODELS, show_default=False, autocompletion=opt.complete_model),
    ] = None,
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    model: opt.Model = None,
    *,
    sampling: Annotated[opt.SamplingOptions, opt.Without(frozenset(_BATCH_SAMPLING))],
    engine: opt.EngineOptions,
) -> None:
    """Talk with a model, a line at a time. /reset forgets the conversation, /quit leaves."""
    if model_name is not None and model is not None:
        raise InvalidRequest(f"the models {model_name!r:.80} and {model!r:.80} were given; allowed is one")
    chosen = model_name if model is None else model
    params, load = sampling.params(max_tokens=None), engine.config()
    opening = [] if system is None else [{"role": "system", "content": decode_argument(system)}]
    with ProgressBars() as progress, open_llm(ctx, chosen, engine.plan, progress=progress, **load) as llm:
        progress.hide()
        history = list(opening)
        for line in _spoken_lines(chosen or (DEFAULT_MODEL if engine.plan is None else str(engine.plan))):
            if line == "/quit":
                break
            if line == "/reset":
                history = list(opening)
            elif line == "/help":
                typer.echo(_HELP, err=True)
            elif _COMMAND.fullmatch(line.strip()):
                typer.echo(f"error: no command {line.strip()!r:.80}; /help lists them", err=True)
            elif line.strip():
                history = _take_turn(llm, history, line, params, progress)


def _take_turn(
    llm: LLM, history: list[dict[str, str]], line: str, params: SamplingParams, progress: ProgressBars
) -> list[dict[str, str]]:
    """The conversation after one more question and its answer. At a terminal a turn that fails leaves it unchanged."""
    conversation = [*history, {"role": "user", "content": line}]
    answer, reason = "", None
    try:
        for event in llm.stream_chat(conversation, params):
            answer += event.text
            reason = event.finish_reason
            write(event.text, progress)
    except KeyboardInterrupt:  # ends this answer, not the conversation
        if not sys.stdin.isatty():
            raise
    except InvalidRequest as error:
        if not sys.stdin.isatty():
            raise
        progress.hide()
        typer.echo(f"error: {error}{f'; {_FORGET}' if isinstance(error, ContextTooLong) else ''}", err=True)
        return history
    write("\n", progress)
    if reason == "length":
        full = f"at the context's end ({llm.max_model_len} tokens); {_FORGET}"
        cut = full if params.max_tokens is None else f"at {params.max_tokens} tokens; --max-tokens allows more"
        typer.echo(f"(cut {cut})", err=True)
    return [*conversation, {"role": "assistant", "content": answer}]


def _spoken_lines(model: str) -> Iterator[str]:
    """The lines typed at a terminal, with editing and history, or the lines of stdin."""
    if not sys.stdin.isatty():
        yield from iter_lines(sys.stdin.buffer, "stdin")
        return
    typer.echo(f"{model}: /help lists commands, Ctrl-D leaves", err=True)
    with _line_editing():
        while True:
            try:
                yield input("> ")
            except KeyboardInterrupt:  # throws away the line, as a shell does
                typer.echo("\n(Ctrl-D or /quit leaves)", err=True)
            except EOFError:
                typer.echo()
                return
            except UnicodeDecodeError as error:
                raise InvalidRequest(f"what was typed is not UTF-8: {error}") from error


@contextmanager
def _line_editing() -> Iterator[None]:
    """`input()` with editing, lines of earlier conversations, and a paste as one line, where there is readline."""
    try:
        import readline
    except ImportError:  # a Python without it
        yield
        return
    with suppress(Exception):  # libedit, which macOS has in its place, does not know this
        readline.parse_and_bind("set enable-bracketed-paste on")
    file = state_folder() / "chat_history"
    with suppress(OSError):
        readline.read_history_file(file)
    try:
        yield
    finally:
        with suppress(OSError):  # a home that cannot be written to: nothing is kept
            file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            file.touch(mode=0o600)
            readline.set_history_length(_MOST_LINES)
            readline.write_history_file(file)
