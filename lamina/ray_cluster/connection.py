"""The edge to Ray: the package, the connection to a cluster, what its nodes have, and which Lamina they run.

Only this file imports ray, and only when a cluster is used.
"""

from __future__ import annotations

import http.client
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from typing import Any

from lamina.errors import EngineError, InvalidRequest
from lamina_protocols.channels.channels import is_loopback, split_address
from lamina_protocols.channels.versions import PROTOCOL_VERSION, VersionMismatch, check_neighbours

NAMESPACE = "lamina"
MODEL, ATTENTION = "lamina_model", "lamina_attention"  # resources that `ray start --resources` gives a node
TIMEOUT = 60.0  # seconds for anything that Ray should do at once, the start of a process included

_UNPRINTED = "RAY_DEDUP_LOGS_SKIP_REGEX"
_OLDEST_RAY = (2, 54)
_ANY_CALL = "/ray.rpc.NodeInfoGcsService/CheckAlive"  # of the head; it changes nothing
_JOINING = 10.0  # seconds in which nodes may still join, and a previous engine may still end
_REACHING = 5.0  # seconds until a head that does not answer counts as absent
_POLL = 0.5  # seconds


def ray_module() -> Any:
    """The ray package. Raises EngineError where there is none, or an old one."""
    if "ray" not in sys.modules:
        with _quiet_import():
            _import_ray()
    ray = _import_ray()
    if tuple(int(part) for part in ray.__version__.split(".")[:2]) < _OLDEST_RAY:
        raise EngineError(f"a cluster needs ray 2.54 or newer; installed is {ray.__version__}")
    return ray


def _import_ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise EngineError("a cluster needs ray 2.54 or newer, and there is none: pip install 'ray>=2.54'") from error
    return ray


@contextmanager
def _quiet_import() -> Iterator[None]:
    """Ray prints deaths of workers on stdout, where answers go; a variable that it reads at its import leaves them out.

    The deaths of our workers are logged by "lamina". A program that imports ray itself keeps its own setting.
    """
    before = os.environ.get(_UNPRINTED)
    os.environ.setdefault(_UNPRINTED, ".")
    try:
        yield
    finally:
        if before is None:
            del os.environ[_UNPRINTED]


@contextmanager
def connection(address: str) -> Iterator[Any]:
    """The ray package, connected to the cluster at `address`; "auto" is this host's.

    The connection ends with the block, unless the program was connected before.
    """
    ray = ray_module()
    connected_here = connect(address)
    try:
        yield ray
    finally:
        if connected_here:
            ray.shutdown()


def connect(address: str) -> bool:
    """Connect this process to the cluster. Returns False where it was connected before. Raises InvalidRequest for a
    malformed address, EngineError where there is no cluster."""
    ray = ray_module()
    host, _, port = address.rpartition(":")
    if address != "auto" and (not host or not port.isdecimal() or "/" in host):
        raise InvalidRequest(f'cluster is {address!r:.80}; allowed are "auto" and the "host:port" of a Ray head')
    if ray.is_initialized():
        return False
    try:
        if address != "auto":
            check_reachable(host.strip("[]"), int(port))
        job = ray.job_config.JobConfig()
        job._runtime_env_has_working_dir = lambda: True  # else its processes import from our working folder first
        ray.init(address, namespace=NAMESPACE, job_config=job, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError) as error:
        raise EngineError(
            f"no Ray cluster at {address!r}: {str(error).rstrip('.')}. One is started with `ray start --head "
            f"""--resources='{{"{MODEL}": 1}}'`, and joined with `ray start --address=HEAD:6379 """
            f"""--resources='{{"{ATTENTION}": 1}}'`"""
        ) from error
    return True


def check_reachable(host: str, port: int) -> None:
    """Raise OSError where no process listens: Ray itself would try for minutes."""
    probe = http.client.HTTPConnection(host, port, timeout=_REACHING)
    try:
        probe.connect()  # a plain TCP connection; nothing is sent
    finally:
        probe.close()


def head_address() -> str:
    """Where the head of the connected cluster listens."""
    return str(ray_module().get_runtime_context().gcs_address)


