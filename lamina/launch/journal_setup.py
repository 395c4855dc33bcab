"""A journal for an engine that is being put together, and what an engine before has left in it.

Knows config, journal and engine by their constructors; what is done with records, `recorder` and `recovery` know.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping

from lamina.config import EngineConfig
from lamina.engine.engine import Engine
from lamina.journal.journal import Facts, Journal, Run
from lamina.journal.recorder import Recorder, found
from lamina.messages.engine_request import EngineRequest
from lamina.scheduling.placement import Placement
from lamina_protocols.messages import HolderConfig, Surveyed
from lamina_workers.model_worker.interface import Workers
from lamina_workers.parallel.peers import Peer

logger = logging.getLogger("lamina")

_EPOCHS = 1 << 20  # between two starts: more than an engine has, so that a holder that comes late knows no newer one


def open_journal(config: EngineConfig, model: str, holder: HolderConfig, run: Run | None = None) -> Journal | None:
    """The journal that the config asks for. `model` is the model's fingerprint, `run` as for `Journal`. Raises
    JournalError."""
    if config.journal is None:
        return None
    layers = tuple(spec.policies for spec in holder.layers)
    policies = "full" if not any(layers) else json.dumps(layers)
    scaling = json.dumps(dict(config.rope_scaling), sort_keys=True, default=str) if config.rope_scaling else "none"
    return Journal(
        config.journal,
        Facts(model, holder.page_size, holder.dtype, len(holder.layers), policies=policies, rope_scaling=scaling),
        run,
    )


def past_epochs(journal: Journal | None) -> int:
    """The last epoch that an engine before can have had."""
    return 0 if journal is None else (journal.starts - 1) * _EPOCHS


def recover(
    journal: Journal,
    engine: Engine,
    recorder: Recorder,
    worker: Workers[Peer],
    placement: Placement,
    surveys: Mapping[int, Surveyed],
) -> tuple[EngineRequest, ...]:
    """Have a new engine go on with what the journal's engine before had not finished. `surveys` are what holders, by
    number, keep. Returns the requests."""
    handles = [part.handle for surveyed in surveys.values() for part in surveyed.parts]
    known = [part[2] for each in journal.history.requests.values() for s in each.samples for part in s.parts]
    placement.number_parts_from(max([*handles, *known, past_epochs(journal)]))
    epochs = [surveyed.last_epoch for surveyed in surveys.values()]
    worker.begin_after(max([*epochs, past_epochs(journal)]))
    handles = [sample.handle for each in journal.history.requests.values() for sample in each.samples]
    unfinished = engine.recover(found(surveys, placement, worker.address), max(handles, default=0))
    if unfinished:
        logger.warning("%d requests of an engine before go on", len(unfinished))
    return unfinished
