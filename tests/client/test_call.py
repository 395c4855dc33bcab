"""One call in its four ways: waiting, iterating, and both for event loops. The engine is a script of outputs."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from typing import Any, cast

import pytest
from letter_tokenizer import LetterTokenizer

from lamina.client.call import AsyncOutputs, Call
from lamina.completions import Completion, Interrupted, TokenEvent
from lamina.errors import EngineError
from lamina.kv.request import Request
from lamina.messages.engine_request import EngineOutput, EngineRequest
from lamina.sampling_params import SamplingParams

CTRL_C = "\x03"  # the token at which the tokenizer behaves as if the user had pressed it


class InterruptedTokenizer(LetterTokenizer):
    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        text = super().decode(ids, skip_special_tokens)
        if CTRL_C in text:
            raise KeyboardInterrupt
        return text


class ScriptedEngine:
    """Generates the text of each prompt as soon as it is submitted, a letter an output; "..." at the end of a text
    leaves it unfinished, "!" is an error. With `thread` the outputs come from a thread of the engine's own."""

    def __init__(self, *texts: str, thread: bool = False, refuses: int | None = None) -> None:
        self.tokenizer: Any = InterruptedTokenizer()
        self.progress: Callable[..., None] | None = None
        self.submitted: list[EngineRequest] = []
        self.aborted: list[tuple[str, int | None, str]] = []
        self.deliveries = 0
        self._texts = texts
        self._thread = thread
        self._refuses = refuses

    @property
    def engine(self) -> Any:
        return self

    def submit(self, request: EngineRequest) -> None:
        if len(self.submitted) == self._refuses:
            raise EngineError("the engine has stopped")
        self.submitted.append(request)
        text = self._texts[len(self.submitted) - 1]
        if self._thread:
            threading.Thread(target=self._generate, args=(request, text)).start()
        else:
            self._generate(request, text)

    def abort(self, request: EngineRequest, sample: int | None = None, reason: str = "abort") -> None:
        self.aborted.append((request.id, sample, reason))

    def _generate(self, request: EngineRequest, text: str) -> None:
        letters = text.removesuffix("...")
        for index, letter in enumerate(letters):
            ends = letters == text and index == len(letters) - 1
            output = EngineOutput(0, ord(letter), "length" if ends else None, at=request.submitted)
            if letter == "!":
                output = EngineOutput(0, None, error=EngineError("it went wrong"))
            request.sink(request, [output])
        if request.prefilled is not None:
            request.prefilled(len(request.request.prompt), len(request.request.prompt))


def call(engine: ScriptedEngine, prompts: int = 1, *, one: bool = False, owner: object = None, **params: Any) -> Call:
    sampling = SamplingParams(**params)
    requests = [EngineRequest(Request(str(n), (1, 2), 100), sampling, seed=0) for n in range(prompts)]
    return Call(engine, requests, one, owner)


async def collected(events: Call) -> list[TokenEvent]:
    return [event async for event in events]


def waited(made: Call) -> Any:
    return made.result()


def awaited(made: Call) -> Any:
    async def waiting() -> Any:
        return await made

    return asyncio.run(waiting())


def iterated(made: Call) -> Any:
    return list(made)


def iterated_asynchronously(made: Call) -> Any:
    return asyncio.run(collected(made))


WHOLE = pytest.mark.parametrize("whole", [waited, awaited])
STREAM = pytest.mark.parametrize("stream", [iterated, iterated_asynchronously])
WAYS = pytest.mark.parametrize("way", [waited, awaited, iterated, iterated_asynchronously])
THREAD = pytest.mark.parametrize("thread", [False, True])


@WHOLE
@THREAD
def test_a_call_gives_the_completions_in_the_order_of_its_prompts(whole: Callable[..., Any], thread: bool) -> None:
    engine = ScriptedEngine("abc", "d", "ef", thread=thread)
    assert [completion.text for completion in whole(call(engine, 3))] == ["abc", "d", "ef"]
    assert engine.aborted == []


@WHOLE
def test_a_call_for_one_prompt_gives_one_completion_and_for_a_list_a_list(whole: Callable[..., Any]) -> None:
    assert whole(call(ScriptedEngine("ab"), one=True)).text == "ab"
    assert [completion.text for completion in whole(call(ScriptedEngine("ab")))] == ["ab"]
    assert whole(call(ScriptedEngine(), 0)) == []


@STREAM
@THREAD
def test_a_call_gives_the_events_of_each_prompt_in_order(stream: Callable[..., Any], thread: bool) -> None:
    engine = ScriptedEngine("abc", "de", thread=thread)
    events = stream(call(engine, 2))
    texts = ["".join(event.text for event in events if event.prompt_index == prompt) for prompt in (0, 1)]
    assert texts == ["abc", "de"]
    assert sum(event.finish_reason is not None for event in events) == 2
    assert engine.aborted == []


@WAYS
def test_nothing_is_submitted_before_a_call_is_used(way: Callable[..., Any]) -> None:
    engine = ScriptedEngine("ab")
    made = call(engine)
    assert engine.submitted == []
    way(made)
    assert len(engine.submitted) == 1


@WAYS
def test_an_error_in_the_middle_is_raised_and_the_other_prompts_are_aborted(way: Callable[..., Any]) -> None:
    engine = ScriptedEngine("ab", "c!", "d...")
    with pytest.raises(EngineError, match="it went wrong"):
        way(call(engine, 3))
    assert ("2", None, "abort") in engine.aborted
    assert "0" not in [request_id for request_id, _, _ in engine.aborted]


