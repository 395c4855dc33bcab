"""What is remembered between runs, in a folder of this user alone: a server's certificate and the machines it accepted;
the servers that have accepted this machine.

`$XDG_STATE_HOME/lamina/joining`, by default in `~/.local/state`, has `server.json` and `servers.json`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lamina.errors import InvalidRequest
from lamina.joining.book import ID_SIZE, KEY_SIZE, Machine, pack, unpack
from lamina.joining.pairing import read_bytes
from lamina.system.private_folder import check_own, lock, state_folder
from lamina.system.text_files import read_text, write_text
from lamina_protocols.channels.channels import Credentials
from lamina_protocols.errors import ProtocolError
from lamina_workers.process.credentials import create_credentials

_MOST = 1 << 20  # bytes of a file
_PRIVATE = 0o600


def joining_folder() -> Path:
    """Where it is all kept."""
    return state_folder() / "joining"


class ServerRecords:
    """A server's own: for one process at a time. Raises InvalidRequest where another one has them, or they cannot be
    read. Close it."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "server.json"
        try:
            self._lock = lock(folder)
        except OSError as error:
            raise InvalidRequest(
                f"{folder} cannot be used: {error}; another server of this host has its own with $XDG_STATE_HOME"
            ) from error
        try:
            content = _read(self._file)
            self.machines = [unpack(fields) for fields in _objects(content, "machines")]
            created = create_credentials(["lamina"]) if not content else None
            cert, key = (content.get("certificate", ""), content.get("key", "")) if created is None else ("", "")
            self.credentials = created or Credentials(cert=str(cert).encode(), key=str(key).encode())
        except (ProtocolError, UnicodeEncodeError) as error:  # the second: half of a surrogate pair
            self.close()
            raise InvalidRequest(
                f"{self._file} is damaged: {error}; without the file all machines join anew"
            ) from error
        except BaseException:
            self.close()
            raise
        if created is not None:
            self.write(())

    def write(self, machines: Iterable[Machine]) -> None:
        """Remember these machines. Raises InvalidRequest."""
        credentials = {"certificate": self.credentials.cert.decode(), "key": self.credentials.key.decode()}
        content = credentials | {"machines": [pack(machine) for machine in machines]}
        write_text(self._file, json.dumps(content, indent=1), mode=_PRIVATE)

    def close(self) -> None:
        os.close(self._lock)


@dataclass(frozen=True, slots=True)
class KnownServer:
    """A server that has accepted this machine: the fingerprint of its certificate, what this machine is to it, and
    where it was last."""

    fingerprint: str
    name: str
    id: str
    key: str = field(repr=False)
    host: str
    port: int


def known_servers(folder: Path) -> list[KnownServer]:
    """The servers that this machine may come back to, the latest first. Raises InvalidRequest."""
    file = folder / "servers.json"
    try:
        if folder.exists():
            check_own(folder.stat())
        return [_known(fields) for fields in _objects(_read(file), "servers")]
    except PermissionError as error:
        raise InvalidRequest(f"{folder} cannot be used: {error}") from error
    except ProtocolError as error:
        raise InvalidRequest(f"{file} is damaged: {error}; without the file this machine joins anew") from error


def remember(folder: Path, server: KnownServer) -> None:
    """Put a server first. Raises InvalidRequest."""
    others = [other for other in known_servers(folder) if other.fingerprint != server.fingerprint]
    _write_servers(folder, [server, *others][:64])


def forget(folder: Path, fingerprint: str) -> None:
    """Remember a server no longer. Raises InvalidRequest."""
    _write_servers(folder, [server for server in known_servers(folder) if server.fingerprint != fingerprint])


def _write_servers(folder: Path, servers: list[KnownServer]) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidRequest(f"{folder} cannot be made: {error}") from error
    content = {"servers": [asdict(server) for server in servers]}
    write_text(folder / "servers.json", json.dumps(content, indent=1), mode=_PRIVATE)


def _known(fields: dict[str, Any]) -> KnownServer:
    read_bytes(fields.get("fingerprint"), 32)
    read_bytes(fields.get("id"), ID_SIZE)
    read_bytes(fields.get("key"), KEY_SIZE)
    name, host, port = fields.get("name"), fields.get("host"), fields.get("port")
    if not isinstance(name, str) or not isinstance(host, str) or type(port) is not int or not 0 < port < 65536:
        raise ProtocolError("a server has no name, host or port")
    return KnownServer(fields["fingerprint"], name, fields["id"], fields["key"], host, port)


def _read(file: Path) -> dict[str, Any]:
    """A file's object, empty where there is no file. Raises InvalidRequest, ProtocolError."""
    if not file.exists():
        return {}
    try:
        content = json.loads(read_text(file, _MOST))
    except InvalidRequest as error:
        raise InvalidRequest(f"{file}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"it is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise ProtocolError("it is no JSON object")
    return content


def _objects(found: dict[str, Any], name: str) -> list[dict[str, Any]]:
    items = found.get(name, [])
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise ProtocolError(f"{name} is no list of objects")
    return items
