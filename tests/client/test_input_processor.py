"""From what callers pass in to requests: what becomes of prompts, and what is refused before anything is submitted."""

from __future__ import annotations

from typing import Any

import pytest
from letter_tokenizer import END, LetterTokenizer

from lamina.client.input_processor import InputProcessor
from lamina.errors import ContextTooLong, InvalidRequest
from lamina.messages.engine_request import EngineRequest
from lamina.sampling_params import SamplingParams

CONTEXT, POSSIBLE, VOCABULARY = 100, 50, 128


def processor(generation_config: dict[str, Any] | None = None, **settings: Any) -> InputProcessor:
    known = {"context": CONTEXT, "possible": POSSIBLE, "vocab_size": VOCABULARY, **settings}
    return InputProcessor(LetterTokenizer(), generation_config=generation_config or {}, **known)  # type: ignore[arg-type]


def requests(*prompts: list[int], inputs: InputProcessor | None = None, **params: Any) -> list[EngineRequest]:
    return (inputs or processor()).requests(prompts, SamplingParams(**{"max_tokens": 4, **params}))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("ab", [[97, 98]]),
        (["ab", "c"], [[97, 98], [99]]),
        ([97, 98], [[97, 98]]),
        ([[97], "b"], [[97], [98]]),
        ([], [[]]),
    ],
)
def test_prompts_are_token_ids_of_one_or_of_each(given: Any, expected: list[list[int]]) -> None:
    assert processor().prompts(given).prompts == expected


@pytest.mark.parametrize("given", [b"ab", 7, None, "", ["a", ""], [1.5], [[1, "a"]], ["a", 3], [True, "a"]])
def test_prompts_are_refused_when_they_are_neither_text_nor_token_ids(given: Any) -> None:
    with pytest.raises(InvalidRequest):
        processor().prompts(given)


@pytest.mark.parametrize(("given", "one"), [("ab", True), ([97], True), ([], True), (["ab"], False), ([[97]], False)])
def test_prompts_say_whether_they_are_one_or_a_list(given: Any, one: bool) -> None:
    assert processor().prompts(given).one == one


def test_prompts_name_the_one_that_is_wrong() -> None:
    with pytest.raises(InvalidRequest, match=r"prompts\[1\] is empty"):
        processor().prompts(["a", "", "b"])


def test_conversations_are_written_by_the_template_one_or_each() -> None:
    talk, inputs = [{"role": "user", "content": "hi"}], processor()
    written = inputs.tokenizer.encode("user: hi\n")
    assert inputs.conversations(talk) == ([written], True)
    assert inputs.conversations([talk, [*talk, *talk]]) == ([written, written * 2], False)


def test_requests_have_ids_of_their_own_with_the_prefix() -> None:
    inputs = processor(prefix="3-")
    ids = [each.id for _ in range(3) for each in requests([1], [2], inputs=inputs)]
    assert len(set(ids)) == 6
    assert all(request_id.startswith("3-") for request_id in ids)


def test_requests_keep_prompts_in_order_and_share_the_params() -> None:
    first, second = requests([1, 2], [3], n=2, max_tokens=5, min_tokens=1)
    assert [first.request.prompt, second.request.prompt] == [(1, 2), (3,)]
    for each in (first, second):
        assert (each.request.n, each.request.max_tokens, each.request.min_tokens) == (2, 5, 1)


def test_requests_have_the_seed_that_is_given_and_one_of_their_own_otherwise() -> None:
    assert [each.seed for each in requests([1], [2], seed=7)] == [7, 7]
    first, second = requests([1], [2])
    assert first.seed != second.seed


def test_requests_end_at_the_models_own_tokens_unless_those_are_ignored() -> None:
    [plain] = requests([1], stop_token_ids=[9])
    [ignoring] = requests([1], stop_token_ids=[9], ignore_eos=True)
    assert (plain.request.stop_token_ids, ignoring.request.stop_token_ids) == ({9, END}, {9})


def test_requests_take_the_models_defaults_for_what_callers_leave_out() -> None:
    inputs = processor({"do_sample": True, "temperature": 0.5, "top_k": 7})
    [plain] = requests([1], inputs=inputs)
    [given] = requests([1], inputs=inputs, temperature=0.25)
    assert (plain.params.temperature, plain.params.top_k) == (0.5, 7)
    assert (given.params.temperature, given.params.top_k) == (0.25, 7)


@pytest.mark.parametrize(
    ("prompt", "params", "says"),
    [
        ([1, VOCABULARY], {}, f"the prompt has token id {VOCABULARY}; allowed are 0 to {VOCABULARY - 1}"),
        ([-1], {}, "the prompt has token id -1"),
        ([1], {"stop_token_ids": [VOCABULARY]}, "stop_token_ids has token id"),
        ([1], {"logit_bias": {VOCABULARY: 1.0}}, "logit_bias has token id"),
    ],
)
def test_requests_are_refused_when_a_token_is_not_the_models(prompt: list[int], params: Any, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        requests(prompt, **params)


@pytest.mark.parametrize("priority", [True, 1.5, "1", 2**31, -(2**31) - 1])
def test_requests_are_refused_when_the_priority_is_no_small_integer(priority: Any) -> None:
    with pytest.raises(InvalidRequest, match="priority"):
        processor().requests([[1]], SamplingParams(), priority)


@pytest.mark.parametrize(("context", "possible"), [(CONTEXT, POSSIBLE), (POSSIBLE, CONTEXT), (30, 30)])
def test_requests_may_be_as_long_as_max_model_len_and_no_longer(context: int, possible: int) -> None:
    inputs = processor(context=context, possible=possible)
    fitting = [1] * (inputs.max_model_len - 4)
    assert len(requests(fitting, inputs=inputs)) == 1
    with pytest.raises(ContextTooLong):
        requests([*fitting, 1], inputs=inputs)


def test_no_request_is_made_when_one_prompt_is_wrong() -> None:
    inputs = processor()
    with pytest.raises(InvalidRequest):
        requests([1], [VOCABULARY], inputs=inputs)
    [next_request] = requests([1], inputs=inputs)
    assert next_request.id == "0"
