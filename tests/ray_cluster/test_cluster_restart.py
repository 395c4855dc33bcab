"""Processes of the model side die on a real Ray: the engine's actor, its node, a model worker beyond 0.

Streams go on, and the attention workers stay. Two nodes, each in a network namespace of its own, as in `test_cluster`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from ray_nodes import GENERATE, HEAD, Namespaces, all_end, cluster, join

SECONDS = 240.0  # for one program: it starts an engine twice or three times


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Namespaces]:
    """A cluster: both nodes for a model worker, the head for two attention workers."""
    with cluster(tmp_path_factory.mktemp("ray"), {"lamina_model": 1, "lamina_attention": 2}) as made:
        join(made, """{"lamina_model": 1}""")
        yield made


STREAMS = """
import logging, threading
from lamina.ray_cluster.connection import connection
from lamina.ray_cluster.handle import engine_status

PROMPTS = ["the 1 2", "12 12 the the 12", "a"]
told = []

class Listener(logging.Handler):
    def emit(self, record):
        told.append(record.getMessage())

logging.getLogger("lamina").addHandler(Listener(logging.WARNING))
logging.getLogger("lamina").addHandler(logging.StreamHandler())  # a failure shows it

def sampling(tokens):
    return {"max_tokens": tokens, "temperature": 1.0, "seed": 5, "ignore_eos": True, "n": 2}

def wanted(tokens):
    with here() as llm:
        completions = llm.generate(PROMPTS, **sampling(tokens))
        return [list(sample.token_ids) for completion in completions for sample in completion.samples]

def streamed(llm, tokens, disturb):
    "All tokens by sample; `disturb` is called with how many have come."
    got = [[] for _ in range(2 * len(PROMPTS))]
    for event in llm.stream(PROMPTS, **sampling(tokens)):
        got[2 * event.prompt_index + event.sample_index].append(event.token_id)
        disturb(sum(map(len, got)))
    return got

def processes(llm):
    "Of the engine, and of its attention workers."
    with connection("auto") as ray:
        [status] = engine_status(ray).values()
    return status["process"], [row["process"] for row in status["workers"]]

def where(process):
    "The namespace of a process: that of its node."
    return os.readlink(f"/proc/{process}/ns/net")
"""


@pytest.mark.fault("F16")
@pytest.mark.real
@pytest.mark.timeout(300)
def test_the_engines_process_dies_under_streams_and_no_token_is_lost_or_repeated(two: Namespaces, model: Path) -> None:
    code = """
expected = wanted(300)
with on_cluster() as llm:
    first = processes(llm)
    killed = []

    def disturb(count):
        if len(killed) < 2 and count >= 300 * (1 + 2 * len(killed)):
            killed.append(processes(llm)[0])
            os.kill(killed[-1], signal.SIGKILL)

    got = streamed(llm, 300, disturb)
    last = processes(llm)
    again = streamed(llm, 10, lambda count: None)
say(same=got == expected, lengths=[len(each) for each in got], killed=killed, first=first, last=last, told=told,
    again=[each[:10] for each in expected] == again)
"""
    said = two.run(GENERATE.format(model=str(model)) + STREAMS + code, SECONDS)
    assert said["lengths"] == [300] * 6
    assert said["same"], said["told"]
    assert said["again"]
    engines = [said["first"][0], *said["killed"][1:], said["last"][0]]
    assert len(set(engines)) == 3, "each kill wants another process"
    assert said["first"][1] == said["last"][1], "the attention workers were started again"
    assert not any("is lost" in message for message in said["told"])
    assert sum("of the previous engine go on" in message for message in said["told"]) == 2, said["told"]
    assert all_end([said["last"][0], *said["last"][1]])


@pytest.mark.soak
@pytest.mark.timeout(300)
def test_an_engine_that_cannot_live_ends_with_an_error_and_takes_its_workers_along(
    two: Namespaces, model: Path
) -> None:
    code = """
import lamina.ray_cluster.owner

class Hopeless:
    def delay(self, now):
        return None

