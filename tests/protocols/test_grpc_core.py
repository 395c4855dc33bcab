"""Which threads of gRPC read sockets, in a process where this project imports it first."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version

import pytest

CALL = """
import os
from lamina_protocols.channels.grpc_client import WorkerClient, WorkerUnreachable
try:
    WorkerClient("127.0.0.1:1").status(5)
except WorkerUnreachable:
    print(os.environ.get("GRPC_EXPERIMENTS"))
"""
RELEASE = tuple(map(int, version("grpcio").split(".")[:2]))


@pytest.mark.skipif(not (1, 80) <= RELEASE < (1, 86), reason="this gRPC has one way of reading sockets")
@pytest.mark.parametrize(("given", "engine"), [(None, False), ("", True)])
def test_sockets_are_read_by_who_waits_unless_the_environment_says_something(given, engine):
    environment = {key: value for key, value in os.environ.items() if key != "GRPC_EXPERIMENTS"}
    environment |= {"GRPC_VERBOSITY": "debug", "GRPC_TRACE": "event_engine"}
    if given is not None:
        environment["GRPC_EXPERIMENTS"] = given
    done = subprocess.run(
        [sys.executable, "-c", CALL], env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == str(given)  # other processes get the environment as it was
    assert ("EventEngine::Connect" in done.stderr) is engine
    assert "Unknown experiment" not in done.stderr
