"""Runs a drawn scenario: each request is compared with the same one alone in a plain engine, and that engine's tokens
with transformers in float64. When all is over, the books of the engine must be right and nothing may be left.

`Plain` and `Fleet` serve one scenario after another.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import gc
import logging
import os
import queue
import re
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from drawn_scenarios import CONTEXT, KINDS, MEMORY, PACKED_TOKENS, Client, Event, Scenario, Turn
from real_models import TIE
from real_workers import WorkerProcess, until, worker_process
from reference_models import reference
from scripted_drafts import Always
from small_grammars import TOKENIZER

from lamina import LLM, Completion, SamplingParams
from lamina.completions import TokenLogprob
from lamina.errors import EngineError, InvalidRequest, LaminaError
from lamina.launch import builder
from lamina.launch.attention_pool import LOCAL
from lamina_workers.decoder import sampler
from lamina_workers.decoder.sampler import uniform
from lamina_workers.parallel.tensor_parallel import TensorParallelWorkers
from lamina_workers.ports.direct import SWITCH
from lamina_workers.ports.port import LocalAttention

DEADLINE = 150.0  # seconds that a scenario's clients may take, on a machine that has other work
SETTLES = 30.0  # seconds until an engine without clients has nothing more to do
CLOSE = 1e-3  # of log probabilities
DRAWN = 2e-5  # of the sum of probabilities up to a token
COARSE = 0.25  # the same where weights are packed: a code of 8 bits more or less
Sampled = tuple[tuple[int, ...], ...]


class Plain:
    """Engines without anything special, and the same models in float64. Answers are remembered until `forget`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._engines: dict[tuple[str, str | None], LLM] = {}
        self._exact: dict[str, Any] = {}

    def path(self, kind: str) -> Path:
        """The model as a folder."""
        path = self._folder / kind.replace(" ", "_")
        if not path.exists():
            model = self._exact[kind] = reference(*KINDS[kind])
            model.save_pretrained(path)
            TOKENIZER.save(str(path / "tokenizer.json"))
            model.double()
        return path

    def answer(self, turn: Turn, client: Client) -> Completion:
        """What the request gives alone, with the 20 likeliest tokens wherever it reports any."""
        key = turn.kind, turn.quantize
        if key not in self._engines:
            packed: dict[str, Any] = {"quantize": turn.quantize, "max_batch_tokens": PACKED_TOKENS}
            self._engines[key] = LLM(
                self.path(turn.kind), dtype="float32", threads=1, page_size=16, kv_memory="16MiB", prefix_cache=False,
                lanes=1, max_model_len=CONTEXT, **({} if turn.quantize is None else packed),
            )  # fmt: skip
        params = SamplingParams(**client.params | {"logprobs": 20})
        return self._engines[key].generate([list(client.prompt)], params)[0]

    def drawn(self, turn: Turn, client: Client, sample: int, place: int) -> set[int]:
        """The tokens that the request may draw at a place: its random number decides, and may lie so near to the border
        of two tokens that the order of sums does."""
        tokens = set()
        for shift in (-DRAWN, DRAWN):

            def shifted(seed: int, index: int, position: int, shift: float = shift) -> float:
                number = uniform(seed, index, position)
                return min(max(number + shift, 0.0), 1.0 - DRAWN) if (index, position) == (sample, place) else number

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sampler, "uniform", shifted)
                tokens.add(self.answer(turn, client).samples[sample].token_ids[place])
        return tokens

    def check(self, turn: Turn, client: Client, answer: Completion) -> Iterator[str]:
        """In what the answer is not that of the model in float64: greedy tokens and prompt log probabilities."""
        neutral = {"max_tokens", "ignore_eos", "logprobs", "prompt_logprobs", "temperature"}
        greedy = client.params["temperature"] == 0 and client.params.keys() <= neutral
        if turn.quantize is not None or not (greedy or answer.prompt_logprobs):
            return
        prompt, tokens = list(client.prompt), list(answer.token_ids) if greedy else []
        with torch.inference_mode():
            logits = self._exact[turn.kind](torch.tensor([prompt + tokens]), use_cache=False).logits[0]
        scores = logits.double().log_softmax(-1)
        for position, entry in enumerate(answer.prompt_logprobs or (), -1):
            if entry is not None and abs(entry.logprob - float(scores[position, entry.token_id])) > CLOSE:
                yield f"prompt token {position + 1}: {entry.logprob}, in float64 {scores[position, entry.token_id]}"
        for place, token in enumerate(tokens):
            row = scores[len(prompt) - 1 + place]
            if float(row.max() - row[token]) > CLOSE:
                yield f"token {place} is {token}, in float64 {int(row.argmax())}"
                return

    def close(self) -> None:
        for llm in self._engines.values():
            llm.close()


