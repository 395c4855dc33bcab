"""The root of the exception tree, and the errors of the wire.

`lamina.errors` shows the whole tree; the root is here because imports only point down.
"""


class LaminaError(Exception):
    """Every error that Lamina raises on purpose."""


class ProtocolError(LaminaError):
    """A frame or message is malformed, too large, or out of order."""


class CorruptFrame(ProtocolError):
    """Bits have changed on the way: a checksum, or TLS's own, does not agree."""
