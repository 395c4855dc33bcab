"""The command `generate`, and how commands open a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lamina.cli import options as opt
from lamina.cli.printing import print_as_it_comes, print_as_they_finish, print_json_lines
from lamina.cli.terminal import ProgressBars
from lamina.config import DEFAULT_MODEL

if TYPE_CHECKING:
    from lamina.llm import LLM


@opt.flatten_options
def generate(
    ctx: typer.Context,
    prompts: opt.PromptOptions,
    model: opt.Model = None,
    as_json: opt.JsonLines = False,
    stream: Annotated[bool, typer.Option("--stream/--no-stream", help="Show one prompt's text as it comes.")] = True,
    *,
    sampling: opt.SamplingOptions,
    engine: opt.EngineOptions,
) -> None:
    """Answer one prompt as it is generated, or several together, each printed when it is finished."""
    texts, params, load = prompts.texts(), sampling.params(), engine.config()  # checked before a model is loaded
    with ProgressBars() as progress, open_llm(ctx, model, engine.plan, progress=progress, **load) as llm:
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


def open_llm(ctx: typer.Context, model: str | None, plan: Path | None, **options: Any) -> LLM:
    """The model, loaded by `LLM`, or by the class that a caller of `app` gave as `ctx.obj`. What the command line names
    goes before a plan's."""
    make: Any = ctx.obj
    if make is None:
        from lamina.llm import LLM

        make = LLM
    opened: LLM = (
        make(model or DEFAULT_MODEL, **options) if plan is None else make.from_plan(plan, model=model, **options)
    )
    return opened
