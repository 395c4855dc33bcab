"""The commands around attention workers, with something else in the place of what they would start."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cli_runner import Lamina
from typer.testing import CliRunner

from lamina.cli import cluster
from lamina.cli.cluster import show_ranges, worker_row
from lamina.cli.main import app
from lamina.config import EngineConfig
from lamina.system.machine import Machine

NOW: dict[str, Any] = {
    "heads": (0, 1, 2), "lo": 0, "hi": 512, "parts": 2, "free_pages": 7, "total_pages": 9, "draining": False,
    "queries": 900, "bytes_in": 3 << 20, "bytes_out": 1 << 20, "busy": 4.5, "uptime": 60.0,
}  # fmt: skip
ROW = {"name": "attention-0", "address": "10.0.0.1:5", "state": "up", "worker": NOW}


class Served:
    """Stands where the attention worker would run."""

    def __init__(self, code: int = 0) -> None:
        self.argv: list[str] = []
        self._code = code

    def __call__(self, argv: list[str]) -> int:
        self.argv = argv
        return self._code


def test_flags_reach_the_model() -> None:
    lamina = Lamina()
    words = ["--attention-workers", "3", "--shard", "heads+sequence", "--lanes", "2", "--data-channel", "tcp"]
    words += ["--no-local-channel", "--tls-dir", "t", "--token-file", "f", "--insecure", "--query-first", "never"]
    for command in (["generate", "x"], ["chat"]):
        lamina(*command, *words)
        assert lamina.llm is not None
        assert lamina.llm.options == {
            "attention_workers": 3, "shard": "heads+sequence", "lanes": 2,
            "data_channel": "tcp", "local_channel": False, "tls_dir": "t", "token_file": "f", "insecure": True,
            "query_first": "never",
        }  # fmt: skip
        EngineConfig(**lamina.llm.options)


def test_what_is_not_given_is_left_to_the_engine() -> None:
    lamina = Lamina()
    lamina("generate", "x", "--cluster", "auto", "--lanes", "auto")
    assert lamina.llm is not None
    assert lamina.llm.options == {"cluster": "auto", "lanes": "auto"}


def test_addresses_may_be_repeated_or_have_commas_between_them() -> None:
    lamina = Lamina()
    lamina("generate", "x", "--attention-workers", "a:1, b:2", "--attention-workers", "[::1]:3")
    assert lamina.llm is not None
    assert lamina.llm.options["attention_workers"] == ["a:1", "b:2", "[::1]:3"]


@pytest.mark.parametrize("words", ["a", "2,3", "a:1,", "-1"])
def test_workers_that_are_neither_a_number_nor_addresses_are_refused(words: str) -> None:
    lamina = Lamina()
    result = lamina("generate", "x", f"--attention-workers={words}")
    assert result.exit_code == 2
    assert "--attention-workers" in result.stderr
    assert lamina.llm is None


def test_an_attention_worker_serves_with_what_it_was_given() -> None:
    serve = Served()
    words = ["--listen", "0.0.0.0:7", "--kv-memory", "2GiB", "--threads", "3", "--tls-dir", "t", "--token-file", "f"]
    result = CliRunner().invoke(app, ["attention-worker", *words, "--mutual-tls"], obj=serve)
    assert result.exit_code == 0
    given = dict(zip(serve.argv[::2], serve.argv[1::2], strict=False))
    assert given["--listen"] == "0.0.0.0:7"
    assert given["--kv-memory"] == str(2 << 30)
    assert given["--threads"] == "3"
    assert (given["--tls-dir"], given["--token-file"]) == ("t", "f")
    assert "--mutual-tls" in serve.argv
    assert "--insecure" not in serve.argv


def test_an_attention_worker_keeps_cold_kv_where_it_was_told() -> None:
    serve = Served()
    words = ["--kv-memory", "2GiB", "--kv-cold", "/d", "--kv-resident", "3GiB"]
    assert CliRunner().invoke(app, ["attention-worker", *words], obj=serve).exit_code == 0
    given = dict(zip(serve.argv[::2], serve.argv[1::2], strict=False))
    assert (given["--kv-cold"], given["--kv-resident"]) == ("/d", str(2 << 30))
    refused = CliRunner().invoke(app, ["attention-worker", "--kv-resident", "1GiB"], obj=serve)
    assert refused.exit_code == 2
    assert "without --kv-cold" in refused.stderr


def test_an_attention_worker_that_cannot_serve_is_an_exit_code() -> None:
    assert CliRunner().invoke(app, ["attention-worker"], obj=Served(1)).exit_code == 1
    refused = CliRunner().invoke(app, ["attention-worker", "--kv-memory", "much"], obj=Served())
    assert refused.exit_code == 2
    assert "'much'" in refused.stderr


@pytest.mark.parametrize("cold", [(), ("--kv-cold", "/tmp", "--kv-resident", "1000TiB")])
def test_an_attention_worker_takes_more_than_is_free_only_by_force(
    cold: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["attention-worker", "--kv-memory", "1024TiB", *cold]
    refused = CliRunner().invoke(app, words, obj=(served := Served()))
    assert (refused.exit_code, served.argv) == (2, [])
    assert re.search(r"10(24|00)TiB; allowed are the [\d.]+ [KMG]iB that are free", refused.stderr)
    assert CliRunner().invoke(app, [*words, "--force"], obj=served).exit_code == 0
    assert str(1 << 50) in served.argv
    monkeypatch.setattr(cluster, "this_machine", lambda: Machine("", 1, frozenset(), 0, 0))  # it does not say
    assert CliRunner().invoke(app, words, obj=served).exit_code == 0


def test_credentials_are_written_once(tmp_path: Path) -> None:
    folder = tmp_path / "tls"
    words = ["credentials", str(folder), "--host", "10.0.0.1", "--host", "worker.example"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0
    assert sorted(file.name for file in folder.iterdir()) == ["ca.pem", "cert.pem", "key.pem", "token"]
    assert (folder / "key.pem").stat().st_mode & 0o77 == 0
    assert str(folder / "token") in result.stdout
    again = CliRunner().invoke(app, words)
    assert again.exit_code == 1
    assert again.stderr.count("\n") == 1


def test_runs_of_heads_are_shown_short() -> None:
    assert show_ranges((0, 1, 2, 5, 7, 8)) == "0-2,5,7-8"
    assert show_ranges(()) == ""


def test_a_worker_is_one_row_with_rates_over_the_time_between() -> None:
    earlier = NOW | {"queries": 700, "bytes_in": 1 << 20, "bytes_out": 0, "busy": 3.5, "uptime": 58.0}
    assert worker_row(ROW, earlier, 2.0) == (
        "attention-0", "10.0.0.1:5", "up", "0-2", "0 to 512", "7 of 9", "100", "1.0 MiB", "0.5 MiB", "50%",
    )  # fmt: skip


def test_a_worker_that_was_started_again_has_no_rates_yet() -> None:
    restarted = NOW | {"uptime": 1.0, "parts": 0, "heads": (), "draining": True}
    row = worker_row(ROW | {"worker": restarted}, NOW, 2.0)
    assert row[2:] == ("draining", "-", "-", "7 of 9", "-", "-", "-", "-")


def test_a_worker_that_does_not_answer_says_why() -> None:
    row = worker_row({"name": "attention-0", "address": None, "state": "starting", "error": "nobody there"}, None, 1.0)
    assert row == ("attention-0", "-", "starting", *["-"] * 6, "nobody there")


@pytest.mark.real
def test_no_cluster_is_one_line_and_an_exit_code() -> None:
    code = "from lamina.cli.main import main; main()"
    for command in ("status", "down", "drain"):
        words = [sys.executable, "-c", code, "cluster", command, "--address", "127.0.0.1:1"]
        words += ["attention-0"] if command == "drain" else []
        result = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
        assert (result.returncode, result.stdout) == (1, "")
        assert result.stderr.startswith("error: no Ray cluster at '127.0.0.1:1'")
        assert result.stderr.count("\n") == 1
