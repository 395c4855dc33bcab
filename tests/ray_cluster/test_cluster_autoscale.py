"""Ray, for real: attention workers that come and go, and what the cluster's autoscaler is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
from ray_nodes import Namespaces, all_end

pytestmark = pytest.mark.real

ASKED = """
from lamina.ray_cluster.connection import connect
connect("auto")

def asked():
    import ray
    from ray.autoscaler.v2.sdk import get_cluster_status
    from ray.autoscaler.v2.utils import is_autoscaler_v2
    if not is_autoscaler_v2():
        from ray._private.ray_constants import AUTOSCALER_RESOURCE_REQUEST_CHANNEL
        from ray.experimental.internal_kv import _internal_kv_get
        return json.loads(_internal_kv_get(AUTOSCALER_RESOURCE_REQUEST_CHANNEL) or "[]")
    status = get_cluster_status(ray.get_runtime_context().gcs_address)
    demands = status.resource_demands.cluster_constraint_demand
    counted = [each for demand in demands for each in demand.bundles_by_count]
    return [dict(each.bundle) for each in counted for _ in range(each.count)]
"""


def test_workers_come_and_go_and_the_clusters_autoscaler_is_asked_for_nodes(nodes: Namespaces) -> None:
    said = nodes.run(
        ASKED
        + """
from lamina.ray_cluster.attention import RayAttentionWorkers
workers = RayAttentionWorkers(1, kv_memory=1 << 24, threads=1, most=2)
workers.start()
news = queue.SimpleQueue()
workers.watch(news.put, news.put)
requests = [asked()]
workers.grow(2)
names = [news.get(timeout=60).name]
requests.append(asked())
process = workers.status()[1].process
workers.retire("attention-1")
end = time.monotonic() + 30
while len(workers._actors) > 1 and time.monotonic() < end:
    time.sleep(0.1)
left, requests = [status.name for status in workers.status()], [*requests, asked()]
workers.grow(2)
names.append(news.get(timeout=60).name)
workers.close()
say(names=names, left=left, process=process, requests=requests, last=asked())
"""
    )
    assert said["names"] == ["attention-1", "attention-1.1"]
    assert said["left"] == ["attention-0"]
    assert all_end([said["process"]])
    assert said["requests"] == [[{"lamina_attention": 1}] * count for count in (1, 2, 1)]
    assert said["last"] == []


def test_an_engine_on_the_cluster_gets_a_worker_more_as_its_kv_grows(nodes: Namespaces, model: Path) -> None:
    said = nodes.run(
        f"""
from lamina import LLM
prompts = [" ".join(str(at * number % 13) for at in range(60)) for number in range(1, 13)]
greedy = {{"max_tokens": 60, "temperature": 0, "ignore_eos": True}}
options = {{"threads": 1, "dtype": "float32"}}
with LLM({str(model)!r}, **options) as llm:
    expected = [completion.text for completion in llm.generate(prompts, **greedy)]
with LLM({str(model)!r}, cluster="auto", autoscale=(1, 2), kv_memory="1MiB", page_size=16, **options) as llm:
    texts, joined, end = [], 0, time.monotonic() + 60
    snapshots = queue.SimpleQueue()
    while joined < 1 and time.monotonic() < end:
        texts.append([completion.text for completion in llm.generate(prompts, **greedy)] == expected)
        llm._runtime.engine.snapshot(snapshots.put)
        joined = snapshots.get(timeout=10).joined_holders
say(texts=texts, joined=joined)
""",
        seconds=180,
    )
    assert all(said["texts"])
    assert said["joined"] == 1
