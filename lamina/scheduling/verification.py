"""Which drafts of a row are accepted. Pure.

A token is a function of its logits, of the seed and of its position (`sampler.py`). So a draft is right where it equals
the token that is sampled at its position, and the text is the same, token for token, as without drafts. A draft that
does not depend on the random number is accepted with the probability that the model gives it, as in rejection sampling.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

from lamina.scheduling.request import ScheduledSequence


def verified(drafts: Sequence[int], sampled: Sequence[int | None]) -> list[int]:
    """The new tokens: the drafts that are accepted, and one more. `sampled` has one token more than there are drafts.

    None in it, where logits allow no token, ends them before: as the first token of its row it is sampled again."""
    tokens: list[int] = []
    for draft, token in zip_longest(drafts, sampled):
        if token is None:
            break
        tokens.append(token)
        if token != draft:
            break
    return tokens


def before_the_end(sequence: ScheduledSequence, drafts: tuple[int, ...]) -> tuple[int, ...]:
    """The drafts before the first that would end the sequence, or cannot come yet: it need not be fed to be sampled."""
    stops = sequence.request.stop_token_ids
    return drafts[: next((at for at, draft in enumerate(drafts) if draft in stops), len(drafts))]
