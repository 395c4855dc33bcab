"""Pages that nobody reads leave memory, come back when they are read, and nothing else changes."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attention_servers import KV_MEMORY, connected, running
from policy_bench import HEADS, LAYERS, PAGE, Bench, D, peaked, towards
from real_workers import write_tiny_model

from lamina import LLM
from lamina.errors import InvalidRequest
from lamina_kernels.paged import memory
from lamina_protocols.messages.layers import ColdTier
from lamina_protocols.messages.messages import Fetch, Fetched, FetchedPages, FetchPages
from lamina_workers.attention_server.attention_server import AttentionServer, ServerConfig
from lamina_workers.attention_worker import cold_pages
from lamina_workers.attention_worker.cold_pages import ColdPages
from lamina_workers.attention_worker.kv_pool import KVPool
from lamina_workers.errors import KVError
from lamina_workers.kv_pages.cold_file import OS_PAGE, ColdFile, check_folder, unnamed_file
from lamina_workers.kv_pages.parts import Int32

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="private mappings are dropped as Linux does it")

CHOOSING = "page_top_k(sink=16, recent=16, budget=0.1, least=1)"
LONG = 1120


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages leave after a few batches."""
    for name, value in {"IDLE_BATCHES": 6, "MIN_IDLE_BATCHES": 2, "SWEEP_BATCHES": 2}.items():
        monkeypatch.setattr(cold_pages, name, value)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk: where the usual one lies in memory, one here."""
    with tempfile.TemporaryDirectory(dir=Path(__file__).parent) as here:
        for folder in (tmp_path, Path(here)):
            with contextlib.suppress(KVError):
                os.close(unnamed_file(str(folder)))
                yield folder
                return
    pytest.skip("no folder on a disk")


@pytest.fixture
def file(disk: Path) -> ColdFile:
    return ColdFile(str(disk), memory.allocate(64 * OS_PAGE), 8 * OS_PAGE)


class Twins:
    """A worker whose pages may leave memory, and one whose pages may not, which get the same."""

    def __init__(self, folder: Path, policy: str = CHOOSING, resident: float = 1.0, **others: Any) -> None:
        self.bench = Bench(policy, cold=ColdTier(str(folder), resident), **others)
        self.twin = Bench(policy, **others)
        (pool,) = self.bench.worker.pools
        assert isinstance(pool, KVPool)
        assert pool._cold is not None
        self.cold: ColdPages = pool._cold
        self.handle = self.both(lambda bench: bench.open())
        self.both(lambda bench: bench.prefill(self.handle, LONG, **looked_at(bench, self.handle)))

    def both(self, do: Callable[[Bench], Any]) -> Any:
        """What both answer, which is the same."""
        answer, expected = do(self.bench), do(self.twin)
        if isinstance(answer, torch.Tensor):
            assert torch.equal(answer, expected)
        self.cold.check_integrity()
        return answer

    def decode(self, steps: int, number: int = 0, handle: int | None = None) -> None:
        """Steps whose queries all look into one direction."""
        q = towards(number).expand(LAYERS, 1, HEADS, D)
        for _ in range(steps):
            self.both(lambda bench: bench.step(handle or self.handle, q=q))

    def decode_until_cold(self, more: int = 200) -> None:
        """Decode until so many pages have left: they are written beside the batches."""
        for _ in range(200):
            self.decode(2)
            if len(self.gone()) > more:
                return
            time.sleep(0.005)
        raise AssertionError(f"only {len(self.gone())} pages have left")

    def gone(self, handle: int | None = None) -> Int32:
        """The pages of a part that are not in memory."""
        table = self.bench.worker.store.part(handle or self.handle).table
        pages = table[table >= 0]
        found: Int32 = pages[~self.cold._pages.in_memory[pages]]
        return found


def looked_at(bench: Bench, handle: int) -> dict[str, torch.Tensor]:
    """A prompt with keys on page 17 where queries look in direction 0, and on page 30 where they look in 1."""
    given = peaked(bench, handle, LONG, near=(17,))
    given["k"][:, 30 * PAGE : 31 * PAGE] += towards(1)
    return given


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_pages_that_no_choice_reads_leave_and_come_back(disk: Path, dtype: str) -> None:
    twins = Twins(disk, dtype=dtype)
    twins.decode_until_cold()
    table = twins.bench.worker.store.part(twins.handle).table
    assert not twins.cold._pages.in_memory[table[:, :, 30]].all()
    usage = twins.bench.usage(twins.handle)
    assert usage.held - usage.resident >= len(twins.gone()) - LAYERS * 3 * 2
    assert twins.twin.usage(twins.handle).resident == usage.held == usage.kept
    twins.decode(12, number=1)
    assert twins.cold._pages.in_memory[table[:, :, 30]].all()


def test_everything_comes_back_where_a_part_is_read_whole(disk: Path) -> None:
    twins = Twins(disk)
    twins.decode_until_cold()
    fork = twins.both(lambda bench: bench.fork(twins.handle, LONG - 5))
    twins.both(lambda bench: bench.prefill(fork, 40))
    assert not len(twins.gone(fork))
    twins.decode_until_cold()

    def fetched(bench: Bench) -> torch.Tensor:
        pages = bench.worker.handle(FetchPages(1, bench._batch, 0, LAYERS, twins.handle, 0, LONG))
        tokens = bench.worker.handle(Fetch(1, bench._batch, 1, twins.handle, 0, LONG))
        assert isinstance(pages, FetchedPages)
        assert isinstance(tokens, Fetched)
        return torch.cat([pages.pages.view(-1), tokens.k.view(torch.uint8).view(-1)])

    twins.both(fetched)
    assert not len(twins.gone())


def test_pages_that_left_can_be_written_again(disk: Path) -> None:
    """A part is cut back to the middle of a page that left, and goes on with other tokens."""
    twins = Twins(disk)
    twins.decode_until_cold()
    twins.both(lambda bench: bench.feed(twins.handle, 24 * PAGE + 3, 40))
    twins.both(lambda bench: bench.prefill(twins.handle, 600))
    twins.decode_until_cold(100)


def test_pages_that_nobody_holds_begin_anew(disk: Path) -> None:
    twins = Twins(disk)
    twins.decode_until_cold()
    twins.both(lambda bench: bench.close(twins.handle))
    other = twins.both(lambda bench: bench.open())
    twins.both(lambda bench: bench.prefill(other, 200, chunk=50))
    twins.decode(8, handle=other)
    cold, unheld = twins.cold, twins.bench.worker.store.references == 0
    entered = cold._file_chunks[cold._chunks(np.arange(len(unheld)))]
    assert not cold._pages.in_memory[unheld & entered].any()
    assert not cold._head_reads.keys() - {other}


def test_below_a_limit_the_longest_unread_leave_first(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cold_pages, "IDLE_BATCHES", 10_000)
    twins = Twins(disk, pages=600, resident=0.6)
    twins.decode_until_cold(20)
    kept = twins.cold._pages.in_memory[twins.bench.worker.store.part(twins.handle).table]
    assert kept[:, :, 17].all()
    assert not kept.all()
    roomy = Twins(disk, pages=600)
    roomy.decode(30)
    assert not len(roomy.gone())


def test_what_reads_everything_keeps_everything_in_memory(disk: Path) -> None:
    twins = Twins(disk, "full")
    twins.decode(30)
    assert not len(twins.gone())
    other = twins.both(lambda bench: bench.open())
    twins.both(lambda bench: bench.prefill(other, 40))
    for _ in range(20):  # meanwhile the first part, which rests, leaves
        twins.decode(2, handle=other)
        time.sleep(0.005)
    assert len(twins.gone())
    twins.decode(1)
    assert not len(twins.gone())


def test_a_full_disk_leaves_pages_in_memory(
    disk: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    twins = Twins(disk)

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("lamina_workers.kv_pages.cold_file.os.pwrite", full)
    for _ in range(20):
        twins.decode(2)
        time.sleep(0.002)
    assert not len(twins.gone())
    (record,) = caplog.records
    assert str(disk) in record.message
    assert "No space left" in record.message


@pytest.mark.parametrize(
    ("folder", "why"),
    [("missing", "No such file or directory"), ("/proc", "allowed is a folder on a disk"), ("/dev/shm", "in memory")],
)
def test_a_folder_that_cannot_be_used_is_refused_by_name(disk: Path, folder: str, why: str) -> None:
    if folder.startswith("/") and not Path(folder).is_dir():
        pytest.skip(f"no {folder} here")
    with pytest.raises(KVError, match=f"kv_cold is .*{why}"):
        Bench(CHOOSING, cold=ColdTier(str(disk / folder)))


def test_bytes_are_written_dropped_and_read_again(file: ColdFile) -> None:
    at = file._memory
    at[:] = 7
    file.save([(0, file.chunk)])
    file.enter(0)
    assert file.agrees(0, file.chunk)
    at[5] = 9  # stays in memory, away from the file
    assert not file.agrees(0, OS_PAGE)
    file.drop(OS_PAGE - 1, 3 * OS_PAGE + 1)
    assert at[5] == 9
    file.save([(0, OS_PAGE)])
    file.drop(0, OS_PAGE)
    assert at[:8].tolist() == [7, 7, 7, 7, 7, 9, 7, 7]
    file.discard(OS_PAGE, 2 * OS_PAGE)
    file.fetch(OS_PAGE, 3 * OS_PAGE)
    assert at[OS_PAGE : 3 * OS_PAGE].unique_consecutive().tolist() == [0, 7]
    file.leave(0)
    assert at[: file.chunk + 1].unique_consecutive().tolist() == [0, 7]
    assert file.chunks == 8


def test_what_left_takes_no_memory_of_the_system_either(disk: Path) -> None:
    """A file that was written in one go was cached in one piece, which stayed as long as a page of it was read."""
    size = 4 << 20
    file = ColdFile(str(disk), memory.allocate(size), size)
    file._memory[:] = 7
    file.save([(0, size)])
    file.enter(0)
    file.fetch(3 * OS_PAGE, 4 * OS_PAGE)
    assert file._memory[3 * OS_PAGE] == 7
    seen = (ctypes.c_ubyte * (size // OS_PAGE))()
    assert not file._libc.mincore(ctypes.c_void_p(file._address), ctypes.c_size_t(size), seen)
    assert 1 <= sum(each & 1 for each in seen) < size // OS_PAGE // 4


def test_the_file_has_no_name_and_goes_with_the_memory(disk: Path) -> None:
    twins = Twins(disk)
    file = twins.cold._file._file
    assert not list(disk.iterdir())
    os.fstat(file)
    del twins
    gc.collect()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(file)


def test_a_server_gives_its_seats_their_share_of_the_folder(disk: Path) -> None:
    with pytest.raises(KVError, match=r"kv_cold is .*missing"):
        AttentionServer(ServerConfig("w", 1 << 20, cold=ColdTier(str(disk / "missing"))))
    with pytest.raises(KVError, match="with KV on cuda:0; allowed is KV on a CPU"):
        check_folder(str(disk), "cuda:0")
    cold = ColdTier(str(disk), 0.5)
    with running(cold=cold) as (server, address), connected(address, seat_share=(1, 2)):
        (seat,) = server._leases._seats.values()
        assert seat.config.cold == cold
        assert seat.config.kv_memory == KV_MEMORY // 2


def test_an_engine_says_how_much_is_in_memory_and_the_text_is_the_same(disk: Path) -> None:
    model, prompt = write_tiny_model(disk / "m"), [n % 90 for n in range(400)]
    said = []
    for cold in (None, disk):
        with LLM(model, policy=CHOOSING, page_size=16, kv_cold=cold, kv_memory="2MiB", threads=1) as llm:
            for _ in range(8):  # its prefix is cached
                completion = llm.generate(prompt, max_tokens=24, temperature=0, ignore_eos=True)
        said.append(completion.token_ids)
    assert said[0] == said[1]
    assert completion.stats["kv_resident"] < completion.stats["kv_held"] == 1
    with pytest.raises(InvalidRequest, match=r"kv_cold is .*missing"):
        LLM(model, kv_cold=disk / "missing")
