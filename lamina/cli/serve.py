"""The command `serve`: options in, a server that runs until a signal, an exit code. `ps` lists the servers that run.

Imports neither torch nor the HTTP libraries: only the processes that it starts need them.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lamina.cli import options as opt
from lamina.cli.terminal import ProgressBars, print_json, print_rows
from lamina.config import DEFAULT_MODEL, EngineConfig
from lamina.errors import InvalidRequest
from lamina.joining.pairing import JOIN_PORT
from lamina.server.http.api_keys import keys_from_environment, keys_from_file
from lamina.system.child_process import KEY_VARIABLE
from lamina.system.logs import FORMATS, LEVELS, configure
from lamina.system.machine import kv_share, this_machine
from lamina_protocols.channels.channels import AddressError, is_loopback, split_address

if TYPE_CHECKING:
    from lamina.server.processes.server_plan import JoinPlan
    from lamina.server.settings import ServerSettings


_messages = logging.getLogger("lamina.server")
_messages.setLevel(logging.INFO)  # whatever the log level


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
    allow_origin: Annotated[
        list[str] | None,
        _server_option("Let web pages of this origin send requests, such as https://chat.example.org; repeatable."),
    ] = None
    open_to_all: Annotated[bool, _server_option("Listen beyond this host without an API key.", "--open")] = False
    served_model_name: Annotated[
        list[str] | None,
        _server_option("What requests call a lone model; repeatable. By default MODEL; of several, NAME=MODEL has it."),
    ] = None
    max_loaded: Annotated[int, _server_option("The most models in memory. A request for another waits for room.")] = 1
    idle_unload: Annotated[
        float | None, _server_option("Unload a model after so many seconds without a request. Default: never.")
    ] = None
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
    allow_join: Annotated[
        bool, _server_option("Let machines of this network ask to join (`lamina join`).", "--allow-join")
    ] = False
    join_address: Annotated[
        str | None,
        _server_option(
            f"Where they ask, with --allow-join; port 0 takes a free one. Default: 0.0.0.0:{JOIN_PORT}.",
            metavar="HOST:PORT",
        ),
    ] = None
    log_level: Annotated[str, _server_option("error, warning, info or debug.")] = "info"
    log_format: Annotated[str, _server_option("Log lines as text or as json.")] = "text"
    otlp_traces_endpoint: Annotated[
        str | None, _server_option("Where OpenTelemetry traces go, such as http://host:4318/v1/traces.")
    ] = None
    kv_events: Annotated[
        str | None,
        _server_option("Publish what is in the prefix cache over ZeroMQ, in vLLM's format: tcp://127.0.0.1:5557."),
    ] = None
    kv_events_replay: Annotated[
        str | None, _server_option("Where subscribers ask for events that they missed: tcp://127.0.0.1:6557.")
    ] = None
    kv_events_name: Annotated[
        str | None, _server_option("What events call this server. Default: the name of this machine.")
    ] = None

    def settings(self, models: Sequence[str]) -> ServerSettings:
        """The settings of the HTTP side for models of these names. Raises InvalidRequest for values that are not
        allowed."""
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
        if self.log_format not in FORMATS:
            raise InvalidRequest(f"log_format is {self.log_format!r:.80}; allowed are {', '.join(FORMATS)}")
        names = [*(self.served_model_name or models[:1])]
        if self.served_model_name and len(models) > 1:
            raise InvalidRequest(
                f"served_model_name is {self.served_model_name[0]!r:.80} beside {len(models)} models; write NAME=MODEL"
            )
        return ServerSettings(
            model=names[0],
            aliases=tuple(names[1:]),
            others=tuple(models[1:]),
            max_loaded=self.max_loaded,
            idle_unload=self.idle_unload,
            api_keys=tuple(keys),
            operator_keys=tuple(operators),
            host=self.host,
            allow_origins=tuple(self.allow_origin or ()),
            max_requests=self.max_requests,
            request_timeout=self.request_timeout,
            joining=self.allow_join,
            otlp_traces_endpoint=self.otlp_traces_endpoint,
            kv_events=self.kv_events,
            kv_events_replay=self.kv_events_replay,
            kv_events_name=self.kv_events_name,
        )


@opt.flatten_options
def serve(
    ctx: typer.Context,
    models: opt.ModelNames = None,
    model: Annotated[
        list[str] | None,
        typer.Option("--model", "-m", help="The same as MODEL; repeatable.", autocompletion=opt.complete_model),
    ] = None,
    *,
    server: ServerOptions,
    engine: opt.EngineOptions,
) -> None:
    """Serve one model, or several that are loaded on demand, to clients of OpenAI's and Anthropic's APIs. The page at /
    shows what happens; /metrics is for Prometheus."""
    from lamina.server.processes.server_plan import ServerPlan
    from lamina.server.processes.supervisor import Supervisor

    keywords, models = engine.config(), [*(models or []), *(model or [])]
    if engine.plan is not None:
        planned, keywords = _planned(engine.plan, keywords)
        models = models or [planned]
    if server.journal is not None:
        if server.no_journal:
            raise InvalidRequest("both --journal and --no-journal were given; allowed is one of the two")
        keywords["journal"] = str(server.journal.absolute())
    config = EngineConfig(**keywords)  # a wrong value fails before anything starts
    sources = [_named(text) for text in models or [DEFAULT_MODEL]]
    settings = server.settings([name for name, _ in sources])
    has_workers = config.attention_workers or config.autoscale or server.allow_join
    if has_workers and settings.max_loaded > 1 and config.cluster is None:
        raise InvalidRequest(
            f"max_loaded is {settings.max_loaded} beside attention workers, which serve one; allowed is 1"
        )
    configure("server", server.log_level, server.log_format)
    with ProgressBars(_messages.info, quiet=0) as progress:
        plan = ServerPlan(
            models=dict(zip(settings.models, (source for _, source in sources), strict=True)),
            settings=settings,
            host=server.host,
            port=server.port,
            drain=server.drain_timeout,
            journal=not server.no_journal and config.cluster is None,
            log_level=server.log_level,
            log_format=server.log_format,
            joining=_joining(server, config, settings),
            **_workers(config, keywords, settings.max_loaded),
        )
        Supervisor(plan, _Terminal(progress)).run()


def ps(as_json: opt.JsonLines = False) -> None:
    """The servers of this user on this machine: models with the processes of their engines, address, process, and for
    how long."""
    from lamina.server.processes.running import running_servers

    servers = running_servers()
    if as_json:
        print_json(*servers)
        return
    rows = [("model", "engine", "address", "server", "up")]
    for server in servers:
        where = server["address"], str(server["pid"]), str(timedelta(seconds=int(server["uptime"])))
        rows += [(name, str(pid or "not loaded"), *where) for name, pid in server["models"].items()]
    print_rows(rows if len(rows) > 1 else [("no server runs here: `lamina serve` starts one",)])


def _named(text: str) -> tuple[str, str]:
    """The name and the source of a model, from NAME=MODEL or MODEL. A path that exists is no name; a GGUF file is
    called as it is without its folder and ending."""
    name, equals, source = text.partition("=")
    if equals and name and source and not Path(text).exists():
        return name, source
    return (Path(text).stem if Path(text).suffix == ".gguf" else text), text


class _Terminal:
    """The supervisor's progress and messages, on stderr. Messages are few, so no level hides them."""

    def __init__(self, progress: ProgressBars) -> None:
        self._progress = progress

    def progress(self, what: str, done: int, total: int | None) -> None:
        self._progress(what, done, total)

    def said(self, message: str) -> None:
        self._progress.hide()
        _messages.info(message)


