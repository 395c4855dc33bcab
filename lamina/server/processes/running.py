"""What a running server leaves in its folder, and the servers of this user that have left it: for `lamina ps`."""

from __future__ import annotations

import contextlib
import fcntl
import json
import tempfile
import time
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from lamina.errors import InvalidRequest
from lamina.system.private_folder import LOCK, check_own
from lamina.system.text_files import read_text, write_text

FOLDER = "lamina-serve-"
"""The begin of the name of a server's folder."""
_FILE = "server.json"
_MOST, _MOST_BYTES = 256, 1 << 20  # folders that are looked at, and bytes of a file


def leave(folder: Path, address: str, models: Mapping[str, int]) -> None:
    """Write where a server listens, and of each model the engine's process; 0: it is not loaded. A full disk leaves
    what was there before."""
    with contextlib.suppress(InvalidRequest):
        write_text(folder / _FILE, json.dumps({"address": address, "models": dict(models)}), mode=0o600)


def running_servers() -> list[dict[str, Any]]:
    """What servers left, with `pid` and `uptime` in seconds, the oldest first."""
    servers = []
    for folder in islice(Path(tempfile.gettempdir()).glob(f"{FOLDER}*"), _MOST):
        with contextlib.suppress(InvalidRequest, OSError, ValueError, KeyError, TypeError, AttributeError):
            check_own(folder.lstat())
            with (folder / LOCK).open("rb") as file, contextlib.suppress(BlockingIOError):
                pid, begin = int(file.read(32)), (folder / LOCK).stat().st_mtime
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                continue  # nobody has it locked: the server is dead
            fields = json.loads(read_text(folder / _FILE, _MOST_BYTES))
            models = {str(name): int(process) for name, process in fields["models"].items()}
            uptime = round(max(0.0, time.time() - begin), 1)
            servers.append({"address": str(fields["address"]), "pid": pid, "uptime": uptime, "models": models})
    return sorted(servers, key=lambda server: -server["uptime"])
