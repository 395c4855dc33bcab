"""A serving benchmark from its settings to its result: find the model, write the prompts, warm up, run, sum up."""

from __future__ import annotations

import asyncio
import math
import os
import secrets
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lamina.errors import EngineError, InvalidRequest
from lamina.measure.bench.client import Client, request_body
from lamina.measure.bench.measures import Outcome, Summary, percentile, summary
from lamina.measure.bench.prompts import Words, Writer, find_words, guessed_words
from lamina.measure.bench.running import Clock, Run, interruptible, run
from lamina.measure.bench.workloads import Item, Lengths, Settings, capped, drawn, fresh, of_trace
from lamina.system.machine import this_machine
from lamina.system.progress import Progress

if TYPE_CHECKING:
    from lamina.simulator.traces.arrivals import Trace

_MARGIN = {"chat": 64, "completions": 8}  # tokens of a context that are left to a template and special tokens
_MOST_WORDS = 3  # of failures that are listed in full
_LATE = 0.005  # seconds after which a request counts as sent late


@dataclass(frozen=True, slots=True)
class Result:
    """A run's outcomes and figures. `notes` are lines for people: how prompts were made, what may mislead."""

    settings: Settings
    model: str
    context: int | None
    words: Words
    nonce: int
    run: Run
    summary: Summary
    notes: tuple[str, ...]
    details: Mapping[str, str]
    """Of each kind of failure, the first message."""
    load: float = 0.0
    """This machine's load average before the run."""

    @property
    def cpu_per_chunk(self) -> float:
        """Seconds of this process's processor time, for each chunk with text that came."""
        return self.run.cpu / max(1, sum(len(outcome.chunks) for outcome in self.run.outcomes))


def items_of(settings: Settings) -> tuple[list[Item], str]:
    """The requests that are wanted, and what they are in words. Raises InvalidRequest."""
    seed = settings.seed or 0
    if settings.dataset == "trace":
        return _of_trace(settings, seed)
    shared = settings.dataset == "shared-prefix"
    lengths = Lengths(
        prompt=settings.input_len,
        output=settings.output_len,
        ratio=settings.range_ratio,
        prefix=settings.prefix_len if shared else 0,
        prefixes=settings.num_prefixes if shared else 0,
    )
    rate = math.inf if settings.request_rate is None else settings.request_rate
    items = drawn(settings.num_prompts, lengths, rate=rate, burstiness=settings.burstiness, seed=seed)
    about = f"{settings.input_len} + {settings.output_len} tokens"
    if settings.range_ratio:
        about += f", each from {1 - settings.range_ratio:.4g} to {1 + settings.range_ratio:.4g} times that"
    if shared:
        about += f", after one of {settings.num_prefixes} prefixes of {settings.prefix_len} tokens"
    return items, about


def _of_trace(settings: Settings, seed: int) -> tuple[list[Item], str]:
    from lamina.simulator.traces.arrivals import all_at_once, scaled
    from lamina.simulator.traces.catalogue import at_rate, trace  # numpy, which other workloads do without

    requests = trace(settings.trace, settings.num_prompts, seed, settings.trace_dir)
    if settings.request_rate is None:
        requests = scaled(requests, settings.speed) if settings.speed != 1 else requests
    elif math.isinf(settings.request_rate):
        requests = all_at_once(requests)
    elif not 0 < settings.request_rate < math.inf:
        raise InvalidRequest(f"request-rate is {settings.request_rate!r}; allowed are numbers above 0, or inf")
    else:
        requests = at_rate(requests, settings.request_rate)
    return of_trace(requests), "; ".join((f"the trace {requests.name}", *requests.remarks))


