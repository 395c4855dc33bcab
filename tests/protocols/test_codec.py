"""Frames: tensors come back bit for bit, and nothing malformed gets through. Any message and any bytes are in
`test_codec_fuzz`."""

from __future__ import annotations

import struct

import msgpack
import pytest
import torch

from lamina_protocols.errors import ProtocolError
from lamina_protocols.frames import codec
from lamina_protocols.frames.frames import LAYOUT
from lamina_protocols.messages import messages as m


def whole(message: m.Message) -> bytearray:
    return bytearray(b"".join(codec.encode(message)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8])
@pytest.mark.parametrize("n", [0, 1, 37])
def test_tensors_come_back_bit_for_bit(dtype, n):
    k, v = (torch.randint(-99, 99, (n, d)).to(dtype) for d in (5, 16))
    back = codec.decode(whole(m.Fresh(1, 2, 3, k, v)))
    assert isinstance(back, m.Fresh)
    assert (back.epoch, back.batch, back.layer) == (1, 2, 3)
    assert back.k.dtype == back.v.dtype == dtype
    assert torch.equal(back.k, k)
    assert torch.equal(back.v, v)


@pytest.mark.parametrize("seconds", [-1.0, float("nan"), float("inf")])
def test_seconds_of_states_that_no_clock_says_are_refused(seconds):
    with pytest.raises(ProtocolError, match=r"seconds|finite"):
        codec.decode(whole(m.Advanced(1, 2, 3, torch.zeros(2, 16), seconds)))


def test_tensors_share_memory_with_frame_and_message():
    q = torch.arange(8.0).view(2, 4)
    buffers = codec.encode(m.Query(0, 0, 0, q))
    q[0, 0] = 42
    frame = bytearray(b"".join(buffers))
    back = codec.decode(frame)
    assert isinstance(back, m.Query)
    assert back.q[0, 0] == 42
    frame[-4:] = struct.pack("<f", -7)
    assert back.q[1, 3] == -7


def test_header_of_a_layers_message_is_short():
    for message in (m.Query(9, 1 << 20, 79, torch.zeros(64 * 64, 128)), m.Attended(9, 1 << 20, 79, *_attended())):
        assert len(codec.encode(message)[0]) <= 64


def _attended():
    return torch.zeros(64 * 64, 128), torch.zeros(64 * 64)


def frame_of(tag: int, header: bytes, payload: bytes = b"") -> bytearray:
    return bytearray(struct.pack("<4sHHIQ", b"LMNA", LAYOUT, tag, len(header), len(payload)) + header + payload)


@pytest.mark.parametrize(
    ("tag", "header"),
    [
        (1, b"\xdd\xff\xff\xff\xff"),  # an array that claims 2^32 items in 5 bytes
        (1, b"\x91" * 5000),  # nested 5,000 deep
        (2, msgpack.packb([1, 2, 1, 3, [], ""])),  # 1 is not true
        (2, msgpack.packb([1, 2, True, -3, [], ""])),
        (2, msgpack.packb([1, 2, True, 3, {}, ""])),
        (6, msgpack.packb([1, 2, b"bytes"])),
        (6, msgpack.packb([1, 2, msgpack.ExtType(4, b"x")])),
        (1, msgpack.packb([1, 2, 3, [[7, 1]], []])),  # no such operation
        (1, msgpack.packb([1, 2, 3, [], [[1, 2, 3, [5, 4], True]]])),  # a range that ends before it begins
        (13, msgpack.packb([1, 2, 3, ["float64", 1]])),
        (13, msgpack.packb([1, 2, 3, ["f32", 1 << 40, 1 << 40]])),
        (13, msgpack.packb([1, 2, 3, ["f32", -1]])),
        (13, msgpack.packb([1, 2, 3, ["f32", 2]])),  # no bytes there
        (3, msgpack.packb([1, 2, 3, ["f32", 0]])),  # a layer's frame has no msgpack
        (10, msgpack.packb([1, 2])),
        (10, msgpack.packb([1, 2, -1])),
        (11, msgpack.packb([1, 2, 3, 4, [[1, [0], 0, 9, 5]], 0])),  # a part without its floor
        (11, msgpack.packb([1, 2, 3, 4, [[1, 0, 0, 9, 5, 0]], 0])),  # heads that are no list
        (11, msgpack.packb([1, 2, 3, 4, None, 0])),
        (99, msgpack.packb([])),
    ],
)
def test_lying_headers_are_refused(tag, header):
    with pytest.raises(ProtocolError):
        codec.decode(frame_of(tag, header))


def test_a_survey_of_as_many_parts_as_are_sent_at_once_fits_a_header():
    part = m.PartHeld(1 << 60, 0, (0,), 0, 9, 5, 0)
    most = m.Surveyed(1, 2, 3, 4, (part,) * m.MAX_PARTS)
    assert codec.decode(whole(most)) == most


def test_another_layout_is_refused_naming_both():
    frame = whole(m.Fault(1, 2, "x"))
    frame[4:6] = struct.pack("<H", 77)
    with pytest.raises(ProtocolError, match=rf"77.*{LAYOUT}"):
        codec.decode(frame)


def test_a_dtype_without_a_name_is_refused():
    with pytest.raises(ProtocolError, match="float64"):
        codec.encode(m.Query(0, 0, 0, torch.zeros(1, dtype=torch.float64)))