class Fleet:
    """Attention workers by memory, each at an address of its own, which it has again after its death."""

    def __init__(self) -> None:
        self._stacks: dict[tuple[str, int], contextlib.ExitStack] = {}
        self._workers: dict[tuple[str, int], WorkerProcess] = {}

    def addresses(self, memory: str, count: int) -> list[str]:
        """Of `count` workers that run and serve no engine."""
        numbers = [(memory, number) for number in range(count)]
        for key in numbers:
            if key not in self._workers:
                self._start(key, "127.0.0.1:0")
            try:
                until(lambda key=key: not self._workers[key].status().session, 15)  # type: ignore[misc]
            except Exception:  # noqa: BLE001  # it is dead, stopped, or leaves
                self.kill(*key)
                self._start(key, self._workers[key].address)
        return [self._workers[key].address for key in numbers]

    def pid(self, memory: str, number: int) -> int:
        return self._workers[memory, number].process.pid

    def kill(self, memory: str, number: int) -> None:
        self._stacks[memory, number].close()

    def start_again(self, memory: str, number: int) -> None:
        self._start((memory, number), self._workers[memory, number].address)

    def _start(self, key: tuple[str, int], address: str) -> None:
        stack = self._stacks[key] = contextlib.ExitStack()
        flags = "--kv-memory", str(MEMORY[key[0]]), "--listen", address
        self._workers[key] = stack.enter_context(worker_process(*flags))

    def close(self) -> None:
        for stack in self._stacks.values():
            stack.close()


def run(scenario: Scenario, plain: Plain, fleet: Fleet) -> None:
    """Raises AssertionError with all that is wrong, and what repeats it."""
    problems: list[str] = []
    for number, turn in enumerate(scenario.turns):
        answers = [plain.answer(turn, client) for client in turn.clients]
        for place, (client, answer) in enumerate(zip(turn.clients, answers, strict=True)):
            problems += [f"turn {number}, client {place}, alone: {what}" for what in plain.check(turn, client, answer)]
        try:
            problems += [f"turn {number}, {what}" for what in _turn(scenario, turn, answers, plain, fleet)]
        except Exception as error:
            problems.append(f"turn {number}: {error!r}")
            raise AssertionError(_report(scenario, problems)) from error
    if problems:
        raise AssertionError(_report(scenario, problems))


def _report(scenario: Scenario, problems: list[str]) -> str:
    settings = [(turn.kind, turn.options, turn.events, turn.exchange) for turn in scenario.turns]
    listed = "\n  ".join(problems[:20])
    return (
        f"seed {scenario.seed} ({scenario.workers} {scenario.memory} workers, {settings}); "
        f"LAMINA_SCENARIOS={scenario.seed}:{scenario.seed + 1} repeats it:\n  {listed}"
    )


def _turn(scenario: Scenario, turn: Turn, answers: list[Completion], plain: Plain, fleet: Fleet) -> list[str]:
    options = {"dtype": "float32", "threads": 1, "worker_timeout": 30.0} | turn.options
    if scenario.workers:
        options["attention_workers"] = fleet.addresses(scenario.memory, scenario.workers)
    before = _resources()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(SWITCH, turn.exchange or "compiled")
        if turn.always_drafts:
            patch.setattr(builder, "Speculation", Always)
        llm = LLM(plain.path(turn.kind), **options)
    logger = logging.getLogger("lamina")
    logger.addFilter(_without_frames)
    try:
        results = asyncio.run(_serve(llm, scenario, turn, fleet))
        problems = list(_differences(turn, answers, results, plain))
        problems += _leftovers(llm)
    except BaseException:
        _abandon(llm)
        raise
    finally:
        logger.removeFilter(_without_frames)
    llm.close()
    del llm

    def as_before() -> bool:
        gc.collect()  # each time: a thread that ends later may leave a circle
        return not _resources() - before

    with contextlib.suppress(TimeoutError):
        until(as_before, 10)
    problems += [f"{count} {name} more than before" for name, count in (_resources() - before).items()]
    return problems


