"""The version of the protocol, and the features by which neighbouring versions differ.

Versions N and N - 1 speak with each other, so that a cluster is upgraded one process at a time. Each side names its
features in the handshake, and both use those alone that both have. Whoever has the newer version knows what the older
one lacks: a message, or an operation, is only sent to a side that has its feature, and a field that came later (see
`fields.Since`) is left out while it has its default.
"""

from __future__ import annotations

from collections.abc import Iterable

from lamina_protocols.errors import ProtocolError

PROTOCOL_VERSION = 8
PREVIOUS = PROTOCOL_VERSION - 1
PREVIOUS_RELEASE = "0.1.0"
"""The release of Lamina that version 7 demands of the other side; later versions demand none."""

BOUND = "bound"
"""The operation `Bound`. Without it a part keeps the range that it was opened with."""

HEARTBEAT = "heartbeat"
"""Heartbeats of a model worker beyond 0, over a second channel. Without it only a batch that waits for it finds that it
stands still."""

STATE_FRAMES = "state frames"
"""Layers of states in the frames of `layer_frames`. Without it Python carries them."""

FEATURES = frozenset({BOUND, HEARTBEAT, STATE_FRAMES})
"""What this side has beyond the previous version."""

VARIABLE = "LAMINA_PROTOCOL"
"""The environment variable by which model worker 0 tells those beyond it its version, from version 8 on."""

_MOST_FEATURES, _LONGEST = 64, 32  # names, characters of one


class VersionMismatch(ProtocolError):
    """Two sides whose versions are no neighbours."""


def shared(theirs: Iterable[str]) -> frozenset[str]:
    """The features that both sides have."""
    return FEATURES.intersection(theirs)


def check_features(value: tuple[str, ...]) -> None:
    """Raise ProtocolError for more features, or longer names, than any version has."""
    if len(value) > _MOST_FEATURES or any(len(name) > _LONGEST for name in value):
        raise ProtocolError(
            f"{len(value)} features, of {max(map(len, value))} characters at most; allowed: {_MOST_FEATURES} of "
            f"{_LONGEST}"
        )


def check_neighbours(engine: object, worker: object) -> None:
    """Raise VersionMismatch, naming both, where the versions of an engine and a worker are no neighbours."""
    if type(engine) is not int or type(worker) is not int or abs(engine - worker) > 1:
        # The previous version begins its refusal in the same way, which `refused_by_previous` relies on.
        raise VersionMismatch(
            f"protocol version: the engine has {engine!r:.40}, this worker {worker!r:.40}; allowed: the same, or one "
            "more or less"
        )


def refused_by_previous(reason: str) -> bool:
    """Whether a refusal of this version's `Hello` is that of a worker of the previous version."""
    return f"protocol version: the engine has {PROTOCOL_VERSION}, this worker {PREVIOUS}" in reason
