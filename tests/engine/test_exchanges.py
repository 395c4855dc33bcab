"""The text of an engine whose holders are behind channels, exchanged by compiled code and by Python: that of one
process, however KV is cut and whoever dies in between."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from engine_rig import Rig
from exchange_peers import EXCHANGES, Joints, exchanged
from pairwise import crossing

from lamina_workers.decoder.model import Decoder
from lamina_workers.model_worker.attention_merge import LayerExchange

rng = random.Random(23)
PROMPTS = [[rng.randrange(101) for _ in range(n)] for n in (1, 16, 33, 150)]
SAMPLING = {"temperature": 0.9, "top_p": 0.9, "seed": 11, "max_tokens": 24}
HEADS_ON_TWO: dict[str, Any] = {"shard": "heads", "weights": (1, 1)}
PLACEMENTS: dict[str, dict[str, Any]] = {
    "one holder": {"shard": "heads"},
    "one holder, fused": {},
    "heads on two": HEADS_ON_TWO,
    "heads on three, prompts local": {"shard": "heads", "weights": (2, 1, 1), "local_pool": 60},
    "ranges on three": {"shard": "sequence", "weights": (1, 1, 1)},
    "heads and ranges": {"shard": "heads+sequence", "weights": (1, 1, 1, 2), "local_pool": 60},
    "heads on two and some here": HEADS_ON_TWO | {"local_pool": 100, "local_tier": True},
}
MODELS = ("full", "windowed")
TRANSPORTS = ("tcp", "tcp+sum", "tcp+tls", "grpc", "grpc+tls")


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, decoder: Decoder, windowed: Decoder) -> Decoder:
    return decoder if request.param == "full" else windowed


@pytest.fixture(scope="module")
def expected(model: Decoder) -> list[list[list[int]]]:
    """From one process, without compiled exchanges."""
    with exchanged("python"):
        rig = Rig(model)
        said = rig.generate(PROMPTS, **SAMPLING)
        rig.close()
    return said


def said(model: Decoder, way: str, transport: str, **options: Any) -> list[list[list[int]]]:
    with exchanged(way), Joints(transport) as joints:
        rig = Rig(model, port=joints, max_batch_tokens=64, **options)
        try:
            return rig.generate(PROMPTS, **SAMPLING)
        finally:
            rig.engine.close()
            joints.close()
            rig.close()


@crossing(("model",), model=MODELS, way=EXCHANGES, placement=PLACEMENTS, lanes=(1, 2))
def test_text_is_that_of_one_process_however_kv_is_cut(model, expected, way, placement, lanes) -> None:
    assert said(model, way, "local", lanes=lanes, **placement) == expected


def test_text_of_one_process_is_the_same_by_compiled_code(model, expected) -> None:
    with exchanged("compiled"):
        rig = Rig(model, max_batch_tokens=64)
        assert rig.generate(PROMPTS, **SAMPLING) == expected
        rig.close()


@crossing(("model",), model=MODELS, way=EXCHANGES, transport=TRANSPORTS)
def test_text_is_that_of_one_process_over_every_channel(model, expected, way, transport) -> None:
    assert said(model, way, transport, lanes=2, **HEADS_ON_TWO) == expected


@crossing(("model",), model=MODELS, way=EXCHANGES, layer=(0, 1, 2), lanes=(1, 2))
def test_text_is_that_of_one_process_when_a_holder_dies_at_a_layer(
    model, expected, way, layer, lanes, monkeypatch
) -> None:
    begin, seen = LayerExchange.begin, 0

    def dies(self: LayerExchange, number: int, q: torch.Tensor) -> None:
        nonlocal seen
        begin(self, number, q)
        seen += number == layer
        if seen == 15 and not joints.made[1].leaving:
            joints.made[1].leaving = True
            joints.made[1].kill()

    monkeypatch.setattr(LayerExchange, "begin", dies)
    with exchanged(way), Joints() as joints:
        rig = Rig(model, port=joints, max_batch_tokens=64, lanes=lanes, shard="heads", weights=(1, 1, 1))
        try:
            assert rig.generate(PROMPTS, **SAMPLING) == expected
            assert joints.made[1].port.closed
        finally:
            rig.engine.close()
            joints.close()
            rig.close()
