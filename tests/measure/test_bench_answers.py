"""An answer from its bytes: the same however they are cut, and bounded."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamina.errors import ProtocolError
from lamina.measure.bench import client
from lamina.measure.bench.client import Answer


def event(**fields):
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def text(words, finish=None):
    return event(choices=[{"delta": {"content": words}, "finish_reason": finish}])


ROLE = event(choices=[{"delta": {"role": "assistant", "content": ""}}])
USAGE = event(choices=[], usage={"prompt_tokens": 9, "completion_tokens": 3})
DONE = b"data: [DONE]\n\n"


def answer(*pieces):
    """With a second between them."""
    found = Answer(0.0)
    for second, piece in enumerate(pieces, 1):
        found.take(piece, float(second))
    found.close()
    return found


def test_an_answers_times_are_those_of_its_chunks():
    found = answer(ROLE, text("a"), text(""), text("b") + text("c"), text("", "stop"), USAGE, DONE, b"rubbish\n")
    assert list(found.chunks) == [2.0, 4.0, 4.0]
    assert (found.ended, found.finish, found.error, found.usage.output) == (6.0, "stop", "", 3)


@given(st.data())
def test_it_does_not_matter_how_bytes_are_cut(data):
    whole = ROLE + text('a "content":"x"') + text("b", "stop") + USAGE + DONE
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=9)))
    pieces = [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    found = answer(*pieces)
    assert (len(found.chunks), found.finish, found.usage.output, found.done, found.error) == (2, "stop", 3, True, "")
    assert list(found.chunks) == sorted(found.chunks)
    assert found.ended <= len(pieces)


@pytest.mark.parametrize(
    ("pieces", "error"),
    [
        ((text("a"),), "ended early"),
        ((), "ended early"),
        ((ROLE, DONE), "no tokens"),
        ((USAGE, DONE), "no tokens"),
        ((text("a"), event(error={"message": "x"}), text("b", "stop")), "error in the stream"),
    ],
)
def test_what_is_no_answer_has_an_error(pieces, error):
    assert answer(*pieces).error == error


def test_an_end_without_done_is_one_with_a_finish_reason():
    assert answer(text("a"), text("b", "length")).error == ""


def test_streams_are_bounded(monkeypatch):
    monkeypatch.setattr(client, "MAX_STREAM", 1000)
    endless = Answer(0.0)
    for _ in range(100):
        endless.take(b": ping\n\n", 1.0)
    with pytest.raises(ProtocolError, match="1000 bytes"):
        endless.take(b": ping\n\n" * 30, 1.0)
