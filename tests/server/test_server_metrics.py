"""What Prometheus reads: every name documented and on the dashboard, numbers that add up, totals that never fall."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import snapshots
from prometheus_client.parser import text_string_to_metric_families
from scripted_reply import ticket
from snapshots import holder

from lamina.completions import Completion, Sample, Timing, Usage
from lamina.errors import EngineError
from lamina.messages.snapshot import BATCH_BUCKETS, Snapshot
from lamina.server.frontend import DeadlineExceeded
from lamina.server.metrics.metrics import MAX_VALUES, ServerMetrics
from lamina.server.models import ModelState

DOCS = Path(__file__).parents[2] / "docs"
DASHBOARD = DOCS / "monitoring" / "grafana" / "dashboards" / "lamina.json"
SERIES = ("_bucket", "_sum", "_count")


def snapshot(**changes: Any) -> Snapshot:
    local, idle = holder("local", local=True, free_pages=90, keeps=False), holder("w2", free_pages=100)
    fields = {"page_size": 16, "block_pages": 4, "cached_pages": {"w1": 10}, "holders": (local, holder("w1"), idle)}
    return snapshots.snapshot(**fields | changes)


Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def scraped(metrics: ServerMetrics, seen: Snapshot | None, state: Any = "ready", restarts: int = 0) -> Samples:
    """Samples by name and labels, those that all metrics of the model share left out."""
    text, kind = metrics.render({"m": ModelState(seen, state, restarts)})
    assert kind.startswith("text/plain")
    found: Samples = {}
    for family in text_string_to_metric_families(text.decode()):
        for sample in family.samples:
            labels = {key: value for key, value in sample.labels.items() if key not in ("model_name", "engine")}
            key = (sample.name, tuple(sorted(labels.items())))
            assert key not in found
            found[key] = sample.value
    return found


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples[name, tuple(sorted(labels.items()))]


def completion(*lengths: int, reason: Any = "stop", timing: Timing | None = None) -> Completion:
    samples = tuple(Sample(i, "", tuple(range(length)), reason, None) for i, length in enumerate(lengths))
    return Completion(samples, Usage(3, sum(lengths), 0), timing or Timing(0.1, 0.4, 2.4, sum(lengths)))


def test_what_the_engine_says_is_rendered() -> None:
    found = scraped(
        ServerMetrics("m"),
        snapshot(
            running=3, waiting=2, prompt_tokens=70, prefix_hits=30, prefix_queries=100, generation_tokens=9,
            model_seconds=1.5, attention_seconds=2.5, idle_seconds=6.0, kv_read=1.0, kv_whole=4.0, missed_mass=0.5,
            missed_queries=50.0, kv_resident=0.75, kv_redundant=0.5, workers_wanted=3,
            lost_holders=1, missing=("w9",), corrupted=2, blocked=3, batch_tokens=44, returned_workers=3,
            plan_seconds=0.25, announce_seconds=0.75, expert_bytes=640, expert_rows=32,
            drafts=5, draft_tokens=20, accepted_tokens=12, accepted_at=(5, 4, 3, 0),
            batch_counts=(1, 2, *(0,) * (len(BATCH_BUCKETS) - 1)),
        ),
        restarts=2,
    )  # fmt: skip
    expected = {
        "expert_bytes_total": 640,
        "expert_rows_total": 32,
        "num_requests_running": 3,
        "num_requests_waiting": 2,
        "prompt_tokens_total": 100,
        "computed_prompt_tokens_total": 70,
        "prefix_cache_hits_total": 30,
        "generation_tokens_total": 9,
        "plan_seconds_total": 0.25,
        "spec_decode_num_drafts_total": 5,
        "spec_decode_num_draft_tokens_total": 20,
        "spec_decode_num_accepted_tokens_total": 12,
        "announce_seconds_total": 0.75,
        "kv_read_ratio": 0.25,
        "missed_mass_ratio": 0.01,
        "kv_resident_ratio": 0.75,
        "kv_redundant_share": 0.5,
        "attention_workers_wanted": 3,
        "kv_full_in_seconds": math.inf,
        "recoveries_total": 1,
        "model_workers_returned_total": 3,
        "corrupted_requests_total": 2,
        "blocked_requests_total": 3,
        "engine_restarts_total": 2,
        "iteration_tokens_total_sum": 44,
    }
    assert {name: value(found, f"lamina:{name}") for name in expected} == expected
    assert [value(found, "lamina:tier_seconds_total", tier=t) for t in ("model", "attention", "idle")] == [1.5, 2.5, 6]
    per_position = "lamina:spec_decode_num_accepted_tokens_per_pos_total"
    assert [value(found, per_position, position=str(at)) for at in range(4)] == [5, 4, 3, 0]
    assert [value(found, "lamina:attention_worker_up", worker=w) for w in ("w1", "w2", "w9")] == [1, 1, 0]
    assert ("lamina:attention_worker_up", (("worker", "local"),)) not in found
    assert value(found, "lamina:attention_exchange_bytes_total", worker="w1", direction="received") == 2000
    assert value(found, "lamina:attention_exchange_seconds_count", worker="w1") == 7
    assert value(found, "lamina:attention_exchange_seconds_bucket", worker="w1", le="0.0002") == 5
    assert value(found, "lamina:attention_exchange_seconds_sum", worker="w1") == 3.5
    assert value(found, "lamina:iteration_tokens_total_bucket", le="8.0") == 3
    assert value(found, "lamina:cache_config_info", block_size="16", num_gpu_blocks="50") == 1
    assert value(found, "lamina:kv_cache_usage_perc") == 50 / 200  # of those that keep sequences; the cache's are free
    for worker, states in {"w1": (50, 10, 40), "w2": (0, 0, 100), "local": (10, 0, 90)}.items():
        pages = [value(found, "lamina:kv_pages", worker=worker, state=state) for state in ("used", "cached", "free")]
        assert tuple(pages) == states


def test_one_that_is_alone_keeps_everything_itself() -> None:
    found = scraped(
        ServerMetrics("m"), snapshot(holders=(holder("local", local=True, free_pages=25),), cached_pages={})
    )
    assert value(found, "lamina:kv_cache_usage_perc") == 0.75


def test_a_local_pool_that_keeps_sequences_beside_others_counts() -> None:
    """What a local tier used was missing from `kv_cache_usage_perc`, which left out every holder in the process."""
    holders = (holder("local", local=True, free_pages=0), holder("w1", free_pages=100))
    found = scraped(ServerMetrics("m"), snapshot(holders=holders, cached_pages={}))
    assert value(found, "lamina:kv_cache_usage_perc") == 0.5


def test_an_engine_that_is_gone_runs_nothing_and_its_counts_stay() -> None:
    metrics = ServerMetrics("m")
    seen = snapshot(running=3, waiting=1, generation_tokens=9, lanes=2)
    scraped(metrics, seen)
    for again in (seen, None):
        found = scraped(metrics, again, "dead")
        assert value(found, "lamina:engine_up") == value(found, "lamina:num_requests_running") == 0
        assert value(found, "lamina:num_requests_waiting") == value(found, "lamina:kv_cache_usage_perc") == 0
        assert value(found, "lamina:attention_worker_up", worker="w1") == 0
        assert value(found, "lamina:generation_tokens_total") == 9


def test_totals_go_on_over_a_restart() -> None:
    metrics = ServerMetrics("m")
    counts = (4, *(0,) * len(BATCH_BUCKETS))
    first = snapshot(
        generation_tokens=9, prefix_hits=5, batch_counts=counts, batch_tokens=4, idle_seconds=2.0, began=1.0
    )
    scraped(metrics, first)
    second = replace(
        first, generation_tokens=2, prefix_hits=0, batch_counts=(1, *counts[1:]), batch_tokens=1, began=5.0
    )
    for _ in range(3):
        found = scraped(metrics, second, restarts=1)
        assert value(found, "lamina:generation_tokens_total") == 11
        assert value(found, "lamina:prompt_tokens_total") == 5
        assert value(found, "lamina:iteration_tokens_total_count") == 5
        assert value(found, "lamina:iteration_tokens_total_sum") == 5
        assert value(found, "lamina:tier_seconds_total", tier="idle") == 4
    found = scraped(metrics, replace(second, generation_tokens=3, began=9.0), restarts=2)
    assert value(found, "lamina:generation_tokens_total") == 14
    assert value(scraped(metrics, None, "loading"), "lamina:engine_restarts_total") == 2


def test_requests_are_counted_as_clients_see_them() -> None:
    metrics = ServerMetrics("m")
    asked = ticket(n=2, max_tokens=50)
    asked.scheduled = asked.submitted + 0.1
    metrics.of("m").first_token(0.4)
    metrics.of("m").next_tokens(0.02, 1)
    metrics.of("m").next_tokens(0.06, 3)
    metrics.of("m").ended(asked, completion(5, 11), 2.5)
    metrics.of("m").failed(asked, DeadlineExceeded("late"))
    metrics.of("m").failed(asked, EngineError("broken"))
    found = scraped(metrics, None, "loading")
    expected = {
        "time_to_first_token_seconds_sum": 0.4,
        "inter_token_latency_seconds_count": 4,
        "inter_token_latency_seconds_sum": pytest.approx(0.08),
        "e2e_request_latency_seconds_sum": 2.5,
        "request_queue_time_seconds_sum": pytest.approx(0.1),
        "request_prefill_time_seconds_sum": pytest.approx(0.3),
        "request_decode_time_seconds_sum": pytest.approx(2.0),
        "request_inference_time_seconds_sum": pytest.approx(2.3),
        "request_time_per_output_token_seconds_sum": pytest.approx(0.2),
        "request_generation_tokens_sum": 16,
        "request_max_num_generation_tokens_sum": 11,
        "request_params_n_sum": 2,
        "request_params_max_tokens_sum": 50,
    }
    assert {name: value(found, f"lamina:{name}") for name in expected} == expected
    assert value(found, "lamina:inter_token_latency_seconds_bucket", le="0.025") == 4
    assert value(found, "lamina:request_success_total", finished_reason="stop") == 2
    assert value(found, "lamina:request_success_total", finished_reason="length") == 0
    assert value(found, "lamina:request_success_total", finished_reason="error") == 2
    assert value(found, "lamina:request_failures_total", error="DeadlineExceeded") == 1


def test_what_ended_early_has_no_times_that_never_were() -> None:
    metrics = ServerMetrics("m")
    queued, read = ticket(), ticket()
    read.scheduled = read.submitted + 0.1
    metrics.of("m").ended(queued, completion(0, reason="abort", timing=Timing(0, 0, 0, 0)), 1.0)
    metrics.of("m").ended(read, completion(0, reason="abort", timing=Timing(0.1, 0, 0.5, 0)), 1.0)
    found = scraped(metrics, None)
    assert value(found, "lamina:e2e_request_latency_seconds_count") == 2
    assert value(found, "lamina:request_queue_time_seconds_count") == 1
    assert value(found, "lamina:request_prefill_time_seconds_count") == 0
    assert value(found, "lamina:request_decode_time_seconds_count") == 0
    assert value(found, "lamina:request_success_total", finished_reason="abort") == 2


def test_outsiders_cannot_make_series_without_end() -> None:
    metrics = ServerMetrics("m")
    for i in range(1000):
        metrics.http(f"/{i}", f"METHOD{i}", 200, 0.1)
        metrics.http("/v1/models", "GET", 200, 0.1)
        metrics.rejected(f"reason {i}")
    found = scraped(metrics, None)
    responses = {labels: count for (name, labels), count in found.items() if name == "http_requests_total"}
    assert sum(responses.values()) == 2000
    assert len(responses) <= MAX_VALUES + 1
    assert value(found, "http_requests_total", handler="/v1/models", method="GET", status="200") == 1000
    assert value(found, "http_request_duration_seconds_count", handler="/v1/models", method="GET") == 1000
    reasons = [count for (name, _), count in found.items() if name == "lamina:rejections_total"]
    assert sum(reasons) == 1000
    assert len(reasons) <= MAX_VALUES + 1


def test_a_name_with_quotes_stays_a_label() -> None:
    text, _ = ServerMetrics('a"b\nc\\d').render({})
    [family] = [f for f in text_string_to_metric_families(text.decode()) if f.name == "lamina:engine_up"]
    assert family.samples[0].labels["model_name"] == 'a"b\nc\\d'


def with_pools() -> Snapshot:
    pools = dataclasses.replace(holder("w1"), pools=((60, 10), (40, 30)))
    return snapshot(holders=(pools, holder("w2")), workers_wanted=2)


def test_pages_are_told_by_pool_where_there_are_several() -> None:
    found = scraped(ServerMetrics("m"), with_pools())
    pages = {key[1]: count for key, count in found.items() if key[0] == "lamina:kv_pool_pages"}
    assert {tuple(value for _, value in labels): count for labels, count in pages.items()} == {
        ("0", "taken", "w1"): 50, ("0", "free", "w1"): 10, ("1", "taken", "w1"): 10, ("1", "free", "w1"): 30,
    }  # fmt: skip


def exported() -> set[str]:
    """Every name, as queries write it: counters with `_total`, histograms without their series' endings."""
    now = replace(with_pools(), held_back={"w9": "circuit breaker"})
    text = ServerMetrics("m").render({"m": ModelState(now, "ready")})[0].decode()
    return set(re.findall(r"^# TYPE (\S+)", text, re.MULTILINE))