@WAYS
def test_an_engine_that_refuses_a_prompt_gets_the_others_aborted(way: Callable[..., Any]) -> None:
    engine = ScriptedEngine("a...", "b", refuses=1)
    with pytest.raises(EngineError, match="has stopped"):
        way(call(engine, 2))
    assert ("0", None, "abort") in engine.aborted


@WAYS
def test_a_stop_string_ends_the_sample_at_the_engine_too(way: Callable[..., Any]) -> None:
    engine = ScriptedEngine("abXcd...")
    way(call(engine, stop="X"))
    assert engine.aborted == [("0", 0, "stop")]


def test_leaving_an_iteration_early_aborts_what_has_not_ended() -> None:
    engine = ScriptedEngine("a", "bc...", "d...")
    events = cast(Generator[TokenEvent, None, None], iter(call(engine, 3)))
    assert [next(events).text, next(events).text] == ["a", "b"]
    assert engine.aborted == []
    events.close()
    assert engine.aborted == [("1", None, "abort"), ("2", None, "abort")]


def test_leaving_an_asynchronous_iteration_early_aborts_what_has_not_ended() -> None:
    engine = ScriptedEngine("a", "bc...")

    async def leaving() -> None:
        events = cast(AsyncGenerator[TokenEvent, None], aiter(call(engine, 2)))
        assert (await anext(events)).text == "a"
        await events.aclose()

    asyncio.run(leaving())
    assert engine.aborted == [("1", None, "abort")]


def test_cancelling_the_task_that_awaits_aborts_what_has_not_ended() -> None:
    engine = ScriptedEngine("a...")

    async def cancelling() -> None:
        async def waiting() -> Any:
            return await call(engine)

        task = asyncio.create_task(waiting())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancelling())
    assert engine.aborted == [("0", None, "abort")]


def test_ctrl_c_gives_the_completions_that_were_finished() -> None:
    engine = ScriptedEngine("ab", f"c{CTRL_C}", "d", "e...")
    with pytest.raises(Interrupted) as raised:
        call(engine, 4).result()
    texts = [completion and completion.text for completion in cast("list[Completion | None]", raised.value.completions)]
    assert texts == ["ab", None, "d", None]
    assert {request_id for request_id, _, _ in engine.aborted} == {"1", "3"}


def test_outputs_wake_the_caller_once_a_sample_unless_they_are_streamed_or_may_stop() -> None:
    def deliveries(streamed: bool, **params: Any) -> int:
        taken: list[Any] = []
        made = call(ScriptedEngine("abcd"), **params)
        made.submit(taken.append, streamed)
        assert [output.token for _, outputs in taken for output in outputs] == [ord(letter) for letter in "abcd"]
        return len(taken)

    assert deliveries(streamed=False) == 1
    assert deliveries(streamed=True) == 4
    assert deliveries(streamed=False, stop="X") == 4


@pytest.mark.parametrize(("tokens", "reports"), [(10, 0), (3000, 2)])
def test_progress_of_the_prompts_is_reported_when_they_are_long(tokens: int, reports: int) -> None:
    engine = ScriptedEngine("a", "b")
    seen: list[tuple[Any, ...]] = []
    engine.progress = lambda *report: seen.append(report)
    requests = [EngineRequest(Request(str(n), (1,) * tokens, 100), SamplingParams(), seed=0) for n in range(2)]
    Call(engine, requests).result()
    assert [(done, total) for _, done, total in seen] == [(tokens, 2 * tokens), (2 * tokens, 2 * tokens)][:reports]


def test_a_call_keeps_its_owner_while_it_is_iterated_and_no_longer() -> None:
    class Owner:
        pass

    owner = Owner()
    alive = weakref.ref(owner)
    events = iter(call(ScriptedEngine("abc"), owner=owner))
    del owner
    next(events)
    gc.collect()
    assert alive() is not None
    list(events)
    assert alive() is None


def test_async_outputs_come_in_the_order_in_which_threads_put_them() -> None:
    request = EngineRequest(Request("0", (1,), 1), SamplingParams(), seed=0)

    async def taking() -> list[int]:
        outputs = AsyncOutputs()

        def fill() -> None:
            for token in range(100):
                outputs.put((request, [EngineOutput(0, token)]))

        thread = threading.Thread(target=fill)
        thread.start()
        taken = [(await outputs.get())[1][0].token for _ in range(100)]
        thread.join()
        assert outputs.get_nowait() is None
        return [token for token in taken if token is not None]

    assert asyncio.run(taking()) == list(range(100))


def test_async_outputs_raise_once_their_time_is_over_but_first_give_what_is_there() -> None:
    request = EngineRequest(Request("0", (1,), 1), SamplingParams(), seed=0)

    async def taking() -> None:
        outputs = AsyncOutputs(seconds=0.0)
        outputs.put((request, []))
        assert await outputs.get() == (request, [])
        with pytest.raises(asyncio.TimeoutError):
            await outputs.get()
        outputs.close()

    asyncio.run(taking())


def test_a_loop_that_ends_keeps_no_queue() -> None:
    async def made() -> AsyncOutputs:
        return AsyncOutputs()

    loop = asyncio.new_event_loop()
    outputs = loop.run_until_complete(made())
    outputs.put((EngineRequest(Request("0", (1,), 1), SamplingParams(), seed=0), []))
    loop.close()  # before it wakes the queue
    queue = weakref.ref(outputs)
    del outputs
    gc.collect()
    assert queue() is None


@pytest.mark.fault("F23")
def test_a_whole_sample_is_delivered_in_slices() -> None:
    """A sample of 8,000 tokens was read at once, with the log probabilities of each: seconds without anything else."""
    engine, sizes = ScriptedEngine("a" * 1200), []
    made = call(engine)
    made.submit(lambda delivery: sizes.append(len(delivery[1])), streamed=False)
    assert sizes == [512, 512, 176]
