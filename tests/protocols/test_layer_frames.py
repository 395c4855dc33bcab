"""The layout of a layer's frames: what compiled code is told of it is what the codec writes."""

from __future__ import annotations

import struct

import pytest
import torch

from lamina_kernels.exchange import exchange_blocks
from lamina_protocols.errors import ProtocolError
from lamina_protocols.frames import codec, layer_frames
from lamina_protocols.messages import messages as m

Q, K, V = torch.arange(48.0).view(3, 16), torch.ones(2, 16).bfloat16(), torch.ones(2, 8).bfloat16()
MESSAGES = [
    m.Query(5, 6, 7, Q),
    m.Fresh(5, 6, 7, K, V),
    m.Exchange(5, 6, 7, Q, K, V),
    m.Attended(5, 6, 7, Q, torch.zeros(3), 0.5),
]


def whole(message: m.Message) -> bytes:
    return b"".join(codec.encode(message))


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_tensors_stand_where_the_layout_says(message):
    frame, data = layer_frames.frame_of(message), whole(message)
    assert len(data) == frame.size
    for name, place in frame.places().items():
        tensor = getattr(message, name)
        assert place.at % 64 == 0
        assert data[place.at : place.at + place.size] == bytes(tensor.contiguous().view(torch.uint8).numpy())


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_layers_of_a_batch_differ_in_the_last_eight_bytes_of_the_header_alone(message):
    frame = layer_frames.frame_of(message)
    first, other = frame.head(0), frame.head(77, 0.5)
    at = layer_frames.LAYER_AT
    assert first[:at] == other[:at]
    assert len(first) == layer_frames.HEAD_SIZE == 64
    assert struct.unpack_from("<If", other, at) == (77, 0.5)
    assert struct.unpack_from("<f", other, layer_frames.SECONDS_AT) == (0.5,)


def test_compiled_code_reads_headers_where_they_are_written():
    assert (exchange_blocks.HEAD, exchange_blocks.SAME) == (layer_frames.HEAD_SIZE, layer_frames.LAYER_AT)
    assert layer_frames.SECONDS_AT == exchange_blocks.SAME + 4


@pytest.mark.parametrize(
    ("message", "name"),
    [
        (m.Exchange(1, 2, 3, Q, K, V[:1]), "v"),
        (m.Fresh(1, 2, 3, K, V.float()), "v"),
        (m.Attended(1, 2, 3, Q, torch.zeros(2)), "lse"),
        (m.Attended(1, 2, 3, Q, torch.zeros(3, 1)), "lse"),
    ],
)
def test_tensors_that_do_not_fit_together_are_not_sent(message, name):
    with pytest.raises(ProtocolError, match=rf"'s {name} is .*it must be"):
        codec.encode(message)


@pytest.mark.parametrize("layer", [-1, 1 << 32])
def test_a_layer_that_the_header_cannot_hold_is_refused(layer):
    with pytest.raises(ProtocolError, match=str(layer)):
        codec.encode(m.Query(1, 2, layer, Q))
