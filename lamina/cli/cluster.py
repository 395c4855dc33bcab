"""The commands around attention workers: serve as one, make credentials, show a cluster, end it, drain a worker."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from lamina.cli.options import JsonLines, Threads, flatten_options
from lamina.cli.terminal import print_json, print_rows, show_bytes
from lamina.errors import InvalidRequest
from lamina.system.machine import this_machine
from lamina.system.text_files import parse_size, show_size

cluster_app = typer.Typer(
    no_args_is_help=True,
    help="Look at the engines on a Ray cluster, end them, drain a worker. Engines with child processes or given "
    "addresses as workers have no cluster that could be asked: their workers end with them, or with a signal.",
)

Address = Annotated[str, typer.Option(help="Of the Ray cluster; auto is the one of this host.")]
_COLUMNS = ("worker", "at", "state", "heads", "positions", "pages free", "queries/s", "in/s", "out/s", "busy")
_SAMPLE = 1.0  # seconds over which rates are measured


@cluster_app.command()
def status(address: Address = "auto", as_json: JsonLines = False) -> None:
    """The engines of a cluster, and what each of their attention workers holds and does. Takes a second."""
    from lamina.ray_cluster.connection import connection
    from lamina.ray_cluster.handle import engine_status

    with connection(address) as ray:
        before, start = engine_status(ray), time.monotonic()
        if not as_json and before:
            time.sleep(_SAMPLE)
        after = engine_status(ray) if before else before
    if as_json:
        print_json(*({"engine": name, **engine} for name, engine in after.items()))
        return
    if not after:
        typer.echo("no engine runs on this cluster")
    for name, engine in after.items():
        typer.echo(f"{name}: {engine['model']}, {'alive' if engine['alive'] else 'not serving'}")
        for row in engine["model_workers"]:
            typer.echo(f"{row['name']}: {row['state']}, process {row['process']}, started {row['restarts'] + 1} times")
        earlier = {row["name"]: row.get("worker") for row in before.get(name, {"workers": ()})["workers"]}
        seconds = time.monotonic() - start
        print_rows([_COLUMNS, *(worker_row(row, earlier.get(row["name"]), seconds) for row in engine["workers"])])


@cluster_app.command()
def down(address: Address = "auto") -> None:
    """End every engine on a cluster, and their workers. Ray itself stays."""
    from lamina.ray_cluster.connection import connection
    from lamina.ray_cluster.handle import end_engines

    with connection(address) as ray:
        ended = end_engines(ray)
    typer.echo(f"ended {', '.join(ended)}" if ended else "no engine runs on this cluster")


@cluster_app.command()
def drain(
    worker: Annotated[str, typer.Argument(help="A name that `status` shows, or ENGINE/NAME.")],
    address: Address = "auto",
) -> None:
    """Move what a worker holds to the others while requests go on, then use it no more. What has no room is computed
    again."""
    from lamina.ray_cluster import handle as ray_engine
    from lamina.ray_cluster.connection import connection

    with connection(address) as ray:
        engine = ray_engine.drain(ray, worker)
    typer.echo(f"{worker} is drained: {engine} uses it no more")


def worker_row(row: Mapping[str, Any], earlier: Mapping[str, Any] | None, seconds: float) -> tuple[str, ...]:
    """One line of `status`. `earlier` is the worker's own report `seconds` before; rates need it."""
    identity = (row["name"], row["address"] or "-", row["state"])
    now = row.get("worker")
    if now is None:
        return (*identity, *["-"] * (len(_COLUMNS) - len(identity) - 1), row.get("error", "-"))
    rates = ["-"] * 4
    if earlier is not None and earlier["uptime"] <= now["uptime"]:
        queries, received, sent, busy = (
            (now[name] - earlier[name]) / seconds for name in ("queries", "bytes_in", "bytes_out", "busy")
        )
        rates = [f"{queries:.0f}", show_bytes(int(received)), show_bytes(int(sent)), f"{busy:.0%}"]
    positions = f"{now['lo']} to {now['hi']}" if now["parts"] else "-"
    state = "draining" if now["draining"] else identity[2]
    pages = f"{now['free_pages']} of {now['total_pages']}"
    return (*identity[:2], state, show_ranges(now["heads"]) or "-", positions, pages, *rates)


def show_ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers as text, runs of them as "0-3"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)


