"""Control messages: each comes back as it was, nothing malformed gets through, versions are compared first."""

from __future__ import annotations

import contextlib
import dataclasses

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamina_protocols.channels import control
from lamina_protocols.channels.control import (
    Alive,
    Goodbye,
    Heartbeat,
    Hello,
    LocalOffer,
    StatusRequest,
    TcpOffer,
    Welcome,
    WorkerStatus,
    pack,
    unpack,
)
from lamina_protocols.channels.versions import BOUND, PROTOCOL_VERSION
from lamina_protocols.errors import ProtocolError
from lamina_protocols.messages.layers import LayerSpec

LAYERS = (
    LayerSpec(0, 6, 2, 16, 32, 0.25),
    LayerSpec(0, 6, 2, 16, 32, 0.25, window=7, soft_cap=5.0),
    LayerSpec(2, 8, 8, 64, 64, 1.0, kind="lightning", key_heads=4, conv=4, decays=(-0.5,) * 8),
)
HELLO = Hello(
    PROTOCOL_VERSION, control.package_version(), "s" * 32, "model", "bfloat16", "int8", 32, LAYERS, True, "grpc",
    "e" * 32, 3, (1, 4), 2.5, 1 << 17, True, (BOUND,),
)  # fmt: skip
STATUS = WorkerStatus(
    "a", "1", "m", True, 1.5, "01234567", 3, 4, 1, 2.5, False, "local", 1 << 30, 3, (0, 1), 0, 99, 5, 9, 1, 2, 3, 4, 5,
    0.25, 9.75,
)  # fmt: skip
ALL = (
    HELLO,
    Welcome("a", 1 << 40, 2, 30.0, 1 << 30, LocalOffer("/tmp/x", b"\0" * 32), None, False, "tokens, 16"),
    Welcome("a", 0, 1, 0.5, 1, None, TcpOffer(4000, b"s" * 32), True, "", (BOUND,)),
    Heartbeat("s" * 32),
    Goodbye("e" * 32, 0, "s" * 32),
    Alive("serving"),
    StatusRequest(),
    STATUS,
)


@pytest.mark.parametrize("message", ALL)
def test_messages_come_back_equal(message):
    assert unpack(type(message), pack(message)) == message


@pytest.mark.fault("F19")
def test_a_version_that_is_no_neighbour_is_refused_naming_both_before_anything_else_is_read():
    said = rf"protocol version: the engine has 77, this worker {PROTOCOL_VERSION}"
    for data in (pack(dataclasses.replace(HELLO, protocol=77)), msgpack.packb([77, "9.9.9", "new", "fields"])):
        with pytest.raises(ProtocolError, match=said):
            unpack(Hello, data)


@pytest.mark.fault("F22")
@given(st.binary(max_size=300), st.sampled_from([type(message) for message in ALL]))
def test_random_bytes_are_refused_or_mean_something(data, kind):
    with contextlib.suppress(ProtocolError):
        unpack(kind, data)


@given(st.data())
def test_a_field_of_a_wrong_type_is_refused(data):
    values = msgpack.unpackb(pack(STATUS))
    position = data.draw(st.integers(0, len(values) - 1))
    values[position] = data.draw(
        st.sampled_from([None, [[]], b"x", -1, 2**63, float("nan"), float("inf")]).filter(
            lambda value: not isinstance(values[position], float) or value not in (-1, 2**63)
        )
    )
    with pytest.raises(ProtocolError):
        unpack(WorkerStatus, msgpack.packb(values))


@pytest.mark.parametrize("values", [[], [1], [*dataclasses.astuple(STATUS), 1]])
def test_fields_that_lack_or_exceed_are_refused(values):
    with pytest.raises(ProtocolError, match="WorkerStatus has 26 fields"):
        unpack(WorkerStatus, msgpack.packb(values))


@pytest.mark.fault("F09")
def test_large_messages_are_refused_on_both_sides():
    large = dataclasses.replace(HELLO, model="m" * control.MAX_CONTROL)
    with pytest.raises(ProtocolError, match="allowed: 1048576"):
        pack(large)
    with pytest.raises(ProtocolError, match="allowed: 1048576"):
        unpack(Heartbeat, bytes(control.MAX_CONTROL + 1))


def test_secrets_do_not_show_in_a_repr():
    assert "\\x07" not in repr(LocalOffer("/x", b"\x07" * 32)) + repr(TcpOffer(1, b"\x07" * 32))
