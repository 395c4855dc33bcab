"""The register of requests: what clients get, in which order, and what is left of a request that has ended."""

from __future__ import annotations

import pytest
from registry_rig import PROMPT, Choice, Rig, constrained

from lamina.errors import EngineError
from lamina.kv.request import Request
from lamina.messages.engine_request import EngineOutput, EngineRequest
from lamina.sampling_params import SamplingParams
from lamina_workers.decoder.logprobs import RowLogprobs


def test_registry_delivers_tokens_with_reports_and_times_until_the_request_ends() -> None:
    rig = Rig()
    request = rig.submit()
    for now in (1.0, 2.0, 4.0):
        rig.now = now
        rig.step(token=int(now) + 4)
    assert rig.tokens() == [5, 6, 8]
    assert rig.reasons() == ["length"]
    assert [output.at for output in rig.got["a"]] == [1.0, 2.0, 4.0]
    assert {output.logprobs for output in rig.got["a"]} == {RowLogprobs(-1.0, ())}
    assert request.unfinished == 0
    rig.check_empty()


def test_registry_keeps_a_request_until_its_last_sample_ends() -> None:
    rig = Rig()
    request = rig.submit(n=2)
    rig.step()
    rig.registry.end(request, 0, "stop")
    assert rig.reasons() == ["stop"]
    assert rig.registry.of(request.sequences[1]) is request
    while request.unfinished:
        rig.step()
    assert (rig.tokens(sample=0), rig.tokens(sample=1)) == ([7], [7, 7, 7])
    assert rig.reasons() == ["stop", "length"]
    assert rig.registry.of(request.sequences[1]) is None
    rig.check_empty()


def test_end_is_harmless_for_an_ended_request_and_for_another_of_the_same_id() -> None:
    rig = Rig(recorded=True)
    first = rig.submit()
    rig.registry.end(first, None, "abort")
    second = rig.submit()
    rig.registry.end(first, None, "abort")
    assert rig.registry.of(second.sequences[0]) is second
    rig.registry.end(second, None, "abort")
    assert rig.reasons() == ["abort", "abort"]
    assert [what for what, _ in rig.log].count("abort") == 2
    rig.check_empty()


def test_request_that_the_scheduler_refuses_gets_the_error_and_leaves_nothing() -> None:
    rig = Rig(recorded=True)
    rig.submit(tokens=1000)
    assert "length is" in rig.errors()[0]
    assert ("begun", "a") not in rig.log
    rig.check_empty()


def test_fail_sends_the_error_with_its_cause_and_ends_every_sample() -> None:
    rig = Rig(recorded=True)
    request, cause = rig.submit(n=3, repetition_penalty=1.2), ValueError("why")
    rig.step()
    error = EngineError("failed")
    rig.registry.fail(request, error, cause)
    assert rig.got["a"][-1].error is error
    assert error.__cause__ is cause
    assert rig.log[-2:] == [("failed", "a"), ("client", "a")]
    rig.check_empty()


def test_refuse_sends_the_error_to_a_request_that_came_too_late() -> None:
    rig = Rig()
    late = EngineRequest(Request("late", PROMPT, 1), SamplingParams(), 0, rig.deliver)
    rig.registry.refuse(late, EngineError("stopped"))
    assert rig.errors("late") == ["stopped"]


def test_journal_has_a_batch_before_the_client_gets_it() -> None:
    rig = Rig(recorded=True)
    rig.submit("a", tokens=1)
    rig.submit("b", prompt=(9, 9), tokens=1)
    rig.step()
    assert rig.log == [("begun", "a"), ("begun", "b"), ("batch", ["a", "b"]), ("client", "a"), ("client", "b")]


def test_stopped_sends_every_open_request_its_own_error_and_closes_the_journal() -> None:
    rig = Rig(recorded=True)
    rig.submit("a")
    rig.submit("b", prompt=(9, 9))
    rig.registry.stopped(lambda: EngineError("over"))
    assert rig.errors("a") == rig.errors("b") == ["over"]
    assert rig.got["a"][0].error is not rig.got["b"][0].error
    assert rig.log[-1] == ("closed", None)


def test_sink_that_raises_ends_its_request_and_no_other(caplog: pytest.LogCaptureFixture) -> None:
    rig = Rig()
    broken, good = rig.submit("a"), rig.submit("b", prompt=(9, 9))
    calls = []

    def refuse(request: EngineRequest, outputs: list[EngineOutput]) -> None:
        calls.append(outputs)
        raise ValueError("no")

    broken.sink = refuse
    while good.unfinished:
        rig.step()
    assert rig.tokens("b") == [7, 7, 7]
    assert len(calls) == 1, "a sink that raised is not called again"
    assert broken.sequences[0].finish_reason == "abort"
    assert "could not take its outputs" in caplog.text
    rig.check_empty()


