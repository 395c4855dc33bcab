"""A tiny checkpoint on disk, attention workers as processes, and what can be seen of both. Shared by the tests over
real processes."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from engine_rig import TINY, Tensors
from kv_pools import pool_of
from safetensors.torch import save_file
from tokenizers import Tokenizer, models

from lamina import LLM
from lamina_protocols.channels.channels import Credentials
from lamina_protocols.channels.control import WorkerStatus
from lamina_protocols.channels.grpc_client import WorkerClient
from lamina_workers.kv_pages.kv_store import KVStore
from lamina_workers.model_config.config import ModelConfig
from lamina_workers.ports.port import LocalAttention
from lamina_workers.ports.remote import RemoteAttention

TOKEN_BYTES = 3 * 3 * 2 * 16 * 4  # of KV: layers, heads, K and V, d, float32


def write_tiny_model(folder: Path, **overrides: Any) -> Path:
    """The tiny model as a folder of files; a token is a word."""
    config = TINY | {"torch_dtype": "float32"} | overrides
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = Tensors(ModelConfig.from_dict(config))
    save_file({name: tensors.tensor(name).contiguous() for name in tensors.names()}, folder / "model.safetensors")
    word_tokenizer(folder, config["vocab_size"])
    return folder


def word_tokenizer(folder: Path, vocabulary: int) -> None:
    """A token is a word."""
    words = {f"w{index} ": index for index in range(vocabulary)}
    Tokenizer(models.WordLevel(words, unk_token="w0 ")).save(str(folder / "tokenizer.json"))


@dataclasses.dataclass
class WorkerProcess:
    """An attention worker that runs, and how to call it."""

    process: subprocess.Popen[str]
    address: str
    credentials: Credentials | None

    def status(self) -> WorkerStatus:
        with WorkerClient(self.address, self.credentials) as client:
            return client.status(5.0)

    def cpu_seconds(self) -> float:
        return cpu_seconds(self.process.pid)


@contextlib.contextmanager
def worker_process(
    *flags: str, credentials: Credentials | None = None, script: Path | None = None
) -> Iterator[WorkerProcess]:
    """A worker on loopback with 32 MB of KV (later flags win), which ends with the block. `script` runs its module in
    another way."""
    runs = [sys.executable, "-m" if script is None else str(script), "lamina_workers.attention_main"]
    command = [*runs, "--kv-memory", str(32 << 20), "--threads", "1"]
    process = subprocess.Popen(
        [*command, "--die-with-parent", *flags],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    try:
        line = process.stdout.readline() if process.stdout else ""
        match = re.fullmatch(r"listening (\S+:\d+)", line.strip())
        if match is None:
            raise RuntimeError(f"the worker said {line!r}")
        yield WorkerProcess(process, match[1], credentials)
    finally:
        process.kill()  # it may be stopped
        process.communicate()


def cpu_seconds(process: int) -> float:
    """CPU time that the threads of a process have used so far, in nanoseconds' steps: `stat` counts by ticks of 10 ms,
    and misses short work between two of them."""
    spent = (path.read_text().split()[0] for path in Path(f"/proc/{process}/task").glob("*/schedstat"))
    return sum(map(int, spent)) / 1e9


def ports(llm: LLM) -> list[RemoteAttention]:
    """The engine's ports to workers that it still uses."""
    replies = llm._runtime.engine._worker._replies.values()
    return [reply.port for reply in replies if isinstance(reply.port, RemoteAttention)]


def local_store(llm: LLM) -> KVStore:
    """The pages in the engine's own process."""
    replies = llm._runtime.engine._worker._replies.values()
    (port,) = [reply.port for reply in replies if isinstance(reply.port, LocalAttention)]
    return pool_of(port._worker).store


def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    """Wait until it holds; fail where it does not in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"{condition} does not hold within {seconds:g} s")
        time.sleep(0.02)


def all_pages_free(llm: LLM) -> bool:
    """Whether no holder keeps anything, asked of the workers themselves."""
    states = [port.status() for port in ports(llm)]
    store = local_store(llm)
    return store.free_pages == store.n_pages and all(s.parts == 0 and s.free_pages == s.total_pages for s in states)
