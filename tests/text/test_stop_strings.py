"""Stop strings: the same text however it arrives, and never more held back than could still be one."""

from __future__ import annotations

import itertools
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamina.text.stop_strings import StopMatcher

texts = st.text("abc", max_size=40)
stop_lists = st.lists(st.text("abc", min_size=1, max_size=6), max_size=4)


def cut(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """Slow and obvious: the first end of any stop string, the longest that ends there."""
    for end in range(len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            stop = max(complete, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


def feed(matcher: StopMatcher, pieces: list[str]) -> tuple[str, str | None]:
    shown = ""
    for piece in pieces:
        more, stopped = matcher.push(piece)
        shown += more
        if stopped:
            return shown, matcher.stop
    return shown + matcher.finish(), matcher.stop


@given(texts, stop_lists, st.booleans(), st.lists(st.integers(0, 40)))
def test_any_cutting_into_pieces_shows_the_same_text(
    text: str, stops: list[str], include: bool, cuts: list[int]
) -> None:
    edges = [0, *sorted(min(c, len(text)) for c in cuts), len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(edges)]
    assert feed(StopMatcher(stops, include), pieces) == cut(text, stops, include)


@given(texts, stop_lists)
def test_holds_back_exactly_the_longest_beginning_of_a_stop_string(text: str, stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    shown, stopped = matcher.push(text)
    if not stopped:
        beginnings = {stop[:n] for stop in stops for n in range(len(stop))}
        held = max((b for b in beginnings if text.endswith(b)), key=len, default="")
        assert text == shown + held
        assert matcher.finish() == held


@pytest.mark.fault("F23")
@pytest.mark.parametrize("filler", ["a", " "])
def test_many_long_stop_strings_cost_two_searches_a_character(filler: str) -> None:
    """The worst case for a search that starts again: 64 stop strings of 1024 characters, almost complete. Each was
    matched by itself, 64 steps a character."""

    class Counted(StopMatcher):
        searches = 0

        def _begins(self, text: str) -> bool:
            self.searches += 1
            return super()._begins(text)

    matcher = Counted([filler * (1023 - i) + "b" for i in range(64)])
    text = filler * 2000 + "c"
    assert feed(matcher, [*text]) == (text, None)
    assert 0 < matcher.searches <= 2 * len(text)


def test_samples_share_what_is_made_of_a_stop_string() -> None:
    """64 strings of 1024 characters took 1.9 MB a sample: 1 GB for one request, and 12 s of the event loop."""
    stops = [f"{at:04d}" * 256 for at in range(64)]
    kept = [StopMatcher(stops)]
    tracemalloc.start()
    kept += [StopMatcher(stops) for _ in range(50)]
    taken = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert taken < 50 * 64 * 256
