"""What an engine before has begun, in the hands of a new one: who comes back for it, and what goes on unasked.

For the engine's thread. Knows the recorder and the scheduler; knows nothing of batches.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

from lamina.errors import LaminaError
from lamina.journal.history import GONE, KvLocation, RecoveredRequest
from lamina.messages.engine_request import EngineOutput, EngineRequest
from lamina.scheduling.request import RetainedKv

if TYPE_CHECKING:
    from lamina.journal.recorder import Recorder
    from lamina.scheduling.scheduler import Scheduler
    from lamina.text.structured_output import Grammars

logger = logging.getLogger("lamina")


class Begun(NamedTuple):
    """A request that goes on: the tokens of its samples that have not ended, and what holders have of their KV."""

    ticket: EngineRequest
    known: Mapping[int, list[int]]
    kept: Mapping[int, RetainedKv]


class Resumption:
    """Without a `recorder` nothing is known of an engine before, and clients are all there is to go by."""

    def __init__(self, recorder: Recorder | None, scheduler: Scheduler, grammars: Grammars | None) -> None:
        self._recorder = recorder
        self._scheduler = scheduler
        self._grammars = grammars
        self._gone = False  # whether a holder of something that was adopted is not there
        self._unclaimed: dict[str, EngineRequest] = {}  # those for which no client has come yet

    def __contains__(self, ticket: EngineRequest) -> bool:
        """Whether nobody has come for it: then it stays in the journal, however the engine ends."""
        return ticket.request.id in self._unclaimed

    def unfinished(self, found: Mapping[KvLocation, RecoveredRequest]) -> Iterator[Begun]:
        """All that the journal has, each to be queued before the next is asked for."""
        if self._recorder is None:
            return
        for ticket, known in self._recorder.unfinished():
            request = ticket.request
            try:
                self._scheduler.validate(request)
                if ticket.params.constrained and self._grammars is not None:
                    ticket.constraints = self._grammars.constraints(ticket.params, request.n)
            except LaminaError as error:
                logger.warning("request %s of an engine before cannot go on: %s", request.id, error)
                self._recorder.drop(request.id)
                continue
            self._unclaimed[request.id] = ticket
            kept = {sample: adopted.kept for sample, adopted in self._recorder.adopt(known, found).items()}
            self._gone |= any(share.holder == GONE for each in kept.values() for share in each.layout)
            yield Begun(ticket, known.known, kept)

    def rebuild(self) -> None:
        """Have what is gone of what was adopted computed again, once it is known how much room there is."""
        if self._gone:
            self._scheduler.lost(GONE)

    def claim(self, ticket: EngineRequest, old: EngineRequest | None) -> list[EngineOutput] | None:
        """What a client that comes back has not received; `old` is what the engine has under way by that id, which
        `ticket` is to replace. None where all after what was received must be computed: it is not known here."""
        self._unclaimed.pop(ticket.request.id, None)
        missing = None if self._recorder is None else self._recorder.missing(ticket)
        if missing is not None and old is not None:
            ticket.sequences, ticket.unfinished, ticket.spared = old.sequences, old.unfinished, old.spared
            ticket.scheduled, ticket.cached_tokens = old.scheduled, old.cached_tokens
        return missing

    def anew(self, ticket: EngineRequest) -> Mapping[int, tuple[int, ...]]:
        """The tokens from which a request that is not known here goes on, by sample."""
        if self._recorder is not None:
            self._recorder.drop(ticket.request.id)
        return {at: tokens for at, (tokens, ended) in enumerate(ticket.received or ()) if not ended}

    def disclaim(self) -> list[EngineRequest]:
        """Those for which nobody has come: nobody will."""
        left = list(self._unclaimed.values())
        self._unclaimed.clear()
        for ticket in left:
            if self._recorder is not None:
                self._recorder.claimed(ticket.request.id)
        return left
