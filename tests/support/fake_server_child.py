"""Stands in for a server's engine or HTTP process in tests of the supervisor: `python -m fake_server_child`.

It writes what it receives to a file, and behaves as a file beside it says.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

from lamina.deploy.relayed_attention import Drained
from lamina.server.processes.child_protocol import Connected, Failed, Ready, Serving, SupervisorPipe
from lamina.system.progress import Progressed
from lamina_workers.process.exit import die_with_parent

FOLDER = Path(os.environ["FAKE_CHILD_FOLDER"])


def main() -> None:
    die_with_parent()
    pipe = SupervisorPipe()
    print("something that prints")  # noqa: T201  # it must not be taken for what is said
    lines = map(json.loads, sys.stdin)
    first = next(lines)
    if first[0] == "prepare":
        note("spare", first)
        first = next(lines, None)
        if first is None:
            return
    role = first[0]
    if role == "engine" and first[1] != "m":  # a further model
        role = f"engine-{first[1]}"
    note(role, first)
    (FOLDER / f"{role}.pid").write_text(str(os.getpid()))
    behaviour = (FOLDER / f"{role}.txt").read_text() if (FOLDER / f"{role}.txt").exists() else ""
    if behaviour == "fails":
        pipe.send(Failed("InvalidRequest", "no such model"))
        sys.exit(1)
    if behaviour == "dies":
        sys.exit(3)
    if behaviour == "has no workers":
        (FOLDER / f"{role}.txt").unlink()
        pipe.send(Failed("WorkersUnavailable", "no attention worker can be used"))
        sys.exit(1)
    if role.startswith("engine"):
        pipe.send(Progressed("loading", 1, 2))
        pipe.send(Ready({"folder": "somewhere", "context": 100, "possible": 50}))
        pipe.send(Progressed("rebuilding lost KV", 1, 2))
    else:
        pipe.send(Serving())
    for message in lines:
        note(role, message)
        if message[0] == "ready":
            pipe.send(Connected(message[1]))
        if message[0] == "stop":
            sys.exit(0)
        if message[0] == "drain" and role == "engine":
            pipe.send(Drained(message[1]))
        elif message[0] == "drain" and behaviour != "drains for ever":
            threading.Thread(target=leave, daemon=True).start()


def leave() -> None:
    time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGTERM)


def note(role: str, message: list[object]) -> None:
    with (FOLDER / f"{role}.log").open("a") as file:
        file.write(json.dumps(message) + "\n")


if __name__ == "__main__":
    main()
