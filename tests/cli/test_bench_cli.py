"""`lamina bench serve` as people run it, against a server without a model; and what its files hold."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import typer
from mock_openai_server import NAME, Behaviour, serving_in_thread
from typer.testing import CliRunner

from lamina.cli.bench import bench_app
from lamina.cli.main import Commands

app = typer.Typer(cls=Commands)
app.add_typer(bench_app, name="bench")
FEW = ["--num-prompts", "12", "--input-len", "20", "--output-len", "5", "--max-concurrency", "4"]


def bench(*words, env=None):
    keys = {"LAMINA_API_KEY": None, "OPENAI_API_KEY": None}
    return CliRunner().invoke(app, ["bench", "serve", *words], env={**keys, **(env or {})})


def against(behaviour, *words, env=None):
    with serving_in_thread(behaviour) as (url, server):
        return bench("--base-url", url, *words, env=env), server


def test_the_table_has_vllms_names():
    result, server = against(Behaviour(cached=3), *FEW, "--goodput", "ttft:9000", "tpot:1000", "--percentile", "50,99")
    assert result.exit_code == 0, result.output
    lines = {
        name.strip(): value.strip() for name, _, value in (line.partition(":") for line in result.output.splitlines())
    }
    assert lines["Successful requests"] == "12"
    assert lines["Failed requests"] == "0"
    assert lines["Maximum request concurrency"] == "4"
    assert lines["Total input tokens"] == str(12 * 21)
    assert lines["Total generated tokens"] == "60"
    assert lines["Request goodput (req/s)"] == lines["Request throughput (req/s)"]
    for metric in ("TTFT", "TPOT", "ITL", "E2EL"):
        for name in ("Mean", "Median", "P50", "P99"):
            assert float(lines[f"{name} {metric} (ms)"]) >= 0
        assert lines[f"P50 {metric} (ms)"] == lines[f"Median {metric} (ms)"]
    assert "36 input tokens" in lines["cached"]
    assert server.most_active <= 4
    assert server.number == 13  # with the warm-up


def test_files_hold_everything_but_the_key(tmp_path):
    saved = tmp_path / "r.json"
    result, _ = against(
        Behaviour(key="secret", fails=lambda n: "429" if n == 5 else ""), *FEW, "--api-key", "secret", "--json",
        "--save-result", str(saved), "--save-detailed", "--goodput", "ttft:9000",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    fields, shown = json.loads(saved.read_text()), json.loads(result.stdout)
    assert "secret" not in saved.read_text() + result.output
    requests = fields.pop("requests")
    assert {**fields, "date": 0} == {**shown, "date": 0}
    assert (fields["schema"], fields["schema_version"], fields["model_id"]) == ("lamina.bench.serve", 1, NAME)
    assert (fields["completed"], fields["failed"], fields["failures"]) == (11, 1, {"HTTP 429": 1})
    assert fields["failure_details"] == {"HTTP 429": "told to fail"}
    assert fields["machine"]["cores"] >= 1
    assert {"mean_ttft_ms", "median_tpot_ms", "p99_itl_ms", "std_e2el_ms", "request_goodput"} <= fields.keys()
    assert len(requests) == 12
    good = [each for each in requests if not each["error"]]
    assert sum(each["output_tokens"] for each in good) == fields["total_output_tokens"] == 55
    assert all(len(each["chunks"]) == 5 for each in good)
    pytest.importorskip("matplotlib", reason="matplotlib is of the extra plots")
    script = Path(__file__).parents[2] / "scripts" / "bench" / "serve_picture.py"
    subprocess.run([sys.executable, script, saved], check=True)
    assert saved.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_prompts_differ_between_runs_and_not_with_a_seed():
    def prompts(*words):
        _, server = against(Behaviour(), *FEW, "--endpoint", "completions", *words)
        return sorted(fields["prompt"] for fields in server.behaviour.requests)

    assert not set(prompts()) & set(prompts())
    seeded = prompts("--seed", "5")
    assert seeded == prompts("--seed", "5")
    assert len(set(seeded)) == 13


@pytest.mark.parametrize(
    ("behaviour", "words", "said"),
    [
        (Behaviour(), [], "by the server's /tokenize"),
        (Behaviour(tokenize="", around=7), [], "one token, of a list of"),
        (Behaviour(tokenize="", usage=False), [], "by a guess"),
        (Behaviour(cost=lambda word: 3), [], "at 3.00 tokens a word"),
        (Behaviour(usage=False), [], "12 answers came without usage"),
        (Behaviour(tokens_a_chunk=5), [], "5.00 a chunk"),
        (Behaviour(stops_after=3), [], "12 answers were shorter"),
        (Behaviour(), ["--dataset", "shared-prefix", "--prefix-len", "9", "--num-prefixes", "2"], "2 prefixes of 9"),
        (Behaviour(), ["--dataset", "trace", "--trace", "azure-code", "--speed", "1e6"], "the trace azure-code x1e+06"),
        (Behaviour(context=None), ["--dataset", "trace", "--request-rate", "inf"], "the server does not say it"),
        (Behaviour(context=300), ["--dataset", "trace", "--request-rate", "900"], "were cut to 300 tokens"),
        (Behaviour(models=False), ["--model", "other"], "other"),
        (Behaviour(key="k"), ["--request-rate", "1000"], "Request rate configured"),
    ],
)  # fmt: skip
def test_what_a_run_says_of_itself(behaviour, words, said):
    result, server = against(behaviour, *FEW, *words, env={"OPENAI_API_KEY": "k"})
    assert result.exit_code == 0, result.output
    assert said in result.output
    assert all(behaviour.count(_text(each)) + each["max_tokens"] <= (behaviour.context or 1 << 30) for each in
               server.behaviour.requests[-12:])  # fmt: skip


def _text(fields):
    return fields["messages"][0]["content"] if "messages" in fields else fields["prompt"]


def test_when_nothing_succeeds_it_fails_and_says_why():
    result, _ = against(Behaviour(fails=lambda n: "500"), *FEW)
    assert result.exit_code == 1
    assert "every warm-up failed: HTTP 500: told to fail" in result.output
    result, _ = against(Behaviour(fails=lambda n: "error chunk"), *FEW, "--num-warmups", "0")
    assert result.exit_code == 1
    assert "failed: 12 x error in the stream (the engine died)" in result.output


def test_ctrl_c_prints_what_is_there():
    with serving_in_thread(Behaviour(fails=lambda n: "hang" if n > 6 else "")) as (url, server):

        def interrupt():
            while server.number < 11:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGINT)

        thread = threading.Thread(target=interrupt)
        thread.start()
        result = bench("--base-url", url, *FEW)
        thread.join()
    assert result.exit_code == 130
    assert "interrupted: 6 requests" in result.output
    assert "Successful requests:                         6" in result.output


def test_no_server_is_a_failure_and_not_a_traceback():
    with serving_in_thread(Behaviour()) as (url, _):
        pass
    result = bench("--base-url", url)
    assert result.exit_code == 1
    assert "cannot connect" in result.output
