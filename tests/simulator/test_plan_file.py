"""Plan files: written and read back equal, deployed, and refused with the reason where they are wrong."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from planning import BIG, EPYC, FHBN, H20, H100, SMALL, dop, together

from lamina.config import EngineConfig
from lamina.errors import InvalidRequest
from lamina.llm import LLM
from lamina.plan_file import read as read_engine_plan
from lamina.server.ray_serve import ServePlan
from lamina.simulator.costs.cost_model import KvPolicy, Speculation
from lamina.simulator.costs.hardware import Device, Link
from lamina.simulator.costs.model_configs import model
from lamina.simulator.costs.systems import Colocated, Disaggregated, Offloaded, System
from lamina.simulator.event_loop.simulate import Slo
from lamina.simulator.planning.deployment import commands, engine_keywords, undeployable
from lamina.simulator.planning.plan_file import Plan, Prediction, TraceSummary, dumps, read, write

HERE = Device("here", "cpu", flops=1e11, memory=8e9, bandwidth=2e10, price=0.1)
SYSTEMS: dict[str, System] = {
    "colocated": together(4),
    "whole prompts": replace(together(4), chunked_prefill=False, max_sequences=77),
    "disaggregated": Disaggregated(prefill=together(2), decode=together(4, H20), link=FHBN),
    "offloaded": dop(2, 4, policy=KvPolicy("streaming(sink=64, recent=256)", 0.3, 0.4, 4096)),
    "prompts, dense layers and attention apart": Disaggregated(prefill=together(2), decode=dop(2, 2), link=FHBN),
    "two links": Disaggregated(prefill=together(2), decode=dop(2, 2), link=replace(FHBN, name="other", bandwidth=1e9)),
    "kept in both tiers": dop(2, 2, lanes=2, local_share=0.4, attention_memory_share=0.98),
    "replicas": dop(2, 2, lanes=3, model_replicas=2),
    "on hosts": dop(2, 3, attention=EPYC, shard="sequence", workers=6),
    "experts": Colocated(model=model("qwen3-30b-a3b"), device=H100),
    "states": replace(dop(2, 4), model=model("kimi-linear-48b-a3b"), shard="sequence", sequence_tokens=1000),
    "packed": Colocated(model=BIG.with_weights("int4"), device=EPYC),
    "a mix": Colocated(model=BIG.with_weights("0.61"), device=EPYC),
    "n-grams": replace(dop(2, 4), speculation=Speculation(0.7, 8, 0.5)),
    "drafts": replace(together(4), speculation=Speculation(0.7, 4, name="./draft", draft=model("llama-3-8b"))),
    "choices": Colocated(model=model("glm-5"), device=replace(H100, memory=1e12), tensor_parallel=8),
}
PREDICTED = Prediction("closed form", 4.0, 800.0, 0.03, 0.5, 0.99, 41.5, 44.24, 15.4)
TRACE = TraceSummary("azure-conv", 19366, 5.53, 1154.7, 211.1, 1227.0)


def plan_of(system: System, **more: Any) -> Plan:
    given: dict[str, Any] = {
        "model": "llama-3-70b",
        "predicted": PREDICTED,
        "trace": TRACE,
        "slo": Slo(ttft=2.0),
        "engine": engine_keywords(system, 4096),
    }
    return Plan(system=system, **given | more)


@pytest.mark.parametrize("kind", SYSTEMS)
def test_what_is_written_is_read_back_equal(kind: str, tmp_path: Path) -> None:
    plan = plan_of(SYSTEMS[kind], replicas=3)
    write(tmp_path / "plan.toml", plan)
    again = read(tmp_path / "plan.toml")
    assert again == plan
    assert again.system == plan.system
    assert dumps(again) == dumps(plan)
    assert_engine_reads_the_same(tmp_path / "plan.toml", plan)


def assert_engine_reads_the_same(file: Path, plan: Plan) -> None:
    engine_plan = read_engine_plan(file)
    assert engine_plan == plan.one_replica()
    assert engine_plan.undeployable == undeployable(plan.system)


@given(
    name=st.text(max_size=30),
    price=st.floats(0, 1e6),
    bandwidth=st.floats(1, 1e16),
    read_share=st.floats(1e-6, 1.0),
    tokens=st.integers(1, 1 << 20),
)
def test_any_numbers_and_names_come_back(
    tmp_path_factory: pytest.TempPathFactory, name: str, price: float, bandwidth: float, read_share: float, tokens: int
) -> None:
    system = Colocated(
        model=replace(BIG, name=name),
        tensor_parallel=4,
        device=replace(H20, price=price, bandwidth=bandwidth),
        batch_tokens=tokens,
        policy=KvPolicy(name, read_share),
        label=name,
    )
    plan = plan_of(system, model=name, trace=replace(TRACE, name=name), engine={})
    file = tmp_path_factory.getbasetemp() / "any.toml"
    file.write_text(dumps(plan), encoding="utf-8", newline="\n")
    assert read(file) == plan


def test_the_engine_has_what_the_plan_counts_on() -> None:
    """Two H100 have 2 x 80 x 0.9 - 137.5 = 6.5 GB beside the weights, which is room for 19,836 tokens of a prompt; two
    prompts of the whole context take less than eight."""
    offloaded = engine_keywords(dop(2, 4), 4096)
    assert offloaded == {
        "device": "cuda", "attention_device": "cuda", "max_batch_tokens": 2048, "max_num_seqs": 4096,
        "attention_workers": 4, "shard": "heads", "cluster": "auto", "query_first": "auto",
        "kv_memory": pytest.approx(0.9 * 96e9, rel=1e-6), "kv_local": pytest.approx(6.5e9, rel=1e-4),
        "local_share": 0, "model_workers": 2, "model_parallel": "tensor", "weights": "bfloat16",
    }  # fmt: skip
    EngineConfig(**{**offloaded, **{name: int(offloaded[name]) for name in ("kv_memory", "kv_local")}})
    half = engine_keywords(dop(2, 4, policy=KvPolicy("auto", 0.3, 0.5)), 4096)
    assert half["kv_memory"] == pytest.approx(0.9 * 96e9, rel=1e-6)  # what is held less makes room for more tokens
    assert half["policy"] == "auto"
    alone = engine_keywords(replace(together(4), max_sequences=77), 4096)
    assert "attention_workers" not in alone
    assert (alone["device"], alone["attention_device"], alone["max_num_seqs"]) == ("cuda", "cuda", 77)
    assert alone["kv_memory"] == pytest.approx(0.9 * 4 * 80e9 - BIG.weight_bytes, rel=1e-5)  # whole tokens
    assert engine_keywords(replace(together(4), chunked_prefill=False), 5000)["max_batch_tokens"] == 5000
    hosts = engine_keywords(dop(2, 3, attention=EPYC, shard="sequence", workers=6, overlap=False), 4096)
    assert (hosts["device"], hosts["attention_device"], hosts["query_first"]) == ("cuda", "cpu", "never")


def test_replicas_of_the_weights_are_model_workers_in_rotation() -> None:
    rotating = replace(dop(1, 4, lanes=3, model_replicas=2), model=SMALL)
    engine = engine_keywords(rotating, 4096)
    assert (engine["model_workers"], engine["model_parallel"], engine["lanes"]) == (2, "replicas", 3)
    EngineConfig(**engine)


TPU = replace(H100, name="tpu", kind="tpu")
NOT_HERE: list[tuple[System, str]] = [
    (SYSTEMS["disaggregated"], "prompts and decodes in one place"),
    (dop(2, 4, lanes=2), "2 lanes where 2 devices share each layer"),
    (dop(2, 4, lanes=1, model_replicas=2), "cut among 2 devices and there are 2 replicas"),
    (replace(dop(1, 4, lanes=4, model_replicas=2), model=SMALL), "4 lanes; 2 replicas have 3 at most"),
    (replace(together(4), device=TPU), "no kernels here run on tpu"),
    (replace(dop(2, 4), model=model("deepseek-v2-lite")), "one KV head cannot be cut"),
]


@pytest.mark.parametrize(("system", "why"), NOT_HERE)
def test_what_no_engine_is_has_no_keywords(system: System, why: str) -> None:
    assert why in undeployable(system)
    assert engine_keywords(system, 4096) == {}


@pytest.mark.parametrize("kind", SYSTEMS)
def test_what_is_deployed_is_a_config(kind: str) -> None:
    engine = engine_keywords(SYSTEMS[kind], 4096)
    assert bool(engine) == (undeployable(SYSTEMS[kind]) == "")
    EngineConfig(**engine)


def test_a_plan_says_what_to_run(tmp_path: Path) -> None:
    file = tmp_path / "my plan.toml"
    assert commands(file, 1, {}) == [f"lamina serve --plan '{file}'"]
    every, one = commands(file, 3, {"cluster": "auto"})
    assert every.startswith(f"serve run lamina.server.ray_serve:build_app plan='{file}'    # all 3 replicas")
    assert one.startswith(f"lamina serve --plan '{file}'")


def test_replicas_of_a_plan_are_replicas_of_ray_serve(tmp_path: Path) -> None:
    file = tmp_path / "plan.toml"
    write(file, plan_of(dop(2, 4), replicas=3))
    plan = ServePlan.read({"plan": str(file), "max_requests": 7, "open": True})
    assert (plan.replicas, plan.model, plan.settings.max_requests) == (3, "llama-3-70b", 7)
    assert (plan.config.attention_workers, plan.config.model_workers, plan.config.cluster) == (4, 2, "auto")
    assert ServePlan.read({"plan": str(file), "model": "./here", "attention_workers": 2}).config.attention_workers == 2
    with pytest.raises(InvalidRequest, match="plan is 3; allowed is the path"):
        ServePlan.read({"plan": 3})


def test_the_engine_keeps_weights_and_drafts_as_planned() -> None:
    assert engine_keywords(SYSTEMS["packed"], 4096)["quantize"] == "int4"
    assert engine_keywords(SYSTEMS["a mix"], 4096)["weights"] == "packed"
    drafts = engine_keywords(SYSTEMS["drafts"], 4096)
    assert (drafts["speculate"], drafts["num_speculative_tokens"]) == ("./draft", 4)
    ngrams = engine_keywords(SYSTEMS["n-grams"], 4096)
    assert (ngrams["speculate"], ngrams["num_speculative_tokens"]) == ("ngram", 8)
    plain = engine_keywords(together(4), 4096)
    assert plain["weights"] == "bfloat16"  # else a file of packed ones would stay packed
    assert not {"quantize", "speculate", "kv_dtype"} & plain.keys()
    floats = replace(together(4), model=BIG.with_weights("float32"), device=replace(EPYC, interconnect=1e11))
    assert {name: engine_keywords(floats, 4096)[name] for name in ("weights", "kv_dtype", "device")} == {
        "weights": "float32", "kv_dtype": "bfloat16", "device": "cpu",
    }  # fmt: skip


def test_a_plan_says_that_no_gpu_keeps_weights_packed() -> None:
    packed = plan_of(replace(together(4), model=BIG.with_weights("int4")))
    assert packed.one_replica().remarks() == [
        "weights of fewer than 16 bits stay so on CPUs alone, so an engine on h100 computes with 16 bits"
    ]
    assert "quantize" not in packed.engine
    assert plan_of(SYSTEMS["packed"]).one_replica().remarks() == []


def test_devices_without_a_network_are_one_machine() -> None:
    small = model("smollm2-135m")
    socket = Link("socket", 2e9, 9e-5)
    local = Offloaded(model=small, model_device=HERE, attention_device=HERE, link=socket, workers=2)
    keywords = engine_keywords(local, 1000)
    assert "cluster" not in keywords
    assert (keywords["device"], keywords["attention_device"]) == ("cpu", "cpu")
    assert keywords["attention_workers"] == 2
    own = 8 * small.max_context * small.kv_bytes_per_token()
    assert keywords["kv_local"] == int(own)
    assert keywords["kv_memory"] == pytest.approx((0.9 * 8e9 - small.weight_bytes - own) / 2, rel=1e-6)


class Recording(LLM):
    """Keeps what it would load."""

    def __init__(self, model: str | Path, *, progress: Any = None, **config: Any) -> None:
        self.asked = (model, progress, config)


def test_a_plan_is_deployed_and_what_is_given_besides_wins(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "plan.toml"
    write(file, plan_of(dop(2, 4), replicas=2))
    llm = Recording.from_plan(file)
    assert isinstance(llm, Recording)
    assert llm.asked[0] == "llama-3-70b"
    planned = {"attention_workers": 4, "model_workers": 2, "model_parallel": "tensor", "local_share": 0}
    assert planned.items() <= llm.asked[2].items()
    assert "lanes" not in llm.asked[2]  # ranks have one batch under way
    assert "2 replicas" in caplog.text
    other = Recording.from_plan(file, model="smollm2-135m", cluster=None, attention_workers=1, progress=print)
    assert isinstance(other, Recording)
    assert other.asked[:2] == ("smollm2-135m", print)
    assert {"cluster": None, "attention_workers": 1, "model_workers": 2}.items() <= other.asked[2].items()


def test_what_no_engine_does_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "plan.toml"
    write(file, plan_of(SYSTEMS["disaggregated"]))
    with pytest.raises(InvalidRequest, match="what was planned: the engine computes prompts"):
        Recording.from_plan(file)


WRONG = [
    ('model = "llama-3-70b"\n', "", "has no model"),
    ('kind = "offloaded"', 'kind = "magic"', "the kind 'magic'; allowed are colocated, disaggregated, offloaded"),
    ('kind = "offloaded"', 'kind = "colocated"', "system has the key 'model_device'; allowed are model, device"),
    ('link = "fhbn-400g"', 'link = "none"', "unknown link 'none'; known are fhbn-400g"),
    ('link = "fhbn-400g"\n', "", "system has no link; it is needed"),
    ("ttft = 2.0", "ttft = 0", "ttft of the SLO is 0"),
    ("groups = [", "groups = [] #", "shape.layers is 0; allowed are whole numbers from 1"),
    ('cluster = "auto"', "insecure = true", "engine has the key 'insecure'; allowed are dtype"),
    ('cluster = "auto"', 'token_file = "/etc/passwd"', "engine has the key 'token_file'"),
    ("attention_workers = 4", "attention_workers = 4000", "attention_workers is 4000; allowed are 0 to 1024"),
    ("[engine]", "[engine", "not TOML"),
]


@pytest.mark.parametrize(("old", "new", "said"), WRONG)
def test_what_is_wrong_is_named_with_the_file(tmp_path: Path, old: str, new: str, said: str) -> None:
    system = dop(2, 4, policy=KvPolicy("auto", 0.3))
    text = dumps(plan_of(replace(system, lanes=2), engine=engine_keywords(system, 4096)))
    assert old in text
    file = tmp_path / "plan.toml"
    file.write_text(text.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(InvalidRequest) as caught:
        read(file)
    assert said in str(caught.value)
    assert str(caught.value).startswith(str(file))


def test_a_plan_is_not_written_where_there_is_no_folder(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="cannot be written"):
        write(tmp_path / "no" / "such" / "folder.toml", plan_of(together(4)))


def test_two_devices_of_one_name_have_no_place_in_a_plan() -> None:
    with pytest.raises(InvalidRequest, match="two devices are called 'h100'"):
        dumps(plan_of(dop(2, 4, attention=replace(H100, price=1.0)), engine={}))


@given(st.data())
def test_a_damaged_file_is_refused_or_read_but_never_worse(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    lines = dumps(plan_of(dop(2, 4))).splitlines()
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(lines) - 1))
        lines[at] = data.draw(st.sampled_from([lines[at][:-3], "", lines[at] * 2, "x = [[]]", lines[at].upper()]))
    file = tmp_path_factory.getbasetemp() / "damaged.toml"
    file.write_text("\n".join(lines), encoding="utf-8")
    with suppress(InvalidRequest):
        read(file)
