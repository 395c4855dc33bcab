"""`lamina join`, on the machine that gives its memory, and `lamina joining`, for the operator of the server.

torch is imported by the worker alone, which is another process.
"""

from __future__ import annotations

import select
import signal
import sys
from types import FrameType
from typing import Annotated, Any

import typer

from lamina.cli.options import JsonLines, Threads
from lamina.cli.terminal import print_json, print_rows, show_bytes
from lamina.client.connection import ask
from lamina.errors import InvalidRequest
from lamina.joining.pairing import plain_code, spaced
from lamina.system.child_process import KEY_VARIABLE
from lamina.system.machine import this_machine
from lamina.system.text_files import parse_size, show_size

joining_app = typer.Typer(no_args_is_help=True, help="The machines that join a server: see, accept, refuse, remove.")

Url = Annotated[str, typer.Option(help="Of the server.")]
Key = Annotated[str | None, typer.Option(help=f"The operator's API key. Better in ${KEY_VARIABLE}.")]
Code = Annotated[str, typer.Argument(metavar="CODE", help="The six digits that the machine shows.")]
Which = Annotated[str, typer.Argument(metavar="MACHINE", help="Its code, its name, or its id, as `ls` shows them.")]
_URL = "http://127.0.0.1:8000"


def join(
    server: Annotated[
        str | None, typer.Option(metavar="HOST[:PORT]", help="Default: the known one, or the one on this network.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="What the server calls this machine. Default: its own name.")] = None,
    memory: Annotated[
        str | None, typer.Option(help="For KV: bytes, or such as 8GiB. Default: half of what is free.")
    ] = (None),
    threads: Threads = None,
    port: Annotated[int, typer.Option(help="Where the worker listens, for a firewall; 0 takes a free port.")] = 0,
    yes: Annotated[bool, typer.Option("--yes", help="Trust the server without comparing the code here.")] = False,
) -> None:
    """Give a server of this network the memory of this machine, until Ctrl-C. The first time, both show a code, and
    the server's operator accepts it; later it joins by itself."""
    from lamina.joining.discovery import host_and_port
    from lamina.joining.machine import JoiningMachine
    from lamina.joining.pairing import plain_name, read_offer
    from lamina.joining.records import joining_folder
    from lamina.joining.stream import host_name
    from lamina.joining.worker import JoinOptions
    from lamina_protocols.channels.channels import AddressError
    from lamina_protocols.errors import ProtocolError

    machine = this_machine()
    size = machine.memory_available // 2 if memory is None else parse_size("memory", memory)
    if machine.memory and size > machine.memory:
        raise InvalidRequest(f"memory is {memory}; allowed are the {show_size(machine.memory)} that this machine has")
    if not 0 <= port <= 65535:
        raise InvalidRequest(f"port is {port}; allowed are 0 to 65535")
    try:
        named = plain_name(host_name()) if name is None else read_offer({"name": name, "memory": size}).name
        if server is not None:
            host_and_port(server)
    except AddressError as error:
        raise InvalidRequest(f"server is {server!r:.80}; allowed is HOST or HOST:PORT") from error
    except ProtocolError as error:
        raise InvalidRequest(str(error)) from error
    options = JoinOptions(
        name=named, memory=size, threads=threads or machine.cores, folder=joining_folder(), server=server, port=port
    )
    joining = JoiningMachine(options, _Terminal(yes))

    def leave(number: int, frame: FrameType | None) -> None:
        joining.leave()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, leave)
    joining.run()


class _Terminal:
    """The people at this machine, at a terminal; with `yes` they trust any server."""

    def __init__(self, yes: bool) -> None:
        self._yes = yes
        self._code = ""  # the one asked about
        self._answer: bool | None = None

    def said(self, message: str) -> None:
        typer.echo(message, err=True)

    def confirmed(self, code: str) -> bool | None:
        if self._yes:
            return True
        if code != self._code:
            self._code, self._answer = code, None
            _check_terminal()
            typer.echo("Does the server show this code? [y/N] ", nl=False, err=True)
        if self._answer is None and select.select([sys.stdin], [], [], 0)[0]:
            self._answer = sys.stdin.readline().strip().lower() in ("y", "yes")
            if self._answer:
                typer.echo("waits until the server accepts this machine", err=True)
        return self._answer


@joining_app.command("ls")
def list_machines(url: Url = _URL, api_key: Key = None, as_json: JsonLines = False) -> None:
    """The machines that wait, and those that were accepted."""
    machines = _machines(url, api_key)
    if as_json:
        print_json(*machines)
    elif not machines:
        typer.echo("no machine has asked")
    else:
        rows = [("machine", "code", "state", "at", "memory", "id")]
        for row in machines:
            code, memory = spaced(row["code"]) or "-", show_bytes(row["memory"])
            rows.append((row["name"], code, row["state"], row["address"] or "-", memory, row["id"]))
        print_rows(rows)


@joining_app.command()
def accept(
    code: Code,
    url: Url = _URL,
    api_key: Key = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask whether it is the right machine.")] = False,
) -> None:
    """Take the machine that shows this code."""
    digits = plain_code(code)
    chosen = next((machine for machine in _machines(url, api_key) if digits and machine["code"] == digits), None)
    if chosen is None:
        raise InvalidRequest(
            f"code is {code[:80]!r}; allowed are the six digits that your machine shows. If none waits with those, "
            "a third machine may be in between: accept none"
        )
    about = f"{chosen['name']} at {chosen['address']} with the code {spaced(digits)}"
    if not yes:
        _check_terminal()
        typer.confirm(f"Accept {about}?", abort=True, err=True)
    ask(url, f"/joining/{chosen['id']}", api_key, {"accept": True, "code": digits})
    typer.echo(f"{about} is accepted")


@joining_app.command()
def remove(machine: Which, url: Url = _URL, api_key: Key = None) -> None:
    """Refuse a machine that waits, or take one no longer."""
    chosen = _find(_machines(url, api_key), machine)
    ask(url, f"/joining/{chosen['id']}", api_key, {"accept": False})
    typer.echo(f"{chosen['name']} is {'refused' if chosen['state'] == 'waiting' else 'removed'}")


def _check_terminal() -> None:
    if not sys.stdin.isatty():
        raise InvalidRequest("stdin is no terminal, so nobody can compare the code; allowed is --yes")


def _find(machines: list[dict[str, Any]], which: str) -> dict[str, Any]:
    """The machine with this code, name or id. Raises InvalidRequest."""
    for machine in machines:
        if which in (machine["id"], machine["name"]) or (machine["code"] and plain_code(which) == machine["code"]):
            return machine
    names = ", ".join(spaced(row["code"]) or row["name"] for row in machines) or "there is none"
    raise InvalidRequest(f"there is no machine {which[:80]!r}; allowed: {names}")


def _machines(url: str, api_key: str | None) -> list[dict[str, Any]]:
    answer = ask(url, "/joining", api_key)
    if not answer.get("allowed"):
        raise InvalidRequest(f"the server at {url} takes no machines; start it with --allow-join")
    machines = answer.get("machines")
    return machines if isinstance(machines, list) else []
