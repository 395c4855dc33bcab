"""The frame decoder against bytes that nobody vouches for: an answer soon and in little memory, or `ProtocolError`."""

from __future__ import annotations

import gc
import struct
import time
import tracemalloc
from typing import get_args

import msgpack
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lamina_protocols.errors import ProtocolError
from lamina_protocols.frames import codec
from lamina_protocols.frames.frames import LAYOUT
from lamina_protocols.messages import messages as m
from lamina_protocols.messages.messages import FetchedSample, FetchSample, Sample

_PREFIX = struct.Struct("<4sHHIQ")
TAGS = range(max(codec._MESSAGES) + 2)
DEADLINE = 0.5  # seconds of a thread; a header of 512 KiB takes a tenth of it on a slow machine
_n = st.integers(0, 5)
_tensor = st.tuples(
    _n, st.integers(1, 40), st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.uint8])
).map(lambda shape: torch.arange(shape[0] * shape[1]).view(shape[0], shape[1]).to(shape[2]))
_int = st.integers(0, 2**62 - 1)
_layer = st.integers(0, 2**32 - 1)
_dtype = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


@st.composite
def _layered(draw):
    """A message of a layer's exchange, whose tensors fit together."""
    numbers = draw(_int), draw(_int), draw(_layer)
    queries, fresh, d_k, d_v = draw(_n), draw(_n), draw(st.integers(1, 40)), draw(st.integers(1, 40))
    dtype, kv_dtype = draw(_dtype), draw(_dtype)
    q, k, v = (
        torch.arange(n * d).view(n, d).to(kind)
        for n, d, kind in ((queries, d_k, dtype), (fresh, d_k, kv_dtype), (fresh, d_v, kv_dtype))
    )
    return draw(
        st.sampled_from(
            [
                m.Query(*numbers, q),
                m.Fresh(*numbers, k, v),
                m.Exchange(*numbers, q, k, v),
                m.Attended(*numbers, torch.zeros(queries, d_v, dtype=dtype), torch.arange(queries).float(), 0.25),
            ]
        )
    )


def _several(items):
    return st.lists(items, max_size=3).map(tuple)


_ints = _several(_int)
_operations = (
    st.builds(m.Open, _int, _int, _ints, _int, _int) | st.builds(m.Fork, _int, _int, _int) | st.builds(m.Close, _int)
)
_reads = st.none() | st.tuples(_int, _int).map(lambda x: tuple(sorted(x)))
_rows = st.builds(m.Row, _int, _int, _int, _reads, st.booleans(), st.booleans(), _int)
_parts = st.builds(m.PartHeld, _int, _int, _ints, _int, _int, _int, _int)
MESSAGES = {  # how each is drawn; those of a layer are `_layered`
    m.Fetched: st.builds(m.Fetched, _int, _int, _int, _tensor, _tensor),
    m.Fetch: st.builds(m.Fetch, *[_int] * 6),
    m.FetchPages: st.builds(m.FetchPages, *[_int] * 7),
    Sample: st.builds(Sample, *[_int] * 4, _ints, _ints, _tensor),
    FetchSample: st.builds(FetchSample, *[_int] * 6),
    FetchedSample: st.builds(FetchedSample, *[_int] * 3, _ints, _ints, _tensor),
    m.FetchedPages: st.builds(m.FetchedPages, _int, _int, _int, _tensor),
    m.FreshPages: st.builds(m.FreshPages, *[_int] * 5, _tensor),
    m.Constants: st.builds(m.Constants, _int, _int, _int, _tensor, _tensor, _tensor),
    m.Advance: st.builds(m.Advance, _int, _int, _int, _tensor, _tensor),
    m.Advanced: st.builds(m.Advanced, _int, _int, _int, _tensor, st.floats(0, allow_infinity=False)),
    m.Fault: st.builds(m.Fault, _int, _int, st.text()),
    m.Announcement: st.builds(m.Announcement, _int, _int, _int, _several(_operations), _several(_rows)),
    m.Announced: st.builds(m.Announced, _int, _int, st.booleans(), _ints, _ints, st.text(), samples=_ints),
    m.Survey: st.builds(m.Survey, _int, _int, _int),
    m.Surveyed: st.builds(m.Surveyed, _int, _int, _int, _int, _several(_parts), _int),
    m.BlockTables: st.builds(m.BlockTables, _int, _int, _int, _tensor, _tensor, _tensor),
}
_messages = st.one_of(_layered(), *MESSAGES.values())
_plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=8),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=20,
)


def whole(message: m.Message) -> bytearray:
    return bytearray(b"".join(codec.encode(message)))


def framed(tag: int, header: bytes, payload: bytes = b"") -> bytearray:
    prefix = _PREFIX.pack(b"LMNA", LAYOUT, tag, len(header), len(payload))
    return bytearray(prefix + header + payload)


def decoded(frame: bytearray) -> m.Message | None:
    """What `frame` means, None where it is refused; whichever, soon and in little memory."""
    gc.disable()  # a collection would count as the decoder's time
    try:
        began = time.thread_time()
        message = attempt(frame)
        seconds = time.thread_time() - began
        tracemalloc.start()
        attempt(frame)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        gc.enable()
    assert seconds <= DEADLINE
    assert peak <= 64 * len(frame) + (1 << 16)
    return message


def attempt(frame: bytearray) -> m.Message | None:
    try:
        return codec.decode(frame)
    except ProtocolError:
        return None


def test_every_message_has_a_tag_and_is_drawn():
    assert {*codec._MESSAGES.values()} == {*MESSAGES}
    assert {*get_args(m.Message)} == {*MESSAGES, *codec.LAYERED}