def _without_frames(record: logging.LogRecord) -> bool:
    """Records that are captured for a report would keep the engine, to which the frames of an error refer."""
    record.msg, record.args = record.getMessage(), ()
    if record.exc_info:
        record.exc_text = logging.Formatter().formatException(record.exc_info)
        record.exc_info = None
    return True


def _resources() -> Counter[str]:
    """Threads by name, and descriptors by what they are: a file's path, the kind of a socket or pipe."""
    names: Counter[str] = Counter()
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the one of this listing
            names["descriptor of " + re.sub(r":\[\d+\]", "", os.readlink(f"/proc/self/fd/{descriptor}"))] += 1
    names.update(f"thread {thread.name}" for thread in threading.enumerate())
    return names


def _abandon(llm: LLM) -> None:
    """Stop an engine that may hang, without waiting for it for ever."""
    faulthandler.dump_traceback(file=sys.__stderr__)
    runtime: Any = llm._runtime
    runtime.engine.close()
    runtime.thread.join(20)
    if runtime.thread.is_alive():
        llm._stop.detach()
    else:
        llm.close()


# Clients, and what happens beside them.


async def _serve(llm: LLM, scenario: Scenario, turn: Turn, fleet: Fleet) -> list[Completion | Sampled]:
    """What each client got; of those that left, the tokens of each sample."""
    over = threading.Event()
    happens = asyncio.create_task(asyncio.to_thread(_happen, llm, scenario, turn.events, fleet, over))
    clients = [asyncio.create_task(_client(llm, client)) for client in turn.clients]
    try:
        _, pending = await asyncio.wait(clients, timeout=DEADLINE)
        if pending:
            raise TimeoutError(f"{len(pending)} clients have no answer after {DEADLINE:g} s: {_state(llm)}")
    finally:
        over.set()
        for client in clients:
            client.cancel()
        await happens
    return [client.result() for client in clients]


async def _client(llm: LLM, client: Client) -> Completion | Sampled:
    await asyncio.sleep(client.delay)
    prompts, params = [list(client.prompt)], SamplingParams(**client.params)
    if client.leaves == 0:  # before its prompt is read
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(llm.agenerate(prompts, params, priority=client.priority), 0.03)
        return ()
    if client.leaves is None:
        (completion,) = await llm.agenerate(prompts, params, priority=client.priority)  # type: ignore[misc]
        return completion  # type: ignore[no-any-return]
    tokens: list[list[int]] = [[] for _ in range(params.n)]
    events = llm.astream(prompts, params, priority=client.priority)
    async with contextlib.aclosing(events):  # type: ignore[type-var]
        async for count in _counted(events, tokens):
            if count >= client.leaves:
                break
    return tuple(map(tuple, tokens))


async def _counted(events: Any, tokens: list[list[int]]) -> Any:
    count = 0
    async for event in events:
        tokens[event.sample_index].append(event.token_id)
        yield (count := count + 1)


def _happen(llm: LLM, scenario: Scenario, events: tuple[Event, ...], fleet: Fleet, over: threading.Event) -> None:
    for event in events:
        while not over.is_set() and _look(llm, lambda control, stats: stats.batches) < event.batches:
            over.wait(0.005)
        if over.is_set():
            return
        worker = scenario.memory, event.worker
        if event.what == "kill":
            fleet.kill(*worker)
            over.wait(event.seconds)
            fleet.start_again(*worker)
        elif event.what == "stop":
            os.kill(fleet.pid(*worker), signal.SIGSTOP)
            over.wait(event.seconds)
            os.kill(fleet.pid(*worker), signal.SIGCONT)
        else:
            engine: Any = llm._runtime.engine
            names = sorted(set(engine._holders.names.values()))
            if len(names) > 1:
                with contextlib.suppress(EngineError, InvalidRequest):  # it is lost, or the others are too full
                    engine.drain(names[event.worker % len(names)]).result(DEADLINE)


