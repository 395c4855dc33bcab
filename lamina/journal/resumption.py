"""How a new engine goes on with the previous engine's requests, which the journal has or clients bring back.

For the engine's thread.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from lamina.errors import LaminaError
from lamina.journal.history import KvLocation, RecoveredHolder
from lamina.kv.kv_shares import GONE
from lamina.kv.request import RetainedKv
from lamina.messages.engine_request import EngineOutput, EngineRequest
from lamina.scheduling.blame import TRIES

if TYPE_CHECKING:
    from lamina.journal.recorder import Recorder
    from lamina.scheduling.scheduler import Scheduler
    from lamina.text.structured_output import Grammars

logger = logging.getLogger("lamina")


class Begun(NamedTuple):
    """A request that goes on: the tokens of its unfinished samples, how many tokens of each had KV, what holders have
    of it, and how many engines may have died of the request since its last token."""

    request: EngineRequest
    known: Mapping[int, list[int]]
    computed: Mapping[int, int]
    kept: Mapping[int, RetainedKv]
    deaths: int


class Resumption:
    """Without a `recorder` there are only the requests that clients bring back."""

    def __init__(self, recorder: Recorder | None, scheduler: Scheduler, grammars: Grammars | None) -> None:
        self._recorder = recorder
        self._scheduler = scheduler
        self._grammars = grammars
        self._parts_lost = False  # whether a part of an adopted sequence is lost
        self._unclaimed: dict[str, EngineRequest] = {}  # for which no client has come yet
        self._deadly: set[str] = set()  # requests that are not taken up, since engines died of them

    def __contains__(self, request: EngineRequest) -> bool:
        """Whether no client has come for a request: then it stays in the journal, however the engine ends."""
        return request.id in self._unclaimed

    def unfinished(self, found: Mapping[KvLocation, RecoveredHolder]) -> Iterator[Begun]:
        """The journal's requests. The caller queues each one before it takes the next."""
        if self._recorder is None:
            return
        for request, entry in self._recorder.unfinished():
            deaths = entry.deaths
            if deaths >= TRIES:
                logger.error("request %s is not taken up: %d engines died of it", request.id, deaths)
                self._deadly.add(request.id)
                self._recorder.drop(request.id)
                continue
            try:
                self._scheduler.validate(request.request, taken=True)
                if request.params.constrained and self._grammars is not None:
                    request.constraints = self._grammars.constraints(request.params, request.request.n)
            except LaminaError as error:
                logger.warning("request %s of the previous engine cannot go on: %s", request.id, error)
                self._recorder.drop(request.id)
                continue
            self._unclaimed[request.id] = request
            computed = {index: sample.computed for index, sample in enumerate(entry.samples)}
            anew = _lacks_scores(request, (sample.tokens for sample in entry.samples))
            adopted = {} if anew else self._recorder.adopt(entry, found)
            retained = {sample: part.kept for sample, part in adopted.items()}
            self._parts_lost |= any(share.holder == GONE for part in retained.values() for share in part.layout)
            yield Begun(request, entry.known, computed, retained, deaths)

    def rebuild(self) -> None:
        """Have the lost parts of adopted sequences computed again, after holders have said how much room they have."""
        if self._parts_lost:
            self._scheduler.lost(GONE)

    def is_deadly(self, request: EngineRequest) -> bool:
        """Whether a client comes back for a request of which engines died."""
        return request.id in self._deadly

    def claim(self, request: EngineRequest, old: EngineRequest | None) -> list[EngineOutput] | None:
        """The outputs that a client which comes back has not received. `old` is the engine's unfinished request of that
        id, which `request` replaces. None where the journal does not have it, so that all further tokens are
        computed."""
        self._unclaimed.pop(request.id, None)
        missing = None
        if self._recorder is not None and not _lacks_scores(request, (tokens for tokens, _ in request.received or ())):
            missing = self._recorder.missing(request)
        if missing is not None and old is not None:
            request.sequences, request.unfinished, request.spared = old.sequences, old.unfinished, old.spared
            request.scheduled, request.cached_tokens = old.scheduled, old.cached_tokens
        return missing

    def anew(self, request: EngineRequest) -> Mapping[int, tuple[int, ...]]:
        """The tokens from which a request goes on that the journal does not have, by sample."""
        if self._recorder is not None:
            self._recorder.drop(request.id)
        return {index: tokens for index, (tokens, ended) in enumerate(request.received or ()) if not ended}

    def disclaim(self) -> list[EngineRequest]:
        """The requests for which no client has come. They are not kept for one any longer."""
        requests = list(self._unclaimed.values())
        self._unclaimed.clear()
        for request in requests:
            if self._recorder is not None:
                self._recorder.claimed(request.id)
        return requests


def _lacks_scores(request: EngineRequest, tokens: Iterable[Sequence[int]]) -> bool:
    """Whether scores of a prompt are wanted that the client may not have whole: they come before the first of its
    `tokens`, and the journal does not have them. Then the prompt is computed anew."""
    return request.request.scored_from is not None and not any(tokens)
