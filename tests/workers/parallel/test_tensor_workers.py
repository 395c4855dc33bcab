"""What rank 0 remembers of holders that other ranks could not say enough about."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from lamina_protocols.messages.layers import HolderConfig, LayerSpec
from lamina_workers.errors import HolderLost
from lamina_workers.parallel import peer_messages
from lamina_workers.parallel.tensor_parallel import TensorParallelWorkers

HOLDER = HolderConfig((LayerSpec(0, 4, 2, 16, 16, 0.25),), 16, "float32", 1 << 20)


class FakePeer:
    """Rank 1: it takes up its seat, and cannot tell what is kept there."""

    rank, closed = 1, False

    def __init__(self) -> None:
        self.lost: set[int] = set()
        self.told: list[Any] = []

    def tell(self, command: Any) -> None:
        self.told.append(command)

    def answer(self, kind: type, timeout: float | None = None) -> Any:
        return peer_messages.Joined(5, 1 << 20, True)

    def ask(self, command: Any, kind: type, timeout: float | None = None) -> Any:
        if isinstance(command, peer_messages.SurveySeat):
            return peer_messages.Failed("HolderLost", "attention worker a is lost")
        return peer_messages.Joined(5, 1 << 20, True)


class Port:
    name, address, channel_kind = "a", "x:1", "tcp"
    bytes_sent = bytes_received = 0
    closed = False

    def close(self) -> None:
        self.closed = True


class Own:
    epoch = 1

    def __init__(self) -> None:
        self.ports: dict[int, Any] = {}

    def join(self, number: int, port: Any) -> None:
        self.ports[number] = port

    def lost(self) -> list[int]:
        return [number for number, port in self.ports.items() if port.closed]


def workers(peer: FakePeer, own: Own) -> TensorParallelWorkers:
    group = SimpleNamespace(peers={1: peer}, missing=(), timeout=1.0)
    return TensorParallelWorkers(*cast(Any, (own, SimpleNamespace(), group)), pools={}, heads=(1, 1), config=HOLDER)


def test_a_holder_that_a_rank_cannot_look_at_does_not_join() -> None:
    peer, own, port = FakePeer(), Own(), Port()
    ranks = workers(peer, own)
    with pytest.raises(HolderLost, match="attention worker a is lost"):
        ranks.join(4, cast(Any, port))
    assert port.closed
    assert ranks.lost() == []
    assert any(isinstance(command, peer_messages.Leave) and command.number == 5 for command in peer.told)


def test_a_holder_that_a_rank_which_is_back_cannot_look_at_is_gone() -> None:
    peer, own = FakePeer(), Own()
    ranks = workers(peer, own)
    ranks._owner[5], ranks._joins[5] = 1, peer_messages.Join(5, "a", "x:1", 1, 1, 2, b"", b"", b"", "")
    back = ranks.returned(cast(Any, peer))
    assert back.gone == [5]
