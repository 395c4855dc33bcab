"""Which machines a server knows: those that wait for its operator, those that were accepted, and what each does now.
Pure: the caller passes the time, in seconds since 1970 or, to `begin_code`, of a clock that does not jump; it also
serialises the calls.

The limits are what strangers on the network can reach: within `CODES_S` seconds, for which a machine waits at most,
`MOST_CODES` codes for an address and `MOST_OF_ALL` for all of them. So one address keeps no other away, and someone in
between who knows the code of one side meets it by chance at the other once in 200,000, with many addresses once in
25,000.
"""

from __future__ import annotations

import hashlib
import hmac
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from lamina.deploy.supervision import incarnation
from lamina.joining.pairing import Offer, read_bytes, read_memory, read_name
from lamina_protocols.errors import ProtocolError

MOST_MACHINES = 64  # accepted ones
MOST_CODES = 5  # for an address
MOST_OF_ALL = 40
CODES_S = 300.0
WAITING_S = CODES_S  # for which a machine waits for the operator: no more wait than codes were made
ID_SIZE, KEY_SIZE = 8, 32  # bytes
_RESERVED = "attention"  # begins the names of workers that are started here

State = Literal["waiting", "accepted", "serving", "lost"]


@dataclass(frozen=True, slots=True)
class Machine:
    """One machine. `code` while it waits, six digits; `memory` in bytes; `since` when it came to its state; `key`: the
    SHA-256 of what it shows when it comes back, empty while it waits; `serves`: how often it has served since the
    server began."""

    id: str
    name: str
    memory: int
    code: str = ""
    address: str = ""
    since: float = 0.0
    state: State = "waiting"
    key: str = ""
    serves: int = 0

    @property
    def shown(self) -> dict[str, Any]:
        """What the operator sees, for JSON."""
        names = ("id", "name", "code", "address", "memory", "since", "state")
        return {name: getattr(self, name) for name in names}

    @property
    def worker(self) -> str:
        """The name of its attention worker, another one each time."""
        return incarnation(self.name, self.serves - 1)


class NoRoom(Exception):
    """A machine cannot be taken now; the text says why, for people there."""


class MachineBook:
    """The machines of one server. `known` are the accepted ones of earlier."""

    def __init__(self, known: Iterable[Machine] = ()) -> None:
        self._machines = {machine.id: replace(machine, state="lost") for machine in known}
        self._codes: deque[tuple[float, str]] = deque()  # when the latest ones were made, for which address

    def __getitem__(self, id: str) -> Machine:
        return self._machines[id]

    def __contains__(self, id: str) -> bool:
        return id in self._machines

    @property
    def machines(self) -> list[Machine]:
        """All, those that wait first."""
        return sorted(self._machines.values(), key=lambda machine: (machine.state != "waiting", machine.name))

    @property
    def accepted(self) -> list[Machine]:
        """Those that may come back."""
        return [machine for machine in self._machines.values() if machine.key]

    # A machine that is not known.

    def begin_code(self, address: str, now: float) -> None:
        """Count a code that is about to be made for a machine at that address. Raises NoRoom where there were too many
        lately."""
        while self._codes and self._codes[0][0] <= now - CODES_S:
            self._codes.popleft()
        everywhere = [time for time, _ in self._codes]
        nearby = [time for time, code_address in self._codes if code_address == address]
        for times, limit, where in ((nearby, MOST_CODES, f" at {address}"), (everywhere, MOST_OF_ALL, "")):
            if len(times) >= limit:
                again = times[0] + CODES_S - now
                raise NoRoom(f"{limit} machines{where} have asked lately; try again in {again:.0f} s")
        if len(self.accepted) >= MOST_MACHINES:
            raise NoRoom(f"the server has {MOST_MACHINES} machines, the most it takes; its operator can remove one")
        self._codes.append((now, address))

    def wait(self, id: str, offer: Offer, code: str, address: str, now: float) -> Machine:
        """A machine waits for the operator from now on. Raises NoRoom where another one waits with the same code."""
        if any(machine.code == code for machine in self._machines.values()):
            raise NoRoom("another machine waits with the same code; try again")
        machine = Machine(id, self._free_name(offer.name), offer.memory, code, address, now)
        self._machines[id] = machine
        return machine

    def accept(self, id: str, key: bytes, now: float) -> None:
        """The operator takes a machine that waits: it shows `key` when it comes back."""
        self._change(id, state="accepted", since=now, code="", key=hashlib.sha256(key).hexdigest())

    def remove(self, id: str) -> None:
        """The operator does not want a machine, or it has gone before it was accepted."""
        self._machines.pop(id, None)

    # One that is.

    def comes_back(self, id: object, key: object) -> str | None:
        """The id of an accepted machine that shows its key; None for any other."""
        try:
            digest = hashlib.sha256(read_bytes(key, KEY_SIZE)).hexdigest()
        except ProtocolError:
            return None
        machine = self._machines.get(id) if isinstance(id, str) else None
        right = hmac.compare_digest(digest, machine.key if machine is not None and machine.key else "0" * len(digest))
        return machine.id if machine is not None and right else None

    def connected(self, id: str, address: str, now: float) -> None:
        """An accepted machine is there, and brings its worker up."""
        self._change(id, state="accepted", since=now, address=address)

    def serves(self, id: str, address: str, memory: int, now: float) -> str:
        """Its worker is up. Returns the worker's name, which no other has had."""
        machine = self._machines[id]
        self._change(id, state="serving", since=now, address=address, memory=memory, serves=machine.serves + 1)
        return self._machines[id].worker

    def lost(self, id: str, now: float) -> str | None:
        """It is gone, or its worker was given up. Returns the worker's name where it was serving."""
        machine = self._machines.get(id)
        if machine is None or machine.state == "lost":
            return None
        if not machine.key:
            self.remove(id)
            return None
        self._change(id, state="lost", since=now)
        return machine.worker if machine.state == "serving" else None

    def serving(self, id: str) -> str | None:
        """The name of a machine's worker, None where it has none."""
        machine = self._machines.get(id)
        return machine.worker if machine is not None and machine.state == "serving" else None

    def of_worker(self, name: str) -> str | None:
        """The machine whose worker has this name."""
        serving = (machine for machine in self._machines.values() if machine.state == "serving")
        return next((machine.id for machine in serving if machine.worker == name), None)

    def _change(self, id: str, **fields: Any) -> None:
        self._machines[id] = replace(self._machines[id], **fields)

    def _free_name(self, name: str) -> str:
        """A name that no other machine has, and no worker of the server's own."""
        if name.startswith(_RESERVED):
            name = f"machine-{name}"[:32]
        names = {machine.name for machine in self._machines.values()}
        number, free = 1, name
        while free in names:
            number += 1
            free = f"{name[: 31 - len(str(number))]}-{number}"
        return free


def pack(machine: Machine) -> dict[str, Any]:
    """An accepted machine for a file."""
    return {"id": machine.id, "name": machine.name, "memory": machine.memory, "key": machine.key}


def unpack(fields: Mapping[str, Any]) -> Machine:
    """The machine from a file. Raises ProtocolError."""
    read_bytes(fields.get("id"), ID_SIZE)
    read_bytes(fields.get("key"), hashlib.sha256().digest_size)
    name, memory = read_name(fields.get("name")), read_memory(fields.get("memory"))
    return Machine(str(fields["id"]), name, memory, state="lost", key=str(fields["key"]))
