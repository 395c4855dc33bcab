"""Version 8 beside version 7: what 7 sends is read, and it is sent nothing that it does not know.

`SENT` was recorded from a process of version 7, and never changes.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import msgpack
import pytest

from lamina_protocols.channels import control
from lamina_protocols.channels.versions import BOUND, FEATURES, PREVIOUS, PROTOCOL_VERSION, check_neighbours, shared
from lamina_protocols.errors import ProtocolError
from lamina_protocols.frames import codec
from lamina_protocols.frames.fields import Record, Since
from lamina_workers.parallel import peer_messages

SENT = {
    "Hello": (
        "dc001007a5302e312e30d9207373737373737373737373737373737373737373737373737373737373737373a56d6f64"
        "656ca7666c6f61743332a7666c6f6174333210919e0002010808cb3fd000000000000007c0a9617474656e74696f6e90"
        "c0000090c3a467727063d920656565656565656565656565656565656565656565656565656565656565656500920101"
        "cb4004000000000000cd1000c2"
    ),
    "Welcome": (
        "99a36f6c64ce0010000002cb403e000000000000ce4000000092a62f746d702f78c42000000000000000000000000000"
        "00000000000000000000000000000000000000c0c3aa746f6b656e732c203136"
    ),
    "Alive": ("91a8647261696e696e67"),
    "Announcement": (
        "4c4d4e4107000100280000000000000000000000950309049397000100910000cd03e8a466756c6c9501020110a09202"
        "019197021003920010c3c300"
    ),
    "Announced": ("4c4d4e41070002000c0000000000000000000000990309c391119100a0909090"),
    "Surveyed": ("4c4d4e4107000b00120000000000000000000000960309020591970200910000cd03e8131000"),
    "Exchange": (
        "4c4d4e41070007002c000000a00000000000000003000000000000000900000000000000020000000100000008000800"
        "010108000000000001000000000000000000803f0000803f0000803f0000803f0000803f0000803f0000803f0000803f"
        "0000803f0000803f0000803f0000803f0000803f0000803f0000803f0000803f0000803f0000803f0000803f0000803f"
        "0000803f0000803f0000803f0000803f0000000000000000000000000000000000000000000000000000000000000000"
        "0000803f0000803f0000803f0000803f0000803f0000803f0000803f0000803f"
    ),
    "Fault": ("4c4d4e4107000600080000000000000000000000930309a466756c6c"),
    "peer Hello": ("4c4d4e410700650010000000000000000000000093a76d6f64656c2d3107a5302e312e30"),
    "peer Begin": (
        "4c4d4e41070079009c0000000000000000000000dc00140102a22f6da56d6f64656ca0a7666c6f61743332c2a0a36370"
        "75a3637075c20197919e0002010808cb3fd000000000000007c0a9617474656e74696f6e90c000009010a7666c6f6174"
        "3332ce00100000cd1000c2c0cb4024000000000000d92065656565656565656565656565656565656565656565656565"
        "65656565656565cb4004000000000000c3a467727063cb402400000000000004"
    ),
    "peer Joined": ("4c4d4e41070069000800000000000000000000009303ce00100000c3"),
    "peer Announce": (
        "4c4d4e4107007c002300000000000000000000009309c39192019304919501020110a0919600910097021003920010c3c2009200000000"
    ),
}


def read(name: str) -> Any:
    """The message that this version reads from the bytes of that name."""
    data = bytes.fromhex(SENT[name])
    if name in ("Hello", "Welcome", "Alive"):
        return control.unpack(getattr(control, name), data)
    return (peer_messages if name.startswith("peer ") else codec).decode(bytearray(data))


@pytest.mark.fault("F31")
@pytest.mark.parametrize("name", SENT)
def test_messages_of_the_previous_version_are_read_and_sent_unchanged(name: str) -> None:
    message = read(name)
    assert type(message).__name__ == name.removeprefix("peer ")
    if name in ("Hello", "Welcome", "Alive"):
        again = control.pack(message)
    else:
        again = b"".join((peer_messages if name.startswith("peer ") else codec).encode(message))
    assert again.hex() == SENT[name]


def test_hello_is_said_to_a_worker_of_the_previous_version_as_that_says_it() -> None:
    old = read("Hello")
    new = dataclasses.replace(old, protocol=PROTOCOL_VERSION, version="9.9", features=tuple(FEATURES))
    assert control.pack(control.as_previous(new)).hex() == SENT["Hello"]
    assert control.unpack(control.Hello, control.pack(new)) == new


def test_a_newer_hello_is_read_without_what_nobody_knows_here() -> None:
    hello = dataclasses.replace(read("Hello"), protocol=PROTOCOL_VERSION + 1, features=(BOUND, "telepathy"))
    no_blocks = [0, []]  # which are sent where a field follows them
    newer = [*msgpack.unpackb(control.pack(hello)), *no_blocks, "new", ["fields"]]
    assert control.unpack(control.Hello, msgpack.packb(newer)) == hello
    assert shared(hello.features) == {BOUND}
    with pytest.raises(ProtocolError, match="Hello has"):
        control.unpack(control.Hello, msgpack.packb([PROTOCOL_VERSION, *newer[1:]]))


@pytest.mark.fault("F31")
@pytest.mark.parametrize("other", [PREVIOUS - 1, PROTOCOL_VERSION + 2, "8", None, True, 8.0])
def test_versions_that_are_no_neighbours_are_refused_naming_both(other: object) -> None:
    with pytest.raises(ProtocolError, match=rf"the engine has {other!r}, this worker {PROTOCOL_VERSION}; allowed"):
        check_neighbours(other, PROTOCOL_VERSION)


@pytest.mark.parametrize("features", [["x"] * 65, ["x" * 33], "x", [1]])
def test_features_are_bounded(features: Any) -> None:
    with pytest.raises(ProtocolError):
        control.unpack(control.Hello, msgpack.packb([*msgpack.unpackb(bytes.fromhex(SENT["Hello"])), features]))


def test_all_that_came_later_is_left_out_of_what_a_model_worker_of_the_previous_version_gets() -> None:
    begin, joined = read("peer Begin"), read("peer Joined")
    assert begin.features == joined.features == ()
    for message in (begin, joined):
        newer = dataclasses.replace(message, features=(BOUND,))
        assert peer_messages.decode(bytearray(b"".join(peer_messages.encode(newer)))) == newer


@dataclasses.dataclass(frozen=True)
class Grown:
    a: int
    b: Annotated[int, Since(2)] = 5
    c: Annotated[str, Since(3)] = ""


@pytest.mark.parametrize(
    ("value", "sent"), [(Grown(1), [1]), (Grown(1, 6), [1, 6]), (Grown(1, 5, "x"), [1, 5, "x"]), (Grown(1, 5, ""), [1])]
)
def test_last_fields_are_sent_where_they_are_not_their_defaults(value: Grown, sent: list[Any]) -> None:
    record = Record.of(Grown)
    assert record.pack(value) == sent
    assert record.unpack(tuple(sent)) == value


@pytest.mark.parametrize("values", [(), (1, 2, "x", 4)])
def test_fields_that_lack_or_exceed_are_refused_beside_those_that_may_lack(values: tuple[Any, ...]) -> None:
    with pytest.raises(ProtocolError, match="Grown has 3 fields"):
        Record.of(Grown).unpack(values)


def test_a_field_that_came_later_stands_last() -> None:
    @dataclasses.dataclass
    class Wrong:
        a: Annotated[int, Since(2)] = 1
        b: int = 2

    with pytest.raises(TypeError, match="a field comes after a, which came later"):
        Record.of(Wrong)
