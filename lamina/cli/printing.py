"""The command `generate`, what it prints of a stream's events, and how commands open a model (`open_llm`).

Text is printed as it comes (`print_as_it_comes`), text as it finishes (`print_as_they_finish`), or JSON lines
(`print_json_lines`). Answers go to stdout. After text go to stderr a line of statistics, and one of where KV was read
if that was chosen.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lamina.cli import options as opt
from lamina.cli.terminal import ProgressBars, write
from lamina.completions import Sample, TokenEvent
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


def print_as_it_comes(events: Iterable[TokenEvent], progress: ProgressBars) -> None:
    """One prompt's only sample, piece by piece."""
    meter, choices = _Meter(), _Choices()
    for event in meter.watch(events):
        write(event.text, progress)
    write("\n", progress)
    sys.stderr.write("".join(f"{line}\n" for line in (meter.summary(), *choices.end())))


def print_as_they_finish(events: Iterable[TokenEvent], prompts: Sequence[str], n: int, progress: ProgressBars) -> None:
    """Each sample when it is complete, under a heading where there are several."""
    meter, choices = _Meter(), _Choices()
    for index, sample in _samples(meter.watch(events), len(prompts) * n, progress):
        heading = "" if len(prompts) == n == 1 else _heading(index, prompts, sample.index, n)
        write(f"{heading}{sample.text}\n", progress)
    sys.stderr.write("".join(f"{line}\n" for line in (meter.summary(), *choices.end())))


def print_json_lines(events: Iterable[TokenEvent], prompts: Sequence[str], n: int, progress: ProgressBars) -> None:
    """One object for each sample when it is complete: its prompt, the two indexes, and the fields of `Sample`."""
    for index, sample in _samples(events, len(prompts) * n, progress):
        fields = dataclasses.asdict(sample)
        line = {"prompt_index": index, "sample_index": fields.pop("index"), "prompt": prompts[index], **fields}
        write(json.dumps(line) + "\n", progress)


def _samples(events: Iterable[TokenEvent], total: int, progress: ProgressBars) -> Iterator[tuple[int, Sample]]:
    """Each sample once it is complete, with the index of its prompt."""
    growing: dict[tuple[int, int], list[TokenEvent]] = {}
    done = 0
    for event in events:
        key = (event.prompt_index, event.sample_index)
        growing.setdefault(key, []).append(event)
        if event.finish_reason is None:
            continue
        parts = growing.pop(key)
        yield (
            event.prompt_index,
            Sample(
                index=event.sample_index,
                text="".join(part.text for part in parts),
                token_ids=tuple(part.token_id for part in parts),
                finish_reason=event.finish_reason,
                logprobs=tuple(part.logprob for part in parts if part.logprob is not None) or None,
            ),
        )
        done += 1
        progress("answers", done, total)


def _heading(index: int, prompts: Sequence[str], sample: int, n: int) -> str:
    first_line = prompts[index].partition("\n")[0]
    excerpt = first_line if len(first_line) <= 60 else f"{first_line[:57]}..."
    which = f", sample {sample + 1}/{n}" if n > 1 else ""
    return f"[{index + 1}/{len(prompts)}{which}] {excerpt}\n"


class _Choices(logging.Handler):
    """Hears what the engine says of its choices."""

    def __init__(self) -> None:
        super().__init__()
        self._last = ""
        self._logger = logging.getLogger("lamina.choices")
        self._logger.setLevel(logging.INFO)
        self._logger.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self._last = record.getMessage()

    def end(self) -> list[str]:
        """The last line, where there was one; nothing is heard any more."""
        self._logger.removeHandler(self)
        return [self._last] if self._last else []


class _Meter:
    """Counts the tokens that pass, and the seconds they take."""

    def __init__(self) -> None:
        self._tokens = self._ended = self._cut = 0
        self._start = self._first = self._last = time.perf_counter()

    def watch(self, events: Iterable[TokenEvent]) -> Iterator[TokenEvent]:
        self._start = time.perf_counter()
        for event in events:
            self._tokens += 1
            self._last = time.perf_counter()
            if self._tokens == 1:
                self._first = self._last
            self._ended += event.finish_reason is not None
            self._cut += event.finish_reason == "length"
            yield event

    def summary(self) -> str:
        """The rate is that of decoding: the tokens after the first, over the time after the first."""
        many = f"{self._cut} of {self._ended} answers " if self._ended > 1 else ""
        cut = f"; {many}cut at the most tokens: --max-tokens allows more" if self._cut else ""
        if self._last == self._first:
            return f"{self._tokens} token{'' if self._tokens == 1 else 's'} in {self._last - self._start:.2f} s{cut}"
        rate = (self._tokens - 1) / (self._last - self._first)
        first = f"the first after {self._first - self._start:.2f} s"
        return f"{self._tokens} tokens, {first}, then {rate:.1f} tokens/s{cut}"