async def bench(settings: Settings, progress: Progress | None = None, trace: Trace | None = None) -> Result:
    """Run it, with the requests of `trace` in place of those of the settings' workload. Raises InvalidRequest for
    settings, EngineError where no server answers or every warm-up fails."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    items, about = items_of(settings) if trace is None else (of_trace(trace), f"the trace {trace.name}")
    nonce = secrets.randbits(62) if settings.seed is None else settings.seed
    async with Client(settings.base_url, settings.api_key, settings.timeout) as client:
        stop = asyncio.Event()
        with interruptible(stop):
            model, context = await _model(client, settings)
            notes = [f"workload: {about}"]
            if settings.dataset == "trace" or trace is not None:
                items, note = _cut(items, settings, context)
                notes += note
            words = await _words(client, settings, model)
            notes.append(_about(words, settings.endpoint))
            writer = Writer(words, nonce)
            warming = fresh(items[: settings.num_warmups], "w")
            warming += fresh(items[:1] * (settings.num_warmups - len(warming)), "v")
            bodies = [_bodies(group, writer, settings, model, progress) for group in (warming, items)]

            async def measured(items: Sequence[Item], bodies: Sequence[bytes], what: str) -> Run:
                async def send(number: int, clock: Clock) -> Outcome:
                    item = items[number]
                    return await client.send(
                        settings.endpoint,
                        bodies[number],
                        due=item.at,
                        clock=clock,
                        planned=item.prompt,
                        asked=item.output,
                    )

                return await run(
                    [item.at for item in items],
                    send,
                    max_concurrency=settings.max_concurrency,
                    stop=stop,
                    progress=progress,
                    what=what,
                )

            if warming and not stop.is_set():
                warmed = await measured(warming, bodies[0], "warm-ups")
                _check_warmups(warmed)
            done = await measured(items, bodies[1], "requests") if not stop.is_set() else Run((), 0.0, 0.0, len(items))
    figures = summary(done.outcomes, done.seconds, settings.percentiles, settings.slo)
    notes += remarks(settings, done, figures, nonce)
    if load > (cores := this_machine().cores):
        notes.append(f"machine: the load average was {load:.1f} on {cores} cores before; others use this machine too")
    details: dict[str, str] = {}
    for outcome in done.outcomes:
        if outcome.error:
            details.setdefault(outcome.error, outcome.detail)
    return Result(settings, model, context, words, nonce, done, figures, tuple(notes), details, load)


def remarks(settings: Settings, done: Run, found: Summary, nonce: int) -> list[str]:
    """What to know about a run's numbers, one line each."""
    lines = []
    if settings.seed is None:
        lines.append(f"prompts: new words in each run, these of the nonce {nonce}")
    else:
        lines.append(f"prompts: those of --seed {nonce}, which a server may have cached if it saw them before")
    if found.answers_with_cached_tokens:
        share = found.cached_tokens / max(1, found.total_input_tokens)
        lines.append(f"cached: the server found {found.cached_tokens} input tokens ({share:.1%}) in its prefix cache")
    elif found.completed:
        lines.append("cached: the server does not report cached tokens")
    if found.answers_without_usage:
        lines.append(
            f"tokens: {found.answers_without_usage} answers came without usage; each of their chunks counts as a token"
        )
    elif found.chunks and found.total_output_tokens > found.chunks * 1.02:
        rate = found.total_output_tokens / found.chunks
        lines.append(f"tokens: {rate:.2f} a chunk with text, as the server says; ITL is between chunks")
    if found.answers_shorter_than_asked:
        short = found.answers_shorter_than_asked
        lines.append(f"output: {short} answers were shorter than asked for; --ignore-eos goes on past their end")
    if settings.max_concurrency is None and done.outcomes:
        late = sorted(outcome.sent - outcome.due for outcome in done.outcomes)
        if (worst := percentile(late, 99)) > _LATE:
            lines.append(f"client: p99 of requests was sent {worst * 1e3:.0f} ms late; this machine is busy")
    if done.unfinished:
        lines.append(f"interrupted: {done.unfinished} requests were not sent, or given up")
    return lines


async def _model(client: Client, settings: Settings) -> tuple[str, int | None]:
    """The model's name, and its context where the settings or the server give it."""
    try:
        served = await client.models()
    except EngineError:
        if settings.model is None:
            raise
        served = {}
    name = next(iter(served), None) if settings.model is None else settings.model
    if name is None:
        raise EngineError(f"{client.base_url} serves no model; name one with --model")
    return name, settings.max_model_len or served.get(name)


async def _words(client: Client, settings: Settings, model: str) -> Words:
    """The words of prompts, by the best token counter: the tokenizer of the settings, the server's /tokenize, or the
    usage that it reports."""
    if settings.tokenizer is not None:
        from lamina.models.resolve import resolve
        from lamina.text.tokenizer import Tokenizer

        tokenizer = Tokenizer(resolve(settings.tokenizer))

        async def count(text: str) -> int:
            return len(tokenizer.encode(text))

        return await find_words(count, f"the tokenizer of {settings.tokenizer}")
    try:
        return await find_words(lambda text: client.tokenized(model, text), "the server's /tokenize")
    except EngineError:
        pass
    try:
        return await find_words(lambda text: client.counted(settings.endpoint, model, text), "the server's usage")
    except EngineError:
        return guessed_words()


def _about(words: Words, endpoint: str) -> str:
    more = "; the chat template comes on top" if endpoint == "chat" else ""
    if words.exact:
        return f"lengths: each word of a prompt is one token, of a list of {len(words.words)}, by {words.source}{more}"
    return f"lengths: about, at {words.tokens:.2f} tokens a word by {words.source}{more}"


def _cut(items: list[Item], settings: Settings, context: int | None) -> tuple[list[Item], list[str]]:
    if context is None:
        return items, ["context: the server does not say it; nothing was cut (--max-model-len)"]
    fitting, cut = capped(items, context, _MARGIN[settings.endpoint])
    return fitting, [f"context: {cut} of {len(items)} requests were cut to {context} tokens"] if cut else []


def _bodies(
    items: Sequence[Item], writer: Writer, settings: Settings, model: str, progress: Progress | None
) -> list[bytes]:
    """Before the run, so that nothing but sending is left to do in it."""
    bodies = []
    for number, item in enumerate(items):
        bodies.append(request_body(settings.endpoint, model, writer.text(item), item.output, settings.ignore_eos))
        if progress is not None and number % 64 == 0:
            progress("prompts", number, len(items))
    if progress is not None and items:
        progress("prompts", len(items), len(items))
    return bodies


def _check_warmups(warmed: Run) -> None:
    failed = [outcome for outcome in warmed.outcomes if outcome.error]
    if failed and len(failed) == len(warmed.outcomes):
        kinds = Counter(f"{outcome.error}: {outcome.detail}" for outcome in failed).most_common(_MOST_WORDS)
        raise EngineError("every warm-up failed: " + "; ".join(f"{words} ({count} times)" for words, count in kinds))
