"""The text of an engine is that of one process, whatever keeps KV for it and whatever happens meanwhile."""

from __future__ import annotations

import pytest
from engine_events import EVENTS, PLACEMENTS, WORKERS, expected, staged
from pairwise import crossing
from tiny_decoders import MODELS


@pytest.mark.fault("F01")
@crossing(model=MODELS, placement=tuple(PLACEMENTS), workers=tuple(WORKERS), event=tuple(EVENTS))
def test_text_is_that_of_one_process(model: str, placement: str, workers: str, event: str) -> None:
    happens = EVENTS[event]
    with staged(model, placement, workers, happens) as stage:
        happens.prepare(stage)
        streams = stage.stream()
        streams.read(1)
        happens.happen(stage, streams)
        assert streams.tokens() == expected(model)
        happens.check(stage)