@dataclass(frozen=True, slots=True)
class AttentionWorkerOptions:
    """Where an attention worker listens, what it may use, and what a caller must show."""

    listen: Annotated[str, typer.Option(metavar="HOST:PORT", help="Port 0 takes a free one.")] = "127.0.0.1:0"
    data_port: Annotated[int, typer.Option(help="Port for --data-channel tcp; 0 takes a free one.")] = 0
    kv_memory: Annotated[str | None, typer.Option(help="Bytes, or such as 64GiB. Default: half of what is free.")] = (
        None
    )
    kv_cold: Annotated[str | None, typer.Option(help="Folder on a disk for KV that nobody reads for long.")] = None
    kv_resident: Annotated[
        str | None, typer.Option(help="Memory for KV beside --kv-cold. Default: half of what is free, at most.")
    ] = None
    force: Annotated[bool, typer.Option("--force", help="Take more memory than is free.")] = False
    threads: Threads = None
    name: Annotated[str, typer.Option(help="What status and errors call this worker.")] = "attention"
    tls_dir: Annotated[str | None, typer.Option(help="Folder with ca.pem, cert.pem and key.pem.")] = None
    token_file: Annotated[str | None, typer.Option(help="File with the token that callers must show.")] = None
    mutual_tls: Annotated[bool, typer.Option("--mutual-tls", help="Callers must show a certificate too.")] = False
    insecure: Annotated[bool, typer.Option("--insecure", help="Serve other hosts without TLS or token.")] = False
    drain_timeout: Annotated[
        float, typer.Option(min=0, metavar="SECONDS", help="Time for KV to move to other workers after SIGTERM.")
    ] = 25.0

    def argv(self) -> list[str]:
        """The arguments of `python -m lamina_workers.attention_main`."""
        machine = this_machine()
        free = machine.memory_available // 2
        size = free if self.kv_memory is None else parse_size("kv_memory", self.kv_memory)
        argv = ["--listen", self.listen, "--data-port", str(self.data_port), "--kv-memory", str(size)]
        resident = size
        if self.kv_cold is not None:
            resident = min(size, free if self.kv_resident is None else parse_size("kv_resident", self.kv_resident))
            argv += ["--kv-cold", self.kv_cold, "--kv-resident", str(resident)]
        elif self.kv_resident is not None:
            raise InvalidRequest(f"--kv-resident is {self.kv_resident} without --kv-cold; allowed is both")
        if 0 < machine.memory_available < resident and not self.force:  # 0: the system does not say
            option = f"kv-memory is {self.kv_memory}" if resident == size else f"kv-resident is {self.kv_resident}"
            free_now = show_size(machine.memory_available)
            raise InvalidRequest(f"--{option}; allowed are the {free_now} that are free on this machine, or --force")
        argv += ["--name", self.name, "--threads", str(self.threads or machine.cores)]
        argv += ["--drain-timeout", str(self.drain_timeout)]
        argv += [] if self.tls_dir is None else ["--tls-dir", self.tls_dir]
        argv += [] if self.token_file is None else ["--token-file", self.token_file]
        return argv + ["--mutual-tls"] * self.mutual_tls + ["--insecure"] * self.insecure


@flatten_options
def attention_worker(ctx: typer.Context, worker: AttentionWorkerOptions) -> None:
    """Serve as an attention worker until Ctrl-C: hold KV, and attend to it, for one engine at a time. Its KV moves to
    the engine's other workers before it ends."""
    raise typer.Exit(_serve(ctx)(worker.argv()))


def _serve(ctx: typer.Context) -> Callable[[list[str]], int]:
    """`attention_main.main`, or the function that a caller of the app gave as `ctx.obj`."""
    if ctx.obj is not None:
        serve: Callable[[list[str]], int] = ctx.obj
        return serve
    from lamina_workers.attention_main import main

    return main


def credentials(
    folder: Annotated[str, typer.Argument(help="Where to write ca.pem, cert.pem, key.pem and token.")],
    host: Annotated[list[str], typer.Option(help="A worker's name or IP address, as engines call it. Repeatable.")],
) -> None:
    """Make a CA, a certificate for some hosts, and a token: for workers on several hosts without Ray."""
    from lamina_workers.process.credentials import TOKEN_NAME, make_credentials

    make_credentials(folder, host)
    token = Path(folder) / TOKEN_NAME
    typer.echo(f"{folder} has a certificate for {', '.join(host)}, good for both ends. Copy it to them, then")
    typer.echo(f"  lamina attention-worker --listen HOST:PORT --tls-dir {folder} --token-file {token}")
    typer.echo(f"  lamina generate --attention-workers HOST:PORT --tls-dir {folder} --token-file {token} ...")
