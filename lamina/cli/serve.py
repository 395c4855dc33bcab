"""The command `serve`: words in, a server that runs until a signal, an exit code.

Knows words and how a server is put together from them; what a server does, `lamina.server` knows. Imports neither torch
nor the HTTP libraries: those are for the processes that it starts.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from lamina.cli import options as opt
from lamina.cli.terminal import ProgressBars
from lamina.config import DEFAULT_MODEL, EngineConfig
from lamina.errors import InvalidRequest
from lamina.server.http.api_keys import KEY_VARIABLE, keys_from_environment, keys_from_file
from lamina.system.machine import kv_share, this_machine
from lamina_protocols.channels import is_loopback


def _server_option(help: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel="Server", **more)


@opt.engine_options
def serve(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="An alias, a folder, a GGUF file or a hub id.")] = (
        DEFAULT_MODEL
    ),
    host: Annotated[str, _server_option("Where to listen; 0.0.0.0 is everywhere, and wants an API key.")] = "127.0.0.1",
    port: Annotated[int, _server_option("0 takes a free one.")] = 8000,
    api_key: Annotated[
        list[str] | None,
        _server_option(f"Let in who shows it; repeatable. Better in ${KEY_VARIABLE}, or a file: others see options."),
    ] = None,
    api_key_file: Annotated[Path | None, _server_option("A file with one API key a line.")] = None,
    open_to_all: Annotated[bool, _server_option("Listen beyond this host without an API key.", "--open")] = False,
    served_model_name: Annotated[str | None, _server_option("What requests call the model; MODEL by default.")] = None,
    max_requests: Annotated[int, _server_option("Samples under way or waiting; more are told to come back.")] = 1024,
    request_timeout: Annotated[float, _server_option("Seconds that a request may take.")] = 600.0,
    drain_timeout: Annotated[float, _server_option("Seconds for requests under way after SIGTERM or Ctrl-C.")] = 30.0,
    journal: Annotated[
        Path | None,
        _server_option("Folder of the journal, from which a new engine goes on. Default: one of the server's."),
    ] = None,
    no_journal: Annotated[bool, _server_option("Keep none: a new engine computes again.", "--no-journal")] = False,
    log_level: Annotated[str, _server_option("error, warning, info or debug.")] = "warning",
    otlp_traces_endpoint: Annotated[
        str | None, _server_option("Where OpenTelemetry traces go, such as http://host:4318/v1/traces.")
    ] = None,
    *,
    engine: opt.EngineOptions,
) -> None:
    """Serve a model to clients of OpenAI's API. The page at / shows what happens; /metrics is for Prometheus."""
    from lamina.server.processes.child_protocol import LEVELS
    from lamina.server.processes.supervisor import ServerPlan, Supervisor
    from lamina.server.settings import ServerSettings

    keywords = engine.config()
    if engine.plan is not None:
        source = ctx.get_parameter_source("model")
        planned, keywords = _planned(engine.plan, keywords)
        model = planned if source is None or source.name == "DEFAULT" else model
    if journal is not None:
        if no_journal:
            raise InvalidRequest("both --journal and --no-journal were given; allowed is one of the two")
        keywords["journal"] = str(journal.absolute())
    config = EngineConfig(**keywords)  # what is wrong is said before anything starts
    keys = [*(api_key or []), *keys_from_environment(), *keys_from_file(api_key_file)]
    if not keys and not open_to_all and not is_loopback(host):
        raise InvalidRequest(
            f"host is {host!r} and there is no API key: give --api-key-file, --api-key or ${KEY_VARIABLE}, "
            "or --open to let everybody in"
        )
    if not 0 <= port <= 65535:
        raise InvalidRequest(f"port is {port}; allowed are 0 to 65535")
    if not 0 <= drain_timeout <= 86400:
        raise InvalidRequest(f"drain_timeout is {drain_timeout}; allowed are 0 to 86400 seconds")
    if log_level not in LEVELS:
        raise InvalidRequest(f"log_level is {log_level!r:.80}; allowed are {', '.join(LEVELS)}")
    settings = ServerSettings(
        model=served_model_name or model,
        api_keys=tuple(keys),
        host=host,
        max_requests=max_requests,
        request_timeout=request_timeout,
        otlp_traces_endpoint=otlp_traces_endpoint,
    )
    with ProgressBars() as progress:
        plan = ServerPlan(
            model=model,
            settings=settings,
            host=host,
            port=port,
            drain=drain_timeout,
            journal=not no_journal and config.cluster is None,
            log_level=log_level,
            **_workers(config, keywords),
        )
        Supervisor(plan, _Terminal(progress)).run()


class _Terminal:
    """Where the supervisor's words go."""

    def __init__(self, progress: ProgressBars) -> None:
        self._progress = progress

    def progress(self, what: str, done: int, total: int | None) -> None:
        self._progress(what, done, total)

    def said(self, message: str) -> None:
        self._progress.hide()
        typer.echo(message, err=True)


def _workers(config: EngineConfig, keywords: Mapping[str, Any]) -> dict[str, Any]:
    """What of a plan says who attends: the supervisor starts workers on this machine, and then the engine is told."""
    given = {name: str(value) if isinstance(value, Path) else value for name, value in keywords.items()}
    count = config.attention_workers
    if not isinstance(count, int) or not count or config.cluster is not None:
        return {"engine": given}
    machine = this_machine()
    memory = config.kv_memory if isinstance(config.kv_memory, int) else kv_share(machine, config.holders_here)
    given = {name: value for name, value in given.items() if name != "attention_workers"} | {"kv_memory": memory}
    return {"engine": given, "workers": count, "kv_memory": memory, "threads": config.threads or machine.cores}


def _planned(path: Path, keywords: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The model and the engine's keywords of a plan file, those on the command line over them."""
    from lamina.simulator.planning.plan_file import read

    plan = read(path)
    for remark in plan.remarks():
        typer.echo(f"{path}: {remark}", err=True)
    return plan.model, plan.keywords(**keywords)
