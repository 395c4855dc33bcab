"""From outputs to text, events and completions, one prompt at a time."""

from __future__ import annotations

from typing import Any

import pytest
from letter_tokenizer import END, LetterTokenizer

from lamina.client.output_processor import OutputProcessor
from lamina.completions import TokenEvent
from lamina.errors import EngineError
from lamina.kv.request import Request
from lamina.messages.engine_request import EngineOutput, EngineRequest
from lamina.sampling_params import SamplingParams
from lamina_workers.decoder.logprobs import RowLogprobs


class Prompt:
    """A processor of one prompt, and the samples that it has stopped."""

    def __init__(self, **params: Any) -> None:
        sampling = SamplingParams(**params)
        self.request = EngineRequest(Request("0", (1, 2, 3), 100, n=sampling.n), sampling, seed=0, submitted=10.0)
        self.stopped: list[int] = []
        self.outputs = OutputProcessor(5, self.request, LetterTokenizer(), self.stopped.append)  # type: ignore[arg-type]

    def write(self, text: str, sample: int = 0, finish: Any = None, at: float = 11.0) -> list[TokenEvent]:
        """The events of a text that a sample generates, a token a letter."""
        last = len(text) - 1
        given = [
            EngineOutput(sample, ord(letter), finish if index == last else None, at=at)
            for index, letter in enumerate(text)
        ]
        return list(self.outputs.take(given))


def test_events_carry_each_token_and_their_texts_make_the_samples_text() -> None:
    prompt = Prompt()
    events = prompt.write("hello", finish="length")
    assert [event.token_id for event in events] == [ord(letter) for letter in "hello"]
    assert "".join(event.text for event in events) == prompt.outputs.completion().text == "hello"
    assert {(event.prompt_index, event.sample_index) for event in events} == {(5, 0)}
    assert [event.finish_reason for event in events] == [None] * 4 + ["length"]


def test_samples_of_a_prompt_grow_on_their_own() -> None:
    prompt = Prompt(n=2)
    prompt.write("a", 0)
    prompt.write("b", 1, finish="stop")
    assert not prompt.outputs.done
    prompt.write("c", 0, finish="length")
    assert prompt.outputs.done
    completion = prompt.outputs.completion()
    assert [(sample.text, sample.finish_reason) for sample in completion.samples] == [("ac", "length"), ("b", "stop")]
    assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (3, 3)


@pytest.mark.parametrize(("include", "text"), [(False, "ab"), (True, "abXY")])
def test_a_stop_string_ends_the_sample_and_the_engine_is_notified(include: bool, text: str) -> None:
    prompt = Prompt(stop="XY", include_stop_str_in_output=include)
    events = prompt.write("abXYcd")
    assert prompt.stopped == [0]
    assert prompt.outputs.done
    assert (prompt.outputs.completion().text, events[-1].finish_reason) == (text, "stop")
    assert prompt.outputs.completion().token_ids == tuple(map(ord, "abXY"))


def test_outputs_after_a_stop_string_are_dropped() -> None:
    prompt = Prompt(stop="X")
    prompt.write("aX")
    assert prompt.write("bX", finish="length") == []
    assert prompt.stopped == [0]
    assert prompt.outputs.completion().text == "a"


def test_what_may_begin_a_stop_string_is_held_back_until_it_does_not() -> None:
    prompt = Prompt(stop="XY")
    assert [event.text for event in prompt.write("aXb")] == ["a", "", "Xb"]


@pytest.mark.parametrize("reason", ["stop", "length", "abort"])
def test_what_was_held_back_is_shown_when_the_sample_ends_otherwise(reason: Any) -> None:
    prompt = Prompt(stop="XY")
    prompt.write("aX")
    assert list(prompt.outputs.take([EngineOutput(0, None, reason, at=12.0)])) == []
    sample = prompt.outputs.completion().samples[0]
    assert (sample.text, sample.finish_reason) == ("aX", reason)


def test_stop_strings_are_ignored_before_min_tokens() -> None:
    prompt = Prompt(stop="X", min_tokens=3)
    prompt.write("aXbX")
    assert prompt.outputs.completion().text == "aXb"


@pytest.mark.parametrize(("skip", "text"), [(True, "a"), (False, "a<end>")])
def test_special_tokens_are_tokens_without_text_unless_they_are_wanted(skip: bool, text: str) -> None:
    prompt = Prompt(skip_special_tokens=skip)
    prompt.write(f"a{chr(END)}", finish="stop")
    completion = prompt.outputs.completion()
    assert (completion.text, completion.token_ids) == (text, (97, END))


def test_logprobs_are_given_with_each_token_when_they_are_asked_for() -> None:
    prompt = Prompt(logprobs=1)
    row = RowLogprobs(-0.5, ((98, -0.25),))
    [event] = prompt.outputs.take([EngineOutput(0, 97, "length", row, at=11.0)])
    assert event.logprob is not None
    assert (event.logprob.text, event.logprob.logprob, event.logprob.top[0].text) == ("a", -0.5, "b")
    assert prompt.outputs.completion().logprobs == (event.logprob,)
    assert prompt.outputs.completion().to_dict()["samples"][0]["logprobs"][0]["top"][0]["text"] == "b"
    without = Prompt()
    without.write("a", finish="length")
    assert without.outputs.completion().logprobs is None


def test_log_probabilities_that_nobody_streams_are_spelled_where_they_are_read() -> None:
    prompt, row = Prompt(logprobs=2), RowLogprobs(-0.5, ((98, -0.25), (97, -0.5)))
    events = list(prompt.outputs.take([EngineOutput(0, 97, None, row, at=11.0)] * 3, spelled=False))
    assert [event.logprob for event in events] == [None] * 3
    logprobs = prompt.outputs.completion().logprobs
    assert logprobs is not None
    assert [(each.logprob, [(top.text, top.logprob) for top in each.top]) for each in logprobs[1:]] == [
        (-0.5, [("b", -0.25), ("a", -0.5)])
    ] * 2
    assert logprobs[-1] == logprobs[0]


def test_an_error_is_raised_as_a_copy_with_its_cause() -> None:
    prompt, cause = Prompt(), ValueError("why")
    error = EngineError("it stopped")
    error.__cause__ = cause
    with pytest.raises(EngineError, match="it stopped") as raised:
        list(prompt.outputs.take([EngineOutput(0, None, error=error)]))
    assert raised.value is not error
    assert raised.value.__cause__ is cause


def test_timing_is_in_seconds_since_the_submission() -> None:
    prompt = Prompt()
    prompt.request.scheduled = 10.5
    prompt.write("a", at=11.0)
    prompt.write("b", at=13.0, finish="length")
    timing = prompt.outputs.completion().timing
    assert (timing.queued, timing.first_token, timing.total, timing.tokens) == (0.5, 1.0, 3.0, 2)


def test_a_completion_before_any_output_is_empty_and_aborted() -> None:
    completion = Prompt(n=2).outputs.completion()
    assert [(sample.text, sample.finish_reason) for sample in completion.samples] == [("", "abort")] * 2
    assert (completion.timing.queued, completion.timing.first_token, completion.timing.total) == (0.0, 0.0, 0.0)
