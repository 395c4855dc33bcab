"""The journal of an engine that starts: which engine this is, and what the previous engine left unfinished."""

from __future__ import annotations

import errno
import json
import logging
import secrets
from collections.abc import Mapping
from dataclasses import dataclass

from lamina.config import EngineConfig
from lamina.engine.engine import Engine
from lamina.errors import JournalError
from lamina.journal.journal import Facts, Journal, Run
from lamina.journal.recorder import Recorder, found
from lamina.kv.placement import Placement
from lamina.messages.engine_request import EngineRequest
from lamina_protocols.messages.layers import HolderConfig
from lamina_protocols.messages.messages import Surveyed
from lamina_workers.model_worker.interface import Workers
from lamina_workers.parallel.peers import Peer

logger = logging.getLogger("lamina")

_TAKES_NOTHING = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}  # errors of a disk that is full or read-only
_PARTS = 1 << 40  # more than an engine opens
_EPOCHS = 1 << 20  # between two starts: more than an engine has, so that a holder that joins late knows no newer epoch


@dataclass(frozen=True, slots=True)
class Identity:
    """Which engine this is for its workers. `engine` is the id by which they keep its KV, None where they need not, for
    `linger` seconds after it is gone. Epochs up to `past_epochs` are those of previous engines; workers refuse them."""

    engine: str | None = None
    past_epochs: int = 0
    linger: float = 0.0


def open_journal(config: EngineConfig, model: str, holder: HolderConfig, run: Run | None = None) -> Journal | None:
    """The journal that the config asks for; none where the disk takes nothing, as later. `model` is the
    model's fingerprint, `run` is as in `Journal`. Raises JournalError."""
    if config.journal is None:
        return None
    layers = tuple(spec.policies for spec in holder.layers)
    policies = "full" if not any(layers) else json.dumps(layers)
    scaling = json.dumps(dict(config.rope_scaling), sort_keys=True, default=str) if config.rope_scaling else "none"
    facts = Facts(model, holder.page_size, holder.dtype, len(holder.layers), policies=policies, rope_scaling=scaling)
    try:
        return Journal(config.journal, facts, run)
    except JournalError as error:
        if getattr(error.__cause__, "errno", None) not in _TAKES_NOTHING:
            raise
        logger.error("%s; an engine that dies is not gone on from", error)
        return None


def identify(config: EngineConfig, journal: Journal | None) -> Identity:
    """The identity of the engine that starts with this journal."""
    if journal is not None:
        return Identity(journal.engine, _past_epochs(journal), config.worker_linger)
    # No engine comes back for its KV, which would keep the next one away. One of its ranks may come back.
    linger = config.worker_linger if config.ranks > 1 else 0.0
    return Identity(secrets.token_hex(16) if config.model_workers > 1 else None, linger=linger)


def _past_epochs(journal: Journal) -> int:
    """The last epoch that a previous engine can have had."""
    return (journal.starts - 1) * _EPOCHS


def recover(
    journal: Journal,
    engine: Engine,
    recorder: Recorder,
    worker: Workers[Peer],
    placement: Placement,
    surveys: Mapping[int, Surveyed],
) -> tuple[EngineRequest, ...]:
    """Have a new engine go on with the requests that the journal's previous engine left unfinished, and return them.
    `surveys` is what holders keep, by number."""
    handles = [part.handle for surveyed in surveys.values() for part in surveyed.parts]
    epochs = [surveyed.last_epoch for surveyed in surveys.values()]
    past = _past_epochs(journal)
    highest_number = max(
        [
            past,
            *(
                part.handle
                for request in journal.history.requests.values()
                for s in request.samples
                for part in s.parts
            ),
        ]
    )
    # A holder that claims absurd numbers may refuse new ones: all others would refuse any that are larger still.
    placement.number_from(0, max([highest_number, *(handle for handle in handles if handle < highest_number + _PARTS)]))
    worker.begin_after(max([past, *(epoch for epoch in epochs if epoch < past + _EPOCHS)]))
    handles = [sample.handle for request in journal.history.requests.values() for sample in request.samples]
    unfinished = engine.recover(found(surveys, placement, worker.address), max(handles, default=0))
    if unfinished:
        logger.warning("%d requests of the previous engine go on", len(unfinished))
    return unfinished
