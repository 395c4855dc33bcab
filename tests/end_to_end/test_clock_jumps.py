"""The wall clock goes a day forward and back all the time, in every process: nothing waits, and nothing is lost."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from real_workers import write_tiny_model

pytestmark = pytest.mark.real

CLOCK = """
#define _GNU_SOURCE
#include <time.h>
#include <sys/time.h>
#include <sys/syscall.h>
#include <unistd.h>

static long jump(void) {
    struct timespec steady;
    syscall(SYS_clock_gettime, CLOCK_MONOTONIC, &steady);
    return (steady.tv_sec * 5 + steady.tv_nsec / 200000000) % 2 ? 86400 : -86400;
}
int clock_gettime(clockid_t clock, struct timespec *now) {
    int failed = syscall(SYS_clock_gettime, clock, now);
    if (!failed && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) now->tv_sec += jump();
    return failed;
}
int gettimeofday(struct timeval *now, void *zone) {
    int failed = syscall(SYS_gettimeofday, now, zone);
    if (!failed) now->tv_sec += jump();
    return failed;
}
time_t time(time_t *now) {
    struct timespec wall;
    clock_gettime(CLOCK_REALTIME, &wall);
    if (now) *now = wall.tv_sec;
    return wall.tv_sec;
}
"""

PROGRAM = """
import sys, time
from lamina import LLM

walls = []
with LLM(sys.argv[1], progress=False, dtype="float32", threads=1, page_size=16, kv_memory="8MiB", attention_workers=2,
         local_channel=False, local_share=0, worker_timeout=1.0, recovery_timeout=5.0,
         data_channel=sys.argv[2]) as llm:
    pool = llm._runtime.pools.attention
    names = [worker.name for worker in pool.workers.status()]
    end, texts = time.monotonic() + 4.0, set()
    while time.monotonic() < end:
        tokens = []
        for event in llm.stream([1, 2, 3], max_tokens=40, temperature=0):
            tokens.append(event.token_id)
            walls.append(time.time())
        texts.add(tuple(tokens))
    assert names == [worker.name for worker in pool.workers.status()] == ["attention-0", "attention-1"]
assert len(texts) == 1
jumps = sum(abs(later - earlier) > 80_000 for earlier, later in zip(walls, walls[1:]))
print("jumps", jumps)
"""


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("cc") is None, reason="needs Linux and a C compiler")
@pytest.mark.parametrize("data_channel", ["grpc", "tcp"])
def test_jumps_of_the_wall_clock_change_nothing(tmp_path: Path, data_channel: str) -> None:
    """Leases, heartbeats, deadlines and gRPC go by clocks that do not jump."""
    source, library = tmp_path / "clock.c", tmp_path / "clock.so"
    source.write_text(CLOCK)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
    model = write_tiny_model(tmp_path / "tiny")
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(model), data_channel],
        env=os.environ | {"LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert "is lost" not in ran.stderr
    assert int(ran.stdout.split()[-1]) > 3
