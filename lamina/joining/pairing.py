"""The code by which people tell that two machines speak with each other and with nobody in between. Pure.

Both show six digits, of the server's certificate as the machine sees it, of what the machine offers, and of one random
number from each. The machine commits to its number before it knows the server's, and shows it after: whoever stands in
between has two different codes and, before either is fixed, no way to choose. So a guess is right once in a million,
and `lamina.joining.book` bounds the guesses (commit then reveal, as in ZRTP, RFC 6189, section 4.4.1.1).
"""

from __future__ import annotations

import hashlib
import hmac
import re
from dataclasses import dataclass
from typing import Any

from lamina_protocols.errors import ProtocolError

JOIN_PORT = 7717  # where servers take machines
NONCE_SIZE = 32  # bytes
_DIGITS = 6
_MAX_MEMORY = 1 << 50  # bytes
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]{0,31}")
_LETTER = re.compile(r"[A-Za-z]")
_HEX = re.compile(r"(?:[0-9a-f]{2})*")


@dataclass(frozen=True, slots=True)
class Offer:
    """What a machine offers. `name`: 1 to 32 letters, digits and hyphens, not without a letter; `memory`: bytes for
    KV."""

    name: str
    memory: int


def plain_name(host: str) -> str:
    """A host's name as a machine may have it."""
    name = re.sub(r"[^A-Za-z0-9-]+", "-", host.partition(".")[0]).strip("-")[:32]
    return name if _LETTER.search(name) else f"machine-{name}"[:32].rstrip("-")


def read_offer(message: dict[str, Any]) -> Offer:
    """The offer in a message. Raises ProtocolError, also for a name that could be taken for a code."""
    name = read_name(message.get("name"))
    if not _LETTER.search(name):
        raise ProtocolError(f"name is {name!r}; allowed are names with a letter, so that none looks like a code")
    return Offer(name, read_memory(message.get("memory")))


def read_name(value: object) -> str:
    """Raises ProtocolError unless it is a machine's name."""
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise ProtocolError(f"name is {value!r:.80}; allowed are 1 to 32 letters, digits and hyphens")
    return value


def read_memory(value: object) -> int:
    """Raises ProtocolError unless it is a number of bytes."""
    if type(value) is not int or not 1 <= value <= _MAX_MEMORY:
        raise ProtocolError(f"memory is {value!r:.80}; allowed are 1 byte to 1 PiB")
    return value


def read_bytes(value: object, size: int) -> bytes:
    """`size` bytes from their hexadecimal digits. Raises ProtocolError."""
    if not isinstance(value, str) or len(value) != 2 * size or not _HEX.fullmatch(value):
        raise ProtocolError(f"{value!r:.80} is given; allowed are {2 * size} hexadecimal digits")
    return bytes.fromhex(value)


def commitment(nonce: bytes) -> bytes:
    """What the machine sends before its nonce, so that it cannot choose another one later."""
    return _digest(b"lamina join commitment", nonce)


def opens(commitment_given: bytes, nonce: bytes) -> bool:
    """Whether a nonce is the one that was committed to."""
    return hmac.compare_digest(commitment_given, commitment(nonce))


def code(certificate: bytes, offer: Offer, machine_nonce: bytes, server_nonce: bytes) -> str:
    """The six digits. `certificate` is the server's in DER: the one that it shows, or that the machine was shown."""
    digest = _digest(
        b"lamina join code", certificate, offer.name.encode(), str(offer.memory).encode(), machine_nonce, server_nonce
    )
    return f"{int.from_bytes(digest[:16], 'big') % 10**_DIGITS:0{_DIGITS}}"


def spaced(digits: str) -> str:
    """A code as people read it, such as 482 193; "" of none."""
    return f"{digits[:3]} {digits[3:]}".strip()


def plain_code(text: str) -> str:
    """The digits of a code as people type it."""
    return re.sub(r"[\s-]", "", text)


def fingerprint(certificate: bytes) -> str:
    """The SHA-256 of a certificate in DER, as hexadecimal digits."""
    return hashlib.sha256(certificate).hexdigest()


def _digest(purpose: bytes, *parts: bytes) -> bytes:
    """SHA-256 of the parts, each after its length: no two lists of parts make the same bytes."""
    digest = hashlib.sha256()
    for part in (purpose, *parts):
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.digest()