def _workers(config: EngineConfig, keywords: Mapping[str, Any], max_loaded: int) -> dict[str, Any]:
    """Fields of a `ServerPlan`: the engine's keywords, and the attention workers that the supervisor starts here.
    Models that are loaded together divide what one would take for its KV by itself."""
    engine = {name: str(value) if isinstance(value, Path) else value for name, value in keywords.items()}
    if not config.most_workers or config.cluster is not None:
        if max_loaded > 1 and config.cluster is None and not isinstance(config.kv_memory, int):
            engine |= {"kv_memory": kv_share(this_machine(), max_loaded * config.holders_here)}
        return {"engine": engine}
    machine = this_machine()
    memory = config.kv_memory if isinstance(config.kv_memory, int) else kv_share(machine, config.holders_here)
    engine = {name: value for name, value in engine.items() if name != "attention_workers"} | {"kv_memory": memory}
    threads = config.threads or machine.cores
    cold = config.cold_tier(memory, kv_share(machine, config.holders_here))
    return {
        "engine": engine,
        "workers": config.first_workers,
        "most_workers": config.most_workers,
        "kv_memory": memory,
        "threads": threads,
        "cold": cold,
    }


def _joining(server: ServerOptions, config: EngineConfig, settings: ServerSettings) -> JoinPlan | None:
    """Where machines may join. Raises InvalidRequest where the engine could not use them, or no operator would be asked
    whether they may."""
    from lamina.joining.records import joining_folder
    from lamina.server.processes.server_plan import JoinPlan

    if not server.allow_join:
        if server.join_address is not None:
            raise InvalidRequest(f"join_address is {server.join_address!r:.80}; allowed is one beside --allow-join")
        return None
    try:
        host, port = split_address(server.join_address or f"0.0.0.0:{JOIN_PORT}")
    except AddressError as error:
        raise InvalidRequest(f"join_address is {server.join_address!r:.80}; allowed is HOST:PORT") from error
    if not settings.protected and not is_loopback(server.host):
        raise InvalidRequest(
            "allow_join beside --open would let everybody accept machines; give the operator a key with --api-key-file"
        )
    if config.autoscale is not None:
        lowest, highest = config.autoscale
        raise InvalidRequest(f"allow_join beside autoscale of {lowest} to {highest}: allowed is one of the two")
    if config.cluster is not None or not isinstance(config.attention_workers, int):
        other = "cluster" if config.cluster is not None else "addresses of attention_workers"
        raise InvalidRequest(f"allow_join beside {other}: allowed is a number of attention_workers, or none")
    if not config.attention_workers and (config.local_share == 0 or config.model_workers > 1):
        what = "local_share is 0" if config.local_share == 0 else f"model_workers is {config.model_workers}"
        raise InvalidRequest(
            f"{what} with allow_join, so nothing could hold KV before a machine joins; allowed beside it are "
            "attention_workers"
        )
    return JoinPlan(host, port, joining_folder())


def _planned(path: Path, keywords: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The model and the engine's keywords of a plan file. Keywords of the command line override them."""
    from lamina.plan_file import read

    plan = read(path)
    for remark in plan.remarks():
        typer.echo(f"{path}: {remark}", err=True)
    return plan.model, plan.keywords(**keywords)