def _differences(
    turn: Turn, answers: list[Completion], results: list[Completion | Sampled], plain: Plain
) -> Iterator[str]:
    for number, (client, answer, result) in enumerate(zip(turn.clients, answers, results, strict=True)):
        if isinstance(result, Completion):
            problems = _against(turn, client, answer, result, plain)
        else:
            problems = _begun(turn, client, answer, result, plain)
        yield from (f"client {number} ({client.params}): {what}" for what in problems)


def _against(turn: Turn, client: Client, answer: Completion, result: Completion, plain: Plain) -> Iterator[str]:
    close = CLOSE if turn.quantize is None else COARSE
    for alone, sample in zip(answer.samples, result.samples, strict=True):
        place = _parts(turn, client, alone, sample.token_ids, plain)
        if place is None and (sample.text, sample.finish_reason) != (alone.text, alone.finish_reason):
            yield f"{sample.text!r}, {sample.finish_reason}; alone {alone.text!r}, {alone.finish_reason}"
        elif place is not None and place >= 0:
            yield f"sample {sample.index} from token {place} on: {sample.token_ids}, alone {alone.token_ids}"
        if place is None and sample.logprobs is not None:
            yield from _scores("token", alone.logprobs or (), sample.logprobs, close)
    if client.params.get("prompt_logprobs") is not None:
        yield from _scores("prompt token", answer.prompt_logprobs or (), result.prompt_logprobs or (), close)


def _begun(turn: Turn, client: Client, answer: Completion, result: Sampled, plain: Plain) -> Iterator[str]:
    for alone, tokens in zip(answer.samples, result, strict=False):
        place = _parts(turn, client, alone, tokens, plain, begun=True)
        if place is not None and place >= 0:
            yield f"from token {place} on: {tokens}, alone {alone.token_ids}"


def _parts(
    turn: Turn, client: Client, alone: Any, tokens: tuple[int, ...], plain: Plain, begun: bool = False
) -> int | None:
    """From where on a text is another than alone: None for the same, -1 where two tokens are a tie there."""
    if tokens == (alone.token_ids[: len(tokens)] if begun else alone.token_ids):
        return None
    pairs = enumerate(zip(tokens, alone.token_ids, strict=False))
    place = next((place for place, (one, other) in pairs if one != other), min(len(tokens), len(alone.token_ids)))
    if place == min(len(tokens), len(alone.token_ids)):
        return place
    if client.params["temperature"] > 0:
        return -1 if tokens[place] in plain.drawn(turn, client, alone.index, place) else place
    top = {entry.token_id: entry.logprob for entry in alone.logprobs[place].top}
    tie = TIE if turn.quantize is None else COARSE
    return -1 if abs(top.get(tokens[place], -torch.inf) - alone.logprobs[place].logprob) < tie else place


def _scores(what: str, alone: Any, reported: Any, close: float) -> Iterator[str]:
    if len(alone) != len(reported):
        yield f"{len(reported)} log probabilities, alone {len(alone)}"
        return
    for place, (entry, wanted) in enumerate(zip(reported, alone, strict=True)):
        if (entry is None) != (wanted is None):
            yield f"{what} {place}: {entry}, alone {wanted}"
        elif entry is not None and not _alike(entry, wanted, close):
            yield f"{what} {place}: {entry}, alone {wanted}"
            return


def _alike(entry: TokenLogprob, wanted: TokenLogprob, close: float) -> bool:
    pairs = zip((entry, *entry.top), (wanted, *wanted.top), strict=False)  # by place: two tokens may be a tie
    return entry.token_id == wanted.token_id and all(abs(one.logprob - other.logprob) < close for one, other in pairs)


# What is left.


def _look(llm: LLM, look: Callable[[Any, Any], Any], seconds: float = 30.0) -> Any:
    """What `look(control, stats)` gives on the engine's thread."""
    answers: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def answer(control: Any, stats: Any) -> None:
        try:
            answers.put((look(control, stats), None))
        except Exception as error:  # noqa: BLE001  # it is raised in the thread that waits
            answers.put((None, error))

    llm._runtime.engine.look(answer)  # type: ignore[union-attr]
    value, error = answers.get(timeout=seconds)
    if error is not None:
        raise error
    return value


