"""gRPC as this project wants it. Import `grpc` from here: what its core reads from the environment counts only once, at
its first import in a process."""

from __future__ import annotations

import os
from importlib.metadata import version

EXPERIMENTS = "-event_engine_client,-event_engine_listener"
"""Threads that wait for events read the sockets themselves. With the event engine, threads of gRPC's own read them and
wake the others: on two cores a round trip of 16 KB takes a third longer."""
_KNOWN_BELOW = (1, 86)  # later versions may not know these names, and would complain in each process


def _experiments() -> str | None:
    """What `GRPC_EXPERIMENTS` should be; None: as it is."""
    is_tested = tuple(map(int, version("grpcio").split(".")[:2])) < _KNOWN_BELOW
    return EXPERIMENTS if is_tested and "GRPC_EXPERIMENTS" not in os.environ else None


if (_chosen := _experiments()) is not None:
    os.environ["GRPC_EXPERIMENTS"] = _chosen
try:
    import grpc
finally:
    if _chosen is not None:
        del os.environ["GRPC_EXPERIMENTS"]  # other libraries and processes have a gRPC of their own

__all__ = ["grpc"]
