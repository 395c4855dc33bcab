"""The server as a Ray Serve application: `build_app` is the import path that Serve's configuration and KubeRay name.

Serve's proxy listens, and Serve's controller watches a replica. The replica has the HTTP side in its own process, and
starts the engine on the cluster.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lamina.config import DEFAULT_MODEL, EngineConfig
from lamina.errors import EngineError, InvalidRequest
from lamina.server.http.api_keys import keys_from_environment, keys_from_file
from lamina.server.settings import ServerSettings
from lamina.system.child_process import KEY_VARIABLE

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

DEPLOYMENT = "Lamina"  # what Serve's configuration calls it

_ENGINE = {
    field.name: str(field.type)
    for field in fields(EngineConfig)
    if field.name not in ("cluster", "tls_dir", "token_file")  # a replica uses the cluster it runs on
}
_NOT_ARGUMENTS = (
    *("model", "aliases", "others", "max_loaded", "idle_unload", "api_keys", "operator_keys"),
    *("kv_events", "kv_events_replay", "kv_events_name"),
)
_SERVER = {field.name: str(field.type) for field in fields(ServerSettings) if field.name not in _NOT_ARGUMENTS}
_OWN = {
    "model": "str",
    "plan": "str | None",
    "served_model_name": "str | None",
    "api_key_file": "str | None",
    "operator_key_file": "str | None",
    "open": "bool",
    "drain_timeout": "float",
}
_ARGUMENTS = _OWN | _SERVER | _ENGINE
_BESIDE = 64  # requests that Serve accepts beyond `max_requests`, such as /health: they are answered at once
_ENDING = 25.0  # seconds for the engine and its workers to end, after the last request


@dataclass(frozen=True, slots=True)
class ServePlan:
    """What a replica starts. `settings` has no API keys, because Serve shows arguments: the replica reads them."""

    model: str
    config: EngineConfig
    settings: ServerSettings
    api_key_file: Path | None = None
    operator_key_file: Path | None = None
    open: bool = False
    drain_timeout: float = 30.0
    replicas: int = 1

    @classmethod
    def read(cls, arguments: Mapping[str, Any]) -> ServePlan:
        """From options of `lamina serve`, named with underscores. Raises InvalidRequest, which names the argument."""
        if not isinstance(arguments, Mapping):
            raise InvalidRequest(f"args is {arguments!r:.80}; allowed is an object of {', '.join(_ARGUMENTS)}")
        for given_name in arguments:
            if given_name not in _ARGUMENTS:
                raise InvalidRequest(f"unknown argument {given_name!r:.80}; known are {', '.join(sorted(_ARGUMENTS))}")
        values = {name: _value(name, value) for name, value in arguments.items() if value is not None}
        replicas = 1
        if (path := values.pop("plan", None)) is not None:
            planned, replicas = _planned(path)
            values = planned | values
        model: Any = values.get("model", DEFAULT_MODEL)
        name: Any = values.get("served_model_name")
        files = {argument: _path(values, argument) for argument in ("api_key_file", "operator_key_file")}
        for argument, text in {"model": model, "served_model_name": name, **files}.items():
            if text is not None and (not isinstance(text, str) or not text.strip()):
                raise InvalidRequest(f"{argument} is {text!r:.80}; allowed is text that is not empty")
        let_in, drain = values.get("open", False), values.get("drain_timeout", 30.0)
        if type(let_in) is not bool:
            raise InvalidRequest(f"open is {let_in!r:.80}; allowed is true or false")
        if type(drain) not in (int, float) or not 0 <= drain <= 86400:
            raise InvalidRequest(f"drain_timeout is {drain!r:.80}; allowed are 0 to 86400 seconds")
        return cls(
            model=model,
            config=EngineConfig(**{key: values[key] for key in _ENGINE if key in values}, cluster="auto"),
            settings=ServerSettings(model=name or model, **{key: values[key] for key in _SERVER if key in values}),
            api_key_file=Path(values["api_key_file"]) if "api_key_file" in values else None,
            operator_key_file=Path(values["operator_key_file"]) if "operator_key_file" in values else None,
            open=let_in,
            drain_timeout=float(drain),
            replicas=replicas,
        )

    def settings_here(self) -> ServerSettings:
        """The settings with the API keys of this host. Raises InvalidRequest where there are none, unless `open`."""
        keys = [*keys_from_environment(), *keys_from_file(self.api_key_file)]
        operators = keys_from_file(self.operator_key_file)
        if not keys and not operators and not self.open:
            raise InvalidRequest(
                f"there is no API key: set ${KEY_VARIABLE} on the hosts of the cluster, or api_key_file, or open to "
                "let everybody in"
            )
        return replace(self.settings, api_keys=tuple(keys), operator_keys=tuple(operators))


class Replica:
    """An ASGI application with an engine of its own on the cluster. It is constructed once the model is loaded."""

    def __init__(self, plan: ServePlan) -> None:
        from lamina.ray_cluster.handle import start_on_cluster
        from lamina.server.app import create_app
        from lamina.server.frontend import Frontend, Served, fingerprint
        from lamina.server.metrics.metrics import ServerMetrics

        settings = plan.settings_here()
        metrics = ServerMetrics(settings.model)
        self._frontend = Frontend(metrics.of(settings.model))
        self._app = create_app(self._frontend, settings, metrics)
        runtime = self._runtime = start_on_cluster(plan.model, plan.config)
        mark = fingerprint(plan.model, plan.config)
        self._frontend.ready(Served(runtime.engine, runtime.tokenizer, runtime.inputs, mark))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)

    def check_health(self) -> None:
        """Raises EngineError where the engine is dead."""
        if self._frontend.state == "dead":
            raise EngineError("the engine is dead")

    async def stop(self) -> None:
        await asyncio.get_running_loop().run_in_executor(None, self._runtime.stop)


class Ingress:
    """The methods that Serve calls beside those of HTTP. `app` is set by `serve.ingress`."""

    app: Replica

    def check_health(self) -> None:
        """Serve replaces a replica for which this raises a few times."""
        self.app.check_health()

    async def __del__(self) -> None:
        """Serve calls and awaits this after the last request; a replica that did not start has no `app`."""
        if (replica := getattr(self, "app", None)) is not None:
            await replica.stop()


def build_app(args: Mapping[str, Any]) -> Any:
    """The `ray.serve.Application` that serves a model on the cluster that it runs in.

    `args` are options of `lamina serve`: model, attention_workers, shard, kv_memory, served_model_name, max_requests
    and so on, and `open`. With `plan`, a file of `lamina plan`, there are as many replicas as it has. Text stands for
    numbers too, as in `serve run lamina.server.ray_serve:build_app model=NAME`. Raises InvalidRequest for arguments
    that `lamina serve` would refuse, EngineError where Ray Serve is missing.
    """
    plan = ServePlan.read(args)
    serve = _serve_module()

    def application() -> Replica:  # called in the replica
        return Replica(plan)

    deployment = serve.deployment(
        name=DEPLOYMENT,
        num_replicas=plan.replicas,
        max_ongoing_requests=plan.settings.max_requests + _BESIDE,  # Serve's own default would be 5
        health_check_period_s=2,
        health_check_timeout_s=30,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=plan.drain_timeout + _ENDING,
        ray_actor_options={"num_cpus": 0},  # like the engine and its workers, which have resources of their own
    )
    return deployment(serve.ingress(application)(Ingress)).bind()


def _serve_module() -> Any:
    """`ray.serve`. Raises EngineError where it is not installed."""
    try:
        from ray import serve
    except ImportError as error:
        raise EngineError("there is no Ray Serve: pip install 'ray[serve]>=2.54,<3'") from error
    return serve


def _value(name: str, value: Any) -> Any:
    """The value, parsed as JSON where it is text and the argument is not: `serve run` passes only text."""
    if not isinstance(value, str) or not any(kind in _ARGUMENTS[name] for kind in ("int", "float", "bool", "Mapping")):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


def _planned(path: Any) -> tuple[dict[str, Any], int]:
    """The arguments in a plan file, and how many replicas it has."""
    from lamina.plan_file import read

    if not isinstance(path, (str, Path)):
        raise InvalidRequest(f"plan is {path!r:.80}; allowed is the path of a file of `lamina plan --out`")
    plan = read(path)
    engine = {name: value for name, value in plan.keywords().items() if name != "cluster"}
    return {"model": plan.model, **engine}, plan.replicas


def _path(given: Mapping[str, Any], name: str) -> Any:
    path = given.get(name)
    return str(path) if isinstance(path, Path) else path