def _state(llm: LLM) -> str:
    def look(control: Any, stats: Any) -> str:
        scheduler = control.scheduler
        running = [(s.request.id, s.sample, s.computed, len(s.tokens)) for s in scheduler.running]
        return (
            f"batches {stats.batches}, running {running}, waiting {scheduler.waiting}, "
            f"suspects {len(scheduler.blame._suspects)}, room {dict(scheduler.ledger.room())}, "
            f"holders {list(control.placement.holders)}"
        )

    try:
        return str(_look(llm, look, 10))
    except queue.Empty:
        return "the engine's thread does not answer"


def _leftovers(llm: LLM) -> Iterator[str]:
    """In what an engine without clients differs from one that never had any, its prefix cache aside; then, once that
    is empty, in what its holders do."""
    engine: Any = llm._runtime.engine

    def settled(control: Any, stats: Any) -> bool:
        if control.has_work or engine._registry.requests or engine._spares.busy or engine._tiering.busy:
            return False
        try:
            return bool(_stores(engine))
        except LaminaError:  # the engine has not noticed yet that a worker is gone
            return False

    def books(control: Any, stats: Any) -> list[str] | None:
        """None until it is settled, in the same look: the next step may begin a move."""
        return [*_books(engine, control), *_texts(engine, control)] if settled(control, stats) else None

    def wait(what: str) -> Iterator[str]:
        end = time.monotonic() + SETTLES
        while (problems := _look(llm, books)) is None:
            if time.monotonic() > end:
                yield f"{what} there is work after {SETTLES:g} s: {_state(llm)}"
                return
            time.sleep(0.01)
        yield from (f"{what}: {problem}" for problem in problems)

    yield from wait("without clients")
    _look(llm, lambda control, stats: control.scheduler.running.prefix_cache.clear())
    yield from wait("without prefixes")
    for number, (free, total, parts) in _look(llm, lambda control, stats: _stores(engine)).items():
        if free != total or parts:
            yield f"holder {number} keeps {total - free} pages and {parts} parts, its prefixes cleared"


def _stores(engine: Any) -> dict[int, tuple[int, int, int]]:
    """Of each holder that this process alone uses, as its stores count them: free pages, pages, parts."""
    stores = {}
    worker = engine._worker
    if isinstance(worker, TensorParallelWorkers):
        replies = {LOCAL: worker._worker._replies[LOCAL]}  # other ranks have seats at the same workers
    else:
        replies = getattr(worker, "_worker", worker)._replies
    for number, reply in replies.items():
        port = reply.port
        if isinstance(port, LocalAttention):
            pools = port._worker.pools
            counts = sum(pool.free_pages for pool in pools), sum(pool.n_pages for pool in pools)
            stores[number] = *counts, sum(len(pool.parts()) for pool in pools)
        else:
            status = port.status()
            stores[number] = status.free_pages, status.total_pages, status.parts
    return stores


def _books(engine: Any, control: Any) -> Iterator[str]:
    scheduler = control.scheduler
    scheduler.check_integrity()
    free, cached = scheduler.ledger.free, scheduler.running.prefix_cache.evictable
    for place, total in control.placement.pages.items():
        if free.get(place, 0) + cached.get(place, 0) != total:
            yield f"pool {place}: {free.get(place, 0)} free and {cached.get(place, 0)} cached pages of {total}"
    for number, (free_pages, pages, _) in _stores(engine).items():
        booked = sum(count for (holder, _), count in free.items() if holder == number)
        if number in control.placement.holders and booked != free_pages:
            yield f"holder {number} has {free_pages} of {pages} pages free, by the books {booked}"


def _texts(engine: Any, control: Any) -> Iterator[str]:
    registry, scheduler, drafting = engine._registry, control.scheduler, engine._drafting
    counts = {
        "requests": registry.requests,
        "histories": registry.histories,
        "constraints": registry.constraints,
        "unfinished requests": scheduler._requests,
        "running sequences": scheduler.running.sequences,
        "suspects": scheduler.blame._suspects,
        "stranded sequences": scheduler.admission._stranded,
        "texts of drafts": getattr(drafting._proposer, "_texts", ()),
        "acceptances": getattr(drafting._speculation, "_acceptances", ()),
        "late masks": range(engine._masks.late),
    }
    yield from (f"{len(those)} {what} are left" for what, those in counts.items() if those)