lamina.ray_cluster.owner.Backoff = Hopeless
llm = on_cluster()
engine, workers = processes(llm)
stream = llm.stream("the 1 2", max_tokens=4000, ignore_eos=True)
next(stream)
os.kill(engine, signal.SIGKILL)
try:
    for _ in stream:
        pass
except lamina.EngineError as error:
    said = str(error)
say(error=said, alive=llm.alive, workers=workers)
sys.stdin.readline()
llm.close()
"""
    with two.program(GENERATE.format(model=str(model)) + STREAMS + code, SECONDS) as program:
        said = program.hear()
        assert "too often to start it again" in said["error"]
        assert not said["alive"]
        assert all_end(said["workers"])


RANKS = """
def ranks(**more):
    return on_cluster(model_workers=2, model_parallel="tensor", **more)

def actor(name):
    "The process id of the actor that runs a model worker beyond 0."
    import subprocess
    found = subprocess.run(["pgrep", "-f", f"ray::{name}"], capture_output=True, text=True).stdout.split()
    return [int(process) for process in found]
"""


@pytest.mark.fault("F16")
@pytest.mark.real
@pytest.mark.timeout(300)
def test_two_tensor_ranks_as_actors_give_the_same_tokens_and_one_of_them_may_die(two: Namespaces, model: Path) -> None:
    code = """
expected = wanted(300)
with ranks() as llm:
    first = processes(llm)
    [rank] = actor("ModelActor")
    apart = where(rank) != where(first[0])
    killed = []

    def disturb(count):
        if not killed and count >= 600:
            killed.append(rank)
            os.kill(rank, signal.SIGKILL)

    whole = streamed(llm, 100, lambda count: None)
    got = streamed(llm, 300, disturb)
    last = processes(llm)
    [other] = actor("ModelActor")
say(whole=whole == [each[:100] for each in expected], same=got == expected, lengths=[len(each) for each in got],
    first=first, last=last, told=told, apart=apart, rank=rank, other=other)
"""
    said = two.run(GENERATE.format(model=str(model)) + STREAMS + RANKS + code, SECONDS)
    assert said["apart"], "both model workers were on one node"
    assert said["whole"]
    assert said["lengths"] == [300] * 6
    assert said["same"], said["told"]
    assert said["first"] == said["last"], "only the other model worker was to be started again"
    assert said["rank"] != said["other"]
    assert all_end([said["other"], said["last"][0], *said["last"][1]])


@pytest.mark.fault("F16")
@pytest.mark.real
@pytest.mark.timeout(300)
def test_the_engines_node_dies_and_it_goes_on_at_another(two: Namespaces, model: Path) -> None:
    """The last one: the second node is gone afterwards."""
    code = """
from lamina.ray_cluster.connection import connect, prefer, ray_module

connect("auto")
ray = ray_module()

class Holds:
    def host(self):
        return ray_module().util.get_node_ip_address()

expected = wanted(300)
head = next(node["NodeID"] for node in ray.nodes() if node["NodeManagerAddress"] == HEAD)
holds = ray.remote(Holds).options(resources={"lamina_model": 1}, num_cpus=0, scheduling_strategy=prefer(head)).remote()
ray.get(holds.host.remote())
with on_cluster() as llm:
    ray.kill(holds)
    before, workers = processes(llm)
    place, waited = where(before), []

    def disturb(count):
        if not waited and count >= 600:
            waited.append(count)
            say(elsewhere=place != where(os.getpid()))
            sys.stdin.readline()

    got = streamed(llm, 300, disturb)
    after, still = processes(llm)
    say(same=got == expected, lengths=[len(each) for each in got], told=told, workers=workers, still=still,
        here=where(after) == where(os.getpid()))
"""
    with two.program(f"HEAD = {HEAD!r}\n" + GENERATE.format(model=str(model)) + STREAMS + code, SECONDS) as program:
        assert program.hear() == {"elsewhere": True}
        two.kill(1)
        program.tell()
        said = program.hear()
    assert said["lengths"] == [300] * 6
    assert said["same"], said["told"]
    assert said["here"]
    assert not any("of the previous engine go on" in message for message in said["told"]), "it had no journal"
    assert said["workers"] == said["still"], "the attention workers were started again"
