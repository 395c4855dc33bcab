"""The bounds of messages. What their fields may be is in test_tokenizer."""

from __future__ import annotations

import tracemalloc

import pytest

from lamina.errors import InvalidRequest, cut
from lamina.text.messages import check_messages


def called(*arguments: str) -> list[dict[str, object]]:
    return [
        {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": text}}]}
        for text in arguments
    ]


def test_arguments_are_bounded_before_they_are_parsed() -> None:
    """The limits of a body do not see JSON within a text: 15 MB of arguments took 378 MB."""
    half = '{"a": [' + "[]," * 200_000 + "[]]}"
    assert check_messages(called(half))
    tracemalloc.start()
    with pytest.raises(InvalidRequest, match="characters of arguments of calls; allowed are 1048576"):
        check_messages(called(half, half))
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


@pytest.mark.parametrize(
    "value",
    ["x" * 5_000_000, [["y" * 1000] * 1000] * 1000, {str(at): at for at in range(500_000)}, 10**5000, [10**5000]],
    ids=["text", "lists", "object", "integer", "integers"],
)
def test_an_error_makes_no_more_text_of_a_value_than_it_shows(value: object) -> None:
    """All of a value was written out, and then cut to 80 characters; of a huge integer that is an error in Python."""
    tracemalloc.start()
    shown = cut(value)
    assert tracemalloc.get_traced_memory()[1] < 100_000
    tracemalloc.stop()
    assert 0 < len(shown) <= 80