def test_every_metric_is_documented_and_the_documents_name_no_other() -> None:
    documented = set(re.findall(r"`((?:lamina:|http_|process_)\w+)`", (DOCS / "metrics.md").read_text()))
    assert exported() == documented


def test_the_dashboard_asks_for_nothing_that_is_not_there() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    queries += [variable.get("definition", "") for variable in dashboard["templating"]["list"]]
    named = {name for query in queries for name in re.findall(r"(?:lamina:|http_|process_)\w+", query)}
    names = exported()
    known = names | {name + ending for name in names for ending in SERIES}
    assert named <= known
    assert len(named) > 30
    ours = {name for name in names if not name.startswith(("process_", "lamina:build", "lamina:cache_config"))}
    shown = {name for name in ours if any(each in named for each in (name, *(name + ending for ending in SERIES)))}
    assert {"lamina:attention_exchange_seconds", "lamina:tier_seconds_total", "lamina:kv_pages"} <= shown


def test_panels_of_the_dashboard_do_not_overlap() -> None:
    taken: dict[tuple[int, int], str] = {}
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        for cell in [(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])]:
            assert taken.setdefault(cell, panel["title"]) == panel["title"]


VLLM = """num_requests_running num_requests_waiting kv_cache_usage_perc cache_config_info prompt_tokens_total
generation_tokens_total request_success_total num_preemptions_total prefix_cache_queries_total prefix_cache_hits_total
time_to_first_token_seconds inter_token_latency_seconds request_time_per_output_token_seconds
e2e_request_latency_seconds request_queue_time_seconds request_inference_time_seconds request_prefill_time_seconds
request_decode_time_seconds request_prompt_tokens request_generation_tokens request_max_num_generation_tokens
request_params_n request_params_max_tokens iteration_tokens_total"""


def test_vllms_names_are_all_there() -> None:
    assert {f"lamina:{name}" for name in VLLM.split()} <= exported()


def test_metrics_load_neither_torch_nor_opentelemetry() -> None:
    program = """
import sys
import lamina.server.metrics.metrics, lamina.server.metrics.tracing
loaded = [name for name in ("torch", "ray", "opentelemetry", "fastapi") if name in sys.modules]
sys.exit(f"loaded: {loaded}" if loaded else 0)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