def test_scheduled_notes_the_first_batch_and_the_reused_tokens_once() -> None:
    rig = Rig()
    request = rig.submit()
    assert request.scheduled is None
    (sample,) = request.sequences
    sample.reused = 2
    for rig.now in (3.0, 4.0):
        rig.registry.scheduled({sample: request})
        sample.reused = 1
    assert (request.scheduled, request.cached_tokens) == (3.0, 2)


def test_follow_prefill_reports_progress_and_counts_prompt_tokens_only(caplog: pytest.LogCaptureFixture) -> None:
    rig = Rig()
    long, broken = rig.submit("a", prompt=range(30), tokens=2), rig.submit("b", prompt=range(100, 104), tokens=2)
    seen, calls = list[tuple[int, int]](), list[int]()

    def refuse(done: int, total: int) -> None:
        calls.append(done)
        raise ValueError("no")

    long.prefilled, broken.prefilled = lambda done, total: seen.append((done, total)), refuse
    computed = 0
    while long.unfinished or broken.unfinished:
        plan = rig.plan()
        computed += rig.step(plan=plan).prompt_tokens
    assert seen == sorted(seen)
    assert seen[-1] == (30, 30)
    assert computed == 30 + 4
    assert len(calls) == 1, "a callback that raised is not called again"
    assert "could not follow its prefill" in caplog.text


@pytest.mark.parametrize("penalty", ["repetition_penalty", "presence_penalty", "frequency_penalty"])
def test_history_of_tokens_is_kept_only_for_samples_with_a_penalty(penalty: str) -> None:
    rig = Rig()
    rig.submit("plain", prompt=(8, 8))
    (sample,) = rig.submit("a", **{penalty: 1.3}).sequences
    assert list(rig.registry.histories) == [sample]
    rig.step(token=7)
    rig.step(token=2)
    history = rig.registry.histories[sample]
    assert list(history.tokens) == [*PROMPT, 7]
    while rig.registry.of(sample):
        rig.step()
    rig.check_empty()


def test_constraint_ends_its_sample_when_its_text_is_complete() -> None:
    rig = Rig()
    request = constrained(rig, "a", Choice(7, 7), Choice(7, 7, 7))
    while request.unfinished:
        rig.step()
    assert (rig.tokens(sample=0), rig.tokens(sample=1)) == ([7, 7], [7, 7, 7])
    assert rig.reasons() == ["stop", "stop"]
    rig.check_empty()


def test_request_fails_after_its_outputs_when_a_token_leaves_the_constraint() -> None:
    rig = Rig(recorded=True)
    constrained(rig, "a", Choice(7, 5, 7))
    other = rig.submit("b", prompt=(9, 9))
    rig.step()
    rig.step()
    assert rig.tokens() == [7, 7]
    assert rig.errors() == ["token 7 is not allowed"]
    while other.unfinished:
        rig.step()
    assert rig.tokens("b") == [7, 7, 7]
    rig.check_empty()


def test_client_that_returns_without_a_journal_goes_on_from_what_it_received() -> None:
    rig = Rig()
    request = constrained(rig, "a", Choice(7, 8, 9), Choice(4), received=(((7, 8), False), ((4,), True)))
    assert [sequence.sample for sequence in request.sequences] == [0]
    rig.step(token=9)
    assert rig.tokens() == [9]
    assert rig.reasons() == ["stop"]
    rig.check_empty()


def test_client_that_returns_replaces_the_request_of_its_id() -> None:
    rig = Rig()
    old = rig.submit(tokens=9)
    rig.step()
    again = constrained(rig, "a", Choice(7, 8), received=(((7,), False),))
    assert old.sequences[0].finish_reason == "abort"
    assert rig.registry.of(again.sequences[0]) is again
    rig.step(token=8)
    assert again.unfinished == 0
    rig.check_empty()


def test_client_that_returns_with_a_journal_takes_the_running_request_over() -> None:
    """It gets what it missed and what comes then; an abort by the client that it replaces ends nothing."""
    rig = Rig(recorded=True)
    old = rig.submit(tokens=4)
    rig.step(token=7)
    rig.step(token=7)
    again = constrained(rig, "a", Choice(), received=(((7,), False),))
    assert again.sequences == old.sequences
    rig.registry.end(old, None, "abort")
    assert rig.registry.of(again.sequences[0]) is again
    while again.unfinished:
        rig.step(token=8)
    assert rig.tokens() == [7, 7, 7, 8, 8]  # the second 7 went to both clients
    assert rig.reasons() == ["length"]
    rig.check_empty()


def test_preemptions_of_all_samples_are_summed_when_they_end() -> None:
    rig = Rig()
    request = rig.submit(n=2, tokens=1)
    for sample, count in zip(request.sequences, (2, 3), strict=True):
        sample.preemptions = count
    while request.unfinished:
        rig.step()
    assert request.preemptions == 5