@given(_messages)
def test_every_message_comes_back(message):
    frame = whole(message)
    back = decoded(frame)
    assert type(back) is type(message)
    assert whole(back) == frame
    if isinstance(message, m.Announcement | m.Announced | m.Survey | m.Surveyed | m.Fault):  # no tensors to compare
        assert back == message


@given(_messages, st.data())
def test_truncated_and_extended_frames_are_refused(message, data):
    frame = whole(message)
    assert decoded(frame[: data.draw(st.integers(0, len(frame) - 1))]) is None
    assert decoded(frame + data.draw(st.binary(min_size=1, max_size=9))) is None


@given(_messages, st.data())
def test_lying_lengths_are_refused(message, data):
    frame = whole(message)
    header, payload = _PREFIX.unpack_from(frame)[3:]
    sizes = data.draw(
        st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)).filter(lambda s: s != (header, payload))
    )
    struct.pack_into("<IQ", frame, 8, *sizes)
    if sum(sizes) != header + payload:
        assert decoded(frame) is None


@pytest.mark.fault("F22")
@given(_messages, st.data())
def test_changed_bytes_are_refused_or_mean_something(message, data):
    frame = whole(message)
    for _ in range(data.draw(st.integers(1, 4))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    back = decoded(frame)
    assert back is None or isinstance(back, m.Message)


@given(_layered(), st.data())
def test_a_layers_frame_with_another_header_is_refused_or_has_other_numbers(message, data):
    frame = whole(message)
    at = data.draw(st.integers(20, 63))
    frame[at] ^= data.draw(st.integers(1, 255))
    back = decoded(frame)
    if back is not None:  # then it is what the header says, and nothing of the frame is left over or missing
        again = whole(back)
        assert again[:64] == frame[:64]
        assert len(again) == len(frame)  # numbers that the new header cuts off lie in padding, which is not read


@pytest.mark.parametrize("counts", [(2**32 - 1, 0), (0, 2**32 - 1), (1 << 20, 1 << 20)])
def test_a_layers_header_that_claims_more_than_its_frame_is_refused(counts):
    frame = whole(m.Exchange(1, 2, 3, torch.ones(2, 8), torch.ones(1, 8), torch.ones(1, 8)))
    struct.pack_into("<II", frame, 36, *counts)
    assert decoded(frame) is None


@given(st.sampled_from(TAGS), _plain, st.binary(max_size=200))
def test_any_msgpack_as_a_header(tag, header, payload):
    decoded(framed(tag, msgpack.packb(header), payload))


@given(st.sampled_from(TAGS), st.lists(_plain, max_size=8), st.binary(max_size=200))
def test_any_list_as_a_header(tag, header, payload):
    decoded(framed(tag, msgpack.packb(header), payload))


@pytest.mark.fault("F22")
@given(st.sampled_from(TAGS), st.binary(max_size=200), st.binary(max_size=64))
def test_any_bytes_as_a_header(tag, header, payload):
    decoded(framed(tag, header, payload))


@pytest.mark.fault("F22")
@pytest.mark.parametrize("tag", TAGS)
@pytest.mark.parametrize(
    "header",
    [
        b"\xdd\xff\xff\xff\xff",  # 2^32 items in five bytes: of an array, of a map, of text, of bytes, of an extension
        b"\xdf\xff\xff\xff\xff",
        b"\xdb\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\xc9\xff\xff\xff\xff\x01",
        b"\xdd\x00\xff\xff\xff" * 2000,
        b"\xdd\xff\xff\xff\xff" * 2000,
        b"\x91" * (1 << 19),  # nested half a million deep
        b"\x9f" * 4000,
        b"\x93\x01\x02" + b"\xd4\x05\x00" * 3000,  # extensions
        b"\xdc\xff\xff" + b"\xc0" * 0xFFFF,
        msgpack.packb([1, 2, 3] + [["f32", 1 << 61, 1 << 61, 1 << 61, 1 << 61]] * 3),
        msgpack.packb([1, 2, 3] + [["f32", 0, 1 << 61]] * 3),
        msgpack.packb([1, 2, 3, ["i8", *([1] * 60000)]]),
        b"\xdd\x00\x07\xff\x00" + b"\x90" * 0x07FF00,  # as many lists as a header has room for
        b"\xdd\x00\x03\xff\x00" + b"\x91\x90" * 0x03FF00,
        b"\x95\x01\x02\x03\x90\xdd\x00\x03\xff\x00" + b"\x91\xc0" * 0x03FF00,
        msgpack.packb([1, 2, 3, "\ud800".encode("utf-8", "surrogatepass")]),
    ],
    ids=lambda header: f"{bytes(header[:5]).hex()}x{len(header)}",
)
def test_headers_made_to_hurt(tag, header):
    decoded(framed(tag, header))


@pytest.mark.fault("F22")
@pytest.mark.parametrize("shape", [(1 << 32, 1 << 32, 0), (0, 1 << 61, 1 << 61), (1 << 62 - 1, 0, 1 << 40, 1 << 40)])
@pytest.mark.parametrize("tag", [9, 13])
def test_an_empty_tensor_of_impossible_dimensions_is_refused(tag, shape):
    """torch raised a RuntimeError for such a reply, which was no ProtocolError, and the engine that read it stopped."""
    tensors = [["f32", *shape]] * (2 if tag == 9 else 1)
    with pytest.raises(ProtocolError, match="tensor of shape"):
        codec.decode(framed(tag, msgpack.packb([1, 2, 3, *tensors])))


def test_an_announcement_of_many_rows_is_read_in_time():
    rows = tuple(m.Row(n, 0, 1, (0, 0), True) for n in range(2000))
    assert isinstance(decoded(whole(m.Announcement(1, 1, 0, (), rows))), m.Announcement)
