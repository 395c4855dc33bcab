"""Bytes, as people write them."""

from __future__ import annotations

import re

from lamina.errors import InvalidRequest

_POWERS = {"K": 1, "M": 2, "G": 3, "T": 4}
_SIZE = re.compile(r"\s*(\d{1,15}(?:\.\d{1,6})?)\s*(?:([KMGT])(I?)(B?)|B?)\s*", re.IGNORECASE | re.ASCII)


def parse_size(name: str, value: object) -> int:
    """Bytes of `value`, an integer or text such as "2GiB", "500 MB" or "512M". A letter alone is a power of 1024, as
    Docker and systemd have it. Raises InvalidRequest."""
    size: float | None = None
    if type(value) is int:
        size = value
    elif isinstance(value, str) and (match := _SIZE.fullmatch(value)):
        number, letter, binary, byte = match.groups()
        base = 1000 if byte and not binary else 1024
        size = float(number) * base ** _POWERS[letter.upper()] if letter else float(number)
    if size is None or not 1 <= size <= 2**50:
        raise InvalidRequest(
            f"{name} is {value!r:.80}; allowed are 1 byte to 1 PiB, as an integer or text with a unit of K, M, G or T: "
            '"2GiB" and "2G" are 2 x 1024^3 bytes, "2GB" are 2 x 10^9'
        )
    return int(size)
