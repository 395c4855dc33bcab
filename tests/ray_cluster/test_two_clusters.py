"""Two Ray clusters on one host: each engine has the workers of its own cluster, and ends alone."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from ray_nodes import HEAD, PORT, cluster

OTHER_PORT = PORT + 1000
ENGINE = """
import lamina
from lamina.ray_cluster.connection import connection
from lamina.ray_cluster.handle import engine_status

options = {{"dtype": "float32", "threads": 1, "kv_memory": 1 << 26, "local_channel": False, "local_share": 0}}
with lamina.LLM({model!r}, cluster={address!r}, attention_workers=1, **options) as llm:
    text = llm.generate("the 1 2", max_tokens=20, temperature=0).text
    with connection({address!r}) as ray:
        engines = engine_status(ray)
    workers = [row["address"] for each in engines.values() for row in each["workers"]]
    say(text=text, engines=len(engines), workers=workers)
    sys.stdin.readline()
    say(text=llm.generate("the 1 2", max_tokens=20, temperature=0).text)
"""


@pytest.mark.fault("F28")
@pytest.mark.real
@pytest.mark.timeout(240)
def test_two_clusters_on_one_host_do_not_meet(tmp_path: Path, model: Path) -> None:
    resources = {"lamina_model": 1, "lamina_attention": 1}
    with (
        cluster(tmp_path, resources) as nodes,
        tempfile.TemporaryDirectory(prefix="lamina-", dir="/tmp", ignore_cleanup_errors=True) as scratch,
    ):
        nodes.ray_start(
            0, "--head", f"--node-ip-address={HEAD}", f"--port={OTHER_PORT}", "--include-dashboard=false",
            "--ray-client-server-port=20001", f"--temp-dir={scratch}",
            """--resources={"lamina_model": 1, "lamina_attention": 1}""",
        )  # fmt: skip
        codes = [ENGINE.format(model=str(model), address=f"{HEAD}:{port}") for port in (PORT, OTHER_PORT)]
        with nodes.program(codes[0], 200) as first:
            one = first.hear()
            with nodes.program(codes[1], 200) as second:
                other = second.hear()
                assert (one["engines"], other["engines"]) == (1, 1)
                assert one["text"] == other["text"]
                assert not set(one["workers"]) & set(other["workers"])
            first.tell()  # the other one has ended with its program
            assert first.hear()["text"] == one["text"]
