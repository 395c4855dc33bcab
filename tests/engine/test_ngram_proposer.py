"""Drafts from n-grams: against a search of the whole text, and for texts that repeat or copy."""

from __future__ import annotations

import random

from lamina.engine.drafting import LONGEST, NgramProposer, Wanted
from lamina.kv.request import Request, ScheduledSequence
from lamina.messages.engine_request import EngineRequest
from lamina.sampling_params import SamplingParams


def _wanted(tokens: list[int], depth: int) -> Wanted:
    request = Request("r", tuple(tokens[:1]), 1 << 20)
    return Wanted(ScheduledSequence(request, 0, 0, tokens), EngineRequest(request, SamplingParams(), 0), depth)


def _drafts(tokens: list[int], depth: int) -> tuple[int, ...]:
    return NgramProposer().propose([_wanted(tokens, depth)])[0]


def test_what_followed_the_last_tokens_is_proposed() -> None:
    assert _drafts([5, 6, 7, 8, 9, 1, 5, 6, 7], 4) == (8, 9, 1, 5)


def test_without_a_match_there_is_no_draft() -> None:
    assert _drafts([1, 2, 3, 4], 4) == ()
    assert _drafts([1], 4) == ()


def test_short_matches_give_few_drafts() -> None:
    assert _drafts([1, 2, 3, 4, 5, 9, 2], 4) == (3,)
    assert _drafts([1, 2, 3, 4, 5, 9, 2, 3], 4) == (4, 5)


def test_the_longer_match_wins_over_the_later_one() -> None:
    assert _drafts([1, 2, 3, 4, 50, 2, 60, 1, 2], 1) == (3,)
    assert _drafts([7, 1, 2, 3, 4, 9, 1, 2, 3, 5, 1, 2, 3], 1) == (5,), "of equals the later one"


def test_a_text_that_repeats_itself_goes_on() -> None:
    assert _drafts([9, 1, 2, 1, 2, 1, 2], 6) == (1, 2, 1, 2, 1, 2)
    assert _drafts([3, 3, 3, 3], 5) == (3, 3, 3, 3, 3)


def test_what_is_copied_is_copied_further() -> None:
    text = [random.Random(1).randrange(50) for _ in range(40)]
    decoy = [text[7], text[8], text[9], 99]  # later, and of the same three tokens
    tokens = [*text, *decoy, *text[4:8]]
    proposer, wanted = NgramProposer(), _wanted(tokens, 2)
    assert proposer.propose([wanted])[0] == tuple(text[8:10])
    tokens += text[8:10]
    assert proposer.propose([wanted])[0] == tuple(text[10:12])


def _searched(tokens: list[int]) -> int:
    """The length of the longest match of at most three tokens, by a search of the whole text."""
    for size in range(min(LONGEST, len(tokens) - 1), 0, -1):
        if any(tokens[at - size : at] == tokens[-size:] for at in range(size, len(tokens))):
            return size
    return 0


def test_a_match_is_found_where_a_search_finds_one() -> None:
    draw = random.Random(2)
    for alphabet in (2, 5, 30):
        tokens = [draw.randrange(alphabet)]
        proposer, wanted = NgramProposer(), _wanted(tokens, 16)
        for _ in range(150):
            tokens += [draw.randrange(alphabet) for _ in range(draw.randrange(3))]
            drafts, size = proposer.propose([wanted])[0], _searched(tokens)
            assert bool(drafts) == bool(size)
            assert size < LONGEST or len(drafts) == 16
            if drafts:
                followed = [tokens[at] for at in range(1, len(tokens)) if tokens[at - 1] == tokens[-1]]
                assert drafts[0] in followed


def test_a_sequence_that_ended_is_forgotten() -> None:
    proposer, wanted = NgramProposer(), _wanted([1, 2, 1], 2)
    assert proposer.propose([wanted])[0]
    proposer.ended(wanted.sequence)
    proposer.ended(wanted.sequence)
    del wanted.sequence.tokens[1:]
    assert proposer.propose([wanted])[0] == ()
