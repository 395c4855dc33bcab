"""Small UTF-8 files, read whole up to a limit and written whole or not at all, and the values in them.

Files of settings are TOML: `read_toml` reads them, and `toml_value` writes a value as TOML has it. `parse_size` reads a
number of bytes as people write it, such as "2GiB", and `show_size` writes one.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lamina.errors import InvalidRequest, LaminaError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_POWERS = {"K": 1, "M": 2, "G": 3, "T": 4}
_SIZE = re.compile(r"\s*(\d{1,15}(?:\.\d{1,6})?)\s*(?:([KMGT])(I?)(B?)|B?)\s*", re.IGNORECASE | re.ASCII)

MAX_BYTES = 4 << 20
_BARE = re.compile(r"[A-Za-z0-9_-]+", re.ASCII)


def read_text(path: str | Path, limit: int = MAX_BYTES, error: type[LaminaError] = InvalidRequest) -> str:
    """A UTF-8 file of at most `limit` bytes. Raises `error`, which does not name the file."""
    file = Path(path)
    try:
        if not file.is_file():
            raise error("there is no such file" if not file.exists() else "it is no file")
        with file.open("rb") as stream:
            content = stream.read(limit + 1)
        if len(content) > limit:
            raise error(f"it has more than {limit} bytes; allowed are {limit}")
        return content.decode("utf-8")
    except LaminaError:
        raise
    except UnicodeDecodeError as fault:
        raise error(f"it is not UTF-8: byte 0x{content[fault.start]:02x} at position {fault.start}") from fault
    except (OSError, ValueError) as fault:  # ValueError: a NUL in the path
        raise error(f"it cannot be read: {fault}") from fault


def write_text(path: str | Path, text: str, error: type[LaminaError] = InvalidRequest, mode: int = 0o666) -> None:
    """Write a UTF-8 file to `path` in one step, in place of a file that is there. The umask takes from `mode`. Raises
    `error`."""
    target = Path(path)
    draft = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
            with open(os.open(draft, flags, mode), "w", encoding="utf-8", newline="\n") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
            draft.replace(target)
        finally:
            draft.unlink(missing_ok=True)
    except (OSError, ValueError) as fault:
        raise error(f"{path} cannot be written: {fault}") from fault


def read_toml(path: str | Path, limit: int = MAX_BYTES, error: type[LaminaError] = InvalidRequest) -> dict[str, Any]:
    """The content of a TOML file of at most `limit` bytes. Raises `error`, which does not name the file."""
    text = read_text(path, limit, error).removeprefix("\ufeff")
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as fault:  # tomllib's own, of which one is for arrays nested too deep
        raise error(f"it is not TOML: {fault}") from fault


def toml_value(value: Any) -> str:
    """A value on one line, as TOML has it: a text, a number, true or false, a list or a table of such. Raises
    InvalidRequest for any other."""
    if isinstance(value, str):  # JSON's escapes are TOML's, but for DEL
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(toml_value, value))}]"
    if isinstance(value, Mapping):
        pairs = ", ".join(f"{_key(str(name))} = {toml_value(item)}" for name, item in value.items())
        return f"{{ {pairs} }}" if pairs else "{}"
    raise InvalidRequest(f"{value!r:.80} is no value here; allowed are texts, numbers, true, false, lists and tables")


def _key(name: str) -> str:
    return name if _BARE.fullmatch(name) else toml_value(name)


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


def show_size(count: int, up: bool = False) -> str:
    """Bytes for people, as `parse_size` reads them: two digits behind the point, cut, or raised with `up`."""
    for unit, power in (("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if count >= 1 << power and (power > 10 or count % 1024 == 0):
            hundredths = -((-100 * count) >> power) if up else (100 * count) >> power
            return f"{hundredths / 100:g} {unit}"
    return f"{count} bytes"