def require_authentication() -> None:
    """Raise EngineError where other hosts reach the cluster's head and it answers a caller that shows nothing: such a
    cluster runs any program for anybody, as the user who started it."""
    from lamina_protocols.channels.grpc_core import grpc  # takes a while

    address = head_address()
    if is_loopback(split_address(address)[0]):
        return
    # Not Ray's own client, which would show this process's token.
    with grpc.insecure_channel(address, [("grpc.enable_http_proxy", 0)]) as channel:
        try:
            channel.unary_unary(_ANY_CALL)(b"", timeout=_REACHING)
        except grpc.RpcError as error:
            if error.code() in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNAVAILABLE):  # the latter: it has TLS
                return
    raise EngineError(
        f"the Ray cluster at {address} runs programs of everybody who reaches it: start its nodes with "
        "RAY_AUTH_MODE=token, set that here too, and make a token with `ray get-auth-token --generate`. insecure=True "
        "(--insecure) uses it as it is, for private networks"
    )


def require(wanted: Mapping[str, int], seconds: float = _JOINING) -> None:
    """Wait until the cluster has so much of each resource free. Raises EngineError after `seconds`, naming what is
    missing, and where a node that has one of the resources runs a Lamina whose protocol this process does not speak."""
    ray = ray_module()
    deadline = time.monotonic() + seconds
    while short := [name for name, count in wanted.items() if ray.available_resources().get(name, 0) < count]:
        if time.monotonic() >= deadline:
            raise EngineError(shortage(short[0], wanted[short[0]]))
        time.sleep(_POLL)
    compare_versions(_versions(wanted))


def request_nodes(bundle: Mapping[str, int], count: int) -> None:
    """Ask the cluster's autoscaler for room for `count` bundles of resources, in use or not. It holds until the next
    call of any program on the cluster; without an autoscaler nothing follows."""
    ray_module()
    from ray.autoscaler.sdk import request_resources

    request_resources(bundles=[dict(bundle)] * count)


def shortage(name: str, count: int) -> str:
    """An error text: the cluster has too little of a resource, how much it has, and what would bring more."""
    ray = ray_module()
    total = ray.cluster_resources().get(name, 0)
    free = ray.available_resources().get(name, 0)
    used = f", {total - free:g} of them in use" if free < total else ""
    return (
        f"the cluster has {total:g} {name}{used}; asked for are {count}. A node that joins brings one: "
        f"""`ray start --address=HEAD:6379 --resources='{{"{name}": 1}}'`"""
    )


def prefer(node: str) -> Any:
    """A scheduling strategy: on the node with this id, or on any other where that is gone."""
    ray_module()
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node, soft=True)


def compare_versions(there: Mapping[str, int | None]) -> None:
    """Raise EngineError where a node has a Lamina whose protocol version is no neighbour of this one's, or none."""
    for node, version in there.items():
        if version is None:
            raise EngineError(f"node {node} has no Lamina; this process has Lamina {metadata.version('lamina')}")
        try:
            check_neighbours(PROTOCOL_VERSION, version)
        except VersionMismatch as error:
            raise EngineError(f"node {node} has another Lamina. {error}") from error


def _versions(resources: Mapping[str, int]) -> dict[str, int | None]:
    """The protocol version of Lamina on each node that has one of the resources, by the node's address."""
    ray = ray_module()
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    def installed() -> int | None:  # sent by value: it must run where there is no Lamina, or another one
        import importlib

        # The number is where it is now, or where older packages had it; "messages" up to version 7.
        for module in ("channels.versions", "versions", "messages"):
            try:
                return int(importlib.import_module(f"lamina_protocols.{module}").PROTOCOL_VERSION)
            except (ImportError, AttributeError):
                continue
        return None

    task = ray.remote(num_cpus=0, max_retries=0)(installed)
    calls = {
        node["NodeManagerAddress"]: task.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote()
        for node in ray.nodes()
        if node["Alive"] and any(node["Resources"].get(name) for name in resources)
    }
    try:
        return dict(zip(calls, ray.get(list(calls.values()), timeout=TIMEOUT), strict=True))
    except RayError as error:
        raise EngineError(f"cannot ask the nodes {', '.join(calls)} for their versions: {error}") from error


def explain(error: Exception) -> str:
    """An error of Ray in one line: its own texts take a page, and the error of a call holds the call's exception."""
    cause = getattr(error, "cause", None)
    return f"{type(cause).__name__}: {cause}" if cause is not None else str(error).strip().partition("\n")[0]
