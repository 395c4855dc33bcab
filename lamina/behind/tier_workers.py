"""The attention workers that `LAMINA_ATTENTION_WORKERS` names, dealt among the processes of one model. "local:N" starts
them here."""

from __future__ import annotations

import atexit
import os

from lamina.behind import SWITCH
from lamina.behind.block_tier import TierWorker
from lamina.deploy.local import LocalAttentionWorkers
from lamina.deploy.worker_events import WorkerAddress
from lamina.errors import InvalidRequest
from lamina.system.machine import kv_share, this_machine
from lamina.system.text_files import parse_size
from lamina_workers.process.credentials import load_credentials

_LOCAL = "local"  # in the place of a host: workers that are started here
_KV_MEMORY = "LAMINA_BEHIND_KV_MEMORY"


def workers_of_rank(rank: int, ranks: int, cores: set[int]) -> list[TierWorker]:
    """Those of one rank, of all that `SWITCH` names. `cores`: where those that are started here may run. Raises
    InvalidRequest, EngineError."""
    text = os.environ[SWITCH]
    kind, _, number = text.partition(":")
    addresses = [address.strip() for address in text.split(",") if address.strip()]
    count = len(addresses)
    if kind == _LOCAL:
        count = int(number) if number.isdecimal() else 0
    if count < ranks:
        raise InvalidRequest(
            f"{SWITCH} is {text!r:.80}, for a model of {ranks} processes; allowed: host:port,... or {_LOCAL}:N, at "
            f"least one worker for each"
        )
    part = range(count * rank // ranks, count * (rank + 1) // ranks)
    if kind == _LOCAL:
        return _local_workers(len(part), count, cores)
    tls, token = (os.environ.get(f"LAMINA_BEHIND_{name}") for name in ("TLS_DIR", "TOKEN_FILE"))
    credentials = load_credentials(tls, token) if tls or token else None
    return [TierWorker(addresses[place], credentials) for place in part]


def _local_workers(number: int, on_host: int, cores: set[int]) -> list[TierWorker]:
    """So many workers in child processes, of those that start on this host. They end with this process; one that ends
    before is started again, and its `TierWorker` then has the new address."""
    size = os.environ.get(_KV_MEMORY)
    children = LocalAttentionWorkers(
        number,
        kv_memory=parse_size(_KV_MEMORY, size) if size else kv_share(this_machine(), on_host),
        threads=max(1, len(cores) // on_host),
    )
    bound = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)  # vLLM has bound this thread to a core, and its children would have no other
    try:
        addresses = children.start()
    finally:
        os.sched_setaffinity(0, bound)
    atexit.register(children.close)
    workers = {address.at: TierWorker(address.address, address.credentials) for address in addresses}

    def joined(address: WorkerAddress) -> None:
        workers[address.at].address, workers[address.at].credentials = address.address, address.credentials

    children.watch(joined, lambda name: None)
    return list(workers.values())
