"""The head of a Ray cluster dies: requests go on until Ray ends its processes, and the log says so at once."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from ray_nodes import GENERATE, HEAD, PORT, Namespaces, cluster

from lamina.ray_cluster.handle import LIMIT, HeadWatch

SERVES = """
import logging, sys
logging.getLogger("lamina").addHandler(logging.StreamHandler(sys.stderr))
with on_cluster() as llm:
    expected = llm.generate("the 1 2", max_tokens=20, temperature=0).text
    say(serves=True)
    sys.stdin.readline()
    while True:
        say(same=llm.generate("the 1 2", max_tokens=20, temperature=0).text == expected)
        time.sleep(0.5)
"""


def test_what_is_new_is_said_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    there, now = [True], [0.0]

    def reach() -> None:
        if not there[0]:
            raise ConnectionRefusedError("nobody listens")

    monkeypatch.setenv(LIMIT, "77")
    watch = HeadWatch("10.0.0.1:6379", reach, lambda: now[0], pause=3600.0)
    try:
        for there[0], now[0] in ((True, 0.0), (False, 3.0), (False, 6.0), (True, 9.0), (True, 12.0)):
            watch.look()
    finally:
        watch.close()
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2
    assert "Ray's head at 10.0.0.1:6379 does not answer (nobody listens): requests go on" in said[0]
    assert "Ray ends its processes after 77 s" in said[0]
    assert said[1] == "Ray's head at 10.0.0.1:6379 answers again, after 6 s"


def heads(nodes: Namespaces) -> list[int]:
    found = subprocess.run(["ip", "netns", "pids", nodes.names[0]], capture_output=True, text=True, check=True)
    return [pid for pid in map(int, found.stdout.split()) if b"gcs_server" in Path(f"/proc/{pid}/cmdline").read_bytes()]


@pytest.mark.fault("F16")
@pytest.mark.real
@pytest.mark.timeout(240)
def test_requests_go_on_without_a_head_until_ray_ends_the_program(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LIMIT, "15")
    with cluster(tmp_path, {"lamina_model": 1, "lamina_attention": 2}) as nodes:
        with nodes.program(GENERATE.format(model=str(model)) + SERVES, 200) as program:
            assert program.hear() == {"serves": True}
            for head in heads(nodes):
                os.kill(head, signal.SIGKILL)
            killed = time.monotonic()
            program.tell()
            answers = list(program.process.stdout or ())
            assert time.monotonic() - killed > 10
            assert len(answers) > 5
            assert all("true" in answer for answer in answers)
            assert program.process.wait(30) != 0  # it is Ray that ends it
        said = (tmp_path / "errors").read_text()
        assert f"Ray's head at {HEAD}:{PORT} does not answer" in said
        assert "Ray ends its processes after 15 s" in said
