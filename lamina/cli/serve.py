"""The command `serve`: options in, a server that runs until a signal, an exit code.

Imports neither torch nor the HTTP libraries: only the processes that it starts need them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lamina.cli import options as opt
from lamina.cli.terminal import ProgressBars
from lamina.config import DEFAULT_MODEL, EngineConfig
from lamina.errors import InvalidRequest
from lamina.server.http.api_keys import keys_from_environment, keys_from_file
from lamina.system.child_process import KEY_VARIABLE
from lamina.system.machine import kv_share, this_machine
from lamina_protocols.channels import is_loopback

if TYPE_CHECKING:
    from lamina.server.settings import ServerSettings


def _server_option(help: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel="Server", **more)


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """Where a server listens, what a caller must show, and how long it waits. Times are seconds."""

    host: Annotated[str, _server_option("Where to listen; 0.0.0.0 is everywhere, and wants an API key.")] = "127.0.0.1"
    port: Annotated[int, _server_option("0 takes a free one.")] = 8000
    api_key: Annotated[
        list[str] | None,
        _server_option(
            f"Let in requests that show it; repeatable. Better in ${KEY_VARIABLE}, or a file: others see options."
        ),
    ] = field(default=None, repr=False)
    api_key_file: Annotated[Path | None, _server_option("A file with one API key a line.")] = None
    operator_key_file: Annotated[
        Path | None,
        _server_option(
            "A file with the operator's API keys: they see what all keys do, and may set priorities below 0."
        ),
    ] = None
    open_to_all: Annotated[bool, _server_option("Listen beyond this host without an API key.", "--open")] = False
    served_model_name: Annotated[str | None, _server_option("What requests call the model; MODEL by default.")] = None
    max_requests: Annotated[
        int, _server_option("Samples under way or waiting; more are refused for now. Each API key has a share.")
    ] = 1024
    request_timeout: Annotated[float, _server_option("Seconds that a request may take.")] = 600.0
    drain_timeout: Annotated[float, _server_option("Seconds for requests under way after SIGTERM or Ctrl-C.")] = 30.0
    journal: Annotated[
        Path | None,
        _server_option("Folder of the journal, from which a new engine goes on. Default: one of the server's."),
    ] = None
    no_journal: Annotated[bool, _server_option("Keep none: a new engine computes again.", "--no-journal")] = False
    log_level: Annotated[str, _server_option("error, warning, info or debug.")] = "warning"
    otlp_traces_endpoint: Annotated[
        str | None, _server_option("Where OpenTelemetry traces go, such as http://host:4318/v1/traces.")
    ] = None

    def settings(self, model: str) -> ServerSettings:
        """The settings of the HTTP side. Raises InvalidRequest for values that are not allowed."""
        from lamina.server.processes.child_protocol import LEVELS
        from lamina.server.settings import ServerSettings

        keys = [*(self.api_key or []), *keys_from_environment(), *keys_from_file(self.api_key_file)]
        operators = keys_from_file(self.operator_key_file)
        if not keys and not operators and not self.open_to_all and not is_loopback(self.host):
            raise InvalidRequest(
                f"host is {self.host!r} and there is no API key: give --api-key-file, --api-key or ${KEY_VARIABLE}, "
                "or --open to let everybody in"
            )
        if not 0 <= self.port <= 65535:
            raise InvalidRequest(f"port is {self.port}; allowed are 0 to 65535")
        if not 0 <= self.drain_timeout <= 86400:
            raise InvalidRequest(f"drain_timeout is {self.drain_timeout}; allowed are 0 to 86400 seconds")
        if self.log_level not in LEVELS:
            raise InvalidRequest(f"log_level is {self.log_level!r:.80}; allowed are {', '.join(LEVELS)}")
        return ServerSettings(
            model=self.served_model_name or model,
            api_keys=tuple(keys),
            operator_keys=tuple(operators),
            host=self.host,
            max_requests=self.max_requests,
            request_timeout=self.request_timeout,
            otlp_traces_endpoint=self.otlp_traces_endpoint,
        )


@opt.flatten_options
def serve(
    ctx: typer.Context, model: opt.ModelName = DEFAULT_MODEL, *, server: ServerOptions, engine: opt.EngineOptions
) -> None:
    """Serve a model to clients of OpenAI's API. The page at / shows what happens; /metrics is for Prometheus."""
    from lamina.server.processes.supervisor import ServerPlan, Supervisor

    keywords = engine.config()
    if engine.plan is not None:
        source = ctx.get_parameter_source("model")
        planned, keywords = _planned(engine.plan, keywords)
        model = planned if source is None or source.name == "DEFAULT" else model
    if server.journal is not None:
        if server.no_journal:
            raise InvalidRequest("both --journal and --no-journal were given; allowed is one of the two")
        keywords["journal"] = str(server.journal.absolute())
    config = EngineConfig(**keywords)  # a wrong value fails before anything starts
    settings = server.settings(model)
    with ProgressBars() as progress:
        plan = ServerPlan(
            model=model,
            settings=settings,
            host=server.host,
            port=server.port,
            drain=server.drain_timeout,
            journal=not server.no_journal and config.cluster is None,
            log_level=server.log_level,
            **_workers(config, keywords),
        )
        Supervisor(plan, _Terminal(progress)).run()


class _Terminal:
    """The supervisor's progress and messages, on stderr."""

    def __init__(self, progress: ProgressBars) -> None:
        self._progress = progress

    def progress(self, what: str, done: int, total: int | None) -> None:
        self._progress(what, done, total)

    def said(self, message: str) -> None:
        self._progress.hide()
        typer.echo(message, err=True)


def _workers(config: EngineConfig, keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a `ServerPlan`: the engine's keywords, and the attention workers that the supervisor starts here."""
    given = {name: str(value) if isinstance(value, Path) else value for name, value in keywords.items()}
    count = config.attention_workers
    if not isinstance(count, int) or not count or config.cluster is not None:
        return {"engine": given}
    machine = this_machine()
    memory = config.kv_memory if isinstance(config.kv_memory, int) else kv_share(machine, config.holders_here)
    given = {name: value for name, value in given.items() if name != "attention_workers"} | {"kv_memory": memory}
    threads = config.threads or machine.cores
    cold = config.cold_tier(memory, kv_share(machine, config.holders_here))
    return {"engine": given, "workers": count, "kv_memory": memory, "threads": threads, "cold": cold}


def _planned(path: Path, keywords: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The model and the engine's keywords of a plan file. Keywords of the command line override them."""
    from lamina.simulator.planning.plan_file import read

    plan = read(path)
    for remark in plan.remarks():
        typer.echo(f"{path}: {remark}", err=True)
    return plan.model, plan.keywords(**keywords)
